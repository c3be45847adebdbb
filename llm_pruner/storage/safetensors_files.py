"""safetensors files as headers and byte ranges: no tensor is loaded.

A file is an 8-byte length, a JSON header with the dtype, shape and byte range of every tensor, and
the bytes. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from ..config.config_file import check_config
from ..json_files import check_type
from .content_hash import weights_hash
from .sources import FILE_BLOCK, INDEX_FILE, MAX_JSON, SINGLE_FILE, Source

Shape = tuple[int, ...]
SAMPLE = 64  # bytes of each tensor that tell two checkpoints apart at once

BITS = {
    dtype: bits
    for bits, dtypes in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "U16 I16 F16 BF16",
        32: "U32 I32 F32",
        64: "U64 I64 F64 C64",
    }.items()
    for dtype in dtypes.split()
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. There may be 100,000: texts and shapes that many have are shared."""

    name: str
    file: str
    dtype: str  # as safetensors names it, such as BF16
    shape: Shape
    start: int  # its bytes in the file, header included
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.start


Pair = tuple[StoredTensor, str]  # a tensor as it is, and the name that it will have
Kept = dict[str, list[Pair]]  # what stays, by the file of the original that it goes with


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint."""

    source: Source
    tensors: dict[str, StoredTensor]  # by name, in the order of the files and of their bytes
    metadata: dict[str, dict[str, str]]  # by file: the texts in its header beside the tensors

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return check_config(self.source.read_json("config.json"), self.source.name)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def identity(self, *, whole: bool = False) -> dict[str, str]:
        """What tells this checkpoint from others, however it is divided into files.

        ``tensors``: hash of all names, dtypes and shapes; ``weights``: hash of some bytes of
        every tensor, if they are on this machine; ``sha256``: hash of all of them, if it is to be
        `whole` (`weights_hash`); ``revision``: commit of a hub repository.
        """
        names, weights = hashlib.sha256(), hashlib.sha256()
        samples = {} if self.source.folder is None else dict(_samples(self))
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            names.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            weights.update(samples.get(name, b""))
        found = {"tensors": names.hexdigest()[:16]}
        if self.source.folder is not None:
            found["weights"] = weights.hexdigest()[:16]
            if whole:
                found["sha256"] = weights_hash(self.source, self.tensors.values())
        if self.source.revision is not None:
            found["revision"] = self.source.revision
        return found


def read_checkpoint(source: Source) -> Checkpoint:
    """All headers of a checkpoint, checked against the files and the index.

    Raises:
        LoadError: no safetensors files, or damaged ones; the message names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    index = source.weight_map()
    differing: list[str] = []
    shapes: dict[Shape, Shape] = {}
    for file in [SINGLE_FILE] if index is None else sorted(set(index.values())):
        found, metadata[file] = _read_header(source, file, shapes)
        for tensor in found:
            name = tensor.name
            if name in tensors:
                other = tensors[name].file
                raise source.broken(file, f"tensor {name!r} stands in {other!r} too")
            tensors[name] = tensor
            if index is not None and index.get(name) == file:
                del index[name]  # what is left at the end is in no file
            elif index is not None:
                differing.append(name)
    if index or differing:
        name = min((*(index or ()), *differing))
        there = f"in {tensors[name].file!r}" if name in tensors else "in no file"
        said = (index or {}).get(name, "none")
        reason = f"tensor {name!r} is {there}, and the index says {said!r}"
        raise source.broken(INDEX_FILE, reason)
    return Checkpoint(source, tensors, metadata)


def check_files(source: Source) -> list[str]:
    """The names of all tensors of a checkpoint whose headers are whole, whatever its index says.

    Raises:
        LoadError: see `read_checkpoint`.
    """
    return [tensor.name for file in source.weight_files() for tensor in file_tensors(source, file)]


def file_tensors(source: Source, file: str) -> list[StoredTensor]:
    """The tensors of one file; see `read_checkpoint`."""
    return _read_header(source, file, {})[0]


