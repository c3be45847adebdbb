"""The bases of two kinds of strategies: those that measure cuts, and those that compare states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .base import DEFAULT_PROTECT, BasePruner
from .batching import EvalItem, fingerprint
from .errors import InvalidPlanError
from .layers import LayerStack
from .objectives import ObjectiveLike, parse_objective
from .quality import RemovalQuality
from .results import LayerScores
from .search import single_removals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MeasuredPruner(BasePruner):
    """Base of the strategies that measure the model without layers instead of reading it.

    Args:
        objective: what quality is, a name of `objectives.OBJECTIVES` or several with weights:
            ``nll`` (likelihood of the references, or of running text), ``kl`` and ``agreement``
            (with the full model), ``accuracy`` (of items with choices), ``similarity`` (of
            generated answers); ``"nll=0.7,accuracy=0.3"``.
        journal: file that keeps every measurement, so that a killed run can be taken up again.
        seed: of the order in which a search looks at the items.
        options: the other options of `BasePruner`.
    """

    removes = "highest"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        protect: tuple[int, int] = DEFAULT_PROTECT,
        objective: ObjectiveLike = "nll",
        journal: str | Path | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, protect=protect, **options)
        if type(seed) is not int or seed < 0:
            raise InvalidPlanError(f"seed={seed!r} must be a whole number from 0.")
        self.shares, self.journal, self.seed = parse_objective(objective), journal, seed
        self._qualities: dict[str, RemovalQuality] = {}

    def quality(self, eval_data: Sequence[EvalItem]) -> RemovalQuality:
        """The measuring instrument for `eval_data`; what it has measured it remembers."""
        key = f"{self.layers.fingerprint}:{fingerprint(eval_data)}"
        if key not in self._qualities:
            self._qualities[key] = self._instrument(self.layers, eval_data)
        return self._qualities[key]

    def quality_of(self, stack: LayerStack, eval_data: Sequence[EvalItem]) -> RemovalQuality:
        """The same for the layers of any model; that of another one, as a repaired, is not kept."""
        if stack is self.layers:
            return self.quality(eval_data)
        return self._instrument(stack, eval_data)

    def _instrument(self, stack: LayerStack, eval_data: Sequence[EvalItem]) -> RemovalQuality:
        return RemovalQuality(
            stack,
            self.tokenizer,
            eval_data,
            objective=self.shares,
            batch_size=self.batch_size,
            journal=self.journal,
            seed=self.seed,
        )

    def compute_layer_scores(self, eval_data: Sequence[EvalItem]) -> LayerScores:
        """Relative change of quality when the layer alone is removed: -0.02 is 2 % worse.

        Costs about half of the L + 1 evaluations of the data: layers below the removed one run
        once for all.
        """
        quality = self.quality(eval_data)
        scores = single_removals(quality, range(self.num_layers))
        return LayerScores(scores, strategy=self.name, unit=quality.unit, removes=self.removes)

    def _options(self) -> dict[str, Any]:
        return {"objective": self.shares, "seed": self.seed}


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
        protect: tuple[int, int] = DEFAULT_PROTECT,
        contiguous: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, protect=protect, **options)
        if not isinstance(contiguous, bool | None):
            raise InvalidPlanError(f"contiguous={contiguous!r} must be True or False.")
        self.contiguous = self.contiguous_by_default if contiguous is None else contiguous

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
