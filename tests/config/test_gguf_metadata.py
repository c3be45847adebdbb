"""Which entries of a GGUF file's metadata follow a removal, and what is refused."""

from __future__ import annotations

import math

import pytest

from llm_pruner.config.gguf_metadata import BOUND_TO_INDEX, PER_LAYER, find_blocks, prune_metadata
from llm_pruner.errors import LoadError, UnsupportedModelError

KEPT = [0, 2, 3]
LIST = [10, 11, 12, 13]  # of 4 layers


def blocks(count):
    return [f"blk.{index}.attn_norm.weight" for index in range(count)]


def metadata(architecture="a", **values):
    """Metadata with entries of an architecture, in whose names a dot is written ``__``."""
    own = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    return {"general.architecture": architecture, f"{architecture}.block_count": 4} | own


def pruned(kept=KEPT, architecture="a", drop_mtp=False, **values):
    """What changes, without the architecture's name, once the layers were found."""
    given = metadata(architecture, **values)
    names, _ = find_blocks(given, blocks(given[f"{architecture}.block_count"]), "m.gguf")
    changed = prune_metadata(given, kept, names.num_layers, drop_mtp=drop_mtp)
    return {key.removeprefix(f"{architecture}."): value for key, value in changed.items()}


# --- the layers --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "tensors", "layers", "extra"),
    [
        ({}, 4, 4, 0),
        ({"nextn_predict_layers": 0}, 4, 4, 0),
        ({"nextn_predict_layers": 1}, 4, 3, 1),
        ({"nextn_predict_layers": 1}, 3, 3, 1),  # whose tensors were left out
        ({"nextn_predict_layers": 3}, 4, 1, 3),
        ({"block_count": 512}, 512, 512, 0),
    ],
)
def test_layers_are_counted_without_those_for_multi_token_prediction(
    values, tensors, layers, extra
):
    names, found = find_blocks(metadata(**values), blocks(tensors), "m.gguf")
    assert (names.prefixes, names.num_layers, found) == (("blk.",), layers, extra)


@pytest.mark.parametrize(
    ("values", "tensors"),
    [
        ({}, 5),
        ({}, 3),
        ({}, 0),
        ({"nextn_predict_layers": 1}, 2),
        ({"nextn_predict_layers": 1}, 5),
    ],
)
def test_other_layers_than_the_metadata_counts_are_refused(values, tensors):
    with pytest.raises(LoadError, match=r"'m.gguf' contradicts itself: its metadata counts 4"):
        find_blocks(metadata(**values), blocks(tensors), "m.gguf")


@pytest.mark.parametrize(
    "values",
    [
        *({"block_count": count} for count in (None, 0, -1, "4", 4.0, True, [4], 2**32 - 1)),
        *({"nextn_predict_layers": count} for count in (None, -1, 4, 5, "1", 1.0, True, [1])),
    ],
)
def test_metadata_that_does_not_count_the_layers_is_refused(values):
    with pytest.raises(LoadError, match=r"'m.gguf' does not say how many layers .*block_count"):
        find_blocks(metadata(**values), blocks(4), "m.gguf")


@pytest.mark.parametrize("values", [{}, {"general.architecture": None}, {"a.block_count": 4}])
def test_metadata_without_an_architecture_is_refused(values):
    with pytest.raises(LoadError, match="does not say how many layers"):
        find_blocks(values, blocks(4), "m.gguf")


@pytest.mark.parametrize(
    ("values", "tensors", "advice"),
    [
        ({"general.type": "mmproj", "general.architecture": "clip"}, ["v.blk.0.a"], "projector"),
        ({"general.architecture": "clip"}, ["v.blk.0.a"], "use the projector with the pruned"),
        ({"general.type": "imatrix"}, ["blk.0.a.counts"], "give the folder that holds it"),
        ({"general.type": "adapter"}, ["blk.0.a.lora_a"], r"merge it .*\(llama-export-lora\)"),
        (metadata("t5"), ["enc.blk.0.a", "dec.blk.0.a"], "encoder-decoder"),
        (metadata("t5encoder"), ["enc.blk.0.a"], "encoder-decoder"),
        (metadata("nomic-bert-moe"), blocks(4), "is an encoder; only decoder-only"),
        (metadata("gemma-embedding"), blocks(4), "is an encoder; only decoder-only"),
        (
            metadata("gemma3n"),
            [*blocks(4), "per_layer_token_embd.weight", "per_layer_model_proj.weight"],
            r"\(per_layer_model_proj.weight\).* prune the original model, and convert the result",
        ),
    ],
)
def test_what_has_no_layers_to_remove_is_refused_with_advice(values, tensors, advice):
    with pytest.raises(UnsupportedModelError, match=rf"'m.gguf'.*{advice}"):
        find_blocks(values, tensors, "m.gguf")


