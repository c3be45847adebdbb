"""The words of all reports, and the figures that page and files share."""

from dataclasses import replace

import pytest
from samples import COMPARISONS, make_depth_curve, make_report

from llm_pruner.report import figures as report_pictures
from llm_pruner.report.console import curve_text, plan_text, report_text
from llm_pruner.report.figures import report_figures, save_figures
from llm_pruner.report.html_page import write_html
from llm_pruner.report.model_card import card_text
from llm_pruner.report.summary import (
    IN_GGUF,
    by_group,
    change_text,
    healing_stages,
    highlights,
    number_text,
    remarks,
    step_text,
    verdict_text,
)
from llm_pruner.results import Comparison, PruningPlan, PruningReport

NAMES = ["layer_importance", "block_distances", "similarity_matrix", "comparisons"]
NAMES += ["holistic_benchmark", "depth_curve"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2_100_352, "2,100,352"), (0.12345, "0.1235"), (1.1, "1.100"), (12345.6, "12,346"), (0, "0")],
)
def test_numbers_for_people(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("entry", "change", "verdict"),
    [
        (COMPARISONS[0], "+2 (+1 to +3)", "worse, 25.0% more"),
        (COMPARISONS[1], "+0.250 (\u22120.100 to +0.600)", "no clear difference"),
        (COMPARISONS[4], "\u22120.400 (\u22120.500 to \u22120.300)", "worse, 44.4% less"),
        (COMPARISONS[5], "\u2212492,288", "23.4% less"),
        (Comparison("layers", "size", "", 12, 12), "0", "unchanged"),
        (Comparison("x", "tasks", "", 0, 0.5, True, 9, 0.25, 1), "+0.500 (+0.250 to +1)", "better"),
    ],
)
def test_a_change_in_words(entry, change, verdict):
    assert change_text(entry) == change
    assert verdict_text(entry) == verdict


def test_scores_that_fell_below_their_floor_are_named():
    rows = [
        Comparison("answer similarity", "answers", "", 0.829, 0.289, True, 9, floor=0.435),
        Comparison("quiz (acc)", "tasks", "", 0.2, 0.2, True, 9, floor=0.25),
        Comparison("facts (acc)", "tasks", "", 0.9, 0.25, True, 9, floor=0.25),
        Comparison("sums (acc)", "tasks", "", 0.9, 0.3, True, 9, floor=0.25),
    ]
    assert remarks(replace(make_report(), comparisons=rows)) == [
        "No better than guessing, or than unrelated answers, is now: answer similarity (0.289, "
        "floor 0.435), facts (acc) (0.250, floor 0.250)."
    ]


@pytest.mark.parametrize(("low", "said"), [(0.1, True), (-0.1, False), (None, False)])
def test_a_cost_above_0_is_explained(low, said):
    held_out = {"change": 0.2, "low": low, "high": 0.3, "unit": "likelihood", "items": 20}
    plan = PruningPlan("demo", 12, (3, 4), held_out=held_out)
    assert ("likelier without these layers" in plan_text(plan)) == said
    report = replace(make_report(), plan=plan)
    for text in (report_text(report), card_text(plan, report=report)):
        assert ("likelier without these layers" in text) == said


def test_an_output_larger_than_its_source_is_explained():
    grown = Comparison("weights", "size", "MB", 96.6, 439.2, False)
    report = replace(make_report(), comparisons=[grown], machine={"dtype": "float32"})
    assert remarks(report) == [
        "The weights take more room than before, 96.60 MB then and 439.2 MB now: what has changed "
        "is not written in the precision of the source, but in float32. Quantising the result "
        "makes them smaller, or --dtype bfloat16 from the start halves them."
    ]
    half = replace(report, machine={"dtype": "bfloat16"})
    assert remarks(half)[0].endswith("in bfloat16. Quantising the result makes them smaller.")
    shrunk = replace(grown, before=500.0)
    assert remarks(replace(report, comparisons=[shrunk])) == []
    in_gguf = replace(report, comparisons=[shrunk], protocol={"checkpoint": IN_GGUF})
    assert remarks(in_gguf)[0].startswith("Speed was not measured: ")


