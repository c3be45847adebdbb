"""Figures: what is drawn, read back from the figure."""

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import seaborn
import torch
from matplotlib.colors import to_hex
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_pruner.errors import (
    InvalidDataError,
    InvalidPlanError,
    MissingDependencyError,
    NonFiniteError,
    OutputError,
)
from llm_pruner.evaluation import generation, similarity
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.results import DepthCurve, LayerScores
from llm_pruner.visualization import models as model_figures
from llm_pruner.visualization import style
from llm_pruner.visualization.models import plot_activation_comparison, plot_semantic_comparison
from llm_pruner.visualization.quality import (
    MARKERS,
    MAX_CURVES,
    plot_depth_curve,
    plot_holistic_benchmark,
)
from llm_pruner.visualization.scores import plot_layer_importance
from llm_pruner.visualization.style import BLUE, GREEN, ORANGE, PALETTE

WORDS = ["<unk>", "<eos>", "Question", "Answer", ":", "a", "cat", "sat", "$x$", "on", "mat", "{"]
PROMPT = "a cat sat on a mat"


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


def build(layers=6, seed=0, vocab=12):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return build()


class WordEmbedder:
    """Counts letters: no weights, no network."""

    def encode(self, sentences, *, show_progress_bar=False):
        return torch.tensor([[text.count(c) + 0.1 for c in "abcmost$x"] for text in sentences])


def legend_texts(figure):
    legends = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def visible_labels(axis):
    """Tick labels that are drawn: those inside the view."""
    low, high = sorted(axis.get_view_interval())
    pairs = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in pairs if low <= place <= high]


def drawn_texts(figure):
    texts = [figure._suptitle]
    for legend in [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]:
        texts += legend.get_texts()
    for axes in figure.axes:
        texts += axes.texts
        if axes.axison:
            texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            texts += [*visible_labels(axes.xaxis), *visible_labels(axes.yaxis)]
    return [text for text in texts if text.get_text()]


def assert_nothing_outside(figure):
    """Every text lies inside the page and is large enough to read."""
    figure.draw_without_rendering()
    for text in drawn_texts(figure):
        box = text.get_window_extent()
        assert text.get_fontsize() >= 6.5, text.get_text()
        assert min(box.x0, box.y0) >= -1, text.get_text()
        assert box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert box.y1 <= figure.bbox.y1 + 1, text.get_text()


def overlaps(labels):
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[i + 1 :])


def valley(n):
    return {i: 0.05 + abs(2 * i / (n - 1) - 1) / 3 for i in range(n)}


# --- plot_layer_importance


@pytest.mark.parametrize("n", [1, 2, 12, 32, 80, 126])
def test_one_bar_per_layer_and_ticks_that_do_not_touch(n):
    scores = valley(n) if n > 1 else {0: 1.0}
    figure = plot_layer_importance(scores)
    [axes] = figure.axes
    assert [bar.get_height() for bar in axes.patches] == list(scores.values())
    assert [bar.get_x() + 0.4 for bar in axes.patches] == pytest.approx(list(scores))
    assert figure.get_figwidth() == (7.0 if n > 40 else 3.4)
    figure.draw_without_rendering()
    assert not overlaps(axes.get_xticklabels())
    assert len(axes.get_xticks()) == {1: 1, 2: 2, 12: 12, 32: 16, 80: 20, 126: 26}[n]
    assert_nothing_outside(figure)


def test_plain_dict_has_neither_direction_nor_legend():
    figure = plot_layer_importance({3: 1.0, 5: 2.0})
    assert figure.axes[0].get_ylabel() == "score"
    assert figure.get_suptitle() == "Layer importance"
    assert legend_texts(figure) == []
    assert {to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches} == {BLUE}


@pytest.mark.parametrize("removes", ["lowest", "highest"])
def test_layer_scores_say_unit_strategy_and_direction(removes):
    scores = LayerScores({0: 3.0, 1: 1.0, 2: 2.0}, strategy="avss", unit="AVSS", removes=removes)
    figure = plot_layer_importance(scores)
    assert figure.axes[0].get_ylabel() == "AVSS"
    assert figure.get_suptitle() == "Layer importance: avss"
    other = {"lowest": "highest", "highest": "lowest"}[removes]
    assert legend_texts(figure) == [f"removed first ({removes})", f"removed last ({other})"]
    colours = {i: to_hex(bar.get_facecolor()) for i, bar in enumerate(figure.axes[0].patches)}
    assert colours[scores.ranked()[0]] == ORANGE
    assert colours[scores.ranked()[-1]] == BLUE


def test_a_given_title_is_taken_literally():
    figure = plot_layer_importance(
        LayerScores({0: 1.0}, strategy="avss"), title="Mine at $5 and $6"
    )
    assert figure.get_suptitle() == "Mine at $5 and $6"


