"""A whole job: disjoint data, an honest report, figures of what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import WORDS

from llm_pruner import PruneMePruner, carry_out, load_data, load_model
from llm_pruner.data.items import prompt_keys
from llm_pruner.errors import InvalidDataError, InvalidPlanError
from llm_pruner.evaluation.likelihood import perplexity
from llm_pruner.report.summary import remarks
from llm_pruner.results import PruningPlan, PruningReport

TEXTS = [f"{a} {b} on the {c}" for a in WORDS for b in WORDS for c in WORDS[:3]]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:200]))
    return str(path)


@pytest.mark.parametrize("healing", [False, True])
@pytest.mark.parametrize("n", [4, 20, 60])
def test_no_item_serves_two_purposes(source, n, healing):
    data = load_data(source, n, healing=healing)
    parts = [set(data.scoring), set(data.healing), set(data.held_out)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert bool(data.healing) == healing
    assert data.scoring
    assert data.held_out
    assert len(data.scoring) <= n
    assert len(data.held_out) <= n
    if n == 4:
        assert (len(data.scoring), len(data.held_out)) == (4, 4)


def test_weights_are_compared_as_files_hold_them(tmp_path):
    """Healed in another precision than it was stored in, a model can become larger."""
    demo, tokenizer = load_model("demo", device="cpu", dtype="bfloat16")
    for part in (demo, tokenizer):
        part.save_pretrained(tmp_path / "half")
    stored = (tmp_path / "half" / "model.safetensors").stat().st_size
    data = load_data("demo", 8)
    for dtype, folder in (("float32", "out"), ("bfloat16", "same")):
        model, _ = load_model(str(tmp_path / "half"), device="cpu", dtype=dtype)
        pruner = PruneMePruner(model, tokenizer)
        plan = pruner.manual_plan([3, 4], str(tmp_path / "half"))
        report, _ = carry_out(pruner, plan, tmp_path / folder, data.held_out)
        row = report["weights"]
        written = (tmp_path / folder / "model.safetensors").stat().st_size
        assert 1e6 * row.before == pytest.approx(stored, rel=0.01)
        assert 1e6 * row.after == pytest.approx(written, rel=0.01)
        larger = [text for text in remarks(report) if text.startswith("The weights take more")]
        assert bool(larger) == (dtype == "float32")


def test_the_demo_is_judged_on_its_own_evaluation_set():
    from llm_pruner import load_eval_dataset

    data = load_data("demo", 30, healing=True)
    own = {item["prompt"] for item in load_eval_dataset(200, "demo-eval")}
    assert {item["prompt"] for item in data.held_out} <= own
    assert not {item["prompt"] for item in [*data.scoring, *data.healing]} & own
    assert not {i["prompt"] for i in data.scoring} & {i["prompt"] for i in data.healing}
    assert len(data.scoring) == len(data.held_out) == 30
    assert len(data.healing) >= 90


def test_healing_items_that_serve_another_purpose_are_left_out(source, caplog):
    """The same file named twice: what is scored and judged on is taken out of it."""
    caplog.set_level("INFO", logger="llm_pruner")
    data = load_data(source, 20, heal_source=source, healing=True)
    assert len(data.healing) == 160
    assert not set(data.healing) & {*data.scoring, *data.held_out}
    assert "40 of 200 healing items serve another purpose already" in caplog.text


def test_items_that_a_plan_rests_on_are_left_out(source):
    """Also with another seed and another number: what was scored on is in no other part."""
    scored = load_data(source, 20, seed=0).scoring
    data = load_data(source, 30, healing=True, taken=prompt_keys(scored), seed=1)
    assert not set(scored) & {*data.scoring, *data.healing, *data.held_out}
    assert len(data.held_out) == 30


def test_held_out_items_are_read_by_their_former_name_too(source):
    data = load_data(source, 10)
    assert data.judging is data.held_out


def test_the_same_seed_gives_the_same_split(source):
    assert load_data(source, 10, seed=3) == load_data(source, 10, seed=3)
    assert load_data(source, 10, seed=3) != load_data(source, 10, seed=4)


def test_healing_does_not_change_what_layers_are_chosen_on(source):
    for n in (4, 5):
        plain, healing = (load_data(source, n, healing=h) for h in (False, True))
        assert plain.scoring == healing.scoring
        assert plain.held_out == healing.held_out


def test_too_little_data_is_an_error(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "the cat sat"}')
    with pytest.raises(InvalidDataError, match="items"):
        load_data(str(tmp_path / "one.jsonl"), 4)


def test_a_plan_is_carried_out(llama, tokenizer, tmp_path):
    pruner = PruneMePruner(llama, tokenizer)
    plan = pruner.plan(TEXTS[:10], model_id="tiny", ratio=0.25)
    report, pruned = carry_out(pruner, plan, tmp_path / "out", TEXTS[50:60], seed=5, figures=True)
    assert PruningReport.load(tmp_path / "out" / "pruning_report.json") == report
    assert report.plan.remove == plan.remove
    found = report["perplexity"]
    assert found.after == pytest.approx(perplexity(pruned, tokenizer, TEXTS[50:60]))
    assert found.before == pytest.approx(perplexity(llama, tokenizer, TEXTS[50:60]))
    assert found.count == 10
    assert found.low < found.change < found.high
    assert {row.group for row in report.comparisons} == {"size", "speed", "text"}
    assert report.evaluation_data["items"] == report.protocol["items"] == 10
    assert report.protocol["seed"] == 5
    assert report.machine["device"] == "cpu"
    assert report.versions["torch"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 5  # scores, blocks, states, residual stream, next token
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pruning_report.json" in card
    assert "- llm_pruner" in card
    figures = {path.stem: path for path in (tmp_path / "out" / "figures").iterdir()}
    assert all(path.stat().st_size > 1000 for path in figures.values())
    assert figures.keys() == {
        "activation_comparison",
        "semantic_comparison",
        "layer_importance",
        "block_distances",
        "similarity_matrix",
    }


def test_the_page_shows_the_curve_of_the_same_model_alone(llama, tokenizer, tmp_path):
    pruner = PruneMePruner(llama, tokenizer)
    curve = pruner.sweep(TEXTS[:10], 2, model_id="tiny")
    for name, model_id in (("same", "tiny"), ("other", "large")):
        replace(curve, model_id=model_id).save(tmp_path / f"{name}.curve.json")
        plan = pruner.plan(TEXTS[:10], model_id="tiny", ratio=0.25)
        carry_out(pruner, plan, tmp_path / name, TEXTS[50:60])
        page = (tmp_path / name / "report.html").read_text()
        assert ("Cost by number of layers" in page) == (name == "same")


def test_a_text_longer_than_the_model_reads_is_drawn(llama, tokenizer, tmp_path):
    pruner = PruneMePruner(llama, tokenizer)
    plan = pruner.plan(TEXTS[:10], model_id="tiny", ratio=0.25)
    carry_out(pruner, plan, tmp_path / "out", [" ".join(TEXTS), TEXTS[50]])
    assert (tmp_path / "out" / "report.html").exists()


def test_a_plan_for_another_model_is_refused(llama, tokenizer, tmp_path):
    with pytest.raises(InvalidPlanError, match="for a model of 6 layers"):
        carry_out(
            PruneMePruner(llama, tokenizer), PruningPlan("m", 6, (2,)), tmp_path / "o", TEXTS[:2]
        )
    assert not (tmp_path / "o").exists()
