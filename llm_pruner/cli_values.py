"""How the words of a command line are read: numbers, sizes, times, names.

Nothing heavy is imported here, so that mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from .engines.verdict import check_engines
from .goals.budget import SPEEDS, Drop
from .utils import parse_bytes, parse_seconds

MOST_LAYERS = 10_000  # of a range


def _value(what: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argument: `read`, whose ValueError means that the text is not `what`."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}") from None

    return convert


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _at_least_two(text: str) -> int:
    if (number := int(text)) < 2:
        raise ValueError
    return number


def _random_seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 2**32:
        raise ValueError
    return number


def _share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _large_number(text: str) -> int:
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    digits = text.rstrip("kmbtKMBT")
    if (number := round(float(digits) * units[text[len(digits) :].lower()])) < 1:
        raise ValueError
    return number


def _faster(text: str) -> tuple[str, float]:
    what, equals, factor = text.rpartition("=")
    if equals and what not in SPEEDS:
        raise ValueError
    return what or SPEEDS[0], float(factor)


def _names_and_drops(text: str) -> dict[str, str]:
    return {name: str(Drop.of(drop)) for name, drop in _names_of_fields(text).items()}


def _names_of_fields(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and name.strip() for field, _, name in pairs):
        raise ValueError
    return {field.strip(): name.strip() for field, _, name in pairs}


def _listed(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise ValueError
    return parts


def _engine_names(text: str) -> tuple[str, ...]:
    return check_engines(part.strip() for part in text.split(","))


def _layers(text: str) -> tuple[int, ...]:
    """Numbers and ranges, both ends of which belong to them."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().rpartition("-")
        begin, end = (int(first), int(last)) if dash and first else (int(part), int(part))
        if not 0 <= end - begin < MOST_LAYERS:
            raise ValueError
        found += range(begin, end + 1)
    return tuple(found)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _two_integers(text: str) -> tuple[int, int]:
    first, last = _integers(text)
    return first, last


def _name_and_value(text: str) -> tuple[str, Any]:
    """The value is read as JSON, or is a text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


count = _value("a whole number of at least 1", _at_least_one)
seed = _value(f"a whole number from 0 to {2**32 - 1}", _random_seed)
layers = _value("layers separated by commas, e.g. 3,7,11 or 3,7-11", _layers)
engines = _engine_names
words = _value("names separated by commas", _listed)
ratio = _value("a share, e.g. 0.25 or 25%", _share)
number = _value("a number, e.g. 100M, 1.1B", _large_number)
speedup = _value("a factor, e.g. 1.3, decode=1.3 or prefill=1.3", _faster)
drops = _value("figures and drops, e.g. arc_easy=0.02,perplexity=10%", _names_and_drops)
field_names = _value(
    "fields and their names, e.g. prompt=question,reference=answer", _names_of_fields
)
pair = _value("two whole numbers, A,B", _two_integers)
length = _value("a whole number of at least 2", _at_least_two)
seconds = _value("a time, e.g. 90s, 10m, 1h30m", parse_seconds)
size = _value("a size of memory, e.g. 4GiB, 500MB", parse_bytes)
option = _value("NAME=VALUE, e.g. contiguous=false", _name_and_value)
