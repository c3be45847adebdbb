"""Figures of layer scores, read back."""

import math

import numpy as np
import pytest
from drawn import cells, legend_texts, legends, points
from matplotlib.colors import to_hex

from llm_pruner.errors import InvalidDataError, InvalidPlanError
from llm_pruner.layer_scores import LayerScores
from llm_pruner.visualization.scores import plot_layer_importance, plot_score_comparison
from llm_pruner.visualization.style import BLUE, ORANGE


@pytest.mark.parametrize(("n", "ticks"), [(1, 1), (2, 2), (12, 12), (32, 16), (80, 20), (126, 26)])
def test_a_plain_dict_has_one_bar_per_layer_and_neither_direction_nor_legend(n, ticks):
    scores = {i: 0.05 + abs(i - n / 2) / 30 for i in range(n)}
    figure = plot_layer_importance(scores)
    [axes] = figure.axes
    assert [bar.get_height() for bar in axes.patches] == list(scores.values())
    assert [bar.get_x() + 0.4 for bar in axes.patches] == pytest.approx(list(scores))
    assert figure.get_figwidth() == (7.0 if n > 40 else 3.4)
    assert len(axes.get_xticks()) == ticks
    assert (axes.get_ylabel(), figure.get_suptitle()) == ("score", "Layer importance")
    assert legend_texts(figure) == []
    assert {to_hex(bar.get_facecolor()) for bar in axes.patches} == {BLUE}


@pytest.mark.parametrize(("removes", "other"), [("lowest", "highest"), ("highest", "lowest")])
def test_layer_scores_say_unit_strategy_and_direction(removes, other):
    scores = LayerScores({0: 3.0, 1: 1.0, 2: 2.0}, strategy="avss", unit="AVSS", removes=removes)
    figure = plot_layer_importance(scores)
    [axes] = figure.axes
    assert (axes.get_ylabel(), figure.get_suptitle()) == ("AVSS", "Layer importance: avss")
    assert legend_texts(figure) == [f"removed first ({removes})", f"removed last ({other})"]
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    first, *_, last = scores.ranked()
    assert (colours[first], colours[last]) == (ORANGE, BLUE)


def test_removed_layers_are_hatched_and_counted():
    figure = plot_layer_importance(dict.fromkeys(range(12), 0.3), removed=[5, 6, 4])
    bars = figure.axes[0].patches
    assert [i for i, bar in enumerate(bars) if bar.get_hatch()] == [4, 5, 6]
    assert [i for i, bar in enumerate(bars) if to_hex(bar.get_facecolor()) == ORANGE] == [4, 5, 6]
    assert legend_texts(figure) == ["removed (3 of 12)", "kept"]
    figure.draw_without_rendering()
    [legend] = legends(figure)
    assert not any(legend.get_window_extent().overlaps(bar.get_window_extent()) for bar in bars)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_dwarfs_the_others_leaves_the_axis_and_is_named(sign):
    scores = {i: sign * (1.0 + i / 20) for i in range(12)} | {0: sign * 1000.0}
    [axes] = plot_layer_importance(scores).axes
    low, high = sorted(sign * limit for limit in axes.get_ylim())
    assert max(abs(low), high) < 2.5  # the others are readable
    assert min(0, low) <= 0
    assert axes.get_ylabel() == "score\n(axis is cut)"
    assert f"(arrows: layer 0\u00a0=\u00a0{1000 * sign})" in axes.get_xlabel()
    marks = [line for line in axes.lines if line.get_marker() in ("^", "v")]
    assert [(m.get_marker(), *m.get_xdata()) for m in marks] == [("^" if sign > 0 else "v", 0)]
    assert axes.patches[0].get_height() == sign * 1000.0
    [usual] = plot_layer_importance({0: 5.0, 1: 1.0, 2: 1.0, 3: 1.0}).axes
    assert (usual.get_ylim()[1] >= 5, usual.get_ylabel()) == (True, "score")


@pytest.mark.parametrize("bad", [{}, None, [1.0], {0: "high"}, {"first": 1.0}])
def test_scores_that_cannot_be_drawn(bad):
    with pytest.raises(InvalidDataError, match=r"scores (is|must map)"):
        plot_layer_importance(bad)


def shaded(axes):
    """The layers with a background."""
    bars = {id(bar) for container in axes.containers for bar in container}
    spans = [patch for patch in axes.patches if id(patch) not in bars]
    assert all(span.get_width() == pytest.approx(1) for span in spans)
    return [span.get_x() + 0.5 for span in spans]


