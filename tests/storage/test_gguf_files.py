"""Reading and writing GGUF files: what the format's own package reads, and what is damaged."""

from __future__ import annotations

import re
import struct
import sys
import time
import tracemalloc
from contextlib import suppress

import pytest
from gguf import GGUFReader
from ggufs import contents, make_gguf, metadata
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_pruner.errors import LoadError, MissingDependencyError
from llm_pruner.storage.gguf_files import (
    ALIGNMENT,
    LARGEST_VALUE,
    GgufFile,
    encode_field,
    read_gguf,
    write_gguf,
)
from llm_pruner.storage.sources import LocalFolder

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
VALUES = {
    "llama.truth": True,
    "llama.number": 2.5,
    "llama.list": [1, 2, 3],
    "llama.truths": [True, False],
    "llama.texts": ["a", "", "ü"],
    "tokenizer.ggml.merges": [f"m {i}" for i in range(300)],
}


def read(path):
    return read_gguf(LocalFolder(path.parent), path.name)


def text(value, size=None):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw


def header(tensors=0, fields=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, fields)


def tensor(name="t", shape=(8,), kind=0, offset=0):
    rest = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return text(name) + rest


def file_of(*tensors, fields=(), data=b"", alignment=32):
    """A file with these entries of its lists, and the bytes that follow them."""
    raw = header(len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)
    return raw + b"\0" * (-len(raw) % alignment) + data


def written(file, entries, path, pairs=None):
    pairs = [(x, x.name) for x in file.tensors] if pairs is None else pairs
    with path.open("wb") as target:
        write_gguf(LocalFolder(path.parent), file, entries, pairs, target)
    return path


