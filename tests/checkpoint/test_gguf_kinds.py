"""Which layers of a GGUF file may go, by what llama.cpp takes the others for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_pruner.checkpoint.on_disk import prune_checkpoint
from llm_pruner.engines.verdict import judge
from llm_pruner.errors import InvalidPlanError, UnsupportedModelError
from llm_pruner.storage.gguf_models import find_gguf, read_gguf_checkpoint

gguf = pytest.importorskip("gguf")

WINDOWS = [True, True, True, False]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of an architecture with so many layers, and entries of its metadata."""

    def write(architecture: str, depth: int, **entries: Any) -> Path:
        path = tmp_path / f"{architecture}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(depth)
        writer.add_head_count(4)
        writer.add_embedding_length(128)
        for name, value in entries.items():
            key = f"{architecture}.{name.replace('__', '.')}"
            (writer.add_array if isinstance(value, list) else writer.add_uint32)(key, value)
        for layer in range(depth):
            writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.full(4, layer, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def cut(path: Path, layers: list[int]) -> Path:
    """The file without layers."""
    prune_checkpoint(path, layers, path.with_suffix(""), overwrite=True)
    return find_gguf(path.with_suffix(""))[0]


def test_what_only_the_first_layer_can_do_stays_with_it(write: Write) -> None:
    path = write("deci", 4, feed_forward_length=[8, 8, 0, 8])
    with pytest.raises(InvalidPlanError, match="role of layer 1 is bound to the index"):
        cut(path, [0])
    values = read_gguf_checkpoint([cut(path, [1])]).values
    assert values["deci.feed_forward_length"] == [8, 0, 8]


def test_decilm_has_to_end_with_a_network(write: Write) -> None:
    path = write("deci", 4, feed_forward_length=[8, 8, 0, 8])
    with pytest.raises(UnsupportedModelError, match="Layer 2 has no feed-forward network"):
        cut(path, [3])
    cut(path, [2, 3])


def test_gemma_3n_keeps_its_first_twenty_layers(write: Write) -> None:
    path = write("gemma3n", 24)
    with pytest.raises(InvalidPlanError, match="role of layer 20 is bound to the index"):
        cut(path, [19])


def test_the_large_exaone_has_layers_without_rotary_positions_only_whole(write: Write) -> None:
    path = write("exaone4", 64)
    with_windows = [layer for layer in range(64) if layer % 4 != 3]
    with pytest.raises(InvalidPlanError, match="rotary position of layers 3, 7") as caught:
        cut(path, with_windows)
    assert "that would be: none" in str(caught.value)
    cut(write("exaone4", 30), [1])  # the small one has them everywhere


def test_the_same_of_its_config() -> None:
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = {
        "model_type": "exaone4",
        "num_hidden_layers": 64,
        "layer_types": kinds * 16,
        "sliding_window": 4096,
    }
    assert judge(config, "llama.cpp").state == "right"
    assert judge(config, "llama.cpp", kept=range(3, 64, 4)).state == "wrong"
    small = config | {
        "num_hidden_layers": 30,
        "layer_types": kinds[3:] * 30,
        "sliding_window": None,
    }
    assert judge(small, "llama.cpp", kept=range(1, 30)).state == "right"


@pytest.mark.parametrize(
    ("architecture", "entries"),
    [
        ("olmo2", {"attention__sliding_window_pattern": WINDOWS * 3}),
        ("cohere2moe", {"attention__sliding_window_pattern": WINDOWS * 3}),
        ("exaone-moe", {"attention__sliding_window_pattern": WINDOWS * 3}),
        ("gpt-oss", {"attention__sliding_window_pattern": WINDOWS * 3}),  # cut before
        ("cohere2", {}),
    ],
)
def test_a_layer_with_a_window_has_to_stay(
    write: Write, architecture: str, entries: dict[str, Any]
) -> None:
    path = write(architecture, 12, attention__sliding_window=16, **entries)
    with pytest.raises(UnsupportedModelError, match="without any layer that has sliding-window"):
        cut(path, [0, 1, 2, 4, 5, 6, 8, 9, 10])
    values = read_gguf_checkpoint([cut(path, [0, 1, 2, 4, 5, 6, 8, 9])]).values
    key = f"{architecture}.attention.sliding_window_pattern"
    assert values[key] == [False, False, True, False]


@pytest.mark.parametrize(
    ("architecture", "entries", "lost"),
    [
        ("jamba", {"attention__head_count_kv": [0, 0, 2, 0]}, {"attention": 2}),
        ("lfm2", {"attention__head_count_kv": [0, 2, 2, 2]}, {"recurrence": 0}),
        ("qwen3next", {"full_attention_interval": 4}, {"attention": 3}),
        ("qwen3next", {"attention__recurrent_layers": [False, True, False]}, {"recurrence": 1}),
        (
            "nemotron_h",  # its second and last layer are networks
            {
                "attention__head_count_kv": [0, 0, 2, 0],
                "feed_forward_length": [0, 8, 0, 8],
            },
            {"attention": 2, "recurrence": 0},
        ),
    ],
)
def test_a_hybrid_keeps_a_layer_of_each_kind(
    write: Write, architecture: str, entries: dict[str, Any], lost: dict[str, int]
) -> None:
    depth = max([4 if not isinstance(value, list) else len(value) for value in entries.values()])
    path = write(architecture, depth, **entries)
    for kind, layer in lost.items():
        expected = rf"without any layer that has {kind}: keep one of \[{layer}\]"
        with pytest.raises(UnsupportedModelError, match=expected):
            cut(path, [layer])
    cut(path, [next(layer for layer in range(depth) if layer not in lost.values())])


def test_where_layers_without_keys_are_not_recurrent_all_may_attend(write: Write) -> None:
    path = write("deci", 3, attention__head_count_kv=[2, 0, 2], feed_forward_length=[8, 8, 8])
    assert read_gguf_checkpoint([cut(path, [1])]).values["deci.attention.head_count_kv"] == [2, 2]


def test_llama_4_keeps_a_layer_without_rotary_positions(write: Write) -> None:
    path = write("llama4", 12, interleave_moe_layer_step=1)
    with pytest.raises(InvalidPlanError, match="rotary position of layers 0, 1, 2 follows"):
        cut(path, list(range(3, 12)))
    cut(path, list(range(4, 12)))
