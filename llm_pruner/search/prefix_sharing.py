"""Many pruned models on one batch, every layer run once per distinct state: prefix sharing.

What a layer computes depends on the kept layers below it and on nothing else, so pruned models
that keep the same layers up to some depth share all states up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

from ..model.layer_stack import LayerStack

Mask = tuple[int, ...]
T = TypeVar("T")


def replayed(
    stack: LayerStack, masks: Iterable[Mask], run: Callable[[nn.Module], T]
) -> Iterator[tuple[Mask, T]]:
    """Run the model without the layers of each mask, by as few layer executions as possible.

    The masks are the leaves of a tree that branches where a layer is removed; the tree is walked
    depth first. The input of a layer at which a later mask branches off is kept, and that mask's
    pass begins there (`LayerStack.replay`). The executions are the nodes of the tree: for every
    mask with one layer removed, half of what whole passes take. At no time are more states kept
    than the model has layers.

    Where the layers hand on more than the hidden state (`LayerStack.can_replay`) every mask
    takes a whole pass.

    Args:
        stack: the layers.
        masks: sets of 0-based layers to remove, ascending; a mask that occurs twice runs once.
        run: runs the model it is given on one batch, always the same, and returns something.

    Yields:
        Each mask with what `run` returned, in the order of the tree.
    """
    ordered = in_tree_order(masks, len(stack))
    if not stack.can_replay:

        def whole(mask: Mask) -> T:
            with stack.bypass(mask) as model:
                return run(model)

        calls = [partial(whole, mask) for mask in ordered]
        yield from zip(ordered, stack.run_all(calls, alike=True), strict=True)
        return
    forks = [_fork(*pair) for pair in pairwise(ordered)]
    states: dict[int, torch.Tensor] = {}  # layer -> what enters it, where masks to come branch off
    for number, mask in enumerate(ordered):
        start = forks[number - 1] if number else None
        wanted = _branches(forks[number:])
        begin = stack.bypass(mask) if start is None else stack.replay(start, states[start], mask)
        states = {place: state for place, state in states.items() if place in wanted}
        with begin as model, stack.observe_inputs(wanted - set(states), states.__setitem__):
            result = run(model)
        yield mask, result


def in_tree_order(masks: Iterable[Mask], depth: int) -> list[Mask]:
    """Different masks of `depth` layers, in the order in which `replayed` runs them."""
    return sorted(set(masks), key=lambda mask: _bits(mask, depth))


def executions(stack: LayerStack, ordered: Sequence[Mask]) -> list[int]:
    """How many layers `replayed` runs for each of these masks, which are in its order."""
    whole = [len(stack) - len(mask) for mask in ordered]
    if not stack.can_replay:
        return whole
    forks = [0, *(_fork(*pair) for pair in pairwise(ordered))]
    below = [sum(layer < fork for layer in mask) for mask, fork in zip(ordered, forks, strict=True)]
    return [count - (fork - gone) for count, fork, gone in zip(whole, forks, below, strict=True)]


def _bits(mask: Mask, depth: int) -> tuple[bool, ...]:
    """Which layers are removed, first layer first: the path of a mask through the tree."""
    return tuple(index in mask for index in range(depth))


def _fork(left: Mask, right: Mask) -> int:
    """The first layer that one of two different masks removes and the other does not."""
    return min(set(left) ^ set(right))


def _branches(forks: list[int]) -> set[int]:
    """Where the masks still to come branch off the present one: the falling minima of `forks`."""
    places: set[int] = set()
    for fork in forks:
        if not places or fork < min(places):
            places.add(fork)
    return places
