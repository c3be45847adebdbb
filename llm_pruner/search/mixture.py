"""Quality as a whole: several measures, on several kinds of data, become one relative change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..utils import logger
from .objectives import OBJECTIVES

OverKinds = Literal["mean", "worst"]


@dataclass(frozen=True)
class Part:
    """One measure on one kind of data.

    Attributes:
        name: the measure, of `OBJECTIVES`.
        kind: the kind of data; empty where there is only one.
        weight: in the relative change of its kind, or of the whole.
        row: which row of the measured values it is in.
    """

    name: str
    kind: str
    weight: float
    row: int

    @property
    def label(self) -> str:
        """``nll``, or ``nll of books``."""
        return f"{self.name} of {self.kind}" if self.kind else self.name


class Mixture:
    """How values of measures on token sequences become one relative change.

    Every kind of data that a measure says something about counts the same, however much of it
    there is.

    Args:
        measures: names and weights, which add up to 1.
        weights: (measures, sequences) float64, what a sequence counts.
        kinds: the kind of each sequence.
        over_kinds: the mean of the changes of all kinds, or that of the worst one.

    Attributes:
        parts: every measure on every kind, in the order of all lists below.
        kinds: the kinds of data; one that is empty where there is no other.
    """

    def __init__(
        self,
        measures: Mapping[str, float],
        weights: torch.Tensor,
        kinds: Sequence[str],
        over_kinds: OverKinds = "mean",
    ) -> None:
        self.kinds = list(dict.fromkeys(kinds))
        several = len(self.kinds) > 1
        of_kind = [torch.tensor([one == kind for one in kinds]) for kind in self.kinds]
        parts: list[Part] = []
        masks: list[torch.Tensor] = []
        for row, (name, weight) in enumerate(measures.items()):
            said = [n for n, mask in enumerate(of_kind) if float(weights[row][mask].sum())]
            for number in said or [0]:
                each = weight / len(said or [0]) if over_kinds == "mean" else weight
                parts.append(Part(name, self.kinds[number] if several else "", each, row))
                masks.append(of_kind[number])
        self.parts, self._worst = parts, over_kinds == "worst" and several
        self._rows = [part.row for part in parts]
        self._masks = torch.stack(masks).double()
        self.weights = weights[self._rows] * self._masks

    def count(self, kind: str) -> int:
        """How many sequences say something about a kind."""
        rows = [n for n, part in enumerate(self.parts) if part.kind == kind]
        return int(self.weights[rows].any(0).sum())

    def values(self, measured: torch.Tensor, columns: Sequence[int] | None) -> torch.Tensor:
        """(parts, sequences) of the values (measures, sequences); 0 where a kind is not meant."""
        masks = self._masks if columns is None else self._masks[:, list(columns)]
        return measured[self._rows] * masks

    def weights_on(self, columns: Sequence[int] | None) -> torch.Tensor:
        """The weights (parts, sequences) of some sequences; of all if None."""
        return self.weights if columns is None else self.weights[:, list(columns)]

    def qualities(self, measured: torch.Tensor, columns: Sequence[int] | None) -> list[float]:
        """The quality of every part; on sequences without its kind that of a perfect one."""
        weights = self.weights_on(columns).sum(1).clamp(min=1e-12)
        means = self.values(measured, columns).sum(1) / weights
        return [
            OBJECTIVES[part.name].quality(mean)
            for part, mean in zip(self.parts, means.tolist(), strict=True)
        ]

    def change(
        self, after: Sequence[float], before: Sequence[float], full: Sequence[float]
    ) -> float:
        """The relative change from qualities to others, in units of the full model's."""
        changes = [(a - b) / abs(whole) for a, b, whole in zip(after, before, full, strict=True)]
        if self._worst:
            return min(self.by_kind(after, before, full).values())
        return math.fsum(
            part.weight * change for part, change in zip(self.parts, changes, strict=True)
        )

    def by_kind(
        self, after: Sequence[float], before: Sequence[float], full: Sequence[float]
    ) -> dict[str, float]:
        """The relative change of each kind alone."""
        changes = [(a - b) / abs(whole) for a, b, whole in zip(after, before, full, strict=True)]
        table = torch.tensor(changes, dtype=torch.float64)[:, None]
        kinds = dict.fromkeys(part.kind for part in self.parts)
        return {kind: float(self.of_kind(table, kind)) for kind in kinds}

    def of_kind(self, changes: torch.Tensor, kind: str) -> torch.Tensor:
        """The change of one kind alone, from changes of all parts (parts, draws): (draws,)."""
        whole = sum(part.weight for part in self.parts if part.kind == kind)
        weights = [part.weight / whole if part.kind == kind else 0.0 for part in self.parts]
        return torch.tensor(weights, dtype=torch.float64) @ changes

    def combined(self, changes: torch.Tensor) -> torch.Tensor:
        """The relative change, from changes of all parts (parts, draws): (draws,)."""
        if self._worst:
            kinds = dict.fromkeys(part.kind for part in self.parts)
            return torch.stack([self.of_kind(changes, kind) for kind in kinds]).amin(0)
        weights = torch.tensor([part.weight for part in self.parts], dtype=torch.float64)
        return weights @ changes

    def influence(
        self,
        measured: torch.Tensor,
        columns: Sequence[int] | None,
        full: Sequence[float],
        kind: str,
    ) -> torch.Tensor:
        """First-order contribution of each sequence to the relative change.

        Args:
            kind: the kind that the change is of, where the worst one counts.
        """
        values, weights = self.values(measured, columns), self.weights_on(columns)
        total = weights.sum(1).clamp(min=1e-12)
        means = values.sum(1) / total
        factors = [
            (not self._worst or part.kind == kind)
            * part.weight
            * OBJECTIVES[part.name].slope(mean)
            / abs(whole)
            for part, mean, whole in zip(self.parts, means.tolist(), full, strict=True)
        ]
        each = values - means[:, None] * weights
        return (torch.tensor(factors, dtype=torch.float64) / total) @ each


def kinds_apart(kinds: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """The kinds of data that a removal costs most and least, if their intervals do not overlap."""
    known = {kind: cost for kind, cost in kinds.items() if None not in cost.values()}
    if not known:
        return None
    worst, best = (pick(known, key=lambda kind: known[kind]["change"]) for pick in (min, max))
    return (worst, best) if known[worst]["high"] < known[best]["low"] else None


def warn_of_kinds(kinds: Mapping[str, Mapping[str, float]]) -> None:
    """Say where a choice costs one kind of data clearly more than another."""
    if apart := kinds_apart(kinds):
        worst, best = apart
        logger.warning(
            "The choice costs %s clearly more (%+.1f %%) than %s (%+.1f %%): over_kinds='worst' "
            "looks for one that spares the worst kind.",
            worst,
            100 * kinds[worst]["change"],
            best,
            100 * kinds[best]["change"],
        )
