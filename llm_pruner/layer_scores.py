"""Scores of layers: one number each, what it means, and which end goes first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import InvalidPlanError, NonFiniteError
from .json_files import check_type

if TYPE_CHECKING:
    import pandas as pd

Removes = Literal["lowest", "highest"]
MOST_ROWS = 40  # of a table in a notebook


class LayerScores(dict[int, float]):
    """One finite number per layer (0-based), and what it means.

    A plain ``dict[int, float]`` to everybody who does not ask for more.

    Attributes:
        strategy: name of the strategy that made the scores.
        unit: what one number is, for axis labels.
        removes: which end of the scale goes first, ``lowest`` or ``highest``.
        blocks: where the strategy looks at runs of layers, the score of each run:
            ``blocks[start][length - 1]``; otherwise None.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message names the layers.
        InvalidPlanError: `removes` is something else.
    """

    def __init__(
        self,
        scores: Mapping[int, float],
        *,
        strategy: str = "custom",
        unit: str = "score",
        removes: Removes = "lowest",
        blocks: list[list[float]] | None = None,
    ) -> None:
        if removes not in get_args(Removes):
            raise InvalidPlanError(f"removes={removes!r} must be 'lowest' or 'highest'.")
        super().__init__({int(layer): float(score) for layer, score in sorted(scores.items())})
        bad = [layer for layer, score in self.items() if not math.isfinite(score)]
        if bad:
            raise NonFiniteError(
                f"{strategy} gives no finite score for layers {bad}: a strategy of your own "
                "computes it so, or the model's weights or activations there are NaN or overflow. "
                "Check the checkpoint, or load it with dtype float32."
            )
        self.strategy, self.unit, self.removes, self.blocks = strategy, unit, removes, blocks

    def ranked(self) -> list[int]:
        """Layers in the order of removal; of two equal scores the deeper layer goes first."""
        sign = 1.0 if self.removes == "lowest" else -1.0
        return sorted(self, key=lambda layer: (sign * self[layer], -layer))

    def to_frame(self) -> pd.DataFrame:
        """A table with one row per layer, ``layer`` its index, and the column ``score``."""
        import pandas as pd

        return pd.DataFrame({"score": self}).rename_axis("layer")

    def _repr_html_(self) -> str:
        """A table, in the order of removal."""
        frame = self.to_frame().loc[self.ranked()]
        return table_html(f"{self.strategy}: {self.unit}, in the order of removal", frame)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` is its inverse."""
        return {
            "strategy": self.strategy,
            "unit": self.unit,
            "removes": self.removes,
            "scores": {str(layer): score for layer, score in self.items()},
            "blocks": self.blocks,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerScores:
        """The scores that `to_dict` described.

        Raises:
            InvalidPlanError: it described none.
        """
        try:
            values = check_type(data, dict[str, Any], "scores")
            scores = check_type(values.pop("scores"), dict[str, float], "scores")
            texts = {name: values.pop(name) for name in ("strategy", "unit") if name in values}
            blocks = check_type(values.pop("blocks", None), list[list[float]] | None, "blocks")
            options: dict[str, Any] = {**check_type(texts, dict[str, str], "scores"), **values}
            return cls({int(n): one for n, one in scores.items()}, blocks=blocks, **options)
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidPlanError(str(error)) from error

    of_data = from_dict


def _short(number: float) -> str:
    """Four digits; of a large number all before the point."""
    return f"{number:,.0f}" if abs(number) >= 1e4 else f"{number:.4g}"


def table_html(text: str, frame: pd.DataFrame | None = None) -> str:
    """A text and a table for a notebook, which are short."""
    said = f"<p>{escape(text)}</p>".replace("\n", "<br>")
    if frame is None:
        return said
    more = f"<p>and {len(frame) - MOST_ROWS} more</p>" if len(frame) > MOST_ROWS else ""
    table = frame.head(MOST_ROWS).to_html(float_format=_short, na_rep="", border=0)
    return f"{said}{table}{more}"
