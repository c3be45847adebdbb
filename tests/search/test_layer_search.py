"""The search: greedy cuts, swaps, limits, on made-up costs and on small models."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from conftest import items, tiny_llama

from llm_pruner.errors import InvalidPlanError, UnsupportedModelError
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.search import moves
from llm_pruner.search.layer_search import depth_curve, search_layers, single_removals
from llm_pruner.search.moves import ROUNDING, WIDTHS, LayerSearch
from llm_pruner.search.removal_quality import RemovalQuality, TimeIsUp


class Stack(list):
    """Layers in name only."""

    can_replay = True


class Costs:
    """A quality made of costs per layer and per set, with noise on all but all of the samples.

    Args:
        costs: what each layer costs.
        sets: what sets of layers cost on top when they are removed together.
        noise: standard deviation of a sample around the true cost.
        samples: how many there are, in blocks of 16.
    """

    def __init__(self, costs, sets=None, noise=0.0, samples=16):
        self.stack, self.costs, self.sets, self.noise = Stack(costs), costs, sets or {}, noise
        self.blocks = samples // 16
        self.asked: list[tuple[tuple[int, ...], int]] = []  # layer_set, samples
        self.impossible: set[int] = set()
        self.work, self.deadline = 0.0, None

    @property
    def can_bypass(self):
        return self.stack.can_replay

    def refusal(self, layer_set):
        return "these cannot go" if self.impossible & set(layer_set) else ""

    def subsets(self, turn=0):
        order = [(turn + block) % self.blocks for block in range(self.blocks)]
        sizes = [size for size in (1, 2, 4, 8, 16) if size < self.blocks] + [self.blocks]
        return [tuple(sorted(order[:size])) for size in sizes]

    def size(self, subset=None):
        return 16 * (self.blocks if subset is None else len(subset))

    def work_for(self, layer_sets, subset=None):
        return 0.0

    def measure(self, layer_sets, subset=None, label=""):
        self.asked += [(layer_set, self.size(subset)) for layer_set in layer_sets]

    def values(self, layer_set, subset=None):
        true = -sum(self.costs[layer] for layer in layer_set)
        true -= sum(cost for extra, cost in self.sets.items() if set(extra) <= set(layer_set))
        if not self.noise:
            return torch.full((self.size(subset),), true, dtype=torch.float64)
        generator = torch.Generator().manual_seed(hash(layer_set))
        noise = torch.randn(self.blocks, 16, generator=generator, dtype=torch.float64)
        noise -= noise.mean()  # on all samples the cost is the true one
        return true + self.noise * noise[list(subset or range(self.blocks))].flatten()

    def change(self, layer_set, subset=None):
        return float(self.values(tuple(sorted(layer_set)), subset).mean())

    def gap(self, left, right, subset):
        paired = self.values(left, subset) - self.values(right, subset)
        rest = 1 - len(subset) / self.blocks
        return float(paired.mean()), math.sqrt(float(paired.var()) / len(paired) * rest)


COSTS = [0.10, 0.02, 0.01, 0.04, 0.02, 0.50]


def random_costs(seed: int, layers: int, **options) -> Costs:
    """Costs in which pairs and triples of layers interact, in both directions."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(layers, generator=generator).tolist()
    sets = {
        group: float(torch.randn((), generator=generator)) * 0.3
        for size in (2, 3)
        for group in itertools.combinations(range(layers), size)
        if float(torch.rand((), generator=generator)) < 0.4
    }
    return Costs(costs, sets, **options)


def slow_greedy(quality, candidates, n_layers):
    removed: tuple[int, ...] = ()
    for _ in range(n_layers):
        grown = [(*removed, layer) for layer in candidates if layer not in removed]
        removed = tuple(sorted(max(grown, key=lambda one: (quality.change(one), one))))
    return removed