def test_removed_layers_are_hatched_and_counted():
    figure = plot_layer_importance(valley(12), removed=[5, 6, 4])
    bars = figure.axes[0].patches
    assert [i for i, bar in enumerate(bars) if bar.get_hatch()] == [4, 5, 6]
    assert [i for i, bar in enumerate(bars) if to_hex(bar.get_facecolor()) == ORANGE] == [4, 5, 6]
    assert legend_texts(figure) == ["removed (3 of 12)", "kept"]
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend().get_window_extent()
    assert not any(legend.overlaps(bar.get_window_extent()) for bar in bars)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_dwarfs_the_others_leaves_the_axis_and_is_named(sign):
    scores = {i: sign * (1.0 + i / 20) for i in range(12)} | {0: sign * 1000.0}
    figure = plot_layer_importance(scores)
    [axes] = figure.axes
    low, high = sorted(sign * limit for limit in axes.get_ylim())
    assert max(abs(low), high) < 2.5  # the others are readable
    assert min(0, low) <= 0
    assert axes.get_ylabel() == "score\n(axis is cut)"
    value = "1000" if sign > 0 else "-1000"
    assert f"(arrows: layer 0\u00a0=\u00a0{value})" in axes.get_xlabel()
    marks = [line for line in axes.lines if line.get_marker() in ("^", "v")]
    assert [line.get_marker() for line in marks] == ["^" if sign > 0 else "v"]
    assert list(marks[0].get_xdata()) == [0]
    assert axes.patches[0].get_height() == sign * 1000.0
    assert_nothing_outside(figure)


def test_scores_of_one_size_are_not_cut():
    figure = plot_layer_importance({0: 5.0, 1: 1.0, 2: 1.0, 3: 1.0})
    assert figure.axes[0].get_ylim()[1] >= 5
    assert "cut" not in figure.axes[0].get_ylabel()


@pytest.mark.parametrize("bad", [{}, None, [1.0], {0: "high"}, {"first": 1.0}])
def test_scores_that_cannot_be_drawn(bad):
    with pytest.raises(InvalidDataError, match=r"scores (is|must map)"):
        plot_layer_importance(bad)


def test_nan_is_never_drawn():
    with pytest.raises(NonFiniteError, match=r"layers \[1\]"):
        plot_layer_importance({0: 1.0, 1: math.nan})
    changed = LayerScores({0: 1.0, 1: 2.0}, strategy="avss")
    changed[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"avss .* \[0\]"):
        plot_layer_importance(changed)


def test_a_removed_layer_needs_a_score():
    with pytest.raises(InvalidPlanError, match=r"\[12\] have no score.* 0 to 11"):
        plot_layer_importance(valley(12), removed=[3, 12])


def shaded(axes):
    """The layers with a background."""
    bars = {id(bar) for container in axes.containers for bar in container}
    spans = [patch for patch in axes.patches if id(patch) not in bars]
    assert all(span.get_width() == pytest.approx(1) for span in spans)
    return [span.get_x() + 0.5 for span in spans]


def crosses(axes):
    return [int(x) for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()]


def test_protected_layers_are_shaded_and_those_without_a_score_crossed():
    scores = {i: 1.0 + i for i in range(4, 10)}
    figure = plot_layer_importance(scores, protected=[11, 0, 1, 4], num_layers=12)
    [axes] = figure.axes
    assert shaded(axes) == [0, 1, 4, 11]
    assert crosses(axes) == [0, 1, 2, 3, 10, 11]
    assert [bar.get_height() for bar in axes.containers[0]] == list(scores.values())
    outlined = [to_hex(bar.get_edgecolor()) == "#666666" for bar in axes.containers[0]]
    assert outlined == [True, False, False, False, False, False]  # layer 4
    assert axes.get_xlim() == (-0.7, 11.7)
    assert list(axes.get_xticks()) == list(range(12))
    assert legend_texts(figure) == ["protected (4)", "no score (6)"]
    assert_nothing_outside(figure)


@pytest.mark.parametrize("sign", [1, -1])
def test_crosses_stand_inside_the_axes(sign):
    figure = plot_layer_importance({1: sign * 2.0, 2: sign * 1.0}, num_layers=4)
    figure.draw_without_rendering()
    [axes] = figure.axes
    [line] = [line for line in axes.lines if line.get_marker() == "x"]
    places = line.get_transform().transform(line.get_xydata())
    assert all(axes.bbox.contains(*place) for place in places)
    assert legend_texts(figure) == ["no score (2)"]


def test_without_the_number_of_layers_the_axis_ends_with_the_outermost_marks():
    figure = plot_layer_importance({2: 1.0, 3: 2.0}, protected=(5, 0))
    [axes] = figure.axes
    assert (shaded(axes), crosses(axes)) == ([0, 5], [0, 1, 4, 5])
    assert axes.get_xlim() == (-0.7, 5.7)


