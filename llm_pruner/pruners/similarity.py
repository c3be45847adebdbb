"""Strategies that compare the residual stream before and after a block of layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..data.items import EvalItem
from ..errors import InvalidPlanError
from ..goals.budget import Budget
from ..layer_scores import LayerScores
from ..stats import AngularDistances, CosineSimilarities, last_real_token, merged, real_tokens
from .base import BasePruner
from .registry import register_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SimilarityPruner(BasePruner):
    """Base of the strategies that compare the residual stream before and after a block of layers.

    A block is a run of neighbouring layers. One pass over the data gives the distance of every
    block of every length, since what enters and what leaves a block are states that any pass has.

    Args:
        contiguous: remove one block; otherwise the layers with the smallest distance each. By
            default what the strategy's paper does.
        options: the other options of `BasePruner`.

    Raises:
        InvalidPlanError: `contiguous` is no truth value.
    """

    contiguous_by_default: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        contiguous: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        if not isinstance(contiguous, bool | None):
            raise InvalidPlanError(f"contiguous={contiguous!r} must be True or False.")
        self.contiguous = self.contiguous_by_default if contiguous is None else contiguous
        self.removable = replace(self.removable, runs=self.contiguous)

    @abstractmethod
    def distances(self, eval_data: Sequence[EvalItem]) -> torch.Tensor:
        """(L + 1, L + 1) float64: what separates state i from state j, in one pass.

        State i is the input of layer i, state L the output of the last layer.
        """

    def compute_layer_scores(self, eval_data: Sequence[EvalItem]) -> LayerScores:
        """Distances of single layers, and in `.blocks` of every block: ``blocks[start][n - 1]``."""
        matrix = self.distances(eval_data).tolist()
        blocks = [matrix[start][start + 1 :] for start in range(self.num_layers)]
        scores = {index: blocks[index][0] for index in range(self.num_layers)}
        return LayerScores(scores, strategy=self.name, unit=self.unit, blocks=blocks)

    def select_layers(
        self, scores: Mapping[int, float], ratio: float = 0.25, threshold: float | None = None
    ) -> list[int]:
        """The block of ``ratio`` of all layers with the smallest distance.

        With `threshold`: the longest block whose distance is below it, the closest of equals.
        Without `contiguous` the layers with the smallest distance, or all below `threshold`.

        Raises:
            InvalidPlanError: `scores` carry no block distances (not from `compute_layer_scores`).
        """
        if not self.contiguous:
            return super().select_layers(scores, ratio, threshold)
        blocks = getattr(scores, "blocks", None)
        if blocks is None:
            raise InvalidPlanError(
                "These scores hold no block distances: pass what compute_layer_scores returned, "
                f"or use {type(self).__name__}(..., contiguous=False)."
            )
        sets = self.removable.sets
        budget = Budget(ratio=ratio) if threshold is None else Budget(threshold=threshold)
        count = budget.count(self.removable)
        lengths = range(len(self.candidates), 0, -1) if count is None else [count]
        for length in lengths:
            starts = [run.start for run in sets.of_size(length) if sets.allows(run)]
            if not starts:
                continue
            best = min(starts, key=lambda start: (blocks[start][length - 1], -start))
            if threshold is None or blocks[best][length - 1] < threshold:
                return list(range(best, best + length))
        return []

    def _options(self) -> dict[str, Any]:
        return {"contiguous": self.contiguous}


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
