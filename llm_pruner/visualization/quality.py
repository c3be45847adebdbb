"""Figures of quality: by number of layers removed, and task by task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidDataError, NonFiniteError
from ..results import Comparison, DepthCurve
from . import style
from .style import GREEN, PAGE, RED, drawing, paired_bars, wrap, wrap_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


VERDICTS = {  # colour, and a marker to tell them apart in grey print
    "better": (GREEN, "^", "better"),
    "worse": (RED, "v", "worse"),
    "unclear": ("0.4", "o", "no clear difference"),
    "": ("0.4", "x", "no interval"),
}
MARKERS = "os^DvP"  # of the curves, to tell them apart in grey print


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
    path = style.check_path(save_path)
    given = _check_curves(curves)
    lines = [_read_curve(curve, name) for curve, name in zip(given, _names(given), strict=True)]
    units = [*dict.fromkeys(unit for line in lines for unit in line.units)]
    if len(units) > 1:
        raise InvalidDataError(
            f"The curves have different units, {' and '.join(map(repr, units))}: draw a figure "
            "for each."
        )
    last = max(depth for line in lines for depth in line.chosen)
    depths = {curve.num_layers for curve in given}
    width, most_ticks = style.layer_width(last)
    labels = [wrap(line.name, 0.45 * width) for line in lines]
    rows = max(3, sum(1 + label.count("\n") for label in labels))
    if title is None:
        alone = f": {given[0].strategy}" if len(given) == 1 else ""
        title = f"Quality by number of layers removed{alone}"
    with drawing(title, path, show, width, [2.3 + 0.13 * rows]) as (figure, [[axes]]):
        axes.axhline(0, color="0.6", linewidth=0.6)
        keys = _draw_curves(axes, lines, labels)
        note = _scale_changes(axes, lines)
        axes.set_ylabel(f"{wrap(units[0], 2.2)}\nin %{note}")
        axes.set_xlabel(
            "layers removed" + (f" (of {given[0].num_layers})" if len(depths) == 1 else "")
        )
        axes.set_xlim(-0.03 * last, 1.03 * last)
        axes.set_xticks(style.ticks(0, last, most_ticks))
        style.legend_columns(figure, keys)
    return figure


def plot_holistic_benchmark(
    before: Mapping[str, float],
    after: Mapping[str, float],
    n_samples: int | Mapping[str, int],
    save_path: str | Path | None = None,
    *,
    title: str = "Benchmark before and after pruning",
    chance: Mapping[str, float] | None = None,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    show: bool = False,
) -> Figure:
    """Paired bars per task, before and after, with values and standard errors or intervals.

    Error bars are one binomial standard error, sqrt(p (1 - p) / n). A task named ``mean`` comes
    last, set apart, with that of a mean of independent tasks, sqrt(sum of squares) / tasks. For
    scores between 0 and 1 per item, like similarities, both are upper bounds. Where both models
    answered the same items, paired `intervals` say more: they take the place of all error bars.

    Args:
        before: task -> score in [0, 1].
        after: the same tasks.
        n_samples: items per task, one number for all or task -> number (``mean`` needs none).
        chance: what guessing scores in some of the tasks, drawn as a dashed line.
        intervals: 95 % interval of ``after - before``, (low, high) by task, drawn from the score
            before: a bar that reaches above it is no clear loss. Tasks without one have none.
    """
    path = style.check_path(save_path)
    levels = chance or {}
    tasks = _check_tasks(before, after, levels)
    counts = {task: _check_count(task, n_samples) for task in tasks if task != "mean"}
    positions = [row + 0.4 * (task == "mean") for row, task in enumerate(tasks)]
    names, row_height = _bar_names({task: counts.get(task) for task in tasks}.items(), 1.4)
    values = [[side[task] for task in tasks] for side in (before, after)]
    errors: list[list[tuple[float, float]] | None] = [
        [(_error(task, side, counts),) * 2 for task in tasks] for side in (before, after)
    ]
    if intervals is not None:
        spreads = [_spread(before[task], after[task], intervals.get(task)) for task in tasks]
        errors = [None, spreads]
    height = 0.9 + row_height * (positions[-1] + 1)
    with drawing(title, path, show, style.COLUMN, [height]) as (figure, [[axes]]):
        paired_bars(axes, positions, names, values, errors, ("before", "after"))
        row_of = dict(zip(tasks, positions, strict=True))
        style.level_marks(axes, {row_of[task]: levels[task] for task in levels}, "chance")
        if "mean" in tasks:
            axes.axhline(positions[-1] - 0.7, color="0.6", linewidth=0.6)
        spread = "score \u00b1 1 standard error"
        paired = "score; line: before plus the 95 % interval of the change"
        axes.set_xlabel(spread if intervals is None else style.wrap(paired, 2.4))
        style.legend_below(figure, axes.get_legend_handles_labels()[0])
    return figure


def _spread(before: float, after: float, ends: tuple[float, float] | None) -> tuple[float, float]:
    """How far the ends of a change's interval, seen from before, are from the value after."""
    low, high = ends or (after - before, after - before)
    return max(0.0, after - before - low), max(0.0, before + high - after)