def test_protected_and_removed_layers_of_a_model_share_one_legend():
    scores = LayerScores({i: float(i) for i in range(4, 30)}, strategy="bi")
    options = {"protected": [0, 1, 2, 3, 30, 31], "num_layers": 32}
    figure = plot_layer_importance(scores, removed=[14, 15], **options)
    marks = ["protected (6)", "no score (6)"]
    assert legend_texts(figure) == ["removed (2 of 32)", "kept", *marks]
    assert_nothing_outside(figure)
    assert not overlaps([figure._suptitle, *figure.axes[0].get_legend().get_texts()])
    ranked = plot_layer_importance(scores, **options)
    assert legend_texts(ranked)[2:] == marks
    assert legend_texts(plot_layer_importance(scores, num_layers=32))[2:] == marks[1:]


def test_a_model_without_gaps_has_no_crosses():
    figure = plot_layer_importance(valley(12), num_layers=12)
    assert (crosses(figure.axes[0]), legend_texts(figure)) == ([], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
def test_protection_that_cannot_be(options, message):
    with pytest.raises(InvalidPlanError, match=message):
        plot_layer_importance(valley(12), **options)


# --- plot_depth_curve

UNIT = "relative change of likelihood per token"
COLLAPSE = [-0.01, -0.03, -0.1, -0.6, -0.95]


def held(change, **other):
    found = {"change": change - 0.02, "low": change - 0.04, "high": change + 0.01}
    return {**found, "unit": UNIT, "items": 20, "fingerprint": "f", **other}


def curve(changes, strategy="smart", measured=True, model_id="m", num_layers=32, unit=UNIT):
    points = [
        {
            "n_layers": count,
            "removed": list(range(count)),
            "change": change,
            "held_out": held(change, unit=unit) if measured else None,
        }
        for count, change in enumerate(changes, 1)
    ]
    return DepthCurve(model_id, num_layers, strategy, unit, points)


def line_of(axes, colour, style):
    """Depths, values and the depths with a marker, of the line of that look."""
    [line] = [
        line
        for line in axes.lines
        if to_hex(line.get_color()) == colour and line.get_linestyle() == style
    ]
    depths = list(line.get_xdata())
    return depths, list(line.get_ydata()), [depths[place] for place in line.get_markevery()]


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
    changes = [-0.01, -0.02, -0.04]
    figure = plot_depth_curve(curve(changes))
    [axes] = figure.axes
    depths, values, marked = line_of(axes, BLUE, "-")
    assert (depths, marked) == ([0, 1, 2, 3], [1, 2, 3])
    assert values == pytest.approx([0, -3, -4, -6])
    depths, values, marked = line_of(axes, BLUE, "--")
    assert (depths, marked) == ([0, 1, 2, 3], [])
    assert values == pytest.approx([0, -1, -2, -4])
    [(colour, band)] = bands(axes).items()
    assert colour == BLUE
    assert list(band) == [0, 1, 2, 3]
    wanted = [(0, 0), (-5, 0), (-6, -1), (-8, -3)]
    assert list(band.values()) == [pytest.approx(ends) for ends in wanted]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylabel() == f"{UNIT}\nin %"
    assert axes.get_xlabel() == "layers removed (of 32)"
    assert [label.get_text() for label in axes.get_xticklabels()] == [*"0123"]
    assert figure.get_suptitle() == "Quality by number of layers removed: smart"
    drawn = [text for text in legend_texts(figure) if text.strip()]
    assert drawn == ["smart", "held-out data", "95 % interval", "data of the choice"]
    assert_nothing_outside(figure)


def test_without_held_out_data_the_line_is_that_of_the_choice():
    figure = plot_depth_curve(curve([-0.01, 0.02], measured=False))
    [axes] = figure.axes
    assert line_of(axes, BLUE, "--") == ([0, 1, 2], pytest.approx([0, -1, 2]), [1, 2])
    assert [line.get_linestyle() for line in axes.lines[1:]] == ["--"]  # after that of 0 %
    assert bands(axes) == {}
    assert legend_texts(figure) == ["smart", "data of the choice"]


def test_points_without_held_out_data_keep_a_hollow_marker():
    one = curve([-0.01, -0.02, -0.03, -0.04])
    one.points[1]["held_out"] = None
    one.points[3]["held_out"] = {}
    [axes] = plot_depth_curve(one).axes
    assert line_of(axes, BLUE, "-")[0] == [0, 1, 3]
    assert line_of(axes, BLUE, "--")[2] == [2, 4]
    [hollow] = [line for line in axes.lines if line.get_markevery() == [2, 4]]
    assert to_hex(hollow.get_markerfacecolor()) == "#ffffff"


def test_a_collapse_leaves_the_first_steps_readable():
    figure = plot_depth_curve(curve(COLLAPSE, measured=False))
    [axes] = figure.axes
    assert_nothing_outside(figure)
    heights = [axes.transData.transform((0, 100 * change))[1] for change in [0, *COLLAPSE]]
    steps = [(one - two) / axes.bbox.height for one, two in pairwise(heights)]
    assert min(steps[:4]) > 0.1
    assert all(step > 0 for step in steps)
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["\u2212100", "\u221230", "\u221210", "\u22123", "\u22121", "0"]
    assert list(axes.get_yticks()) == [-100, -30, -10, -3, -1, 0]
    assert axes.get_ylabel() == f"{UNIT}\nin %, log scale beyond 1 %"
    assert not overlaps(axes.get_yticklabels())


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_depth_curve(curve(changes, measured=False))
        figure.draw_without_rendering()
    assert figure.axes[0].get_yscale() == scale
    assert ("log scale" in figure.axes[0].get_ylabel()) == (scale == "symlog")
    low, high = figure.axes[0].get_ylim()
    assert low < min(100 * c for c in [0, *changes])
    assert high > max(100 * c for c in [0, *changes])


def test_the_interval_counts_for_the_scale():
    one = curve([-0.06])
    one.points[0]["held_out"]["low"] = -0.9
    assert plot_depth_curve(one).axes[0].get_yscale() == "symlog"


def test_several_curves_keep_apart(tmp_path):
    curves = [
        curve(COLLAPSE),
        curve([-0.02, -0.05, -0.08], "pruneme"),
        curve([-0.03] * 8, "ablation", measured=False),
    ]
    for place, one in enumerate(curves):
        one.save(tmp_path / f"{place}.json")
    loaded = [DepthCurve.load(tmp_path / f"{place}.json") for place in range(3)]
    figure = plot_depth_curve(iter(loaded))
    [axes] = figure.axes
    for one, colour in zip(curves, PALETTE, strict=False):
        depths, values, _ = line_of(axes, colour, "--")
        assert depths == list(range(len(one.points) + 1))
        assert values == pytest.approx([0, *(100 * point["change"] for point in one.points)])
    assert line_of(axes, ORANGE, "-")[1] == pytest.approx([0, -4, -7, -10])
    assert set(bands(axes)) == {BLUE, ORANGE}
    assert bands(axes)[ORANGE][3] == pytest.approx((-12, -7))
    assert [one.get_linestyle() for one in axes.lines if one.get_color() == GREEN] == ["--"]
    names = ["smart", "pruneme", "ablation"]
    keys = ["held-out data", "95 % interval", "data of the choice"]
    assert legend_texts(figure) == [*names, *keys]
    handles = figure.legends[0].legend_handles[:3]
    assert [to_hex(handle.get_color()) for handle in handles] == list(PALETTE[:3])
    assert [handle.get_marker() for handle in handles] == list(MARKERS[:3])
    assert figure.get_suptitle() == "Quality by number of layers removed"
    assert list(axes.get_xticks()) == list(range(9))
    assert_nothing_outside(figure)
    assert plot_depth_curve(loaded, "Mine at $5").get_suptitle() == "Mine at $5"


def test_curves_of_several_models_name_them():
    curves = [curve([-0.1], model_id="a/one"), curve([-0.2], model_id="b/two", num_layers=24)]
    figure = plot_depth_curve(curves)
    assert legend_texts(figure)[:2] == ["smart (a/one)", "smart (b/two)"]
    assert figure.axes[0].get_xlabel() == "layers removed"


@pytest.mark.parametrize("count", [1, 3, MAX_CURVES])
@pytest.mark.parametrize(("points", "ticks"), [(1, 2), (12, 13), (30, 16), (60, 16)])
def test_no_text_of_a_curve_touches_another(count, points, ticks):
    long = "a strategy with a name that is long"
    curves = [
        curve(
            [math.expm1(-0.002 * (one + 1) * k**1.5) for k in range(1, points + 1)],
            f"{long} {one}" if one else "smart",
            model_id=f"organisation/a-model-of-{one}-billion",
            num_layers=80,
        )
        for one in range(count)
    ]
    figure = plot_depth_curve(curves)
    assert_nothing_outside(figure)
    [axes] = figure.axes
    assert len(axes.get_xticks()) == ticks
    assert axes.get_xticks()[0] == 0
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert figure.get_figwidth() == (7.0 if points > 40 else 3.4)
    labels = [axes.xaxis.label, axes.yaxis.label, figure._suptitle]
    labels += [*visible_labels(axes.xaxis), *visible_labels(axes.yaxis)]
    assert not overlaps([*labels, *figure.legends[0].get_texts()])
    drawn = " ".join(" ".join(legend_texts(figure)).split())
    assert all(f"{long} {one}" in drawn for one in range(1, count))
    whole = drawn.replace("- ", "-")  # broken after the hyphens of a name
    assert count == 1 or all(
        f"(organisation/a-model-of-{i}-billion)" in whole for i in range(count)
    )


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([], "0 curves given: one figure shows 1 to 6"),
        ([curve([-0.1], str(i)) for i in range(7)], "7 curves given"),
        (None, "None is a NoneType, not a DepthCurve"),
        ("curve.json", r"'curve\.json' is a str, not a DepthCurve: .* DepthCurve\.load"),
        ([curve([-0.1]), {"points": []}], "is a dict, not a DepthCurve"),
        ([curve([-0.1]), curve([-0.1], "x", unit="accuracy")], f"units, '{UNIT}' and 'accuracy'"),
        ([curve([-0.1]), curve([-0.2])], "Several curves are called 'smart': name them apart"),
    ],
)
def test_curves_that_cannot_be_drawn(curves, message):
    with pytest.raises(InvalidDataError, match=message):
        plot_depth_curve(curves)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (held(-0.1, unit="accuracy"), InvalidDataError, "different units"),
        ([1.0], InvalidDataError, r"held_out at 1 layers is \[1\.0\]: it must be a dict"),
        ({"change": -0.1, "low": -0.2}, InvalidDataError, r"held-out high of 'smart' at 1 .* None"),
        (held(-0.1, low="much"), InvalidDataError, r"held-out low .* 'much'"),
        (held(-0.1, low=0.3), InvalidDataError, r"held-out low .* is above high"),
        (held(math.nan), NonFiniteError, r"held-out change .* is nan"),
    ],
)
def test_held_out_changes_that_cannot_be_drawn(found, error, message):
    one = curve([-0.1])
    one.points[0]["held_out"] = found
    with pytest.raises(error, match=message):
        plot_depth_curve(one)


