"""Streaming arithmetic: the same numbers as in one batch, for any split, in any order."""

from __future__ import annotations

import math
import statistics
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llm_pruner import stats
from llm_pruner.stats import (
    AngularDistances,
    CosineSimilarities,
    RunningMean,
    RunningVariance,
    last_real_token,
    paired_draws,
    paired_interval,
    percentiles,
    real_tokens,
    sequence_means,
)

# A stream in parts, some of them empty, at least two of them not.
PARTS = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=2, max_size=8).filter(
    lambda batches: sum(map(bool, batches)) > 1
)
SIZES = st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any)


def tensors(batches: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(batch, dtype=torch.float64) for batch in batches]


def fed(accumulator, batches):
    for batch in batches:
        accumulator.update(batch)
    return accumulator


@given(PARTS)
@settings(max_examples=80, deadline=None)
def test_variance_of_parts_is_that_of_the_whole(batches):
    running, values = fed(RunningVariance(), tensors(batches)), list(chain(*batches))
    assert running.count == len(values)
    assert running.mean == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-12)
    assert running.variance == pytest.approx(statistics.pvariance(values), rel=1e-9, abs=1e-9)


@given(PARTS)
@settings(max_examples=80, deadline=None)
def test_mean_of_parts_is_that_of_the_whole(batches):
    running, values = fed(RunningMean(), tensors(batches)), list(chain(*batches))
    assert running.count == len(values)
    assert running.mean == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-12)


