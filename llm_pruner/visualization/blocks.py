"""Figures of runs of layers: the distance over every block, the similarity of all states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidDataError
from ..layer_scores import LayerScores
from ..results import check_layers
from . import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_block_distances(
    scores: LayerScores,
    title: str | None = None,
    save_path: str | Path | None = None,
    *,
    removed: Iterable[int] | None = None,
    protected: Sequence[int] = (),
    show: bool = False,
) -> Figure:
    """Heat map of the distance over every block of layers (arXiv:2403.17887, figure 4).

    Columns are first layers, rows numbers of layers. As in the paper, each row is scaled to run
    from 0 to 1, since distances grow with the length. A dot marks the best block of each length; a
    row in which every block holds a protected layer has none.
    Cells without a value (NaN) are hatched.

    Args:
        scores: with `LayerScores.blocks`, as ``pruneme`` and ``bi`` make them.
        title: above the figure; if None, one that names the strategy.
        removed: layers that were removed; where they are one block, its cell is framed.
        protected: indices of layers; no block with one of them is best.

    Raises:
        InvalidDataError: the scores have no blocks, or not one for every start and length.
        InvalidPlanError: `removed` or `protected` does not fit the number of layers.
    """
    path = style.check_path(save_path)
    blocks = _check_blocks(scores)
    depth = len(blocks)
    rows = [
        [blocks[start][length - 1] for start in range(depth - length + 1)]
        for length in range(1, depth + 1)
    ]
    best = _best_starts(rows, 1.0 if scores.removes == "lowest" else -1.0, set(protected))
    check_layers(protected, depth)
    taken = check_layers(removed, depth) if removed is not None else ()
    title = f"Blocks of layers: {scores.strategy}" if title is None else title
    with style.drawing(title, path, show, *_size(depth)) as (figure, [[axes]]):
        image, handles = _draw_cells(axes, list(map(_rescaled, rows)), (0.0, 1.0), first_row=1)
        spared = ", without protected layers" if len(best) < depth else ""
        style.mark_cells(axes, best, depth, f"best of its length{spared}")
        if taken and taken == tuple(range(taken[0], taken[-1] + 1)):
            look = {"mfc": "none", "mec": style.RED, "mew": 1.2, "markersize": 6.5}
            axes.plot(taken[0], len(taken), "s", label="removed", **look)
        axes.set_xlabel("first layer of the block")
        axes.set_ylabel("layers in the block")
        axes.set_xticks(style.ticks(0, depth - 1, 13))
        axes.set_yticks(style.ticks(1, depth, 13))
        bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], aspect=30, pad=0.02)
        bar.set_label(style.wrap(f"{scores.unit.split(' (')[0]}, scaled in each row", 2.2))
        style.legend_below(figure, [*handles, *axes.lines])
    return figure


def plot_similarity_matrix(
    scores: LayerScores,
    title: str | None = None,
    save_path: str | Path | None = None,
    *,
    show: bool = False,
) -> Figure:
    """Heat map of the distance of every two states of the residual stream, in the scores' unit.

    State i enters layer i; the last one leaves the last layer. The distance of states i < j is
    that over the block of layers i to j - 1. A dark square on the diagonal is a run of layers that
    change little. Cells without a value (NaN) are hatched.

    Args:
        scores: with `LayerScores.blocks`, as ``pruneme`` and ``bi`` make them.
        title: above the figure; if None, one that names the strategy.

    Raises:
        InvalidDataError: the scores have no blocks, or not one for every start and length.
    """
    path = style.check_path(save_path)
    blocks = _check_blocks(scores)
    last = len(blocks)
    cells = [[0.0] * (last + 1) for _ in range(last + 1)]
    for start, row in enumerate(blocks):
        for end, value in enumerate(row, start + 1):
            cells[start][end] = cells[end][start] = value
    known = [cell for row in cells for cell in row if not math.isnan(cell)]
    limits = min(known), max(known) if max(known) > min(known) else min(known) + 1
    if title is None:
        title = f"Distance of states along the depth: {scores.strategy}"
    with style.drawing(title, path, show, *_size(last)) as (figure, [[axes]]):
        image, handles = _draw_cells(axes, cells, limits)
        axes.set_aspect("equal")
        style.state_axis(axes.xaxis, last)
        style.state_axis(axes.yaxis, last)
        bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
        bar.set_label(style.wrap(scores.unit, 2.2))
        style.legend_below(figure, handles)
    return figure


def _check_blocks(scores: Any) -> list[list[float]]:
    """The score of every run of layers, ``[start][length - 1]``."""
    if not isinstance(scores, LayerScores) or scores.blocks is None:
        what = f"{scores.strategy!r} scores" if isinstance(scores, LayerScores) else repr(scores)
        raise InvalidDataError(
            f"{what:.60} hold no blocks of layers: take the LayerScores of a strategy that looks "
            "at blocks, such as pruneme or bi."
        )
    blocks = scores.blocks
    lengths = [len(row) for row in blocks]
    if lengths != list(range(len(blocks), 0, -1)) or not blocks:
        raise InvalidDataError(
            f"blocks has rows of {lengths} lengths: of a model of n layers the first needs n, the "
            "next n - 1, and so on to 1."
        )
    numbers = [value for row in blocks for value in row]
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, Real) or math.isinf(value):
            raise InvalidDataError(f"blocks holds {value!r:.40}: give finite numbers, or NaN.")
    if all(math.isnan(value) for value in numbers):
        raise InvalidDataError("blocks holds nothing but NaN: there is nothing to draw.")
    return blocks


def _best_starts(
    rows: list[list[float]], sign: float, protected: set[int]
) -> list[tuple[int, int]]:
    """(start, length) of the best blocks; of equals the deepest, as the strategies choose."""
    best = []
    for length, row in enumerate(rows, 1):
        free = [
            start
            for start, value in enumerate(row)
            if not math.isnan(value) and protected.isdisjoint(range(start, start + length))
        ]
        if free:
            best.append((min(free, key=lambda start: (sign * row[start], -start)), length))
    return best


def _rescaled(row: list[float]) -> list[float]:
    """The row from 0 to 1; 0 everywhere if all values are equal; NaN stays."""
    known = [value for value in row if not math.isnan(value)]
    low = min(known, default=0.0)
    extent = max(known, default=0.0) - low
    return [(value - low) / (extent or 1.0) for value in row]


def _size(depth: int) -> tuple[float, list[float]]:
    return (style.COLUMN, [2.7]) if depth <= 60 else (style.PAGE, [5.4])


def _draw_cells(
    axes: Any, rows: list[list[float]], limits: tuple[float, float], first_row: int = 0
) -> tuple[Any, list[Any]]:
    """Rows of cells from below, the first the longest, NaN hatched; image and legend handles."""
    from matplotlib.patches import Rectangle

    size, bottom = len(rows), first_row - 0.5
    unknown = [
        (column - 0.5, line + bottom)
        for line, row in enumerate(rows)
        for column, value in enumerate(row)
        if math.isnan(value)
    ]
    look: dict[str, Any] = {"facecolor": "0.85", "edgecolor": "0.4", "linewidth": 0}
    look |= {"hatch": "//////", "label": f"no value ({len(unknown)})"}
    hatched = [axes.add_patch(Rectangle(corner, 1, 1, **look)) for corner in unknown]
    values = [[*row, *[math.nan] * (size - len(row))] for row in rows]
    edges = (-0.5, size - 0.5, bottom, bottom + size)
    return style.cell_map(axes, values, edges, limits), hatched[:1]
