"""By how much quality may drop: measured on items that did not choose the layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.items import EvalItem
from ..errors import InvalidDataError, InvalidPlanError
from ..evaluation.likelihood import perplexity
from ..evaluation.tasks import HolisticEvaluator, item_kinds, task_of
from ..model.layer_stack import LayerStack
from ..search.removal_quality import RemovalQuality
from ..utils import counted, logger
from .budget import Drop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERPLEXITY, MEAN = "perplexity", "mean"
Z = 1.96  # standard errors from the middle to the end of a 95 % interval


class Drops:
    """By how much figures become worse without layers.

    Args:
        stack: the layers of the full model.
        tokenizer: its tokenizer.
        items: what the figures are of.
        limits: the drops that are allowed, by name: ``perplexity``, tasks of the items, ``mean``
            of the tasks.
        confident: whether the upper end of a drop's 95 % interval has to be within the limit.
        batch_size, max_length: as of a pruner.

    Raises:
        InvalidPlanError: a name that is none of the figures of these items.
        InvalidDataError: items that cannot be scored.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[EvalItem],
        limits: Mapping[str, Drop],
        *,
        confident: bool,
        batch_size: int,
        max_length: int,
    ) -> None:
        stack.require_weights("holding a drop")
        self.stack, self.tokenizer, self.limits = stack, tokenizer, limits
        self.confident, self.batch_size = confident, batch_size
        questions = [item for item in items if isinstance(item, dict)]
        tasks = sorted({task_of(item) for item in questions})
        known = [PERPLEXITY, *([*tasks, MEAN] if tasks else [])]
        if unknown := [name for name in limits if name not in known]:
            raise InvalidPlanError(
                f"max_drop names {unknown[0]!r}, of which this data says nothing: it has "
                f"{', '.join(known)}."
            )
        for name, limit in limits.items():
            if name != PERPLEXITY and limit.amount > 1 and not limit.relative:
                raise InvalidPlanError(
                    f"max_drop {name}={limit} is more than there is: scores lie between 0 and 1. "
                    f"Write {name}={limit.amount / 100:.4g}, or {name}={limit}%."
                )
        self.count = len(items)
        wanted = tasks if MEAN in limits else [name for name in limits if name in tasks]
        self.questions = [item for item in questions if task_of(item) in wanted]
        if self.questions:
            item_kinds(self.questions)
        how: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        self._quality = RemovalQuality(stack, tokenizer, items, **how)
        if PERPLEXITY in limits and self._quality.size() < 2:
            raise InvalidDataError(
                "max_drop perplexity is held with its interval, and one held-out item has none: "
                "give more data, --n-samples or --n-tokens."
            )
        self._perplexity = (
            perplexity(stack.model, tokenizer, items, **how) if PERPLEXITY in limits else 0.0
        )
        self._full = self._scores(stack.model)
        self._known: dict[tuple[int, ...], dict[str, dict[str, float]]] = {}

    def _scores(self, model: Any) -> dict[str, list[float]]:
        if not self.questions:
            return {}
        evaluator = HolisticEvaluator(model, self.tokenizer, batch_size=self.batch_size)
        evaluator.run_benchmark(self.questions)
        return evaluator.item_scores

    def of(self, removed: Iterable[int]) -> dict[str, dict[str, float]]:
        """The drops without layers: of each figure `drop` and `high`, in the limit's terms."""
        layers = tuple(sorted(removed))
        if layers not in self._known:
            found = {PERPLEXITY: self._of_perplexity(layers)} if PERPLEXITY in self.limits else {}
            found |= self._of_tasks(layers) if self.questions else {}
            self._known[layers] = found
            said = (
                f"{name} {self.text(name, one['drop'])} (at most {self.text(name, one['high'])})"
                for name, one in found.items()
            )
            without = counted(len(layers), "layer")
            logger.info("Without %s the drop is: %s", without, ", ".join(said))
        return self._known[layers]

    def _of_perplexity(self, layers: tuple[int, ...]) -> dict[str, float]:
        cost = self._quality.cost(layers)  # relative change of likelihood per token
        drop, high = (1 / (1 + cost[end]) - 1 for end in ("change", "low"))
        scale = 1.0 if self.limits[PERPLEXITY].relative else self._perplexity
        return {"drop": drop * scale, "high": high * scale}

    def _of_tasks(self, layers: tuple[int, ...]) -> dict[str, dict[str, float]]:
        after = self._scores(self.stack.remove(layers))
        found = {
            name: self._points(name, {name: self._full[name]}, {name: after[name]})
            for name in self.limits
            if name in after
        }
        return found | (
            {MEAN: self._points(MEAN, self._full, after)} if MEAN in self.limits else {}
        )

    def _points(
        self, name: str, full: Mapping[str, list[float]], after: Mapping[str, list[float]]
    ) -> dict[str, float]:
        """The drop of the mean over tasks, of the items of each.

        The upper end of its 95 % interval is Agresti and Min's (Statistics in Medicine 2005, for
        matched proportions): half an item is added to each way in which two answers can agree or
        differ. So a few items without a difference are no proof that there is none, as they would
        be for a bootstrap. Departure: scores between 0 and 1 count by their differences.
        """
        mean = drop = high = variance = 0.0
        for before, left in zip(full.values(), after.values(), strict=True):
            lost = [old - new for old, new in zip(before, left, strict=True)]
            count, total, squares = len(lost), math.fsum(lost), math.fsum(one**2 for one in lost)
            mean += math.fsum(before) / count / len(full)
            drop += total / count / len(full)
            count += 2
            high += total / count / len(full)
            variance += (squares + 1 - total**2 / count) / (count * len(full)) ** 2
        high = max(drop, high + Z * math.sqrt(variance))
        if not self.limits[name].relative:
            return {"drop": drop, "high": high}
        return {"drop": drop / mean if mean else 0.0, "high": high / mean if mean else 0.0}

    def text(self, name: str, value: float) -> str:
        """A drop as its limit is written."""
        return f"{value:+.1%}" if self.limits[name].relative else f"{value:+.3f}"

    def holds(self, removed: Iterable[int]) -> bool:
        """Whether every drop without these layers is within its limit."""
        end = "high" if self.confident else "drop"
        return all(one[end] <= self.limits[name].amount for name, one in self.of(removed).items())

    def said(self, removed: Iterable[int]) -> str:
        """The drops beside what is allowed, in words."""
        end, how = ("high", "may be") if self.confident else ("drop", "is")
        return ", ".join(
            f"{name} {how} worse by {self.text(name, one[end])} (allowed: {self.limits[name]})"
            for name, one in self.of(removed).items()
        )

    def forecast(self, removed: Iterable[int]) -> list[dict[str, Any]]:
        """Each limit and the drop that was measured, for the record."""
        return [
            {
                "goal": f"max_drop {name}",
                "asked": str(self.limits[name]),
                "predicted": one["drop"],
                "high": one["high"],
                "items": self.count,
            }
            for name, one in sorted(self.of(removed).items())
        ]
