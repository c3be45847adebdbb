"""Items from local .jsonl, .json, .csv and .txt files; errors name the file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidDataError, LoadError
from .row_formats import to_item

if TYPE_CHECKING:
    from .items import EvalItem


def _broken(path: Path, line: int, reason: object) -> InvalidDataError:
    return InvalidDataError(f"{path}:{line}: {reason}")


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for line, row in enumerate(text.split("\n"), start=1):  # splitlines() splits inside texts
        if row.strip():
            try:
                yield f":{line}", json.loads(row)
            except (ValueError, RecursionError) as error:
                raise _broken(path, line, f"not JSON: {error}.") from None


def _read_json(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):  # many files called .json are JSON Lines
            yield from _read_jsonl(path, text)
            return
        raise _broken(path, getattr(error, "lineno", 1), f"not JSON: {error}.") from None
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(rows) == len(lists) == 1 else [rows]
    if not isinstance(rows, list):
        raise InvalidDataError(f"{path}: must hold a list of rows, not {rows!r:.80}.")
    yield from ((f": row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                cells = f"not the {len(reader.fieldnames or [])} cells of the first line."
                raise _broken(path, reader.line_num, cells)
            yield f":{reader.line_num}", {name: _cell(value) for name, value in row.items()}
    except csv.Error as error:
        # line_num is that of the last good row
        raise _broken(path, reader.line_num + 1, f"not CSV: {error}.") from None


def _cell(value: str) -> object:
    """A CSV cell; lists and objects are in it as JSON."""
    try:
        return json.loads(value) if value[:1] in ("[", "{") else value
    except (ValueError, RecursionError):
        return value  # text that starts with a bracket


def _read_txt(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, paragraph in enumerate(filter(str.strip, re.split(r"\n\s*\n", text)), start=1):
        yield f": paragraph {number}", paragraph


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}


def read_local(path: Path) -> list[EvalItem]:
    """All items of a file, or of all files of a folder, by name."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise LoadError(f"No data in {path}: it has no file of type {', '.join(READERS)}.")
        return [item for file in files for item in read_local(file)]
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidDataError(f"Cannot read {path}: file types are {', '.join(READERS)}.")
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        reason = f"not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8."
        raise _broken(path, line, reason) from None
    except OSError as error:
        raise LoadError(f"Cannot read {path}: {error.strerror or error}.") from error
    items = []
    for where, row in reader(path, text):
        try:
            items.append(to_item(row, path.stem))
        except InvalidDataError as error:
            raise InvalidDataError(f"{path}{where}: {error}") from None
    if not items:
        raise InvalidDataError(f"{path} is empty: it must hold at least one item.")
    return items
