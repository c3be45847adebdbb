"""A whole job: divide the data, carry a plan out, measure before and after, draw figures.

What the command line does, as functions for scripts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.items import EvalItem, check_items, fingerprint, prompt_keys, refuse_overlap
from .data.sampling import DataSplit
from .distributed import on_first
from .evaluation.cost_comparison import compare_cost, machine
from .evaluation.likelihood import perplexity
from .evaluation.quality_comparison import DRAWS, compare_quality
from .evaluation.similarity import load_embedder
from .evaluation.tasks import HolisticEvaluator, item_kinds
from .healing.heal import Heal
from .healing.lora_settings import LoraSettings
from .pruners.base import BasePruner
from .results import DepthCurve, LayerScores, PruningPlan, PruningReport
from .utils import logger, package_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


REPORT_FILE = "pruning_report.json"
PAGE_FILE = "report.html"
FIGURES = "figures"
MOST_SHOWN = 500  # characters of running text that are a prompt
SAMPLES = 3  # questions shown with both answers in a report


def carry_out(
    pruner: BasePruner,
    plan: PruningPlan,
    output_dir: str | Path,
    judging: Sequence[EvalItem],
    *,
    heal: Heal = "none",
    heal_data: Sequence[EvalItem] | None = None,
    lora: LoraSettings | None = None,
    overwrite: bool = False,
    seed: int = 0,
    command: str = "",
) -> tuple[PruningReport, PreTrainedModel]:
    """Prune, heal and save as `plan` says, and compare both models on `judging`.

    The report is written beside the checkpoint as ``pruning_report.json``, as ``report.html`` to
    look at and share, and as the model card ``README.md``; `command` is what it says of how it
    was made.

    Raises:
        InvalidPlanError: the plan was made for a model with another number of layers.
        InvalidDataError: items serve two purposes: choosing, healing, judging.
        Also what `BasePruner.prune_and_save` and the evaluators raise.
    """
    start = time.monotonic()
    pruner.layers.require_weights("carrying a plan out")
    plan.check_model(pruner.num_layers, pruner.identity)
    check_items(judging)
    refuse_overlap(judging, plan.data.get("prompts", ()), "to judge on", "layers were chosen on")
    if heal != "none" and heal_data:
        refuse_overlap(judging, prompt_keys(heal_data), "to judge on", "to heal with")
    model, tokenizer = pruner.model, pruner.tokenizer
    questions = [item for item in judging if isinstance(item, dict)]
    if questions:  # before the work, not after it
        item_kinds(questions)
        on_first(lambda: load_embedder() and None)
    if not plan.held_out:
        plan = replace(plan, held_out=pruner.measure_choice(plan.remove, judging))
    size = pruner.batch_size
    pruned, _ = pruner.prune_and_save(
        plan.remove,
        output_dir,
        plan.model_id,
        heal=heal,
        heal_data=heal_data,
        lora=lora,
        overwrite=overwrite,
        plan=plan,
    )
    saved = on_first(lambda: PruningPlan.load(Path(output_dir) / "pruning_plan.json"))
    logger.info("Comparing both models")
    quality, answers_before, answers_after = on_first(
        lambda: compare_quality(model, pruned, tokenizer, judging, batch_size=size, seed=seed)
    )
    healing = dict(saved.options["heal"])
    if heal != "none":  # what the cut alone costs on the judging items, for comparison
        cut = pruner.layers.remove(plan.remove)
        healing["cut_quality"], _ = on_first(lambda: measure_quality(cut, tokenizer, judging, size))
    logger.info("Measuring speed")
    cost, where = on_first(
        lambda: (
            compare_cost(model, pruned, tokenizer, batch=size, layers_path=pruner.layers.paths[0]),
            machine(model),
        )
    )
    report = PruningReport(
        plan=saved,
        output_dir=str(output_dir),
        comparisons=[*cost, *quality],
        heal=healing,
        evaluation_data={"items": len(judging), "fingerprint": fingerprint(judging)},
        samples=_samples(questions, answers_before, answers_after),
        command=command,
        versions=package_versions(),
        machine=where,
        protocol={
            "seed": seed,
            "items": len(judging),
            "batch_size": size,
            "bootstrap_draws": DRAWS,
            "interval": "95 %, paired",
        },
        seconds=time.monotonic() - start,
    )
    on_first(lambda: _publish(pruner, pruned, report, judging))
    return report, pruned


def _publish(
    pruner: BasePruner, pruned: PreTrainedModel, report: PruningReport, judging: Sequence[EvalItem]
) -> None:
    """Write the report beside the checkpoint: as JSON, as a page and as a model card."""
    from .report.html_page import write_html
    from .report.model_card import write_card

    folder = Path(report.output_dir)
    report.save(folder / REPORT_FILE)
    write_card(report, folder)
    figures = model_figures(pruner, pruned, report, judging)
    write_html(report, folder / PAGE_FILE, figures=figures, curve=_curve(report))


def _curve(report: PruningReport) -> DepthCurve | None:
    """What ``--sweep`` with this output has found for the same model, if it has."""
    path = Path(f"{report.output_dir.rstrip('/')}.curve.json")
    curve = DepthCurve.load(path) if path.is_file() else None
    of_plan = report.plan.model_id, report.plan.num_layers
    return curve if curve and (curve.model_id, curve.num_layers) == of_plan else None


def model_figures(
    pruner: BasePruner,
    pruned: PreTrainedModel,
    report: PruningReport,
    judging: Sequence[EvalItem],
    folder: Path | None = None,
) -> dict[str, Figure]:
    """Figures of both models on one prompt, by name; as files too in `folder`, if given.

    The prompt is that of the report's first sample, else the beginning of the first text.
    """
    from .visualization import plot_activation_comparison, plot_semantic_comparison

    prompt = report.samples[0]["prompt"] if report.samples else str(judging[0])[:MOST_SHOWN]
    names = "activation_comparison", "semantic_comparison"
    paths = [folder / f"{name}.png" if folder else None for name in names]
    model, tokenizer = pruner.model, pruner.tokenizer
    figures = (
        plot_activation_comparison(model, tokenizer, prompt, report.plan.remove, paths[0]),
        plot_semantic_comparison(model, pruned, tokenizer, prompt, paths[1]),
    )
    return dict(zip(names, figures, strict=True))


def measure_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[EvalItem],
    batch_size: int = 8,
) -> tuple[dict[str, Any], list[str]]:
    """Perplexity, and for items with references the similarity of answers and task scores.

    Returns:
        ``perplexity``; ``similarity``, of answers; ``tasks``, score by task and ``mean``; the last
        two None for running text. And the generated answers to the items with references.
    """
    answers: list[str] = []
    questions = [item for item in items if isinstance(item, dict)]
    quality: dict[str, Any] = {
        "perplexity": perplexity(model, tokenizer, items, batch_size=batch_size),
        "similarity": None,
        "tasks": None,
    }
    if questions:
        evaluator = HolisticEvaluator(model, tokenizer, batch_size=batch_size)
        answers = evaluator.generate([item["prompt"] for item in questions])
        quality["similarity"] = evaluator.evaluate(questions, answers)
        quality["tasks"] = evaluator.run_benchmark(questions, answers)
    return quality, answers


def _samples(
    questions: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """A few questions with both answers, those first whose answer was right and is another now."""
    rows = [
        {"prompt": item["prompt"], "reference": item["reference"], "before": old, "after": new}
        for item, old, new in zip(questions, before, after, strict=True)
    ]
    rows.sort(key=lambda row: (row["before"] != row["reference"], row["before"] == row["after"]))
    return rows[:SAMPLES]


def draw_figures(
    pruner: BasePruner,
    pruned: PreTrainedModel,
    report: PruningReport,
    data: DataSplit,
) -> list[Path]:
    """Draw what the report and the two models show into ``figures/`` of the output folder.

    Returns the files written: activations and next tokens always; layer scores unless the layers
    were given, computed here for a search that did without; the benchmark where the data has
    references.
    """
    plan, scores = report.plan, report.plan.scores
    if scores is None and plan.strategy == pruner.name:
        found = pruner.compute_layer_scores(data.scoring)
        scores = found if isinstance(found, LayerScores) else LayerScores(found)
    return on_first(lambda: _drawn(pruner, pruned, report, data, scores))


def _drawn(
    pruner: BasePruner,
    pruned: PreTrainedModel,
    report: PruningReport,
    data: DataSplit,
    scores: LayerScores | None,
) -> list[Path]:
    from . import visualization
    from .report.html_page import write_html

    folder = Path(report.output_dir) / FIGURES
    plan = report.plan
    drawn = model_figures(pruner, pruned, report, data.judging, folder)
    written = [folder / f"{name}.png" for name in drawn]
    if scores is not None:
        shown = replace(report, plan=replace(plan, scores=scores))
        page = Path(report.output_dir) / PAGE_FILE
        write_html(shown, page, figures=drawn, curve=_curve(report))
        protected = [layer for layer in plan.keep if layer not in pruner.candidates]
        written.append(folder / "layer_importance.png")
        visualization.plot_layer_importance(
            scores,
            removed=plan.remove,
            protected=protected,
            num_layers=plan.num_layers,
            save_path=written[-1],
        )
        if scores.blocks is not None:
            written += [folder / "block_distances.png", folder / "similarity_matrix.png"]
            visualization.plot_block_distances(
                scores, removed=plan.remove, protected=protected, save_path=written[-2]
            )
            visualization.plot_similarity_matrix(scores, save_path=written[-1])
    tasks = [row for row in report.comparisons if row.group == "tasks"]
    tasks = [row for row in tasks if not row.name.endswith("(acc_norm)")]
    if tasks:
        written.append(folder / "holistic_benchmark.png")
        names = {row.name: "mean" if row.name == "task mean" else row.name for row in tasks}
        visualization.plot_holistic_benchmark(
            {names[row.name]: max(0.0, row.before) for row in tasks},
            {names[row.name]: max(0.0, row.after) for row in tasks},
            {names[row.name]: row.count or 1 for row in tasks},
            save_path=written[-1],
            chance={names[row.name]: row.floor for row in tasks if row.floor is not None},
        )
    return written
