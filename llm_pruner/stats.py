"""Running statistics of hidden states, exact for any split into batches, in float64; the bootstrap.

Two choices are separate. Which vectors count, without padding: `real_tokens`, `last_real_token`,
`sequence_means`. What is averaged over them: `RunningMean`, `RunningVariance`, and for all pairs of
the L + 1 states of the residual stream `CosineSimilarities` and `AngularDistances`, which keep
(L + 1)^2 numbers and no activations. `merged` combines what several processes have collected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch

from .distributed import gather

# The most elements that are copied to float64 at a time: 8 MiB, which a CPU's cache holds, or
# 128 MiB, which keep an accelerator busy.
CPU_CHUNK, DEVICE_CHUNK = 2**20, 2**24


class RunningVariance:
    """Mean and population variance of numbers, updated batch by batch.

    The update is the pairwise one of Chan, Golub and LeVeque (1979): it does not lose digits
    when the mean is large, as a sum of squares would.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._deviation = 0.0  # sum of squared distances from the mean

    def update(self, values: torch.Tensor) -> None:
        """Add every element of `values`, of any shape."""
        for part in _parts(values.flatten()):
            mean = part.mean().item()
            self._join(part.numel(), mean, (part - mean).square().sum().item())

    def merge(self, other: RunningVariance) -> None:
        """Add everything `other` has collected."""
        if other.count:
            self._join(other.count, other.mean, other._deviation)

    def _join(self, count: int, mean: float, deviation: float) -> None:
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
    """Mean of numbers, carried as (sum, count) and divided once."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0

    def update(self, values: torch.Tensor) -> None:
        """Add every element of `values`, of any shape and type."""
        for part in _parts(values.flatten()):
            self.total += part.sum().item()
            self.count += part.numel()

    def merge(self, other: RunningMean) -> None:
        """Add everything `other` has collected."""
        self.total += other.total
        self.count += other.count

    @property
    def mean(self) -> float:
        """Mean of all values so far; NaN before the first."""
        return self.total / self.count if self.count else float("nan")


class _PairMean(ABC):
    """Mean over vectors of a number for every two states of the residual stream.

    Args:
        n_states: states per token: the input of every layer, and the output of the last.
    """

    def __init__(self, n_states: int) -> None:
        self._sum = torch.zeros(n_states, n_states, dtype=torch.float64)
        self._count = 0

    def update(self, vectors: torch.Tensor) -> None:
        """Add vectors of shape (n_states, samples, hidden)."""
        for part in _parts(vectors, dim=1):
            unit = torch.nn.functional.normalize(part, dim=-1, eps=torch.finfo(part.dtype).tiny)
            self._sum += self._summed(unit).cpu()
            self._count += part.shape[1]

    def merge(self, other: Self) -> None:
        """Add everything `other` has collected."""
        self._sum += other._sum
        self._count += other._count

    @property
    def matrix(self) -> torch.Tensor:
        """(n_states, n_states) means; NaN before the first vector."""
        return self._sum / self._count if self._count else torch.full_like(self._sum, torch.nan)

    @abstractmethod
    def _summed(self, unit: torch.Tensor) -> torch.Tensor:
        """Sum over the samples of unit vectors (n_states, samples, hidden), for every pair."""


class CosineSimilarities(_PairMean):
    """Mean cosine between every two states of the residual stream, in [-1, 1].

    With all samples laid end to end, the sum of the cosines of two states is one scalar product,
    and that of all pairs is one matrix product: 2 (n_states)^2 hidden operations per token. A zero
    vector has cosine 0 with every other.
    """

    def _summed(self, unit: torch.Tensor) -> torch.Tensor:
        row = unit.flatten(1)  # (n_states, samples * hidden)
        return (row @ row.T).fill_diagonal_(unit.shape[1])


class AngularDistances(_PairMean):
    """Mean angular distance between every two states of the residual stream.

    d(a, b) = arccos(cos(a, b)) / pi, in [0, 1], averaged as an angle over vectors
    (Gromov et al., arXiv:2403.17887, equation 3). All pairs come from one batched product
    of the normalised vectors.
    """

    def _summed(self, unit: torch.Tensor) -> torch.Tensor:
        cosine = torch.einsum("isd,jsd->sij", unit, unit).clamp(-1.0, 1.0)
        angle = cosine.arccos() / torch.pi
        angle.diagonal(dim1=1, dim2=2).zero_()  # arccos of 1 - 1e-16 is 1e-8, not 0
        return angle.sum(0)


class _Merges(Protocol):
    def merge(self, other: Any, /) -> None: ...


Accumulator = TypeVar("Accumulator", bound=_Merges)


def merged(accumulators: Sequence[Accumulator]) -> list[Accumulator]:
    """What all processes together have collected, bit for bit the same in each of them.

    Args:
        accumulators: those of this process; every process has as many, of the same kinds.
    """
    first, *others = gather(list(accumulators))
    for other in others:
        for accumulator, more in zip(first, other, strict=True):
            accumulator.merge(more)
    return first


def real_tokens(states: Sequence[torch.Tensor], mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """Every unpadded token, a limited number at a time.

    Shapes: states, each (sequences, tokens, hidden); mask (sequences, tokens), true for real
    tokens, padded on either side -> float64 (states, some tokens, hidden), on the device of the
    first state.
    """
    indices = mask.flatten().nonzero().squeeze(1)
    step = _step(states[0], len(states) * states[0].shape[-1])
    for part in torch.split(indices, step):
        yield _exact(_picked(states, part))


def last_real_token(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The last unpadded token of every sequence, in every state.

    Shapes: states, each (sequences, tokens, hidden); mask (sequences, tokens), true for real
    tokens, padded on either side -> (states, sequences, hidden), on the device of the first state.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    rows = torch.arange(mask.shape[0], device=mask.device)
    return _picked(states, rows * mask.shape[1] + last)


def sequence_means(states: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The mean over the unpadded tokens of every sequence, in every state.

    Shapes: states, each (sequences, tokens, hidden); mask (sequences, tokens), true for real
    tokens, padded on either side -> float64 (states, sequences, hidden), on the CPU.
    """
    means = []
    for state in states:
        real = mask.to(state.device).bool().unsqueeze(-1)
        step = _step(state, state[0].numel())
        parts = [
            _exact(part.masked_fill(~kept, 0)).sum(1).cpu() / kept.sum(1).cpu()
            for part, kept in zip(torch.split(state, step), torch.split(real, step), strict=True)
        ]
        means.append(torch.cat(parts))
    return torch.stack(means)


