"""Many pruned models on one batch, every layer run once per distinct state: prefix sharing.

What a layer computes depends only on the kept layers below it, so pruned models that keep the same
layers up to some depth share all states up to there. What it costs is counted in multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import nn

from ..model.layer_stack import LayerStack

LayerSet = tuple[int, ...]  # removed layers, 0-based, ascending
T = TypeVar("T")
# What the softmax of one logit takes, in multiply-adds of a matrix product: from 45, beside a head
# of width 576 and 49,152 tokens in float32 on two cores, to 240, beside one in bfloat16.
SOFTMAX = 100
# Of all swaps of one layer the share that a search measures, and on how much of the data, about.
TRIED, SWAP_SHARE = 0.9, 0.5


def replayed(
    stack: LayerStack, layer_sets: Iterable[LayerSet], run: Callable[[nn.Module], T]
) -> Iterator[tuple[LayerSet, T]]:
    """Run the model without each set of layers, in as few layer executions as possible.

    The sets are the leaves of a tree that branches where a layer is removed; the tree is walked
    depth first. The input of a layer at which a later set branches off is kept, and that set's
    pass begins there (`LayerStack.replay`). The executions are the nodes of the tree: for single
    removals of every layer, half of what whole passes take. Never more states are kept than the
    model has layers.

    Where layers hand on more than the hidden state (`LayerStack.can_replay`), every set takes a
    whole pass.

    Args:
        stack: the layers.
        layer_sets: layers to remove; a set that occurs twice runs once.
        run: runs the model it is given, always on the same batch, and returns a result.

    Yields:
        Each set with what `run` returned, in the order of the tree: no removals come first.
    """
    ordered = in_tree_order(layer_sets, len(stack))
    if not stack.can_replay:

        def whole(removed: LayerSet) -> T:
            with stack.bypass(removed) as model:
                return run(model)

        calls = [partial(whole, removed) for removed in ordered]
        yield from zip(ordered, stack.run_all(calls, alike=True), strict=True)
        return
    forks = [_fork(*pair) for pair in pairwise(ordered)]
    states: dict[int, torch.Tensor] = {}  # layer -> its input, where sets to come branch off
    for number, removed in enumerate(ordered):
        # Where the sets to come branch off this one: the falling minima of their forks.
        wanted = set(accumulate(forks[number:], min))
        begin = stack.bypass(removed)
        if number:
            begin = stack.replay(forks[number - 1], states[forks[number - 1]], removed)
        states = {index: state for index, state in states.items() if index in wanted}
        with begin as model, stack.observe_inputs(wanted - set(states), states.__setitem__):
            result = run(model)
        yield removed, result


def in_tree_order(layer_sets: Iterable[LayerSet], depth: int) -> list[LayerSet]:
    """The different sets, for a model of `depth` layers, in the order in which `replayed` runs."""

    def path(removed: LayerSet) -> list[bool]:
        return [index in removed for index in range(depth)]

    return sorted(set(layer_sets), key=path)


def executions(stack: LayerStack, ordered: Sequence[LayerSet]) -> list[int]:
    """How many layers `replayed` runs for each of these sets, which are in its order."""
    if not stack.can_replay:
        return [len(stack) - len(removed) for removed in ordered]
    forks = [0, *(_fork(*pair) for pair in pairwise(ordered))]
    return [
        len(stack) - fork - sum(layer >= fork for layer in removed)
        for removed, fork in zip(ordered, forks, strict=True)
    ]


def _fork(left: LayerSet, right: LayerSet) -> int:
    """The first layer that one of two different sets removes and the other does not."""
    return min(set(left) ^ set(right))


@dataclass(frozen=True)
class TokenCost:
    """Multiply-adds that a token costs.

    Attributes:
        layer: in one layer, the mean of all.
        head: behind the layers, if it is scored.
        depth: how many layers there are.
    """

    layer: float
    head: float
    depth: int

    @classmethod
    def of(cls, stack: LayerStack, *, compares: bool = False) -> TokenCost:
        """From the numbers of parameters; that attention looks back is left out.

        Args:
            compares: whether logits are compared with the full model's, another softmax each.
        """
        sizes = [sum(one.numel() for one in layer.parameters()) for layer in stack]
        find_head = getattr(stack.model, "get_output_embeddings", lambda: None)
        weight = getattr(find_head(), "weight", None)
        head = (
            0.0
            if weight is None
            else weight.shape[0] * (weight.shape[-1] + (1 + compares) * SOFTMAX)
        )
        return cls(max(1.0, sum(sizes) / len(sizes)), float(head), len(stack))

    def of_pass(self, layers: int) -> float:
        """A pass through so many layers and the head."""
        return layers * self.layer + self.head

    def of_naive_greedy(self, candidates: int, count: int) -> float:
        """Greedy search for `count` layers by whole passes, one per set (SLEB), of one token.

        Every round runs the cut model without each candidate that is left; the full model runs
        once.
        """
        rounds = range(min(count, candidates))
        cuts = sum((candidates - cut) * self.of_pass(self.depth - cut - 1) for cut in rounds)
        return self.of_pass(self.depth) + cuts

    def of_search(
        self, candidates: int, count: int, shares: Sequence[float], *, replays: bool
    ) -> float:
        """What `LayerSearch` takes for `count` layers, per token of the data, about.

        Args:
            shares: of the data that is in each of its growing subsets, the last of them 1.
            replays: whether passes begin where sets of layers differ, half way on average.
        """
        each = self.of_pass(self.depth // 2 if replays else self.depth)
        steps = [share - before for before, share in pairwise([0.0, *shares])]
        cuts = 0.0
        for cut in range(count):
            widths = [candidates if not cut else max(8, (candidates - cut) // 2), 8, 4, 2]
            cuts += sum(width * step for width, step in zip(widths, steps, strict=False))
        swaps = TRIED * count * (candidates - count) + candidates
        return 2 * self.of_pass(self.depth) + each * (cuts + swaps * SWAP_SHARE)
