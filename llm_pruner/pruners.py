"""The strategies: which decoder layers a model can do without.

A new one is a subclass of `BasePruner` with `description()` and `compute_layer_scores()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .base import DEFAULT_PROTECT, BasePruner, MeasuredPruner
from .batching import EvalItem
from .errors import InvalidPlanError
from .registry import register_strategy
from .results import LayerScores, check_layers
from .search import greedy_removal
from .stats import AngularDistances, RunningMean, RunningVariance, last_real_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AVSSPruner", "AblationPruner", "BasePruner", "PruneMePruner", "SmartPruner"]


@register_strategy("ablation")
class AblationPruner(MeasuredPruner):
    """Sensitivity: what the model loses when one layer is taken out, measured.

    The strategy to trust when layers are removed one by one; it does not see how removals
    add up (`SmartPruner` does). Cost: L + 1 evaluations.
    """

    def description(self) -> str:
        return "Measures the quality lost without each layer; L + 1 evaluations."

    def select_layers(
        self,
        scores: Mapping[int, float],
        ratio: float | None = None,
        threshold: float | None = -0.02,
    ) -> list[int]:
        """Every layer that scores above `threshold`; with `ratio`, the cheapest share instead."""
        if ratio is not None:
            return super().select_layers(scores, ratio)
        return super().select_layers(scores, threshold=threshold)


@register_strategy("avss")
class AVSSPruner(BasePruner):
    """Activation variance divided by activation sparsity; the lowest layers go. One pass.

    Variant ``published`` (Song et al., "AVSS", arXiv:2411.02117, and the authors' code): a
    layer's activations are its outputs; AV is the variance over the hidden dimension of the
    mean over a sequence, averaged over sequences; AS is the share of elements below 1e-5 in
    size. Departures: padding is left out; half an element is added to the count of AS, which
    is 0 for nearly every residual stream and would divide by zero; the lowest scores are
    selected (the authors' cumulative sum before sorting takes the first layers instead).

    Variant ``repaired`` (default): raw variance grows with depth in pre-norm models and so
    condemns the first layers. Here AV is the variance of what the layer adds to its input,
    divided by the variance of the input, and an element counts as sparse below a tenth of the
    root mean square of the addition.
    """

    unit = "activation variance / activation sparsity"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        protect: tuple[int, int] = DEFAULT_PROTECT,
        variant: Literal["repaired", "published"] = "repaired",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, protect=protect, **options)
        if variant not in ("repaired", "published"):
            raise InvalidPlanError(f"variant={variant!r} must be 'repaired' or 'published'.")
        self.variant = variant

    def description(self) -> str:
        return "Reads the variance and sparsity of activations; one pass, a weak signal."

    def compute_layer_scores(self, eval_data: Sequence[EvalItem]) -> LayerScores:
        """AV / AS of every layer, in float64 over real tokens only."""
        score = self._published if self.variant == "published" else self._repaired
        return self._scored(score(eval_data))

    def _published(self, eval_data: Sequence[EvalItem]) -> dict[int, float]:
        variance = [RunningMean() for _ in self.layers]
        sparse = [RunningMean() for _ in self.layers]
        for states, real in self.hidden_states(eval_data):
            for index, output in enumerate(states[1:]):
                weight = real.to(output.device).double().unsqueeze(-1)
                mean = output.double().masked_fill(weight == 0, 0.0).sum(1) / weight.sum(1)
                variance[index].update(mean.var(dim=-1))
                sparse[index].update(output[weight.squeeze(-1).bool()].abs() < 1e-5)
        return {
            index: variance[index].mean / ((sparse[index].total + 0.5) / sparse[index].count)
            for index in range(self.num_layers)
        }

    def _repaired(self, eval_data: Sequence[EvalItem]) -> dict[int, float]:
        added = [RunningVariance() for _ in self.layers]
        entering = [RunningVariance() for _ in self.layers]
        sparse = [RunningMean() for _ in self.layers]
        for states, real in self.hidden_states(eval_data):
            for index in range(self.num_layers):
                x = states[index][real.to(states[index].device)].double()
                y = states[index + 1][real.to(states[index + 1].device)].double().to(x.device)
                update = y - x  # (tokens, hidden)
                size = update.square().mean(dim=-1, keepdim=True).sqrt()
                added[index].update(update)
                entering[index].update(x)
                sparse[index].update(update.abs() < 0.1 * size)
        return {
            index: (added[index].variance / (entering[index].variance or math.nan))
            / ((sparse[index].total + 0.5) / sparse[index].count)
            for index in range(self.num_layers)
        }

    def select_layers(
        self, scores: Mapping[int, float], ratio: float = 0.25, threshold: float | None = None
    ) -> list[int]:
        """The lowest share `ratio` of all layers, or every layer below `threshold`."""
        return super().select_layers(scores, ratio, threshold)

    def _options(self) -> dict[str, Any]:
        return {"variant": self.variant}


@register_strategy("pruneme")
class PruneMePruner(BasePruner):
    """Angular distance across layers; the contiguous block that turns the stream least goes.

    Score of layer i: mean angular distance between its input and its output at the last real
    token of every sequence (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper
    Layers", arXiv:2403.17887, section 3.2). One pass gives every block of every length.

    Args:
        contiguous: remove one block, the paper's choice; otherwise the layers with the
            smallest distance each.
    """

    unit = "angular distance (arccos(cos)/pi)"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        protect: tuple[int, int] = DEFAULT_PROTECT,
        contiguous: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, protect=protect, **options)
        self.contiguous = contiguous

    def description(self) -> str:
        return "Finds the block of layers that turns the hidden state least; one pass."

    def compute_layer_scores(self, eval_data: Sequence[EvalItem]) -> LayerScores:
        """Distances of single layers, and in `.blocks` of every block: ``blocks[start][n - 1]``."""
        distances = AngularDistances(self.num_layers + 1)
        for states, real in self.hidden_states(eval_data):
            first = states[0].device
            distances.update(last_real_token([state.to(first) for state in states], real))
        matrix = distances.matrix.tolist()
        blocks = [matrix[start][start + 1 :] for start in range(self.num_layers)]
        scores = {index: blocks[index][0] for index in range(self.num_layers)}
        return LayerScores(scores, strategy=self.name, unit=self.unit, blocks=blocks)

    def select_layers(
        self, scores: Mapping[int, float], ratio: float = 0.25, threshold: float | None = None
    ) -> list[int]:
        """The block of ``ratio`` of all layers with the smallest distance.

        With `threshold`: the longest block whose distance is below it, the closest of equals.

        Raises:
            InvalidPlanError: `scores` carry no block distances (not from `compute_layer_scores`).
        """
        if not self.contiguous:
            return super().select_layers(scores, ratio, threshold)
        blocks = getattr(scores, "blocks", None)
        if blocks is None:
            raise InvalidPlanError(
                "These scores hold no block distances: pass what compute_layer_scores returned, "
                "or use PruneMePruner(..., contiguous=False)."
            )
        first, end = self.candidates.start, self.candidates.stop
        if threshold is None:
            lengths = [self.count_for(ratio)]
        else:
            lengths = list(range(len(self.candidates), 0, -1))
        for length in lengths:
            starts = range(first, end - length + 1)
            best = min(starts, key=lambda start: (blocks[start][length - 1], -start))
            if threshold is None or blocks[best][length - 1] < threshold:
                return list(range(best, best + length))
        return []

    def _options(self) -> dict[str, Any]:
        return {"contiguous": self.contiguous}


@register_strategy("smart")
class SmartPruner(MeasuredPruner):
    """Iterative optimisation: cut, measure the whole cut model, roll back what costs too much.

    Candidates are the layers that cost little alone. Each round tries every candidate left on
    top of the cuts made so far, so interactions between removals are seen (SLEB, Song et al.,
    arXiv:2402.09025, is the greedy search without candidates, tolerance and roll-back). The
    other half of healing, the repair of the weights, is ``prune_and_save(..., heal=)``.
    Cost: L + 1 evaluations for the scores, then one per candidate and round.
    """

    def description(self) -> str:
        return "Cuts layer by layer, measuring each combination; rolls back what costs too much."

    def select_layers(
        self,
        scores: Mapping[int, float],
        ratio: float | None = None,
        threshold: float | None = -0.02,
    ) -> list[int]:
        """Candidates: layers that alone score above `threshold`, or the cheapest `ratio` of all."""
        if ratio is not None:
            return super().select_layers(scores, ratio)
        return super().select_layers(scores, threshold=threshold)

    def optimize_selection(
        self,
        candidates: Sequence[int] | None,
        eval_data: Sequence[EvalItem],
        tolerance: float = 0.015,
        n_layers: int | None = None,
    ) -> list[int]:
        """The layers to remove, found by greedy rounds with roll-back.

        Args:
            candidates: layers that may go; None for every unprotected layer.
            eval_data: what quality is measured on.
            tolerance: largest relative loss of quality in total; 0.015 is 1.5 %.
            n_layers: exactly this many layers, whatever they cost; `tolerance` is not used.

        Returns:
            0-based indices, ascending; empty if even the cheapest cut costs too much. What was
            tried is in `.steps`.

        Raises:
            InvalidPlanError: candidates do not fit the model, are protected, or are fewer than
                `n_layers`.
        """
        pool = self.candidates if candidates is None else check_layers(candidates, self.num_layers)
        self.refuse_protected(pool)
        kept, self.steps = greedy_removal(
            self.quality(eval_data),
            list(pool),
            tolerance=None if n_layers is not None else tolerance,
            n_layers=n_layers,
        )
        return kept

    def choose_layers(
        self,
        scores: Mapping[int, float],
        eval_data: Sequence[EvalItem],
        *,
        ratio: float | None = None,
        threshold: float | None = None,
        tolerance: float | None = None,
        n_layers: int | None = None,
    ) -> list[int]:
        """An exact number (n_layers, or ratio) from all layers, or what the tolerance allows."""
        if n_layers is not None or ratio is not None:
            n_layers = self.check_count(n_layers) if ratio is None else self.count_for(ratio)
            return self.optimize_selection(None, eval_data, n_layers=n_layers)
        limit = {} if threshold is None else {"threshold": threshold}
        candidates = self.select_layers(scores, **limit)
        if tolerance is None:
            return self.optimize_selection(candidates, eval_data)
        return self.optimize_selection(candidates, eval_data, tolerance)
