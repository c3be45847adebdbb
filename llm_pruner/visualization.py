"""Figures for a paper: scores per layer, cost by depth, residual stream, continuations, benchmark.

Every function returns a `matplotlib.figure.Figure` that pyplot does not know: nothing leaks, no
backend is chosen, no display is needed (``show=True`` opens a window). `save_path` ends in
``.png`` (300 dpi), ``.svg`` or ``.pdf``, and equal input gives equal bytes. Widths are one or two
columns of a journal and no text is below 6.5 pt. All of them raise `InvalidDataError` for what
cannot be drawn, `NonFiniteError` for NaN and infinity, `OutputError` for a path that cannot be
written.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import (
    InvalidDataError,
    InvalidPlanError,
    MissingDependencyError,
    NonFiniteError,
)
from .figures import (
    BLUE,
    COLUMN,
    GREEN,
    ORANGE,
    PAGE,
    PALETTE,
    check_path,
    finish,
    house_style,
    legend_below,
    legend_columns,
    new_figure,
    printable,
    wrap,
)
from .results import DepthCurve, LayerScores, check_layers
from .utils import render_prompt

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_PROMPTS = 6
MAX_CURVES = 6
MARKERS = "os^DvP"  # of the curves, which grey print must tell apart
LINE = 10.0  # points from one line of running text to the next


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

    `LayerScores` name the axis and the strategy; without `removed` their bars are coloured by
    the order in which the layers would go. Bars that would dwarf all others are cut off at the
    edge, marked by an arrow, and their values are printed below the axis.

    Args:
        scores: layer -> score.
        title: above the figure; if None, one that names the strategy.
        removed: layers to show as removed (hatched). `InvalidPlanError` if one has no score.
        protected: layers, not numbers of layers at the ends, to show as protected (shaded).
            `InvalidPlanError` if one is no layer, or removed.
        num_layers: layers of the model; the axis runs over all of them, and those without a score
            are crossed. `InvalidPlanError` if `scores` has more. If None, the axis ends with the
            outermost scores and protected layers.
    """
    path = check_path(save_path)
    known = isinstance(scores, LayerScores)
    scores = _check_scores(scores)
    gone = None if removed is None else _check_removed(removed, scores)
    shielded = _check_protected(protected, gone or set(), num_layers)
    extent = _extent(scores, shielded, num_layers)
    width, most_ticks = (COLUMN, 16) if len(extent) <= 40 else (PAGE, 26)
    with house_style():
        figure, [[axes]] = new_figure(width, [2.2])
        bars = axes.bar(list(scores), list(scores.values()), width=0.8, color=BLUE)
        handles = []
        if known or gone is not None:
            handles += _colour_bars(bars, scores, gone, num_layers or len(scores))
        if shielded or num_layers is not None:
            handles += _mark_layers(axes, bars, scores, extent, shielded)
        if handles:
            axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        note = _cut_axis(axes, scores)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xlabel(f"layer\n{wrap(note, width - 0.7)}".strip())
        axes.set_xlim(extent[0] - 0.7, extent[-1] + 0.7)
        axes.set_xticks(_ticks(extent[0], extent[-1], most_ticks))
        default = f"Layer importance: {scores.strategy}" if known else "Layer importance"
        return finish(figure, default if title is None else title, path, show)


