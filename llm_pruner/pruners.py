"""The strategies: which decoder layers a model can do without.

A new one is a subclass of `BasePruner` with `description()` and `compute_layer_scores()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .base import DEFAULT_PROTECT, BasePruner
from .bases import MeasuredPruner, SimilarityPruner
from .batching import EvalItem, prompt_keys, refuse_overlap
from .errors import InvalidPlanError
from .processes import gather
from .registry import register_strategy
from .results import LayerScores, check_layers
from .rounds import Repairs, search_in_rounds
from .search import depth_curve, search_layers
from .stats import (
    AngularDistances,
    CosineSimilarities,
    RunningMean,
    RunningVariance,
    last_real_token,
    merged,
    real_tokens,
    sequence_means,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "AVSSPruner",
    "AblationPruner",
    "BasePruner",
    "BlockInfluencePruner",
    "PruneMePruner",
    "SimilarityPruner",
    "SmartPruner",
    "cumulative_avss",
]

Pool = Literal["sequence", "none", "neuron"]


@register_strategy("ablation")
class AblationPruner(MeasuredPruner):
    """Sensitivity: what the model loses when one layer is taken out, measured.

    The strategy to trust when layers are removed one by one; it does not see how removals
    add up (`SmartPruner` does). Cost: half of L + 1 evaluations.
    """

    def description(self) -> str:
        return "Measures the quality lost without each layer; half of L + 1 evaluations."

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

    Variant ``published`` (Song et al., "AVSS", arXiv:2411.02117): of the N activations of a
    layer, its outputs, AV is the variance, AS the share below `epsilon` in size, and the score
    AV / AS. What the activations are, `pool` says; paper and code disagree:

    - ``sequence``, the authors' code: AV is the sample variance over the hidden dimension of the
      mean over a sequence, averaged over sequences; AS counts all elements.
    - ``none``, the formula to the letter: every element of every token is an activation.
    - ``neuron``: an activation is the mean of one neuron over all tokens of all sequences, for AV
      and for AS.

    Departures: padding is left out; where no activation is below `epsilon`, as in nearly every
    residual stream, AS would be 0, and half an activation is counted instead; the lowest scores
    are selected (the authors' cumulative sum before sorting takes the first layers, see
    `cumulative_avss`).

    Variant ``repaired`` (default): an AS that is nearly always 0 tells nothing, and raw variance
    grows with depth in pre-norm models and so condemns the first layers. Here AV is the variance
    of what the layer adds to its input, divided by the variance of the input, and an element
    counts as sparse below a tenth of the root mean square of the addition.

    Args:
        variant: ``repaired`` or ``published``.
        pool: what an activation is, of the published variant.
        epsilon: size below which an activation is sparse, of the published variant; the authors'
            1e-5 by default.

    Raises:
        InvalidPlanError: an option that cannot be, or one of the published variant for the other.
    """

    unit = "activation variance / activation sparsity"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        protect: tuple[int, int] = DEFAULT_PROTECT,
        variant: Literal["repaired", "published"] = "repaired",
        pool: Pool = "sequence",
        epsilon: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, protect=protect, **options)
        if variant not in ("repaired", "published"):
            raise InvalidPlanError(f"variant={variant!r} must be 'repaired' or 'published'.")
        if pool not in get_args(Pool):
            raise InvalidPlanError(f"pool={pool!r} must be one of {', '.join(get_args(Pool))}.")
        if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
            raise InvalidPlanError(f"epsilon={epsilon!r} must be a number above 0.")
        if variant != "published" and (pool, epsilon) != ("sequence", 1e-5):
            raise InvalidPlanError(
                f"pool={pool!r} and epsilon={epsilon!r} have no meaning for variant={variant!r}: "
                "leave them out, or use variant='published'."
            )
        self.variant, self.pool, self.epsilon = variant, pool, epsilon

    def description(self) -> str:
        return "Reads the variance and sparsity of activations; one pass, a weak signal."

    def compute_layer_scores(self, eval_data: Sequence[EvalItem]) -> LayerScores:
        """AV / AS of every layer, in float64 over real tokens only."""
        score = self._published if self.variant == "published" else self._repaired
        return self._scored(score(eval_data))

    def _published(self, eval_data: Sequence[EvalItem]) -> dict[int, float]:
        layers = range(self.num_layers)
        per_sequence = [RunningMean() for _ in layers]
        pooled = [RunningVariance() for _ in layers]
        sparse = [RunningMean() for _ in layers]
        neurons = torch.zeros(self.num_layers, 1, dtype=torch.float64)  # sums over tokens
        tokens = 0
        for states, real in self.hidden_states(eval_data, shared=True):
            outputs = states[1:]
            if self.pool == "sequence":
                for index, means in enumerate(sequence_means(outputs, real)):
                    per_sequence[index].update(means.var(dim=-1))
            for chunk in real_tokens(outputs, real):  # (layers, tokens, hidden)
                if self.pool == "neuron":
                    neurons = neurons + chunk.sum(dim=1).cpu()  # (layers, hidden)
                    tokens += chunk.shape[1]
                    continue
                for index in layers:
                    sparse[index].update(chunk[index].abs() < self.epsilon)
                    if self.pool == "none":
                        pooled[index].update(chunk[index])
        per_sequence, pooled, sparse = merged(per_sequence), merged(pooled), merged(sparse)
        if self.pool == "neuron":
            total = sum(gather(neurons), neurons.new_zeros(1))
            for index, means in enumerate(total / sum(gather(tokens))):
                pooled[index].update(means)
                sparse[index].update(means.abs() < self.epsilon)
        variance = [
            per_sequence[index].mean if self.pool == "sequence" else pooled[index].variance
            for index in layers
        ]
        return {index: variance[index] / _share(sparse[index]) for index in layers}

    def _repaired(self, eval_data: Sequence[EvalItem]) -> dict[int, float]:
        added = [RunningVariance() for _ in self.layers]
        entering = [RunningVariance() for _ in self.layers]
        sparse = [RunningMean() for _ in self.layers]
        for states, real in self.hidden_states(eval_data, shared=True):
            for chunk in real_tokens(states, real):  # (layers + 1, tokens, hidden)
                for index in range(self.num_layers):
                    update = chunk[index + 1] - chunk[index]
                    size = update.square().mean(dim=-1, keepdim=True).sqrt()
                    added[index].update(update)
                    entering[index].update(chunk[index])
                    sparse[index].update(update.abs() < 0.1 * size)
        added, entering, sparse = merged(added), merged(entering), merged(sparse)
        scores = {}
        for index in range(self.num_layers):
            variance = added[index].variance / (entering[index].variance or math.nan)
            scores[index] = variance / _share(sparse[index])
        return scores

    def select_layers(
        self, scores: Mapping[int, float], ratio: float = 0.25, threshold: float | None = None
    ) -> list[int]:
        """The lowest share `ratio` of all layers, or every layer below `threshold`."""
        return super().select_layers(scores, ratio, threshold)

    def _options(self) -> dict[str, Any]:
        if self.variant == "repaired":
            return {"variant": self.variant}
        return {"variant": self.variant, "pool": self.pool, "epsilon": self.epsilon}


