"""What engines make of a model: the rules against the cells that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_pruner.checkpoint.on_disk import prune_checkpoint
from llm_pruner.engines.llama_cpp import ARCHITECTURES, gguf_settings
from llm_pruner.engines.serving import GgufLayers, Serving
from llm_pruner.engines.verdict import ENGINES, judge, refuse_wrong, verdicts
from llm_pruner.errors import InvalidPlanError, UnknownNameError, UnsupportedModelError

SCATTERED = (2, 5, 7, 8)
WINDOW, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


def kept(depth, removed):
    return [index for index in range(depth) if index not in removed]


def every(period, special, others, depth=12):
    return [special if (i + 1) % period == 0 else others for i in range(depth)]


def config(model_type, depth=12, **fields):
    return {"model_type": model_type, "num_hidden_layers": depth, **fields}


def gemma(model_type, period, depth=12, scalar=32, **fields):
    widths = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
    kinds = every(period, FULL, WINDOW, depth)
    more = {"query_pre_attn_scalar": scalar, **widths, **fields}
    return config(model_type, depth, layer_types=kinds, **more)


LLAMA4 = {"layer_types": every(4, FULL, "chunked_attention"), "no_rope_layers": every(4, 0, 1)}
CASES = {  # config, layers after whose removal the pattern holds, and the states without
    # the scattered layers and without those, in llama.cpp, vllm and mlx
    "gemma2": (gemma("gemma2", 2), (2, 3), "metadata right wrong", "right right wrong"),
    "gemma2-46": (
        gemma("gemma2", 2, 46, head_dim=128),
        (2, 3),
        "wrong right wrong",
        "wrong right wrong",
    ),
    "gemma3": (
        gemma("gemma3_text", 6),
        (4, 5, 6, 7, 8, 9),
        "metadata right wrong",
        "right right right",
    ),
    "gemma3-62": (
        gemma("gemma3_text", 6, 62, head_dim=128),
        (4, 5, 6, 7, 8, 9),
        "wrong right wrong",
        "wrong right right",
    ),
    "cohere2": (
        config("cohere2", layer_types=every(4, FULL, WINDOW)),
        (4, 5, 6, 7),
        "metadata right wrong",
        "right right right",
    ),
    "gpt_oss": (
        config("gpt_oss", layer_types=every(2, FULL, WINDOW)),
        (2, 3),
        "metadata wrong right",
        "right right right",
    ),
    "smollm3": (
        config("smollm3", no_rope_layers=every(4, 0, 1)),
        (4, 5, 6, 7),
        "wrong right right",
        "right right right",
    ),
    "llama4 of one kind": (
        config("llama4_text", **LLAMA4, moe_layers=list(range(12)), interleave_moe_layer_step=1),
        (4, 5, 6, 7),
        "wrong right unknown",
        "right right unknown",
    ),
    "llama4 of two": (
        config("llama4_text", **LLAMA4, moe_layers=[*range(1, 12, 2)], interleave_moe_layer_step=2),
        (4, 5, 6, 7),
        "wrong wrong unknown",
        "right right unknown",
    ),
    "exaone4": (
        config(
            "exaone4", 64, layer_types=every(4, FULL, WINDOW, 64), sliding_window_pattern="LLLG"
        ),
        (4, 5, 6, 7),
        "wrong right wrong",
        "wrong right right",
    ),
    "deepseek_v2 of 27": (
        config("deepseek_v2", 27, q_lora_rank=None),
        (5,),
        "metadata right right",
        "right right right",
    ),
    "qwen3_next": (
        config("qwen3_next", layer_types=every(4, FULL, LINEAR)),
        (4, 5, 6, 7),
        "right right wrong",
        "right right right",
    ),
    "llama": (config("llama"), (4, 5, 6, 7), "right right right", "right right right"),
}


@pytest.mark.parametrize("case", CASES)
def test_engines_are_judged_as_they_were_measured(case):
    values, periodic, scattered, whole = CASES[case]
    depth = values["num_hidden_layers"]
    for removed, states in ((SCATTERED, scattered), (periodic, whole)):
        found = [judge(values, engine, kept(depth, removed)).state for engine in ENGINES]
        assert " ".join(found) == states


def test_the_pruned_config_is_judged_as_the_layers_that_it_keeps():
    values = gemma("gemma3_text", 6)
    left = kept(12, SCATTERED)
    pruned = values | {
        "num_hidden_layers": 8,
        "layer_types": [values["layer_types"][index] for index in left],
    }
    assert [judge(pruned, engine) for engine in ENGINES] == [
        judge(values, engine, left) for engine in ENGINES
    ]
    assert judge({"model_type": "gemma3", "text_config": pruned}, "mlx").state == "wrong"


def test_a_verdict_says_which_layers_and_why():
    found = judge(gemma("gemma3_text", 6), "llama.cpp", kept(12, SCATTERED))
    assert found.reason == (
        "sliding-window attention of its layers 5, 7 follows from position "
        "(every 6th layer is without)"
    )
    assert verdicts(config("llama")) == dict.fromkeys(("llama.cpp", "vllm", "mlx"), "right")
    assert verdicts(config("nobody_knows")) == {}
    assert judge(config("gemma3_text"), "llama.cpp").state == "unknown", "no layer_types"
    with pytest.raises(UnknownNameError, match=r"lama\.cpp.*llama\.cpp"):
        judge(config("llama"), "lama.cpp")


def test_what_is_asked_for_is_promised_or_refused():
    refuse_wrong(config("llama"), ["llama.cpp", "vllm"])
    with pytest.raises(InvalidPlanError, match="--serve-with mlx cannot be promised"):
        refuse_wrong(gemma("gemma2", 2), ["vllm", "mlx"])
    with pytest.raises(InvalidPlanError, match=r"nothing is known of alien there\. Leave mlx out"):
        Serving.of_config(config("alien"), ["mlx"])
    with pytest.raises(InvalidPlanError, match="already before any removal"):
        Serving.of_config(gemma("gemma2", 2), ["mlx"])


def test_several_engines_restrict_together():
    """llama.cpp wants whole periods of four, vLLM of two experts' layers."""
    values = CASES["llama4 of two"][0]
    serving = Serving.of_config(values, ["llama.cpp", "vllm", "llama.cpp"])
    assert serving.engines == ("llama.cpp", "vllm")
    assert serving.problem(kept(12, (4, 5, 6, 7))) == ""
    assert "vllm: mixture of experts" in serving.problem(kept(12, (4,)))
    with pytest.raises(InvalidPlanError, match=r"Sets close to this one.*\[\[4, 5, 6, 7\]"):
        serving.refuse_misplaced([4, 5, 6], 12)


