"""The pictures of a report: drawn once, for the page and for image files alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic_output import write_atomically
from ..results import Comparison, DepthCurve, PruningReport
from ..visualization.blocks import plot_block_distances, plot_similarity_matrix
from ..visualization.quality import plot_comparisons, plot_depth_curve, plot_holistic_benchmark
from ..visualization.scores import plot_layer_importance
from ..visualization.style import file_bytes
from .summary import change_text, number_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report_figures(
    report: PruningReport,
    *,
    protected: Sequence[int] = (),
    curve: DepthCurve | None = None,
    skip: Collection[str] = (),
) -> dict[str, Figure]:
    """Everything that can be drawn from the report alone, by name.

    The names are ``layer_importance``, ``block_distances``, ``similarity_matrix``,
    ``comparisons``, ``holistic_benchmark`` and ``depth_curve``; what the report has no data for is
    left out.

    Args:
        protected: layers that the strategy could not remove; if empty, those at the ends that the
            plan's option ``protect`` names.
        curve: cost by number of layers, where it was measured.
        skip: names not to draw.
    """
    plan, scores = report.plan, report.plan.scores
    if not protected:
        first, last = plan.options.get("protect", (0, 0))
        ends = [*range(first), *range(plan.num_layers - last, plan.num_layers)]
        protected = [layer for layer in ends if layer not in plan.remove]
    plots: dict[str, Callable[[], Figure]] = {}
    if scores is not None:
        plots["layer_importance"] = partial(
            plot_layer_importance,
            scores,
            removed=set(plan.remove) & scores.keys(),
            protected=protected,
            num_layers=plan.num_layers,
        )
    if scores is not None and scores.blocks is not None:
        plots["block_distances"] = partial(
            plot_block_distances, scores, removed=plan.remove, protected=protected
        )
        plots["similarity_matrix"] = partial(plot_similarity_matrix, scores)
    if compared := compared_scores(report):
        plots["comparisons"] = partial(plot_comparisons, compared)
    tasks = [entry for entry in report.comparisons if entry.group == "tasks"]
    tasks = [entry for entry in tasks if not entry.name.endswith("(acc_norm)")]  # "(acc)" is there
    if any(entry.name != "task mean" for entry in tasks):
        plots["holistic_benchmark"] = partial(_benchmark, tasks)
    if curve is not None:
        plots["depth_curve"] = partial(plot_depth_curve, curve)
    return {name: plot() for name, plot in plots.items() if name not in skip}


def compared_scores(report: PruningReport) -> list[Comparison]:
    """Comparisons of tasks and answers that share a unit, as one figure needs."""
    scores = [entry for entry in report.comparisons if entry.group in ("tasks", "answers")]
    return [entry for entry in scores if entry.unit == scores[0].unit]


def _benchmark(tasks: Sequence[Comparison]) -> Figure:
    """Tasks before and after; `plot_holistic_benchmark` takes scores from 0 to 1 by task."""
    entries = {"mean" if entry.name == "task mean" else entry.name: entry for entry in tasks}
    return plot_holistic_benchmark(
        {name: max(0.0, entry.before) for name, entry in entries.items()},
        {name: max(0.0, entry.after) for name, entry in entries.items()},
        {name: entry.count or 1 for name, entry in entries.items()},
        chance={name: entry.floor for name, entry in entries.items() if entry.floor is not None},
        intervals={
            name: (entry.low, entry.high)
            for name, entry in entries.items()
            if entry.low is not None and entry.high is not None
        },
    )


def save_figures(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write each figure to ``<name>.png`` in a folder, which is created if need be.

    Raises:
        OutputError: a file cannot be written.
    """
    paths = []
    for name, figure in figures.items():
        paths.append(Path(folder) / f"{name}.png")
        write_atomically(paths[-1], file_bytes(figure, ".png"))
    return paths


TEXTS = {  # caption and alternative text of each figure on the page, filled in by `words`
    "layer_importance": (
        "Score of each layer: {unit}.",
        "Bars of the score of each layer ({unit}), removed layers hatched: {scores}",
    ),
    "block_distances": (
        "Distance over every block of layers, scaled by row.",
        "Heat map of the distance over every block of layers ({unit}) by first layer and length, "
        "the best block of each length marked.",
    ),
    "similarity_matrix": (
        "Distance of every two states along the depth.",
        "Heat map of the distance of every two states along the depth ({unit}); neighbouring "
        "states are close where the map is dark.",
    ),
    "comparisons": (
        "Scores before and after, and the change of each.",
        "Bars of each score before and after, and the change with its 95 % interval: {changes}",
    ),
    "holistic_benchmark": (
        "Tasks before and after, with the paired interval of the change.",
        "Bars of the score of each task before and after: {changes}",
    ),
    "depth_curve": (
        "Cost by number of layers removed: {cost}.",
        "Line chart of {cost} against the number of layers removed. {points}",
    ),
    "activation_comparison": (
        "The residual stream, with and without the removed layers (weights as they were).",
        "Two line charts along the depth: the size of the state that enters each layer in the full "
        "and in the pruned model, and the cosine similarity of both, removed layers shaded.",
    ),
    "semantic_comparison": (
        "What both models say next.",
        "Bars of the probabilities of the next token in the original and in the pruned model, and "
        "the answers of both to the same prompt.",
    ),
}


def words(report: PruningReport, curve: DepthCurve | None) -> dict[str, str]:
    """What a report fills into the captions and alternative texts of `TEXTS`."""
    scores, points = report.plan.scores, curve.points if curve else []
    costs = [(point["held_out"] or point)["change"] for point in points]
    return {
        "unit": scores.unit if scores is not None else "score",
        "scores": ", ".join(f"{i}: {number_text(score)}" for i, score in (scores or {}).items()),
        "changes": "; ".join(f"{e.name} {change_text(e)}" for e in compared_scores(report)),
        "cost": curve.unit if curve else "change of quality",
        "points": ", ".join(
            f"{point['n_layers']}: {cost:+.1%}" for point, cost in zip(points, costs, strict=True)
        ),
    }