def plot_depth_curve(
    curves: DepthCurve | Iterable[DepthCurve],
    title: str | None = None,
    save_path: str | Path | None = None,
    *,
    show: bool = False,
) -> Figure:
    """Relative change of quality, in percent, against the number of layers removed.

    Solid lines are changes on held-out data, where they were measured, with a band for the 95 %
    interval; thin dashed lines of the same colour are changes on the data of the choice, with a
    hollow marker where nothing else was measured. All begin at the full model: 0 layers, 0 %.
    Where the curve falls to many times its first steps, the axis is logarithmic beyond 1 %.

    Args:
        curves: one, or up to six of the same unit; of several models, the legend names those.
        title: above the figure; if None, one that names the strategy if there is one curve.
    """
    path = check_path(save_path)
    given = _check_curves(curves)
    lines = [_read_curve(curve, name) for curve, name in zip(given, _names(given), strict=True)]
    last = max(depth for line in lines for depth in line.chosen)
    depths = sorted({curve.num_layers for curve in given})
    width, most_ticks = (COLUMN, 16) if last <= 40 else (PAGE, 26)
    labels = [wrap(printable(line.name), 0.45 * width) for line in lines]
    rows = max(3, sum(1 + label.count("\n") for label in labels))
    with house_style():
        figure, [[axes]] = new_figure(width, [2.3 + 0.13 * rows])
        axes.axhline(0, color="0.6", linewidth=0.6)
        keys = _draw_curves(axes, lines, labels)
        note = _scale_changes(axes, lines)
        axes.set_ylabel(f"{wrap(given[0].unit, 2.2)}\nin %{note}")
        axes.set_xlabel(
            f"layers removed (of {depths[0]})" if len(depths) == 1 else "layers removed"
        )
        axes.set_xlim(-0.03 * last, 1.03 * last)
        axes.set_xticks(_ticks(0, last, most_ticks))
        legend_columns(figure, [keys, _line_keys(lines)])
        default = "Quality by number of layers removed"
        default += f": {given[0].strategy}" if len(given) == 1 else ""
        return finish(figure, default if title is None else title, path, show)


def plot_activation_comparison(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    pruned_layers: Iterable[int],
    save_path: str | Path | None = None,
    *,
    title: str | None = None,
    show: bool = False,
) -> Figure:
    """The residual stream along the depth, with all layers and without `pruned_layers`.

    Left the size (root mean square) of the state that enters each layer and of the last layer's
    output; right the cosine similarity of both streams where both exist. Lines are medians over
    the prompt's tokens, bands quartiles: a mean would show the first token, whose state is often
    a thousand times larger. Removed layers are shaded from input to output. Two forward passes.

    Args:
        pruned_layers: `InvalidPlanError` if they do not fit the model, which stays as it was.
    """
    path = check_path(save_path)
    if not isinstance(prompt, str):
        raise InvalidDataError(f"prompt is {prompt!r:.60}: a list, not one text; pass one of it.")
    [text] = _check_prompts(prompt)
    full, pruned = _streams(model, tokenizer, text, pruned_layers)
    depth = max(full)
    removed = [index for index in range(depth) if index not in pruned]
    with house_style():
        figure, [[left, right]] = new_figure(PAGE, [2.6], 2)
        _draw_sizes(left, full, pruned)
        _draw_similarity(right, full, pruned)
        _mark_depth(left, removed, depth)
        _mark_depth(right, removed, depth)
        legend_below(figure, left)
        default = f"Residual stream with {len(removed)} of {depth} layers removed"
        return finish(figure, default if title is None else title, path, show)


def plot_semantic_comparison(
    original: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[str],
    save_path: str | Path | None = None,
    *,
    title: str = "Next token and greedy continuation, original and pruned model",
    embedder: Any = None,
    top_k: int = 5,
    max_new_tokens: int = 40,
    show: bool = False,
) -> Figure:
    """How two models continue the same prompt, or the same few prompts, one below another.

    Left the probabilities of the next token, for the `top_k` tokens of either model, and the
    share of probability that both have in common; right what `ModelEvaluator` lets them answer
    and the cosine similarity of the two answers' meanings.

    Args:
        prompt: up to six, rendered by `utils.render_prompt` like all prompts of this package.
        embedder: as for `ModelEvaluator`; where it cannot be had, the figure says that the
            similarity was not computed.
    """
    path = check_path(save_path)
    options = ((original, pruned), tokenizer, top_k, max_new_tokens)
    rows = [_continue(text, *options) for text in _check_prompts(prompt)]
    with house_style():
        bodies = [_describe(row, embedder) for row in rows]
        sizes = [
            0.5 + max(0.27 * len(row.tokens), sum(gap for _, _, gap in body) / 72)
            for row, body in zip(rows, bodies, strict=True)
        ]
        figure, panels = new_figure(PAGE, sizes, 2, (1.0, 1.3))
        for (left, right), row, body in zip(panels, rows, bodies, strict=True):
            _paired_bars(left, list(range(len(row.tokens))), row.tokens, row.probabilities)
            left.set_title(f"probability in common: {row.overlap:.0%}")
            _draw_text(right, body)
        panels[-1][0].set_xlabel("probability of the next token")
        return finish(figure, title, path, show)


