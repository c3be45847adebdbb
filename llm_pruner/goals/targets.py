"""Goals for size, speed and memory, and the number of layers that they need.

What a model without layers will be is read from the model itself: sizes exactly, speed from timed
generations. How many layers that takes is said before a search.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..checkpoint.gguf import GgufModel, read_gguf_model
from ..errors import InvalidPlanError
from ..evaluation.cost_comparison import cache_bytes, speedup
from ..model.layer_stack import LayerStack
from ..report.summary import CACHED, PARAMETERS, SPEEDUP, figure
from ..storage.origin import gguf_of
from ..utils import count_bytes, count_parameters, counted, logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Gauge:
    """What a model is without layers: its size, speed and memory.

    Args:
        stack: the layers of the full model.
        tokenizer: its tokenizer.
        batch_size: sequences that are generated together where speed is timed.
        context: tokens of the cache.
        speedup_of: ``decode`` or ``prefill``.
        some: layers to time the model without.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        context: int,
        speedup_of: str,
        some: Sequence[int],
    ) -> None:
        self.stack, self.tokenizer, self.some = stack, tokenizer, some
        self.batch_size, self.context, self.speedup_of = batch_size, context, speedup_of

    def value(self, goal: str, removed: Collection[int]) -> float:
        """The figure that a goal is about, of the model without the layers `removed`."""
        if goal in PARAMETERS:
            return self._sum(removed, lambda one: one.numel())
        if goal == SPEEDUP:
            return 1 / (1 - len(removed) * self.share_of_layer)
        return self._bytes(removed) + (self._cache(removed) if goal == CACHED else 0)

    def exactly(self, goal: str, removed: Collection[int]) -> float:
        """The same from the model as it will be: a removal may slice more than the layers."""
        if self.stack.offloaded or goal == SPEEDUP or not removed:
            return self.value(goal, removed)
        pruned = self.stack.remove(removed)
        if goal in PARAMETERS:
            return count_parameters(pruned)
        size = self._stored(removed) if self._files else count_bytes(pruned)
        return size + (cache_bytes(pruned) * self.context if goal == CACHED else 0)

    @cached_property
    def _files(self) -> GgufModel | None:
        paths = gguf_of(self.stack.model)
        return read_gguf_model(paths) if paths else None

    def _stored(self, removed: Collection[int]) -> float:
        assert self._files is not None
        names, tensors = self._files.names, self._files.checkpoint.tensors
        return sum(one.size for one in tensors.values() if names.index(one.name) not in removed)

    def _bytes(self, removed: Collection[int]) -> float:
        if self._files:
            return self._stored(removed)
        return self._sum(removed, lambda one: one.numel() * one.element_size())

    def _sum(self, removed: Collection[int], size: Callable[[Any], float]) -> float:
        """A size of the parameters that are left, each shared tensor counted once."""
        return sum(size(one) for one, layers in self._parameters if not layers <= set(removed))

    @cached_property
    def _parameters(self) -> list[tuple[Any, set[int | None]]]:
        """Every parameter, and the layers that it is in; None for the rest of the model."""
        found: dict[int, tuple[Any, set[int | None]]] = {}
        for name, one in self.stack.model.named_parameters(remove_duplicate=False):
            found.setdefault(id(one), (one, set()))[1].add(self.stack.names.index(name))
        return list(found.values())

    def _cache(self, removed: Collection[int]) -> float:
        return self._cache_of_layer * (len(self.stack) - len(removed)) * self.context

    @cached_property
    def _cache_of_layer(self) -> float:
        return cache_bytes(self.stack.model) / len(self.stack)

    @cached_property
    def share_of_layer(self) -> float:
        """The share of the time of a token that a layer takes, from the model without some.

        Raises:
            InvalidPlanError: the model is no faster without them.
        """
        logger.info("Timing the model with and without %d layers", len(self.some))
        both = self.stack.model, self.stack.remove(self.some)
        factor = speedup(*both, self.tokenizer, self.batch_size, self.speedup_of)
        if factor <= 1:
            raise InvalidPlanError(
                f"target_speedup: without {len(self.some)} of {len(self.stack)} layers the model "
                f"is no faster here ({factor:.2f} times as fast, {self.speedup_of}): ask for a "
                "size instead."
            )
        return (1 - 1 / factor) / len(self.some)