def _samples(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """Some bytes of every tensor, file by file."""
    for file, tensors in groupby(checkpoint.tensors.values(), key=_file):
        with checkpoint.source.opened(file) as read:
            for tensor in tensors:
                middle = tensor.start + max(0, tensor.size - SAMPLE) // 2
                yield tensor.name, read(middle, min(tensor.end, middle + SAMPLE))


def _file(tensor: StoredTensor) -> str:
    return tensor.file


def _read_header(
    source: Source, file: str, shapes: dict[Shape, Shape]
) -> tuple[list[StoredTensor], dict[str, str]]:
    size = source.size(file)
    begin = source.read(file, 0, 9)
    prefix = begin[:8]
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_JSON or 8 + length > size:
        raise source.broken(file, f"it has {size:,} bytes and claims a header of {length:,}")
    if begin[8:] != b"{":  # UTF-8 without a mark, as the library reads it
        raise source.broken(file, "not valid JSON: its header does not begin with '{'")
    header = source.read_json(file, 8, 8 + length, encoding="utf-8")
    metadata = header.pop("__metadata__", None)
    try:
        metadata = check_type(metadata, dict[str, str] | None, "__metadata__") or {}
    except ValueError as error:
        raise source.broken(file, str(error)) from error
    base = 8 + length
    tensors = [_entry(source, file, name, entry, base, shapes) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            reason = f"tensor {tensor.name!r} begins at byte {tensor.start}, not at {end}"
            raise source.broken(file, reason)
        end = tensor.end
    if end != size:
        raise source.broken(file, f"its tensors end at byte {end:,} and the file at {size:,}")
    return tensors, metadata


def _entry(
    source: Source, file: str, name: str, entry: Any, base: int, shapes: dict[Shape, Shape]
) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(check_type(entry["shape"], list[int], "shape"))
        start, end = entry["data_offsets"]
        for number in (*shape, start, end):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError("a negative or fractional number, or one past 2**63")
        bits = math.prod(shape) * BITS[dtype]
    except (TypeError, KeyError, ValueError) as error:
        reason = f"the entry of tensor {name!r} is damaged ({error})"
        raise source.broken(file, reason) from error
    if bits != 8 * (end - start):
        raise source.broken(
            file,
            f"tensor {name!r} of {dtype} {list(shape)} needs {bits // 8:,} bytes, and its "
            f"offsets give it {end - start:,}",
        )
    shape, dtype = shapes.setdefault(shape, shape), sys.intern(dtype)
    return StoredTensor(name, file, dtype, shape, base + start, base + end)


def new_shards(kept: Kept) -> dict[str, list[Pair]]:
    """The files to write, by name: for each the kept tensors and their new names.

    A new file holds what is kept of one old file, in the same order.
    """
    groups = [pairs for pairs in kept.values() if pairs]
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    total = len(groups)
    return {f"model-{n:05d}-of-{total:05d}.safetensors": group for n, group in enumerate(groups, 1)}


def header_bytes(tensors: Iterable[Pair], metadata: dict[str, str], aligned_with: int = 0) -> bytes:
    """Length and header of a file of these tensors, one after the other, padded with spaces.

    The padding makes the first tensor begin as far into a block of the file system as byte
    `aligned_with`, since whole blocks can be shared; at the least, to a multiple of eight bytes.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor, name in tensors:
        start, end = end, end + tensor.size
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * ((aligned_with - 8 - len(text)) % FILE_BLOCK)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def byte_ranges(tensors: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """The ranges of bytes that tensors of one file occupy; adjacent ones are joined."""
    ranges: list[tuple[int, int]] = []
    for tensor in tensors:
        start = tensor.start
        if ranges and ranges[-1][1] == start:
            start, _ = ranges.pop()
        ranges.append((start, tensor.end))
    return ranges


def tensor_hashes(source: Source, tensors: Iterable[StoredTensor]) -> Iterator[str]:
    """SHA-256 of each tensor's bytes; a file is opened once for tensors that follow each other."""
    for file, group in groupby(tensors, key=_file):
        with source.opened(file) as read:
            for tensor in group:
                digest = hashlib.sha256()
                for block in source.blocks(file, tensor.start, tensor.end, read):
                    digest.update(block)
                yield digest.hexdigest()
