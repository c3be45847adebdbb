"""Items from local files, compressed or not, and folders; errors name the file and line."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidDataError, LoadError
from ..json_files import parse_json
from ..utils import regular_file, shown, user_path
from .conversations import UnfitRowError
from .row_formats import clash, to_item
from .tables import SAVED, items_of_rows, read_table, say_passed_over

if TYPE_CHECKING:
    from .items import EvalItem


MAX_BYTES = 4_000_000_000  # of one file, which is read as a whole
PART = 1 << 24  # bytes that are decompressed at a time


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


def _read_csv(path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
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


def _read_tsv(path: Path, text: str) -> Iterator[tuple[str, object]]:
    return _read_csv(path, text, "\t")


def _read_txt(path: Path, text: str) -> Iterator[tuple[str, object]]:
    if text.strip():
        yield "", text


READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
    ".md": _read_txt,
}
TABLES = (".parquet", ".arrow")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # as pyarrow calls them
TYPES = f"{', '.join([*READERS, *TABLES])}; texts also as {', '.join(COMPRESSED)}"
CARDS = ("readme.md", "license.md", "license.txt")  # beside the data of a folder


def is_data_name(path: Path) -> bool:
    """Whether a file with such a name is one of data."""
    return _type_of(path) in READERS or path.suffix.lower() in TABLES


def name_of(path: Path) -> str:
    """A file's name without its endings."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def read_local(
    path: Path,
    k: int | None = None,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
) -> list[EvalItem]:
    """Items of a file, or of all files of a folder, by name; of tables `k` drawn rows each.

    A folder may be one of ``save_to_disk``. Its cards and licences are no data, and the folders
    inside count only if it has no other data.

    Raises:
        LoadError: there is nothing that can be read.
        InvalidDataError: a file holds what cannot be used; the message says where.
    """
    reading = partial(_read_file, k=k, seed=seed, fields=fields)
    if not os.path.isdir(path):
        return reading(path)
    try:
        inside = sorted(path.iterdir())
        names = {file.name for file in inside}
        if names.intersection(SAVED):
            return _rows_of(path, path.name, k, seed, fields)
        files = _data_files(inside) or _data_files(sorted(path.rglob("*")))
    except OSError as error:
        raise LoadError(f"Cannot read {path}: {error.strerror or error}.") from error
    if not files:
        raise LoadError(f"No data in {path}: it has no file of type {TYPES}.")
    return [item for file in files for item in reading(user_path(file))]


def _data_files(paths: Iterable[Path]) -> list[Path]:
    """Those that are files of data; hidden ones and cards are not."""
    return [
        path
        for path in paths
        if is_data_name(path)
        and path.name.lower() not in CARDS
        and not any(part.startswith(".") for part in path.parts[-2:])
        and not os.path.isdir(path)
    ]


def _type_of(path: Path) -> str:
    """The ending that says what is in a file, without that of its compression."""
    packed = path.suffix.lower() in COMPRESSED
    return (Path(path.stem) if packed else path).suffix.lower()


def _read_file(
    path: Path, k: int | None, seed: int, fields: Mapping[str, str] | None
) -> list[EvalItem]:
    name = os.fsencode(name_of(path)).decode("utf-8", "replace")  # it may be in another encoding
    if regular_file(path).suffix.lower() in TABLES:
        _check_size(path)
        return _rows_of(path, name, k, seed, fields)
    reader = READERS.get(_type_of(path))
    if reader is None:
        raise InvalidDataError(f"Cannot read {path}: file types are {TYPES}.")
    items, unfit = [], []
    for where, row in reader(path, _text_of(path)):
        try:
            items.append(to_item(row, name, fields))
        except UnfitRowError as error:
            unfit.append(f"{path}{where}: {error}")
        except InvalidDataError as error:
            raise InvalidDataError(f"{path}{where}: {error}") from None
    if not items:
        empty = f"{path} is empty: it must hold at least one item."
        raise InvalidDataError(unfit[0] if unfit else empty)
    say_passed_over(path.name, unfit)
    return items


def _rows_of(
    path: Path, name: str, k: int | None, seed: int, fields: Mapping[str, str] | None
) -> list[EvalItem]:
    try:
        return items_of_rows(read_table(path), name, k, seed, fields)
    except InvalidDataError as error:
        raise InvalidDataError(f"{path}: {error}") from None


def _check_size(path: Path) -> None:
    if (size := path.stat().st_size) > MAX_BYTES:
        reason = f"it has {size:,} bytes, more than {MAX_BYTES:,}: give a part of it."
        raise InvalidDataError(f"Cannot read {path}: {reason}")


def _bytes_of(path: Path) -> bytes:
    """What is in a file, decompressed if its name says that it is compressed."""
    _check_size(path)
    packing = COMPRESSED.get(path.suffix.lower())
    if packing is None:
        return path.read_bytes()
    import pyarrow

    parts, size = [], 0
    try:
        with pyarrow.input_stream(str(path), compression=packing) as stream:
            while part := stream.read(PART):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    reason = f"more than {MAX_BYTES:,} bytes are packed in it: give a part of it."
                    raise InvalidDataError(f"Cannot read {path}: {reason}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InvalidDataError(
            f"Cannot read {path}: not {packing}, or cut off ({reason})."
        ) from None
    return b"".join(parts)


def _text_of(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        raw = _bytes_of(path)
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
