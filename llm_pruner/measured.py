"""The base of strategies that measure the model without layers instead of reading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import DEFAULT_PROTECT, BasePruner
from .batching import EvalItem, fingerprint
from .errors import InvalidPlanError
from .layers import LayerStack
from .objectives import ObjectiveLike, parse_objective
from .quality import RemovalQuality
from .results import LayerScores
from .search import single_removals
from .utils import model_fingerprint

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
        return self.quality_of(self.layers, eval_data)

    def quality_of(self, stack: LayerStack, eval_data: Sequence[EvalItem]) -> RemovalQuality:
        """The same instrument for the layers of another model, such as a repaired one."""
        key = f"{model_fingerprint(stack.model)}:{fingerprint(eval_data)}"
        if key not in self._qualities:
            self._qualities[key] = RemovalQuality(
                stack,
                self.tokenizer,
                eval_data,
                objective=self.shares,
                batch_size=self.batch_size,
                journal=self.journal,
                seed=self.seed,
            )
        return self._qualities[key]

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
