"""Evaluation items: what they are, whether they are valid, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import InvalidDataError
from ..utils import shown

EvalItem = dict[str, Any] | str


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
                "'prompt' and 'reference'; normalize_item() converts the rows of known datasets."
            )
        check_text(f"{where}[{field!r}]", item[field])
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
        raise InvalidDataError(f"{where} is a {type(value).__name__}, not a string: {shown(value)}")
    if not value.strip():
        raise InvalidDataError(f"{where} is empty: remove or fill the item.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidDataError(f"{where} is not valid Unicode text: {error}.") from None


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


def prompt_of(item: EvalItem) -> str:
    """An item's prompt or text, with single spaces."""
    return " ".join((item if isinstance(item, str) else item["prompt"]).split())


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
