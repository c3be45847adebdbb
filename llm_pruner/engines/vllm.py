"""How vLLM works out what a layer is; `Rule.source` names a file in ``model_executor/models``.

Models that it runs by the code of transformers are computed as there.
"""

from __future__ import annotations

from .rules import Engine, experts_every, no_windows, reads, windows_every, windows_if_any

VLLM = Engine(
    "vllm",
    "vLLM 0.32",
    {
        **dict.fromkeys(
            "afmoe apertus arcee bloom cohere cohere2 dbrx deepseek_v2 deepseek_v3 ernie4_5 "
            "falcon falcon_h1 gemma gemma2 gemma3 gemma3_text glm glm4 glm4_moe "
            "gpt2 gpt_bigcode gpt_neox gptj granite granitemoe granitemoehybrid hunyuan_v1_dense "
            "hunyuan_v1_moe jamba kimi_k2 lfm2 lfm2_moe llama mamba mamba2 minimax_m2 ministral "
            "mistral mixtral nemotron nemotron_h olmo olmo2 olmo3 olmoe opt phi phi3 phimoe "
            "qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 stablelm "
            "starcoder2".split(),
            (),
        ),
        **dict.fromkeys(
            ("exaone4", "exaone_moe"),
            (reads("sliding-window attention", windows_if_any, "exaone4.py: rotary_emb", True),),
        ),
        "gpt_oss": (windows_every(2, "gpt_oss.py: sliding_window"),),
        **dict.fromkeys(
            ("llama4", "llama4_text"),
            (experts_every("interleave_moe_layer_step", "llama4.py: is_moe_layer"),),
        ),
        **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3"), (no_windows("qwen2.py"),)),
    },
)
