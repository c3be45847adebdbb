"""Safetensors and GGUF for the fuzzer: seeds, changes and checks."""

from __future__ import annotations

import json
import math
import random
import re
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz_files import (
    LONGEST,
    MEMORY_DISK,
    InconsistentError,
    StricterError,
    Target,
    general,
    write,
)
from fuzz_json import changed_json, parsed, written

from llm_pruner.errors import LLMPrunerError
from llm_pruner.storage import gguf_files, gguf_models, safetensors_files
from llm_pruner.storage.sources import INDEX_FILE, SINGLE_FILE, LocalFolder

PARTS = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
SHARDS = ("a.safetensors", "b.safetensors")

# --- safetensors --------------------------------------------------------------------------------


def safetensors_seeds() -> list[list[bytes]]:
    """One file; a small one; an index and two shards."""
    whole = {"a": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("I64", []), "d": ("U8", [0, 7])}
    shards = [{"a": ("F16", [2, 2])}, {"b": ("F8_E4M3", [3]), "c": ("BOOL", [1])}]
    index = {"metadata": {"total_size": 12}, "weight_map": {"a": SHARDS[0]}}
    index["weight_map"] |= dict.fromkeys("bc", SHARDS[1])
    return [
        [st_file(whole, {"format": "pt"})],
        [st_file({"a": ("F32", [1])})],
        [st_file({})],
        [json.dumps(index).encode(), *map(st_file, shards)],
    ]


