"""How MLX-LM works out what a layer is; `Rule.source` names a file in ``mlx_lm/models``."""

from __future__ import annotations

from .rules import (
    Engine,
    Rule,
    Settings,
    experts_every,
    linear_every,
    no_windows,
    reads,
    recurrent,
    rotary_every,
    windows,
    windows_every,
    windows_if_any,
)


def _by_letters(settings: Settings, index: int, count: int) -> bool | None:
    """EXAONE-4: a text with a letter per layer of a period, L with a window and G without."""
    letters = settings.get("sliding_window_pattern")
    if not letters:
        return False
    if not isinstance(letters, str) or count <= letters.find("G"):
        return None
    return letters[index % len(letters)] == "L"


EXAONE = Rule(
    "sliding-window attention",
    windows,
    _by_letters,
    "follows from position, by sliding_window_pattern",
    "exaone4.py: is_local",
)
LINEAR = linear_every(
    "full_attention_interval", "qwen3_next.py: is_linear", default=4, complete=True
)
PATTERN = "sliding_window_pattern"
MLX = Engine(
    "mlx",
    "mlx-lm 0.32.2",
    {
        **dict.fromkeys(
            "apertus cohere deepseek_v2 deepseek_v3 dots1 ernie4_5 falcon_h1 gemma glm glm4 "
            "glm4_moe gpt2 gpt_bigcode gpt_neox gptj granite granitemoe helium "
            "hunyuan_v1_dense kimi_k2 mamba mamba2 minimax_m2 mixtral nemotron "
            "olmo2 olmoe phi phi3 phimoe qwen3_moe seed_oss stablelm "
            "starcoder2".split(),
            (),
        ),
        **dict.fromkeys(
            ("llama", "mistral", "smollm3"),
            (reads("sliding-window attention", windows_if_any, "llama.py: fa_idx", False),),
        ),
        **dict.fromkeys(
            ("gpt_oss", "olmo3"),
            (reads("sliding-window attention", windows_if_any, "olmo3.py: swa_idx", True, False),),
        ),
        "lfm2": (reads("a recurrent state", recurrent, "lfm2.py: fa_idx", True, False),),
        "cohere2": (windows_every(PATTERN, "cohere2.py", default=4, complete=True),),
        "exaone4": (EXAONE,),
        "gemma2": (no_windows("gemma2.py"),),
        **dict.fromkeys(
            ("gemma3", "gemma3_text"),
            (windows_every(PATTERN, "gemma3_text.py", default=6, complete=True),),
        ),
        "llama4": (
            rotary_every(4, "llama4.py: use_rope", complete=True),
            experts_every("interleave_moe_layer_step", "llama4.py: is_moe_layer"),
        ),
        "qwen2": (no_windows("qwen2.py"),),
        "qwen3": (no_windows("qwen3.py"),),
        "qwen3_5": (LINEAR,),
        "qwen3_5_moe": (LINEAR,),
        "qwen3_next": (LINEAR,),
    },
)
