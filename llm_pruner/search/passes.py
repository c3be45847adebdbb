"""Cheap passes of many pruned models: prefix sharing, and reduced precision.

What a layer computes depends only on the kept layers below it, so pruned models that keep the same
layers up to some depth share all states up to there: on one batch every layer runs once per
distinct state. What it costs is counted in multiply-adds. Where the last digits do not matter, a
copy of the model in bfloat16 is measured instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from ..distributed import on_first
from ..model.forward import computed, evaluating
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy
from ..utils import count_parameters, logger

LayerSet = tuple[int, ...]  # removed layers, 0-based, ascending
T = TypeVar("T")
# What the softmax of one logit takes, in multiply-adds of a matrix product: from 45, beside a head
# of width 576 and 49,152 tokens in float32 on two cores, to 240, beside one in bfloat16.
SOFTMAX = 100
# Of all swaps of one layer the share that a search measures, and on how much of the data, about.
TRIED, SWAP_SHARE = 0.9, 0.5
SMALLEST = 2**25  # parameters of a model that is worth a copy
FASTER = 1.25  # times that a product of matrices has to be
ROWS, TRIALS = 256, 3


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


def reduced(stack: LayerStack) -> LayerStack | None:
    """The layers of a copy of the model in bfloat16; None where that would not be faster.

    A model in float32 is copied if it has at least `SMALLEST` parameters and its device is faster
    in bfloat16, which is tried out on one of its matrices. The copy takes half of its memory.
    """
    model: Any = stack.model
    kinds = {one.dtype for one in model.parameters()}
    if stack.offloaded or kinds != {torch.float32} or count_parameters(model) < SMALLEST:
        return None
    matrix = max((one for one in stack[0].parameters() if one.dim() == 2), key=torch.numel)
    if not on_first(lambda: _is_faster(matrix)):  # all processes do the same
        return None
    rough = share_copy(model)
    known: dict[int, nn.Parameter] = {}  # tied tensors stay tied
    for module in rough.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                if id(tensor) not in known:
                    half = tensor.detach().to(torch.bfloat16)
                    known[id(tensor)] = nn.Parameter(half, requires_grad=False)
                module._parameters[name] = known[id(tensor)]
    rough.config.dtype = torch.bfloat16
    found = LayerStack(rough, stack.paths[0] if len(stack.paths) == 1 else None)
    try:
        with evaluating(rough):
            finite = computed(found._probe()).isfinite().all()
    except RuntimeError as error:  # an architecture that mixes precisions
        logger.info("No measurements in bfloat16: %s", error)
        return None
    if not finite or found.can_replay != stack.can_replay:
        return None
    logger.info("Candidates are compared in bfloat16, the best of them in float32.")
    return found


def _is_faster(matrix: torch.Tensor) -> bool:
    """Whether products with a matrix are faster in bfloat16."""
    return _seconds(matrix, torch.float32) >= FASTER * _seconds(matrix, torch.bfloat16)


def _seconds(matrix: torch.Tensor, dtype: torch.dtype) -> float:
    """How long a product with a matrix takes, the best of a few trials."""
    weight = matrix.detach().to(dtype)
    rows = torch.ones(ROWS, weight.shape[1], dtype=dtype, device=weight.device)
    spent = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        float((rows @ weight.T).sum())  # waits for a GPU
        spent.append(time.perf_counter() - begin)
    return min(spent)
