"""How every figure looks: sizes, fonts, colours, shared parts; and how it is written."""

from __future__ import annotations

import io
import pickle
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..atomic_output import write_atomically
from ..errors import InvalidDataError, OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLUMN, PAGE = 3.4, 7.0  # inches
BLUE, ORANGE, GREEN = "#0173b2", "#de8f05", "#029e73"  # seaborn's palette "colorblind"
RED = "#d55e00"
PALETTE = (BLUE, ORANGE, GREEN, RED, "#cc78bc", "#404040")  # its first five, and grey
COLOURS = "cividis"  # of cells; looks alike with and without colour blindness
METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
STYLE: dict[str, Any] = {
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 6.5),
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 7.0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "figure.titlesize": 8,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "text.parse_math": False,  # a prompt may contain "$"
    "savefig.dpi": 300,
    "svg.hashsalt": "llm_pruner",
    "pdf.fonttype": 42,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Use our style inside the block, whatever the caller's is, and restore that afterwards."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, STYLE))
        yield


@contextmanager
def drawing(
    title: str,
    save_path: Path | None,
    show: bool,
    width: float,
    heights: list[float],
    widths: Sequence[float] = (1.0,),
) -> Iterator[tuple[Figure, Any]]:
    """A figure in our style and its axes by row and column; titled, saved and shown at the end.

    `width` and the `heights` of the rows are in inches; `widths` of the columns are relative.
    """
    from .chart import Chart

    with house_style():
        figure = Chart(figsize=(width, sum(heights) + 0.3), layout="constrained")
        ratios: dict[str, Any] = {"height_ratios": heights, "width_ratios": widths}
        yield figure, figure.subplots(len(heights), len(widths), squeeze=False, **ratios)
        figure.suptitle(wrap(title, 0.87 * width))
        if save_path is not None:
            write_atomically(save_path, file_bytes(figure, save_path.suffix.lower()))
        if show:
            _show(figure)


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend in one row under the figure; none without handles."""
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def legend_columns(figure: Figure, columns: list[list[Any]]) -> None:
    """A legend under the figure that keeps the handles of each column together."""
    from matplotlib.lines import Line2D

    rows = max(map(len, columns))
    gap = Line2D([], [], linestyle="", label=" ")
    handles = [handle for column in columns for handle in column + [gap] * (rows - len(column))]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(columns))


def printable(text: str) -> str:
    """`text` with line ends, control characters and what the font lacks made visible."""
    from matplotlib.font_manager import findfont, get_font

    glyphs = get_font(findfont(STYLE["font.family"])).get_charmap()
    return "".join(
        c
        if (c.isprintable() or c == "\u00a0") and ord(c) in glyphs
        else c.encode("unicode_escape").decode()
        for c in text.replace("\n", "\u21b5")
    )


def wrap(text: str, inches: float, most: int | None = None) -> str:
    """`text`, made printable, in at most `most` lines of that width, measured in the font."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    text = printable(" ".join(text.splitlines()))
    measured = text_to_path.get_text_width_height_descent(text, FontProperties(size=7), False)
    room = int(0.9 * inches * 72 * len(text) / max(measured[0], 1.0))
    return textwrap.fill(text, max(8, room), max_lines=most, placeholder=" \u2026")


def wrap_name(name: str, inches: float, most: int | None = None) -> str:
    """`wrap` for a name, which may also be broken after ``_``."""
    return wrap(name.replace("_", "_ "), inches, most).replace("_ ", "_")