@pytest.mark.parametrize(
    ("entry", "verdict"),
    [
        (Comparison("NLL", "text", "nats/token", 0.026, 0.106, False, 9, 0.05, 0.1), "worse"),
        (Comparison("KL divergence", "text", "nats/token", 0.0, 0.2, False, 9, 0.1, 0.3), "worse"),
        (Comparison("words", "answers", "", 0.01, 1.0, None, 9, 0.5, 1.5), ""),
        (Comparison("perplexity", "text", "", 2.0, 2.5, False, 9, 0.2, 0.8), "worse, 25.0% more"),
        (Comparison("layers", "size", "", 8, 8), "unchanged"),
    ],
)
def test_a_share_of_a_loss_or_of_nearly_nothing_is_not_said(entry, verdict):
    assert verdict_text(entry) == verdict


def test_groups_have_one_order_and_unknown_ones_come_last():
    groups = by_group([Comparison("x", "other", "", 1, 2), *COMPARISONS])
    assert list(groups) == ["size", "speed", "text", "tasks", "answers", "other"]
    assert groups["tasks"] == COMPARISONS[1:4]
    names = [entry.name for entry in highlights(COMPARISONS)]
    assert names == ["memory", "generation", "perplexity", "task mean"]


def test_steps_and_stages_in_words():
    steps = [
        {"action": "cut", "layer": 7, "kept": True, "change": -0.01, "samples": 9},
        {"action": "exchange", "in": 3, "out": 5, "kept": False, "change": -0.02, "samples": 9},
        {"action": "repair", "method": "linear", "kept": True, "change": 0.0, "samples": 9},
        {"action": "another", "kept": True, "change": 0.0, "samples": 9},
    ]
    said = ["removed layer 7", "removed 3 instead of 5", "healed (linear)", "another"]
    assert list(map(step_text, steps)) == said
    lines = plan_text(PruningPlan("m", 9, (7,), steps=steps)).splitlines()
    assert lines[1] == "removed 3 instead of 5: total change -0.0200 on 9 items, rolled back"
    stages = healing_stages(make_report("m").heal)
    assert stages == [("m", "1.2500", "75%", "kept"), ("lora", "", "", "skipped: m")]
    worse = {"full": 1.0, "cut": 1.0, "stages": [{"method": "m", "loss": 1.5, "kept": False}]}
    assert healing_stages(worse) == [("m", "1.5000", "", "no better, rolled back")]
    assert healing_stages({"method": "none"}) == []


def test_columns_of_a_curve_stand_below_their_heads():
    _, _, heads, row = curve_text(make_depth_curve([-0.1])).splitlines()
    for head, cell in (("k", "1"), ("chosen on", "-10.0%"), ("held out", "-12.0%")):
        assert heads.index(head) + len(head) == row.index(cell) + len(cell)


def test_what_the_report_lacks_is_not_drawn():
    assert list(report_figures(make_report(), curve=make_depth_curve([-0.1]))) == NAMES
    bare = PruningReport(PruningPlan("m", 3, (1,)), "out", [COMPARISONS[3], COMPARISONS[6]])
    assert list(report_figures(bare)) == ["comparisons"]


def test_protected_layers_are_those_of_the_plan_unless_given(monkeypatch):
    seen = []
    monkeypatch.setattr(
        report_pictures, "plot_layer_importance", lambda *_, **options: seen.append(options)
    )
    plan = make_report().plan
    plan.options["protect"] = (1, 3)
    report_figures(PruningReport(plan, "out", []), skip=NAMES[1:])
    report_figures(PruningReport(plan, "out", []), protected=[5], skip=NAMES[1:])
    assert [options["protected"] for options in seen] == [[0, 4, 5], [5]]


def test_the_page_and_the_files_draw_nothing_anew(tmp_path, monkeypatch):
    report, curve = make_report(), make_depth_curve([-0.1])
    figures = report_figures(report, protected=[0, 5], curve=curve)
    for name in NAMES:
        monkeypatch.setattr(report_pictures, f"plot_{name}", lambda *_, **__: pytest.fail("drawn"))
    write_html(report, tmp_path / "report.html", figures=figures, curve=curve)
    paths = save_figures(figures, tmp_path / "new" / "figures")
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert (tmp_path / "report.html").read_text().count("<img") == 5
