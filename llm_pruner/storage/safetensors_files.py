"""safetensors files as headers and byte ranges: no tensor is loaded.

A file is an 8-byte length, a JSON header with the dtype, shape and byte range of every tensor, and
the bytes. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from .sources import FILE_BLOCK, INDEX_FILE, MAX_JSON, SINGLE_FILE, Source

SAMPLE = 64  # bytes of each tensor that tell two checkpoints apart
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    file: str
    dtype: str  # as safetensors names it, such as BF16
    shape: tuple[int, ...]
    start: int  # its bytes in the file, header included
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.start

    @property
    def description(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"file": self.file, "dtype": self.dtype, "shape": list(self.shape)}


Pair = tuple[StoredTensor, StoredTensor]  # a tensor as it is, and as it will be
# Tensors that stay, each with its new name and the file of the original that it goes with.
Kept = list[tuple[StoredTensor, str, str]]


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint."""

    source: Source
    tensors: dict[str, StoredTensor]  # by name, in the order of the files and of their bytes
    metadata: dict[str, dict[str, str]]  # by file: the texts in its header beside the tensors

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return self.source.read_json("config.json")

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def identity(self) -> dict[str, str]:
        """What tells this checkpoint from others, however it is divided into files.

        ``tensors``: hash of all names, dtypes and shapes; ``weights``: hash of some bytes of
        every tensor, if they are on this machine; ``revision``: commit of a hub repository.
        """
        names, weights = hashlib.sha256(), hashlib.sha256()
        for _, tensor in sorted(self.tensors.items()):
            names.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            if self.source.folder is not None:
                middle = tensor.start + max(0, tensor.size - SAMPLE) // 2
                end = min(tensor.end, middle + SAMPLE)
                weights.update(self.source.read(tensor.file, middle, end))
        found = {"tensors": names.hexdigest()[:16]}
        if self.source.folder is not None:
            found["weights"] = weights.hexdigest()[:16]
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
    for file in source.weight_files():
        found, metadata[file] = _read_header(source, file)
        for tensor in found:
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                raise source.broken(file, f"tensor {tensor.name!r} stands in {other!r} too")
            tensors[tensor.name] = tensor
    if INDEX_FILE in source.files():
        index = source.read_json(INDEX_FILE)["weight_map"]
        stored = {name: tensor.file for name, tensor in tensors.items()}
        differing = index.items() ^ stored.items()
        if differing:
            name = min(name for name, _ in differing)
            there = f"in {stored[name]!r}" if name in stored else "in no file"
            reason = f"tensor {name!r} is {there}, and the index says {index.get(name, 'none')!r}"
            raise source.broken(INDEX_FILE, reason)
    return Checkpoint(source, tensors, metadata)


def _read_header(source: Source, file: str) -> tuple[list[StoredTensor], dict[str, str]]:
    size = source.size(file)
    prefix = source.read(file, 0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_JSON or 8 + length > size:
        raise source.broken(file, f"it has {size:,} bytes and claims a header of {length:,}")
    header = source.read_json(file, 8, 8 + length)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise source.broken(file, "its metadata is not a JSON object")
    tensors = [_entry(source, file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            reason = f"tensor {tensor.name!r} begins at byte {tensor.start}, not at {end}"
            raise source.broken(file, reason)
        end = tensor.end
    if end != size:
        raise source.broken(file, f"its tensors end at byte {end:,} and the file at {size:,}")
    return tensors, metadata


def _entry(source: Source, file: str, name: str, entry: Any, base: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError("a negative or fractional number")
        bits = math.prod(shape) * BITS[dtype]
    except (TypeError, KeyError, ValueError) as error:
        reason = f"the entry of tensor {name!r} is damaged ({error})"
        raise source.broken(file, reason) from error
    if bits != 8 * (end - start):
        raise source.broken(
            file,
            f"tensor {name!r} of {dtype} {list(shape)} needs {bits / 8:,.0f} bytes, and its "
            f"offsets give it {end - start:,}",
        )
    return StoredTensor(name, file, dtype, shape, base + start, base + end)


def new_shards(kept: Kept) -> dict[str, list[Pair]]:
    """The files to write, by name: for each the kept tensors, as they are and as they will be.

    A new file holds what is kept of one old file, in the same order. Its byte ranges count from
    the end of the header, whose length is not known yet.
    """
    groups = [list(group) for _, group in groupby(kept, key=lambda entry: entry[2])]
    shards: dict[str, list[Pair]] = {}
    for number, group in enumerate(groups, 1):
        several = len(groups) > 1
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if several else SINGLE_FILE
        end = 0
        for tensor, name, _ in group:
            start, end = end, end + tensor.size
            new = replace(tensor, name=name, file=file, start=start, end=end)
            shards.setdefault(file, []).append((tensor, new))
    return shards


def header_bytes(
    tensors: Sequence[StoredTensor], metadata: dict[str, str], aligned_with: int = 0
) -> bytes:
    """Length and header of a file of these tensors, padded with spaces.

    The padding makes the first tensor begin as far into a block of the file system as byte
    `aligned_with`, since whole blocks can be shared; at the least, to a multiple of eight bytes.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
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


def tensor_hash(source: Source, tensor: StoredTensor) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for block in source.blocks(tensor.file, tensor.start, tensor.end):
        digest.update(block)
    return digest.hexdigest()