def _share(sparse: RunningMean) -> float:
    """Share of activations that are sparse; if none is, that of half an activation."""
    return max(sparse.total, 0.5) / sparse.count if sparse.count else math.nan


def cumulative_avss(scores: Mapping[int, float]) -> dict[int, float]:
    """CAVSS: for each layer the share of all AVSS that it and the layers below its score hold.

    The normalised scores AVSS_i / (sum of AVSS), added up in ascending order of the score, in
    which the layers are returned too; of equal scores the deeper layer first. The authors' code
    removes the layers up to a share of 0.25, but adds up in the order of depth and sorts
    afterwards, so that the first layers go, whatever they score.

    Raises:
        InvalidPlanError: the scores add up to nothing.

    Example:
        >>> shares = cumulative_avss({0: 5, 1: 1, 2: 2, 3: 8, 4: 4})
        >>> [layer for layer, share in shares.items() if share <= 0.25]
        [1, 2]
    """
    total, running, shares = math.fsum(scores.values()), 0.0, {}
    if not total > 0:
        raise InvalidPlanError(f"The scores add up to {total}: AVSS is above 0 for some layer.")
    for layer in sorted(scores, key=lambda layer: (scores[layer], -layer)):
        running += scores[layer]
        shares[layer] = running / total
    return shares


@register_strategy("pruneme")
class PruneMePruner(SimilarityPruner):
    """Angular distance across layers; the contiguous block that turns the stream least goes.

    Score of a block: mean angular distance between its input and its output at the last real
    token of every sequence (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper
    Layers", arXiv:2403.17887, section 3.2).

    Departures: padding is left out; float64; the output of the last layer is taken before the
    final norm.

    Args:
        contiguous: remove one block, the paper's choice (default); otherwise the layers with the
            smallest distance each.
    """

    unit = "angular distance (arccos(cos)/pi)"

    def description(self) -> str:
        return "Finds the block of layers that turns the hidden state least; one pass."

    def distances(self, eval_data: Sequence[EvalItem]) -> torch.Tensor:
        angles = AngularDistances(self.num_layers + 1)
        for states, real in self.hidden_states(eval_data, shared=True):
            angles.update(last_real_token(states, real))
        (angles,) = merged([angles])
        return angles.matrix


