"""GGUF files as metadata and byte ranges: no tensor is loaded.

A file is a header, metadata (a key, a type and a value each), a list of tensors, and their bytes,
each padded to the alignment (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2
and 3, little-endian). ``gguf``, the format's own package, knows the types; its reader is not used:
it makes an object of every token, and believes what a damaged file says of itself. Nothing here
imports torch.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from ..config.gguf_metadata import UINT32
from ..errors import MissingDependencyError
from .safetensors_files import Pair, StoredTensor
from .sources import Read, Source

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where ``general.alignment`` does not say another
MOST_FIELDS = 100_000  # a file that claims more is damaged
MOST_TENSORS = 100_000
MOST_TEXTS = 10_000_000  # of all lists
MOST_DIMENSIONS = 4
MOST_ALIGNMENT = 2**16
LONGEST_KEY = 65_535  # bytes
LONGEST_NAME = 1024  # of a tensor; llama.cpp reads 63
LARGEST_VALUE = 2**20  # bytes of a value that is kept in memory
MOST_KEPT = 2**24  # bytes of all that are
WINDOW = 2**20  # bytes read at once
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Field:
    """An entry of the metadata.

    Attributes:
        key: its name.
        start, end: its bytes in the file, from the key's length to the end of the value.
        value: a number, truth value, text or list of them; None where it is larger than
            `LARGEST_VALUE` bytes, and for lists of tokens.
        type: number of the value's type in GGUF; that of the entries for a list.
        count: how many entries a list has; None for a single value.
    """

    key: str
    start: int
    end: int
    value: Any
    type: int
    count: int | None = None

    def encoded(self, value: Any) -> bytes:
        """The bytes of an entry with the same key and type, and another value."""
        return encode_field(self.key, self.type, value)


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file: its metadata and where its tensors are."""

    name: str
    version: int
    alignment: int
    fields: dict[str, Field]
    tensors: list[StoredTensor]  # in the order of their bytes


def encode_field(key: str, type: int, value: Any) -> bytes:
    """The bytes of an entry of the metadata; a list becomes an array."""
    name = key.encode()
    head = struct.pack("<Q", len(name)) + name
    if not isinstance(value, list):
        return head + struct.pack("<I", type) + _encoded(type, value)
    entries = b"".join(_encoded(type, entry) for entry in value)
    return head + struct.pack("<IIQ", ARRAY, type, len(value)) + entries


def _encoded(type: int, value: Any) -> bytes:
    if type == STRING:
        text: bytes = value.encode()
        return struct.pack("<Q", len(text)) + text
    return struct.pack(f"<{NUMBERS[type]}", value)


def read_gguf(source: Source, file: str) -> GgufFile:
    """The metadata and tensors of one file.

    Raises:
        LoadError: it is not a GGUF file, or damaged.
        MissingDependencyError: the ``gguf`` package is needed.
    """
    sizes = _type_sizes()
    with source.opened(file) as read:
        cursor = _Cursor(source, file, read)
        if cursor.size < len(MAGIC) or cursor.take(len(MAGIC)) != MAGIC:
            cursor.fail("it does not begin with 'GGUF', as a GGUF file does")
        version = cursor.number("I")
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
            cursor.fail(
                "it is big-endian, which few machines can run"
                if big
                else f"it is of version {version}, and only 2 and 3 are known"
            )
        count_tensors = cursor.count("tensors", MOST_TENSORS)
        count_fields = cursor.count("entries of metadata", MOST_FIELDS)
        fields: dict[str, Field] = {}
        kept = 0
        for _ in range(count_fields):
            entry = _read_field(cursor)
            if entry.key in fields:
                cursor.fail(f"{entry.key!r} is there twice")
            fields[entry.key] = entry
            kept += len(entry.key) if entry.value is None else entry.end - entry.start
            if kept > MOST_KEPT:
                cursor.fail(
                    f"its metadata has more than {MOST_KEPT:,} bytes, lists of tokens aside"
                )
        alignment = _alignment(cursor, fields.get("general.alignment"))
        listed = [_read_tensor(cursor, sizes) for _ in range(count_tensors)]
        base = cursor.position + -cursor.position % alignment
    return GgufFile(file, version, alignment, fields, _placed(cursor, listed, base, alignment))


def _alignment(cursor: _Cursor, given: Field | None) -> int:
    if given is None:
        return ALIGNMENT
    value = given.value
    if given.type != UINT32 or type(value) is not int or value < 1 or value & (value - 1):
        cursor.fail(f"its alignment is {value!r}, which is no power of 2")
    if value > MOST_ALIGNMENT:
        cursor.fail(f"its alignment is {value:,} bytes")
    return value


