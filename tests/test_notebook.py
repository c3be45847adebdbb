"""What a notebook shows: pictures and short tables, in a real kernel; and what `print` says."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html import escape

import nbformat
import pytest
from nbclient import NotebookClient

from llm_pruner import get_strategy, load_data, load_model
from llm_pruner.layer_scores import LayerScores
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.results import Comparison, DepthCurve, PruningPlan, PruningReport

CELLS = {
    "pruner": """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
from llm_pruner import *
model, tokenizer = load_model("demo", device="cpu")
data = load_data("demo", 16)
pruner = get_strategy("bi")(model, tokenizer)
pruner""",
    "plan": "plan = pruner.plan(data.scoring, n_layers=3, held_out=data.held_out)\nplan",
    "scores": "plan.scores",
    "curve": "curve = pruner.sweep(data.scoring, 3)\ncurve",
    "figure": "plot_layer_importance(plan.scores, removed=plan.remove)",
    "other figure": "from llm_pruner import plot_depth_curve\nplot_depth_curve(curve)",
    "split": "data",
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The last output of every cell, by its name."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(code) for code in CELLS.values()]
    folder = str(tmp_path_factory.mktemp("notebook"))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}})
    client.execute()
    return {name: cell.outputs[-1].data for name, cell in zip(CELLS, notebook.cells, strict=True)}


@pytest.mark.parametrize("name", ["figure", "other figure"])
def test_a_figure_is_a_picture(shown, name, tmp_path):
    picture = base64.b64decode(shown[name]["image/png"])
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


@pytest.mark.parametrize("name", ["plan", "scores", "curve"])
def test_results_are_short_tables_without_hashes(shown, name):
    html = shown[name]["text/html"]
    assert "<table" in html
    assert 3 <= html.count("<tr>") <= 41
    assert "fingerprint" not in html
    assert "sha256" not in html


def test_the_rest_says_what_it_is(shown):
    assert shown["pruner"]["text/plain"].startswith(
        "BlockInfluencePruner(<12 layers at model.layers of LlamaForCausalLM>, protect=[2, 2]"
    )
    assert shown["split"]["text/plain"] == (
        "DataSplit(16 items to score on, 0 to heal with, 16 held out)"
    )


# What `print` says


@pytest.fixture(scope="module")
def plan():
    model, tokenizer = load_model("demo", device="cpu")
    data = load_data("demo", 16)
    return get_strategy("bi")(model, tokenizer).plan(
        data.scoring, n_layers=3, model_id="demo", held_out=data.held_out
    )


def test_a_printed_plan_fits_a_screen(plan):
    assert repr(plan).startswith("PruningPlan('demo', bi: without [")
    assert len(str(plan).splitlines()) <= 24
    assert max(map(len, str(plan).splitlines())) <= 120
    assert f"{plan.held_out['change']:+.1%}" in str(plan)
    assert plan.data["fingerprint"] not in str(plan)
    frame = plan.to_frame()
    assert list(frame.index[frame["removed"]]) == list(plan.remove)
    assert frame["score"].to_dict() == dict(plan.scores)
    by_hand = PruningPlan("x", 4, (1,))
    assert list(by_hand.to_frame().columns) == ["removed"]
    assert str(by_hand) == repr(by_hand) == "PruningPlan('x', manual: without [1] of 4 layers)"


def test_scores_are_shown_in_the_order_of_removal_and_remain_a_dict():
    scores = LayerScores({layer: float(layer % 7) for layer in range(60)}, strategy="mine")
    html = scores._repr_html_()
    assert "and 20 more" in html
    order = [int(layer) for layer in re.findall(r"<th>(\d+)</th>", html)]
    assert order == scores.ranked()[:40]
    assert eval(str(scores)) == scores


def test_a_curve_and_a_report_are_tables(plan):
    held = {"change": -0.1, "low": -0.2, "high": 0.0, "unit": "u", "items": 3}
    points = [
        {"n_layers": n, "removed": list(range(n)), "change": -0.1 * n, "held_out": held}
        for n in (1, 2)
    ]
    curve = DepthCurve("demo", 12, "bi", "relative change", points)
    assert repr(curve) == "DepthCurve('demo', bi: 1 to 2 of 12 layers, relative change)"
    frame = curve.to_frame()
    assert frame["change"].tolist() == [-0.1, -0.2]
    assert frame["held_out_low"].tolist() == [-0.2, -0.2]
    assert frame["removed"].tolist() == ["0", "0, 1"]
    row = Comparison("perplexity", "text", "", 2.0, 3.0, False, 5, 0.5, 1.5)
    assert str(row) == "perplexity: 2 to 3 (+1, 95 % interval +0.5 to +1.5): worse"
    assert "perplexity: 2 to 3" in row._repr_html_()
    report = PruningReport(plan, "out", [row])
    assert repr(report) == f"PruningReport({plan!r}, 1 comparison)"
    assert str(report).endswith(f"\n  {row}")
    html = report._repr_html_()
    heads = re.findall(r"<th>(.*?)</th>", html)
    assert "unit before after change change from change to count" in " ".join(heads)
    assert re.findall(r"<td>(.*?)</td>", html) == ["", "2", "3", "1", "0.5", "1.5", "5"]
    large = replace(row, name="parameters", before=2_100_352.0, after=1_608_064.0)
    assert "<td>2,100,352</td>" in PruningReport(plan, "out", [large])._repr_html_()


def test_a_plan_is_a_table_where_it_has_scores(plan):
    assert plan._repr_html_().count("<tr") == 1 + 12 + 1
    by_hand = PruningPlan("x", 4, (1,))
    assert by_hand._repr_html_() == f"<p>{escape(str(by_hand))}</p>"


def test_a_stack_says_where_it_is():
    model, _ = load_model("demo", device="cpu")
    assert repr(LayerStack(model)) == "<12 layers at model.layers of LlamaForCausalLM>"