@dataclass(frozen=True)
class Goals:
    """What is asked of the pruned model, and what it will be.

    Attributes:
        gauge: measures it.
        asked: the figure of each goal.
        sizes: the numbers of layers that can go, ascending.
        candidates: the layers that may.
    """

    gauge: Gauge
    asked: Mapping[str, float]
    sizes: Sequence[int]
    candidates: Sequence[int]

    @classmethod
    def of(
        cls,
        targets: Mapping[str, float],
        gauge: Gauge,
        sizes: Sequence[int],
        candidates: Sequence[int],
    ) -> Goals:
        """Goals as a budget has them; a share of parameters or bytes becomes their number.

        Raises:
            InvalidPlanError: speed or memory of a model that is not in memory, or runs elsewhere.
        """
        for name in targets:
            elsewhere = gauge.stack.offloaded or gguf_of(gauge.stack.model)
            if name in (SPEEDUP, CACHED) and elsewhere:
                raise InvalidPlanError(
                    f"{name} is measured on the model in memory, as transformers runs it: ask for "
                    "target_size (--target-size) instead."
                )
        asked = {
            name: gauge.value(name, ()) * (1 - value) if name.startswith("ratio_of_") else value
            for name, value in targets.items()
        }
        return cls(gauge, asked, sizes, candidates)

    def count(self) -> int:
        """The least number of layers without which the goals are met, if all layers are alike.

        Raises:
            InvalidPlanError: they are met by the full model, or by no number that can go.
        """
        if not self._unmet(self._average(0)):
            raise InvalidPlanError(
                f"There is nothing to remove: the full model has {self._said(self._average(0))}."
            )
        for size in self.sizes:
            if not self._unmet(self._average(size)):
                return size
        most = self.sizes[-1]
        raise InvalidPlanError(
            f"This cannot be reached: without {counted(most, 'layer')}, the most that can go, the "
            f"model has {self._said(self._average(most))}. Ask for less, or protect fewer layers "
            "(--protect)."
        )

    def _average(self, size: int) -> dict[str, float]:
        """The figures without `size` of the candidates, if they are all alike."""
        found = {}
        for goal in self.asked:
            if goal == SPEEDUP:
                found[goal] = self.gauge.value(goal, range(size))
                continue
            full, least = (self.gauge.value(goal, removed) for removed in ((), self.candidates))
            found[goal] = full - (full - least) * size / len(self.candidates)
        return found

    def _unmet(self, found: Mapping[str, float]) -> list[str]:
        """The goals that figures miss; sizes are whole bytes and parameters."""
        return [
            goal
            for goal, value in found.items()
            if (value < self.asked[goal] if goal == SPEEDUP else value > self.asked[goal] + 0.5)
        ]

    def values(self, removed: Collection[int]) -> dict[str, float]:
        """The figures of the model without the layers `removed`."""
        return {goal: self.gauge.exactly(goal, removed) for goal in self.asked}

    def unmet(self, removed: Collection[int]) -> list[str]:
        """The goals that the model without the layers `removed` does not meet."""
        return self._unmet(self.values(removed))

    def forecast(self, removed: Collection[int]) -> list[dict[str, Any]]:
        """Each goal, what was asked, and what it will be, for the record."""
        return [
            {"goal": goal, "asked": self.asked[goal], "predicted": value}
            for goal, value in self.values(removed).items()
        ]

    def text(self, removed: Collection[int]) -> str:
        """The figures of the model without the layers `removed`, in words."""
        return self._said(self.values(removed))

    def _said(self, found: Mapping[str, float]) -> str:
        return "; ".join(
            f"{figure(goal, value)} (asked for: {figure(goal, self.asked[goal])})"
            for goal, value in found.items()
        )