@register_strategy("bi")
class BlockInfluencePruner(SimilarityPruner):
    """Block Influence: one minus the cosine across a layer; the lowest layers go, all at once.

    BI_i = 1 - E[cos(X_i,t, X_i+1,t)] over all real tokens t of all sequences X, where X_i enters
    layer i (Men et al., "ShortGPT", arXiv:2403.03853). BI of a block of n layers is
    1 - E[cos(X_i,t, X_i+n,t)].

    Departures: padding is left out; float64, where half precision overflows in a norm and the
    authors' code puts 0.5 for a cosine that is NaN; the output of the last layer is taken before
    the final norm (``hidden_states[-1]`` is taken after it).

    Args:
        contiguous: remove the one block with the lowest BI; otherwise the layers with the lowest
            BI each, the paper's choice (default).
    """

    unit = "block influence (1 - cos)"
    contiguous_by_default = False

    def description(self) -> str:
        return "Finds the layers that turn the hidden states of all tokens least; one pass."

    def distances(self, eval_data: Sequence[EvalItem]) -> torch.Tensor:
        cosines = CosineSimilarities(self.num_layers + 1)
        for states, real in self.hidden_states(eval_data, shared=True):
            for tokens in real_tokens(states, real):
                cosines.update(tokens)
        (cosines,) = merged([cosines])
        return (1 - cosines.matrix).clamp(0, 2)


@register_strategy("smart")
class SmartPruner(MeasuredPruner):
    """Iterative optimisation: cut, measure the whole cut model, exchange, roll back.

    Layers are cut one by one, each measured on top of the cuts made so far, so that interactions
    between removals are seen (SLEB, Song et al., arXiv:2402.09025, is the plain greedy search);
    then layers are exchanged until no exchange is better. Candidates that are clearly worse on
    few items are not measured on all (`search.LayerSearch`). The other half of healing, the
    repair of the weights, is ``prune_and_save(..., heal=)``; with `repairs` the model is repaired
    after every few cuts too, and the next ones are chosen on the repaired model.

    Args:
        repairs: how to repair in between; not at all if None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        protect: tuple[int, int] = DEFAULT_PROTECT,
        repairs: Repairs | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, protect=protect, **options)
        self.repairs = repairs

    def description(self) -> str:
        return "Cuts layer by layer, measuring each combination; then exchanges layers."

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
        """The layers to remove, found by cuts, exchanges and roll-back.

        Args:
            candidates: layers that may go; None for every unprotected layer.
            eval_data: what quality is measured on.
            tolerance: largest relative loss of quality in total; 0.015 is 1.5 %.
            n_layers: exactly this many layers, whatever they cost; `tolerance` is not used. For
                both limits at once, see `plan`.

        Returns:
            0-based indices, ascending; empty if even the cheapest cut costs too much. What was
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
        self,
        scores: Mapping[int, float],
        eval_data: Sequence[EvalItem],
        *,
        ratio: float | None = None,
        threshold: float | None = None,
        tolerance: float | None = None,
        n_layers: int | None = None,
    ) -> list[int]:
        """A number of layers (n_layers, or ratio), or as many as the tolerance allows, of all.

        With a number and a tolerance: at most so many, within the tolerance. With a threshold: of
        the layers that alone score above it, as many as the tolerance allows.
        """
        if ratio is not None:
            n_layers = self.count_for(ratio)
        if n_layers is not None:
            return self._search(None, eval_data, n_layers=n_layers, tolerance=tolerance)
        candidates = None if threshold is None else self.select_layers(scores, threshold=threshold)
        if tolerance is None:
            return self.optimize_selection(candidates, eval_data)
        return self.optimize_selection(candidates, eval_data, tolerance)

    def _score_and_choose(
        self, eval_data: Sequence[EvalItem], **extent: Any
    ) -> tuple[LayerScores | None, list[int]]:
        """Scores are made only where a threshold asks for them: the search does without."""
        if "threshold" in extent:
            return super()._score_and_choose(eval_data, **extent)
        return None, self.choose_layers({}, eval_data, **extent)

    def _search(
        self,
        candidates: Sequence[int] | None,
        eval_data: Sequence[EvalItem],
        *,
        n_layers: int | None,
        tolerance: float | None,
    ) -> list[int]:
        pool = self.candidates if candidates is None else check_layers(candidates, self.num_layers)
        self.refuse_protected(pool)
        self.steps = []
        limits: dict[str, Any] = {"n_layers": n_layers, "tolerance": tolerance}
        limits["on_step"] = self.steps.append
        if self.repairs is None:
            return search_layers(self.quality(eval_data), pool, **limits)
        how = self.repairs
        refuse_overlap(how.items, prompt_keys(eval_data), "to repair with", "to choose layers on")
        return search_in_rounds(
            self.layers,
            lambda stack: self.quality_of(stack, eval_data),
            lambda layers: self.repair(layers, how.heal, how.items, how.lora),
            pool,
            every=how.every,
            **limits,
        )

    def _choices(self, eval_data: Sequence[EvalItem], n_layers: int) -> list[list[int]]:
        if self.repairs is not None:
            raise InvalidPlanError("A sweep does not repair on its way: leave repairs out.")
        self.steps = []
        quality, note = self.quality(eval_data), self.steps.append
        return [list(mask) for mask in depth_curve(quality, self.candidates, n_layers, note)]

    def _options(self) -> dict[str, Any]:
        if self.repairs is None:
            return super()._options()
        how = {"every": self.repairs.every, "heal": self.repairs.heal}
        return {**super()._options(), "repairs": how}
