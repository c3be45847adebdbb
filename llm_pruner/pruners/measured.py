"""Strategies that measure the model without layers: ablation and smart."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..data.items import EvalItem, fingerprint, prompt_keys, refuse_overlap
from ..data.sampling import DataSplit
from ..engines.layer_sets import Fits
from ..errors import InvalidPlanError, UnsupportedModelError
from ..goals.budget import Budget
from ..healing.job import Healing
from ..layer_scores import LayerScores
from ..model.layer_stack import LayerStack
from ..results import check_layers
from ..search.layer_search import depth_curve, search_layers, single_removals
from ..search.mixture import OverKinds, kinds_apart
from ..search.objectives import ObjectiveLike, parse_objective
from ..search.passes import LayerSet, reduced
from ..search.removal_quality import RemovalQuality
from ..utils import logger
from .base import BasePruner
from .healing_search import Repairs, search_in_rounds
from .registry import register_strategy
from .residual_stream import neighbours

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Precision = Literal["auto", "full"]
DIVERGENCE = {"kl": 1.0}  # what `SmartPruner` compares sets of so many layers by


class MeasuredPruner(BasePruner):
    """Base of the strategies that measure the model without layers instead of reading it.

    Args:
        objective: what quality is, a name of `objectives.OBJECTIVES` or several with weights:
            ``nll`` (likelihood of the references, or of running text), ``kl`` and ``agreement``
            (with the full model), ``accuracy`` (of items with choices), ``similarity`` (of
            generated answers); ``"nll=0.7,accuracy=0.3"``. ``nll`` if None.
        over_kinds: of items from several sources, whether the ``mean`` of the changes on each
            counts, or the ``worst``.
        precision: ``auto`` measures a model in float32 in bfloat16 where that is faster: layer
            scores, and in a search what is clearly worse; ``full`` never does.
        journal: file that keeps every measurement, so that a killed run can be resumed.
        seed: of the order in which a search looks at the items.
        options: the other options of `BasePruner`.
    """

    removes = "highest"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        objective: ObjectiveLike | None = None,
        over_kinds: OverKinds = "mean",
        precision: Precision = "auto",
        journal: str | Path | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        if over_kinds not in get_args(OverKinds):
            raise InvalidPlanError(f"over_kinds={over_kinds!r} must be 'mean' or 'worst'.")
        if precision not in get_args(Precision):
            raise InvalidPlanError(f"precision={precision!r} must be 'auto' or 'full'.")
        self.over_kinds, self.precision = over_kinds, precision
        if type(seed) is not int or seed < 0:
            raise InvalidPlanError(f"seed={seed!r} must be a whole number from 0.")
        self._given = objective is not None
        self.objective = parse_objective("nll" if objective is None else objective)
        self._compared_by = self.objective  # in the last choice
        self.journal, self.seed = journal, seed
        self._qualities: dict[str, RemovalQuality] = {}
        self._roughs: dict[str, RemovalQuality | None] = {}  # of the data measured on last

    def quality(
        self, eval_data: Sequence[EvalItem], objective: Mapping[str, float] | None = None
    ) -> RemovalQuality:
        """The measuring instrument for `eval_data`; what it has measured it remembers."""
        objective = objective or self.objective
        key = f"{self.layers.fingerprint}:{fingerprint(eval_data)}:{objective}"
        if key not in self._qualities:
            self._qualities[key] = self.quality_of(self.layers, eval_data, objective)
        return self._qualities[key]

    def quality_of(
        self,
        stack: LayerStack,
        eval_data: Sequence[EvalItem],
        objective: Mapping[str, float] | None = None,
    ) -> RemovalQuality:
        """A new instrument for the layers of any model, such as a healed one."""
        return RemovalQuality(
            stack,
            self.tokenizer,
            eval_data,
            objective=objective or self.objective,
            batch_size=self.batch_size,
            max_length=self.max_length,
            over_kinds=self.over_kinds,
            journal=self.journal,
            seed=self.seed,
        )

    def _rough(self, exact: RemovalQuality, eval_data: Sequence[EvalItem]) -> RemovalQuality | None:
        """Measures what `exact` does in reduced precision; None where that is not faster."""
        if self.precision == "full" or not exact.can_bypass:
            return None
        key = f"{self.layers.fingerprint}:{fingerprint(eval_data)}:{exact.measures}"
        if key not in self._roughs:
            stack = reduced(self.layers)
            measures = exact.measures
            rough = None if stack is None else self.quality_of(stack, eval_data, measures)
            self._roughs = {key: rough}
        return self._roughs[key]

    def compute_layer_scores(self, eval_data: Sequence[EvalItem]) -> LayerScores:
        """Relative change of quality when the layer alone is removed: -0.02 is 2 % worse.

        Costs about half of the L + 1 evaluations of the data: layers below the removed one run
        once for all.
        """
        exact = self.quality(eval_data)
        quality = self._rough(exact, eval_data) or exact
        scores = single_removals(quality, range(self.num_layers))
        return LayerScores(scores, strategy=self.name, unit=quality.unit, removes=self.removes)

    def expected_passes(self, quality: RemovalQuality, count: int) -> tuple[float, float]:
        """Every layer removed alone, in reduced precision where that is faster."""
        return 0.0, self.passes_of_scores(quality)

    def passes_of_scores(self, quality: RemovalQuality) -> float:
        """How many passes layer scores take; with replay each runs from where the layer was."""
        cost, depth = quality.token_cost, self.num_layers
        each = cost.of_pass(depth // 2 if self.layers.can_replay else depth - 1)
        return 1 + depth * each / cost.of_pass(depth)

    def select_layers(
        self,
        scores: Mapping[int, float],
        ratio: float | None = None,
        threshold: float | None = -0.02,
    ) -> list[int]:
        """Every layer that alone scores above `threshold`; with `ratio`, the cheapest instead."""
        if ratio is not None:
            return super().select_layers(scores, ratio)
        return super().select_layers(scores, threshold=threshold)

    def _options(self) -> dict[str, Any]:
        usual = {"over_kinds": "mean", "precision": "auto"}
        others = {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}
        return {"objective": self._compared_by, "seed": self.seed, **others}


SMALL = 1e12  # multiply-adds that any search may take: some seconds
EXACT = 4.0  # passes in full precision that a search ends with: the best sets, and the full model
SHARE_TO_DRAW = 0.25  # of the data, for the scores in a figure, where all of it takes long
FEW = 4  # items of which a single pass gives the first result of a search


@register_strategy("ablation")
class AblationPruner(MeasuredPruner):
    """Sensitivity: what the model loses without each layer alone, measured.

    The strategy to trust when layers are removed one by one; it does not see how removals
    add up (`SmartPruner` does). Cost: half of L + 1 evaluations.
    """

    def description(self) -> str:
        return "Measures the quality lost without each layer; half of L + 1 evaluations."


@register_strategy("smart")
class SmartPruner(MeasuredPruner):
    """Iterative optimisation: remove, measure the whole pruned model, swap, roll back.

    Layers are removed one by one, each measured on top of those already removed, so that
    interactions are seen (SLEB, Song et al., arXiv:2402.09025, is the plain greedy search); then
    layers are swapped until no swap is better. Candidates that are clearly worse on few items are
    not measured on all (`LayerSearch`), and a model in float32 is first measured in bfloat16 where
    that is faster. The search takes no more than plain greedy search would, or some seconds. The
    weights are healed afterwards, by ``prune_and_save(..., heal=)``; with `repairs` they are also
    healed after every few removals, and the next layers are chosen on the healed model.

    Args:
        repairs: how to heal in between; not at all if None.
        time_limit: seconds after which the search ends with the best set so far; none if None. A
            set of a given number of layers exists after a single pass.

    Raises:
        InvalidPlanError: `time_limit` is no positive number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        repairs: Repairs | None = None,
        time_limit: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        if time_limit is not None and not 0 < time_limit < math.inf:
            raise InvalidPlanError(f"time_limit={time_limit} must be a positive number of seconds.")
        self.repairs, self.time_limit = repairs, time_limit

    def description(self) -> str:
        return "Removes layer by layer, measuring each combination; then swaps layers."

    def optimize_selection(
        self,
        candidates: Sequence[int] | None,
        eval_data: Sequence[EvalItem],
        tolerance: float = 0.015,
        n_layers: int | None = None,
    ) -> list[int]:
        """The layers to remove, found by removals, swaps and roll-back.

        Args:
            candidates: layers that may go; None for every unprotected layer.
            eval_data: what quality is measured on.
            tolerance: largest relative loss of quality in total; 0.015 is 1.5 %.
            n_layers: exactly this many layers, whatever they cost; `tolerance` is not used. For
                both limits at once, see `plan`.

        Returns:
            0-based indices, ascending; empty if even the cheapest removal costs too much. What was
            tried is in `.steps`, see `search.search_layers`.

        Raises:
            InvalidPlanError: candidates do not fit the model, are protected, or are fewer than
                `n_layers`.
        """
        return self._search(
            candidates,
            eval_data,
            n_layers=n_layers,
            tolerance=None if n_layers is not None else tolerance,
        )

    def choose_layers(
        self, scores: Mapping[int, float], eval_data: Sequence[EvalItem], budget: Budget
    ) -> list[int]:
        """A number of layers (n_layers, or ratio), or as many as the tolerance allows, of all.

        With a number and a tolerance: at most that many, within the tolerance. With a threshold:
        of the layers that alone score above it, as many as the tolerance allows.
        """
        count = budget.count(self.removable)
        if count is not None:
            return self._search(None, eval_data, n_layers=count, tolerance=budget.tolerance)
        threshold, tolerance = budget.threshold, budget.tolerance
        candidates = None if threshold is None else self.select_layers(scores, threshold=threshold)
        if tolerance is None:
            return self.optimize_selection(candidates, eval_data)
        return self.optimize_selection(candidates, eval_data, tolerance)

    def _score_and_choose(
        self, eval_data: Sequence[EvalItem], budget: Budget, scores: LayerScores | None = None
    ) -> tuple[LayerScores | None, list[int]]:
        """Scores are computed only where a threshold needs them: the search does without."""
        if budget.threshold is not None:
            return super()._score_and_choose(eval_data, budget, scores)
        return None, self.choose_layers({}, eval_data, budget)

    def _search(
        self,
        candidates: Sequence[int] | None,
        eval_data: Sequence[EvalItem],
        *,
        n_layers: int | None,
        tolerance: float | None,
    ) -> list[int]:
        pool = self.candidates if candidates is None else check_layers(candidates, self.num_layers)
        self.removable.refuse_protected(pool)
        self.steps = []
        limits: dict[str, Any] = {"n_layers": n_layers, "tolerance": tolerance}
        limits |= {"on_step": self.steps.append, "fits": self._fits}
        if self.repairs is None:
            return self._search_once(pool, eval_data, limits)
        how = self.repairs
        refuse_overlap(how.items, prompt_keys(eval_data), "to heal with", "to choose layers on")

        def quality_of(stack: LayerStack) -> RemovalQuality:
            known = stack is self.layers
            return self.quality(eval_data) if known else self.quality_of(stack, eval_data)

        return search_in_rounds(
            self.layers,
            quality_of,
            lambda layers: self.heal(layers, how.heal, how.items, how.lora),
            pool,
            every=how.every,
            **limits,
        )

    def _search_once(
        self, pool: Sequence[int], eval_data: Sequence[EvalItem], limits: dict[str, Any]
    ) -> list[int]:
        """A search without healing, within the time and for no more than plain greedy search."""
        counts = limits["n_layers"] is not None and limits["tolerance"] is None
        quality = self.quality(eval_data, self._choosing(counts))
        deadline = None if self.time_limit is None else time.monotonic() + self.time_limit
        rough = self._rough(quality, eval_data)
        both = [quality] if rough is None else [quality, rough]
        count, work = limits["n_layers"], math.inf
        if count is not None:
            naive = quality.token_cost.of_naive_greedy(len(pool), count) * quality.tokens
            work = max(naive, SMALL)
            work += sum(one.work for one in both)  # of earlier searches
        stack = quality.stack if rough is None else rough.stack
        scores = self._one_pass_scores(stack, eval_data) if count and len(pool) > count else None
        try:
            for one in both:
                one.deadline = deadline
            found = search_layers(quality, pool, rough=rough, scores=scores, work=work, **limits)
        finally:
            for one in both:
                one.deadline = None
        _say_rival(rough or quality, tuple(found))
        if deadline is None:
            _warn_of_layers(rough or quality, found)
        return found

    def expected_passes(self, quality: RemovalQuality, count: int) -> tuple[float, float]:
        """A search, most of it in reduced precision where that is faster."""
        shares = [quality.size(subset) / quality.size() for subset in quality.subsets()]
        cost, candidates = quality.token_cost, len(self.candidates)
        how = {"replays": self.layers.can_replay}
        work = cost.of_search(candidates, count, shares, **how)
        return EXACT, work / cost.of_pass(self.num_layers)

    def _one_pass_scores(
        self, layers: LayerStack, eval_data: Sequence[EvalItem]
    ) -> dict[int, float] | None:
        """Block influence on a few items; None where there are no states between the layers."""
        if self.layers.offloaded or len(self.layers.paths) > 1:
            return None
        few = random.Random(self.seed).sample(eval_data, min(len(eval_data), FEW))
        try:
            influence = neighbours(layers, self.tokenizer, few, self.batch_size, self.max_length)
        except UnsupportedModelError as error:
            logger.info("No first result by block influence: %s", error)
            return None
        return {layer: influence[layer] for layer in self.candidates}

    def scores_to_draw(self, eval_data: Sequence[EvalItem]) -> LayerScores:
        """Layer scores for figures, which the search did without; on part of much data."""
        share = self.share_to_draw(self.quality(eval_data))
        some = list(eval_data)
        if share < 1:
            n_tokens = max(1, round(share * self.quality(eval_data).tokens))
            some = DataSplit(some, [], []).within(self.tokenizer, n_tokens, self.max_length).scoring
        of_items = f"{len(some)} of {len(eval_data)} items"
        logger.info("Measuring each layer alone for the figures, on %s", of_items)
        scores = self.compute_layer_scores(some)
        if len(some) < len(eval_data):
            scores.unit = f"{scores.unit}, {of_items}"
        return scores

    def share_to_draw(self, quality: RemovalQuality) -> float:
        """The share of the data that `scores_to_draw` measures on: all of it in some seconds."""
        pass_over_all = quality.token_cost.of_pass(self.num_layers) * quality.tokens
        return 1.0 if self.passes_of_scores(quality) * pass_over_all <= SMALL else SHARE_TO_DRAW

    def comparing(self, eval_data: Sequence[EvalItem], budget: Budget) -> RemovalQuality:
        """By divergence or by likelihood, see the class."""
        counts = budget.count(self.removable) is not None and budget.tolerance is None
        return self.quality(eval_data, self._choosing(counts))

    def _choosing(self, counts: bool) -> dict[str, float]:
        """What sets of layers are compared by; `counts` if a number of layers is to go."""
        by_divergence = counts and not self._given and self.repairs is None
        self._compared_by = DIVERGENCE if by_divergence else self.objective
        return self._compared_by

    def _choices(self, eval_data: Sequence[EvalItem], n_layers: int) -> list[list[int]]:
        if self.repairs is not None:
            raise InvalidPlanError("A sweep does not heal as it goes: leave repairs out.")
        self.steps = []
        quality, note = self.quality(eval_data, self._choosing(counts=True)), self.steps.append
        curve = depth_curve(quality, self.candidates, n_layers, note, self._fits)
        return [list(mask) for mask in curve]

    @property
    def _fits(self) -> Fits | None:
        """How the sets that may be removed are restricted, for the search."""
        return self.removable.sets.fits

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        if self.time_limit is not None:
            options["time_limit"] = self.time_limit
        if self.repairs is not None:
            how = Healing.of(self.repairs.heal).identity()
            options["repairs"] = {"every": self.repairs.every, "heal": how}
        return options


def _warn_of_layers(quality: RemovalQuality, chosen: Sequence[int]) -> None:
    """Name the layers that one kind of data misses clearly more than another does."""
    if not quality.has_kinds:
        return
    quality.measure([(layer,) for layer in chosen])
    said = []
    for layer in chosen:
        kinds = quality.by_kind((layer,))
        if apart := kinds_apart(kinds):
            costs = (f"{kind} {100 * kinds[kind]['change']:+.1f} %" for kind in apart)
            said.append(f"{layer} ({', '.join(costs)})")
    if said:
        logger.warning("Kinds of data disagree about layers, alone: %s", "; ".join(said))


def _say_rival(quality: RemovalQuality, chosen: LayerSet) -> None:
    """Say how far behind the runner-up is, and whether the data can tell the two apart."""
    if not chosen or (rival := quality.rival(chosen)) is None:
        return
    layers, gap, half = rival
    apart = (
        "clearly"
        if gap > half and quality.size() > 1
        else "which more data could reverse: --n-tokens"
    )
    logger.info(
        "Runner-up: layers %s, %.1f %% worse (+- %.1f %%, on %s tokens), %s",
        *(list(layers), 100 * gap, 100 * half, f"{quality.tokens:,}", apart),
    )