@given(PARTS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_is_irrelevant(batches, rng):
    shuffled = rng.sample(batches, len(batches))
    for kind in (RunningMean, RunningVariance):
        one, other = fed(kind(), tensors(batches)), fed(kind(), tensors(shuffled))
        assert one.count == other.count
        assert one.mean == pytest.approx(other.mean, rel=1e-12, abs=1e-10)
    assert one.variance == pytest.approx(other.variance, rel=1e-9, abs=1e-9)


def test_uneven_parts_are_weighed_by_their_size():
    """The mean of the parts' means would be 3, their mean variance 1/3."""
    batches = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0])]
    assert fed(RunningMean(), batches).mean == 2
    assert fed(RunningVariance(), batches).mean == 2
    assert fed(RunningVariance(), batches).variance == pytest.approx(3.5)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_large_mean_costs_no_digits(size):
    """A sum of squares would be 1e20 here, with no digit left for a variance of 1/12."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1000, generator=generator, dtype=torch.float64)
    running = fed(RunningVariance(), (noise + 1e8).split(size))
    want = statistics.pvariance((noise + 1e8).tolist())
    assert want == pytest.approx(1 / 12, rel=0.1)
    assert running.variance == pytest.approx(want, rel=1e-6)


def test_any_shape_and_type_is_taken():
    values = torch.arange(24).reshape(2, 3, 4)
    assert fed(RunningMean(), [values]).mean == 11.5
    assert fed(RunningMean(), [values < 6]).mean == 0.25
    assert fed(RunningVariance(), [values.half()]).variance == pytest.approx((24**2 - 1) / 12)
    many = torch.full((300,), 1000.0, dtype=torch.float16)  # their sum overflows in float16
    assert fed(RunningMean(), [many]).mean == 1000
    assert fed(RunningVariance(), [many]).variance == 0


def test_nothing_has_no_mean():
    empty = [torch.tensor([])]
    assert math.isnan(fed(RunningMean(), empty).mean)
    assert math.isnan(fed(RunningVariance(), empty).variance)
    for kind in (AngularDistances, CosineSimilarities):
        assert fed(kind(2), [torch.zeros(2, 0, 3)]).matrix.isnan().all()


def test_nan_is_not_lost():
    values = [torch.tensor([1.0]), torch.tensor([math.nan]), torch.tensor([2.0])]
    assert math.isnan(fed(RunningMean(), values).mean)
    assert math.isnan(fed(RunningVariance(), values).variance)


# --- pairs of states --------------------------------------------------------------------------

KNOWN = [
    ((1.0, 0.0), (1.0, 0.0), 0.0),
    ((1.0, 0.0), (7.0, 0.0), 0.0),
    ((1.0, 0.0), (0.0, 1.0), 0.5),
    ((1.0, 0.0), (0.0, -2.0), 0.5),
    ((1.0, 0.0), (-3.0, 0.0), 1.0),
    ((1.0, 0.0), (1.0, 1.0), 0.25),
    ((1.0, 0.0), (1.0, math.sqrt(3.0)), 1 / 3),
    ((1.0, 0.0), (-1.0, 1.0), 0.75),
]


@pytest.mark.parametrize(("a", "b", "want"), KNOWN)
def test_known_angles(a, b, want):
    distances = AngularDistances(2)
    distances.update(torch.tensor([[a], [b]]))
    assert distances.matrix[0, 1].item() == pytest.approx(want, abs=1e-7)
    assert distances.matrix[1, 0].item() == pytest.approx(want, abs=1e-7)
    assert distances.matrix.diagonal().tolist() == [0, 0]
    cosines = fed(CosineSimilarities(2), [torch.tensor([[a], [b]])]).matrix
    assert cosines[0, 1].item() == pytest.approx(math.cos(want * math.pi), abs=1e-7)
    assert cosines[1, 0].item() == pytest.approx(math.cos(want * math.pi), abs=1e-7)
    assert cosines.diagonal().tolist() == [1, 1]


def test_angles_are_averaged_not_cosines():
    """0, 90 and 120 degrees: the angle of the mean cosine would be 80.4 degrees, not 70."""
    distances = AngularDistances(2)
    ends = [[1.0, 0.0], [0.0, 1.0], [-1.0, math.sqrt(3.0)]]
    distances.update(torch.tensor([[[1.0, 0.0]] * 3, ends]))
    assert distances.matrix[0, 1].item() == pytest.approx(70 / 180)


def test_cosines_are_averaged_over_tokens():
    """1, 0 and -1; the cosine of the states as one long vector would be 0.5."""
    here = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    there = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    vectors = torch.stack([here, there])
    assert fed(CosineSimilarities(2), [vectors]).matrix[0, 1].item() == pytest.approx(0)
    parts = vectors.split([1, 2], dim=1)
    assert fed(CosineSimilarities(2), parts).matrix[0, 1].item() == pytest.approx(0)


@given(PARTS)
@settings(max_examples=60, deadline=None)
def test_merging_parts_is_taking_them_in(batches):
    for kind in (RunningMean, RunningVariance):
        one, other = fed(kind(), tensors(batches)), kind()
        for batch in tensors(batches):
            other.merge(fed(kind(), [batch]))  # of an empty part too
        assert other.count == one.count
        assert other.mean == pytest.approx(one.mean, rel=1e-12, abs=1e-10)
    assert other.variance == pytest.approx(one.variance, rel=1e-9, abs=1e-9)


@given(st.integers(0, 1000), SIZES)
@settings(max_examples=20, deadline=None)
def test_merging_pairs_is_taking_them_in(seed, sizes):
    parts = vectors(seed, sum(sizes)).split(sizes, dim=1)
    for kind in (AngularDistances, CosineSimilarities):
        one, other = fed(kind(4), parts), kind(4)
        for part in parts:
            other.merge(fed(kind(4), [part]))
        assert torch.allclose(other.matrix, one.matrix, rtol=1e-12, atol=1e-14)


def vectors(seed: int, samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, samples, 5, generator=generator, dtype=torch.float64)


@given(st.integers(0, 1000), SIZES)
@settings(max_examples=40, deadline=None)
def test_pairs_of_parts_are_those_of_the_whole(seed, sizes):
    whole = vectors(seed, sum(sizes))
    matrix = fed(AngularDistances(4), whole.split(sizes, dim=1)).matrix
    similar = fed(CosineSimilarities(4), whole.split(sizes, dim=1)).matrix
    for i in range(4):
        for j in range(4):
            cosines = []
            for x, y in zip(whole[i].tolist(), whole[j].tolist(), strict=True):
                dot = sum(p * q for p, q in zip(x, y, strict=True))
                cosine = dot / math.hypot(*x) / math.hypot(*y)
                cosines.append(max(-1.0, min(1.0, cosine)))
            angles = [math.acos(cosine) / math.pi for cosine in cosines]
            assert matrix[i, j].item() == pytest.approx(statistics.fmean(angles), abs=1e-7)
            assert similar[i, j].item() == pytest.approx(statistics.fmean(cosines), abs=1e-12)
    assert torch.equal(matrix, matrix.T)
    assert (matrix.diagonal() == 0).all()
    assert matrix.min() >= 0
    assert matrix.max() <= 1


@pytest.mark.parametrize("kind", [AngularDistances, CosineSimilarities])
@given(st.integers(0, 100), st.sampled_from([1e-30, 1e-3, 1e3, 1e30]))
@settings(max_examples=20, deadline=None)
def test_pairs_do_not_depend_on_length(kind, seed, scale):
    one, other = kind(4), kind(4)
    one.update(vectors(seed, 3))
    other.update(vectors(seed, 3) * scale)
    torch.testing.assert_close(one.matrix, other.matrix)


def test_low_precision_vectors_are_turned_in_float64():
    """Two bfloat16 vectors 0.006 of a half turn apart, where a bfloat16 cosine rounds to 1."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0195])
    distances = AngularDistances(2)
    distances.update(torch.stack([a, b]).unsqueeze(1).bfloat16())
    want = math.atan2(float(b[1].bfloat16()), 1.0) / math.pi
    assert distances.matrix[0, 1].item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", [AngularDistances, CosineSimilarities])
