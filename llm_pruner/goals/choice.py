"""The choice of layers that meets all goals, or what can be reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..data.items import EvalItem
from ..data.sampling import split_items
from ..errors import InvalidPlanError
from ..model.layer_stack import LayerStack
from ..utils import counted
from .budget import Budget, Removable
from .drops import Drops
from .targets import Gauge, Goals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Choose: TypeAlias = Callable[[int], Sequence[int]]  # a strategy's choice of so many layers


@dataclass(frozen=True)
class Conditions:
    """What a choice has to meet beyond a number of layers.

    Attributes:
        goals: what the pruned model has to be, if anything.
        drops: by how much its quality may drop, if that is limited.
        items: what to choose on: half of the items where the others check the drops.
    """

    goals: Goals | None
    drops: Drops | None
    items: Sequence[EvalItem]

    @classmethod
    def of(
        cls,
        budget: Budget,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        removable: Removable,
        items: Sequence[EvalItem],
        *,
        batch_size: int,
        max_length: int,
    ) -> Conditions:
        """The conditions of a budget.

        Raises:
            InvalidPlanError: they cannot be measured on such a model or such data.
        """
        goals = goals_of(budget, stack, tokenizer, removable, batch_size)
        if not budget.limits:
            return cls(goals, None, items)
        choosing, checking = split_items(items, 0.5)
        how: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        how["confident"] = budget.confident
        return cls(goals, Drops(stack, tokenizer, checking, budget.limits, **how), choosing)

    def __bool__(self) -> bool:
        return self.goals is not None or self.drops is not None

    def choose(self, budget: Budget, removable: Removable, choose: Choose) -> list[int]:
        """The choice that meets them; see `choose_within`."""
        sizes, count = removable.sets.sizes, budget.count(removable)
        return choose_within(self.goals, self.drops, count, sizes, choose)

    def forecast(self, removed: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        """What was asked and what it will be, for the record of a plan; nothing without any."""
        found = self.goals.forecast(removed) if self.goals else []
        found += self.drops.forecast(removed) if self.drops else []
        return {"goals": found} if found else {}


def goals_of(
    budget: Budget,
    stack: LayerStack,
    tokenizer: PreTrainedTokenizerBase,
    removable: Removable,
    batch_size: int,
) -> Goals | None:
    """What a budget asks of the pruned model as a whole, if anything."""
    if not budget.targets:
        return None
    sizes, candidates = removable.sets.sizes, list(removable.candidates)
    some = removable.cheapest({layer: layer % 2 for layer in candidates}, sizes[len(sizes) // 2])
    gauge = Gauge(stack, tokenizer, batch_size, budget.context, budget.speedup_of, some)
    return Goals.of(budget.targets, gauge, sizes, candidates)


def choose_within(
    goals: Goals | None,
    drops: Drops | None,
    count: int | None,
    sizes: Sequence[int],
    choose: Choose,
) -> list[int]:
    """The choice that meets the goals and keeps the drops within their limits.

    Args:
        goals, drops: what is asked for.
        count: a number of layers that was asked for beside them.
        sizes: the numbers of layers that can go.
        choose: a strategy's choice of so many layers.

    Raises:
        InvalidPlanError: no choice does; the message says what can be reached.
    """
    if drops is not None and goals is None and count is None:
        size = largest_that_holds(sizes, choose, drops.holds)
        if size is None:
            first = list(choose(sizes[0]))
            raise InvalidPlanError(
                f"No layer can go within max_drop: without {first} {drops.said(first)}. Allow "
                "more, or give more items (--n-samples), which tell smaller drops."
            )
        return list(choose(size))
    least = 1 if goals is None else goals.count()
    if count is not None and least > count:
        raise InvalidPlanError(
            f"n_layers={count} does not reach the goals, which take at least {least} layers."
        )
    removed = _first_that_meets(goals, count, [n for n in sizes if n >= (count or least)], choose)
    if drops is None or drops.holds(removed):
        return removed
    fewer = [size for size in sizes if size < len(removed)]
    good = largest_that_holds(fewer, choose, drops.holds)
    reachable = "no layer can go"
    if good is not None:
        reached = f", which leaves {goals.text(choose(good))}" if goals else ""
        reachable = f"{counted(good, 'layer')} can go{reached}"
    raise InvalidPlanError(
        f"{counted(len(removed), 'layer')} would have to go, and then {drops.said(removed)}. "
        f"Within max_drop {reachable}."
    )


def _first_that_meets(
    goals: Goals | None, count: int | None, sizes: Sequence[int], choose: Choose
) -> list[int]:
    """The choice of the smallest number of layers that meets the goals."""
    if goals is None:
        return list(choose(sizes[0]))
    removed: list[int] = []
    for size in sizes:
        removed = list(choose(size))
        if not goals.unmet(removed):
            return removed
        if len(removed) < size or count is not None:  # a tolerance, or a number, allows no more
            break
    raise InvalidPlanError(
        f"The goals are not reached: without layers {removed}, the choice of {len(removed)}, the "
        f"model has {goals.text(removed)}. Ask for less, or allow a greater loss."
    )


def largest_that_holds(
    sizes: Sequence[int], choose: Choose, holds: Callable[[Sequence[int]], bool]
) -> int | None:
    """The largest number of layers whose choice holds; None if none does.

    Numbers are doubled until one does not hold, and halved between: drops are taken to grow with
    the number of layers.
    """
    good, bad = -1, len(sizes)
    place = 0
    while good + 1 < bad:
        if holds(choose(sizes[place])):
            good = place
        else:
            bad = place
        place = (good + bad) // 2 if bad < len(sizes) else min(2 * good + 1, len(sizes) - 1)
    return sizes[good] if good >= 0 else None
