"""Hostile models for `faults.py`: configs and weights; and what other areas need to spoil files.

Each function draws one case and prepares its room.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fault_judges import normalise
from fault_rooms import SCORED, SEARCHES, Base, Case

Draw = Callable[[random.Random, int, Path, Base], Case]


class Area(NamedTuple):
    """An area: its share of all cases, and what draws one."""

    share: int
    draw: Draw


DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
# JSON texts of every wrong kind
ODD = [
    *"null true false 0 -1 1 2 3 7 9 9999 10001 1000000 1000000000 9223372036854775808".split(),
    *"1e30 1.5 8.0 -0.0 1e400 NaN Infinity -Infinity [] [5] [8,8] {} [[]] [null]".split(),
    *['""', '"8"', '"llama"', '"\\ud800"', '"\\u0000"', '"../../x"', '{"a":1}', '{"0":{}}'],
    *[DIGITS, f"1.{DIGITS}", "[" * 300 + "]" * 300, DEEP, f'"{"x" * 1_000_000}"'],
]
MARK = "@mark@"


def short(raw: str) -> str:
    """A JSON text as it is shown."""
    return raw if len(raw) <= 60 else f"{raw[:12]}...({len(raw)} characters)"


def with_value(values: Any, path: tuple[Any, ...], raw: str) -> str:
    """The JSON of `values` with the text `raw` in one place."""
    copy = json.loads(json.dumps(values))
    part = copy
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = MARK
    return json.dumps(copy, indent=1).replace(f'"{MARK}"', raw)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document."""
    entries: list[Any] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    found = [path] if path else []
    for name, entry in entries:
        found += places(entry, (*path, name))
    return found


def road(drawn: random.Random, number: int, room: Path, base: Base) -> tuple[list[str], Any]:
    """The words of a run on model ``m``, most often on disk, and the layers it removes."""
    if number % 4:
        more = drawn.choice([[], [], ["--verify"], ["--link"]])
        return ["--model", "m", "--layers", "1,2", "--output", "o", *more], [1, 2]
    base.copy("d.jsonl", room / "d.jsonl")
    return ["--model", "m", *SEARCHES["bi"], *SCORED, "--dry-run", "--json"], None


def twin_of_model(room: Path, twin: Path) -> None:
    """The model as stock transformers reads it."""
    normalise(room / "m", twin / "m")
    for path in (room / "m").iterdir():
        if path.is_file() and path.name.startswith(("tokenizer", "chat_template")):
            shutil.copyfile(path, twin / "m" / path.name)
    for path in room.glob("d.*"):
        shutil.copyfile(path, twin / path.name)


def model_case(
    drawn: random.Random, number: int, room: Path, base: Base, kind: str, what: str
) -> Case:
    """A case of a damaged model ``m``."""
    words, removed = road(drawn, number, room, base)
    twin = twin_of_model if removed is None else None
    way = "in memory: " if removed is None else ""
    return Case(kind, way + what, words, removed, twin=twin, must=kind == "clean")