# --- what follows ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "drop_mtp", "want"),
    [
        ({}, False, {"block_count": 3}),
        ({}, True, {"block_count": 3}),
        ({"nextn_predict_layers": 0}, True, {"block_count": 3}),
        ({"block_count": 6, "nextn_predict_layers": 2}, False, {"block_count": 5}),
        (
            {"block_count": 6, "nextn_predict_layers": 2},
            True,
            {"block_count": 3, "nextn_predict_layers": 0},
        ),
    ],
)
def test_the_count_of_blocks_follows(values, drop_mtp, want):
    assert pruned(drop_mtp=drop_mtp, **values) == want


@pytest.mark.parametrize("key", sorted(PER_LAYER))
@pytest.mark.parametrize(
    ("tail", "drop_mtp", "left"), [([], False, []), ([14], False, [14]), ([14], True, [])]
)
def test_lists_by_layer_follow(key, tail, drop_mtp, left):
    """With an entry for blocks of multi-token prediction, or without."""
    low = -20 if key == "deepstack_mapping" else 0  # negative where no image features are added
    value = [entry + low for entry in (*LIST, *tail)]
    values = metadata(block_count=5, nextn_predict_layers=1)
    full = key if key.startswith("xielu.") else f"a.{key}"
    values[full] = value
    names, _ = find_blocks(values, blocks(5), "m.gguf")
    changed = prune_metadata(values, KEPT, names.num_layers, drop_mtp=drop_mtp)
    assert changed[full] == [entry + low for entry in (10, 12, 13, *left)]


@pytest.mark.parametrize("key", sorted(PER_LAYER))
@pytest.mark.parametrize("value", [7, 2.5, True])
def test_what_all_layers_share_stays(key, value):
    full = key if key.startswith("xielu.") else f"a.{key}"
    changed = prune_metadata(metadata() | {full: value}, KEPT, 4)
    assert changed == {"a.block_count": 3}


def test_lists_that_stay_equal_are_not_among_what_changes():
    values = metadata(attention__head_count=[4, 4, 4, 4])
    assert prune_metadata(values, range(4), 4) == {}
    assert prune_metadata(values, KEPT, 4)["a.attention.head_count"] == [4, 4, 4]


@pytest.mark.parametrize("tail", [[], [0], [0, 0, 0]])
def test_compression_ratios_may_go_on_after_the_last_layer(tail):
    key = "attention.compress_ratios"
    assert pruned(attention__compress_ratios=[*LIST, *tail])[key] == [10, 12, 13]
    with pytest.raises(LoadError, match=key):
        pruned(attention__compress_ratios=LIST[:3])


@pytest.mark.parametrize("key", sorted(PER_LAYER - {"deepstack_mapping"}))
@pytest.mark.parametrize("size", [0, 1, 3, 5, 8])
def test_a_list_of_another_length_is_refused(key, size):
    if key == "attention.compress_ratios" and size > 4:
        return
    full = key if key.startswith("xielu.") else f"a.{key}"
    with pytest.raises(LoadError, match=rf"{full} has {size} entries, and the model 4 layers"):
        find_blocks(metadata() | {full: [1] * size}, blocks(4), "m.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", "4"),
        ("attention.head_count", ["4"] * 4),
        ("attention.sliding_window_pattern", "LLLG"),
        ("embedding_length", "32"),
        ("embedding_length", [32]),
        ("n_deepstack_layers", 1.0),
        ("expert_gating_func", "softmax"),
        ("expert_gating_func", math.nan),
        ("residual_scale", "1"),
        ("leading_dense_block_count", "1"),
        ("leading_dense_block_count", [1, 0, 0, 0]),
        ("attention.shared_kv_layers", [1]),
        ("ple.layers", 1),
        ("ple.layers", ["1"]),
        ("n_deepstack_layers", "1"),
        ("deepstack_mapping", ["-1"] * 4),
    ],
)
def test_what_has_to_be_a_number_and_is_none_is_refused(key, value):
    with pytest.raises(LoadError, match=rf"a\.{key} .*: convert the model again"):
        find_blocks(metadata() | {f"a.{key}": value}, blocks(4), "m.gguf")


@pytest.mark.parametrize("key", ["leading_dense_block_count", "hash_layer_count"])
@pytest.mark.parametrize(
    ("value", "kept", "want"),
    [
        (0, KEPT, 0),
        (1, KEPT, 1),
        (2, KEPT, 1),
        (3, KEPT, 2),
        (4, KEPT, 3),
        (9, KEPT, 3),
        (2, [2, 3], 0),
    ],
)
def test_counts_of_leading_layers_follow(key, value, kept, want):
    assert pruned(kept, **{key: value}).get(key, value) == want


@pytest.mark.parametrize(
    ("shared", "kept", "want"), [(0, [0, 1], 0), (2, [0, 1, 3], 1), (2, [0, 1], 0), (1, KEPT, None)]
)
def test_trailing_layers_that_share_keys_and_values_are_counted(shared, kept, want):
    """They use those of the two layers before them, which have to stay."""
    if want is None:
        with pytest.raises(UnsupportedModelError, match=r"Layers \[3\] use .*: keep \[1\]"):
            pruned([0, 2, 3], attention__shared_kv_layers=shared)
        return
    found = pruned(kept, attention__shared_kv_layers=shared)
    assert found.get("attention.shared_kv_layers", shared) == want


