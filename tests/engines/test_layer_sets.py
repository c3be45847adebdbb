"""The sets of layers that may be removed: found by counting, checked against trying them all."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pruner.engines.layer_sets import LayerSets


def allowed_sets(sets, size):
    return [one for one in combinations(sets.candidates, size) if sets.allows(one)]


@st.composite
def restricted(draw):
    """Layers of two kinds, of which an engine expects one at every position."""
    depth = draw(st.integers(2, 9))
    period = draw(st.integers(1, 4))
    kinds = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    first, last = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    candidates = range(first, max(first, depth - last))
    return LayerSets(depth, candidates, lambda i, place, n: kinds[i] == (place % period == 0))


@given(restricted(), st.data())
@settings(max_examples=150, deadline=None)
def test_sizes_and_cheapest_sets_are_those_of_trying_all(sets, data):
    some = range(1, sets.num_layers)
    every = {size: found for size in some if (found := allowed_sets(sets, size))}
    assert sets.sizes == list(every)
    weights = st.integers(-5, 5).map(float)
    costs = {layer: data.draw(weights) for layer in sets.candidates}
    layers = (
        st.sets(st.sampled_from(sets.candidates), max_size=2) if sets.candidates else st.just(set())
    )
    must, never = data.draw(layers), data.draw(layers)
    for size, found in every.items():
        fitting = [one for one in found if must <= {*one} and not never & {*one}]
        want = min((sum(costs[layer] for layer in one) for one in fitting), default=None)
        best = sets.cheapest(costs, size, must=must, never=never)
        assert (best is None) == (want is None)
        assert best is None or (best in fitting and sum(costs[layer] for layer in best) == want)


@given(restricted())
@settings(max_examples=60, deadline=None)
def test_growing_and_swapping_stay_among_the_allowed_sets(sets):
    removed = ()
    while grown := sets.grown(removed):
        sizes = [size for size in sets.sizes if size > len(removed)]
        for layer, one in grown.items():
            assert layer in one
            assert len(one) == sizes[0]
            assert sets.allows(one)
        removed = next(iter(grown.values()))
        for other in sets.swaps(removed, 1):
            assert sets.allows(other)
            assert len(other) == len(removed)
            assert other != removed


def test_without_restrictions_growing_and_swapping_take_single_layers():
    sets = LayerSets(6, range(1, 5))
    assert sets.sizes == [1, 2, 3, 4]
    assert sets.grown((2,)) == {1: (1, 2), 3: (2, 3), 4: (2, 4)}
    assert list(sets.swaps((1, 2), 1)) == [(2, 3), (2, 4), (1, 3), (1, 4)]
    assert sets.allows((0, 5)), "candidates are the caller's wish, not the engine's"


def test_a_cut_takes_the_nearest_layers_with_it():
    """Every fourth of 16 layers is another kind: only multiples of four can go from the middle."""
    sets = LayerSets(16, range(2, 14), lambda i, place, n: (i % 4 == 3) == (place % 4 == 3))
    assert sets.sizes == [4, 8, 12]
    grown = sets.grown(())
    assert (4, 5, 6, 7) in grown.values()
    assert {*range(2, 14)} == {layer for one in grown.values() for layer in one}
    again = [one for layer, one in sets.grown((4, 5, 6, 7)).items() if layer > 8]
    assert all({4, 5, 6, 7} < {*one} for one in again)


def test_runs_are_layers_that_follow_one_another():
    sets = LayerSets(8, range(1, 7), lambda i, place, n: i % 2 == place % 2, runs=True)
    assert sets.sizes == [2, 4, 6]
    assert not sets.allows((1, 2, 4, 5))
    assert sets.cheapest(dict.fromkeys(range(8), 0.0) | {1: 9.0}, 4) == (3, 4, 5, 6)


def test_a_part_of_the_model_has_the_same_sets_in_its_own_numbers():
    sets = LayerSets(8, range(1, 7), lambda i, place, n: i % 2 == place % 2)
    kept = [0, 1, 4, 5, 6, 7]
    inner = sets.within(kept)
    for size in range(1, 5):
        for removed in combinations(inner.candidates, size):
            whole = [
                index
                for index in range(8)
                if index not in {kept[i] for i in removed} and index in kept
            ]
            assert inner.allows(removed) == all(i % 2 == place % 2 for place, i in enumerate(whole))


@pytest.mark.parametrize(
    ("sizes", "text"),
    [([1, 2, 3], "from 1 to 3"), ([4, 8], "one of 4, 8"), ([], "a number that does not exist")],
)
def test_sizes_in_words(sizes, text):
    sets = LayerSets(9, range(9))
    sets.__dict__["sizes"] = sizes
    assert sets.sizes_text == text
