"""JSON files: one strict parser, and dataclasses that are written to a file and read again.

What this package has written carries a checksum of its content, so that a change is noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from .atomic_output import write_atomically
from .errors import InvalidPlanError, LLMPrunerError
from .output_rules import OUTPUT_FILES
from .utils import readable, regular_file

CHECKSUM = "checksum"
MAX_DEPTH = 100  # of nested values: far more than any file of ours, or of a publisher, has
MAX_DIGITS = 30  # of a whole number
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """The value of a JSON text, as strict as the standard (RFC 8259), and of sane size.

    Raises:
        ValueError: it is not JSON; a name is there twice in one object; a number is not finite or
            has more than 30 digits; text is not valid Unicode; values are nested too deeply.
    """
    try:
        found = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite,
            parse_int=_integer,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    _check_depth(found)
    if SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not valid Unicode text: {error}") from None
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"the key {twice!r:.80} is twice in an object with the keys {names!r:.200}"
        )
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number in JSON: leave it out, or write null")
    return number


def _integer(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, {text[:10]}...")
    return -0.0 if text == "-0" else int(text)  # which whole numbers do not have


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"lists or objects are nested more than {MAX_DEPTH} deep")


def check_type(value: Any, expected: Any, name: str) -> Any:
    """`value`, taken from JSON, as the type `expected`; lists become tuples where that is one.

    Args:
        value: what `parse_json` returned, or a part of it.
        expected: ``Any``, a plain type, a dataclass, or unions, lists, tuples and dicts of these.
        name: of the value, for messages.

    Raises:
        ValueError: it is of another type.
    """
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return value
    if origin in (Union, types.UnionType):
        return _check_union(value, inner, name)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(check_type(one, inner[0], f"{name}[{n}]") for n, one in enumerate(value))
    if origin is list and isinstance(value, list):
        return [check_type(one, inner[0], f"{name}[{n}]") for n, one in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: check_type(one, inner[1], f"{name}.{key}") for key, one in value.items()}
    if hasattr(expected, "of_data"):  # it reads itself
        return expected.of_data(value)
    if dataclasses.is_dataclass(expected) and isinstance(value, dict):
        return _check_fields(value, expected, name)
    if expected is float and type(value) in (int, float):
        return value
    if origin is None and type(value) is expected:
        return value
    allowed = getattr(expected, "__name__", str(expected))
    raise ValueError(f"{name} must be of type {allowed}, and is {value!r:.80}")


def _check_union(value: Any, members: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in members:
        return None
    (expected,) = (member for member in members if member is not type(None))
    return check_type(value, expected, name)


def _check_fields(value: dict[str, Any], expected: Any, name: str) -> Any:
    known = get_type_hints(expected)
    for field in sorted(value.keys() - known.keys()):
        raise ValueError(f"{name} has the unknown field {field!r}")
    return expected(**{key: check_type(one, known[key], key) for key, one in value.items()})


class JsonFile:
    """Saving and loading of a dataclass, with a format tag and a checksum that are checked."""

    FORMAT: ClassVar[str]
    EARLIER: ClassVar[tuple[str, ...]] = ()  # formats that are read too, see `_convert`

    def to_json(self) -> str:
        """The value as indented JSON text."""
        values = _unicode({"format": self.FORMAT, **dict(self._items())})
        values[CHECKSUM] = _checksum(values)
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The value that `to_json` wrote.

        Raises:
            InvalidPlanError: the text is not JSON of this kind, or its values are not of the
                types or in the ranges that they need; the message says why.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise InvalidPlanError(f"Not valid JSON: {error}.") from error
        return cls.of_data(data)

    @classmethod
    def of_data(cls, data: Any) -> Self:
        """`from_json` for a JSON text that was parsed already."""
        tag = data.get("format") if isinstance(data, dict) else None
        if tag not in (cls.FORMAT, *cls.EARLIER):
            raise InvalidPlanError(f"Expected a file of format {cls.FORMAT!r}, found {tag!r:.80}.")
        values = {name: data[name] for name in data if name not in (CHECKSUM, OUTPUT_FILES)}
        intact = data.get(CHECKSUM) == _checksum(values)
        del values["format"]
        known = get_type_hints(cls)
        names = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
        if unknown := values.keys() - names:
            raise InvalidPlanError(
                f"Unknown fields {sorted(unknown)} in a {cls.FORMAT!r} file; "
                f"known: {sorted(names)}."
            )
        try:
            if tag != cls.FORMAT:
                values = cls._convert(values)
            found = cls(**{name: check_type(values[name], known[name], name) for name in values})
            return found if intact or tag != cls.FORMAT else found._as_changed(CHECKSUM in data)
        except (LLMPrunerError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise InvalidPlanError(f"Damaged {cls.FORMAT!r} file: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON to `path`, whole or not at all; see `write_atomically`."""
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; InvalidPlanError if it is missing or not of this kind."""
        try:
            text = regular_file(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidPlanError(f"Cannot read {str(path)!r}: {error}") from error
        try:
            return cls.from_json(text)
        except InvalidPlanError as error:
            raise InvalidPlanError(f"{path}: {error}") from error

    def _items(self) -> Iterator[tuple[str, Any]]:
        """The names and values of the fields, as JSON has them."""
        for entry in fields(self):  # type: ignore[arg-type]
            yield entry.name, getattr(self, entry.name)

    def _as_changed(self, changed: bool) -> Self:
        """What may be used of a file that was `changed` since it was written, or has no checksum.

        Raises:
            InvalidPlanError: nothing.
        """
        if changed:
            raise InvalidPlanError(
                f"This {self.FORMAT!r} file was changed since llm_pruner wrote it (its checksum "
                "differs), so that it cannot be trusted: make it again."
            )
        return self

    @classmethod
    def _convert(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of an earlier format as fields of the present one."""
        return values


def _unicode(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with every text valid: a file's name in another encoding may be none."""
    text = json.dumps(values, allow_nan=False)
    if not SURROGATE.search(text):
        return values
    found: dict[str, Any] = json.loads(readable(json.dumps(values, ensure_ascii=False)))
    return found


def _checksum(values: dict[str, Any]) -> str:
    """A short hash of JSON values, however they are spaced and ordered in a file."""
    text = json.dumps(values, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