def _picked(states: Sequence[torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
    """(states, len(indices), hidden): tokens of every state, counted across all sequences."""
    tokens = [state.flatten(0, 1).index_select(0, indices.to(state.device)) for state in states]
    return torch.stack([part.to(states[0].device) for part in tokens])


def _parts(values: torch.Tensor, dim: int = 0) -> Iterator[torch.Tensor]:
    """`values` in float64, cut along `dim` into parts of limited size, none of them empty."""
    if values.numel():
        step = _step(values, values.numel() // values.shape[dim])
        yield from map(_exact, torch.split(values.detach(), step, dim))


def _step(values: torch.Tensor, size: int) -> int:
    """How many slices of `size` elements are copied to float64 at a time, at least one."""
    limit = CPU_CHUNK if values.device.type == "cpu" else DEVICE_CHUNK
    return max(1, limit // size)


def _exact(values: torch.Tensor) -> torch.Tensor:
    """`values` in float64; on the CPU if their device does not have the type."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def bootstrap_counts(samples: int, draws: int, seed: int) -> torch.Tensor:
    """How often each sample is drawn when as many are drawn with replacement: (draws, samples)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(samples, (draws, samples), generator=generator)
    counts = torch.zeros(draws, samples, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def paired_draws(
    before: torch.Tensor,
    after: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> torch.Tensor:
    """Bootstrap differences of two models' means: (..., samples) -> (..., draws).

    Samples are drawn with replacement, the same for both models. A mean is the sum of the values
    over the sum of the weights.

    Args:
        before, after: sums of each sample, such as its negative log-likelihood.
        weights: (samples,), such as the sample's number of tokens; 1 if None.
        transform: applied to either mean before the difference, ``torch.exp`` for perplexity.
        draws: how many.
        seed: of the draws.
    """
    counts = bootstrap_counts(before.shape[-1], draws, seed)
    total = counts.sum(1) if weights is None else counts @ weights.double()
    means = [side.double() @ counts.T / total.clamp(min=1e-12) for side in (before, after)]
    first, second = means if transform is None else map(transform, means)
    return second - first


def percentiles(draws: torch.Tensor, level: float = 0.95) -> torch.Tensor:
    """Bounds of the central `level` of the draws: (..., draws) -> (2, ...)."""
    tail = (1 - level) / 2
    return draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype), dim=-1)


def paired_interval(
    before: torch.Tensor, after: torch.Tensor, weights: torch.Tensor | None = None, **settings: Any
) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the difference of two models' means: (low, high).

    Efron's percentile method on `paired_draws`, which takes these arguments; for one dimension.
    A single sample says nothing about its spread: (None, None). Where all samples agree, the
    interval has no width.
    """
    if before.shape[-1] < 2:
        return None, None
    low, high = percentiles(paired_draws(before, after, weights, **settings)).tolist()
    return low, high
