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
    check_path,
    finish,
    house_style,
    legend_below,
    new_figure,
    ticks,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOURS = "cividis"  # the same to those who see all colours and those who do not
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

    A column is the layer a block starts at, a row the number of layers in it. As in the paper
    each row is shifted and scaled to run from 0 to 1, since distances grow with the length; the
    best block of each length has a dot. Cells without a value (NaN) are hatched.

    Args:
        scores: with `LayerScores.blocks`, as ``pruneme`` and ``bi`` make them.
        title: above the figure; if None, one that names the strategy.
        removed: layers that were removed; where they are one block, its cell is framed.
        protected: layers, not numbers of layers at the ends; no block with one of them is best.

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
    gone = [] if removed is None else list(check_layers(removed, depth))
    with house_style():
        figure, [[axes]] = new_figure(*_size(depth))
        cells = [[*_rescaled(row), *[None] * (depth - len(row))] for row in rows]
        image = _draw_cells(axes, cells, (-0.5, depth - 0.5, 0.5, depth + 0.5), (0.0, 1.0))
        dot = {"color": "white", "markeredgecolor": "black", "markeredgewidth": 0.5}
        dot |= {"markersize": 3.5 if depth <= 40 else 2.2, "label": "best of its length"}
        axes.plot(list(best.values()), list(best), "o", **dot)
        if gone and gone == list(range(gone[0], gone[-1] + 1)):
            look = {"markerfacecolor": "none", "markeredgecolor": "#d55e00", "markeredgewidth": 1.2}
            axes.plot(gone[0], len(gone), "s", markersize=6.5, label="removed", **look)
        axes.set_xlabel("first layer of the block")
        axes.set_ylabel("layers in the block")
        axes.set_xticks(ticks(0, depth - 1, 13))
        axes.set_yticks(ticks(1, depth, 13))
        bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], aspect=30, pad=0.02)
        bar.set_label(wrap(f"{scores.unit}, scaled in each row", 2.2))
        legend_below(figure, axes)
        default = f"Blocks of layers: {scores.strategy}"
        return finish(figure, default if title is None else title, path, show)


def plot_similarity_matrix(
    scores: LayerScores,
    title: str | None = None,
    save_path: str | Path | None = None,
    *,
    show: bool = False,
) -> Figure:
    """Heat map of the distance of every two states of the residual stream, in the scores' unit.

    State i enters layer i; the last one leaves the last layer. The distance of states i < j is
    that over the block of layers i to j - 1; that of a state from itself is 0. A dark square on
    the diagonal is a run of layers that change little. Cells without a value (NaN) are hatched.

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
    with house_style():
        figure, [[axes]] = new_figure(*_size(last))
        limits = min(known), max(known) if max(known) > min(known) else min(known) + 1
        image = _draw_cells(axes, cells, (-0.5, last + 0.5, -0.5, last + 0.5), limits)
        axes.set_aspect("equal")
        places = [tick for tick in ticks(0, last - 1, 10) if last < 10 or tick < 0.93 * last]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([*places, last], [*map(str, places), "out"])
        axes.set_xlabel("state entering layer")
        axes.set_ylabel("state entering layer")
        bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
        bar.set_label(wrap(scores.unit, 2.2))
        if axes.get_legend_handles_labels()[0]:
            legend_below(figure, axes)
        default = f"Distance of states along the depth: {scores.strategy}"
        return finish(figure, default if title is None else title, path, show)


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
    extent: tuple[float, float, float, float],
    limits: tuple[float, float],
) -> Any:
    """Cells by row from below; None is left blank, NaN is hatched."""
    import numpy as np
    from matplotlib.patches import Rectangle

    values = np.array([[np.nan if v is None else v for v in row] for row in cells], dtype=float)
    look: dict[str, Any] = {"facecolor": UNKNOWN, "edgecolor": "0.4", "linewidth": 0}
    unknown = [
        (column, line)
        for line, row in enumerate(cells)
        for column, value in enumerate(row)
        if value is not None and math.isnan(value)
    ]
    for number, (column, line) in enumerate(unknown):
        label = f"no value ({len(unknown)})" if number == 0 else "_"
        corner = extent[0] + column, extent[2] + line
        axes.add_patch(Rectangle(corner, 1, 1, hatch="//////", label=label, **look))
    return axes.imshow(
        np.ma.masked_invalid(values),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=COLOURS,
        extent=extent,
        vmin=limits[0],
        vmax=limits[1],
    )