def test_a_change_that_became_nan_is_never_drawn():
    one = curve([-0.1, -0.2])
    one.points[1]["change"] = math.nan
    with pytest.raises(NonFiniteError, match=r"change of 'smart' at 2 layers is nan"):
        plot_depth_curve(one)


def test_curves_are_named_apart_as_the_message_says():
    one = curve([-0.1])
    figure = plot_depth_curve([one, replace(one, strategy="first try")])
    assert legend_texts(figure)[:2] == ["smart", "first try"]


# --- plot_activation_comparison


def naive_streams(model, tokenizer, removed):
    """State before each kept layer and after the last, by calling the layers one by one."""
    text = "Question: " + PROMPT + "\nAnswer:"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    states = {}
    for index, layer in enumerate(model.model.layers):
        if index not in removed:
            states[index] = hidden[0]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    states[len(model.model.layers)] = hidden[0]
    return states


def lines_by_colour(axes):
    found = {to_hex(line.get_color()): line for line in axes.lines}
    return {
        colour: (list(line.get_xdata()), list(line.get_ydata())) for colour, line in found.items()
    }


@torch.no_grad()
def test_activation_comparison_equals_a_layer_by_layer_computation(model, tokenizer):
    removed = [2, 5]
    figure = plot_activation_comparison(model, tokenizer, PROMPT, removed)
    left, right = figure.axes
    full, pruned = (naive_streams(model, tokenizer, gone) for gone in ([], removed))
    for colour, states in ((BLUE, full), (ORANGE, pruned)):
        depths, values = lines_by_colour(left)[colour]
        wanted = [states[d].square().mean(-1).sqrt().quantile(0.5).item() for d in depths]
        assert depths == sorted(states)
        assert values == pytest.approx(wanted, rel=1e-4)
    depths, values = lines_by_colour(right)[GREEN]
    cosine = torch.nn.functional.cosine_similarity
    wanted = [cosine(full[d], pruned[d], dim=-1).quantile(0.5).item() for d in depths]
    assert depths == [0, 1, 3, 4, 6]
    assert values == pytest.approx(wanted, rel=1e-4)
    assert values[:2] == [1.0, 1.0]
    assert values[-1] < 0.999
    assert right.get_title() == f"at the output: {wanted[-1]:.3f}"


