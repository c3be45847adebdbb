"""Evaluation items to padded token batches; the caller's tokenizer is never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..chat_template import render_chat
from ..errors import InvalidDataError
from ..utils import render_prompt
from .items import EvalItem, check_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # the label of a token that is not scored, as in transformers


@dataclass(frozen=True)
class Batch:
    """Token sequences of one batch, padded on one side.

    Attributes:
        input_ids: (sequences, tokens) int64.
        attention_mask: (sequences, tokens) int64, 1 for real tokens. Nothing else marks the
            padding: what `input_ids` holds under it has no meaning.
        labels: (sequences, tokens) int64, `input_ids` where the token is scored, else -100.
        items: index in the data of the item each sequence comes from.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    items: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        tensors = (self.input_ids, self.attention_mask, self.labels)
        input_ids, attention_mask, labels = (tensor.to(device) for tensor in tensors)
        return Batch(input_ids, attention_mask, labels, self.items)

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model's forward takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


class TokenSequence(NamedTuple):
    """One token sequence before padding.

    Attributes:
        item: index in the data of the item it comes from.
        ids: its tokens.
        labels: `ids` where the token is scored, else -100.
    """

    item: int
    ids: list[int]
    labels: list[int]


def encode_sequences(
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    *,
    max_length: int = 512,
    closed: bool = True,
    stride: int | None = None,
) -> list[TokenSequence]:
    """Tokenize items into sequences, in the order of the data.

    A dict becomes the rendered prompt followed by its reference, and only the reference is
    scored. A prompt that is too long loses its beginning. A string is running text: every token
    but the first is scored, and a text longer than `max_length` is cut into windows, each opened
    by the tokenizer's BOS token where it uses one.

    Args:
        tokenizer: it is not changed.
        max_length: longest sequence, in tokens.
        closed: with a chat template, whether the end of the assistant's turn is scored too: where
            an answer ends is part of the answer.
        stride: tokens from the start of one window of running text to the next; a later window
            scores only the tokens that the windows before it have not. If None, or not less than
            a window, windows do not overlap.

    Raises:
        InvalidDataError: the items cannot be used, or leave no token to score.
    """
    sequences: list[TokenSequence] = []
    for index, item in enumerate(check_items(eval_data)):
        if isinstance(item, str):
            parts = _windows(tokenizer, item, max_length, stride)
        else:
            parts = [encode_pair(tokenizer, item["prompt"], item["reference"], closed=closed)]
        for ids, context in parts:
            labels = [IGNORED] * context + ids[context:]
            sequences.append(TokenSequence(index, ids[-max_length:], labels[-max_length:]))
    sequences = [one for one in sequences if any(label != IGNORED for label in one.labels[1:])]
    if not sequences:
        raise InvalidDataError(
            f"None of the {len(eval_data)} items leaves a token to score after tokenization: "
            "texts need at least two tokens."
        )
    return sequences


def pad_sequences(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequence[TokenSequence], batch_size: int
) -> list[Batch]:
    """Batches of sequences of similar length, padded on the right."""
    ordered = sorted(sequences, key=lambda one: (len(one.ids), one.item))
    pad_id = tokenizer.pad_token_id or 0
    starts = range(0, len(ordered), batch_size)
    return [_pad(ordered[start : start + batch_size], pad_id) for start in starts]


def encode_batches(
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    closed: bool = True,
) -> list[Batch]:
    """`encode_sequences`, padded into batches of similar length."""
    sequences = encode_sequences(tokenizer, eval_data, max_length=max_length, closed=closed)
    return pad_sequences(tokenizer, sequences, batch_size)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int) -> list[int]:
    """Token ids of a rendered prompt for a model to continue.

    A prompt longer than `max_length` tokens loses its beginning. An end token that some
    tokenizers put behind every text is dropped: nothing would follow it.

    Raises:
        InvalidDataError: the tokenizer makes no token of it.
    """
    ids = _encode(tokenizer, render_prompt(tokenizer, prompt))
    if not ids:
        raise InvalidDataError(
            f"The tokenizer makes no token of the prompt {prompt!r:.80}: check its chat template, "
            "or leave the prompt out."
        )
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids[-max_length:]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, *, closed: bool = True
) -> tuple[list[int], int]:
    """Token ids of a rendered prompt with its continuation, and how many belong to the prompt.

    The whole is tokenized at once and compared with the prompt alone, because tokens at the seam
    may differ from those of the parts. With a chat template the continuation is the assistant's
    turn; `closed` says whether the end of the turn belongs to it.
    """
    text = render_prompt(tokenizer, prompt)
    seam = "" if text[-1:].isspace() else " "
    full = text + seam + continuation
    if closed and getattr(tokenizer, "chat_template", None):
        turns = [("user", prompt), ("assistant", continuation)]
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered = render_chat(tokenizer, messages).rstrip()
        if rendered.startswith(text):  # some templates write past turns differently
            full = rendered
    alone, whole = _encode(tokenizer, text), _encode(tokenizer, full)
    n_prompt = len(list(takewhile(bool, map(eq, alone, whole))))  # equal at the beginning
    return whole, min(n_prompt, len(whole) - 1)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered text; a chat template has written the special tokens itself."""
    special = not getattr(tokenizer, "chat_template", None)
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, stride: int | None
) -> list[tuple[list[int], int]]:
    """The windows of a text, and how many tokens of each are context only."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = [ids.pop(0)] if ids and ids[0] == tokenizer.bos_token_id else []
    size = max_length - len(bos)
    step = min(stride or size, size)
    last = max(0, len(ids) - size)  # a window that begins later scores nothing new
    starts = range(0, last + step if ids else 0, step)
    overlap = len(bos) + size - step
    return [(bos + ids[a : a + size], overlap if a and step < size else 0) for a in starts]


def pad_left(sequences: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left for generation: (input_ids, attention_mask)."""
    width = max(map(len, sequences))
    ids = [[pad_id] * (width - len(s)) + list(s) for s in sequences]
    mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
    return torch.tensor(ids), torch.tensor(mask)


def _pad(sequences: Sequence[TokenSequence], pad_id: int) -> Batch:
    width = max(len(one.ids) for one in sequences)

    def stack(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (width - len(value)) for value in values])

    return Batch(
        input_ids=stack([one.ids for one in sequences], pad_id),
        attention_mask=stack([[1] * len(one.ids) for one in sequences], 0),
        labels=stack([one.labels for one in sequences], IGNORED),
        items=tuple(one.item for one in sequences),
    )
