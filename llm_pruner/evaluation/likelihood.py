"""How likely a model finds given texts: the loss per sequence, per token, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import MAX_LENGTH, EvalItem
from ..data.tokens import Batch, encode_batches
from ..errors import InvalidDataError, NonFiniteError
from ..model.forward import HINT, evaluating, position_limit
from ..progress import progress
from ..utils import at_least_one
from .token_measures import PreparedBatch, token_sums

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NLL = 700.0  # nats per token; beyond, exp overflows


def sequence_nll(
    model: torch.nn.Module, batches: Iterable[Batch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each sequence's scored tokens, by one pass over the batches.

    The side of the padding and the ids under it do not matter. Softmax in float32 (float64 for a
    float64 model), sums in float64.

    Returns:
        Sums in nats and numbers of scored tokens: two (sequences,) float64 tensors on the CPU,
        in the order of the batches.

    Raises:
        NonFiniteError: a sum is NaN or infinite; the message names the items.
        InvalidDataError: no batch, or token ids that the model does not have.
    """
    sums, counts, items = [], [], list[int]()
    with evaluating(model):
        for batch in batches:
            prepared = PreparedBatch.of(model, batch)
            sums.append(token_sums(["nll"], prepared.run(model))[0])
            counts.append(torch.bincount(prepared.owner, minlength=len(batch.items)).double())
            items += batch.items
    if not items:
        raise InvalidDataError("No batches: at least one sequence is needed.")
    total = torch.cat(sums)
    refuse_nonfinite(total, items)
    return total, torch.cat(counts)


def refuse_nonfinite(sums: torch.Tensor, items: Sequence[int]) -> None:
    """Raise NonFiniteError if a sum is NaN or infinite.

    Args:
        sums: (..., sequences), sums of token measures.
        items: index of the item each sequence comes from, for the message.
    """
    bad = sorted({items[index] for index in (~sums.isfinite()).nonzero()[:, -1].tolist()})
    if bad:
        raise NonFiniteError(
            f"The log-likelihood of {len(bad)} of {len(set(items))} items is NaN or infinite "
            f"(items {bad[:10]}): the model's weights or {HINT}"
        )


def encode_for(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    batch_size: int = 8,
    max_length: int = MAX_LENGTH,
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
    max_length: int = MAX_LENGTH,
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
    **options: int,
) -> float:
    """``exp`` of `mean_nll`, which takes the same arguments.

    1 is perfect, the size of the vocabulary is pure guessing.

    Raises:
        NonFiniteError: also where ``exp`` overflows.
    """
    nll = mean_nll(model, tokenizer, eval_data, **options)
    if nll > MAX_NLL:
        raise NonFiniteError(f"A mean loss of {nll:.0f} nats has no perplexity: use mean_nll.")
    return math.exp(nll)