# --- config.json ----------------------------------------------------------------------------------
COUNTS = (
    "n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
    "num_layers_per_stack layers"
).split()
COUNT_VALUES = [*"3 7 9 0 -1 1 8.0 3.5 null [8] [3] {} true 1000000000".split(), '"8"', '"3"']
ADDED = {
    "text_config": ["{}", "[]", '"x"', '{"num_hidden_layers":3}', '{"text_config":{}}', "null"],
    "llm_config": ['{"num_hidden_layers":3}', '{"model_type":"llama"}', "5"],
    "decoder": ['{"num_hidden_layers":8}', "[1]", '{"num_hidden_layers":"8"}'],
    "layer_types": [
        *['["full_attention"]', json.dumps(["full_attention"] * 8)],
        *[json.dumps(["full_attention"] * 9), json.dumps(["nonsense"] * 8)],
        *["[null,null,null,null,null,null,null,null]", "8", '"full_attention"'],
        *[json.dumps([[]] * 8)],
    ],
    "quantization_config": ["{}", "[]", '"gptq"', '{"quant_method":"gptq"}', '{"quant_method":5}'],
    "architectures": ["[5]", "[]", '["Nope"]', '["BertModel"]', '"LlamaForCausalLM"', "[null]"],
    "auto_map": [
        '{"AutoConfig":"evil.Config"}',
        "[]",
        '{"AutoConfig":5}',
        '{"AutoConfig":"../x.Y"}',
    ],
    "num_nextn_predict_layers": ["1", "3", "-1", '"1"', "[1]", "1000000000"],
    "per_layer_config": ["{}", '{"0":{}}', "[]", '{"x":5}', '{"9":{"hidden_size":3}}'],
    "is_encoder_decoder": ["true", '"yes"', "1"],
    "model_type": ['["llama"]', '"bert"', '"gpt2"', '"t5"', '"nope"', '""', '"Llama"', '"mixtral"'],
    "rope_parameters": ["[]", '{"rope_type":"nope"}', '{"rope_type":["x"]}', '{"rope_theta":"x"}'],
    "rope_scaling": ['{"type":"linear"}', '{"type":"linear","factor":-1}', "5"],
    "dtype": ['"float99"', '"bfloat16"', '["float32"]', '"os"', '"nn"'],
    "torch_dtype": ['"float99"', "5"],
    "vision_config": ["{}", '{"num_hidden_layers":8}', "5"],
    "id2label": ["[]", '{"x":1}', '{"0":["a"]}'],
    "mlp_only_layers": ["[9]", "[-1]", '["a"]', "5", '"1"', "[[1]]", "[1.5]", "{}"],
    "first_k_dense_replace": ['"2"', "-1", "1.5", "[1,2]", "1000000000"],
    "num_kv_shared_layers": ["3", '"3"', "-1", "8", "9"],
    "kv_source_layers": ["[0,1,2,3,4,5,6,9]", "[0]", '"x"', '["a"]', "[-1,0,0,0,0,0,0,0]"],
    "decoder_sparse_step": ["2", '"2"', "0", "-1", "[2]"],
    "block_types": ['["attention"]', "[]", "5"],
    "indexer_types": [json.dumps(["shared"] * 8), "5"],
    "hybrid_override_pattern": ['"MMMMMMMM"', '"M"', "8"],
    "use_sliding_window": ["true"],
    "generation": [DEEP],
    "_name_or_path": ['"../m"', "5"],
    "head_dim": ["0", "-8", "8.5", '"8"'],
}
WHOLE: dict[str, Callable[[str], bytes | None]] = {
    "a list": lambda text: f"[{text}]".encode(),
    "a text": lambda text: b'"x"',
    "a number": lambda text: b"5",
    "null": lambda text: b"null",
    "empty": lambda text: b"",
    "an empty object": lambda text: b"{}",
    "cut in half": lambda text: text[: len(text) // 2].encode(),
    "something after its end": lambda text: text.encode() + b"}",
    "with a BOM": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without BOM": lambda text: text.encode("utf-16-le"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "bytes that are no UTF-8": lambda text: text.replace("silu", "silu\udcff").encode(
        "utf-8", "surrogateescape"
    ),
    "NUL bytes": lambda text: text.encode() + b"\0" * 100,
    "the count twice": lambda text: text.replace("{", '{"num_hidden_layers": 3,', 1).encode(),
    "the count twice, the same": lambda text: text.replace(
        "{", '{"num_hidden_layers": 8,', 1
    ).encode(),
    "a comment": lambda text: b"// x\n" + text.encode(),
    "single quotes": lambda text: text.replace('"', "'").encode(),
    "nested 100,000 deep": lambda text: DEEP.encode(),
    "nested objects 50,000 deep": lambda text: (b'{"a":' * 50_000) + b"1" + b"}" * 50_000,
    "random bytes": lambda text: bytes(range(256)),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "a long key": lambda text: text.replace("{", '{"' + "k" * 10**6 + '": 1,', 1).encode(),
    "an empty key": lambda text: text.replace("{", '{"": 8,', 1).encode(),
    "a lone surrogate as key": lambda text: text.replace("{", '{"\\ud800": 8,', 1).encode(),
}


