"""Streaming arithmetic: the same numbers as in one batch, for any split, in any order."""

from __future__ import annotations

import math
import statistics
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pruner.stats import AngularDistances, RunningMean, RunningVariance, last_real_token

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
    assert AngularDistances(2).matrix.isnan().all()


def test_nan_is_not_lost():
    values = [torch.tensor([1.0]), torch.tensor([math.nan]), torch.tensor([2.0])]
    assert math.isnan(fed(RunningMean(), values).mean)
    assert math.isnan(fed(RunningVariance(), values).variance)


# --- angular distance -------------------------------------------------------------------------

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


def test_angles_are_averaged_not_cosines():
    """0, 90 and 120 degrees: the angle of the mean cosine would be 80.4 degrees, not 70."""
    distances = AngularDistances(2)
    ends = [[1.0, 0.0], [0.0, 1.0], [-1.0, math.sqrt(3.0)]]
    distances.update(torch.tensor([[[1.0, 0.0]] * 3, ends]))
    assert distances.matrix[0, 1].item() == pytest.approx(70 / 180)


def vectors(seed: int, samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, samples, 5, generator=generator, dtype=torch.float64)


@given(st.integers(0, 1000), SIZES)
@settings(max_examples=40, deadline=None)
def test_angles_of_parts_are_those_of_the_whole(seed, sizes):
    whole = vectors(seed, sum(sizes))
    matrix = fed(AngularDistances(4), whole.split(sizes, dim=1)).matrix
    for i in range(4):
        for j in range(4):
            angles = []
            for x, y in zip(whole[i].tolist(), whole[j].tolist(), strict=True):
                dot = sum(p * q for p, q in zip(x, y, strict=True))
                cosine = dot / math.hypot(*x) / math.hypot(*y)
                angles.append(math.acos(max(-1.0, min(1.0, cosine))) / math.pi)
            assert matrix[i, j].item() == pytest.approx(statistics.fmean(angles), abs=1e-7)
    assert torch.equal(matrix, matrix.T)
    assert (matrix.diagonal() == 0).all()
    assert matrix.min() >= 0
    assert matrix.max() <= 1


@given(st.integers(0, 100), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_angles_do_not_depend_on_length(seed, scale):
    one, other = AngularDistances(4), AngularDistances(4)
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


# --- the last real token ----------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_last_real_token_for_either_padding(lengths, left):
    """Every vector says which state, sequence and token it is; padding says -1."""
    width = max(lengths)
    states, mask = [], torch.zeros(len(lengths), width, dtype=torch.bool)
    for state in range(3):
        tensor = torch.full((len(lengths), width, 3), -1.0)
        for row, length in enumerate(lengths):
            for token in range(length):
                place = token + (width - length if left else 0)
                tensor[row, place] = torch.tensor([state, row, token])
                mask[row, place] = True
        states.append(tensor)
    want = [[[s, row, n - 1] for row, n in enumerate(lengths)] for s in range(3)]
    assert last_real_token(states, mask).tolist() == want
    assert last_real_token(states, mask.long()).tolist() == want