def swaps(removed, candidates, size=1):
    for out in itertools.combinations(removed, size):
        for back in itertools.combinations(set(candidates) - set(removed), size):
            yield tuple(sorted({*removed, *back} - set(out)))


def cuts(quality, *args, **options):
    """The layers in the order in which they were cut."""
    steps: list[dict] = []
    search_layers(quality, *args, **options, on_step=steps.append)
    return [step["layer"] for step in steps if step["action"] == "cut" and step["kept"]]


def test_a_cut_sees_that_two_layers_need_each_other():
    """2 and 4 are cheap alone and dear together: the one-shot choice would take both."""
    steps: list[dict] = []
    quality = Costs(COSTS, {(2, 4): 1.0})
    assert search_layers(quality, range(6), n_layers=2, on_step=steps.append) == [1, 2]
    assert [step["layer"] for step in steps] == [2, 1]
    assert steps[1]["tried"]["4"] == pytest.approx(-1.03)
    assert steps[1]["change"] == pytest.approx(-0.03)


def test_of_equals_the_deeper_goes_first():
    assert cuts(Costs([0.1] * 5), range(5), n_layers=2) == [4, 3]


@pytest.mark.parametrize("seed", range(20))
def test_with_few_samples_a_cut_is_the_plain_greedy_one(seed):
    quality = random_costs(seed, 9)
    search = LayerSearch(quality, range(9))
    removed: tuple[int, ...] = ()
    for count in range(1, 6):
        removed, _ = search.grow(removed)
        assert removed == slow_greedy(quality, range(9), count)


def test_with_many_samples_most_candidates_are_measured_on_few():
    costs = [0.05 * layer for layer in range(32)]
    quality = Costs(costs, noise=0.02, samples=256)
    search = LayerSearch(quality, range(32))
    removed, _ = search.grow(())
    first = len(quality.asked)
    removed, _ = search.grow(removed)
    assert removed == (0, 1)
    counts = {size: sum(n == size for _, n in quality.asked[:first]) for size in (16, 32, 64, 128)}
    assert counts == {16: 1 + 32, 32: 1 + WIDTHS[0], 64: 1 + WIDTHS[1], 128: 1 + WIDTHS[2]}
    better_half = [layer_set for layer_set, n in quality.asked[first:] if n == 16]
    assert len(better_half) == 1 + 16


def test_the_order_of_candidates_does_not_matter():
    """Nor is the last candidate tried the one that is taken."""
    for order in itertools.permutations(range(4)):
        quality = Costs([0.3, 0.1, 0.2, 0.4], {(0, 1): -0.35})
        assert search_layers(quality, order, n_layers=2) == [0, 1]


def test_a_swap_mends_what_greedy_cannot_see():
    """2 is the cheapest alone; the best pair is 0 and 1, which make good for each other."""
    quality = Costs([0.2, 0.2, 0.1, 0.3], {(0, 1): -0.3})
    steps: list[dict] = []
    assert slow_greedy(quality, range(4), 2) == (1, 2)
    assert search_layers(quality, range(4), n_layers=2, on_step=steps.append) == [0, 1]
    last = steps[-1]
    assert (last["action"], last["out"], last["in"]) == ("exchange", [2], [0])
    assert last["change"] == pytest.approx(-0.1)
    assert last["removed"] == [0, 1]
    assert json.loads(json.dumps(steps)) == steps


def test_two_layers_are_swapped_where_one_alone_is_no_better():
    quality = Costs([0.2, 0.2, 0.1, 0.1, 0.9], {(0, 1): -0.35})
    assert slow_greedy(quality, range(5), 2) == (2, 3)
    assert all(quality.change(layer_set) < -0.2 for layer_set in swaps((2, 3), range(5)))
    assert search_layers(quality, range(5), n_layers=2) == [0, 1]