class _Cursor:
    """Reads a file from its beginning on, some bytes at a time; complains where it ends."""

    def __init__(self, source: Source, file: str, read: Read) -> None:
        self.source, self.file, self.size = source, file, source.size(file)
        self._read, self._window, self._start, self.position = read, b"", 0, 0
        self._texts = 0  # that were passed over

    def fail(self, reason: str) -> NoReturn:
        raise self.source.broken(self.file, reason)

    def require(self, size: int, what: str = "a value") -> None:
        """Fail unless so many bytes follow."""
        left = self.size - self.position
        if size > left:
            self.fail(
                f"at byte {self.position:,} it announces {what} of {size:,} bytes, and has "
                f"{left:,} more"
            )

    def take(self, size: int) -> bytes:
        """The next bytes, which have to be there."""
        self.require(size)
        begin = self.position - self._start
        if begin < 0 or begin + size > len(self._window):
            self._window = self._read(self.position, self.position + max(size, WINDOW))
            self._start, begin = self.position, 0
        self.position += size
        found = self._window[begin : begin + size]
        if len(found) < size:
            self.fail(f"it ends at byte {self._start + len(self._window):,}")
        return found

    def skip(self, size: int) -> None:
        self.require(size)
        self.position += size

    def number(self, form: str) -> Any:
        """A number of the form that `struct` names."""
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return value

    def count(self, what: str, most: int) -> int:
        """A number of things, which may not be more than `most`."""
        value: int = self.number("Q")
        if value > most:
            self.fail(f"it claims {value:,} {what}")
        return value

    def text(self, longest: int) -> str:
        """A text with its length before it."""
        length: int = self.number("Q")
        if length > longest:
            self.fail(f"at byte {self.position:,} it announces a text of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            self.fail(f"at byte {self.position - length:,} a text is not UTF-8: {error.reason}")

    def skip_texts(self, count: int) -> None:
        """Pass over texts with their lengths before them."""
        self._texts += count
        if self._texts > MOST_TEXTS:
            self.fail(f"at byte {self.position:,} it announces {count:,} texts")
        self.require(8 * count, "texts")
        unpack = struct.Struct("<Q").unpack_from
        while count:
            at = self.position - self._start
            limit = len(self._window) - 8
            while count and 0 <= at <= limit:
                (length,) = unpack(self._window, at)
                at += 8 + length
                count -= 1
            self.position = self._start + at
            self.require(8 * count, "texts")
            if count and self.position - self._start > limit:
                self._window = self._read(self.position, self.position + WINDOW)
                self._start = self.position
                if len(self._window) < 8:
                    self.fail(f"it ends at byte {self._start + len(self._window):,}")


def _read_field(cursor: _Cursor) -> Field:
    start = cursor.position
    key = cursor.text(LONGEST_KEY)
    kind, count = cursor.number("I"), None
    if kind == ARRAY:
        kind, count = cursor.number("I"), cursor.number("Q")
    if kind not in NUMBERS and kind != STRING:
        cursor.fail(f"{key!r} is of type {kind}, which does not exist")
    value: Any = None
    keep = not key.startswith("tokenizer.")  # lists of which can be long
    if count is None:
        if kind == STRING:
            before = cursor.position
            length: int = cursor.number("Q")
            cursor.position = before
            if length <= LARGEST_VALUE:
                value = cursor.text(LARGEST_VALUE)
            else:
                cursor.skip_texts(1)
        else:
            value = cursor.number(NUMBERS[kind])
    elif kind == STRING:
        value = _read_texts(cursor, count, keep=keep)
    else:
        size = count * struct.calcsize(f"<{NUMBERS[kind]}")
        cursor.require(size, f"{key!r}, a list")
        if keep and size <= LARGEST_VALUE:
            value = list(struct.unpack(f"<{count}{NUMBERS[kind]}", cursor.take(size)))
        else:
            cursor.skip(size)
    return Field(key, start, cursor.position, value, kind, count)


def _read_texts(cursor: _Cursor, count: int, *, keep: bool) -> list[str] | None:
    """Texts, or None where they are not to be kept or are too long."""
    start = cursor.position
    cursor.skip_texts(count)
    end = cursor.position
    if not keep or end - start > LARGEST_VALUE:
        return None
    cursor.position = start
    return [cursor.text(LARGEST_VALUE) for _ in range(count)]


@dataclass(frozen=True)
class _Listed:
    """A tensor as the list names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    offset: int  # from where the tensors begin


def _read_tensor(cursor: _Cursor, sizes: dict[int, tuple[str, int, int]]) -> _Listed:
    name = cursor.text(LONGEST_NAME)
    dimensions = cursor.number("I")
    if dimensions > MOST_DIMENSIONS:
        cursor.fail(f"tensor {name!r} has {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in sizes:
        cursor.fail(
            f"tensor {name!r} is of type {kind}, which the installed gguf package does not know "
            "(pip install -U gguf)"
        )
    dtype, block, size = sizes[kind]
    if math.prod(max(1, length) for length in shape) >= 2**59:
        cursor.fail(f"tensor {name!r} is of shape {list(shape)}")
    row = shape[0] if shape else 1
    if row % block:
        cursor.fail(f"tensor {name!r} has rows of {row}, no multiple of {block} ({dtype})")
    return _Listed(name, dtype, shape, math.prod(shape) // block * size, offset)


def _placed(
    cursor: _Cursor, listed: Iterable[_Listed], base: int, alignment: int
) -> list[StoredTensor]:
    """The tensors by their bytes, which follow one another without a gap or an overlap."""
    tensors: list[StoredTensor] = []
    names: set[str] = set()
    expected = base
    for entry in sorted(listed, key=lambda one: (one.offset, one.size)):
        start = base + entry.offset
        if entry.name in names:
            cursor.fail(f"tensor {entry.name!r} is there twice")
        if start != expected:
            cursor.fail(f"tensor {entry.name!r} begins at byte {start:,}, not at {expected:,}")
        end = start + entry.size
        if end > cursor.size:
            cursor.fail(
                f"tensor {entry.name!r} ends at byte {end:,}, and the file at {cursor.size:,}"
            )
        expected = end + -end % alignment
        names.add(entry.name)
        dtype = sys.intern(entry.dtype)
        tensors.append(StoredTensor(entry.name, cursor.file, dtype, entry.shape, start, end))
    return tensors


def write_gguf(
    source: Source,
    file: GgufFile,
    fields: Iterable[Field | bytes],
    tensors: Sequence[Pair],
    target: BinaryIO,
) -> None:
    """Write a file of some of a file's tensors, whose bytes are copied, and other metadata.

    Args:
        source: where the file is.
        file: the file that the metadata comes from.
        fields: entries of its metadata, which are copied, and encoded ones.
        tensors: of this file, or of several, in the order of their bytes, with their new names.
        target: an empty file.
    """
    entries = list(fields)
    target.write(MAGIC + struct.pack("<IQQ", file.version, len(tensors), len(entries)))
    for entry in entries:
        if isinstance(entry, bytes):
            target.write(entry)
        else:
            source.copy(file.name, entry.start, entry.end, target)
    numbers = {name: number for number, (name, _, _) in _type_sizes().items()}
    offset = 0
    for tensor, name in tensors:
        text, shape = name.encode(), tensor.shape
        target.write(struct.pack(f"<Q{len(text)}sI", len(text), text, len(shape)))
        target.write(struct.pack(f"<{len(shape)}QIQ", *shape, numbers[tensor.dtype], offset))
        offset += tensor.size + -tensor.size % file.alignment
    if tensors:
        target.write(b"\0" * (-target.tell() % file.alignment))
    for run in _runs([tensor for tensor, _ in tensors], file.alignment):
        start, end = run[0].start, run[-1].end
        source.copy(run[0].file, start, end, target)
        target.seek(0, os.SEEK_END)
        target.write(b"\0" * (-(end - start) % file.alignment))


def _runs(tensors: Sequence[StoredTensor], alignment: int) -> list[list[StoredTensor]]:
    """The tensors in groups whose bytes lie in the file as they have to lie in the new one."""
    runs: list[list[StoredTensor]] = []
    length = 0  # of the last run, with what fills it up
    for tensor in tensors:
        first = runs[-1][0] if runs else None
        if first and tensor.file == first.file and tensor.start == first.start + length:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
            length = 0
        length += tensor.size + -tensor.size % alignment
    return runs


def _type_sizes() -> dict[int, tuple[str, int, int]]:
    """By number: the name of a type of tensors, the entries of a block, and its bytes."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingDependencyError(
            "Reading GGUF needs the gguf package: pip install 'llm_pruner[gguf]'."
        ) from error
    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