def crosses(axes):
    return [int(x) for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()]


def test_protected_layers_are_shaded_and_those_without_a_score_crossed():
    scores = LayerScores({i: 1.0 + i for i in range(4, 10)}, strategy="bi")
    figure = plot_layer_importance(scores, protected=[11, 0, 1, 4], removed=[7], num_layers=12)
    [axes] = figure.axes
    assert shaded(axes) == [0, 1, 4, 11]
    assert crosses(axes) == [0, 1, 2, 3, 10, 11]
    assert [bar.get_height() for bar in axes.containers[0]] == list(scores.values())
    outlined = [to_hex(bar.get_edgecolor()) == "#666666" for bar in axes.containers[0]]
    assert outlined == [True, False, False, False, False, False]  # layer 4
    assert axes.get_xlim() == (-0.7, 11.7)
    assert list(axes.get_xticks()) == list(range(12))
    assert legend_texts(figure) == ["removed (1 of 12)", "kept", "protected (4)", "no score (6)"]
    [axes] = plot_layer_importance({2: 1.0, 3: 2.0}, protected=(5, 0)).axes
    assert (shaded(axes), crosses(axes), axes.get_xlim()) == ([0, 5], [0, 1, 4, 5], (-0.7, 5.7))
    assert crosses(plot_layer_importance(dict.fromkeys(range(3), 1.0), num_layers=3).axes[0]) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_crosses_stand_inside_the_axes(sign):
    figure = plot_layer_importance({1: sign * 2.0, 2: sign * 1.0}, num_layers=4)
    figure.draw_without_rendering()
    [axes] = figure.axes
    [line] = [line for line in axes.lines if line.get_marker() == "x"]
    assert all(axes.bbox.contains(*at) for at in line.get_transform().transform(line.get_xydata()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"removed": [3, 12]}, r"\[12\] have no score.* 0 to 11"),
        ({"protected": [12], "num_layers": 12}, r"protected=\[12\] .* 0 to 11, the model's last"),
        ({"protected": [-1]}, r"protected=\[-1\] must list layers, .* from 0\."),
        ({"protected": (2, 2)}, r"protected=\[2, 2\] .* each once"),
        ({"protected": [True]}, r"protected=\[True\]"),
        ({"protected": ["first"]}, r"protected=\['first'\]"),
        ({"protected": [3], "removed": [3, 4]}, r"Layers \[3\] are in removed and in protected"),
        ({"num_layers": 11}, r"scores has layers \[11\], .*num_layers=11"),
        ({"num_layers": 0}, r"num_layers=0 must be"),
        ({"num_layers": 12.0}, r"num_layers=12\.0 must be"),
    ],
)
def test_layers_that_do_not_fit(options, message):
    with pytest.raises(InvalidPlanError, match=message):
        plot_layer_importance(dict.fromkeys(range(12), 1.0), **options)


def test_strategies_are_compared_by_their_order():
    one = LayerScores({0: 3.0, 1: 1.0, 2: 2.0}, strategy="one")
    two = LayerScores({1: 5.0, 2: 9.0, 3: 7.0}, strategy="two", removes="highest")
    figure = plot_score_comparison([one, two], removed=[[1], [2, 3]])
    axes = figure.axes[0]
    np.testing.assert_equal(cells(figure), [[3, 1, 2, math.nan], [math.nan, 3, 1, 2]])
    assert points(axes, "removed") == [(1, 0), (2, 1), (3, 1)]
    assert points(axes, "no score (2)") == [(3, 0), (0, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


@pytest.mark.parametrize(
    ("scores", "removed", "error", "message"),
    [
        ([], None, InvalidDataError, "0 strategies given: one figure shows 1 to 12"),
        ([{0: 1.0}], None, InvalidDataError, "is a dict, not LayerScores"),
        (["same", "same"], None, InvalidDataError, "have one name"),
        (["one", "two"], [[0]], InvalidDataError, "1 lists for 2 strategies"),
        (["one"], [[7]], InvalidPlanError, r"\[7\] have no score"),
    ],
)
def test_comparisons_that_cannot_be_drawn(scores, removed, error, message):
    made = [LayerScores({0: 1, 1: 2}, strategy=s) if isinstance(s, str) else s for s in scores]
    with pytest.raises(error, match=message):
        plot_score_comparison(made, removed=removed)
