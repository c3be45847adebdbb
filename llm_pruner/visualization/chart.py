"""A figure that a notebook shows as a picture."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .style import file_bytes

PIXELS = 110  # to an inch, on the screen


class Chart(Figure):
    """A matplotlib figure without a window, which notebooks show where it is the last value."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture, and how large it is shown."""
        width, height = (round(PIXELS * inches) for inches in self.get_size_inches())
        return file_bytes(self, ".png"), {"width": width, "height": height}