def ticks(first: int, last: int, most: int) -> list[int]:
    """At most `most` round layer numbers from `first` to `last`."""
    steps = sorted(base * 10**power for power in range(6) for base in (1, 2, 4, 5))
    step = next(step for step in steps if last // step - (first - 1) // step <= most)
    return list(range(-(-first // step) * step, last + 1, step))


def layer_width(count: int) -> tuple[float, int]:
    """Width of a figure with `count` layers along its axis, and the most ticks on that."""
    return (COLUMN, 16) if count <= 40 else (PAGE, 26)


def state_axis(axis: Any, depth: int) -> None:
    """Ticks and label of an axis of states: one entering each layer, and the output of the last."""
    inner = [tick for tick in ticks(0, depth - 1, 12) if depth < 12 or tick < 0.93 * depth]
    axis.set_ticks([*inner, depth], [*map(str, inner), "out"])
    axis.set_label_text("state entering layer")


def mark_cells(
    axes: Any, cells: Collection[tuple[int, int]], depth: int, label: str, marker: str = "o"
) -> None:
    """A dot or cross on these cells of a map of `depth` layers; nothing without cells."""
    looks: dict[str, dict[str, Any]] = {
        "o": {"color": "white", "markeredgecolor": "black", "markeredgewidth": 0.5},
        "x": {"color": "0.3", "markeredgewidth": 0.7},
    }
    if cells:
        size = 3.5 if depth <= 40 else 2.2
        axes.plot(*zip(*cells, strict=True), marker, markersize=size, label=label, **looks[marker])


def cell_map(
    axes: Any, values: Any, edges: tuple[float, float, float, float], limits: tuple[float, float]
) -> Any:
    """A map of coloured cells, left blank where a value is NaN.

    `edges` are left, right, that of the first and of the last row; `limits` those of the colours.
    """
    import numpy as np

    return axes.imshow(
        np.ma.masked_invalid(values),
        origin="lower" if edges[2] < edges[3] else "upper",
        aspect="auto",
        interpolation="nearest",
        cmap=COLOURS,
        extent=edges,
        vmin=limits[0],
        vmax=limits[1],
    )


def level_marks(axes: Any, levels: Mapping[float, float], label: str) -> None:
    """A dashed line across the bars at each position, at its level."""
    if levels:
        ends = ([position + side for position in levels] for side in (-0.45, 0.45))
        look = {"colors": "black", "linestyles": "--", "linewidth": 0.8}
        axes.vlines(list(levels.values()), *ends, label=label, **look)


def paired_bars(
    axes: Any,
    positions: Sequence[float],
    names: list[str],
    values: list[list[float]],
    errors: Sequence[list[tuple[float, float]] | None] = (None, None),
    labels: tuple[str, str] = ("_", "_"),
) -> None:
    """Two horizontal bars for each name, the first name on top, with their values beside them."""
    longest = 0.0
    for side, (colour, label) in enumerate(zip((BLUE, ORANGE), labels, strict=True)):
        rows = [position + (side - 0.5) * 0.4 for position in positions]
        bars = {"height": 0.4, "color": colour, "label": label}
        spread = errors[side] or [(0.0, 0.0)] * len(rows)
        look = {"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8}
        drawn = list(zip(*spread, strict=True)) if errors[side] else None
        axes.barh(rows, values[side], xerr=drawn, error_kw=look, **bars)
        for row, value, (_, error) in zip(rows, values[side], spread, strict=True):
            at, style = (value + error, row), {"textcoords": "offset points", "fontsize": 6.5}
            axes.annotate(f"{value:.2f}", at, (3, 0), va="center", **style)
            longest = max(longest, value + error)
    axes.set_yticks(positions, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(positions[-1] + 0.6, -0.6)
    limit = 1.2 * longest or 1.0
    axes.set_xlim(0, limit)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(limit, 1.0)])


def check_path(save_path: str | Path | None) -> Path | None:
    """`save_path` as a path; OutputError if its suffix is not one of a figure."""
    path = None if save_path is None else Path(save_path)
    if path is not None and path.suffix.lower() not in METADATA:
        raise OutputError(
            f"Cannot write a figure to {str(path)!r}: the name must end in {', '.join(METADATA)}."
        )
    return path


def check_number(given: Sequence[Any], most: int, what: str) -> None:
    """Raise InvalidDataError unless one to `most` of something are given."""
    if not 1 <= len(given) <= most:
        raise InvalidDataError(
            f"{len(given)} {what} given: one figure shows 1 to {most}; choose some."
        )


def file_bytes(figure: Figure, suffix: str) -> bytes:
    """The figure as a file of that kind, a key of `METADATA`; equal figures give equal bytes.

    A copy is drawn, because every drawing moves the axes of a constrained layout a little.
    """
    buffer, copy = io.BytesIO(), pickle.loads(pickle.dumps(figure))
    with house_style():
        copy.savefig(buffer, format=suffix[1:], metadata=METADATA[suffix])
    return buffer.getvalue()


def _show(figure: Figure) -> None:
    """Show the figure in a pyplot window until that is closed."""
    import matplotlib.pyplot as plt

    canvas = figure.canvas
    manager: Any = plt.figure(figsize=figure.get_size_inches()).canvas.manager
    manager.canvas.figure = figure
    figure.set_canvas(manager.canvas)
    plt.show(block=True)
    plt.close(manager.num)
    figure.set_canvas(canvas)
