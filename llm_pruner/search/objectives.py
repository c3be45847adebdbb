"""What quality is: measures of a model on items, alone or weighted, sample by sample.

A measure gives every sample (an item, or a window of running text) a value and a weight; its
mean over samples is turned into a quality, of which more is better for every measure. What a
threshold or tolerance limits is the relative change of that quality: -0.02 is 2 % less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..data.items import EvalItem
from ..data.tokens import IGNORED, Batch, Row, encode_rows, pad_rows
from ..errors import InvalidDataError, InvalidPlanError, UnknownNameError
from ..evaluation.generation import ModelEvaluator
from ..evaluation.likelihood import ScoredLogits, scored_logits
from ..evaluation.tasks import check_choices, choice_score
from ..evaluation.token_measures import TOKEN_READERS
from ..model.forward import evaluating, position_limit
from ..model.layer_stack import LayerStack
from .prefix_sharing import Mask, replayed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_LENGTH = 512  # tokens of a sample
Readings = Iterator[tuple[Mask, torch.Tensor]]


@dataclass(frozen=True)
class Samples:
    """What is measured on: the token sequences of the items, and the items.

    Attributes:
        stack: the layers of the model.
        tokenizer: its tokenizer.
        rows: one token sequence per sample.
        items: for each sample its item; None for a window of running text.
        batch_size: sequences per forward pass.
    """

    stack: LayerStack
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    items: list[dict[str, Any] | None]
    batch_size: int


class Measure(Protocol):
    """One or more measures that come from the same passes.

    Attributes:
        prunes: whether it needs the pruned model itself, and not only passes without the layers.
    """

    prunes: bool

    def __init__(self, samples: Samples, names: Sequence[str]) -> None: ...

    def weights(self) -> torch.Tensor:
        """(names, samples) float64, 0 where a sample plays no part."""
        ...

    def read(self, which: Sequence[int], masks: Sequence[Mask]) -> Readings:
        """For each mask the values of the samples `which`: (names, len(which)) float64."""
        ...


class TokenMeasures:
    """Measures of the scored tokens: those of a reference, or of running text.

    ``nll``: negative log-likelihood of the token, in nats; quality exp(-mean), the likelihood
    per token, or 1 / perplexity. ``kl``: KL divergence of the full model's next-token distribution
    to that of the model without layers, in nats; quality exp(-mean). ``agreement``: 1 where both
    find the same token most likely; quality the mean.
    """

    prunes = False

    def __init__(self, samples: Samples, names: Sequence[str]) -> None:
        self._samples, self._names = samples, names

    def weights(self) -> torch.Tensor:
        """Numbers of scored tokens."""
        counts = [sum(label != IGNORED for label in row.labels[1:]) for row in self._samples.rows]
        return torch.tensor([counts] * len(self._names), dtype=torch.float64)

    def read(self, which: Sequence[int], masks: Sequence[Mask]) -> Readings:
        """Sums over the scored tokens of each sample."""
        (batch,) = pad_rows(
            self._samples.tokenizer,
            [Row(place, *self._samples.rows[row][1:]) for place, row in enumerate(which)],
            len(which),
        )
        compares = set(self._names) & {"kl", "agreement"}
        full: list[ScoredLogits] = []

        def run(model: torch.nn.Module) -> torch.Tensor:
            with evaluating(model):
                scored = scored_logits(model, batch)
                if compares and not full:  # the full model's pass is the first
                    full.append(scored)
                return self._sums(scored, full[0] if full else scored, batch)

        wanted = set(masks)
        every = {*masks, ()} if compares else wanted
        for mask, values in replayed(self._samples.stack, every, run):
            if mask in wanted:
                yield mask, values

    def _sums(self, scored: ScoredLogits, full: ScoredLogits, batch: Batch) -> torch.Tensor:
        parts = []
        for (scores, label), (wanted, _) in zip(scored.chunks(), full.chunks(), strict=True):
            values = [TOKEN_READERS[name](scores, label, wanted) for name in self._names]
            parts.append(torch.stack(values).cpu().double())
        sums = torch.zeros(len(self._names), len(batch.rows), dtype=torch.float64)
        rows = torch.tensor(batch.rows)
        return sums.index_add_(1, rows[scored.owner], torch.cat(parts, dim=1))


class ChoiceMeasure:
    """``accuracy``: 1 where the reference is the choice with the greatest summed log-likelihood.

    On items with ``choices``; other items play no part.
    """

    prunes = False

    def __init__(self, samples: Samples, names: Sequence[str]) -> None:
        self._samples = samples
        self._chosen = [bool(item and item.get("choices")) for item in samples.items]
        for place, item in enumerate(samples.items):
            if item and self._chosen[place]:
                check_choices(samples.rows[place].item, item)
        if not any(self._chosen):
            raise InvalidDataError(
                "Accuracy needs items with 'choices', and none has any: use another objective "
                "(nll, kl, agreement, similarity), or items of a multiple-choice task."
            )

    def weights(self) -> torch.Tensor:
        """1 for every item with choices."""
        return torch.tensor([self._chosen], dtype=torch.float64)

    def read(self, which: Sequence[int], masks: Sequence[Mask]) -> Readings:
        """0 or 1 per item."""
        samples = self._samples
        asked = {place: samples.items[row] for place, row in enumerate(which) if self._chosen[row]}
        pairs: list[EvalItem] = [
            {"prompt": item["prompt"], "reference": choice}
            for item in asked.values()
            if item
            for choice in item["choices"]
        ]
        losses = self._losses(pairs, masks)
        for mask in masks:
            values = torch.zeros(1, len(which), dtype=torch.float64)
            left = iter(losses[mask].tolist())
            for place, item in asked.items():
                if item:
                    values[0, place] = choice_score(item, [next(left) for _ in item["choices"]])
            yield mask, values

    def _losses(self, pairs: Sequence[EvalItem], masks: Sequence[Mask]) -> dict[Mask, torch.Tensor]:
        """For each mask the summed negative log-likelihood of every choice, in nats."""
        samples = self._samples
        losses = {mask: torch.zeros(len(pairs), dtype=torch.float64) for mask in masks}
        if not pairs:
            return losses
        limit = position_limit(samples.stack.model) + 1  # the last token is scored, not read
        rows = encode_rows(samples.tokenizer, pairs, max_length=limit, closed=False)
        rows.sort(key=lambda row: len(row.ids))
        choices = replace(samples, rows=rows, items=[None] * len(rows))
        reader = TokenMeasures(choices, ["nll"])
        starts = range(0, len(rows), samples.batch_size)
        batches = [range(x, min(x + samples.batch_size, len(rows))) for x in starts]
        calls = [partial(_list, reader.read(batch, masks)) for batch in batches]
        for batch, readings in zip(batches, samples.stack.run_all(calls), strict=True):
            owner = torch.tensor([rows[row].item for row in batch])
            for mask, values in readings:
                losses[mask].index_add_(0, owner, values[0])
        return losses


def _list(readings: Readings) -> list[tuple[Mask, torch.Tensor]]:
    return list(readings)


class AnswerMeasure:
    """``similarity``: cosine similarity of a generated answer to the reference.

    See `ModelEvaluator.evaluate`. Generates with each pruned model, so nothing is shared
    between masks: by far the dearest measure.
    """

    prunes = True

    def __init__(self, samples: Samples, names: Sequence[str]) -> None:
        self._samples = samples
        samples.stack.require_weights("the similarity of answers, which generates")
        if not any(samples.items):
            raise InvalidDataError(
                "Similarity of answers needs items with 'prompt' and 'reference'; all of these "
                "are running text. Use nll, kl or agreement."
            )

    def weights(self) -> torch.Tensor:
        """1 for every item with a reference."""
        return torch.tensor([[bool(item) for item in self._samples.items]], dtype=torch.float64)

    def read(self, which: Sequence[int], masks: Sequence[Mask]) -> Readings:
        """A cosine per item."""
        samples = self._samples
        asked = [(place, samples.items[row]) for place, row in enumerate(which)]
        questions = [(place, item) for place, item in asked if item]
        for mask in masks:
            values = torch.zeros(1, len(which), dtype=torch.float64)
            if questions:
                model = samples.stack.remove(mask) if mask else samples.stack.model
                evaluator = ModelEvaluator(model, samples.tokenizer, batch_size=samples.batch_size)
                places, items = zip(*questions, strict=True)
                scores = evaluator.evaluate_items(items)
                values[0, list(places)] = torch.tensor(scores, dtype=torch.float64)
            yield mask, values


@dataclass(frozen=True)
class Objective:
    """How a measure becomes a quality, of which more is better.

    Attributes:
        measured_by: the class that reads it.
        unit: what a relative change of the quality is a change of.
        is_loss: whether the mean over tokens or items is a loss in nats, and the quality
            exp(-mean); otherwise the quality is the mean itself.
    """

    measured_by: type[Measure]
    unit: str
    is_loss: bool = False

    def quality(self, mean: float) -> float:
        """The quality that a mean is."""
        return math.exp(-mean) if self.is_loss else mean

    def slope(self, mean: float) -> float:
        """Derivative of `quality`."""
        return -math.exp(-mean) if self.is_loss else 1.0


OBJECTIVES: dict[str, Objective] = {
    "nll": Objective(TokenMeasures, "likelihood per token", is_loss=True),
    "kl": Objective(TokenMeasures, "exp(-KL divergence from the full model)", is_loss=True),
    "agreement": Objective(TokenMeasures, "top-1 agreement with the full model"),
    "accuracy": Objective(ChoiceMeasure, "multiple-choice accuracy"),
    "similarity": Objective(AnswerMeasure, "answer similarity"),
}
ObjectiveLike = str | Mapping[str, float]


def parse_objective(objective: ObjectiveLike) -> dict[str, float]:
    """Measures and their shares, which add up to 1.

    Args:
        objective: a name of `OBJECTIVES`; several as ``"nll=0.7,kl=0.3"``, or a dict.

    Raises:
        UnknownNameError: no measure of a name.
        InvalidPlanError: a weight that is not a positive number, or a name given twice.
    """
    if not isinstance(objective, str | Mapping):
        raise InvalidPlanError(
            f"objective={objective!r} must be a name, as nll, or several with weights, as "
            "nll=0.7,kl=0.3."
        )
    if isinstance(objective, Mapping):
        pairs = [(name, _number(weight)) for name, weight in objective.items()]
    else:
        fields = [part.partition("=") for part in objective.split(",")]
        pairs = [(name.strip(), _number(weight) if eq else 1.0) for name, eq, weight in fields]
    for name, weight in pairs:
        if name not in OBJECTIVES:
            raise UnknownNameError.of("objective", name, OBJECTIVES)
        if not 0 < weight < math.inf:
            raise InvalidPlanError(
                f"Objective {objective!r}: the weight of {name!r} must be a positive number, as "
                "in nll=0.7,kl=0.3."
            )
    if not pairs or len({name for name, _ in pairs}) < len(pairs):
        raise InvalidPlanError(f"Objective {objective!r} must name each measure once.")
    total = math.fsum(weight for _, weight in pairs)
    return {name: weight / total for name, weight in pairs}


def _number(value: Any) -> float:
    """The number that `value` is; NaN, which no weight may be, if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
