"""Figures of depth curves, benchmarks and comparisons, read back."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from drawn import legend_texts, line_of
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from samples import COMPARISONS
from samples import make_depth_curve as curve_of

from llm_pruner.errors import InvalidDataError, NonFiniteError
from llm_pruner.results import Comparison
from llm_pruner.visualization.quality import (
    plot_comparisons,
    plot_depth_curve,
    plot_holistic_benchmark,
)
from llm_pruner.visualization.style import BLUE, GREEN, ORANGE, PALETTE

HELD = {"change": -0.1, "low": -0.2, "high": 0.0, "unit": "likelihood"}
COLLAPSE = [-0.01, -0.03, -0.1, -0.6, -0.95]
BEFORE = {"gsm8k": 0.6, "mean": 0.7, "mmlu_high_school": 0.8}
AFTER = {"gsm8k": 0.3, "mean": 0.45, "mmlu_high_school": 0.6}
COUNTS = {"gsm8k": 30, "mmlu_high_school": 100}
A = {"a": 0.1}


def bands(axes):
    """For each band, by colour: depth -> (low, high)."""
    found = {}
    for band in axes.collections:
        ends = {}
        for x, y in band.get_paths()[0].vertices:
            ends.setdefault(x, []).append(y)
        colour = to_hex(band.get_facecolor()[0])
        found[colour] = {depth: (min(ys), max(ys)) for depth, ys in sorted(ends.items())}
    return found


def test_a_curve_shows_both_measurements_and_the_interval():
    figure = plot_depth_curve(curve_of([-0.01, -0.02, -0.04]))
    [axes] = figure.axes
    solid, dashed = line_of(axes, BLUE, "-"), line_of(axes, BLUE, "--")
    assert list(solid.get_xdata()) == list(dashed.get_xdata()) == [0, 1, 2, 3]
    assert list(solid.get_ydata()) == pytest.approx([0, -3, -4, -6])
    assert list(dashed.get_ydata()) == pytest.approx([0, -1, -2, -4])
    assert (solid.get_markevery(), dashed.get_markevery()) == ([1, 2, 3], [])
    [(colour, band)] = bands(axes).items()
    wanted = {0: (0, 0), 1: (-5, 0), 2: (-6, -1), 3: (-8, -3)}
    assert (colour, list(band)) == (BLUE, list(wanted))
    assert all(band[depth] == pytest.approx(ends) for depth, ends in wanted.items())
    assert axes.get_yscale() == "linear"
    assert axes.get_ylabel() == "likelihood\nin %"
    assert axes.get_xlabel() == "layers removed (of 80)"
    assert figure.get_suptitle() == "Quality by number of layers removed: smart"
    keys = [text for text in legend_texts(figure) if text.strip()]
    assert keys == ["smart", "held-out data", "95 % interval", "data of the choice"]


def test_without_held_out_data_the_line_is_that_of_the_choice():
    figure = plot_depth_curve(curve_of([-0.01, 0.02], measured=False))
    [axes] = figure.axes
    assert [line.get_linestyle() for line in axes.lines[1:]] == ["--"]  # after that of 0 %
    assert line_of(axes, BLUE).get_markevery() == [1, 2]
    assert bands(axes) == {}
    assert legend_texts(figure) == ["smart", "data of the choice"]


def test_points_without_held_out_data_keep_a_hollow_marker():
    curve = curve_of([-0.01, -0.02, -0.03, -0.04])
    curve.points[1]["held_out"], curve.points[3]["held_out"] = None, {}
    [axes] = plot_depth_curve(curve).axes
    assert list(line_of(axes, BLUE, "-").get_xdata()) == [0, 1, 3]
    hollow = line_of(axes, BLUE, "--")
    assert hollow.get_markevery() == [2, 4]
    assert to_hex(hollow.get_markerfacecolor()) == "#ffffff"


def test_a_collapse_leaves_the_first_steps_readable():
    figure = plot_depth_curve(curve_of(COLLAPSE, measured=False))
    [axes] = figure.axes
    heights = [axes.transData.transform((0, 100 * change))[1] for change in [0, *COLLAPSE]]
    steps = [(one - two) / axes.bbox.height for one, two in pairwise(heights)]
    assert min(steps[:4]) > 0.1
    assert all(step > 0 for step in steps)
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["\u2212100", "\u221230", "\u221210", "\u22123", "\u22121", "0"]
    assert list(axes.get_yticks()) == [-100, -30, -10, -3, -1, 0]
    assert axes.get_ylabel() == "likelihood\nin %, log scale beyond 1 %"


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ([-0.005, -0.09], "linear"),
        ([-0.005, -0.11], "symlog"),
        ([-0.3, -0.95], "linear"),
        ([-0.01, 0.2], "symlog"),
        ([0.0, 0.0], "linear"),
    ],
)
def test_the_scale_is_logarithmic_where_changes_differ_in_size(changes, scale):
    figure = plot_depth_curve(curve_of(changes, measured=False))
    assert figure.axes[0].get_yscale() == scale
    assert ("log scale" in figure.axes[0].get_ylabel()) == (scale == "symlog")
    low, high = figure.axes[0].get_ylim()
    assert low < min(100 * c for c in [0, *changes])
    assert high > max(100 * c for c in [0, *changes])


def test_the_interval_counts_for_the_scale():
    curve = curve_of([-0.06])
    curve.points[0]["held_out"]["low"] = -0.9
    assert plot_depth_curve(curve).axes[0].get_yscale() == "symlog"


def test_several_curves_keep_apart():
    curves = [
        curve_of(COLLAPSE),
        curve_of([-0.02, -0.05, -0.08], "pruneme"),
        curve_of([-0.03] * 8, "ablation", measured=False),
    ]
    figure = plot_depth_curve(iter(curves))
    [axes] = figure.axes
    for curve, colour in zip(curves, PALETTE, strict=False):
        values = line_of(axes, colour, "--").get_ydata()
        assert list(values) == pytest.approx([0, *(100 * p["change"] for p in curve.points)])
    assert list(line_of(axes, ORANGE, "-").get_ydata()) == pytest.approx([0, -4, -7, -10])
    assert set(bands(axes)) == {BLUE, ORANGE}
    assert bands(axes)[ORANGE][3] == pytest.approx((-12, -7))
    assert [line.get_linestyle() for line in axes.lines if line.get_color() == GREEN] == ["--"]
    keys = ["held-out data", "95 % interval", "data of the choice"]
    assert legend_texts(figure) == ["smart", "pruneme", "ablation", *keys]
    handles = figure.legends[0].legend_handles[:3]
    assert [to_hex(handle.get_color()) for handle in handles] == list(PALETTE[:3])
    assert len({handle.get_marker() for handle in handles}) == 3
    assert figure.get_suptitle() == "Quality by number of layers removed"
    assert list(axes.get_xticks()) == list(range(9))


def test_curves_are_named_by_model_or_as_the_message_of_equal_names_says():
    one, other = curve_of([-0.1], model_id="a/one"), curve_of([-0.2], model_id="b/two")
    figure = plot_depth_curve([one, replace(other, num_layers=24)])
    assert legend_texts(figure)[:2] == ["smart (a/one)", "smart (b/two)"]
    assert figure.axes[0].get_xlabel() == "layers removed"
    figure = plot_depth_curve([one, replace(one, strategy="first try")])
    assert legend_texts(figure)[:2] == ["smart", "first try"]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([], "0 curves given: one figure shows 1 to 6"),
        ([curve_of([-0.1], str(i)) for i in range(7)], "7 curves given"),
        (None, "None is a NoneType, not a DepthCurve"),
        ("curve.json", r"'curve\.json' is a str, not a DepthCurve: .* DepthCurve\.load"),
        ([curve_of([-0.1]), {"points": []}], "is a dict, not a DepthCurve"),
        (
            [curve_of([-0.1]), curve_of([-0.1], "x", unit="accuracy")],
            "units, 'likelihood' and 'accuracy'",
        ),
        (
            [curve_of([-0.1]), curve_of([-0.2])],
            "Several curves are called 'smart': name them apart",
        ),
    ],
)
def test_curves_that_cannot_be_drawn(curves, message):
    with pytest.raises(InvalidDataError, match=message):
        plot_depth_curve(curves)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ({**HELD, "unit": "accuracy"}, InvalidDataError, "different units"),
        ([1.0], InvalidDataError, r"held_out at 1 layers is \[1\.0\]: it must be a dict"),
        ({"change": -0.1, "low": -0.2}, InvalidDataError, r"held-out high of 'smart' at 1 .* None"),
        ({**HELD, "low": "much"}, InvalidDataError, r"held-out low .* 'much'"),
        ({**HELD, "low": 0.3}, InvalidDataError, r"held-out low .* is above high"),
        ({**HELD, "change": math.nan}, NonFiniteError, r"held-out change .* is nan"),
    ],
)
def test_held_out_changes_that_cannot_be_drawn(found, error, message):
    one = curve_of([-0.1])
    one.points[0]["held_out"] = found
    with pytest.raises(error, match=message):
        plot_depth_curve(one)


def half_widths(axes):
    """Half the length of each error bar, in the order in which they were drawn."""
    drawn = [entry.lines[2][0] for entry in axes.containers if isinstance(entry, ErrorbarContainer)]
    return [(end[0] - start[0]) / 2 for bars in drawn for start, end in bars.get_segments()]


def test_bars_errors_and_labels_of_the_benchmark():
    figure = plot_holistic_benchmark(BEFORE, AFTER, COUNTS)
    [axes] = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.6, 0.8, 0.7, 0.3, 0.6, 0.45]
    se = [math.sqrt(p * (1 - p) / n) for p, n in ((0.6, 30), (0.8, 100), (0.3, 30), (0.6, 100))]
    means = [math.sqrt(se[0] ** 2 + se[1] ** 2) / 2, math.sqrt(se[2] ** 2 + se[3] ** 2) / 2]
    assert half_widths(axes) == pytest.approx([*se[:2], means[0], *se[2:], means[1]])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["gsm8k (n=30)", "mmlu_high_school\n(n=100)", "mean"]
    assert list(axes.get_yticks()) == [0, 1, 2.4]  # the mean is set apart
    assert [text.get_text() for text in axes.texts] == "0.60 0.80 0.70 0.30 0.60 0.45".split()
    assert legend_texts(figure) == ["before", "after"]


def test_one_number_of_items_for_all_tasks():
    figure = plot_holistic_benchmark({"a": 0.5}, {"a": 0.0}, np.int64(25))
    assert half_widths(figure.axes[0]) == pytest.approx([0.1, 0.0])
    assert figure.axes[0].get_yticklabels()[0].get_text() == "a (n=25)"


def test_paired_intervals_take_the_place_of_standard_errors():
    """From 0.5 to 0.4, and the change is between -0.3 and 0.05: from 0.2 to 0.55."""
    figure = plot_holistic_benchmark(
        {"a": 0.5, "b": 0.3}, {"a": 0.4, "b": 0.3}, 25, intervals={"a": (-0.3, 0.05)}
    )
    [axes] = figure.axes
    lines = [c for c in axes.collections if hasattr(c, "get_segments")]
    ends = [[x for x, _ in segment] for line in lines for segment in line.get_segments()]
    assert ends == [pytest.approx([0.2, 0.55]), pytest.approx([0.3, 0.3])]
    assert "interval" in axes.get_xlabel()


def test_chance_is_drawn_where_it_is_known():
    figure = plot_holistic_benchmark(
        {"a": 0.5, "b": 1.0}, {"a": 0.4, "b": 0.9}, 25, chance={"b": 0.25}
    )
    [axes] = figure.axes
    [lines] = [c for c in axes.collections if c.get_label() == "chance"]
    assert [segment.tolist() for segment in lines.get_segments()] == [[[0.25, 0.55], [0.25, 1.45]]]
    assert "chance" in legend_texts(figure)
    assert max(axes.get_xticks()) <= 1.0


@pytest.mark.parametrize(
    ("before", "after", "n", "chance", "error", "message"),
    [
        ({}, {}, 5, {}, InvalidDataError, "name no task"),
        ({"a": 0.1, "b": 0.2}, A, 5, {}, InvalidDataError, r"\['b'\] are missing in after"),
        (A, {"a": 0.1, "b": 0.2}, 5, {}, InvalidDataError, r"\['b'\] are missing in before"),
        (A, {"a": math.nan}, 5, {}, NonFiniteError, r"after\['a'\] is nan"),
        ({"a": 61.0}, A, 5, {}, InvalidDataError, r"before\['a'\] is 61.0.*not percent"),
        (A, A, 0, {}, InvalidDataError, "task 'a' is 0"),
        (A, A, 2.5, {}, InvalidDataError, r"task 'a' is 2\.5"),
        (A, A, {"b": 3}, {}, InvalidDataError, "task 'a' is None"),
        (A, A, 25, {"a": 25}, InvalidDataError, r"chance\['a'\] is 25"),
        (A, A, 25, {"z": 0.25}, InvalidDataError, r"chance names tasks \['z'\]"),
    ],
)
def test_benchmarks_that_cannot_be_drawn(before, after, n, chance, error, message):
    with pytest.raises(error, match=message):
        plot_holistic_benchmark(before, after, n, chance=chance)


def test_changes_are_drawn_with_their_intervals_and_verdicts():
    entries = [*COMPARISONS[1:3], COMPARISONS[4], Comparison("bare", "tasks", "", 0.5, 0.25, True)]
    figure = plot_comparisons(entries)
    left, right = figure.axes
    lines = [line for line in right.lines if len(line.get_xdata()) == 2][:3]
    ends = [list(line.get_xdata()) for line in lines]
    assert ends == [[entry.low, entry.high] for entry in entries[:3]]
    marks = [line for line in right.lines if len(line.get_xdata()) == 1]
    assert [mark.get_xdata()[0] for mark in marks] == [entry.change for entry in entries]
    assert [mark.get_marker() for mark in marks] == ["o", "^", "v", "x"]
    assert [bar.get_width() for bar in left.patches[:4]] == [e.before for e in entries]
    assert [bar.get_width() for bar in left.patches[4:]] == [e.after for e in entries]
    [floors] = [c for c in left.collections if c.get_label() == "floor"]
    assert [segment[0][0] for segment in floors.get_segments()] == [0.25]
    with pytest.raises(InvalidDataError, match=r"units \['', 'MB'\]"):
        plot_comparisons(COMPARISONS[5:7])
    with pytest.raises(InvalidDataError, match=r"units \[\]"):
        plot_comparisons([])