def special(path: Path, kind: str) -> None:
    """Something in the place of a file that is not one."""
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        short_name = f"../{path.name[:20]}.sock"  # their names are limited
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(short_name)
        os.rename(short_name, path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind != "missing":
        path.symlink_to(kind)


SPECIAL = [
    *"missing FIFO folder socket loop".split(),
    *["dangling link", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem"],
]


def config_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A config.json, or a file beside it, with something wrong in it."""
    base.copy(drawn.choice(["m", "m", "s"]), room / "m")
    name = "config.json"
    if drawn.random() < 0.08:
        name = drawn.choice(["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
    path = room / "m" / name
    text = path.read_text()
    values = json.loads(text)
    roll = drawn.random()
    if roll < 0.02:
        kind, what = "clean", "nothing is wrong"
    elif roll < 0.08:
        what = drawn.choice(SPECIAL)
        kind = f"{name} is no file"
        special(path, what)
        what = f"{name}: {what}"
    elif roll < 0.2:
        what = drawn.choice(list(WHOLE))
        kind, raw = f"{name} {what}", WHOLE[what](text)
        path.write_bytes(raw or b"")
        what = f"{name}: {what}"
    elif roll < 0.4 and name == "config.json":
        field, raw = drawn.choice(COUNTS), drawn.choice(COUNT_VALUES)
        kind, what = "a second count", f'"{field}": {raw}'
        path.write_text(with_value({**values, field: 0}, (field,), raw))
    elif roll < 0.65 and name == "config.json":
        field = drawn.choice(list(ADDED))
        raw = drawn.choice(ADDED[field])
        kind, what = f"config field {field}", f'"{field}": {short(raw)}'
        path.write_text(with_value({**values, field: 0}, (field,), raw))
    else:
        where, raw = drawn.choice(places(values)), drawn.choice(ODD)
        kind = f"{name} field {where[0]}"
        what = f"{name} {'.'.join(map(str, where))}: {short(raw)}"
        path.write_text(with_value(values, where, raw))
    return model_case(drawn, number, room, base, kind, what)


# --- weights --------------------------------------------------------------------------------------
def parted(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(path: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file of a header, perhaps a text, and data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header_damage(drawn: random.Random, path: Path) -> tuple[str, str]:
    """Something wrong in a header; says what."""
    header, data = parted(path)
    names = [name for name in header if name != "__metadata__"]
    one, other = drawn.sample(names, 2)
    kind = drawn.choice(
        "missing renamed renumbered swapped shape dtype offsets metadata value prefix extra "
        "duplicate odd-name".split()
    )
    what = f"{kind}: {one}"
    if kind == "missing":
        data = _filler(header.pop(one), header, data)
    elif kind == "renamed":
        new = drawn.choice([f"{one}.x", one.upper(), f"x.{one}", "", "é", "a" * 5000, "__proto__"])
        header = {new if name == one else name: entry for name, entry in header.items()}
        what += f" -> {new[:20]!r}"
    elif kind == "renumbered":
        new = re.sub(
            r"\d+", drawn.choice(["8", "99", "-1", "01", "1.0", "٣", "1e0", "9" * 30]), one
        )
        header = {new if name == one else name: entry for name, entry in header.items()}
        what += f" -> {new[:40]}"
    elif kind == "swapped":
        header[one], header[other] = header[other], header[one]
        what += f" and {other}"
    elif kind == "shape":
        shape = header[one]["shape"]
        flat = 1
        for length in shape:
            flat *= length
        new = drawn.choice([shape[::-1], [flat], [1, *shape], [flat // 2, 2], [*shape, 1], []])
        header[one]["shape"] = new
        what += f" {shape} -> {new}"
    elif kind == "dtype":
        new = drawn.choice(
            ["I32", "F16", "BF16", "F64", "U8", "F8_E4M3", "F4", "X", 5, None, "f32"]
        )
        header[one]["dtype"] = new
        what += f" -> {new}"
    elif kind == "offsets":
        begin, end = header[one]["data_offsets"]
        pairs = [[begin, end + 4], [end, begin], [-4, end], [begin, 2**63], [begin], [0, 0]]
        new = drawn.choice([*pairs, [str(begin), str(end)], [float(begin), end], None, {}])
        header[one]["data_offsets"] = new
        what += f" -> {new}"
    elif kind == "metadata":
        raw = drawn.choice(
            [
                *["5", "[]", '"x"', "null", "{}", '{"format":5}', '{"format":null}', '{"a":{}}'],
                *['{"format":"tf"}', '{"format":"nope"}', '{"a":"\\ud800"}', '{"":"x"}'],
                *['{"a":[1]}'],
            ]
        )
        joined(path, with_value({**header, "__metadata__": 0}, ("__metadata__",), raw), data)
        return "weights: __metadata__", f"metadata: {raw}"
    elif kind == "value":
        where, raw = drawn.choice(places(header[one])), drawn.choice(ODD)
        joined(path, with_value(header, (one, *where), raw), data)
        return "weights: an entry", f"entry {one}.{'.'.join(map(str, where))}: {short(raw)}"
    elif kind == "prefix":
        new = drawn.choice(["", "transformer.", "model.model.", "vision.", "module.", "mtp.0."])
        names = {name: re.sub("^model[.]", new, name) for name in header}
        header = {names[name]: entry for name, entry in header.items()}
        what = f"prefix: model. -> {new!r} for all"
    elif kind == "extra":
        new = drawn.choice(
            [
                *["model.layers.8.x", "model.layers.3.extra.weight", "head.0.weight", "a.0.b"],
                *["mtp.w", "model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight"],
                *["vision.0.weight"],
            ]
        )
        header[new] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
        data += b"\0" * 8
        what = f"extra: {new}"
    elif kind == "duplicate":
        text = json.dumps(header)
        joined(path, f'{text[:-1]},"{one}":{json.dumps(header[other])}}}', data)
    else:
        new = drawn.choice(
            ["\x00", "\n", "../x", "model.layers.0", "model.layers.", "%s", "a" * 10**5]
        )
        header = {new if name == one else name: entry for name, entry in header.items()}
        what += f" -> {new[:20]!r}"
    if kind != "duplicate":
        joined(path, header, data)
    return f"weights: {kind}", what


def _filler(entry: dict[str, Any], header: dict[str, Any], data: bytes) -> bytes:
    """Take the bytes of a tensor out, so that no hole shows it."""
    begin, end = entry["data_offsets"]
    for other in header.values():
        if isinstance(other, dict) and other.get("data_offsets", [0])[0] >= end:
            other["data_offsets"] = [n - (end - begin) for n in other["data_offsets"]]
    return data[:begin] + data[end:]


def byte_damage(drawn: random.Random, path: Path) -> tuple[str, str]:
    """Something wrong in the bytes; says what."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    kind = drawn.choice("flip flip-header flip-length cut longer length zeros empty text".split())
    what = kind
    if kind.startswith("flip"):
        ranges = {"flip": (8 + length, len(raw)), "flip-header": (8, 8 + length)}
        where, bit = drawn.randrange(*ranges.get(kind, (0, 8))), drawn.randrange(8)
        raw[where] ^= 1 << bit
        what = f"{kind}: byte {where}, bit {bit}"
    elif kind == "cut":
        left = drawn.choice([0, 1, 7, 8, 9, 8 + length, drawn.randrange(len(raw)), len(raw) - 1])
        raw, what = raw[:left], f"cut to {left} bytes"
    elif kind == "longer":
        raw += b"\0" * drawn.choice([1, 8, 4096])
    elif kind == "length":
        new = drawn.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1, 100_000_001])
        raw[:8], what = new.to_bytes(8, "little"), f"a header of {new} bytes"
    elif kind == "zeros":
        raw[8 : 8 + length] = bytes(length)
    else:
        raw = bytearray({"empty": b"", "text": b"version https://git-lfs.github.com/spec/v1"}[kind])
    path.write_bytes(raw)
    return f"weights: {kind}", what


