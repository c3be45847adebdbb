"""Depth pruning for Hugging Face language models.

Everything named here is loaded when it is first used: ``import llm_pruner`` itself loads
neither torch nor transformers.
"""

from .lazy_names import lazy_names

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "errors": "LLMPrunerError",
        "layer_scores": "LayerScores",
        "results": "PruningPlan PruningReport",
        "hub": "push_to_hub",
        "utils": "clean_output count_parameters format_prompt get_device",
        "model.loading": "load_model",
        "model.layer_stack": "LayerStack",
        "offload.offloaded_stack": "load_streamed load_within",
        "data.hub_datasets": "load_dataset_from_hub upload_dataset_to_hub",
        "data.row_formats": "normalize_item",
        "data.sampling": "load_data load_eval_dataset safe_sample",
        "evaluation.generation": "ModelEvaluator",
        "evaluation.tasks": "HolisticEvaluator",
        "evaluation.likelihood": "perplexity",
        "healing.heal": "heal_model",
        "healing.job": "Healing",
        "healing.lora_settings": "LoraSettings",
        "healing.own_words": "self_generated",
        "visualization.scores": "plot_layer_importance plot_score_comparison",
        "visualization.blocks": "plot_block_distances plot_similarity_matrix",
        "visualization.quality": "plot_comparisons plot_depth_curve plot_holistic_benchmark",
        "visualization.models": "plot_activation_comparison plot_semantic_comparison",
        "report.html_page": "write_html",
        "report.model_card": "write_card",
        "checkpoint.gguf": "fix_gguf",
        "checkpoint.on_disk": "check_manifest prune_checkpoint",
        "pruners.base": "BasePruner",
        "pruners.measured": "AblationPruner SmartPruner",
        "pruners.similarity": "BlockInfluencePruner PruneMePruner",
        "pruners.avss": "AVSSPruner",
        "pruners.registry": "get_strategy register_strategy",
        "pruners.healing_search": "Repairs",
        "search.objectives": "register_objective",
        "goals.budget": "Budget",
        "workflow": "carry_out",
    },
)