def test_what_a_file_says_comes_before_what_llama_cpp_reckons():
    values = {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 24}
    values |= {"gemma3.embedding_length": 128, "gemma3.attention.head_count": 4}
    key = "gemma3.attention.sliding_window_pattern"
    by_position = [True] * 5 + [False] + [True] * 5 + [False]
    windows, _ = GgufLayers(values, 12).rules
    assert windows[1] == by_position
    listed = [True, False] * 6
    assert GgufLayers(values | {key: listed}, 12).rules[0][1] == listed
    assert GgufLayers(values | {key: 2}, 12).rules[0][1] == listed, "a number is the period"
    assert not any(GgufLayers(values | {"gemma3.attention.sliding_window": 0}, 12).rules[0][1])


def test_a_file_is_told_only_what_has_to_be_told():
    values = {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 24}
    values |= {"gemma3.embedding_length": 128, "gemma3.attention.head_count": 4}
    layers = GgufLayers(values, 12)
    assert layers.said(kept(12, (4, 5, 6, 7, 8, 9))) == {}
    ((key, (_, said)),) = layers.said(kept(12, SCATTERED), extra=1).items()
    assert key == "gemma3.attention.sliding_window_pattern"
    assert said == [True, True, True, True, True, True, True, False, False]
    with pytest.raises(UnsupportedModelError, match="without any layer that has sliding-window"):
        layers.said([5, 11])


def test_a_model_whose_layers_llama_cpp_tells_apart_by_their_number():
    values = {"general.architecture": "deepseek2", "deepseek2.vocab_size": 102_400}
    layers = GgufLayers(values, 27)
    assert layers.said(range(26)) == {}
    assert layers.said(range(25)) == {"deepseek2.attention.q_lora_rank": (4, 0)}
    whole = Serving.of_gguf(GgufLayers(values, 61))
    assert not whole.fits(0, 0, 27)
    assert whole.fits(0, 0, 28)
    assert gguf_settings(values, 7)["vocab_size"] == 102_400