def index_damage(drawn: random.Random, model: Path, base: Base) -> tuple[str, str]:
    """Something wrong with the index of shards; says what."""
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weights, files = index["weight_map"], sorted(set(index["weight_map"].values()))
    one, kind = (
        drawn.choice(list(weights)),
        drawn.choice("names names value whole both both".split()),
    )
    if kind == "names":
        odd = ["../m/x.safetensors", "/etc/passwd", "nope.safetensors", "", ".", "config.json"]
        odd += [
            files[0].upper(),
            f"./{files[0]}",
            "x\0.safetensors",
            "\ud800.safetensors",
            "a" * 300,
        ]
        new = drawn.choice([*odd, "../x.safetensors", drawn.choice(files)])
        weights[one] = new
        what = f"{one} in {new[:30]!r}"
    elif kind == "value":
        where, raw = drawn.choice([("weight_map",), ("weight_map", one), ("metadata",)]), ""
        raw = drawn.choice([*ODD, f'["{files[0]}"]'])
        path.write_text(with_value(index, where, raw))
        return "index: a value", f"index {'.'.join(where)}: {short(raw)}"
    elif kind == "whole":
        what = drawn.choice(list(WHOLE))
        path.write_bytes(WHOLE[what](path.read_text()) or b"")
        return "index: whole file", f"index: {what}"
    else:  # the single file has other weights, and is what transformers reads
        base.copy("m/model.safetensors", model / "model.safetensors")
        header, data = parted(model / "model.safetensors")
        if drawn.random() < 0.8:
            joined(model / "model.safetensors", header, data[::-1])
        return "single file and index", "model.safetensors beside an index, with other weights"
    path.write_text(json.dumps(index))
    return f"index: {kind}", what


def weights_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """Weights with something wrong in them."""
    sharded = drawn.random() < 0.45
    model = base.copy("s" if sharded else "m", room / "m")
    shards = sorted(model.glob("*.safetensors"))
    path, roll = drawn.choice(shards), drawn.random()
    if roll < 0.02:
        kind, what = "clean", "nothing is wrong"
    elif roll < 0.1:
        what = drawn.choice(SPECIAL)
        kind = "weights are no file"
        special(path, what)
    elif sharded and roll < 0.45:
        kind, what = index_damage(drawn, model, base)
    elif sharded and roll < 0.5:
        shutil.copyfile(shards[0], shards[1])
        kind = what = "a shard is another's copy"
    elif roll < 0.75:
        kind, what = header_damage(drawn, path)
    else:
        kind, what = byte_damage(drawn, path)
    return model_case(drawn, number, room, base, kind, f"{what}{' (in shards)' if sharded else ''}")


AREAS = {"config": Area(400, config_case), "weights": Area(400, weights_case)}
