"""The template every strategy fills in: score, select, remove, heal, save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..config.outer_rules import injected_layers
from ..data.items import MAX_LENGTH, EvalItem, check_items, fingerprint, prompt_keys
from ..errors import InvalidPlanError
from ..goals.budget import Budget, Removable, serving_of
from ..goals.choice import Conditions, goals_of
from ..layer_scores import LayerScores, Removes
from ..model.forward import refuse_adapters, require_loaded
from ..offload.offloaded_stack import layers_of
from ..results import DepthCurve, PruningPlan, check_layers
from ..search.mixture import warn_of_kinds
from ..search.removal_quality import RemovalQuality
from ..utils import logger, package_versions
from .healing_search import HealedModel
from .remover import LayerRemover
from .residual_stream import read_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class BasePruner(LayerRemover, ABC):
    """Template of a pruning strategy: score the layers, select some, remove them, save.

    Args:
        model: a causal language model; never changed.
        tokenizer: its tokenizer; never changed.
        protect: how many layers at the start and at the end are never selected. None means
            (2, 2), or a quarter of the depth at each end (rounded down) on a model of fewer than
            8 layers; a value that is given is used as it is.
        batch_size: sequences per forward pass; does not change a result.
        max_length: longest sequence, in tokens: running text is cut into windows of so many, and a
            prompt that is too long loses its beginning.
        layers_path: dotted name of the layer list, for models in which it is not found.
        serve_with: engines that have to compute the pruned model right, of `engines.ENGINES`: only
            sets of layers after which they do are considered, or accepted.

    Attributes:
        model, tokenizer: as given.
        layers: the decoder layers, a `LayerStack`.
        num_layers: how many there are.
        removable: which of them may be removed.
        steps: what the last search tried and kept; empty for strategies that do not search.
        partial_plan: the best plan so far where `plan` was interrupted in a search; else None.

    Raises:
        UnsupportedModelError: the model's layers cannot be found.
        InvalidPlanError: the protection leaves no layer to remove, or it is not known how an engine
            computes such a model.
    """

    name: ClassVar[str] = "custom"
    unit: ClassVar[str] = "score"
    removes: ClassVar[Removes] = "lowest"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        protect: tuple[int, int] | None = None,
        batch_size: int = 8,
        max_length: int = MAX_LENGTH,
        layers_path: str | None = None,
        serve_with: Sequence[str] = (),
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
            if type(value) is not int or value < least:
                raise InvalidPlanError(f"{name}={value} must be a whole number from {least}.")
        refuse_adapters(model)
        self.max_length = max_length
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.steps: list[dict[str, Any]] = []
        self.partial_plan: PruningPlan | None = None
        self.layers = layers_of(model, layers_path)
        if not self.layers.offloaded:
            require_loaded(model)
        self.num_layers = len(self.layers)
        injected = injected_layers(getattr(model, "config", None))
        serving = serving_of(model, serve_with)
        self.removable = Removable.of(self.num_layers, protect, injected, serving)
        self._healed = HealedModel()

    def __repr__(self) -> str:
        options = {**self.removable.options, **self._options()}
        said = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{type(self).__name__}({self.layers!r}, {said})"

    @abstractmethod
    def description(self) -> str:
        """One sentence: what the strategy looks at and what it costs."""

    @abstractmethod
    def compute_layer_scores(self, eval_data: Sequence[EvalItem]) -> Mapping[int, float]:
        """One number per layer (0-based); the class attribute `removes` says which end goes."""

    def select_layers(
        self, scores: Mapping[int, float], ratio: float = 0.2, threshold: float | None = None
    ) -> list[int]:
        """The layers to remove, ascending.

        Args:
            scores: what `compute_layer_scores` returned.
            ratio: share of all layers to remove, in (0, 1); rounded down to whole layers.
            threshold: if given, `ratio` is not used: every layer beyond the threshold goes.

        Raises:
            InvalidPlanError: ratio out of range, rounding to no layer, or asking for more
                layers than are unprotected.
        """
        ranked = [layer for layer in self._scored(scores).ranked() if layer in self.candidates]
        sign = 1.0 if self.removes == "lowest" else -1.0
        costs = {layer: sign * scores[layer] for layer in ranked}
        if threshold is None:
            return self.removable.cheapest(costs, Budget(ratio=ratio).count(self.removable) or 0)
        beyond = {layer: cost for layer, cost in costs.items() if cost < sign * threshold}
        return self.removable.cheapest(beyond)

    def choose_layers(
        self, scores: Mapping[int, float], eval_data: Sequence[EvalItem], budget: Budget
    ) -> list[int]:
        """The strategy's final choice within a budget.

        Strategies whose choice is their selection need not override this method.

        Raises:
            InvalidPlanError: the budget does not fit the strategy or the model.
        """
        if budget.tolerance is not None:
            raise InvalidPlanError(
                f"tolerance={budget.tolerance} has no meaning for {self.name!r}, which does not "
                "measure a choice as a whole: leave it out, or use smart."
            )
        count = budget.count(self.removable)
        if count is not None:
            return self.select_layers(scores, ratio=budget.ratio or count / self.num_layers)
        return self.select_layers(scores, **budget.given)

    def plan(
        self,
        eval_data: Sequence[EvalItem],
        *,
        model_id: str = "",
        ratio: float | None = None,
        threshold: float | None = None,
        tolerance: float | None = None,
        n_layers: int | None = None,
        budget: Budget | None = None,
        held_out: Sequence[EvalItem] | None = None,
    ) -> PruningPlan:
        """Choose, by scores where the strategy needs them; nothing is changed or written.

        Args:
            eval_data: items to score on.
            model_id: name of the model, for the record.
            ratio, threshold, n_layers: how much to remove, by at most one of them; the
                strategy's own default without any. `n_layers` is an exact number.
            tolerance: for strategies that measure their choice as a whole.
            budget: all of these as one value, instead of them.
            held_out: other items, on which the final choice is measured as a whole
                (`PruningPlan.held_out`): two evaluations.

        Raises:
            InvalidPlanError: an impossible amount, or a choice that holds a protected layer
                or none at all.
            BaseException: after an interruption or an error `partial_plan` holds what a search
                has reached.
        """
        amounts = Budget(ratio, n_layers, threshold, tolerance)
        if budget is not None and amounts.given:
            raise InvalidPlanError(f"budget and {', '.join(amounts.given)} exclude each other.")
        if budget is not None and not isinstance(budget, Budget):
            raise InvalidPlanError(
                f"budget={budget!r:.60} must be a Budget, e.g. Budget(ratio=0.2)."
            )
        budget = budget or amounts
        if not budget.given:
            logger.info("No amount was given: %s removes what it does by default.", self.name)
        check_items(eval_data)
        budget.count(self.removable)  # refused before anything is measured
        conditions = Conditions.of(
            budget,
            self.layers,
            self.tokenizer,
            self.removable,
            eval_data,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )

        def record(removed: Sequence[int], scores: LayerScores | None) -> PruningPlan:
            return PruningPlan(
                model_id=model_id,
                num_layers=self.num_layers,
                remove=check_layers(removed, self.num_layers),
                strategy=self.name,
                options={
                    **budget.given,
                    **self.removable.options,
                    **self._options(),
                    **conditions.forecast(removed),
                },
                scores=scores,
                steps=self.steps,
                data={
                    "items": len(eval_data),
                    "fingerprint": fingerprint(eval_data),
                    "prompts": prompt_keys(eval_data),
                },
                versions=package_versions(),
                model=self.identity,
                engines=self._engines(removed),
                lineage=self.lineage,
            )

        self.steps, self.partial_plan = [], None
        quality = None if held_out is None else self.quality(held_out)  # refuses unusable items
        try:
            if conditions:
                scores, removed = self._choose_within(budget, conditions)
            else:
                scores, removed = self._score_and_choose(eval_data, budget)
            plan = self.partial_plan = record(removed, scores)
            self.removable.refuse_protected(plan.remove)
            self.removable.refuse_misplaced(plan.remove)
            if not plan.remove:
                self._refuse_empty(scores)
            if quality is not None:
                plan = replace(plan, held_out=quality.cost(plan.remove))
                warn_of_kinds(plan.held_out.get("kinds", {}))
        except BaseException:
            kept = [step["removed"] for step in self.steps if step["kept"]]
            if self.partial_plan is None and kept:  # the last of those with the most layers
                self.partial_plan = record(max(reversed(kept), key=len), None)
            raise
        self.partial_plan = None
        return plan

    def _score_and_choose(
        self, eval_data: Sequence[EvalItem], budget: Budget, scores: LayerScores | None = None
    ) -> tuple[LayerScores | None, list[int]]:
        """Layer scores, if they are not known, and a choice within a budget without goals."""
        if scores is None:
            scores = self._scored(self.compute_layer_scores(eval_data))
        return scores, self.choose_layers(scores, eval_data, budget)

    def with_count(self, budget: Budget) -> Budget:
        """`budget` with the number of layers that its goals need, instead of the goals."""
        goals = goals_of(budget, self.layers, self.tokenizer, self.removable, self.batch_size)
        if goals is None:
            return budget
        return Budget(n_layers=goals.count(), tolerance=budget.tolerance, max_drop=budget.max_drop)

    def _choose_within(
        self, budget: Budget, conditions: Conditions
    ) -> tuple[LayerScores | None, list[int]]:
        """Layer scores, and a choice that meets the conditions."""
        chosen: dict[int, list[int]] = {}
        scores: LayerScores | None = None

        def choose(size: int) -> list[int]:
            nonlocal scores
            if size not in chosen:
                exact = Budget(n_layers=size, tolerance=budget.tolerance)
                scores, chosen[size] = self._score_and_choose(conditions.items, exact, scores)
            return chosen[size]

        removed = conditions.choose(budget, self.removable, choose)
        return scores, removed

    def sweep(
        self,
        eval_data: Sequence[EvalItem],
        n_layers: int,
        *,
        model_id: str = "",
        held_out: Sequence[EvalItem] | None = None,
    ) -> DepthCurve:
        """What it costs to remove 1, 2, ... `n_layers` layers; nothing is changed or written.

        The strategy scores once and chooses anew for every number of layers; each choice is
        measured as a whole, on `eval_data` and on `held_out` if given.

        Raises:
            InvalidPlanError: so many layers cannot go.
        """
        check_items(eval_data)
        Budget(n_layers=n_layers).count(self.removable)
        quality, points = self.quality(eval_data), []
        for removed in self._choices(eval_data, n_layers):
            held = None if held_out is None else self.measure_choice(removed, held_out)
            point = {"n_layers": len(removed), "removed": list(removed)}
            points.append({**point, "change": quality.change(removed), "held_out": held})
        return DepthCurve(
            model_id=model_id,
            num_layers=self.num_layers,
            strategy=self.name,
            unit=quality.unit,
            points=points,
            data={"items": len(eval_data), "fingerprint": fingerprint(eval_data)},
            versions=package_versions(),
        )

    def _choices(self, eval_data: Sequence[EvalItem], n_layers: int) -> list[list[int]]:
        """The strategy's choice of 1, 2, ... `n_layers` layers."""
        scores = self._scored(self.compute_layer_scores(eval_data))
        sizes = (size for size in self.removable.sets.sizes if size <= n_layers)
        budgets = [Budget(n_layers=size) for size in sizes]
        return [self.choose_layers(scores, eval_data, budget) for budget in budgets]

    def quality(self, eval_data: Sequence[EvalItem]) -> RemovalQuality:
        """The measuring instrument for `eval_data`: the likelihood of the references."""
        return RemovalQuality(
            self.layers,
            self.tokenizer,
            eval_data,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )

    def comparing(self, eval_data: Sequence[EvalItem], budget: Budget) -> RemovalQuality:
        """What a choice within `budget` compares sets of layers with, if it measures any."""
        return self.quality(eval_data)

    def expected_passes(self, quality: RemovalQuality, count: int) -> tuple[float, float]:
        """About how many passes over the data a choice of `count` layers takes.

        Passes of the full model with its head, and how many more in reduced precision. One, unless
        a strategy says otherwise.
        """
        return 1.0, 0.0

    def measure_choice(self, layers: Sequence[int], held_out: Sequence[EvalItem]) -> dict[str, Any]:
        """What removing `layers` costs on other data, as `PruningPlan.held_out` describes it."""
        return self.quality(held_out).cost(layers)

    @property
    def protect(self) -> tuple[int, int]:
        """How many layers at the start and at the end are never selected."""
        return self.removable.protect

    @property
    def candidates(self) -> range:
        """The layers that are not protected."""
        return self.removable.candidates

    def hidden_states(
        self, eval_data: Sequence[EvalItem], *, shared: bool = False
    ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """The residual stream on `eval_data`, batch by batch, for strategies that read activations.

        Args:
            eval_data: items to read.
            shared: of several processes each sees its portion of the batches only, perhaps none;
                what it takes from them has to be put together with `stats.merged`.

        Yields:
            states: L + 1 tensors (sequences, tokens, hidden): the input of every layer, and the
                output of the last one before the final norm.
            real: bool (sequences, tokens), false for padding.
        """
        data = self.tokenizer, eval_data, self.batch_size, self.max_length
        return read_stream(self.layers, *data, shared=shared)

    def _scored(self, scores: Mapping[int, float]) -> LayerScores:
        if not isinstance(scores, Mapping):
            kind = type(scores).__name__
            raise InvalidPlanError(f"Scores must be a dict from layer to number, got a {kind}.")
        lacking = [layer for layer in self.candidates if layer not in scores]
        if lacking:
            raise InvalidPlanError(
                f"Layers {lacking} have no score: every layer that may go needs one."
            )
        if isinstance(scores, LayerScores):
            return scores
        return LayerScores(scores, strategy=self.name, unit=self.unit, removes=self.removes)

    def _refuse_empty(self, scores: LayerScores | None) -> None:
        if scores is not None:
            order = [layer for layer in scores.ranked() if layer in self.candidates]
            cheapest = f"layer {order[0]}, the cheapest, scores {scores[order[0]]:.4g}"
            what = f"{cheapest} ({scores.unit})"
        elif self.steps:
            step = self.steps[-1]
            what = f"the cheapest set tried changes quality by {step['change']:+.4f}"
        else:
            what = "there is no candidate"
        raise InvalidPlanError(
            f"No layer can go at this threshold or tolerance: {what}. Loosen the limit, or ask for "
            "a number of layers."
        )

    def _options(self) -> dict[str, Any]:
        """Constructor options worth recording in a plan."""
        return {}
