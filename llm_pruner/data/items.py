"""Evaluation items: what they are, whether they are valid, and their fingerprints.

An item is running text, a string, or a question, a dict with `prompt` and `reference`. The prompt
is a text, or a conversation: ``{"messages": [...]}``, dicts with `role` and `content` as chat
templates take them, up to the turn that the reference is; with `tools` where it has any. A turn
that calls tools has its `tool_calls` beside the reference, which is what is said with them, or else
the calls as JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral
from typing import Any

from ..errors import InvalidDataError
from ..utils import shown

Item = dict[str, Any]
EvalItem = Item | str
Prompt = dict[str, Any] | str
MAX_DIGITS = 1000  # of a number
MAX_LENGTH = 512  # tokens of a sequence, unless another length is asked for
NOTHING: tuple[object, ...] = (None, "", [])  # what stands where a row has no value


class Text(str):
    """Running text that knows what kind of text it is, such as the name of its source."""

    __slots__ = ("kind",)
    kind: str

    def __new__(cls, text: str, kind: str) -> Text:
        """`text`, which is of a kind."""
        made = super().__new__(cls, text)
        made.kind = kind
        return made

    def __reduce__(self) -> tuple[type[Text], tuple[str, str]]:
        """How it is sent to other processes."""
        return Text, (str(self), self.kind)


def kind_of(item: EvalItem) -> str:
    """The kind of data an item belongs to; empty where only one source was loaded."""
    if isinstance(item, Text):
        return item.kind
    return "" if isinstance(item, str) else str(item.get("kind", ""))


def of_kind(item: EvalItem, kind: str) -> EvalItem:
    """The item with its kind."""
    return Text(item, kind) if isinstance(item, str) else {**item, "kind": kind}


def check_items(eval_data: Sequence[EvalItem]) -> Sequence[EvalItem]:
    """Return `eval_data` if every item is valid.

    Raises:
        InvalidDataError: no items, an item that is neither text nor a dict with `prompt` and
            `reference`, or one whose texts are empty or not strings. The message names the item.
    """
    if isinstance(eval_data, str | bytes) or not isinstance(eval_data, Sequence):
        raise InvalidDataError(
            f"eval_data must be a list of items, got {type(eval_data).__name__}: pass a list of "
            "dicts with 'prompt' and 'reference', or a list of strings (running text)."
        )
    if not eval_data:
        raise InvalidDataError(
            "eval_data is empty: at least one item is needed, a dict with 'prompt' and "
            "'reference' or a string (running text)."
        )
    for index, item in enumerate(eval_data):
        if isinstance(item, str):
            check_text(f"eval_data[{index}]['text']", item)
        elif isinstance(item, dict):
            _check_dict(f"eval_data[{index}]", item)
        else:
            raise InvalidDataError(
                f"eval_data[{index}] is a {type(item).__name__}: items are dicts with 'prompt' "
                "and 'reference', or strings."
            )
    return eval_data


def _check_dict(where: str, item: dict[str, Any]) -> None:
    if odd := [field for field in item if not isinstance(field, str)]:
        raise InvalidDataError(f"{where} has a field {shown(odd[0])}: names of fields are strings.")
    for field in ("prompt", "reference"):
        if field not in item:
            raise InvalidDataError(
                f"{where} has no {field!r} (its fields: {sorted(item)!r:.300}): every item needs "
                "'prompt' and 'reference'. load_eval_dataset(n, rows) reads rows of other layouts."
            )
    check_prompt(f"{where}['prompt']", item["prompt"])
    check_text(f"{where}['reference']", item["reference"])
    if not isinstance(calls := item.get("tool_calls", []), list):
        raise InvalidDataError(f"{where}['tool_calls'] must be a list of calls: {shown(calls)}.")
    task, aliases = item.get("task"), item.get("aliases")
    if not isinstance(task, str | int | float | None):
        raise InvalidDataError(f"{where}['task'] must be a string: {shown(task)}.")
    if isinstance(task, str) and task:
        check_text(f"{where}['task']", task)
    if aliases is not None and not isinstance(aliases, list | tuple):
        raise InvalidDataError(f"{where}['aliases'] must be a list of strings: {shown(aliases)}.")
    for alias in (alias for alias in aliases or () if alias != ""):
        check_text(f"{where}['aliases']", alias)


def check_text(where: str, value: object) -> None:
    """Raise InvalidDataError, which says `where`, if `value` is not text a model can be given."""
    if not isinstance(value, str):
        raise InvalidDataError(f"{where} is a {type(value).__name__}, not text: {shown(value)}.")
    if not value.strip():
        raise InvalidDataError(f"{where} is empty: remove or fill it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidDataError(f"{where} is not valid Unicode text: {error}.") from None


def check_prompt(where: str, value: object) -> None:
    """Raise InvalidDataError, which says `where`, if `value` is no text and no conversation."""
    if not isinstance(value, dict):
        check_text(where, value)
        return
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidDataError(f"{where}['messages'] must be a list of turns: {shown(messages)}.")
    for index, message in enumerate(messages):
        place = f"{where}['messages'][{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidDataError(f"{place} must be a dict with 'role': {shown(message)}.")
        if message.get("content") or not message.get("tool_calls"):
            check_text(f"{place}['content']", message.get("content"))


def fingerprint(eval_data: Sequence[EvalItem]) -> str:
    """Short hash of the items, to tell two data sets apart in a plan or a journal.

    Raises:
        InvalidDataError: a field holds what cannot be written as JSON.
    """
    try:
        text = json.dumps(list(eval_data), sort_keys=True, ensure_ascii=True, default=str)
    except (RecursionError, TypeError, ValueError) as error:  # nested too deeply, or in itself
        reason = f"eval_data cannot be written as JSON: {error}."
        raise InvalidDataError(f"{reason} Leave out the fields that no task needs.") from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as it is shown: its text, or the turns of a conversation, a line each."""
    if isinstance(prompt, str):
        return prompt
    turns = prompt["messages"]
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}".strip() for turn in turns)


