"""Figures, ready for publication and safe without a display.

Imports the ground, model, data, evaluation.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "scores": "plot_layer_importance plot_score_comparison",
        "blocks": "plot_block_distances plot_similarity_matrix",
        "quality": "plot_comparisons plot_depth_curve plot_holistic_benchmark",
        "models": "plot_activation_comparison plot_semantic_comparison",
    },
)