def plot_comparisons(
    comparisons: Sequence[Comparison],
    title: str = "Scores before and after pruning",
    save_path: str | Path | None = None,
    *,
    show: bool = False,
) -> Figure:
    """Scores of two models: bars before and after, and beside them the change of each.

    Left a dashed line is the floor, where there is one; right the line through a change is its
    95 % interval, and the marker says whether it is better, worse, or unclear since the interval
    holds 0. A change that was not sampled has neither line nor verdict.

    Args:
        comparisons: of one unit, such as those of group ``tasks`` of a report.

    Raises:
        InvalidDataError: none, or of several units.
    """
    path = style.check_path(save_path)
    entries = list(comparisons)
    units = sorted({entry.unit for entry in entries})
    if len(units) != 1:
        raise InvalidDataError(
            f"The comparisons have units {units}: give at least one, and all of one unit."
        )
    names, row_height = _bar_names([(entry.name, entry.count) for entry in entries], 1.9)
    positions = list(map(float, range(len(entries))))
    values = [[entry.before for entry in entries], [entry.after for entry in entries]]
    floors = {p: e.floor for p, e in zip(positions, entries, strict=True) if e.floor is not None}
    height = 0.9 + row_height * len(entries)
    with drawing(title, path, show, PAGE, [height], (1.0, 1.0)) as (
        figure,
        [[left, right]],
    ):
        paired_bars(left, positions, names, values, labels=("before", "after"))
        style.level_marks(left, floors, "floor")
        left.set_xlabel(f"score{f' ({units[0]})' if units[0] else ''}")
        keys = _draw_changes(right, entries)
        right.set_ylim(left.get_ylim())
        style.legend_below(figure, [*left.get_legend_handles_labels()[0], *keys])
    return figure


def _bar_names(counts: Iterable[tuple[str, int | None]], inches: float) -> tuple[list[str], float]:
    """Names with the number of items, in at most three lines; the height of a row of bars."""
    names = []
    for name, count in counts:
        counted = f" (n={count})" if count else ""
        text = wrap_name(name + counted, inches)
        if text.count("\n") > 2:
            text = f"{wrap_name(name, inches, 2)}\n{counted.strip()}"
        names.append(text)
    return names, 0.38 if any(text.count("\n") > 1 for text in names) else 0.33


def _draw_changes(axes: Any, entries: list[Comparison]) -> list[Any]:
    """A marker for each change with its interval; legend handles."""
    keys = {}
    for row, entry in enumerate(entries):
        colour, marker, label = VERDICTS[entry.verdict]
        if entry.low is not None and entry.high is not None:
            axes.plot([entry.low, entry.high], [row, row], color=colour, linewidth=1.2)
        [point] = axes.plot(entry.change, row, marker, color=colour, markersize=4, label=label)
        keys[label] = point
    axes.axvline(0, color="0.6", linewidth=0.6)
    axes.set_yticks([])
    axes.margins(x=0.08)
    axes.set_xlabel("change, with 95 % interval")
    return list(keys.values())


