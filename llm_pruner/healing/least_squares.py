"""Weighted least squares with a ridge, for maps of any width: sums by block, then one solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Ridge strengths to choose from, in units of the mean of the Gram matrix's diagonal.
RIDGES = (1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
START = 1e-3  # the ridge that is tried first
WIDE = 4096  # features beyond which a factorisation is in float32: a quarter of the time and memory


@dataclass
class Tokens:
    """What a fit is made from or judged on, a block of tokens.

    Attributes:
        features: (tokens, features), H.
        deviation: (tokens, hidden), T - X, what the update should add.
        weight: (tokens, 1), Q.
    """

    features: torch.Tensor
    deviation: torch.Tensor
    weight: torch.Tensor

    @property
    def square(self) -> float:
        """The weighted square of the deviation."""
        return (self.weight.double() * self.deviation.double().square()).sum().item()


@dataclass
class Sums:
    """H'QH and H'Q(T - X) of all tokens, and how many there were.

    Products of a block have the precision of its tensors, float32 as a rule, and are added up in
    float64: what a block of a thousand tokens rounds off is far below the smallest ridge.

    Attributes:
        is_map: whether every feature acts on every channel, or only on its own (a gain).
    """

    is_map: bool
    count: int = 0
    square: float = 0.0
    gram: Any = field(default=None, repr=False)
    cross: Any = field(default=None, repr=False)

    def add(self, block: Tokens) -> None:
        """Take in a block of tokens."""
        weighted = block.features * block.weight
        if self.is_map:
            gram, cross = weighted.T @ block.features, weighted.T @ block.deviation
        else:
            gram = (weighted * block.features).sum(0)
            cross = (weighted * block.deviation).sum(0)
        home = "cpu" if gram.device.type == "mps" else gram.device  # where float64 exists
        if self.gram is None:
            self.gram, self.cross = gram.to(home).double(), cross.to(home).double()
        else:
            self.gram += gram.to(home)  # in place: the wider one is float64
            self.cross += cross.to(home)
        self.count += len(block.features)
        self.square += block.square

    def solve(self, ridge: float) -> torch.Tensor | None:
        """The update D = (H'QH + a I)^-1 H'Q(T - X); None if that is singular to working precision.

        The matrix is scaled to a diagonal of ones before it is factorised in place, so that
        channels a thousand times larger than others, as language models have them, cost no digits.
        """
        if not self.is_map:
            return torch.as_tensor(self.cross / (self.gram + ridge * self.gram.mean()))
        diagonal = self.gram.diagonal()
        lift = ridge * diagonal.mean()
        if not lift > 0:
            return None
        scale = (diagonal + lift).rsqrt()
        exact = torch.float64 if len(self.gram) <= WIDE else torch.float32
        matrix = self.gram.to(exact, copy=True)
        matrix.mul_(scale.to(exact)).mul_(scale.to(exact)[:, None]).fill_diagonal_(1)
        failed = torch.zeros((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if failed:
            return None
        right = (self.cross * scale[:, None]).to(exact)
        return torch.cholesky_solve(right, matrix).mul_(scale.to(exact)[:, None])


def best_update(
    sums: Sums, validation: Sequence[Tokens], start: float = START
) -> tuple[float | None, float, torch.Tensor | None]:
    """The update whose ridge leaves the smallest part of the deviation of validation tokens.

    Ridges are tried from `start` on, downhill: the error has one minimum, so that three or four
    factorisations do what all would.

    Returns:
        The ridge, the fraction of the squared deviation that is left, and the update; None, 1 and
        None if no ridge lowers it.
    """
    whole = sum(block.square for block in validation)
    found: dict[int, float] = {}
    best: tuple[float | None, float, torch.Tensor | None] = None, 1.0, None

    def left(place: int) -> float:
        nonlocal best
        if place not in range(len(RIDGES)):
            return float("inf")
        if place not in found:
            update = sums.solve(RIDGES[place])
            found[place] = float("inf")
            if update is not None:
                found[place] = _left(update, validation, sums.is_map) / whole
                if found[place] < best[1]:
                    best = RIDGES[place], found[place], update
        return found[place]

    place = min(range(len(RIDGES)), key=lambda i: abs(RIDGES[i] - start))
    while left(place) == float("inf") and place < len(RIDGES) - 1:
        place += 1  # singular: a stronger one
    for step in (-1, 1):
        while left(place + step) < left(place):
            place += step
    return best


def _left(update: torch.Tensor, validation: Sequence[Tokens], is_map: bool) -> float:
    """The weighted square of what an update leaves of the deviation."""
    total = 0.0
    for block in validation:
        own = update.to(block.features)
        added = block.features @ own if is_map else block.features * own
        total += Tokens(block.features, block.deviation - added, block.weight).square
    return total
