"""A figure that a notebook shows as a picture."""

from __future__ import annotations

import io
import pickle
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PIXELS, SHARP = 110, 220  # to an inch: on the screen, and in the picture


class Chart(Figure):
    """A matplotlib figure without a window, which notebooks show where it is the last value."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The picture, and how large it is shown; of a copy, which drawing may change a little."""
        width, height = (round(PIXELS * inches) for inches in self.get_size_inches())
        buffer, copy = io.BytesIO(), pickle.loads(pickle.dumps(self))
        copy.savefig(buffer, format="png", dpi=SHARP)
        return buffer.getvalue(), {"width": width, "height": height}
