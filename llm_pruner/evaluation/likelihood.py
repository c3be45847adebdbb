"""How likely a model finds given texts: the loss per sequence, per token, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from ..data.items import EvalItem
from ..data.tokens import IGNORED, Batch, encode_batches
from ..errors import InvalidDataError, NonFiniteError
from ..model.forward import (
    HINT,
    check_ids,
    evaluating,
    forward_options,
    input_device,
    position_limit,
)
from ..utils import at_least_one, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHUNK_ELEMENTS = 2**24  # float32 logits held at once beside the model's own: 64 MiB


def sequence_nll(
    model: torch.nn.Module, batches: Iterable[Batch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each sequence's scored tokens, by one pass over the batches.

    Which side is padded and what stands under the padding does not matter. Softmax in float32
    (float64 for a float64 model), sums in float64.

    Returns:
        Sums in nats and numbers of scored tokens: two (sequences,) float64 tensors on the CPU,
        in the order of the batches.

    Raises:
        NonFiniteError: a sum is NaN or infinite; the message names the items.
        InvalidDataError: no batch, or token ids that the model does not have.
    """
    sums, counts, rows = [], [], list[int]()
    with evaluating(model):
        for batch in batches:
            nll, owner = _token_nll(model, batch)
            size = len(batch.rows)
            sums.append(torch.zeros(size, dtype=torch.float64).index_add_(0, owner, nll))
            counts.append(torch.bincount(owner, minlength=size).double())
            rows += batch.rows
    if not rows:
        raise InvalidDataError("No batches: at least one sequence is needed.")
    total = torch.cat(sums)
    bad = sorted({row for row, ok in zip(rows, total.isfinite().tolist(), strict=True) if not ok})
    if bad:
        raise NonFiniteError(
            f"The log-likelihood of {len(bad)} of {len(set(rows))} items is NaN or infinite "
            f"(items {bad[:10]}): the model's weights or {HINT}"
        )
    return total, torch.cat(counts)


@dataclass(frozen=True)
class ScoredLogits:
    """What a model says about the scored tokens of a batch.

    Attributes:
        logits: (sequences, positions, vocabulary), of the last positions or of all.
        table: (3, tokens) int64: for each scored token its sequence, its position in `logits`
            and its id.
    """

    logits: torch.Tensor
    table: torch.Tensor

    @property
    def owner(self) -> torch.Tensor:
        """(tokens,) int64 on the CPU: the sequence each scored token belongs to."""
        return self.table[0].cpu()

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits (n, vocabulary), at least float32, and ids (n,) of a limited number of tokens."""
        exact = torch.promote_types(self.logits.dtype, torch.float32)
        step = max(1, CHUNK_ELEMENTS // self.logits.shape[-1])
        for start in range(0, self.table.shape[1], step):
            row, place, label = self.table[:, start : start + step]
            yield self.logits[row, place].to(exact), label


def scored_logits(model: torch.nn.Module, batch: Batch) -> ScoredLogits:
    """Run the model on a batch, padded on either side.

    The last token of the longest sequence is scored but not read: the model needs a position for
    every token but that.

    Raises:
        InvalidDataError: token ids that the model does not have.
    """
    batch = _pad_right(batch)
    check_ids(model, batch.input_ids)
    owner, position = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    width = max(1, batch.input_ids.shape[1] - 1)
    first = int(position.min()) if len(position) else width - 1
    given = batch.to(input_device(model)).inputs()
    inputs = {name: tensor[:, :width] for name, tensor in given.items()}
    logits = model(**inputs, **forward_options(model, width - first)).logits
    labels = batch.labels[owner, position + 1]
    column = position - (width - logits.shape[1])
    return ScoredLogits(logits, torch.stack([owner, column, labels]).to(logits.device))


def _token_nll(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of each scored token (float64, nats) and the sequence it belongs to; on the CPU."""
    scored = scored_logits(model, batch)
    parts = [cross_entropy(scores, label, reduction="none") for scores, label in scored.chunks()]
    return torch.cat([torch.zeros(0), *(part.cpu() for part in parts)]).double(), scored.owner


def _pad_right(batch: Batch) -> Batch:
    """The batch with its real tokens first, and an id that every model has as padding."""
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    tensors = (batch.input_ids, batch.attention_mask, batch.labels)
    ids, mask, labels = (tensor.gather(1, order).cpu() for tensor in tensors)
    return Batch(ids.masked_fill(mask == 0, 0), mask, labels, batch.rows)


def encode_for(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    batch_size: int = 8,
    max_length: int = 512,
) -> list[Batch]:
    """`encode_batches` with `max_length` lowered to what the model has positions for."""
    length = min(max_length, position_limit(model))
    return encode_batches(tokenizer, eval_data, batch_size=batch_size, max_length=length)


def batch_nll(model: torch.nn.Module, batches: Iterable[Batch]) -> float:
    """Mean of `sequence_nll` over all scored tokens, in nats per token."""
    total, count = sequence_nll(model, batches)
    return float(total.sum() / count.sum())


def mean_nll(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """Mean negative log-likelihood of references or running texts, in nats per token.

    Every scored token weighs the same. `max_length` is lowered to the model's own limit.

    Raises:
        InvalidDataError: the data cannot be used.
        NonFiniteError: the model gives NaN or infinite likelihoods.
    """
    at_least_one(batch_size=batch_size)
    batches = encode_for(model, tokenizer, eval_data, batch_size, max_length)
    return batch_nll(model, progress(batches, "likelihood"))


def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """``exp`` of `mean_nll`: 1 is perfect, the size of the vocabulary is pure guessing.

    Raises:
        InvalidDataError: the data cannot be used.
        NonFiniteError: the model gives NaN or infinite likelihoods, or ``exp`` overflows.
    """
    nll = mean_nll(model, tokenizer, eval_data, batch_size=batch_size, max_length=max_length)
    if nll > 700:
        raise NonFiniteError(f"A mean loss of {nll:.0f} nats has no perplexity: use mean_nll.")
    return math.exp(nll)
