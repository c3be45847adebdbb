"""Reading the residual stream: the states between the layers, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from ..data.items import EvalItem
from ..data.tokens import Batch
from ..distributed import portion
from ..errors import UnsupportedModelError
from ..evaluation.likelihood import encode_for
from ..model.forward import check_ids, evaluating, forward_options
from ..model.layer_stack import LayerStack
from ..progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

States = tuple[list[torch.Tensor], torch.Tensor]


class _LastState(Exception):
    """Ends a forward pass once the states between the layers are known."""


def read_stream(
    stack: LayerStack,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    batch_size: int,
    max_length: int,
    *,
    shared: bool,
) -> Iterator[States]:
    """The states of every batch and its mask; see `BasePruner.hidden_states`."""
    batches = encode_for(stack.model, tokenizer, eval_data, batch_size, max_length)
    if shared:
        mine = portion([batch.input_ids.numel() for batch in batches])
        batches = batches[mine.start : mine.stop]
    calls = [partial(_states, stack, batch) for batch in batches]
    yield from progress(stack.run_all(calls), "Reading activations", total=len(calls))


def _states(stack: LayerStack, batch: Batch) -> States:
    states: list[torch.Tensor] = []
    ran: list[int] = []

    def keep(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        ran.append(index)
        states.append(_by_token(entering, batch))
        if index == len(stack) - 1:
            states.append(_by_token(leaving, batch))
            raise _LastState

    check_ids(stack.model, batch.input_ids)
    batch = batch.to(stack.device)
    with evaluating(stack.model), stack.observe(keep), suppress(_LastState):
        # All positions: some models let their last layers see those of the logits alone.
        stack.model(**batch.inputs(), **forward_options(stack.model))
    if idle := sorted({*range(len(stack))} - {*ran}):
        raise UnsupportedModelError(
            f"Layers {idle} do not run on text alone, so there are no activations to read: use "
            "ablation or smart, which measure the whole model."
        )
    return states, batch.attention_mask.bool()


def _by_token(state: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The state as (sequences, tokens, hidden); several streams of a token count as one vector.

    Raises:
        UnsupportedModelError: it has other tokens than the batch.
    """
    size = batch.input_ids.shape
    if state.dim() == 4 and state.shape[1:3] == size:  # streams first, as Gemma 3n has them
        state = state.movedim(0, 2)
    if state.dim() == 4 and state.shape[:2] == size:
        state = state.flatten(2)
    if state.dim() != 3 or state.shape[:2] != size:
        raise UnsupportedModelError(
            f"The states between the layers have the shape {tuple(state.shape)} for "
            f"{size[0]} sequences of {size[1]} tokens, so they cannot be told apart by token: use "
            "ablation or smart, which measure the whole model."
        )
    return state


def neighbours(
    stack: LayerStack,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    batch_size: int,
    max_length: int,
) -> list[float]:
    """One minus the mean cosine across each layer, in float32: a quick Block Influence.

    See `BlockInfluencePruner`, which is exact and has every block.
    """
    sums, count = torch.zeros(len(stack), dtype=torch.float64), 0
    data = stack, tokenizer, eval_data, batch_size, max_length
    for states, real in read_stream(*data, shared=False):
        tokens = [state[real.to(state.device)].float() for state in states]
        cosines = [float(cosine_similarity(*pair, dim=-1).sum()) for pair in pairwise(tokens)]
        sums += torch.tensor(cosines, dtype=torch.float64)
        count += int(real.sum())
    return (1 - sums / count).tolist()
