"""Streaming arithmetic over hidden states: exact for any split into batches, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RunningVariance:
    """Mean and population variance of a stream of numbers, updated batch by batch.

    The update is the pairwise one of Chan, Golub and LeVeque (1979): it does not lose digits
    when the mean is large, as a sum of squares would.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._deviation = 0.0  # sum of squared distances from the mean

    def update(self, values: torch.Tensor) -> None:
        """Take in every element of `values`, whatever its shape."""
        values = values.detach().double()
        count = values.numel()
        if count == 0:
            return
        mean = values.mean().item()
        deviation = (values - mean).square().sum().item()
        total = self.count + count
        distance = mean - self.mean
        self._deviation += deviation + distance**2 * self.count * count / total
        self.mean += distance * count / total
        self.count = total

    @property
    def variance(self) -> float:
        """Population variance of all values so far; NaN before the first."""
        return self._deviation / self.count if self.count else float("nan")


class RunningMean:
    """Mean of a stream of numbers, carried as (sum, count) and divided once."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0

    def update(self, values: torch.Tensor) -> None:
        """Take in every element of `values`, whatever its shape or type."""
        self.total += values.detach().double().sum().item()
        self.count += values.numel()

    @property
    def mean(self) -> float:
        """Mean of all values so far; NaN before the first."""
        return self.total / self.count if self.count else float("nan")


class AngularDistances:
    """Mean angular distance between every two states of the residual stream.

    d(a, b) = arccos(cos(a, b)) / pi, in [0, 1], averaged as an angle over vectors
    (Gromov et al., arXiv:2403.17887, equation 3). All pairs come from one batched product
    of the normalised vectors.

    Args:
        n_states: states per token: the input of every layer, and the output of the last.
    """

    def __init__(self, n_states: int) -> None:
        self._sum = torch.zeros(n_states, n_states, dtype=torch.float64)
        self._count = 0

    def update(self, vectors: torch.Tensor) -> None:
        """Take in vectors of shape (n_states, samples, hidden)."""
        unit = torch.nn.functional.normalize(vectors.detach().double(), dim=-1)
        cosine = torch.einsum("isd,jsd->sij", unit, unit).clamp(-1.0, 1.0)
        angle = cosine.arccos() / torch.pi
        angle.diagonal(dim1=1, dim2=2).zero_()  # arccos of 1 - 1e-16 is 1e-8, not 0
        self._sum += angle.sum(0).cpu()
        self._count += vectors.shape[1]

    @property
    def matrix(self) -> torch.Tensor:
        """(n_states, n_states) mean distances; NaN before the first vector."""
        return self._sum / self._count if self._count else torch.full_like(self._sum, torch.nan)


def last_real_token(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The last unpadded token of every sequence, in every state.

    Shapes: states, each (sequences, tokens, hidden); mask (sequences, tokens), true for real
    tokens, padded on either side -> (states, sequences, hidden).
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    rows = torch.arange(mask.shape[0], device=mask.device)
    return torch.stack([state[rows.to(state.device), last.to(state.device)] for state in states])