def test_removed_layers_are_shaded_from_input_to_output(model, tokenizer):
    figure = plot_activation_comparison(model, tokenizer, PROMPT, [2, 3])
    for axes in figure.axes:
        spans = [(patch.get_x(), patch.get_width()) for patch in axes.patches]
        assert spans == [(2, 1), (3, 1)]
        assert [label.get_text() for label in axes.get_xticklabels()] == [*"012345", "out"]
    assert legend_texts(figure) == ["full model", "pruned model", "removed layers"]
    assert figure.get_suptitle() == "Residual stream with 2 of 6 layers removed"
    assert_nothing_outside(figure)


def test_equal_states_have_similarity_one_even_where_they_are_zero():
    [axes] = style.new_figure(3.4, [2.0])[1][0]
    states = {0: torch.zeros(3, 4), 1: torch.full((3, 4), 0.1)}
    model_figures._draw_similarity(axes, states, states)
    assert lines_by_colour(axes)[GREEN] == ([0, 1], [1.0, 1.0])


def test_eighty_layers_have_few_ticks(tokenizer):
    figure = plot_activation_comparison(build(80), tokenizer, PROMPT, range(50, 70))
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert len(axes.get_xticks()) <= 13
        assert not overlaps(axes.get_xticklabels())


def test_activation_comparison_leaves_the_model_as_it_was(model, tokenizer):
    model.train()
    try:
        layers = list(model.model.layers)
        plot_activation_comparison(model, tokenizer, PROMPT, [1])
        assert all(module.training for module in model.modules())
        assert list(model.model.layers) == layers
        assert not any(module._forward_hooks for module in model.modules())
    finally:
        model.eval()


