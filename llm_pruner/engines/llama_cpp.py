"""How llama.cpp works out what a layer is, by the architectures of GGUF.

Read from its source and from its converter; `Rule.source` names a file in ``src/models``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.gguf_metadata import FLOAT32, UINT32
from .rules import (
    PATTERN,
    RECURRENT,
    Engine,
    Rule,
    Said,
    Settings,
    all_have,
    anything,
    experts_every,
    linear_every,
    no_windows,
    reads,
    recurrent,
    rotary_every,
    scale_by_count,
    windows,
    windows_every,
    windows_if_any,
)

WINDOW = "attention.sliding_window"
LITE = (26, 27)  # depths at which DeepSeek-2 is taken for the small model
LITE_WITH = (48, 128_256)  # and this depth with this vocabulary
SIGMOID_WITH = ((47, 154_880), (48, 154_880))
NORMED_FROM = 64  # layers from which Command-R has norms of queries and keys
LARGE_EXAONE = 64  # layers at which EXAONE-4 has windows
SHARING_FROM = 20  # layer from which Gemma-3n has no keys and values of its own


def _pattern(period: int, source: str, **options: Any) -> Rule:
    """Windows by period, unless the file has a list; a number there is the period."""
    key = "attention.sliding_window_pattern"
    return windows_every(key, source, default=period, said=PATTERN, **options)


def _recurrent(default: int, source: str) -> Rule:
    """Linear attention by period, unless the file has a list, as the converter writes it."""
    return linear_every("full_attention_interval", source, default=default, said=RECURRENT)


def _compressed(settings: Settings, index: int, count: int) -> bool:
    if settings.get("attention.q_lora_rank") == 0:  # as a file says that has none
        return False
    return count not in LITE and (count, settings.get("vocab_size")) != LITE_WITH


def _router(settings: Settings, index: int, count: int) -> int:
    sigmoid = (count, settings.get("vocab_size")) in SIGMOID_WITH
    return int(settings.get("expert_gating_func") or (2 if sigmoid else 1))


def _residual_scale(settings: Settings, index: int, count: int) -> float:
    given = settings.get("residual_scale")
    return 1.4 / math.sqrt(count) if given is None else float(given)


def _positions(settings: Settings, index: int, count: int) -> str:
    return {32: "rotary", 40: "ALiBi"}.get(count, "none")


def _exaone_rotary(config: Settings, count: int) -> Sequence[Any] | None:
    return windows(config, count) if config.get("sliding_window") else [True] * count


def _fixed(layers: float, source: str) -> Rule:
    """The first layers do what no others can."""

    def derive(settings: Settings, index: int, count: int) -> float:
        return min(index, layers)

    def kinds(settings: Settings, count: int) -> Sequence[float]:
        return [derive(settings, index, count) for index in range(count)]

    return Rule("role", kinds, derive, "is bound to the index", source)


COMPRESSED = Rule(
    "query compression",
    all_have("q_lora_rank"),
    _compressed,
    f"follows from the number of layers, none at {LITE[0]} and {LITE[1]}",
    "deepseek2.cpp: is_lite",
    Said("attention.q_lora_rank", UINT32, lambda kinds: None if any(kinds) else 0),
)
ROUTER = Rule(  # of files from before the converter wrote it
    "router",
    anything,
    _router,
    "follows from the number of layers",
    "deepseek2.cpp: expert_gating_func",
    Said("expert_gating_func", UINT32, lambda kinds: kinds[0]),
)
NORMED = Rule(
    "norm of queries and keys",
    all_have("use_qk_norm"),
    lambda settings, index, count: count >= NORMED_FROM,
    f"follows from the number of layers, only from {NORMED_FROM} on",
    "command-r.cpp: attn_q_norm",
)
EXAONE = (
    Rule(
        "sliding-window attention",
        windows,
        lambda settings, index, count: count == LARGE_EXAONE and index % 4 != 3,
        f"follows from the number of layers, only at {LARGE_EXAONE}",
        "exaone4.cpp: load_swa_pattern",
    ),
    Rule(
        "rotary position",
        _exaone_rotary,
        lambda settings, index, count: count != LARGE_EXAONE or index % 4 != 3,
        f"follows from the number of layers, left out only at {LARGE_EXAONE}",
        "exaone4.cpp: use_rope",
    ),
)
RESIDUAL = Rule(  # of files from before the converter wrote it
    "scale of the residual stream",
    anything,
    _residual_scale,
    "follows from the number of layers",
    "minicpm.cpp: f_residual_scale",
    Said("residual_scale", FLOAT32, lambda kinds: kinds[0]),
)
BAICHUAN = Rule(
    "position encoding",
    anything,
    _positions,
    "follows from the number of layers, none but at 32 and 40",
    "baichuan.cpp: type",
)
# By architecture of GGUF: the model types of config.json that are converted to it, and the rules.
# The converter writes lists for all that is not mentioned here, or all layers are alike.
ARCHITECTURES: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "afmoe": (
        "afmoe",
        (
            _pattern(4, "afmoe.cpp: load_swa_pattern", switch=WINDOW),
            rotary_every(4, "afmoe.cpp: n_no_rope_layer_step", windows),
        ),
    ),
    "apertus": ("apertus", ()),
    "arcee": ("arcee", ()),
    "arwkv7": ("", (_fixed(1, "rwkv7-base.cpp: v_first"),)),
    "baichuan": ("", (BAICHUAN,)),
    "bloom": ("bloom", ()),
    "chatglm": ("glm", ()),
    "cohere2": ("cohere2", (_pattern(4, "cohere2.cpp: load_swa_pattern"),)),
    "cohere2moe": ("cohere2_moe", ()),
    "command-r": ("cohere", (NORMED,)),
    "deci": ("", (_fixed(1, "llama-model.cpp: n_head(0)"),)),
    "deepseek": ("", ()),
    "deepseek2": ("deepseek_v2 deepseek_v3 kimi_k2 glm4_moe_lite", (COMPRESSED, ROUTER)),
    "dots1": ("dots1", ()),
    "ernie4_5": ("ernie4_5", ()),
    "exaone": ("", ()),
    "exaone-moe": ("exaone_moe", ()),
    "exaone4": ("exaone4", EXAONE),
    "falcon": ("falcon", ()),
    "falcon-h1": ("falcon_h1", ()),
    "gemma": ("gemma", ()),
    "gemma2": (
        "gemma2",
        (
            _pattern(2, "gemma2.cpp: load_swa_pattern"),
            scale_by_count(46, "gemma2.cpp: f_attention_scale"),
        ),
    ),
    "gemma3": (
        "gemma3 gemma3_text",
        (
            _pattern(6, "gemma3.cpp: load_swa_pattern", switch=WINDOW),
            scale_by_count(62, "gemma3.cpp: f_attention_scale"),
        ),
    ),
    "gemma3n": (
        "gemma3n gemma3n_text",
        (_fixed(SHARING_FROM, "gemma3n.cpp: n_layer_kv_from_start"),),
    ),
    "glm4": ("glm4", ()),
    "glm4moe": ("glm4_moe", ()),
    "gpt-oss": ("gpt_oss", (_pattern(2, "openai-moe.cpp: load_swa_pattern"),)),
    "gpt2": ("gpt2", ()),
    "gptneox": ("gpt_neox", ()),
    "granite": ("granite", ()),
    "granitehybrid": ("granitemoehybrid bamba", ()),
    "granitemoe": ("granitemoe", ()),
    "hunyuan-dense": ("hunyuan_v1_dense", ()),
    "hunyuan-moe": ("hunyuan_v1_moe", ()),
    "internlm2": ("", ()),
    "jamba": ("jamba", ()),
    "kimi-linear": ("", ()),
    "laguna": (
        "",
        (
            _pattern(4, "laguna.cpp: load_swa_pattern", first=True, switch=WINDOW),
            _fixed(1, "laguna.cpp: n_rot"),
        ),
    ),
    "lfm2": ("lfm2", ()),
    "lfm2moe": ("lfm2_moe", ()),
    "llama": ("llama mistral mixtral", ()),
    "llama4": (
        "llama4 llama4_text",
        (
            _pattern(4, "llama4.cpp: load_swa_pattern", switch=WINDOW),
            # Without a layer that has none, it stops: nothing uses the scale of attention.
            rotary_every(
                4, "llama4.cpp: n_no_rope_layer_step", switch=WINDOW, off=True, complete=True
            ),
            experts_every("interleave_moe_layer_step", "llama4.cpp: n_moe_layer_step"),
        ),
    ),
    "mamba": ("mamba", ()),
    "mamba2": ("mamba2", ()),
    "mellum": ("", (_pattern(4, "mellum.cpp: load_swa_pattern", switch=WINDOW),)),
    "mimo2": ("mimo_v2_flash", ()),
    "minicpm": ("", (RESIDUAL,)),
    "minicpm3": ("", ()),
    "minimax-01": ("", (_fixed(math.inf, "minimax-01.cpp: slope_scale"),)),
    "minimax-m2": ("minimax_m2", ()),
    "mistral3": ("", ()),
    "mpt": ("mpt", ()),
    "muse-glimmer": ("", (_pattern(4, "muse-glimmer.cpp: load_swa_pattern"),)),
    "nemotron": ("nemotron", ()),
    "nemotron_h": ("nemotron_h", ()),
    "nemotron_h_moe": ("", ()),
    "olmo": ("olmo", ()),
    "olmo2": ("olmo2 olmo3", (_pattern(4, "olmo2.cpp: load_swa_pattern", switch=WINDOW),)),
    "olmoe": ("olmoe", ()),
    "openelm": ("", ()),
    "orion": ("", ()),
    "phi2": ("phi", ()),
    "phi3": ("phi3", ()),
    "phimoe": ("phimoe", ()),
    "plamo2": ("", (_fixed(1, "plamo2.cpp: n_rot"),)),
    "plamo3": ("", (_pattern(8, "plamo3.cpp: load_swa_pattern", switch=WINDOW),)),
    "qwen2": ("qwen2", (no_windows("qwen2.cpp"),)),
    "qwen2moe": ("qwen2_moe", (no_windows("qwen2moe.cpp"),)),
    "qwen3": ("qwen3", (no_windows("qwen3.cpp"),)),
    "qwen35": ("", (_recurrent(4, "qwen35.cpp: is_recr_impl"),)),
    "qwen35moe": ("", (_recurrent(4, "qwen35moe.cpp: is_recr_impl"),)),
    "qwen3moe": ("qwen3_moe", (no_windows("qwen3moe.cpp"),)),
    "qwen3next": ("", (_recurrent(4, "qwen3next.cpp: is_recr_impl"),)),
    "refact": ("", ()),
    "rwkv7": ("", (_fixed(1, "rwkv7-base.cpp: v_first"),)),
    "seed_oss": ("seed_oss", ()),
    "smallthinker": (
        "",
        (
            _pattern(4, "smallthinker.cpp: load_swa_pattern", first=True, switch=WINDOW),
            rotary_every(
                4, "smallthinker.cpp: n_no_rope_layer_step", first=True, switch=WINDOW, off=True
            ),
        ),
    ),
    "smollm3": ("smollm3", (rotary_every(4, "smollm3.cpp: n_no_rope_layer_step"),)),
    "stablelm": ("stablelm", ()),
    "starcoder": ("gpt_bigcode", ()),
    "starcoder2": ("starcoder2", ()),
    "step35": ("step3p5", ()),
    "xverse": ("", ()),
}
# Where a layer without keys and values is recurrent, unless it is nothing but a network.
HYBRIDS = frozenset(
    "bailingmoe3 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe nemotron_h "
    "nemotron_h_moe plamo2".split()
)
BY_TYPE = {kind: rules for kinds, rules in ARCHITECTURES.values() for kind in kinds.split()}
# Of these the converter writes lists, and a layer of each kind has to be there.
WINDOWED = reads("sliding-window attention", windows_if_any, "llama-model.cpp: is_swa_any", True)
HYBRID = reads("a recurrent state", recurrent, "llama-memory-hybrid.cpp", True, False)
BY_TYPE |= dict.fromkeys("olmo3 cohere2_moe exaone_moe".split(), (WINDOWED,))
BY_TYPE |= {"olmo2": ()}
BY_TYPE |= dict.fromkeys(
    "qwen3_next qwen3_5_text qwen3_5_moe_text lfm2 lfm2_moe granitemoehybrid".split(), (HYBRID,)
)
LLAMA_CPP = Engine("llama.cpp", "commit 0c1e570, 1 October 2026", BY_TYPE)


def gguf_settings(values: Mapping[str, Any], vocabulary: int | None = None) -> dict[str, Any]:
    """A GGUF file's metadata as the rules look at it.

    Args:
        values: the metadata by key.
        vocabulary: how many tokens it lists.

    Returns:
        The entries of the architecture without its name before them, and some of them also under
        the names that fields of a config.json have.
    """
    before = f"{values.get('general.architecture')}."
    found = {
        key.removeprefix(before): value for key, value in values.items() if key.startswith(before)
    }
    if "llama4." not in before:  # which has windows unless it says 0
        found.setdefault(WINDOW, 0)
    heads = found.get("attention.head_count")
    most = max(heads, default=0) if isinstance(heads, list) else heads
    found["num_attention_heads"] = most or 1
    found["hidden_size"] = width = found.get("embedding_length") or 0
    found["head_dim"] = found.get("attention.key_length") or width // found["num_attention_heads"]
    found.setdefault("vocab_size", vocabulary)
    return found