@pytest.mark.parametrize("samples", [16, 256])
@pytest.mark.parametrize("seed", range(25))
def test_no_swap_improves_the_result_and_greedy_is_no_better(seed, samples):
    quality = random_costs(seed, 9, noise=0.02, samples=samples)
    for n_layers in (2, 4):
        steps: list[dict] = []
        found = tuple(search_layers(quality, range(9), n_layers=n_layers, on_step=steps.append))
        exact = random_costs(seed, 9)
        rivals = [*swaps(found, range(9)), *swaps(found, range(9), 2)]
        assert max(map(exact.change, rivals)) <= exact.change(found) + 1e-12
        assert exact.change(found) >= exact.change(slow_greedy(exact, range(9), n_layers)) - 1e-12
        again: list[dict] = []
        search_layers(quality, range(9), n_layers=n_layers, on_step=again.append)
        assert again == steps, "the same every time"


def test_a_swap_for_an_equal_is_not_made():
    steps: list[dict] = []
    search = LayerSearch(Costs([0.1] * 4), range(4), steps.append)
    assert search.refine((0,)) == (0,)
    assert search.refine((0, 1)) == (0, 1)
    assert steps == []


def test_too_many_swaps_of_two_are_left_out():
    quality = Costs([0.01 * layer for layer in range(40)])
    LayerSearch(quality, range(40)).refine(tuple(range(12)))
    assert {len(set(layer_set) - set(range(12))) for layer_set, _ in quality.asked} == {0, 1}


def test_rivals_that_are_clearly_worse_are_not_measured_on_all_samples():
    quality = Costs([0.1 * layer for layer in range(20)], noise=0.05, samples=256)
    champion = (0, 1, 2)
    assert LayerSearch(quality, range(20)).refine(champion) == champion
    on_all = {layer_set for layer_set, samples in quality.asked if samples == 256}
    assert len(on_all) < 10
    assert sum(samples == 16 for _, samples in quality.asked) >= 3 * 17


class Rough(Costs):
    """The same costs, each a little off, as in reduced precision."""

    def change(self, layer_set, subset=None):
        off = torch.rand((), generator=torch.Generator().manual_seed(hash(tuple(layer_set)) % 997))
        return super().change(layer_set, subset) + ROUNDING * (float(off) - 0.5)


@pytest.mark.parametrize("seed", range(10))
def test_with_a_rough_measure_the_last_word_is_the_exact_ones(seed):
    """No swap improves the result by more than what rounding hides, and few sets are exact."""
    exact = random_costs(seed, 12, samples=256)
    rough = Rough(exact.costs, exact.sets, samples=256)
    steps: list[dict] = []
    found = search_layers(exact, range(12), n_layers=4, rough=rough, on_step=steps.append)
    best = max(map(exact.change, swaps(tuple(found), range(12))))
    assert best <= exact.change(found) + ROUNDING
    changes = [step["change"] for step in steps if step["action"] == "exchange"]
    assert changes == sorted(changes), "every swap is better in full precision"
    assert len(set(exact.asked)) < len(set(rough.asked)) / 4


def test_swaps_that_promise_most_come_first_and_hopeless_ones_never():
    """Costs that add up: what halves of swaps say is true, and one swap of many is needed."""
    quality = Costs([0.1 * layer for layer in range(30)], samples=256)
    search = LayerSearch(quality, range(30))
    assert search.refine((0, 1, 2, 29)) == (0, 1, 2, 3)
    exchanged = {one for one, _ in quality.asked if len(one) == 4}
    assert len(exchanged) < 50, "of 104 swaps in each of two rounds"


def test_the_set_of_lowest_scores_is_the_first_result_and_a_rival():
    """Greedy takes 2 first; 0 and 1 together are free, and the scores say so."""
    quality = Costs([0.5, 0.5, 0.1, 0.1, 0.2], {(0, 1): -1.0})
    steps: list[dict] = []
    scores = dict(enumerate([1.0, 2.0, 3.0, 4.0, 5.0]))
    found = search_layers(
        quality, range(5), n_layers=2, scores=scores, on_step=steps.append, work=-1
    )
    assert found == [0, 1]
    assert (steps[0]["action"], steps[0]["removed"]) == ("start", [0, 1])
    assert [step["action"] for step in steps] == ["start", "cut", "cut", "exchange", "stop"]
    assert "plain greedy" in steps[-1]["why"]