def test_activation_comparison_refuses(model, tokenizer):
    with pytest.raises(InvalidPlanError, match=r"Layer 6 is out of range"):
        plot_activation_comparison(model, tokenizer, PROMPT, [6])
    with pytest.raises(InvalidDataError, match=r"The prompt '  ' is no text"):
        plot_activation_comparison(model, tokenizer, "  ", [1])
    with pytest.raises(InvalidDataError, match=r"a list, not one text"):
        plot_activation_comparison(model, tokenizer, [PROMPT], [1])
    broken = build()
    broken.model.layers[3].mlp.down_proj.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"at layer 3 is NaN"):
        plot_activation_comparison(broken, tokenizer, PROMPT, [1])


# --- plot_semantic_comparison


@pytest.fixture(scope="module")
def pruned(model):
    return LayerStack(model).remove([2, 3])


@torch.no_grad()
def test_next_token_probabilities_are_those_of_the_models(model, pruned, tokenizer):
    figure = plot_semantic_comparison(
        model, pruned, tokenizer, PROMPT, embedder=WordEmbedder(), top_k=3, max_new_tokens=8
    )
    axes = figure.axes[0]
    ids = tokenizer("Question: " + PROMPT + "\nAnswer:", return_tensors="pt")["input_ids"]
    one, two = (m(ids).logits[0, -1].softmax(-1) for m in (model, pruned))
    best = {*one.topk(3).indices.tolist(), *two.topk(3).indices.tolist()}
    order = sorted(best, key=lambda token: -one[token])
    wanted = [*one[order].tolist(), *two[order].tolist()]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(wanted, rel=1e-4)
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert colours == [BLUE] * len(order) + [ORANGE] * len(order)
    labels = [label.get_text().lstrip("\u2423") for label in axes.get_yticklabels()]
    assert labels == [WORDS[token] for token in order]
    overlap = torch.minimum(one, two).sum().item()
    assert axes.get_title() == f"probability in common: {overlap:.0%}"
    assert_nothing_outside(figure)


def test_the_answers_and_their_similarity_are_printed(model, pruned, tokenizer):
    embedder = WordEmbedder()
    figure = plot_semantic_comparison(
        model, pruned, tokenizer, PROMPT, embedder=embedder, max_new_tokens=8
    )
    answers = [
        generation.ModelEvaluator(m, tokenizer, max_new_tokens=8).generate([PROMPT])[0]
        for m in (model, pruned)
    ]
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert texts[:2] == ["prompt", PROMPT]
    body = " ".join(texts[2:-1])
    assert body == f"original model {answers[0]} pruned model {answers[1]}"
    one, two = embedder.encode(answers)
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=0)
    assert texts[-1] == f"semantic similarity: {cosine:.2f}"


def test_without_an_embedder_the_figure_says_so(model, pruned, tokenizer, monkeypatch):
    def none():
        raise MissingDependencyError("not here")

    monkeypatch.setattr(similarity, "load_embedder", none)
    figure = plot_semantic_comparison(model, pruned, tokenizer, PROMPT, max_new_tokens=4)
    last = figure.axes[1].texts[-1].get_text()
    assert last == "semantic similarity: not computed (no sentence embedder)"


def test_special_characters_and_long_texts_stay_on_the_page(model, pruned, tokenizer, tmp_path):
    prompts = [
        "$x^{2$ costs 5 \\frac{1}\nand 你\tor \x07",
        "a long story about a cat " * 40,
        "m" * 300,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph would warn
        figure = plot_semantic_comparison(
            model, pruned, tokenizer, prompts, tmp_path / "a.png", embedder=WordEmbedder()
        )
    assert len(figure.axes) == 6
    shown = figure.axes[1].texts[1].get_text()
    assert shown == "$x^{2$ costs 5 \\frac{1}\u21b5and \\u4f60\\tor \\x07"
    assert any(text.get_text().endswith(" \u2026") for text in figure.axes[3].texts)
    assert_nothing_outside(figure)
    for row in (1, 3, 5):
        assert not overlaps(figure.axes[row].texts)


def test_semantic_comparison_refuses(model, pruned, tokenizer):
    with pytest.raises(InvalidDataError, match=r"7 prompts given: .* 1 to 6"):
        plot_semantic_comparison(model, pruned, tokenizer, ["a"] * 7)
    with pytest.raises(InvalidDataError, match=r"0 prompts given"):
        plot_semantic_comparison(model, pruned, tokenizer, [])
    with pytest.raises(InvalidDataError, match=r"The prompt 3 is no text"):
        plot_semantic_comparison(model, pruned, tokenizer, ["a", 3])
    with pytest.raises(InvalidDataError, match=r"12 and 20 tokens in their vocabularies"):
        plot_semantic_comparison(model, build(vocab=20), tokenizer, "a cat", max_new_tokens=2)
    broken = build()
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="NaN"):
        plot_semantic_comparison(model, broken, tokenizer, "a cat", max_new_tokens=2)


