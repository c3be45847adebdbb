"""safetensors files as headers and byte ranges: read strictly, written without a tensor in memory.

A file is an 8-byte length, a JSON header that gives every tensor its dtype, shape and range of
bytes, and the bytes. A header that is not exactly that is refused. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LoadError
from .sources import FILE_BLOCK, Source

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
SAMPLE = 64  # bytes of each tensor that tell two checkpoints apart
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file.

    Attributes:
        name: its name.
        file: the file that holds it.
        dtype: as safetensors names it, such as ``BF16``.
        shape: sizes of its dimensions.
        start, end: its bytes in the file, header included.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, by name, in the order of the files and of their bytes.

    Attributes:
        source: where the bytes are.
        tensors: every tensor.
        metadata: by file, the texts that its header carries beside the tensors.
    """

    source: Source
    tensors: dict[str, StoredTensor]
    metadata: dict[str, dict[str, str]]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def identity(self) -> dict[str, str]:
        """What tells this checkpoint from others, however it is divided into files.

        ``tensors``: hash of all names, dtypes and shapes; ``weights``: hash of some bytes of
        every tensor, where they are on this machine; ``revision``: commit of a hub repository.
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


def shard_names(source: Source) -> list[str]:
    """The files that hold the weights, sorted.

    Raises:
        LoadError: there are none in safetensors format, or the index names something else than
            files beside it.
    """
    there = set(source.files())
    if INDEX_FILE not in there:
        if SINGLE_FILE in there:
            return [SINGLE_FILE]
        raise LoadError(_no_weights(source, there))
    weight_map = read_json(source, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise source.broken(INDEX_FILE, "it has no 'weight_map' from tensors to files")
    names = set(weight_map.values())
    for name in names:
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise source.broken(
                INDEX_FILE, f"it refers to {name!r}, which is not the name of a file beside it"
            )
    missing = sorted(names - there)
    if missing:
        raise source.broken(INDEX_FILE, f"it refers to {missing[0]!r}, which is not there")
    return sorted(names)


def _no_weights(source: Source, there: set[str]) -> str:
    pickled = sorted(name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if not pickled:
        return (
            f"Checkpoint {source.name!r} holds no {SINGLE_FILE} and no {INDEX_FILE}: give a folder "
            "or repository that save_pretrained has written."
        )
    return (
        f"Checkpoint {source.name!r} holds pickled weights ({pickled[0]}), which can run code when "
        "they are read, so they are not. Convert it first, where you trust it: load it with "
        "AutoModelForCausalLM.from_pretrained and write it with save_pretrained; or use a "
        "revision of the repository that has safetensors."
    )


def read_json(source: Source, file: str) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        LoadError: the file is not there, or something else.
    """
    size = source.size(file)
    if size > MAX_HEADER:
        raise source.broken(file, f"it has {size:,} bytes")
    return _json_object(source, file, source.read(file, 0, size))


def _json_object(source: Source, file: str, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is there twice")
        return found

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise source.broken(file, f"not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise source.broken(file, "it holds no JSON object")
    return found


def read_checkpoint(source: Source) -> Checkpoint:
    """All headers of a checkpoint, checked against the files and the index.

    Raises:
        LoadError: no safetensors files, or damaged ones; the message names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in shard_names(source):
        found, metadata[file] = _read_header(source, file)
        for tensor in found:
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                raise source.broken(file, f"tensor {tensor.name!r} stands in {other!r} too")
            tensors[tensor.name] = tensor
    if INDEX_FILE in source.files():
        weight_map = read_json(source, INDEX_FILE)["weight_map"]
        wrong = sorted(
            name
            for name in weight_map.keys() | tensors.keys()
            if name not in tensors or weight_map.get(name) != tensors[name].file
        )
        if wrong:
            there = f"in {tensors[wrong[0]].file!r}" if wrong[0] in tensors else "in no file"
            claimed = f"{weight_map.get(wrong[0], 'none')!r}"
            raise source.broken(
                INDEX_FILE, f"tensor {wrong[0]!r} is {there}, and the index says {claimed}"
            )
    return Checkpoint(source, tensors, metadata)


def _read_header(source: Source, file: str) -> tuple[list[StoredTensor], dict[str, str]]:
    size = source.size(file)
    prefix = source.read(file, 0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_HEADER or 8 + length > size:
        raise source.broken(file, f"it has {size:,} bytes and claims a header of {length:,}")
    header = _json_object(source, file, source.read(file, 8, 8 + length))
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise source.broken(file, "its metadata are no JSON object")
    tensors = [_entry(source, file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    at = 8 + length
    for tensor in tensors:
        if tensor.start != at:
            raise source.broken(
                file, f"tensor {tensor.name!r} begins at byte {tensor.start}, not at {at}"
            )
        at = tensor.end
    if at != size:
        raise source.broken(file, f"its tensors end at byte {at:,} and the file at {size:,}")
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


def new_shards(
    kept: Iterable[tuple[StoredTensor, str]],
) -> dict[str, list[tuple[StoredTensor, StoredTensor]]]:
    """The files to write: for each the kept tensors, as they were and as they will be.

    A new file holds what is kept of one old file, in the same order. Names follow the convention
    of transformers. The positions count from the end of the header, which is not known yet.

    Args:
        kept: tensors with their new names, in the order of `Checkpoint.tensors`.
    """
    by_file: dict[str, list[tuple[StoredTensor, str]]] = {}
    for tensor, name in kept:
        by_file.setdefault(tensor.file, []).append((tensor, name))
    shards = {}
    for number, entries in enumerate(by_file.values(), 1):
        file = SINGLE_FILE
        if len(by_file) > 1:
            file = f"model-{number:05d}-of-{len(by_file):05d}.safetensors"
        at, pairs = 0, []
        for tensor, name in entries:
            placed = replace(tensor, name=name, file=file, start=at, end=at + tensor.size)
            pairs.append((tensor, placed))
            at = placed.end
        shards[file] = pairs
    return shards


def header_bytes(
    tensors: Sequence[StoredTensor], metadata: dict[str, str], aligned_with: int = 0
) -> bytes:
    """Length and header of a file of these tensors, padded with spaces.

    To a multiple of eight bytes at least; and so that the first tensor begins as far into a block
    of the file system as byte `aligned_with`, since whole blocks can be shared.
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


def runs(tensors: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """The ranges of bytes that tensors of one file take up, neighbours joined."""
    found: list[tuple[int, int]] = []
    for tensor in tensors:
        if found and found[-1][1] == tensor.start:
            found[-1] = found[-1][0], tensor.end
        else:
            found.append((tensor.start, tensor.end))
    return found


def tensor_hash(source: Source, tensor: StoredTensor) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for block in source.blocks(tensor.file, tensor.start, tensor.end):
        digest.update(block)
    return digest.hexdigest()