class Clock(Costs):
    """Costs that may be measured so many times."""

    def __init__(self, times, *args, **options):
        super().__init__(*args, **options)
        self.left, self.deadline = times, 1.0

    def measure(self, layer_sets, subset=None, label=""):
        self.left -= 1
        if self.left < 0 and self.deadline is not None:
            raise TimeIsUp
        super().measure(layer_sets, subset, label)

    def work_for(self, layer_sets, subset=None):
        return 1.0


@pytest.mark.parametrize("times", range(1, 40))
def test_when_the_time_is_up_there_is_a_whole_set(times):
    """The layers cut so far with others, by score or by what they cost, or the first result."""
    quality = Clock(times, [0.1 * layer for layer in range(9)], samples=64)
    scores = {layer: abs(layer - 4.1) for layer in range(9)}  # 4, 5, 3, 6, ...
    steps: list[dict] = []
    found = search_layers(quality, range(9), n_layers=3, scores=scores, on_step=steps.append)
    cut = [step["layer"] for step in steps if step["action"] == "cut"]
    by_score = [layer for layer in sorted(scores, key=scores.get) if layer not in cut]
    filled = cut + by_score[: 3 - len(cut)]
    assert len(found) == 3
    assert {*cut} <= {*found} or found == [3, 4, 5]
    assert sum(found) <= sum(filled), "a layer costs a tenth of its number"
    if cut:  # which the first cut has measured
        assert found == [0, 1, 2]
    stopped = [step for step in steps if step["action"] == "stop"]
    assert len(stopped) == (quality.left < 0)
    for step in stopped:
        assert step["removed"] == found
        assert ("after" in step["why"]) == (len(cut) < 3)


def test_without_scores_too_little_time_is_an_error():
    with pytest.raises(InvalidPlanError, match="time is up before 3 layers were found: allow"):
        search_layers(Clock(0, [0.1] * 9), range(9), n_layers=3)


@pytest.mark.parametrize(
    ("tolerance", "want", "kept"),
    [
        (0.0, [], [False]),
        (0.005, [], [False]),
        (0.01, [2], [True, False]),
        (0.029, [2], [True, False]),
        (0.035, [2, 4], [True, True, False]),
        (0.06, [1, 2, 4], [True, True, True, False]),
        (9.0, [0, 1, 2, 3, 4], [True] * 5),
    ],
)
def test_the_search_stops_at_the_tolerance(tolerance, want, kept):
    """The limit is on the total: 0.01, 0.03, 0.05, 0.09, ... and the cut beyond is undone."""
    steps: list[dict] = []
    assert search_layers(Costs(COSTS), range(6), tolerance=tolerance, on_step=steps.append) == want
    assert [step["kept"] for step in steps if step["action"] == "cut"] == kept
    assert steps[-1]["removed"] == want


def test_a_cut_beyond_the_tolerance_is_saved_by_an_swap():
    """Greedy: 2 (0.1), then at best 0.3; together 0 and 1 cost 0.1."""
    quality = Costs([0.2, 0.2, 0.1, 0.9], {(0, 1): -0.3})
    assert search_layers(quality, range(4), tolerance=0.15) == [0, 1]
    assert search_layers(quality, range(4), tolerance=0.05) == []


def test_swaps_that_could_not_save_a_cut_are_not_kept():
    """What an interrupted run would take is the last kept step: it must be within the limit."""
    steps: list[dict] = []
    quality = Costs([0.2, 0.2, 0.1, 0.9], {(0, 1): -0.15})
    assert search_layers(quality, range(4), tolerance=0.15, on_step=steps.append) == [2]
    assert any(step["action"] == "exchange" for step in steps)
    assert all(step["change"] >= -0.15 for step in steps if step["kept"])


