"""Figures of layer scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidDataError, InvalidPlanError
from ..layer_scores import LayerScores
from . import style
from .style import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_layer_importance(
    scores: Mapping[int, float],
    title: str | None = None,
    save_path: str | Path | None = None,
    *,
    removed: Iterable[int] | None = None,
    protected: Sequence[int] = (),
    num_layers: int | None = None,
    show: bool = False,
) -> Figure:
    """Bars of the score of each layer.

    `LayerScores` name the axis and the strategy; without `removed`, their bars are coloured by the
    order in which the layers would be removed. Bars that would dwarf all others are cut off and
    marked by an arrow; their values are printed below the axis.

    Args:
        scores: layer -> score.
        title: above the figure; if None, one that names the strategy.
        removed: layers to show as removed (hatched). `InvalidPlanError` if one has no score.
        protected: indices of layers to show as protected (shaded). `InvalidPlanError` if one is no
            layer, or removed.
        num_layers: layers of the model; the axis runs over all of them, and those without a score
            are crossed. `InvalidPlanError` if `scores` has more. If None, the axis ends with the
            outermost scores and protected layers.
    """
    path = style.check_path(save_path)
    known = isinstance(scores, LayerScores)
    scores = _check_scores(scores)
    taken = None if removed is None else _check_removed(removed, scores)
    shaded, layers = _check_protected(scores, taken or set(), protected, num_layers)
    width, most_ticks = style.layer_width(len(layers))
    if title is None:
        title = f"Layer importance: {scores.strategy}" if known else "Layer importance"
    with style.drawing(title, path, show, width, [2.2]) as (figure, [[axes]]):
        bars = axes.bar(list(scores), list(scores.values()), width=0.8, color=BLUE)
        handles = []
        if known or taken is not None:
            handles += _colour_bars(bars, scores, taken, num_layers or len(scores))
        if shaded or num_layers is not None:
            handles += _mark_layers(axes, bars, scores, layers, shaded)
        if handles:
            axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        note = _cut_axis(axes, scores)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xlabel(f"layer\n{style.wrap(note, width - 0.7)}".strip())
        axes.set_xlim(layers[0] - 0.7, layers[-1] + 0.7)
        axes.set_xticks(style.ticks(layers[0], layers[-1], most_ticks))
    return figure


def plot_score_comparison(
    scores: Sequence[LayerScores],
    title: str = "Order of removal by strategy",
    save_path: str | Path | None = None,
    *,
    removed: Sequence[Iterable[int]] | None = None,
    show: bool = False,
) -> Figure:
    """The order in which several strategies would remove the layers of one model.

    Rows are strategies, columns are layers, coloured by their rank in that order, since the scores
    themselves have different units. Layers without a score are crossed.

    Args:
        scores: those of 1 to 12 strategies, whose names differ.
        removed: for each strategy the layers that it removed, which are marked.

    Raises:
        InvalidDataError: no scores, too many, of one name, or another number of lists in `removed`.
        InvalidPlanError: a removed layer has no score.
    """
    path = style.check_path(save_path)
    given = _check_several(scores)
    cuts = [[] for _ in given] if removed is None else [list(cut) for cut in removed]
    if len(cuts) != len(given):
        raise InvalidDataError(
            f"removed has {len(cuts)} lists for {len(given)} strategies: give one for each."
        )
    cuts = [sorted(_check_removed(cut, one)) for cut, one in zip(cuts, given, strict=True)]
    layers = range(min(map(min, given)), max(map(max, given)) + 1)
    width, most_ticks = style.layer_width(len(layers))
    labels = [style.wrap(one.strategy, 1.2, 2) for one in given]
    lines = 1 + max(label.count("\n") for label in labels)
    height = max(1.0, 0.55 + (0.1 + 0.13 * lines) * len(given))
    with style.drawing(title, path, show, width, [height]) as (figure, [[axes]]):
        image = _draw_order(axes, given, cuts, layers)
        axes.set_yticks(range(len(given)), labels)
        axes.tick_params(axis="y", which="both", length=0)
        axes.set_xticks(style.ticks(layers[0], layers[-1], most_ticks))
        axes.set_xlabel("layer")
        most = max(map(len, given))
        bar = figure.colorbar(image, ax=axes, ticks=[1, most] if most > 1 else [1], aspect=12)
        bar.ax.set_yticklabels(["first", "last"][: len(bar.get_ticks())])
        bar.ax.invert_yaxis()
        bar.set_label("would be removed")
        style.legend_below(figure, axes.lines)
    return figure


def _check_several(scores: Sequence[LayerScores]) -> list[LayerScores]:
    given: list[Any] = [scores] if isinstance(scores, Mapping) else list(scores)
    for one in given:
        if not isinstance(one, LayerScores):
            raise InvalidDataError(
                f"{one!r:.60} is a {type(one).__name__}, not LayerScores: give what "
                "compute_layer_scores() returns."
            )
    style.check_number(given, 12, "strategies")
    names = [one.strategy for one in given]
    if len(set(names)) < len(names):
        raise InvalidDataError(f"Some of the strategies {names} have one name: name them apart.")
    return [_check_scores(one) for one in given]


def _draw_order(axes: Any, given: list[LayerScores], cuts: list[list[int]], layers: range) -> Any:
    """Cells coloured by rank, with dots on removed layers and crosses where there is no score."""
    import numpy as np

    ranks = np.full((len(given), len(layers)), np.nan)
    for row, scores in enumerate(given):
        for rank, layer in enumerate(scores.ranked(), 1):
            ranks[row, layer - layers[0]] = rank
    edges = layers[0] - 0.5, layers[-1] + 0.5, len(given) - 0.5, -0.5
    image = style.cell_map(axes, ranks, edges, (1, max(map(len, given))))
    axes.set_yticks([row + 0.5 for row in range(len(given) - 1)], minor=True)
    axes.grid(axis="y", which="minor", color="white", linewidth=2)
    removed = [(layer, row) for row, cut in enumerate(cuts) for layer in cut]
    style.mark_cells(axes, removed, len(layers), "removed")
    missing = [(column + layers[0], row) for row, column in np.argwhere(np.isnan(ranks)).tolist()]
    style.mark_cells(axes, missing, len(layers), f"no score ({len(missing)})", "x")
    return image


def _check_scores(scores: Mapping[int, float]) -> LayerScores:
    if not isinstance(scores, Mapping) or not scores:
        raise InvalidDataError(
            f"scores is {scores!r:.60}: give a dict of layer -> score with at least one layer, "
            "such as compute_layer_scores() returns."
        )
    try:
        if isinstance(scores, LayerScores):
            return LayerScores.from_dict(scores.to_dict())  # a dict may have changed: check again
        return LayerScores(scores, strategy="scores")
    except (TypeError, ValueError) as error:
        raise InvalidDataError(f"scores must map layer numbers to numbers: {error}.") from error


def _check_removed(removed: Iterable[int], scores: LayerScores) -> set[int]:
    taken = set(removed)
    if unscored := sorted(taken - scores.keys()):
        raise InvalidPlanError(
            f"removed layers {unscored} have no score: choose among the layers that scores has, "
            f"{min(scores)} to {max(scores)}."
        )
    return taken


def _check_protected(
    scores: LayerScores, removed: set[int], protected: Sequence[int], num_layers: int | None
) -> tuple[list[int], range]:
    """The protected layers, ascending, and all layers along the axis."""
    if num_layers is not None and (type(num_layers) is not int or num_layers < 1):
        raise InvalidPlanError(f"num_layers={num_layers!r} must be a whole number from 1.")
    listed, end = list(protected), math.inf if num_layers is None else num_layers
    layers = [i for i in listed if isinstance(i, Integral) and not isinstance(i, bool)]
    if len({i for i in layers if 0 <= i < end}) < len(listed):
        last = "" if num_layers is None else f" to {num_layers - 1}, the model's last layer"
        raise InvalidPlanError(
            f"protected={listed} must list layers, each once, as whole numbers from 0{last}."
        )
    if both := sorted(removed.intersection(layers)):
        raise InvalidPlanError(
            f"Layers {both} are in removed and in protected: leave them out of one."
        )
    if beyond := [layer for layer in scores if not 0 <= layer < end] if num_layers else []:
        raise InvalidPlanError(
            f"scores has layers {beyond}, which a model of num_layers={num_layers} does not have: "
            "give the number of layers of the model that was scored."
        )
    shown = [*scores, *layers]
    axis = range(num_layers) if num_layers else range(min(shown), max(shown) + 1)
    return sorted(map(int, layers)), axis


def _mark_layers(
    axes: Any, bars: Any, scores: LayerScores, layers: range, protected: list[int]
) -> list[Any]:
    """Shade protected layers, cross those without a score; legend handles."""
    from matplotlib.patches import Patch
    from matplotlib.transforms import offset_copy

    handles: list[Any] = []
    for index in protected:
        axes.axvspan(index - 0.5, index + 0.5, color="0.92", linewidth=0, zorder=0)
    for layer, bar in zip(scores, bars, strict=True):
        if layer in protected:  # a bar may be as light as the shade
            bar.set(edgecolor="0.4", linewidth=0.5)
    if protected:
        handles.append(Patch(fc="0.92", label=f"protected ({len(protected)})"))
    unscored = [layer for layer in layers if layer not in scores]
    if unscored:
        side = 4 if max(scores.values()) > 0 else -4  # points, to where the bars are
        beside = offset_copy(axes.transData, axes.figure, y=side, units="points")
        look: dict[str, Any] = {"color": "0.3", "markersize": 3, "markeredgewidth": 0.7}
        look |= {"transform": beside, "label": f"no score ({len(unscored)})"}
        handles += axes.plot(unscored, [0.0] * len(unscored), "x", **look)
    return handles


def _colour_bars(bars: Any, scores: LayerScores, removed: set[int] | None, depth: int) -> list[Any]:
    """Mark removed layers, or else show the order of removal; legend handles."""
    import seaborn
    from matplotlib.patches import Patch

    if removed is not None:
        first, last = f"removed ({len(removed)} of {depth})", "kept"
        shade, hatch = {layer: ORANGE if layer in removed else BLUE for layer in scores}, "/////"
    else:
        ends = ("lowest", "highest") if scores.removes == "lowest" else ("highest", "lowest")
        first, last = f"removed first ({ends[0]})", f"removed last ({ends[1]})"
        shades = seaborn.blend_palette([ORANGE, "0.85", BLUE], len(scores))
        shade, hatch = dict(zip(scores.ranked(), shades, strict=True)), ""
    for layer, bar in zip(scores, bars, strict=True):
        bar.set(facecolor=shade[layer], hatch=hatch if removed and layer in removed else "")
    return [Patch(fc=ORANGE, hatch=hatch, label=first), Patch(fc=BLUE, label=last)]


def _cut_axis(axes: Any, scores: LayerScores) -> str:
    """Label the vertical axis and cut it below scores that dwarf the rest; returns a note on those.

    A score is cut off if it is more than six times as large as three quarters of the scores.
    """
    label = style.wrap(scores.unit, 1.6)
    axes.set_ylabel(label)
    sizes = sorted(map(abs, scores.values()))
    usual = sizes[(3 * len(sizes) - 1) // 4]
    far = {layer: score for layer, score in scores.items() if abs(score) > 6 * usual > 0}
    if not far:
        return ""
    rest = [0.0, *(score for layer, score in scores.items() if layer not in far)]
    room = 0.2 * (max(rest) - min(rest))
    top = max(rest) + room * (1 if max(far.values()) > 0 else 0.2)
    bottom = min(rest) - room * (1 if min(far.values()) < 0 else 0.2 * (min(rest) < 0))
    axes.set_ylim(bottom, top)
    axes.set_ylabel(f"{label}\n(axis is cut)")
    for layer, score in far.items():
        end, marker = (top, "^") if score > 0 else (bottom, "v")
        axes.plot(layer, end, marker, color="black", markersize=3.5, clip_on=False)
    values = (f"{layer}\u00a0=\u00a0{float(f'{score:.3g}'):g}" for layer, score in far.items())
    return f"(arrows: layer {', '.join(values)})"
