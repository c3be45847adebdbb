"""AVSS: variance and sparsity of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..data.items import EvalItem
from ..errors import InvalidPlanError
from ..layer_scores import LayerScores
from ..stats import RunningMean, RunningVariance, merged, real_tokens, sequence_means
from .base import BasePruner
from .registry import register_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Pool = Literal["sequence", "none"]


@register_strategy("avss")
class AVSSPruner(BasePruner):
    """Activation variance divided by activation sparsity; the lowest layers go. One pass.

    Variant ``published`` (Song et al., "AVSS", arXiv:2411.02117): of the N activations of a
    layer, its outputs, AV is the variance, AS the share below `epsilon` in size, and the score
    AV / AS. Paper and code disagree on what the activations are; `pool` chooses:

    - ``sequence``, the authors' code: AV is the sample variance over the hidden dimension of the
      mean over a sequence, averaged over sequences; AS counts all elements.
    - ``none``, the formula to the letter: every element of every token is an activation.

    Departures: padding is left out; where no activation is below `epsilon`, as in nearly every
    residual stream, AS would be 0, and half an activation is counted instead; the lowest scores
    are selected (the authors add up scores in the order of depth before they sort, which removes
    the first layers whatever they score).

    Variant ``repaired`` (default): an AS that is nearly always 0 carries no signal, and raw
    variance grows with depth in pre-norm models and so condemns the first layers. Here AV is the
    variance of what the layer adds to its input, divided by the variance of the input, and an
    element counts as sparse below a tenth of the root mean square of the addition.

    Args:
        variant: ``repaired`` or ``published``.
        pool: what an activation is, for the published variant.
        epsilon: size below which an activation is sparse, for the published variant; the authors'
            1e-5 by default.

    Raises:
        InvalidPlanError: an unknown option, or one of the published variant for the other.
    """

    unit = "activation variance / activation sparsity"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        variant: Literal["repaired", "published"] = "repaired",
        pool: Pool = "sequence",
        epsilon: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
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
        for states, real in self.hidden_states(eval_data, shared=True):
            outputs = states[1:]
            if self.pool == "sequence":
                for index, means in enumerate(sequence_means(outputs, real)):
                    per_sequence[index].update(means.var(dim=-1))
            for tokens in real_tokens(outputs, real):  # (layers, tokens, hidden)
                for index in layers:
                    sparse[index].update(tokens[index].abs() < self.epsilon)
                    if self.pool == "none":
                        pooled[index].update(tokens[index])
        per_sequence, pooled, sparse = merged(per_sequence), merged(pooled), merged(sparse)
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