class _Line(NamedTuple):
    """One curve in percent, by number of layers removed, the full model (0) included."""

    name: str
    units: list[str]
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
    style.check_number(given, 6, "curves")
    return given


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
    line = _Line(name, [curve.unit], {0: 0.0}, {})
    for point in curve.points:
        depth, held = point["n_layers"], point.get("held_out") or {}
        where = f"of {name!r} at {depth} layers"
        line.chosen[depth] = _percent(f"change {where}", point["change"])
        if not isinstance(held, Mapping):
            raise InvalidDataError(
                f"held_out at {depth} layers is {held!r:.60}: it must be a dict with change, low "
                "and high, or None."
            )
        if held:
            single = held.get("low", 0) is None and held.get("high", 0) is None  # has no interval
            change, low, high = (
                _percent(f"held-out {key} {where}", held.get("change" if single else key))
                for key in ("change", "low", "high")
            )
            if low > high:
                raise InvalidDataError(f"held-out low {where} is above high: {held!r:.200}.")
            line.held_out.setdefault(0, (0.0, 0.0, 0.0))
            line.held_out[depth] = (change, low, high)
            line.units.append(str(held.get("unit", curve.unit)))
    return line


def _percent(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidDataError(f"{what} is {value!r:.60}: it must be a number; run sweep() again.")
    if not math.isfinite(value):
        raise NonFiniteError(f"{what} is {value}: run sweep() again.")
    return 100 * float(value)


def _draw_curves(axes: Any, lines: list[_Line], labels: list[str]) -> list[list[Any]]:
    """The curves; legend handles that name them, and that say what they were measured on."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys = []
    size = 3.2 if max(len(line.chosen) for line in lines) < 20 else 2.4
    dashed: dict[str, Any] = {"linestyle": "--", "linewidth": 0.7}
    for line, label, colour, marker in zip(lines, labels, style.PALETTE, MARKERS, strict=False):
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": size}
        hollow = {**look, **dashed, "markerfacecolor": "white"}
        depths = list(line.chosen)
        alone = [i for i, depth in enumerate(depths) if depth and depth not in line.held_out]
        axes.plot(depths, list(line.chosen.values()), **hollow, markevery=alone)
        if line.held_out:
            depths = list(line.held_out)
            changes, low, high = zip(*line.held_out.values(), strict=True)
            axes.fill_between(depths, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(depths, changes, **look, markevery=list(range(1, len(depths))))
        keys.append(Line2D([], [], **(look if line.held_out else hollow), label=label))
    chosen = [Line2D([], [], color="0.3", label="data of the choice", **dashed)]
    held = [
        Line2D([], [], color="0.3", label="held-out data"),
        Patch(fc="0.3", alpha=0.2, linewidth=0, label="95 % interval"),
    ]
    return [keys, [*held, *chosen] if any(line.held_out for line in lines) else chosen]


def _scale_changes(axes: Any, lines: list[_Line]) -> str:
    """Make the axis logarithmic beyond 1 % if changes differ much in size; a note on that."""
    seen = [change for line in lines for change in line.chosen.values()]
    seen += [change for line in lines for held in line.held_out.values() for change in held]
    sizes = [abs(change) for change in seen if change]
    if not sizes or max(sizes) <= 10 * max(1.0, min(sizes)):
        return ""
    axes.set_yscale("symlog", linthresh=1.0)
    bottom, top = axes.get_ylim()
    steps = [base * 10**power for power in range(8) for base in (1, 3)]
    steps = [-step for step in steps[::-1]] + [0, *steps]
    steps = [tick for tick in steps if bottom <= tick <= top]
    axes.set_yticks(steps, [f"{tick:g}".replace("-", "\u2212") for tick in steps])
    axes.set_yticks([], minor=True)
    return ", log scale beyond 1 %"


def _check_tasks(
    before: Mapping[str, float], after: Mapping[str, float], chance: Mapping[str, float]
) -> list[str]:
    """The tasks in the order of `before`, ``mean`` last."""
    tasks = {*before, *after}
    if not tasks - {"mean"}:
        raise InvalidDataError("before and after name no task: pass what run_benchmark() returns.")
    for name, side in (("before", before), ("after", after), ("chance", chance)):
        missing = sorted(tasks - side.keys())
        if missing and name != "chance":
            raise InvalidDataError(
                f"Tasks {missing} are missing in {name}: both sides need the same tasks."
            )
        if unknown := sorted(side.keys() - tasks):
            raise InvalidDataError(f"{name} names tasks {unknown}; known: {', '.join(before)}.")
        for task, score in side.items():
            what = f"{name}[{task!r}] is {score}: scores are from 0 to 1"
            if not math.isfinite(score):
                raise NonFiniteError(f"{what}; run the task again.")
            if not 0 <= score <= 1:
                raise InvalidDataError(f"{what}, not percent.")
    return sorted(before, key=lambda task: task == "mean")


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
