"""Depth pruning for Hugging Face language models.

Everything named here is loaded when it is first used: ``import llm_pruner`` itself loads
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AVSSPruner": "pruners",
    "AblationPruner": "pruners",
    "BasePruner": "base",
    "BlockInfluencePruner": "pruners",
    "HolisticEvaluator": "evaluation",
    "LLMPrunerError": "errors",
    "LayerScores": "results",
    "LayerStack": "layers",
    "LoraSettings": "lora",
    "ModelEvaluator": "evaluation",
    "PruneMePruner": "pruners",
    "PruningPlan": "results",
    "PruningReport": "results",
    "Repairs": "rounds",
    "SmartPruner": "pruners",
    "carry_out": "workflow",
    "check_manifest": "slicer",
    "clean_output": "utils",
    "count_parameters": "utils",
    "format_prompt": "utils",
    "get_device": "utils",
    "get_strategy": "registry",
    "heal_model": "healing",
    "load_data": "workflow",
    "load_dataset_from_hub": "data",
    "load_eval_dataset": "data",
    "load_model": "utils",
    "load_streamed": "streaming",
    "load_within": "streaming",
    "normalize_item": "data",
    "perplexity": "likelihood",
    "plot_activation_comparison": "visualization",
    "plot_block_distances": "visualization",
    "plot_comparisons": "visualization",
    "plot_depth_curve": "visualization",
    "plot_holistic_benchmark": "visualization",
    "plot_layer_importance": "visualization",
    "plot_score_comparison": "visualization",
    "plot_semantic_comparison": "visualization",
    "plot_similarity_matrix": "visualization",
    "prune_checkpoint": "slicer",
    "push_to_hub": "hub",
    "register_strategy": "registry",
    "safe_sample": "data",
    "upload_dataset_to_hub": "data",
    "write_card": "report",
    "write_html": "report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
