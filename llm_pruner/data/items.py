"""Evaluation items: what they are, whether they are valid, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import InvalidDataError

EvalItem = dict[str, Any] | str


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
            _check_text(index, "text", item)
        elif isinstance(item, dict):
            for field in ("prompt", "reference"):
                if field not in item:
                    raise InvalidDataError(
                        f"eval_data[{index}] has no {field!r} (its fields: {sorted(item)}): every "
                        "item needs 'prompt' and 'reference'; normalize_item() converts the rows "
                        "of known datasets."
                    )
                _check_text(index, field, item[field])
        else:
            raise InvalidDataError(
                f"eval_data[{index}] is a {type(item).__name__}: items are dicts with 'prompt' "
                "and 'reference', or strings."
            )
    return eval_data


def _check_text(index: int, field: str, value: object) -> None:
    where = f"eval_data[{index}][{field!r}]"
    if not isinstance(value, str):
        raise InvalidDataError(f"{where} is a {type(value).__name__}, not a string: {value!r:.80}")
    if not value.strip():
        raise InvalidDataError(f"{where} is empty: remove or fill the item.")


def fingerprint(eval_data: Sequence[EvalItem]) -> str:
    """Short hash of the items, to tell two data sets apart in a plan or a journal."""
    text = json.dumps(list(eval_data), sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_of(item: EvalItem) -> str:
    """An item's prompt or text, with single spaces."""
    return " ".join((item if isinstance(item, str) else item["prompt"]).split())


def prompt_keys(eval_data: Sequence[EvalItem]) -> list[str]:
    """A short hash of `prompt_of` every item, to compare data sets."""
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
