"""Figures for a paper: layer scores, blocks of layers, cost by depth, the two models, benchmark.

Every function returns a `matplotlib.figure.Figure` that pyplot does not know: nothing leaks, no
backend is chosen, no display is needed (``show=True`` opens a window). `save_path` ends in
``.png`` (300 dpi), ``.svg`` or ``.pdf``, and equal input gives equal bytes. Widths are one or two
columns of a journal and no text is below 6.5 pt. All of them raise `InvalidDataError` for what
cannot be drawn, `NonFiniteError` for NaN and infinity, `OutputError` for a path that cannot be
written.
"""

from __future__ import annotations

from .plots_blocks import plot_block_distances, plot_similarity_matrix
from .plots_model import plot_activation_comparison, plot_semantic_comparison
from .plots_quality import plot_comparisons, plot_depth_curve, plot_holistic_benchmark
from .plots_scores import plot_layer_importance, plot_score_comparison

__all__ = [
    "plot_activation_comparison",
    "plot_block_distances",
    "plot_comparisons",
    "plot_depth_curve",
    "plot_holistic_benchmark",
    "plot_layer_importance",
    "plot_score_comparison",
    "plot_semantic_comparison",
    "plot_similarity_matrix",
]