def every_other(index, place, count):
    """Two kinds of layers in turn, also of those that are kept."""
    return index % 2 == place % 2


def allowed(removed, layers):
    kept = [index for index in range(layers) if index not in removed]
    return all(every_other(index, place, len(kept)) for place, index in enumerate(kept))


@pytest.mark.parametrize(
    ("tolerance", "want"), [(0.02, []), (0.035, [1, 2]), (0.11, [1, 2]), (0.13, [1, 2, 3, 4])]
)
def test_a_cut_takes_as_many_layers_as_an_engine_demands(tolerance, want):
    """Pairs of layers of both kinds, or the last one alone, which is dear here."""
    quality, steps = Costs([0.3, 0.01, 0.02, 0.03, 0.06, 0.5]), []
    options = {"tolerance": tolerance, "fits": every_other, "on_step": steps.append}
    assert search_layers(quality, range(5), **options) == want
    assert [len(step["layers"]) for step in steps if step["action"] == "cut"][:1] == [2]
    assert all(allowed(step["removed"], 6) for step in steps)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_layers", [2, 4])
def test_the_best_set_that_an_engine_computes_right_is_found(seed, n_layers):
    quality = random_costs(seed, 8)
    sets = filter(lambda one: allowed(one, 8), itertools.combinations(range(1, 7), n_layers))
    best = max(map(quality.change, sets))
    found = search_layers(quality, range(1, 7), n_layers=n_layers, fits=every_other)
    assert allowed(found, 8)
    assert quality.change(found) == pytest.approx(best)


@pytest.mark.parametrize("tolerance", [math.nan, -0.1])
def test_an_impossible_tolerance_is_refused(tolerance):
    with pytest.raises(InvalidPlanError, match=f"tolerance={tolerance}"):
        search_layers(Costs(COSTS), range(6), tolerance=tolerance)


@pytest.mark.parametrize(("tolerance", "want"), [(0.06, [2, 4]), (0.02, [2])])
def test_a_number_and_a_tolerance_hold_together(tolerance, want):
    assert search_layers(Costs(COSTS), range(6), tolerance=tolerance, n_layers=2) == want


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_exactly_so_many_candidates_go(n_layers):
    quality = Costs(COSTS)
    removed = search_layers(quality, [0, 3, 5], n_layers=n_layers)
    assert removed == {1: [3], 2: [0, 3], 3: [0, 3, 5]}[n_layers]
    assert all(set(layer_set) <= {0, 3, 5} for layer_set, _ in quality.asked)


def test_at_least_one_layer_stays_and_no_candidates_are_no_steps():
    assert search_layers(Costs(COSTS), range(6)) == [0, 1, 2, 3, 4]
    steps: list[dict] = []
    assert search_layers(Costs(COSTS), [], tolerance=0.1, on_step=steps.append) == []
    assert steps == []


@pytest.mark.parametrize("n_layers", [0, -1, 4, 1.5, True])
def test_impossible_numbers_are_refused(n_layers):
    with pytest.raises(InvalidPlanError, match=f"n_layers={n_layers} must be from 1 to 3"):
        search_layers(Costs(COSTS), [1, 2, 3], n_layers=n_layers)


@pytest.mark.parametrize("can_replay", [True, False])
def test_sets_that_cannot_be_removed_are_passed_over(can_replay):
    """2 is the cheapest, and cannot go; where measuring it might fail it is not even measured."""
    quality = Costs(COSTS)
    quality.impossible = {2}
    quality.stack.can_replay = can_replay
    assert search_layers(quality, range(6), n_layers=2) == [1, 4]
    assert can_replay or all(2 not in layer_set for layer_set, _ in quality.asked)