def st_file(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None
) -> bytes:
    """A file of zeros."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * safetensors_files.BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def change_safetensors(files: list[bytes], drawn: random.Random) -> list[bytes]:
    """Change the header of a file, or the index; the file then mostly has the bytes it needs."""
    number = drawn.randrange(len(files))
    file = files[number]
    if len(files) > 1 and number == 0:
        files[0] = written(changed_json(parsed(file), drawn)).encode()
        return files
    length = int.from_bytes(file[:8], "little")
    header = changed_json(parsed(file[8 : 8 + length]), drawn)
    text, data = written(header).encode(), file[8 + length :]
    if drawn.random() < 0.1:
        text = text.decode().encode(drawn.choice(("utf-16", "utf-16-le", "utf-8-sig", "utf-32")))
    if drawn.random() < 0.2:
        text = drawn.choice((b" ", b"\n", b"")) * 8 + text + drawn.choice((b" ", b"\0", b"")) * 8
    if drawn.random() < 0.8:
        ends = [int(x) for x in re.findall(rb'"data_offsets"\s*:\s*\[\d+,\s*(\d{1,4})\]', text)]
        data = bytes(max(ends, default=0))
    files[number] = len(text).to_bytes(8, "little") + text + data
    return files


def check_safetensors(files: list[bytes], place: Path) -> None:
    """Read a checkpoint, describe it, write its headers, read them again."""
    if len(files) < 2:
        folder = write(place / "single", {SINGLE_FILE: b"".join(files)})
    else:
        shards = dict(zip(SHARDS, [*files[1:], b""], strict=False))
        folder = write(place / "several", {INDEX_FILE: files[0], **shards})
    source = LocalFolder(folder)
    try:
        checkpoint = safetensors_files.read_checkpoint(source)
    except LLMPrunerError as error:
        if len(files) == 1 and library_refuses(files[0]) is None:
            reason = str(error).partition("cannot be used: ")[2]
            raise StricterError(f"the library reads it, and: {general(reason)}") from error
        raise
    used = {tensor.file for tensor in checkpoint.tensors.values()}
    for name in used or {SINGLE_FILE}:
        content = (folder / name).read_bytes()
        refusal = library_refuses(content)
        if refusal is not None:
            raise InconsistentError(f"the library refuses it: {general(refusal)}")
        cover(content, [one for one in checkpoint.tensors.values() if one.file == name])
    checkpoint.identity()
    for name, metadata in checkpoint.metadata.items():
        pairs = [(one, one.name) for one in checkpoint.tensors.values() if one.file == name]
        header = safetensors_files.header_bytes(pairs, metadata)
        again = header + bytes(sum(one.size for one, _ in pairs))
        folder = write(place / "again", {SINGLE_FILE: again})
        second = safetensors_files.read_checkpoint(LocalFolder(folder))
        same = [(one.name, one.dtype, one.shape) for one, _ in pairs]
        if [(one.name, one.dtype, one.shape) for one in second.tensors.values()] != same:
            raise InconsistentError("its tensors, written and read again, are others")
        if second.metadata != {SINGLE_FILE: metadata}:
            raise InconsistentError("its metadata, written and read again, are others")


def library_refuses(content: bytes) -> str | None:
    """What the safetensors library says against a file; None if it reads it."""
    from safetensors import SafetensorError, deserialize

    try:
        deserialize(content)
    except SafetensorError as error:
        return str(error)
    return None


def cover(content: bytes, tensors: Sequence[safetensors_files.StoredTensor]) -> None:
    """Raise unless the tensors are the whole file after its header."""
    position = 8 + int.from_bytes(content[:8], "little")
    for one in tensors:
        bits = math.prod(one.shape) * safetensors_files.BITS[one.dtype]
        if one.start != position or 8 * one.size != bits:
            raise InconsistentError("a tensor is not where the one before ends")
        position = one.end
    if position != len(content):
        raise InconsistentError("the tensors do not cover the file")


# --- GGUF ---------------------------------------------------------------------------------------

Entry = tuple[str, int, Any]  # of the metadata: key, type, value
Listed = tuple[str, tuple[int, ...], int, int]  # a tensor: name, shape, type, offset
TYPES = (*gguf_files.NUMBERS, gguf_files.STRING)


def gguf_seeds() -> list[list[bytes]]:
    """A model in one file, as the gguf package writes it, and one in two parts."""
    import numpy as np
    from gguf import GGUFWriter

    def made(entries: dict[str, Any], names: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            writer = GGUFWriter(path, "llama")
            writer.add_block_count(2)
            writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
            writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
            writer.add_array("llama.feed_forward_length", [3, 4])
            writer.add_array("general.tags", ["x", "yz"])
            writer.add_bool("general.bool", True)
            writer.add_float64("general.float", 0.25)
            for key, value in entries.items():
                writer.add_uint16(key, value)
            for number, name in enumerate(names):
                kind = (np.float32, np.float16)[number % 2]
                writer.add_tensor(f"blk.0.{name}", np.zeros((2, 32), kind))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return path.read_bytes()

    halves = [{"split.no": number, "split.count": 2} for number in (0, 1)]
    return [
        [made({}, "abc")],
        [gguf_bytes(3, [("general.alignment", 4, 64), ("a", 8, "")], [("t", (32,), 0, 0)], b"")],
        [gguf_bytes(2, [], [], b"")],
        [made(halves[0], "ab"), made(halves[1], "c")],
    ]


def gguf_bytes(
    version: int, entries: Sequence[Entry], tensors: Sequence[Listed], data: bytes
) -> bytes:
    """A file that need not be right; it is filled up to 4 KB of what its tensors need."""
    text = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    for key, kind, value in entries:
        text += gguf_files.encode_field(key, kind, value)
    for name, shape, kind, offset in tensors:
        encoded = name.encode()
        text += struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(shape))
        text += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
    alignments = [value for key, _, value in entries if key == "general.alignment"]
    alignment = alignments[-1] if alignments and type(alignments[-1]) is int else 32
    text += bytes(-len(text) % max(1, min(alignment, 4096)))
    sizes = gguf_files._type_sizes()
    needs = [0]
    for _, shape, kind, offset in tensors:
        _, block, size = sizes.get(kind, ("", 1, 0))
        needs.append(offset + math.prod(shape) // block * size)
    return text + data + bytes(max(0, min(4096, max(needs)) - len(data)))


def change_gguf(files: list[bytes], drawn: random.Random) -> list[bytes]:
    """Change entries and tensors of a valid file."""
    number = drawn.randrange(len(files))
    content = files[number]
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        (Path(folder) / "m.gguf").write_bytes(content)
        found = gguf_files.read_gguf(LocalFolder(folder), "m.gguf")
        types = {name: kind for kind, (name, _, _) in gguf_files._type_sizes().items()}
    base = min((one.start for one in found.tensors), default=len(content))
    entries = [
        (one.key, one.type, one.value) for one in found.fields.values() if one.value is not None
    ]
    tensors = [(t.name, t.shape, types[t.dtype], t.start - base) for t in found.tensors]
    version, data = found.version, content[base:]
    for _ in range(drawn.choice((1, 1, 2, 4))):
        how = drawn.randrange(10)
        if how < 5 and entries:
            _change_entry(entries, drawn)
        elif how < 9 and tensors:
            _change_tensor(tensors, [*types.values()], drawn)
        else:
            version, data = drawn.choice((2, 3, version)), drawn.choice((data, b"", data[:-1]))
    files[number] = gguf_bytes(version, entries, tensors, data)
    return files


def _change_entry(entries: list[Entry], drawn: random.Random) -> None:
    index = drawn.randrange(len(entries))
    key, kind, value = entries[index]
    how = drawn.randrange(6)
    if how == 0:
        del entries[index]
        return
    if how == 1:
        keys = ("split.count", "split.no", "split.tensors.count", "general.alignment")
        entries.append((drawn.choice(keys), drawn.choice((2, 4, 5)), drawn.choice((0, 1, 2, 64))))
        return
    if how == 2:
        entries.append((drawn.choice((key, f"{key}x", "", "k" * 300)), kind, value))
        return
    kind = drawn.choice(TYPES)
    numbers = (0, 1, 2, 3, 8, 32, 64, 255, 2**16, 2**31, 2**63, -1, -(2**31))
    value = drawn.choice(("", "a", "é" * 5)) if kind == gguf_files.STRING else drawn.choice(numbers)
    if drawn.random() < 0.4:
        value = [value] * drawn.choice((0, 1, 3, 100))
    gguf_files.encode_field(key, kind, value)  # struct.error where the number does not fit
    entries[index] = (key, kind, value)


def _change_tensor(tensors: list[Listed], types: Sequence[int], drawn: random.Random) -> None:
    index = drawn.randrange(len(tensors))
    name, shape, kind, offset = tensors[index]
    how = drawn.randrange(6)
    if how == 0:
        del tensors[index]
        return
    if how == 1:
        tensors.append((drawn.choice((name, f"{name}x", "")), shape, kind, offset + 256))
    elif how == 2:
        numbers = (0, 1, 2, 31, 32, 33, 256, 2**31, 2**32, 2**63, 2**64 - 1)
        shape = tuple(drawn.choice((*shape, *numbers)) for _ in range(drawn.randrange(6)))
    elif how == 3:
        kind = drawn.choice(types)
    elif how == 4:
        offset = drawn.choice((0, 1, 32, 64, offset + 32, offset + 1, 2**63, 2**64 - 32))
    else:
        name = drawn.choice(("", "blk.0.a", "n" * 64, "n" * 1025, "é"))
    tensors[index] = (name, shape, kind, offset)


def check_gguf(files: list[bytes], place: Path) -> None:
    """Read a model in one file or two, write it as one, read it again."""
    if len(files) < 2:
        folder = write(place / "single", {"m.gguf": b"".join(files)})
        paths = [folder / "m.gguf"]
    else:
        folder = write(place / "several", dict(zip(PARTS, files, strict=False)))
        paths = [folder / name for name in PARTS]
    checkpoint = gguf_models.read_gguf_checkpoint(paths)
    checkpoint.identity()
    for name, found in checkpoint.files.items():
        placed(found, (folder / name).stat().st_size)
    entries: list[Any] = []
    for key, entry in checkpoint.fields.items():
        if key not in gguf_models.SPLIT_KEYS:
            entries.append(entry if entry.value is None else entry.encoded(entry.value))
    first = next(iter(checkpoint.files.values()))
    pairs = [(one, one.name) for one in checkpoint.tensors.values()]
    target = place / "again.gguf"
    with target.open("w+b") as file:
        gguf_files.write_gguf(checkpoint.source, first, entries, pairs, file)
    second = gguf_models.read_gguf_checkpoint([target])
    described = [
        {key: repr(value) for key, value in one.values.items() if key not in gguf_models.SPLIT_KEYS}
        for one in (checkpoint, second)
    ]
    if described[0] != described[1]:
        raise InconsistentError("its metadata, written and read again, are others")
    tensors = [
        [(one.name, one.dtype, one.shape, one.size) for one in part.tensors.values()]
        for part in (checkpoint, second)
    ]
    if tensors[0] != tensors[1]:
        raise InconsistentError("its tensors, written and read again, are others")
    if len(files) < 2:
        as_the_package_reads_it(paths[0], checkpoint)


def placed(found: gguf_files.GgufFile, size: int) -> None:
    """Raise unless the tensors follow one another inside the file."""
    position = found.tensors[0].start if found.tensors else 0
    for one in found.tensors:
        if one.start < position or one.start % found.alignment or one.end > size:
            raise InconsistentError("a tensor lies where another is, or outside the file")
        position = one.end


def as_the_package_reads_it(path: Path, checkpoint: gguf_models.GgufCheckpoint) -> None:
    """Raise unless the gguf package reads the same tensors, where it reads the file."""
    from gguf import GGUFReader

    if checkpoint.source.size(path.name) > LONGEST or not checkpoint.fields:
        return
    try:
        read = GGUFReader(path)
    except IndexError:  # it cannot read scalars, which llama.cpp can
        return
    except Exception as error:  # it has no errors of its own
        reason = f"{type(error).__name__}: {general(str(error))}"
        raise InconsistentError(f"the gguf package does not read it: {reason}") from error
    theirs = {
        one.name: (one.tensor_type.name, tuple(map(int, one.shape)), one.data_offset, one.n_bytes)
        for one in read.tensors
    }
    ours = {
        one.name: (one.dtype, one.shape, one.start, one.size) for one in checkpoint.tensors.values()
    }
    if {name: (*rest[:3], int(rest[3])) for name, rest in theirs.items()} != ours:
        raise InconsistentError("the gguf package reads other tensors")


SAFETENSORS = Target(safetensors_seeds, check_safetensors, change_safetensors)
GGUF = Target(gguf_seeds, check_gguf, change_gguf)