def test_tokens_show_their_spaces_and_keep_to_a_width():
    class Pieces:
        pieces = ("x", " a cat", "\ufffd", "\n", "m" * 40, "")

        def decode(self, ids, **options):
            return "".join(self.pieces[i] for i in ids)

        def convert_ids_to_tokens(self, token):
            return {2: "<0xE4>"}.get(token)

    shown = [model_figures._token_text(Pieces(), 0, token) for token in range(1, 6)]
    assert shown == ["\u2423a\u2423cat", "<0xE4>", "\u21b5", "m" * 17 + "\u2026", "<5>"]


# --- plot_holistic_benchmark

BEFORE = {"gsm8k": 0.6, "mean": 0.7, "mmlu_high_school_european_history_generative": 0.8}
AFTER = {"gsm8k": 0.3, "mean": 0.45, "mmlu_high_school_european_history_generative": 0.6}
COUNTS = {"gsm8k": 30, "mmlu_high_school_european_history_generative": 100}


def half_widths(axes):
    """Half the length of each error bar, in the order in which they were drawn."""
    segments = [
        s
        for c in axes.containers
        if c.get_label() == "_nolegend_" or hasattr(c, "has_xerr")
        for part in getattr(c, "lines", (None, None, []))[2]
        for s in part.get_segments()
    ]
    return [(segment[1][0] - segment[0][0]) / 2 for segment in segments]


def test_bars_errors_and_labels_of_the_benchmark():
    figure = plot_holistic_benchmark(BEFORE, AFTER, COUNTS)
    [axes] = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.6, 0.8, 0.7, 0.3, 0.6, 0.45]
    se = [math.sqrt(p * (1 - p) / n) for p, n in ((0.6, 30), (0.8, 100), (0.3, 30), (0.6, 100))]
    means = [math.sqrt(se[0] ** 2 + se[1] ** 2) / 2, math.sqrt(se[2] ** 2 + se[3] ** 2) / 2]
    assert half_widths(axes) == pytest.approx([*se[:2], means[0], *se[2:], means[1]])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "gsm8k (n=30)"
    joined = names[1].replace("\n", "")
    assert joined.startswith("mmlu_high_school_european_history_generative")
    assert "n=100" in joined
    assert names[2] == "mean"
    assert list(axes.get_yticks()) == [0, 1, 2.4]  # the mean is set apart
    assert [text.get_text() for text in axes.texts] == [
        "0.60",
        "0.80",
        "0.70",
        "0.30",
        "0.60",
        "0.45",
    ]
    assert legend_texts(figure) == ["before", "after"]
    assert_nothing_outside(figure)
    assert not overlaps([*axes.texts, *axes.get_yticklabels()])


def test_one_number_of_items_for_all_tasks():
    figure = plot_holistic_benchmark({"a": 0.5}, {"a": 0.0}, np.int64(25))
    assert half_widths(figure.axes[0]) == pytest.approx([0.1, 0.0])
    assert figure.axes[0].get_yticklabels()[0].get_text() == "a (n=25)"


def test_chance_is_drawn_where_it_is_known():
    figure = plot_holistic_benchmark(
        {"a": 0.5, "b": 1.0}, {"a": 0.4, "b": 0.9}, 25, chance={"b": 0.25}
    )
    [axes] = figure.axes
    [lines] = [c for c in axes.collections if c.get_label() == "chance"]
    assert [segment.tolist() for segment in lines.get_segments()] == [[[0.25, 0.55], [0.25, 1.45]]]
    assert "chance" in legend_texts(figure)
    assert max(axes.get_xticks()) <= 1.0


def test_twenty_tasks_do_not_touch():
    tasks = {f"task_number_{i}_with_a_name": 0.5 for i in range(20)}
    figure = plot_holistic_benchmark(tasks, tasks, 100)
    assert_nothing_outside(figure)
    assert not overlaps([*figure.axes[0].texts, *figure.axes[0].get_yticklabels()])


@pytest.mark.parametrize(
    ("before", "after", "n", "error", "message"),
    [
        ({}, {}, 5, InvalidDataError, "name no task"),
        ({"a": 0.1, "b": 0.2}, {"a": 0.1}, 5, InvalidDataError, r"\['b'\] are missing in after"),
        ({"a": 0.1}, {"a": 0.1, "b": 0.2}, 5, InvalidDataError, r"\['b'\] are missing in before"),
        ({"a": 0.1}, {"a": math.nan}, 5, NonFiniteError, r"after\['a'\] is nan"),
        ({"a": 61.0}, {"a": 0.5}, 5, InvalidDataError, r"before\['a'\] is 61.0.*not percent"),
        ({"a": 0.1}, {"a": 0.1}, 0, InvalidDataError, "task 'a' is 0"),
        ({"a": 0.1}, {"a": 0.1}, 2.5, InvalidDataError, r"task 'a' is 2\.5"),
        ({"a": 0.1}, {"a": 0.1}, {"b": 3}, InvalidDataError, "task 'a' is None"),
    ],
)
def test_benchmarks_that_cannot_be_drawn(before, after, n, error, message):
    with pytest.raises(error, match=message):
        plot_holistic_benchmark(before, after, n)


