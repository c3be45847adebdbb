"""Figures of runs of layers: the distance over every block, the similarity of all states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidDataError
from ..results import LayerScores, check_layers
from .style import (
    COLUMN,
    PAGE,
    RED,
    cell_map,
    check_path,
    dots,
    drawing,
    legend_below,
    state_axis,
    ticks,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


UNKNOWN = "0.85"  # the ground under a cell without a value, which is hatched


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
    from 0 to 1, since distances grow with the length. A dot marks the best block of each length.
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
    path = check_path(save_path)
    blocks = _check_blocks(scores)
    depth = len(blocks)
    rows = [
        [blocks[start][length - 1] for start in range(depth - length + 1)]
        for length in range(1, depth + 1)
    ]
    best = _best_starts(rows, 1.0 if scores.removes == "lowest" else -1.0, set(protected))
    check_layers(protected, depth)
    taken = check_layers(removed, depth) if removed is not None else ()
    cells = [[*_rescaled(row), *[None] * (depth - len(row))] for row in rows]
    title = f"Blocks of layers: {scores.strategy}" if title is None else title
    with drawing(title, path, show, *_size(depth)) as (figure, [[axes]]):
        edges = (-0.5, depth - 0.5, 0.5, depth + 0.5)
        image, handles = _draw_cells(axes, cells, edges, (0.0, 1.0))
        dots(axes, [(start, length) for length, start in best.items()], depth, "best of its length")
        if taken and taken == tuple(range(taken[0], taken[-1] + 1)):
            look = {"markerfacecolor": "none", "markeredgecolor": RED, "markeredgewidth": 1.2}
            axes.plot(taken[0], len(taken), "s", markersize=6.5, label="removed", **look)
        axes.set_xlabel("first layer of the block")
        axes.set_ylabel("layers in the block")
        axes.set_xticks(ticks(0, depth - 1, 13))
        axes.set_yticks(ticks(1, depth, 13))
        bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], aspect=30, pad=0.02)
        bar.set_label(wrap(f"{scores.unit}, scaled in each row", 2.2))
        legend_below(figure, [*handles, *axes.lines])
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
    path = check_path(save_path)
    blocks = _check_blocks(scores)
    last = len(blocks)
    cells: list[list[float | None]] = [[0.0] * (last + 1) for _ in range(last + 1)]
    for start, row in enumerate(blocks):
        for end, value in enumerate(row, start + 1):
            cells[start][end] = cells[end][start] = value
    known = [cell for row in cells for cell in row if cell is not None and math.isfinite(cell)]
    limits = min(known), max(known) if max(known) > min(known) else min(known) + 1
    default = f"Distance of states along the depth: {scores.strategy}"
    title = default if title is None else title
    with drawing(title, path, show, *_size(last)) as (figure, [[axes]]):
        image, handles = _draw_cells(axes, cells, (-0.5, last + 0.5, -0.5, last + 0.5), limits)
        axes.set_aspect("equal")
        state_axis(axes.xaxis, last)
        state_axis(axes.yaxis, last)
        bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
        bar.set_label(wrap(scores.unit, 2.2))
        legend_below(figure, handles)
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


def _best_starts(rows: list[list[float]], sign: float, protected: set[int]) -> dict[int, int]:
    """Length -> start of the best block; of equals the deepest, as the strategies choose."""
    best = {}
    for length, row in enumerate(rows, 1):
        free = [
            start
            for start, value in enumerate(row)
            if not math.isnan(value) and protected.isdisjoint(range(start, start + length))
        ]
        if free:
            best[length] = min(free, key=lambda start: (sign * row[start], -start))
    return best


def _rescaled(row: list[float]) -> list[float]:
    """The row from 0 to 1; 0 everywhere if all values are equal; NaN stays."""
    known = [value for value in row if not math.isnan(value)]
    low = min(known, default=0.0)
    extent = max(known, default=0.0) - low
    return [(value - low) / (extent or 1.0) for value in row]


def _size(depth: int) -> tuple[float, list[float]]:
    return (COLUMN, [2.7]) if depth <= 60 else (PAGE, [5.4])


def _draw_cells(
    axes: Any,
    cells: list[list[float | None]],
    edges: tuple[float, float, float, float],
    limits: tuple[float, float],
) -> tuple[Any, list[Any]]:
    """Cells by row from below: None is left blank, NaN is hatched; the image and legend handles."""
    import numpy as np
    from matplotlib.patches import Rectangle

    values = np.array([[np.nan if v is None else v for v in row] for row in cells], dtype=float)
    unknown = [
        (edges[0] + column, edges[2] + line)
        for line, row in enumerate(cells)
        for column, value in enumerate(row)
        if value is not None and math.isnan(value)
    ]
    look: dict[str, Any] = {"facecolor": UNKNOWN, "edgecolor": "0.4", "linewidth": 0}
    look |= {"hatch": "//////", "label": f"no value ({len(unknown)})"}
    hatched = [axes.add_patch(Rectangle(corner, 1, 1, **look)) for corner in unknown]
    return cell_map(axes, values, edges, limits), hatched[:1]
