"""Items from local .jsonl, .json, .csv and .txt files; errors name the file and line."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidDataError, LoadError
from ..json_files import parse_json
from ..utils import regular_file, shown, user_path
from .row_formats import clash, to_item

if TYPE_CHECKING:
    from .items import EvalItem


MAX_BYTES = 4_000_000_000  # of one file, which is read as a whole


def _broken(path: Path, line: int, reason: object) -> InvalidDataError:
    return InvalidDataError(f"{path}:{line}: {reason}")


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for line, row in enumerate(text.split("\n"), start=1):  # splitlines() splits inside texts
        if row.strip():
            try:
                yield f":{line}", parse_json(row)
            except ValueError as error:
                raise _broken(path, line, f"not JSON: {error}.") from None


def _read_json(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path, text)  # many files called .json are JSON Lines
            return
        raise _broken(path, error.lineno, f"not JSON: {error}.") from None
    except ValueError as error:
        raise InvalidDataError(f"{path}: not JSON: {error}.") from None
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(rows) == len(lists) == 1 else [rows]
    if not isinstance(rows, list):
        raise InvalidDataError(f"{path}: must hold a list of rows, not {shown(rows)}.")
    yield from ((f": row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if twice := clash(reader.fieldnames or ()):
            raise _broken(path, reader.line_num, f"{twice} name the same column: rename one.")
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
        return parse_json(value) if value[:1] in ("[", "{") else value
    except ValueError:
        return value  # text that starts with a bracket


def _read_txt(path: Path, text: str) -> Iterator[tuple[str, object]]:
    if text.strip():
        yield "", text


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_txt}


def read_local(path: Path) -> list[EvalItem]:
    """All items of a file, or of all files of a folder, by name.

    Raises:
        LoadError: there is nothing that can be read.
        InvalidDataError: a file holds what cannot be used; the message says where.
    """
    if not os.path.isdir(path):
        return _read_file(path)
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        raise LoadError(f"Cannot read {path}: {error.strerror or error}.") from error
    files = [file for file in inside if file.suffix.lower() in READERS and not os.path.isdir(file)]
    if not files:
        raise LoadError(f"No data in {path}: it has no file of type {', '.join(READERS)}.")
    return [item for file in files for item in _read_file(user_path(file))]


def _read_file(path: Path) -> list[EvalItem]:
    reader = READERS.get(regular_file(path).suffix.lower())
    if reader is None:
        raise InvalidDataError(f"Cannot read {path}: file types are {', '.join(READERS)}.")
    name = os.fsencode(path.stem).decode("utf-8", "replace")  # it may be in another encoding
    items = []
    for where, row in reader(path, _text_of(path)):
        try:
            items.append(to_item(row, name))
        except InvalidDataError as error:
            raise InvalidDataError(f"{path}{where}: {error}") from None
    if not items:
        raise InvalidDataError(f"{path} is empty: it must hold at least one item.")
    return items


def _text_of(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            reason = f"it has {size:,} bytes, more than {MAX_BYTES:,}: give a part of it."
            raise InvalidDataError(f"Cannot read {path}: {reason}")
        raw = path.read_bytes()
    except OSError as error:
        raise LoadError(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8."
        raise _broken(path, raw[: error.start].count(b"\n") + 1, reason) from None
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise _broken(path, line, "a NUL byte, so this is no text: save the file as UTF-8.")
    return text
