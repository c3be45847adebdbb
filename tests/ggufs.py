"""Small models in GGUF, and what the format's own package reads of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

KINDS = {kind.name: kind for kind in GGMLQuantizationType}
Contents = tuple[str, tuple[int, ...], bytes]  # of a tensor: its type, its shape and its bytes
PARTS = {  # of a layer, of several types
    "attn_norm.weight": ("F32", 1, 32),
    "attn_q.weight": ("Q4_0", 4, 64),
    "attn_k.weight": ("Q8_0", 2, 64),
    "ffn_up.weight": ("Q4_K", 3, 256),
    "ffn_down.weight": ("BF16", 5, 32),
}


def llama_tensors(layers: Iterable[int]) -> dict[str, tuple[str, int, int]]:
    """Names of a model's tensors; of each the type, the rows and their entries."""
    found = {"token_embd.weight": ("F16", 3, 32), "output_norm.weight": ("F32", 1, 32)}
    for layer in layers:
        found |= {f"blk.{layer}.{part}": kind for part, kind in PARTS.items()}
    return found


def make_gguf(
    path: Path,
    values: Mapping[str, Any] | None = None,
    *,
    architecture: str = "llama",
    layers: int = 4,
    tensors: Mapping[str, tuple[str, int, int]] | None = None,
    **options: Any,
) -> Path:
    """Write a model of random tensors, with these entries of metadata beside the usual ones.

    Whole numbers become UINT32, a list gets the type of its entries, and None leaves out a key.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture, **options)
    usual = {
        "general.name": "tiny",
        f"{architecture}.block_count": layers,
        f"{architecture}.embedding_length": 32,
        f"{architecture}.attention.head_count": 4,
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(3)],
        "tokenizer.ggml.scores": [0.5, 1.5, 2.5],
    }
    for key, value in (usual | dict(values or {})).items():
        if key == "general.alignment" and value:
            writer.add_custom_alignment(value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif type(value) is int:
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    rng = np.random.default_rng(0)
    chosen = llama_tensors(range(layers)) if tensors is None else tensors
    for name, (kind, rows, entries) in chosen.items():
        block, size = GGML_QUANT_SIZES[KINDS[kind]]
        raw = rng.integers(0, 256, (rows, entries // block * size), dtype=np.uint8)
        if kind in ("F32", "F16"):
            raw = raw.view({"F32": np.float32, "F16": np.float16}[kind])
        writer.add_tensor(name, raw, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(*files: Path) -> dict[str, Any]:
    """What the package reads of the metadata of the first file."""
    fields = GGUFReader(min(files)).fields
    return {key: x.contents() for key, x in fields.items() if not key.startswith("GGUF.")}


def contents(*files: Path) -> dict[str, Contents]:
    """What the package reads of the tensors of files, by name."""
    return {
        tensor.name: (tensor.tensor_type.name, tuple(map(int, tensor.shape)), tensor.data.tobytes())
        for file in sorted(files)
        for tensor in GGUFReader(file).tensors
    }
