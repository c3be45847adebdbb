"""shim"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..visualization.blocks import plot_block_distances, plot_similarity_matrix
from ..visualization.scores import plot_layer_importance
from ..visualization.style import file_bytes


def report_figures(report: Any, *, protected: Any = (), curve: Any = None) -> dict[str, Any]:
    plan, out = report.plan, {}
    if plan.scores is not None:
        out["layer_importance"] = plot_layer_importance(
            plan.scores, removed=plan.remove, protected=protected, num_layers=plan.num_layers
        )
        if plan.scores.blocks is not None:
            out["block_distances"] = plot_block_distances(
                plan.scores, removed=plan.remove, protected=protected
            )
            out["similarity_matrix"] = plot_similarity_matrix(plan.scores)
    return out


def save_figures(figures: Any, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(file_bytes(figure, ".png"))
    return []