def test_every_rule_names_its_source_and_every_type_is_told_once():
    types = [kind for kinds, _ in ARCHITECTURES.values() for kind in kinds.split()]
    assert len(types) == len({*types})
    for engine in ENGINES.values():
        assert engine.version
        assert all(rule.source for rules in engine.rules.values() for rule in rules)


def test_the_table_in_the_documents_is_what_the_rules_say():
    """Rows: model; cells: what the rules say without the scattered layers, and without whole
    periods."""
    text = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \|(.*)\|$", text, re.M)
    assert [name for name, _ in rows] == list(CASES)
    for name, cells in rows:
        values, periodic, *_ = CASES[name]
        depth = values["num_hidden_layers"]
        want = [
            " / ".join(
                judge(values, engine, kept(depth, removed)).state
                for removed in (SCATTERED, periodic)
            )
            for engine in ENGINES
        ]
        assert [cell.split(" (")[0].strip() for cell in cells.split("|")] == want


def test_a_switch_that_is_off_makes_all_layers_alike():
    """Of windows none has one then; of rotary positions all have them."""
    for arch in ("llama4", "smallthinker"):
        values = {"general.architecture": arch, f"{arch}.attention.sliding_window": 0}
        windows, rotary, *_ = GgufLayers(values, 8).rules
        assert list(windows[1]) == [False] * 8
        assert list(rotary[1]) == [True] * 8
    assert not all(GgufLayers({"general.architecture": "llama4"}, 8).rules[1][1])


def test_a_published_config_may_leave_out_what_the_class_knows():
    values = gemma("gemma3_text", 6)
    for name in ("head_dim", "num_attention_heads", "query_pre_attn_scalar"):
        del values[name]
    assert judge(values, "llama.cpp").state == "right"


def test_a_file_that_says_it_has_no_query_compression_is_believed():
    """What was cut once can be cut again, to whatever depth."""
    values = {"general.architecture": "deepseek2", "deepseek2.attention.q_lora_rank": 0}
    layers = GgufLayers(values, 30)
    assert Serving.of_gguf(layers).problem(range(27)) == ""
    assert layers.said(range(27)) == {}
    assert gguf_settings({"general.architecture": "a", "a.attention.head_count": [0, 0]})


def test_refusing_a_deep_model_takes_a_moment():
    kinds = every(4, FULL, WINDOW, 512)
    serving = Serving.of_config(config("cohere2", 512, layer_types=kinds), ["llama.cpp"])
    with pytest.raises(InvalidPlanError, match=r"\[\[100, 101, 102, 103\], "):
        serving.refuse_misplaced([100, 101, 102], 512)


@pytest.mark.parametrize(
    ("values", "removed", "engine"),
    [
        (
            config("olmo3", layer_types=every(4, FULL, WINDOW)),
            {0, 1, 2, 4, 5, 6, 8, 9, 10},
            "llama.cpp",
        ),
        (config("qwen3_next", layer_types=every(4, FULL, LINEAR)), {3, 7, 11}, "llama.cpp"),
        (config("lfm2", layer_types=every(3, FULL, "conv")), {2, 5, 8, 11}, "mlx"),
        (config("gpt_oss", layer_types=every(2, FULL, WINDOW)), {1, 3, 5, 7, 9, 11}, "mlx"),
        (
            config("exaone4", layer_types=every(4, FULL, WINDOW)),
            {0, 1, 2, 4, 5, 6, 8, 9, 10},
            "vllm",
        ),
    ],
)
def test_some_engines_need_a_layer_of_each_kind(values, removed, engine):
    found = judge(values, engine, kept(12, removed))
    assert found.state == "wrong"
    assert "it needs a layer with" in found.reason
    serving = Serving.of_config(values, [engine])
    assert "it needs a layer with" in serving.problem(kept(12, removed))
    assert serving.problem(kept(12, {1})) == ""
    assert not serving.restricts


def test_on_disk_too_sets_that_work_are_named(tmp_path):
    from transformers import AutoModelForCausalLM, Cohere2Config

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    values = Cohere2Config(**sizes, **heads, layer_types=every(4, FULL, WINDOW))
    AutoModelForCausalLM.from_config(values).save_pretrained(tmp_path / "source")
    source, out = tmp_path / "source", tmp_path / "out"
    with pytest.raises(InvalidPlanError, match=r"Sets close to this one .*\[4, 5, 6, 7\]"):
        prune_checkpoint(source, [4, 5, 6], out, serve_with=["llama.cpp"])
    assert prune_checkpoint(source, [4, 5, 6, 7], out, serve_with=["mlx"])
