"""Evaluation items to padded token batches; the caller's tokenizer is never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import InvalidDataError
from ..utils import logger, render_prompt, render_turns, turns_of
from .items import MAX_LENGTH, EvalItem, Prompt, calls_text, check_items

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
    max_length: int = MAX_LENGTH,
    closed: bool = True,
    stride: int | None = None,
) -> list[TokenSequence]:
    """Tokenize items into sequences, in the order of the data.

    A dict becomes the rendered prompt followed by its reference, and only the reference is
    scored; of a conversation, what the assistant said before as well. What is too long loses its
    beginning. A string is running text: every token but the first is scored, and a text longer
    than `max_length` is cut into windows, each opened by the tokenizer's BOS token where it uses
    one. How many items are too long is logged once.

    Args:
        tokenizer: it is not changed.
        max_length: longest sequence, in tokens.
        closed: whether the assistant's turns are scored as wholes: what it said before too, and,
            with a chat template, where a turn ends.
        stride: tokens from the start of one window of running text to the next; a later window
            scores only the tokens that the windows before it have not. If None, or not less than
            a window, windows do not overlap.

    Raises:
        InvalidDataError: the items cannot be used, or leave no token to score.
    """
    sequences: list[TokenSequence] = []
    in_windows = cut = 0
    for index, item in enumerate(check_items(eval_data)):
        if isinstance(item, str):
            parts = _windows(tokenizer, item, max_length, stride)
            in_windows += len(parts) > 1
        else:
            parts = _answers(tokenizer, item, closed)
            cut += any(len(ids) > max_length for ids, _ in parts)
        for ids, labels in parts:
            sequences.append(TokenSequence(index, ids[-max_length:], labels[-max_length:]))
    if in_windows or cut:
        _note_long(len(eval_data), max_length, in_windows, cut)
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
    max_length: int = MAX_LENGTH,
    closed: bool = True,
) -> list[Batch]:
    """`encode_sequences`, padded into batches of similar length."""
    sequences = encode_sequences(tokenizer, eval_data, max_length=max_length, closed=closed)
    return pad_sequences(tokenizer, sequences, batch_size)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int) -> list[int]:
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
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, continuation: str, *, closed: bool = True
) -> tuple[list[int], int]:
    """Token ids of a rendered prompt with its continuation, and how many belong to the prompt.

    The whole is tokenized at once and compared with the prompt alone, because tokens at the seam
    may differ from those of the parts. With a chat template the continuation is the assistant's
    turn; `closed` says whether the end of the turn belongs to it.
    """
    text, full = _rendered(tokenizer, prompt, continuation, closed)
    whole = _encode(tokenizer, full)
    return whole, min(_shared(tokenizer, text, whole), len(whole) - 1)


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    continuation: str,
    closed: bool,
    calls: Sequence[Any] = (),
) -> tuple[str, str]:
    """The text of a prompt, and that of the prompt with its continuation."""
    text = render_prompt(tokenizer, prompt)
    seam = "" if text[-1:].isspace() else " "
    if closed and getattr(tokenizer, "chat_template", None):
        turns, tools = turns_of(prompt)

        def answered(said: str, **more: Any) -> str:
            answer = {"role": "assistant", "content": said, **more}
            return render_turns(tokenizer, [*turns, answer], tools).rstrip()

        rendered = answered(continuation)
        if calls:
            said = "" if continuation == calls_text(calls) else continuation
            called = answered(said, tool_calls=calls)
            rendered = called if called != answered(said) else rendered  # not all write calls
        if rendered.startswith(text):  # some templates write past turns differently
            return text, rendered
    return text, text + seam + continuation


def _answers(
    tokenizer: PreTrainedTokenizerBase, item: Mapping[str, Any], closed: bool
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of an item, and of each earlier turn that is written otherwise there.

    Templates that write past turns without what the assistant thought are the usual reason: then
    that turn is read as it was when the assistant had just said it.
    """
    prompt, reference = item["prompt"], item["reference"]
    text, full = _rendered(tokenizer, prompt, reference, closed, item.get("tool_calls") or ())
    whole = _encode(tokenizer, full)
    start = min(_shared(tokenizer, text, whole), len(whole) - 1)
    labels = [IGNORED] * start + whole[start:]
    others: list[tuple[list[int], list[int]]] = []
    turns, tools = turns_of(prompt)
    for index in _said_before(turns) if closed else ():
        before = render_turns(tokenizer, turns[:index], tools, answering=True)
        after = render_turns(tokenizer, turns[: index + 1], tools).rstrip()
        if after.startswith(before) and full.startswith(after):
            first, last = (_shared(tokenizer, part, whole) for part in (before, after))
            labels[first:last] = whole[first:last]
        elif content := turns[index].get("content"):
            earlier = {"messages": turns[:index], **({"tools": tools} if tools else {})}
            ids, context = encode_pair(tokenizer, earlier, content)
            others.append((ids, [IGNORED] * context + ids[context:]))
    return [*others, (whole, labels)]


def _said_before(turns: Sequence[Mapping[str, Any]]) -> list[int]:
    """The assistant's turns that answer something."""
    roles = [turn["role"] for turn in turns]
    answered = roles.index("user") if "user" in roles else len(roles)
    return [index for index, role in enumerate(roles) if role == "assistant" and index > answered]


def _shared(tokenizer: PreTrainedTokenizerBase, text: str, whole: Sequence[int]) -> int:
    """How many tokens of `whole` are those of the text it begins with."""
    return len(list(takewhile(bool, map(eq, _encode(tokenizer, text), whole))))


@lru_cache
def _note_long(n_items: int, max_length: int, in_windows: int, cut: int) -> None:
    """Say once what becomes of items that are too long."""
    parts = [f"{in_windows} texts are read in windows"] if in_windows else []
    parts += [f"{cut} questions or conversations lose their beginning"] if cut else []
    logger.info("Of %d items, in %d tokens: %s", n_items, max_length, ", ".join(parts))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered text; a chat template has written the special tokens itself."""
    special = not getattr(tokenizer, "chat_template", None)
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, stride: int | None
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of the windows of a text."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = [ids.pop(0)] if ids and ids[0] == tokenizer.bos_token_id else []
    size = max_length - len(bos)
    step = min(stride or size, size)
    last = max(0, len(ids) - size)  # a window that begins later scores nothing new
    starts = range(0, last + step if ids else 0, step)
    overlap = len(bos) + size - step
    windows = [(bos + ids[a : a + size], overlap if a and step < size else 0) for a in starts]
    return [(window, [IGNORED] * context + window[context:]) for window, context in windows]


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