@pytest.mark.parametrize("can_replay", [True, False])
def test_the_reason_is_told_if_nothing_can_go(can_replay):
    quality = Costs(COSTS)
    quality.impossible = set(range(6))
    quality.stack.can_replay = can_replay
    with pytest.raises(UnsupportedModelError, match=r"No further layer.*\[\]: these cannot go"):
        search_layers(quality, range(6), n_layers=2)


def test_a_layer_that_cannot_go_has_no_score():
    quality = Costs(COSTS)
    quality.impossible, quality.stack.can_replay = {4}, False
    with pytest.raises(UnsupportedModelError, match="Layer 4 has no score: these cannot go"):
        single_removals(quality, range(6))
    assert single_removals(quality, range(4))[2] == pytest.approx(-0.01)


@pytest.mark.parametrize("samples", [16, 128, 256])
def test_sets_that_cannot_be_removed_leave_their_place_to_others(samples):
    """However few candidates are left after the subsets of the samples."""
    quality = Costs([0.05 * layer for layer in range(12)], samples=samples)
    quality.impossible = {0, 1}
    assert search_layers(quality, range(12), n_layers=2) == [2, 3]


@pytest.mark.parametrize("samples", [16, 256])
def test_a_refused_swap_leaves_its_place_to_the_next(samples):
    quality = Costs([0.5, 0.3, 0.2, 0.1], samples=samples)
    quality.impossible = {3}
    assert LayerSearch(quality, range(4)).refine((0,)) == (2,)


def test_a_tolerance_ends_where_no_further_layer_can_go():
    quality = Costs([0.1] * 6)
    quality.impossible = {0, 1, 2, 3}
    assert search_layers(quality, range(6), tolerance=9.0) == [4, 5]


def test_an_interrupted_search_has_told_its_steps():
    quality, steps = Costs(COSTS), []

    def note(step):
        steps.append(step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_layers(quality, range(6), n_layers=4, on_step=note)
    assert [step["removed"] for step in steps] == [[2], [2, 4]]


def test_a_curve_has_a_refined_set_for_every_depth():
    """Alone 2 is the best, of pairs 0 and 1: the sets are not nested."""
    quality = Costs([0.2, 0.2, 0.1, 0.3], {(0, 1): -0.3})
    assert depth_curve(quality, range(4), 3) == [(2,), (0, 1), (0, 1, 2)]
    with pytest.raises(InvalidPlanError, match="n_layers=4 must be from 1 to 3"):
        depth_curve(quality, range(4), 4)


def test_the_search_on_a_model_finds_the_best_of_all_sets(tokenizer):
    """48 items, so that candidates are compared on subsets of them."""
    data = items(48)
    quality = RemovalQuality(LayerStack(tiny_llama()), tokenizer, data)
    assert len(quality.subsets()) > 1
    found = search_layers(quality, range(8), n_layers=3)
    searched = quality.measured
    best = max(itertools.combinations(range(8), 3), key=quality.change)
    assert found == list(best)
    assert quality.measured > searched


def test_single_removals_are_measured_in_one_run():
    quality = Costs(COSTS)
    changes = single_removals(quality, [4, 2])
    assert quality.asked == [((4,), 16), ((2,), 16)]
    assert list(changes.items()) == [(4, quality.change([4])), (2, quality.change([2]))]


def test_the_time_left_counts_what_is_being_measured(tokenizer, monkeypatch):
    """A measurement may take most of a search: what it has done so far counts, too."""
    now = [100.0]
    monkeypatch.setattr(moves.time, "monotonic", lambda: now[0])
    quality = RemovalQuality(LayerStack(tiny_llama()), tokenizer, items(8))
    search = moves.LayerSearch(quality, range(1, 7))
    search.wanted = 2
    assert search.note() == ""
    now[0] += 30
    quality.under_way = search._expected() / 4
    assert search.note() == "about 1 min 30 s left to the end of the search"
    quality.measure([(3,)])
    assert (quality.under_way, quality.work > 0) == (0, True)