@pytest.mark.parametrize(
    ("values", "kept", "lost"),
    [
        ({"n_deepstack_layers": 2}, [0, 1, 3], None),
        ({"n_deepstack_layers": 2}, [0, 2, 3], [1]),
        ({"n_deepstack_layers": 0}, [3], None),
        ({"n_deepstack_layers": 2**32 - 1}, KEPT, [1]),
        ({"deepstack_mapping": [-1, 0, -1, 1]}, [1, 3], None),
        ({"deepstack_mapping": [-1, 0, -1, 1]}, [0, 2, 3], [1]),
        ({"deepstack_mapping": [-1, 0]}, [1, 3], None),
        ({"deepstack_mapping": [0]}, [1, 3], [0]),
    ],
)
def test_layers_at_which_images_come_in_have_to_stay(values, kept, lost):
    if lost is not None:
        with pytest.raises(UnsupportedModelError, match=rf"Image features .*: \[{lost[0]}\] have"):
            pruned(kept, **values)
        return
    found = pruned(kept, **values)
    assert "n_deepstack_layers" not in found
    if "deepstack_mapping" in values:
        whole = [*values["deepstack_mapping"], -1, -1][:4]
        got = [*found["deepstack_mapping"], -1, -1][: len(kept)]
        assert got == [whole[index] for index in kept]


def test_indices_of_layers_are_renumbered_and_their_layers_have_to_stay():
    assert pruned([0, 2, 3], ple__layers=[2])["ple.layers"] == [1]
    with pytest.raises(UnsupportedModelError, match=r"Layers \[1\] have to stay \(a\.ple"):
        pruned([0, 2, 3], ple__layers=[1])


def test_one_layer_with_a_window_has_to_stay_where_there_are_some():
    key = "attention__sliding_window_pattern"
    with pytest.raises(UnsupportedModelError, match=r"run a without .*: keep one of \[1, 3\]"):
        pruned([0, 2], **{key: [0, 1, 0, 1]})
    assert pruned([0, 3], **{key: [0, 1, 0, 1]})[key.replace("__", ".")] == [0, 1]
    assert pruned([0, 2], **{key: [0, 0, 0, 0]})[key.replace("__", ".")] == [0, 0]
    off = {"attention__sliding_window": 0}
    assert pruned([0, 2], **{key: [0, 1, 0, 1]}, **off)[key.replace("__", ".")] == [0, 0]


def test_a_layer_that_uses_another_indexer_cannot_come_first():
    key = "attention__indexer__types"
    with pytest.raises(UnsupportedModelError, match=r"indexer of its own, one of \[0, 2\]"):
        pruned([1, 2, 3], **{key: [1, 0, 1, 0]})
    for kept, architecture, left in (([2, 3], "a", [1, 0]), ([1, 2], "dots3note", [0, 1])):
        found = pruned(kept, architecture, **{key: [1, 0, 1, 0]})
        assert found[key.replace("__", ".")] == left


# --- what does not -----------------------------------------------------------------------------
def test_lists_that_happen_to_be_as_long_stay():
    values = {
        "rope__dimension_sections": LIST,
        "adapters__token_ids_activate": LIST,
        "ple__head_offsets": LIST,
        "ple__layer_multipliers": LIST,
        "classifier__output_labels": ["a", "b", "c", "d"],
        "target_layers": LIST,
        "some_other": [1, 2, 3],
        "rope__scaling__type": "none",
        "too_long_to_be_read": None,
    }
    assert pruned(**values) == {"block_count": 3}
    others = {
        "general.languages": ["en", "de", "fr", "it"],
        "tokenizer.ggml.scores": LIST,
        "b.attention.head_count": LIST,
        "adapter.some": LIST,
    }
    assert prune_metadata(metadata() | others, KEPT, 4) == {"a.block_count": 3}


@pytest.mark.parametrize("size", [4, 5])
def test_an_unknown_list_of_that_length_is_refused(size):
    with pytest.raises(UnsupportedModelError, match=r"a\.some_new\.list has as many .* original"):
        pruned(block_count=5, nextn_predict_layers=1, some_new__list=[1] * size)


@pytest.mark.parametrize("key", BOUND_TO_INDEX)
def test_a_model_that_divides_its_layers_by_index_is_refused(key):
    with pytest.raises(UnsupportedModelError, match=rf"by their index \(a\.{key} = 2\)"):
        pruned(**{key.replace(".", "__"): 2})
    assert pruned(**{key.replace(".", "__"): 0}) == {"block_count": 3}


def test_what_an_architecture_writes_and_does_not_read_is_no_obstacle():
    assert pruned(architecture="step35", moe_every_n_layers=2) == {"block_count": 3}