def prompt_of(item: EvalItem) -> str:
    """An item's prompt or text, with single spaces."""
    return " ".join((item if isinstance(item, str) else prompt_text(item["prompt"])).split())


def prompt_keys(eval_data: Sequence[EvalItem]) -> list[str]:
    """A short hash of `prompt_of` every item, to compare data sets."""
    if not isinstance(eval_data, Sequence) or eval_data:
        check_items(eval_data)
    return [hashlib.sha256(prompt_of(item).encode()).hexdigest()[:12] for item in eval_data]


def refuse_overlap(
    items: Sequence[EvalItem], taken: Collection[str], purpose: str, other: str
) -> None:
    """Raise InvalidDataError if a prompt or text of `items` is among the keys `taken`.

    Args:
        taken: `prompt_keys` of items used for something else.
        purpose, other: what either is used for, for the message.
    """
    shared = [index for index, key in enumerate(prompt_keys(items)) if key in taken]
    if shared:
        raise InvalidDataError(
            f"{len(shared)} of the {len(items)} items {purpose} (the first is item {shared[0]}) "
            f"are among those {other}: use other items, or the result flatters."
        )


def plain(value: object) -> str | None:
    """Text as it is, a number as text; None for everything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value)) if abs(int(value)) < 10**MAX_DIGITS else None
    return str(value) if isinstance(value, float) and math.isfinite(value) else None


def text_of(value: object, field: str) -> str:
    """`value` as stripped text; numbers become text."""
    text = plain(value)
    check_text(field, value if text is None else text)
    return str(text).strip()


def bare_question(value: object, context: object = "") -> str:
    """The question without its ``Question:`` and ``Answer:`` labels, after its passage if any."""
    text = text_of(value, "the question")
    if text.count("Question:") <= 1:  # more than one: a few-shot prompt, left as it is
        text = text.removeprefix("Question:").removesuffix("\nAnswer:").strip()
    passage = text_of(context, "the context") if context and context != value else ""
    return f"{passage}\n{text}" if passage else text_of(text, "the question")


def accepted(answers: Iterable[object]) -> list[str]:
    """The distinct answers, in order, without blank ones."""
    given = (answer for answer in answers if not (isinstance(answer, str) and not answer.strip()))
    texts = [text_of(answer, "an answer") for answer in given]
    return list(dict.fromkeys(texts))


def calls_text(calls: Sequence[Any]) -> str:
    """Calls of tools as text, one JSON object a line."""
    called = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    return "\n".join(json.dumps(call, ensure_ascii=False) for call in called)


def qa_item(prompt: object, reference: object, aliases: object = None) -> Item:
    """An item of a question and its answer; `aliases`, if any, are accepted as well."""
    item: Item = {
        "prompt": bare_question(prompt),
        "reference": text_of(reference, "the reference"),
    }
    if aliases not in NOTHING:
        if not isinstance(aliases, list):
            raise InvalidDataError(f"aliases must be a list of texts: {shown(aliases)}.")
        item["aliases"] = accepted([item["reference"], *aliases])
    return item