def test_chance_is_checked():
    with pytest.raises(InvalidDataError, match=r"chance\['a'\] is 25"):
        plot_holistic_benchmark({"a": 0.5}, {"a": 0.4}, 25, chance={"a": 25})
    with pytest.raises(InvalidDataError, match=r"chance names tasks \['z'\]"):
        plot_holistic_benchmark({"a": 0.5}, {"a": 0.4}, 25, chance={"z": 0.25})


# --- all figures

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_equal_input_gives_equal_bytes_of_the_right_kind(
    suffix, tmp_path, model, pruned, tokenizer
):
    def draw(folder):
        folder = tmp_path / folder / "deep"  # does not exist yet
        plot_layer_importance(valley(12), save_path=folder / f"1{suffix}", removed=[3])
        plot_activation_comparison(model, tokenizer, PROMPT, [2], str(folder / f"2{suffix}"))
        plot_semantic_comparison(
            model,
            pruned,
            tokenizer,
            PROMPT,
            folder / f"3{suffix}",
            embedder=WordEmbedder(),
            max_new_tokens=4,
        )
        plot_holistic_benchmark(BEFORE, AFTER, COUNTS, folder / f"4{suffix}")
        plot_depth_curve(curve(COLLAPSE), None, folder / f"5{suffix}")
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    first = draw("one")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 50}):
        second = draw("two")  # nor does the caller's style matter
    assert len(first) == 5
    assert first == second
    assert all(data.startswith(MAGIC[suffix]) for data in first)


def test_files_are_fit_for_print(tmp_path):
    from PIL import Image

    plot_layer_importance(valley(12), save_path=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == round(3.4 * 300)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    plot_layer_importance(valley(12), save_path=tmp_path / "a.pdf")
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    plot_layer_importance(valley(12), save_path=tmp_path / "a.svg")
    assert b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_other_suffixes_are_refused_before_any_work(name, tmp_path):
    message = r"must end in \.png, \.svg, \.pdf"
    path = tmp_path / "new" / name
    with pytest.raises(OutputError, match=message):
        plot_layer_importance({0: 1.0}, save_path=path)
    with pytest.raises(OutputError, match=message):
        plot_holistic_benchmark({"a": 0.5}, {"a": 0.5}, 5, path)
    with pytest.raises(OutputError, match=message):
        plot_activation_comparison(None, None, PROMPT, [1], path)
    with pytest.raises(OutputError, match=message):
        plot_semantic_comparison(None, None, None, PROMPT, path)
    with pytest.raises(OutputError, match=message):
        plot_depth_curve(None, save_path=path)
    assert not path.parent.exists()


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot write .*a\.png"):
        plot_layer_importance({0: 1.0}, save_path=tmp_path / "file" / "a.png")


def test_no_global_state_is_touched(tmp_path, model, tokenizer):
    import matplotlib.pyplot as plt

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    plot_layer_importance(valley(12), save_path=tmp_path / "a.png")
    plot_activation_comparison(model, tokenizer, PROMPT, [1])
    plot_depth_curve(curve(COLLAPSE))
    with pytest.raises(NonFiniteError):
        plot_holistic_benchmark({"a": 0.5}, {"a": math.nan}, 5)
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    assert plt.get_fignums() == []


def test_show_lends_the_figure_to_pyplot_and_takes_it_back(monkeypatch):
    import matplotlib.pyplot as plt

    shown = []

    def show(block):
        shown.extend(plt.figure(number) for number in plt.get_fignums())

    monkeypatch.setattr(plt, "show", show)
    figure = plot_layer_importance({0: 1.0})
    assert shown == []
    figure = plot_layer_importance({0: 1.0}, show=True)
    assert shown == [figure]
    assert plt.get_fignums() == []
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"


def test_colours_are_seaborns_palette_for_the_colour_blind():
    palette = seaborn.color_palette("colorblind").as_hex()
    assert palette[:3] == [BLUE, ORANGE, GREEN]
    assert tuple(palette[:5]) == PALETTE[:5]
    assert len(PALETTE) == len(set(MARKERS)) == MAX_CURVES


def test_importing_the_module_loads_nothing_heavy():
    heavy = "{'torch', 'matplotlib', 'seaborn', 'pandas', 'transformers'}"
    code = f"import sys, llm_pruner.visualization; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert model_figures.MAX_PROMPTS == 6