def plot_holistic_benchmark(
    before: Mapping[str, float],
    after: Mapping[str, float],
    n_samples: int | Mapping[str, int],
    save_path: str | Path | None = None,
    *,
    title: str = "Benchmark before and after pruning",
    chance: Mapping[str, float] | None = None,
    show: bool = False,
) -> Figure:
    """Paired bars per task, before and after, with values and standard errors.

    Error bars are one binomial standard error, sqrt(p (1 - p) / n). A task named ``mean`` comes
    last, set apart, with that of a mean of independent tasks, sqrt(sum of squares) / tasks. For
    scores between 0 and 1 per item, like similarities, both are upper bounds.

    Args:
        before: task -> score in [0, 1].
        after: the same tasks.
        n_samples: items per task, one number for all or task -> number (``mean`` needs none).
        chance: what guessing scores in some of the tasks, drawn as a dashed line.
    """
    path = check_path(save_path)
    tasks = _check_tasks(before, after)
    counts = {task: _check_count(task, n_samples) for task in tasks if task != "mean"}
    places = [row + 0.4 * (task == "mean") for row, task in enumerate(tasks)]
    names = [f"{task} (n={counts[task]})" if task in counts else task for task in tasks]
    names = [textwrap.fill(name.replace("_", "_ "), 24).replace("_ ", "_") for name in names]
    with house_style():
        figure, [[axes]] = new_figure(COLUMN, [0.9 + 0.33 * (places[-1] + 1)])
        values = [[side[task] for task in tasks] for side in (before, after)]
        errors = [[_error(task, side, counts) for task in tasks] for side in (before, after)]
        _paired_bars(axes, places, names, values, errors, ("before", "after"))
        if chance:
            _draw_chance(axes, chance, dict(zip(tasks, places, strict=True)))
        if "mean" in tasks:
            axes.axhline(places[-1] - 0.7, color="0.6", linewidth=0.6)
        axes.set_xlabel("score \u00b1 1 standard error")
        legend_below(figure, axes)
        return finish(figure, title, path, show)


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
    gone = set(removed)
    if gone - scores.keys():
        raise InvalidPlanError(
            f"removed layers {sorted(gone - scores.keys())} have no score: choose among the layers "
            f"that scores has, {min(scores)} to {max(scores)}."
        )
    return gone


def _check_protected(protected: Sequence[int], gone: set[int], num_layers: int | None) -> list[int]:
    """The protected layers, ascending."""
    if num_layers is not None and (type(num_layers) is not int or num_layers < 1):
        raise InvalidPlanError(f"num_layers={num_layers!r} must be a whole number from 1.")
    layers = list(protected)
    end = math.inf if num_layers is None else num_layers
    known = all(
        isinstance(i, Integral) and not isinstance(i, bool) and 0 <= i < end for i in layers
    )
    if not known or len(set(layers)) < len(layers):
        last = "" if num_layers is None else f" to {num_layers - 1}, the model's last layer"
        raise InvalidPlanError(
            f"protected={layers} must list layers, each once, as whole numbers from 0{last}."
        )
    if gone.intersection(layers):
        raise InvalidPlanError(
            f"Layers {sorted(gone.intersection(layers))} are in removed and in protected: a layer "
            "that goes is not protected; leave them out of one."
        )
    return sorted(map(int, layers))


def _extent(scores: LayerScores, protected: list[int], num_layers: int | None) -> range:
    """The layers along the axis."""
    if num_layers is None:
        return range(min([*scores, *protected]), max([*scores, *protected]) + 1)
    beyond = [layer for layer in scores if not 0 <= layer < num_layers]
    if beyond:
        raise InvalidPlanError(
            f"scores has layers {beyond}, which a model of num_layers={num_layers} has not: give "
            "the number of layers of the model that was scored."
        )
    return range(num_layers)