def test_large_states_in_half_precision_do_not_overflow(kind):
    """The square of 6e4 is infinite in float16, and inf / inf is not a number."""
    signs = torch.ones(3, 4, 64)
    signs[1, :, :32] = -1  # at a right angle to the first state
    signs[2] = -1  # opposite to it
    states = (6e4 * signs).half()
    assert states.isfinite().all()
    assert not states.norm(dim=-1).isfinite().any()
    want = [[0, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 0]]
    if kind is CosineSimilarities:
        want = [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    got = fed(kind(3), [states]).matrix
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-7, rtol=0)


# --- which vectors count ----------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans(), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_only_real_tokens_count_for_either_padding(lengths, left, limit):
    """Every vector says which state, sequence and token it is; under the padding stands NaN."""
    width = max(lengths)
    states, mask = [], torch.zeros(len(lengths), width, dtype=torch.bool)
    for state in range(3):
        tensor = torch.full((len(lengths), width, 3), math.nan)
        for row, length in enumerate(lengths):
            for token in range(length):
                place = token + (width - length if left else 0)
                tensor[row, place] = torch.tensor([state, row, token])
                mask[row, place] = True
        states.append(tensor)
    last = [[[s, row, n - 1] for row, n in enumerate(lengths)] for s in range(3)]
    mean = [[[s, row, (n - 1) / 2] for row, n in enumerate(lengths)] for s in range(3)]
    every = [[[s, row, t] for row, n in enumerate(lengths) for t in range(n)] for s in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "CPU_CHUNK", limit)
        for real in (mask, mask.long()):
            assert last_real_token(states, real).tolist() == last
            assert sequence_means(states, real).tolist() == mean
            chunks = list(real_tokens(states, real))
            assert torch.cat(chunks, dim=1).tolist() == every
            assert max(chunk.numel() for chunk in chunks) <= max(limit, 9)
    assert {chunk.dtype for chunk in chunks} == {torch.float64}


