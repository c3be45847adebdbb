"""Small configs of image and audio models in the layouts that publishers use.

How a wrapper nests its decoder, what its tower is, where image features go: the fields and spelling
are theirs, the sizes ours. Some leave the decoder's depth to a default, some repeat it, some write
the decoder's fields at the root.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

TEXT: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "max_position_embeddings": 512,
    "vocab_size": 320,
    "rms_norm_eps": 1e-05,
}
LLAMA: Config = {**TEXT, "model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 500000.0}
VIT: Config = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
PATCHES: Config = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}


def _wrapper(kind: str, architecture: str, **parts: Any) -> Config:
    shared = {"torch_dtype": "bfloat16", "transformers_version": "4.52.4"}
    return {"architectures": [architecture], "model_type": kind, **shared, **parts}


WRAPPERS: dict[str, Config] = {
    "mistral3": _wrapper(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        image_token_index=303,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        spatial_merge_size=2,
        text_config={**TEXT, "head_dim": 16, "model_type": "mistral", "rope_theta": 1e9},
        vision_config={
            **VIT,
            "head_dim": 16,
            "image_size": 56,
            "model_type": "pixtral",
            "num_hidden_layers": 5,
            "patch_size": 14,
            "rope_theta": 10000.0,
        },
        vision_feature_layer=-1,
    ),
    "llava": _wrapper(  # the depth of 32 is that of LlamaConfig, and not written down
        "llava",
        "LlavaForConditionalGeneration",
        ignore_index=-100,
        image_token_index=310,
        projector_hidden_act="gelu",
        text_config={
            name: value
            for name, value in {**LLAMA, "architectures": ["LlamaForCausalLM"]}.items()
            if name != "num_hidden_layers"
        },
        vision_config={
            **VIT,
            "image_size": 28,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 5,
            "patch_size": 14,
            "projection_dim": 32,
        },
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
    "internvl": _wrapper(
        "internvl",
        "InternVLForConditionalGeneration",
        downsample_ratio=0.5,
        image_seq_length=4,
        image_token_id=303,
        projector_hidden_act="gelu",
        text_config={
            **TEXT,
            "architectures": ["Qwen2ForCausalLM"],
            "max_window_layers": 8,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
        },
        vision_config={
            **VIT,
            "architectures": ["InternVisionModel"],
            "image_size": [28, 28],
            "model_type": "internvl_vision",
            "num_hidden_layers": 8,
            "patch_size": [7, 7],
            "use_mean_pooling": True,
        },
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    ),
    "qwen2_5_vl": _wrapper(  # the decoder's fields stand at the root
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        **TEXT,
        image_token_id=310,
        max_window_layers=8,
        rope_scaling={"mrope_section": [2, 3, 3], "type": "mrope"},
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=False,
        use_sliding_window=False,
        video_token_id=311,
        vision_config={
            **PATCHES,
            "fullatt_block_indexes": [1],
            "in_chans": 3,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        vision_end_token_id=313,
        vision_start_token_id=312,
        vision_token_id=314,
    ),
    "qwen3_vl": _wrapper(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        image_token_id=310,
        text_config={
            **TEXT,
            "dtype": "bfloat16",
            "head_dim": 16,
            "model_type": "qwen3_vl_text",
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [2, 3, 3],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
        },
        tie_word_embeddings=False,
        video_token_id=311,
        vision_config={
            **PATCHES,
            "deepstack_visual_indexes": [0, 1],
            "model_type": "qwen3_vl",
            "num_position_embeddings": 16,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        vision_end_token_id=313,
        vision_start_token_id=312,
    ),
    "mllama": _wrapper(
        "mllama",
        "MllamaForConditionalGeneration",
        image_token_index=310,
        text_config={
            **LLAMA,
            "cross_attention_layers": [3, 6],
            "dropout": 0,
            "eos_token_id": [3, 4],
            "hidden_act": "silu",
            "model_type": "mllama_text_model",
            "pad_token_id": 2,
        },
        vision_config={
            "attention_heads": 2,
            "hidden_size": 32,
            "image_size": 28,
            "intermediate_layers_indices": [0, 1],
            "intermediate_size": 48,
            "max_num_tiles": 4,
            "model_type": "mllama_vision_model",
            "num_channels": 3,
            "num_global_layers": 2,
            "num_hidden_layers": 3,
            "patch_size": 14,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
            "vision_output_dim": 96,
        },
    ),
    "idefics3": _wrapper(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        image_token_id=310,
        scale_factor=2,
        text_config={**LLAMA, "pad_token_id": 2},
        tie_word_embeddings=False,
        vision_config={
            **VIT,
            "image_size": 56,
            "model_type": "idefics3_vision",
            "num_hidden_layers": 3,
            "patch_size": 14,
        },
    ),
    "voxtral": _wrapper(
        "voxtral",
        "VoxtralForConditionalGeneration",
        audio_config={
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 128,
            "max_source_positions": 64,
            "model_type": "voxtral_encoder",
            "num_attention_heads": 2,
            "num_hidden_layers": 8,
            "num_mel_bins": 16,
        },
        audio_token_id=24,
        hidden_size=64,
        projector_hidden_act="gelu",
        text_config={**LLAMA, "head_dim": 16, "rope_theta": 100000000.0},
        vocab_size=320,
    ),
    "qwen2_audio": _wrapper(
        "qwen2_audio",
        "Qwen2AudioForConditionalGeneration",
        audio_config={
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "encoder_layers": 8,
            "max_source_positions": 64,
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 16,
        },
        audio_token_index=310,
        text_config={**TEXT, "model_type": "qwen2", "use_sliding_window": False},
        vocab_size=320,
    ),
}