def _mark_layers(
    axes: Any, bars: Any, scores: LayerScores, extent: range, protected: list[int]
) -> list[Any]:
    """Shade protected layers, cross those without a score; handles for the legend."""
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
    unscored = [layer for layer in extent if layer not in scores]
    if unscored:
        side = 4 if max(scores.values()) > 0 else -4  # points, to where the bars are
        place = offset_copy(axes.transData, axes.figure, y=side, units="points")
        look: dict[str, Any] = {"color": "0.3", "markersize": 3, "markeredgewidth": 0.7}
        look |= {"transform": place, "label": f"no score ({len(unscored)})"}
        handles += axes.plot(unscored, [0.0] * len(unscored), "x", **look)
    return handles


def _colour_bars(bars: Any, scores: LayerScores, gone: set[int] | None, depth: int) -> list[Any]:
    """Mark removed layers, or else show the order in which they would go; legend handles."""
    import seaborn
    from matplotlib.patches import Patch

    if gone is not None:
        first, last = f"removed ({len(gone)} of {depth})", "kept"
        shade, hatch = {layer: ORANGE if layer in gone else BLUE for layer in scores}, "/////"
    else:
        ends = ("lowest", "highest") if scores.removes == "lowest" else ("highest", "lowest")
        first, last = f"removed first ({ends[0]})", f"removed last ({ends[1]})"
        shades = seaborn.blend_palette([ORANGE, "0.85", BLUE], len(scores))
        shade, hatch = dict(zip(scores.ranked(), shades, strict=True)), ""
    for layer, bar in zip(scores, bars, strict=True):
        bar.set(facecolor=shade[layer], hatch=hatch if gone and layer in gone else "")
    return [Patch(fc=ORANGE, hatch=hatch, label=first), Patch(fc=BLUE, label=last)]


def _cut_axis(axes: Any, scores: LayerScores) -> str:
    """Label the vertical axis, cut it below scores that dwarf the rest; a note on those.

    Cut off is what is more than six times as large as three quarters of the scores.
    """
    axes.set_ylabel(wrap(scores.unit, 1.6))
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
    axes.set_ylabel(f"{axes.get_ylabel()}\n(axis is cut)")
    for layer, score in far.items():
        look = ("^", top) if score > 0 else ("v", bottom)
        axes.plot(layer, look[1], look[0], color="black", markersize=3.5, clip_on=False)
    values = (f"{layer}\u00a0=\u00a0{float(f'{score:.3g}'):g}" for layer, score in far.items())
    return f"(arrows: layer {', '.join(values)})"