class Sizes(TorchDispatchMode):
    """Notes the number of elements of everything that is computed, and of what is in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.largest_exact = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.dtype == torch.float64:
                    self.largest_exact = max(self.largest_exact, tensor.numel())
        return result


def collect(states, mask):
    """Everything that is collected over one batch, as plain numbers."""
    cosines, angles = CosineSimilarities(len(states)), AngularDistances(len(states))
    variance, mean = RunningVariance(), RunningMean()
    for tokens in real_tokens(states, mask):
        cosines.update(tokens)
    angles.update(last_real_token(states, mask))
    variance.update(states[-1])
    mean.update(states[-1])
    return [
        *cosines.matrix.flatten().tolist(),
        *angles.matrix.flatten().tolist(),
        *sequence_means(states, mask).flatten().tolist(),
        variance.variance,
        mean.mean,
    ]


def test_no_number_is_made_for_a_pair_of_tokens():
    """8192 tokens: a matrix of tokens x tokens would have 67 million elements, 512 MiB."""
    states = list(torch.randn(3, 2, 4096, 4, generator=torch.Generator().manual_seed(0)))
    with Sizes() as sizes:
        collect(states, torch.ones(2, 4096, dtype=torch.bool))
    assert sizes.largest <= 3 * 2 * 4096 * 4, "the states themselves"


def test_copies_in_float64_are_limited(monkeypatch):
    """And the limit changes no number, whether it cuts within sequences or between them."""
    states = list(torch.randn(3, 9, 10, 4, generator=torch.Generator().manual_seed(0)))
    mask = torch.arange(10) < torch.arange(2, 11).unsqueeze(1)
    want = collect(states, mask)
    for limit in (108, 40, 7 * 12 + 5):  # the means of all sequences alone are 108 numbers
        monkeypatch.setattr(stats, "CPU_CHUNK", limit)
        with Sizes() as sizes:
            got = collect(states, mask)
        assert got == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert sizes.largest_exact <= max(limit, 108) < sum(map(torch.numel, states))


# --- bootstrap --------------------------------------------------------------------------------


@pytest.mark.parametrize("exp", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_paired_interval_is_that_of_a_plain_loop(exp, weighted):
    generator = torch.Generator().manual_seed(1)
    before, after = torch.randn(2, 12, generator=generator, dtype=torch.float64).abs()
    weights = torch.arange(1, 13) if weighted else None
    counts = stats.bootstrap_counts(12, 200, seed=3).int().tolist()
    found = []
    for times in counts:
        drawn = [place for place, number in enumerate(times) for _ in range(number)]
        assert len(drawn) == 12
        total = sum(int(weights[i]) for i in drawn) if weighted else 12
        sides = [sum(float(side[i]) for i in drawn) / total for side in (before, after)]
        old, new = map(math.exp, sides) if exp else sides
        found.append(new - old)
    found.sort()
    transform = torch.exp if exp else None
    interval = paired_interval(before, after, weights, transform=transform, draws=200, seed=3)
    for bound, share in zip(interval, (0.025, 0.975), strict=True):
        place = share * 199
        low, high = found[math.floor(place)], found[math.ceil(place)]
        expected = low + (high - low) * (place - math.floor(place))
        assert bound == pytest.approx(expected, abs=1e-12)


def test_one_sample_has_no_interval():
    one = torch.ones(1)
    assert paired_interval(one, 2 * one) == (None, None)
    assert paired_interval(torch.ones(5), torch.ones(5)) == (0.0, 0.0)


def drawn_items(kind: str, generator: torch.Generator):
    """1,000 draws of 200 items: sums before and after, weights, and the true difference."""
    shape = (1000, 200)
    if kind == "accuracy":  # 0.8 before and 0.7 after, paired
        luck = torch.rand(shape, generator=generator)
        own = torch.rand(shape, generator=generator)
        before = (luck < 0.8).double()
        after = torch.where(own < 0.1, (own < 0.05).double(), (luck < 7 / 9 * 0.8 + 0.2 / 9))
        return before, after, None, None, 0.9 * (7 / 9 * 0.8 + 0.2 / 9) + 0.05 - 0.8
    common, first, second = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    if kind == "mean":
        return common + first, common + second + 0.3, None, None, 0.3
    weights = torch.randint(1, 40, (200,), generator=generator).double()
    before = weights * (1 + 0.3 * common + 0.2 * first)
    after = weights * (1.2 + 0.3 * common + 0.2 * second)
    return before, after, weights, torch.exp, math.exp(1.2) - math.exp(1)


@pytest.mark.parametrize("kind", ["mean", "accuracy", "perplexity"])
def test_95_percent_intervals_hold_the_truth_95_times_of_100(kind):
    generator = torch.Generator().manual_seed(0)
    before, after, weights, transform, truth = drawn_items(kind, generator)
    draws = paired_draws(before, after, weights, transform=transform)
    low, high = percentiles(draws)
    assert low.shape == (1000,)
    single = paired_interval(before[7], after[7], weights, transform=transform)
    assert single == pytest.approx((float(low[7]), float(high[7])))
    assert 0.93 <= float(((low <= truth) & (truth <= high)).double().mean()) <= 0.97