def refusal(path):
    """The message with which a file is refused, in little time and memory."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(LoadError, match=rf"'{path.name}' of checkpoint") as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 2
    return str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_a_file_is_read_as_by_the_formats_own_package(tmp_path, version, alignment):
    path = make_gguf(tmp_path / "m.gguf", {**VALUES, "general.alignment": alignment})
    raw = bytearray(path.read_bytes())
    raw[4] = version
    path.write_bytes(raw)
    found, want = read(path), GGUFReader(path)
    assert (found.version, found.alignment) == (version, want.alignment)
    assert found.alignment == (alignment or ALIGNMENT)
    values = metadata(path)
    assert found.fields.keys() == values.keys()
    for key, entry in found.fields.items():
        assert entry.value == (None if key.startswith("tokenizer.") else values[key])
        assert raw[entry.start : entry.end] == entry.encoded(values[key])
    assert [
        (x.name, x.dtype, x.shape, x.start, x.size, bytes(raw[x.start : x.end]))
        for x in found.tensors
    ] == [
        (x.name, x.tensor_type.name, tuple(x.shape), x.data_offset, x.n_bytes, x.data.tobytes())
        for x in want.tensors
    ]


def test_lists_of_tokens_and_large_values_are_passed_over(tmp_path):
    long = "x" * (LARGEST_VALUE + 1)
    values = {"llama.long": long, "llama.texts": [long], "llama.short": "x" * LARGEST_VALUE}
    path = make_gguf(tmp_path / "m.gguf", values | {"llama.list": [0] * (LARGEST_VALUE // 4 + 1)})
    found = read(path)
    assert [key for key, entry in found.fields.items() if entry.value is None] == [
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
        "llama.long",
        "llama.texts",
        "llama.list",
    ]
    assert found.fields["llama.list"].count == LARGEST_VALUE // 4 + 1
    assert found.tensors == read(path).tensors


def test_empty_lists_and_many_texts_are_read(tmp_path):
    tokens = ["é" * (i % 7) for i in range(300_000)]
    raw = file_of(
        fields=[
            encode_field("tokenizer.ggml.tokens", STRING, tokens),
            encode_field("a.numbers", U32, []),
            encode_field("a.texts", STRING, []),
        ]
    )
    (tmp_path / "m.gguf").write_bytes(raw)
    found = read(tmp_path / "m.gguf").fields
    assert {key: (x.count, x.type, x.value) for key, x in found.items()} == {
        "tokenizer.ggml.tokens": (len(tokens), STRING, None),
        "a.numbers": (0, U32, []),
        "a.texts": (0, STRING, []),
    }
    assert found["tokenizer.ggml.tokens"].end == found["a.numbers"].start


def test_an_unchanged_file_is_written_byte_for_byte(tmp_path):
    path = make_gguf(tmp_path / "m.gguf", VALUES)
    file = read(path)
    again = written(file, file.fields.values(), tmp_path / "again.gguf")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_what_is_written_is_read_by_the_formats_own_package(tmp_path, alignment, version):
    path = make_gguf(tmp_path / "m.gguf", {**VALUES, "general.alignment": alignment})
    raw = bytearray(path.read_bytes())
    raw[4] = version
    path.write_bytes(raw)
    file = read(path)
    keys = [key for key in file.fields if key != "llama.list"]
    entries = [file.fields[key] for key in keys if key != "llama.truths"]
    entries += [encode_field("llama.truths", U32, [7]), encode_field("llama.new", STRING, "ö")]
    pairs = [(x, f"new.{x.name}") for x in file.tensors if "attn" not in x.name]
    again = written(file, entries, tmp_path / "again.gguf", pairs)
    want = {k: v for k, v in metadata(path).items() if k in keys}
    assert metadata(again) == want | {"llama.truths": [7], "llama.new": "ö"}
    assert contents(again) == {
        f"new.{name}": tensor for name, tensor in contents(path).items() if "attn" not in name
    }
    assert read(again).alignment == (alignment or ALIGNMENT)
    assert read(again).version == version


def test_a_file_without_tensors_is_written(tmp_path):
    file = read(make_gguf(tmp_path / "m.gguf", VALUES))
    again = written(file, file.fields.values(), tmp_path / "again.gguf", [])
    assert metadata(again) == metadata(tmp_path / "m.gguf")
    assert read(again).tensors == []


@pytest.mark.parametrize(("first", "second"), [(64, 8), (8, 64), (8, 8)])
def test_tensors_of_files_with_other_alignments_are_placed_anew(tmp_path, first, second):
    tensors = {name: ("F32", 1, 2 + i) for i, name in enumerate("abcde")}
    paths = []
    for alignment, name in ((first, "1.gguf"), (second, "2.gguf")):
        paths.append(
            make_gguf(
                tmp_path / name,
                {"general.alignment": alignment},
                tensors={f"{name}{key}": kind for key, kind in tensors.items()},
            )
        )
    file, other = map(read, paths)
    pairs = [(x, x.name) for x in (*file.tensors, *other.tensors)]
    again = written(file, file.fields.values(), tmp_path / "both.gguf", pairs)
    assert contents(again) == contents(*paths)


def test_tensors_without_dimensions_or_entries_are_read(tmp_path):
    raw = file_of(
        tensor("scalar", ()),
        tensor("none", (0,), offset=32),
        tensor("more", (4, 0), offset=32),
        tensor("last", (2, 3), offset=32),
        data=bytes(32 + 24),
    )
    (tmp_path / "m.gguf").write_bytes(raw)
    sizes = {x.name: (x.shape, x.size) for x in read(tmp_path / "m.gguf").tensors}
    assert sizes == {
        "scalar": ((), 4),
        "none": ((0,), 0),
        "more": ((4, 0), 0),
        "last": ((2, 3), 24),
    }


def test_a_list_of_tensors_in_another_order_is_read_by_their_bytes(tmp_path):
    raw = file_of(tensor("b", offset=32), tensor("a"), data=bytes(range(64)))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert [x.name for x in read(path).tensors] == ["a", "b"]
    again = written(read(path), [], tmp_path / "again.gguf")
    assert contents(again) == contents(path)


ONE = encode_field("a", U32, 1)
DAMAGES = {
    "empty": (b"", "does not begin with 'GGUF'"),
    "wrong magic": (header(magic=b"GGML"), "does not begin with 'GGUF'"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (header(version=1), "of version 1"),
    "version 4": (header(version=4), "of version 4"),
    "many tensors": (header(tensors=2**60), r"claims 1,152,921,504,606,846,976 tensors"),
    "many fields": (header(fields=2**60), "entries of metadata"),
    "more tensors than there are": (header(tensors=9) + bytes(99), r"begins at|ends at|announces"),
    "more fields than there are": (header(fields=2) + ONE, "and has 0 more"),
    "a key twice": (file_of(fields=[ONE, ONE]), "'a' is there twice"),
    "a long key": (file_of(fields=[text("a", 2**63) + bytes(99)]), "announces a text of"),
    "a key past the end": (file_of(fields=[text("a", 5000)]), "of 5,000 bytes"),
    "a key that is not UTF-8": (file_of(fields=[text(b"\xff\xfe") + ONE]), "is not UTF-8"),
    "a text that is not UTF-8": (
        file_of(fields=[text("a") + struct.pack("<I", STRING) + text(b"\xc3")]),
        "is not UTF-8",
    ),
    "a long text": (
        file_of(fields=[text("a") + struct.pack("<I", STRING) + text("", 2**63)]),
        "announces",
    ),
    "a type of values": (
        file_of(fields=[text("a") + struct.pack("<I", 13) + bytes(99)]),
        "'a' is of type 13, which does not exist",
    ),
    "a list of lists": (
        file_of(fields=[text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(99)]),
        "'a' is of type 9, which does not exist",
    ),
    **{
        f"a long list of type {kind} ({count})": (
            file_of(fields=[text("a") + struct.pack("<IIQ", ARRAY, kind, count) + bytes(99)]),
            "announces",
        )
        for kind in (U8, BOOL, U64, STRING)
        for count in (2**60, 2**64 - 1, 1000)
    },
    "a long text in a list": (
        file_of(
            fields=[text("a") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("b") + text("", 2**63)]
        ),
        "announces",
    ),
    **{
        f"alignment {value!r}": (
            file_of(fields=[encode_field("general.alignment", kind, value)], data=bytes(99)),
            "its alignment is",
        )
        for kind, value in [
            (U32, 0),
            (U32, 3),
            (U32, 2**31),
            (U64, 2**40),
            (U64, 32),
            (F32, 32.0),
            (BOOL, True),
            (STRING, "32"),
            (U32, [32]),
        ]
    },
    "a tensor twice": (
        file_of(tensor(), tensor(offset=32), data=bytes(64)),
        "tensor 't' is there twice",
    ),
    "5 dimensions": (file_of(tensor(shape=(1,) * 5)), "has 5 dimensions"),
    "2**32 - 1 dimensions": (
        header(tensors=1) + text("t") + struct.pack("<I", 2**32 - 1) + bytes(99),
        "4294967295 dimensions",
    ),
    "a product past 2**64": (file_of(tensor(shape=(2**32,) * 4)), "is of shape"),
    "a product that wraps to a small one": (
        file_of(tensor(shape=(2**33, 2**31, 1)), data=bytes(99)),
        "is of shape",
    ),
    **{
        f"type {kind} of a tensor": (file_of(tensor(kind=kind), data=bytes(99)), "pip install")
        for kind in (4, 5, 999, 2**32 - 1)
    },
    "a row that is no whole block": (file_of(tensor(shape=(8,), kind=2)), "no multiple of 32"),
    "a scalar of blocks": (file_of(tensor(shape=(), kind=2)), "no multiple of 32"),
    "a tensor past the end": (file_of(tensor(), data=bytes(31)), r"ends at byte [\d,]+, and the"),
    "an offset past the end": (file_of(tensor(offset=2**63), data=bytes(99)), "begins at byte"),
    "a gap": (file_of(tensor(), tensor("u", offset=64), data=bytes(99)), "begins at byte"),
    "an overlap": (file_of(tensor(), tensor("u"), data=bytes(99)), "begins at byte"),
    "an odd offset": (file_of(tensor(), tensor("u", offset=33), data=bytes(99)), "begins at"),
    "a long name": (file_of(tensor("t" * 2000), data=bytes(99)), "announces a text of 2,000"),
}


@pytest.mark.parametrize(("raw", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, raw, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    assert re.search(message, refusal(path))


def test_a_file_that_ends_too_early_is_refused(tmp_path):
    """At every byte of its header, and within every tensor."""
    path = make_gguf(tmp_path / "m.gguf", {"llama.texts": ["a", "b"]}, layers=1)
    raw, file = path.read_bytes(), read(path)
    ends = [*range(file.tensors[0].start), *(x.end - 1 for x in file.tensors)]
    for end in ends:
        path.write_bytes(raw[:end])
        with pytest.raises(LoadError, match=r"'m\.gguf' of checkpoint"):
            read(path)
    path.write_bytes(raw[: file.tensors[-1].end])
    assert read(path).tensors == file.tensors


def test_a_folder_or_nothing_is_refused(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    assert "directory" in refusal(tmp_path / "folder.gguf")
    assert "No such file" in refusal(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    "claim",
    [
        text("a") + struct.pack("<IIQ", ARRAY, STRING, 2**31),
        b"".join(
            text(str(i)) + struct.pack("<IIQ", ARRAY, U8, 2**20) + bytes(2**20) for i in range(40)
        ),
    ],
    ids=["texts", "values"],
)
def test_what_a_large_file_claims_takes_neither_time_nor_memory(tmp_path, claim):
    """A file may be larger than its bytes on the disk."""
    path = tmp_path / "m.gguf"
    path.write_bytes(header(fields=40) + claim)
    with path.open("r+b") as file:
        file.truncate(2**36)
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(LoadError, match=r"announces|more than"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 5


class Shrinking(LocalFolder):
    """A folder whose files end earlier than their size says."""

    def size(self, file):
        return super().size(file) + 10_000_000


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = make_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.tokens": ["abc"] * 100}, layers=1)
    raw = path.read_bytes()
    for end in range(0, read(path).tensors[0].start - 32, 7):
        path.write_bytes(raw[:end])
        with pytest.raises(LoadError, match="it ends at byte"):
            read_gguf(Shrinking(tmp_path), path.name)


SMALL = file_of(
    tensor("blk.0.a", (32, 2), 2),
    tensor("blk.1.a", (4,), offset=64),
    fields=[
        encode_field("general.alignment", U32, 32),
        encode_field("a.text", STRING, "some"),
        encode_field("a.numbers", U64, [1, 2, 3]),
        encode_field("a.texts", STRING, ["x", "yy"]),
        encode_field("tokenizer.texts", STRING, ["x", "yy"]),
        encode_field("a.truth", BOOL, True),
    ],
    data=bytes(36 + 28 + 16),
)


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6
    ),
    end=st.integers(0, len(SMALL)) | st.just(len(SMALL)),
)
@settings(
    max_examples=400, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_the_bytes_are_they_are_a_file_or_refused(tmp_path, changes, end):
    raw = bytearray(SMALL)
    for place, value in changes:
        raw[place] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[:end])
    tracemalloc.start()
    with suppress(LoadError):
        found = read(path)
        assert isinstance(found, GgufFile)
        assert all(0 < x.start <= x.end <= end for x in found.tensors)
        again = written(found, found.fields.values(), tmp_path / "again.gguf")
        assert [x.size for x in read(again).tensors] == [x.size for x in found.tensors]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_without_the_formats_package_it_is_named(tmp_path, monkeypatch):
    path = make_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llm_pruner\[gguf\]'"):
        read(path)