def _ticks(first: int, last: int, most: int) -> list[int]:
    """Round layer numbers from `first` to `last`, at most `most`."""
    steps = sorted(base * 10**power for power in range(6) for base in (1, 2, 4, 5))
    step = next(step for step in steps if last // step - (first - 1) // step <= most)
    return list(range(-(-first // step) * step, last + 1, step))


class _Line(NamedTuple):
    """One curve in percent, by number of layers removed, the full model (0) included."""

    name: str
    chosen: dict[int, float]
    held_out: dict[int, tuple[float, float, float]]  # change, low, high; {} if never measured


def _check_curves(curves: Any) -> list[DepthCurve]:
    alone = isinstance(curves, DepthCurve | str) or not isinstance(curves, Iterable)
    given = [curves] if alone else list(curves)
    for curve in given:
        if not isinstance(curve, DepthCurve):
            raise InvalidDataError(
                f"{curve!r:.60} is a {type(curve).__name__}, not a DepthCurve: give what sweep() "
                "returns or DepthCurve.load() reads."
            )
    if not 1 <= len(given) <= MAX_CURVES:
        raise InvalidDataError(
            f"{len(given)} curves given: one figure shows 1 to {MAX_CURVES}; choose some."
        )
    units = dict.fromkeys(curve.unit for curve in given)
    held = [_held_out(point) for curve in given for point in curve.points]
    units |= dict.fromkeys(str(entry["unit"]) for entry in held if "unit" in entry)
    if len(units) > 1:
        raise InvalidDataError(
            f"The curves have different units, {' and '.join(map(repr, units))}: draw a figure "
            "for each."
        )
    return given


def _held_out(point: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was measured on held-out data at a point; empty if nothing was."""
    found = point.get("held_out") or {}
    if not isinstance(found, Mapping):
        raise InvalidDataError(
            f"held_out at {point['n_layers']} layers is {found!r:.60}: it must be a dict with "
            "change, low and high, or None."
        )
    return found


def _names(curves: list[DepthCurve]) -> list[str]:
    """What tells the curves apart: the strategy, with the model if there are several."""
    several = len({curve.model_id for curve in curves}) > 1
    names = [
        f"{curve.strategy} ({curve.model_id})" if several and curve.model_id else curve.strategy
        for curve in curves
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidDataError(
            f"Several curves are called {twice[0]!r}: name them apart, as in "
            "dataclasses.replace(curve, strategy='first try')."
        )
    return names


def _read_curve(curve: DepthCurve, name: str) -> _Line:
    chosen, held = {0: 0.0}, {}
    for point in curve.points:
        place = f"of {name!r} at {point['n_layers']} layers"
        chosen[point["n_layers"]] = _percent(f"change {place}", point["change"])
        if found := _held_out(point):
            keys = ("change", "low", "high")
            numbers = [_percent(f"held-out {key} {place}", found.get(key)) for key in keys]
            held[point["n_layers"]] = (numbers[0], numbers[1], numbers[2])
            if numbers[1] > numbers[2]:
                raise InvalidDataError(f"held-out low {place} is above high: {found!r:.200}.")
    return _Line(name, chosen, {0: (0.0, 0.0, 0.0), **held} if held else {})


def _percent(place: str, share: Any) -> float:
    if isinstance(share, bool) or not isinstance(share, Real):
        raise InvalidDataError(f"{place} is {share!r:.60}: it must be a number; run sweep() again.")
    if not math.isfinite(share):
        raise NonFiniteError(f"{place} is {share}: run sweep() again.")
    return 100 * float(share)


def _draw_curves(axes: Any, lines: list[_Line], labels: list[str]) -> list[Any]:
    """The curves; a handle for each for the legend."""
    from matplotlib.lines import Line2D

    keys = []
    size = 3.2 if max(len(line.chosen) for line in lines) < 20 else 2.4
    for line, label, *shape in zip(lines, labels, PALETTE, MARKERS, strict=False):
        look: dict[str, Any] = {"color": shape[0], "marker": shape[1], "markersize": size}
        hollow = {**look, "linestyle": "--", "linewidth": 0.7, "markerfacecolor": "white"}
        depths = list(line.chosen)
        alone = [i for i, depth in enumerate(depths) if depth and depth not in line.held_out]
        axes.plot(depths, list(line.chosen.values()), **hollow, markevery=alone)
        if line.held_out:
            depths = list(line.held_out)
            changes, low, high = zip(*line.held_out.values(), strict=True)
            axes.fill_between(depths, low, high, color=shape[0], alpha=0.2, linewidth=0)
            axes.plot(depths, changes, **look, markevery=list(range(1, len(depths))))
        keys.append(Line2D([], [], **(look if line.held_out else hollow), label=label))
    return keys


def _line_keys(lines: list[_Line]) -> list[Any]:
    """Handles for the legend that say what is measured on what."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    held = [
        Line2D([], [], color="0.3", label="held-out data"),
        Patch(fc="0.3", alpha=0.2, linewidth=0, label="95 % interval"),
    ]
    chosen = Line2D([], [], color="0.3", linestyle="--", linewidth=0.7, label="data of the choice")
    return [*(held if any(line.held_out for line in lines) else []), chosen]


def _scale_changes(axes: Any, lines: list[_Line]) -> str:
    """A logarithmic axis beyond 1 % where changes differ too much in size; a note on that."""
    seen = [change for line in lines for change in line.chosen.values()]
    seen += [change for line in lines for held in line.held_out.values() for change in held]
    sizes = [abs(change) for change in seen if change]
    if not sizes or max(sizes) <= 10 * max(1.0, min(sizes)):
        return ""
    axes.set_yscale("symlog", linthresh=1.0)
    bottom, top = axes.get_ylim()
    steps = [base * 10**power for power in range(8) for base in (1, 3)]
    ticks = [-step for step in steps[::-1]] + [0, *steps]
    ticks = [tick for tick in ticks if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}".replace("-", "\u2212") for tick in ticks])
    axes.set_yticks([], minor=True)
    return ", log scale beyond 1 %"


def _streams(
    model: Any, tokenizer: Any, prompt: str, layers: Iterable[int]
) -> list[dict[int, torch.Tensor]]:
    """Of the full and of the pruned model: the state entering each layer, and the output."""
    from .layers import LayerStack
    from .likelihood import evaluating

    stack = LayerStack(model)
    removed = check_layers(layers, len(stack))
    inputs = _encode(model, tokenizer, prompt)

    def stream(skipped: tuple[int, ...]) -> dict[int, torch.Tensor]:
        states: dict[int, torch.Tensor] = {}

        def observer(index: int, hidden_in: torch.Tensor, hidden_out: torch.Tensor) -> None:
            if index not in skipped:
                states[index] = _tokens(hidden_in, index)
                states[len(stack)] = _tokens(hidden_out, index)

        with evaluating(model), stack.bypass(skipped), stack.observe(observer):
            model(**inputs, use_cache=False)
        return states

    return [stream(()), stream(removed)]


def _tokens(hidden: torch.Tensor, layer: int) -> torch.Tensor:
    """(tokens, hidden) in float32 on the CPU."""
    states = hidden.detach().float().flatten(0, -2).cpu()
    if not states.isfinite().all():
        raise NonFiniteError(
            f"The hidden state at layer {layer} is NaN or infinite for this prompt: check the "
            "checkpoint, or load the model with dtype float32."
        )
    return states


def _draw_quartiles(
    axes: Any, values: Mapping[int, torch.Tensor], line: str, colour: str, label: str = ""
) -> list[float]:
    """The median over tokens at each depth, with a band from quartile to quartile."""
    import torch

    depths = sorted(values)
    levels = torch.tensor([0.25, 0.5, 0.75])
    bands = torch.stack([values[depth].quantile(levels) for depth in depths]).T.tolist()
    axes.fill_between(depths, bands[0], bands[2], color=colour, alpha=0.2, linewidth=0)
    size = 2.5 if len(depths) <= 40 else 1.2
    axes.plot(depths, bands[1], line, color=colour, markersize=size, label=label or "_")
    return list(bands[1])


def _draw_sizes(axes: Any, full: dict[int, Any], pruned: dict[int, Any]) -> None:
    seen: list[float] = []
    looks = (("o-", BLUE, "full model"), ("s--", ORANGE, "pruned model"))
    for states, look in zip((full, pruned), looks, strict=True):
        sizes = {depth: state.square().mean(-1).sqrt() for depth, state in states.items()}
        seen += _draw_quartiles(axes, sizes, *look)
    if max(seen) > 20 * min(seen) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("root mean square of the state")
    axes.set_title("median and quartiles over tokens")


def _draw_similarity(axes: Any, full: dict[int, Any], pruned: dict[int, Any]) -> None:
    from torch.nn.functional import cosine_similarity

    cosines = {}
    for depth, state in pruned.items():
        same = (full[depth] == state).all(-1)  # exactly 1, also for a state of zeros
        cosines[depth] = cosine_similarity(full[depth], state, dim=-1).masked_fill(same, 1.0)
    axes.axhline(1, color="0.6", linewidth=0.6)
    medians = _draw_quartiles(axes, cosines, "D-", GREEN)
    axes.set_ylabel("cosine similarity to full model")
    axes.set_title(f"at the output: {medians[-1]:.3f}")


def _mark_depth(axes: Any, removed: list[int], depth: int) -> None:
    """Shade removed layers, each from its input to its output; label the depth."""
    for index in removed:
        label = "removed layers" if index == removed[0] else "_"
        axes.axvspan(index, index + 1, color="0.88", linewidth=0, zorder=0, label=label)
    ticks = [tick for tick in _ticks(0, depth - 1, 12) if depth < 12 or tick < 0.95 * depth]
    axes.set_xticks([*ticks, depth], [*map(str, ticks), "out"])
    axes.set_xlim(-0.03 * depth, 1.03 * depth)
    axes.set_xlabel("state entering layer")


class _Continuation(NamedTuple):
    """What two models make of one prompt; pairs are (original, pruned)."""

    prompt: str
    tokens: list[str]
    probabilities: list[list[float]]
    overlap: float
    texts: list[str]


def _continue(
    prompt: str, models: Sequence[Any], tokenizer: Any, top_k: int, max_new_tokens: int
) -> _Continuation:
    import torch

    from .evaluation import ModelEvaluator

    texts = []
    for model in models:
        evaluator = ModelEvaluator(model, tokenizer, max_new_tokens=max_new_tokens)
        texts += evaluator.generate([prompt])
    one, two = (_next_token(model, tokenizer, prompt) for model in models)
    if one.shape != two.shape:
        raise InvalidDataError(
            f"The models have {len(one)} and {len(two)} tokens in their vocabularies: compare a "
            "model with its own pruned version."
        )
    best = {int(token) for p in (one, two) for token in p.topk(min(top_k, len(p))).indices}
    order = sorted(best, key=lambda token: (-float(one[token]), token))
    last = int(_encode(models[0], tokenizer, prompt)["input_ids"][0, -1])
    return _Continuation(
        prompt,
        [_token_text(tokenizer, last, token) for token in order],
        [p[order].tolist() for p in (one, two)],
        float(torch.minimum(one, two).sum()),
        texts,
    )


def _next_token(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """Probability of every token after the prompt."""
    from .likelihood import evaluating

    with evaluating(model):
        logits = model(**_encode(model, tokenizer, prompt), use_cache=False).logits
    probabilities: torch.Tensor = logits[0, -1].float().cpu().softmax(-1)
    return probabilities


def _token_text(tokenizer: Any, previous: int, token: int) -> str:
    """A token as it continues a text, with its spaces visible."""
    before, both = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in ([previous], [previous, token])
    )
    text = both.removeprefix(before) if both.startswith(before) else ""
    if not text or "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
    text = printable(text).replace(" ", "\u2423")
    return text if len(text) <= 18 else text[:17] + "\u2026"


def _describe(row: _Continuation, embedder: Any) -> list[tuple[str, str, float]]:
    """The lines of the text panel: text, colour (black is not bold), points to the next."""
    body = [("prompt", "0.3", row.prompt, 3)]
    body += [("original model", BLUE, row.texts[0], 6), ("pruned model", ORANGE, row.texts[1], 6)]
    lines: list[tuple[str, str, float]] = []
    for name, colour, text, most in body:
        wrapped = wrap(printable(text) or "(empty)", 3.5, most).split("\n")
        lines += [(name, colour, LINE), *((line, "black", LINE) for line in wrapped)]
        lines[-1] = (*lines[-1][:2], 1.4 * LINE)
    return [*lines, (f"semantic similarity: {_similarity(row.texts, embedder)}", "0.3", LINE)]


def _similarity(texts: list[str], embedder: Any) -> str:
    from .similarity import embed, load_embedder

    if not all(texts):
        return "not defined (empty answer)"
    try:
        one, two = embed(texts, embedder or load_embedder())
    except MissingDependencyError:
        return "not computed (no sentence embedder)"
    return f"{float(one @ two):.2f}"


def _draw_text(axes: Any, body: list[tuple[str, str, float]]) -> None:
    axes.axis("off")
    down = 0.0
    for line, colour, gap in body:
        look = {"color": colour, "weight": "normal" if colour == "black" else "bold", "va": "top"}
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        text = axes.annotate(line, (0, 1), (0, -down), **place, **look)
        text.set_in_layout(False)  # the height of the row has room for it
        down += gap


def _paired_bars(
    axes: Any,
    places: Sequence[float],
    names: list[str],
    values: list[list[float]],
    errors: list[list[float]] | None = None,
    labels: tuple[str, str] = ("_", "_"),
) -> None:
    """Two horizontal bars for each name, the first name on top, with their values behind them."""
    longest = 0.0
    for side, (colour, label) in enumerate(zip((BLUE, ORANGE), labels, strict=True)):
        rows = [place + (side - 0.5) * 0.4 for place in places]
        bars = {"height": 0.4, "color": colour, "label": label}
        spread = errors[side] if errors else [0.0] * len(rows)
        look = {"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8}
        axes.barh(rows, values[side], xerr=spread if errors else None, error_kw=look, **bars)
        for row, value, error in zip(rows, values[side], spread, strict=True):
            at, style = (value + error, row), {"textcoords": "offset points", "fontsize": 6.5}
            axes.annotate(f"{value:.2f}", at, (3, 0), va="center", **style)
            longest = max(longest, value + error)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    limit = 1.2 * longest or 1.0
    axes.set_xlim(0, limit)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(limit, 1.0)])


def _check_tasks(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """The tasks in the order of `before`, ``mean`` last."""
    if not {*before, *after} - {"mean"}:
        raise InvalidDataError("before and after name no task: pass what run_benchmark() returns.")
    for name, side in (("before", before), ("after", after)):
        missing = sorted({*before, *after} - {*side})
        if missing:
            raise InvalidDataError(
                f"Tasks {missing} are missing in {name}: both sides need the same tasks."
            )
        for task, score in side.items():
            _check_share(f"{name}[{task!r}]", score)
    return sorted(before, key=lambda task: task == "mean")


def _check_share(place: str, score: float) -> None:
    if not math.isfinite(score):
        raise NonFiniteError(f"{place} is {score}: scores are from 0 to 1; run the task again.")
    if not 0 <= score <= 1:
        raise InvalidDataError(f"{place} is {score}: scores are shares from 0 to 1, not percent.")


def _check_count(task: str, n_samples: int | Mapping[str, int]) -> int:
    count = n_samples.get(task) if isinstance(n_samples, Mapping) else n_samples
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise InvalidDataError(
            f"n_samples for task {task!r} is {count!r}: give a whole number of items, at least 1, "
            "for all tasks or for each."
        )
    return int(count)


def _error(task: str, scores: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Standard error of a task's score, or of the mean over all tasks."""
    if task in counts:
        return math.sqrt(scores[task] * (1 - scores[task]) / counts[task])
    return math.hypot(*(_error(other, scores, counts) for other in counts)) / len(counts)


def _draw_chance(axes: Any, chance: Mapping[str, float], places: dict[str, float]) -> None:
    unknown = sorted(chance.keys() - places.keys())
    if unknown:
        raise InvalidDataError(f"chance names tasks {unknown}; known: {', '.join(places)}.")
    for task, share in chance.items():
        _check_share(f"chance[{task!r}]", share)
    rows = [places[task] for task in chance]
    ends = [row - 0.45 for row in rows], [row + 0.45 for row in rows]
    axes.vlines(
        list(chance.values()), *ends, colors="black", linestyles="--", linewidth=0.8, label="chance"
    )


def _encode(model: Any, tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    """Token ids and mask of the rendered prompt, on the model's device."""
    special = not getattr(tokenizer, "chat_template", None)
    text = render_prompt(tokenizer, prompt)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    ids = encoded["input_ids"].to(next(model.parameters()).device)
    if ids.shape[1] > 1 and ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]  # some tokenizers close every text; nothing would follow
    return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}


def _check_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidDataError(
            f"{len(prompts)} prompts given: one figure shows 1 to {MAX_PROMPTS}; choose some."
        )
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise InvalidDataError(f"The prompt {text!r:.60} is no text: give at least one word.")
    return prompts
