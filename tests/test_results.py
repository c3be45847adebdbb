"""Scores, plans and reports: round trips through JSON, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pruner.errors import InvalidPlanError, NonFiniteError, UnknownNameError
from llm_pruner.results import (
    Comparison,
    DepthCurve,
    LayerScores,
    PruningPlan,
    PruningReport,
    check_layers,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.dictionaries(TEXT, VALUES, max_size=3)


@st.composite
def layer_scores(draw, n_layers=None):
    count = draw(st.integers(1, 9)) if n_layers is None else n_layers
    values = draw(st.lists(FINITE, min_size=count, max_size=count))
    return LayerScores(
        dict(enumerate(values)),
        strategy=draw(TEXT),
        unit=draw(TEXT),
        removes=draw(st.sampled_from(["lowest", "highest"])),
        blocks=draw(st.none() | st.lists(st.lists(FINITE, max_size=3), max_size=3)),
    )


@st.composite
def plans(draw):
    count = draw(st.integers(2, 9))
    remove = draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count - 1))
    return PruningPlan(
        model_id=draw(TEXT),
        num_layers=count,
        remove=tuple(remove),
        strategy=draw(TEXT),
        options=draw(RECORDS),
        scores=draw(st.none() | layer_scores(count)),
        steps=draw(st.lists(RECORDS, max_size=2)),
        data=draw(RECORDS),
        versions=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
    )


BOUNDS = st.none() | FINITE
COMPARISONS = st.builds(
    Comparison,
    name=TEXT,
    group=st.sampled_from(["text", "tasks", "answers", "size", "speed"]),
    unit=TEXT,
    before=FINITE,
    after=FINITE,
    higher_is_better=st.none() | st.booleans(),
    count=st.none() | st.integers(1, 9),
    low=BOUNDS,
    high=BOUNDS,
    floor=BOUNDS,
    note=TEXT,
)
REPORTS = st.builds(
    PruningReport,
    plan=plans(),
    output_dir=TEXT,
    comparisons=st.lists(COMPARISONS, max_size=4, unique_by=lambda row: row.name),
    heal=RECORDS,
    evaluation_data=RECORDS,
    command=TEXT,
    versions=st.dictionaries(TEXT, TEXT, max_size=2),
    machine=RECORDS,
    protocol=RECORDS,
    seconds=FINITE,
)


def meaning(scores: LayerScores) -> tuple[object, ...]:
    """What two scores may differ in and still be equal as dicts."""
    return scores.strategy, scores.unit, scores.removes, scores.blocks


@given(layer_scores())
@settings(max_examples=40, deadline=None)
def test_scores_round_trip(scores):
    text = json.dumps(scores.to_dict(), allow_nan=False)
    again = LayerScores.from_dict(json.loads(text))
    assert again == scores
    assert meaning(again) == meaning(scores)
    assert again.ranked() == scores.ranked()


@given(plans())
@settings(max_examples=60, deadline=None)
def test_plans_round_trip(plan):
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert isinstance(again.remove, tuple)
    assert again.to_json() == plan.to_json()
    if plan.scores is not None:
        assert meaning(again.scores) == meaning(plan.scores)


@given(REPORTS)
@settings(max_examples=40, deadline=None)
def test_reports_round_trip(report):
    again = PruningReport.from_json(report.to_json())
    assert again == report
    assert all(isinstance(row, Comparison) for row in again.comparisons)
    assert all(again[row.name] == row for row in report.comparisons)
    assert isinstance(again.plan, PruningPlan)
    assert again.to_json() == report.to_json()


@given(plans())
@settings(max_examples=30, deadline=None)
def test_plans_keep_what_they_do_not_remove(plan):
    assert list(plan.remove) == sorted(plan.remove)
    assert sorted([*plan.keep, *plan.remove]) == list(range(plan.num_layers))
    assert list(plan.keep) == sorted(plan.keep)


# --- scores -----------------------------------------------------------------------------------


@given(layer_scores())
@settings(max_examples=40, deadline=None)
def test_ranked_goes_from_one_end_to_the_other(scores):
    order = scores.ranked()
    assert sorted(order) == list(scores)
    for first, then in pairwise(order):
        a, b = scores[first], scores[then]
        assert a < b or (a == b and first > then) or scores.removes == "highest"
        assert a > b or (a == b and first > then) or scores.removes == "lowest"


def test_ranked_by_hand():
    values = {0: 0.5, 1: -1.0, 2: 0.5, 3: 2.0, 4: -1.0}
    assert LayerScores(values).ranked() == [4, 1, 2, 0, 3]
    assert LayerScores(values, removes="highest").ranked() == [3, 2, 0, 4, 1]


def test_scores_are_a_plain_dict_in_layer_order():
    scores = LayerScores({2: 1, 0: 3, 1: 2.5})
    assert list(scores.items()) == [(0, 3.0), (1, 2.5), (2, 1.0)]
    assert scores == {0: 3, 1: 2.5, 2: 1}
    assert all(isinstance(score, float) for score in scores.values())
    assert json.loads(json.dumps(scores)) == {"0": 3.0, "1": 2.5, "2": 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_their_layers(bad):
    with pytest.raises(NonFiniteError, match=r"avss gives no finite score for layers \[1, 4\]"):
        LayerScores({0: 1.0, 1: bad, 3: 2.0, 4: bad}, strategy="avss")


def test_an_unknown_end_of_the_scale_is_refused():
    with pytest.raises(InvalidPlanError, match="removes='deepest'"):
        LayerScores({0: 1.0}, removes="deepest")


# --- layers -----------------------------------------------------------------------------------


class Index:
    """An integer of another library, as numpy's and torch's are."""

    def __index__(self):
        return 3

    def __lt__(self, other):
        return other > 3

    def __le__(self, other):
        return other >= 3

    def __ge__(self, other):
        return other <= 3


def test_layers_come_back_ascending():
    assert check_layers([5, 1, 3], 8) == (1, 3, 5)
    assert check_layers(iter([2]), 8) == (2,)
    assert check_layers([], 8) == ()
    assert check_layers([Index()], 8) == (3,)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([8], "Layer 8 is out of range: indices are whole numbers from 0 to 7"),
        ([-1], "Layer -1 is out of range"),
        ([1, 3, 1, 3], r"Layers \[1, 3\] are listed more than once"),
        ([1.0], "Layer 1.0 is not an index"),
        (["3"], "Layer '3' is not an index"),
        ([True], "Layer True is not an index"),
        ([None], "Layer None is not an index"),
        (range(8), "All 8 layers would be removed: keep at least one"),
    ],
    ids=str,
)
def test_impossible_layers_are_refused(layers, message):
    with pytest.raises(InvalidPlanError, match=message):
        check_layers(layers, 8)
    with pytest.raises(InvalidPlanError, match=message):
        PruningPlan("m", 8, tuple(layers))


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def plan():
    return PruningPlan("some/model", 8, (5, 2), scores=LayerScores({0: 1.0, 1: 2.0}))


def changed(plan: PruningPlan, **fields) -> str:
    return json.dumps({**json.loads(plan.to_json()), **fields})


def lacking(plan: PruningPlan, field: str) -> str:
    return json.dumps({k: v for k, v in json.loads(plan.to_json()).items() if k != field})


def test_a_saved_plan_is_loaded(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text)["remove"] == [2, 5]
    assert PruningPlan.load(str(tmp_path / "plan.json")) == plan


def test_a_plan_without_optional_fields_is_loaded():
    text = '{"format": "llm_pruner.plan/2", "model_id": "m", "num_layers": 4, "remove": [1]}'
    assert PruningPlan.from_json(text) == PruningPlan("m", 4, (1,))


def test_a_plan_of_the_first_format_is_read(plan):
    """There the record of the healing was an option, and nothing else was different."""
    healing = {"method": "linear", "full": 1.0, "cut": 2.0, "healed": 1.5}
    fields = json.loads(plan.to_json())
    del fields["healing"]
    fields |= {"format": "llm_pruner.plan/1", "options": {**plan.options, "heal": healing}}
    assert PruningPlan.from_json(json.dumps(fields)) == replace(plan, healing=healing)
    fields["options"] = ["heal"]
    with pytest.raises(InvalidPlanError, match="Damaged"):
        PruningPlan.from_json(json.dumps(fields))


def test_tables(plan):
    scores = LayerScores({1: 0.5, 0: 2.0}).to_frame()
    assert list(scores.itertuples()) == [(0, 2.0), (1, 0.5)]
    report = PruningReport(plan, "out", [Comparison("perplexity", "text", "", 2.0, 3.0, False)])
    row = report.to_frame().loc["perplexity"]
    assert (row["before"], row["after"], row["group"], row["change"]) == (2.0, 3.0, "text", 1.0)


def test_a_plan_fits_one_depth(plan):
    plan.check_model(8, {})
    with pytest.raises(InvalidPlanError, match=r"of 8 layers \('some/model'\), this one has 12"):
        plan.check_model(12, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: 3", "Not valid JSON: Expecting value"),
        ("", "Not valid JSON"),
        ("[1, 2]", "Expected a file of format 'llm_pruner.plan/2', found None"),
        ("7", "Expected a file of format 'llm_pruner.plan/2', found None"),
        ("{}", "Expected a file of format 'llm_pruner.plan/2', found None"),
        ('{"format": "llm_pruner.plan/3"}', "found 'llm_pruner.plan/3'"),
        ('{"format": "llm_pruner.report/1"}', "found 'llm_pruner.report/1'"),
    ],
)
def test_a_file_of_another_kind_is_refused(text, message):
    with pytest.raises(InvalidPlanError, match=message):
        PruningPlan.from_json(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": 1, "size": 2}, r"Unknown fields \['colour', 'size'\] in a .*known: .*'remove'"),
        ({"remove": [9]}, "Layer 9 is out of range"),
        ({"remove": [2, 2]}, r"Layers \[2\] are listed more than once"),
        ({"remove": ["2"]}, r"remove\[0\] must be of type int, and is '2'"),
        ({"remove": [1.5]}, r"remove\[0\] must be of type int, and is 1.5"),
        ({"remove": 3}, "Damaged 'llm_pruner.plan/2' file"),
        ({"remove": None}, "Damaged 'llm_pruner.plan/2' file"),
        ({"num_layers": "8"}, "Damaged 'llm_pruner.plan/2' file"),
        ({"scores": {"unit": "x"}}, "Damaged 'llm_pruner.plan/2' file: 'scores'"),
        ({"scores": {"scores": {}, "colour": 1}}, "Damaged .*unexpected keyword.*'colour'"),
        ({"scores": [1, 2]}, "Damaged 'llm_pruner.plan/2' file"),
    ],
    ids=str,
)
def test_a_plan_with_impossible_fields_is_refused(plan, fields, message):
    with pytest.raises(InvalidPlanError, match=message):
        PruningPlan.from_json(changed(plan, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"scores": {"scores": {"one": 1.0}}},
        {"scores": {"scores": {"1": "much"}}},
        {"num_layers": 8.5},
        {"num_layers": True, "remove": []},
    ],
    ids=str,
)
def test_a_plan_with_fields_of_another_type_is_refused(plan, fields):
    with pytest.raises(InvalidPlanError) as caught:
        PruningPlan.from_json(changed(plan, **fields))
    assert "llm_pruner.plan/2" in str(caught.value)


@pytest.mark.parametrize("field", ["model_id", "num_layers", "remove"])
def test_a_plan_that_lacks_a_field_is_refused(plan, field):
    with pytest.raises(InvalidPlanError, match=f"Damaged 'llm_pruner.plan/2' file: .*{field}"):
        PruningPlan.from_json(lacking(plan, field))


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidPlanError, match=r"Cannot read '.*plan\.json'"):
        PruningPlan.load(path)
    with pytest.raises(InvalidPlanError, match="Cannot read"):
        PruningPlan.load(tmp_path)


def test_a_report_with_a_broken_plan_is_refused(plan):
    report = PruningReport(plan, "out", [Comparison("perplexity", "text", "", 2.0, 3.0)])
    body = json.loads(report.to_json())
    body["plan"]["remove"] = [9]
    with pytest.raises(InvalidPlanError, match="Layer 9 is out of range"):
        PruningReport.from_json(json.dumps(body))
    body["plan"]["remove"] = [2]
    good = body["comparisons"][0]
    for bad, message in (
        ({"name": "layers"}, "group"),
        ({**good, "after": "3.0"}, "after must be of type float, and is '3.0'"),
        (good, "same name: .'perplexity'"),
    ):
        body["comparisons"] = [good, bad]
        with pytest.raises(InvalidPlanError, match=f"Damaged 'llm_pruner.report/2' .*{message}"):
            PruningReport.from_json(json.dumps(body))


def test_a_report_is_asked_by_name(plan):
    row = Comparison("perplexity", "text", "", 2.0, 3.0, False, 9, 0.5, 1.5)
    report = PruningReport(plan, "out", [row])
    assert report["perplexity"] is row
    assert "perplexity" in report
    assert "task mean" not in report
    with pytest.raises(UnknownNameError, match="Did you mean 'perplexity'"):
        report["perplexitiy"]


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (0.1, 0.2, True, "better"),
        (0.1, 0.2, False, "worse"),
        (-0.2, -0.1, True, "worse"),
        (-0.2, -0.1, False, "better"),
        (-0.1, 0.1, True, "unclear"),
        (0.0, 0.0, False, "unclear"),
        (0.1, 0.2, None, ""),
        (-0.1, 0.1, None, "unclear"),
        (None, None, True, ""),
    ],
)
def test_the_interval_decides_the_verdict(low, high, better, verdict):
    row = Comparison("x", "text", "", 1.0, 2.0, better, 3, low, high)
    assert row.verdict == verdict
    assert row.change == 1.0


@pytest.mark.parametrize("field", ["before", "after", "low", "high", "floor"])
def test_a_comparison_without_a_number_is_refused(field):
    values = {"before": 1.0, "after": 1.0, field: math.inf}
    with pytest.raises(NonFiniteError, match="loss is not finite"):
        Comparison("loss", "text", "", **values)


def test_values_are_frozen(plan):
    with pytest.raises(AttributeError, match="cannot assign"):
        plan.remove = (1,)


# --- what was changed ---------------------------------------------------------------------------
@pytest.fixture
def measured() -> PruningPlan:
    held = {"change": -0.04, "low": -0.05, "high": -0.03, "unit": "relative", "items": 8}
    return PruningPlan(
        "some/model",
        8,
        (2, 5),
        scores=LayerScores({0: 1.0, 1: 2.0}),
        steps=[{"change": -0.1}],
        held_out={**held, "fingerprint": "abc"},
        data={"items": 8, "fingerprint": "def", "prompts": ["a", "b"]},
    )


def test_a_plan_that_is_only_laid_out_anew_is_the_same(measured):
    data = json.loads(measured.to_json())
    again = json.dumps(dict(reversed(data.items())), indent=7)
    assert PruningPlan.from_json(again) == measured


@pytest.mark.parametrize("field", ["remove", "held_out", "scores", "data", "checksum"])
def test_a_plan_that_was_edited_keeps_its_layers_and_loses_what_was_measured(
    measured, field, caplog
):
    data = json.loads(measured.to_json())
    edits = {"remove": [1], "checksum": "0", "data": {"items": 9, "prompts": ["a", "b"]}}
    edits["scores"] = {**data["scores"], "scores": {"0": 2.5, "1": 0.5}}
    edits["held_out"] = {**data["held_out"], "change": -0.001}
    found = PruningPlan.from_json(json.dumps({**data, field: edits[field]}))
    wanted = PruningPlan("some/model", 8, (1,) if field == "remove" else (2, 5), edited=True)
    assert found == replace(wanted, data={"prompts": ["a", "b"]})
    assert "was changed since it was written" in caplog.text
    assert PruningPlan.from_json(found.to_json()) == found  # and stays so


def test_a_curve_that_was_edited_is_refused():
    points = [{"n_layers": 1, "removed": [2], "change": -0.1, "held_out": None}]
    curve = DepthCurve("m", 8, "smart", "relative", points)
    assert DepthCurve.from_json(curve.to_json()) == curve
    with pytest.raises(InvalidPlanError, match="was changed since llm_pruner wrote it"):
        DepthCurve.from_json(curve.to_json().replace("-0.1", "-0.01"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PLAN_FIELDS = [field.name for field in dataclasses.fields(PruningPlan)]


@given(field=st.sampled_from(PLAN_FIELDS), value=JSON)
def test_any_value_in_any_field_is_a_plan_or_refused(field, value):
    text = json.dumps({**json.loads(PruningPlan("m", 8, (2,)).to_json()), field: value})
    try:
        found = PruningPlan.from_json(text)
    except InvalidPlanError:
        return
    assert PruningPlan.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 50_000, "nested too deeply|Expecting"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("1" * 5000, "a number of 5000 digits"),
        ("1e999", "1e999 is no number in JSON"),
        ("-Infinity", "-Infinity is no number in JSON"),
        (r'"\ud800"', "surrogates not allowed"),
        ('{"a": 1, "a": 2}', "the key 'a' is twice in an object"),
    ],
    ids=str,
)
def test_json_of_no_sane_size_is_refused(value, reason):
    with pytest.raises(InvalidPlanError, match=f"Not valid JSON: .*({reason})"):
        PruningPlan.from_json(f'{{"format": "llm_pruner.plan/2", "options": {value}}}')


def test_a_plan_from_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(InvalidPlanError, match="is a pipe: give a file"):
        PruningPlan.load(tmp_path / "plan.json")
