"""A whole job: carry a plan out, compare both models, write everything in one step.

What the command line does, as functions for scripts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic_output import check_output
from .checkpoint.save import check_saveable, new_checkpoint, stored_bytes
from .data.items import (
    MAX_LENGTH,
    EvalItem,
    check_items,
    fingerprint,
    prompt_keys,
    prompt_text,
    refuse_overlap,
)
from .distributed import on_first
from .evaluation.cost_comparison import compare_cost, machine
from .evaluation.likelihood import perplexity
from .evaluation.quality_comparison import DRAWS, compare_quality
from .evaluation.similarity import load_embedder
from .evaluation.tasks import HolisticEvaluator, item_kinds
from .healing.job import Heal, Healing
from .healing.lora_settings import LoraSettings
from .layer_scores import LayerScores
from .lm_eval.task_results import TaskResult, compare_results
from .model.forward import require_language_model
from .output_rules import FIGURES, PAGE_FILE, REPORT_FILE
from .pruners.base import BasePruner
from .pruners.measured import SmartPruner
from .report.model_card import pruned_gguf
from .report.summary import IN_GGUF
from .results import DepthCurve, PruningPlan, PruningReport
from .storage.origin import read_for
from .utils import logger, package_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MeasureTasks = Callable[[Any, Any], Mapping[str, TaskResult]]
PROMPT_LENGTH = 500  # characters of running text that serve as a prompt
ANSWERS_SHOWN = 3  # questions shown with both answers in a report


def check_comparable(held_out: Sequence[EvalItem]) -> None:
    """Refuse, before the work, what two models could not be compared on.

    Raises:
        InvalidDataError: questions of which none can be scored.
        MissingDependencyError: answers to questions need a sentence encoder, which is not there.
    """
    questions = [item for item in held_out if isinstance(item, dict)]
    if questions:
        item_kinds(questions)
        on_first(lambda: load_embedder() and None)


def carry_out(
    pruner: BasePruner,
    plan: PruningPlan,
    output_dir: str | Path,
    held_out: Sequence[EvalItem],
    *,
    heal: Heal = "none",
    heal_data: Sequence[EvalItem] | None = None,
    lora: LoraSettings | None = None,
    overwrite: bool = False,
    figures: bool = False,
    seed: int = 0,
    command: str = "",
    tasks: MeasureTasks | None = None,
) -> tuple[PruningReport, PreTrainedModel]:
    """Prune and heal as `plan` says, compare both models, and write it all in one step.

    The output appears complete or not at all: the checkpoint with ``pruning_plan.json``,
    ``pruning_report.json``, the page ``report.html``, the model card ``README.md`` and, if asked
    for, ``figures/``.

    Args:
        pruner: holds the model and its tokenizer; the strategy does not matter.
        plan: which layers to remove.
        output_dir: folder to write.
        held_out: items to compare both models on, which served no other purpose.
        heal, heal_data, lora: see `BasePruner.prune_and_save`.
        overwrite: replace an earlier output.
        figures: also write every figure of the page as a PNG file.
        seed: of the bootstrap.
        command: the command line, for the record.
        tasks: what tasks of lm-eval measure on a model with a tokenizer, such as
            `LmEvalTasks.results`, to compare both models on too.

    Returns:
        The report, and the pruned and healed model.

    Raises:
        InvalidPlanError: the plan was made for another model.
        InvalidDataError: items serve two purposes: choosing, healing, comparing.
        Also what `BasePruner.prune_and_save` and the evaluators raise.
    """
    start = time.monotonic()
    pruner.layers.require_weights("carrying a plan out")
    plan.check_model(pruner.num_layers, pruner.identity)
    pruner.removable.refuse_misplaced(plan.remove)
    require_language_model(pruner.model, "comparing both models")
    check_saveable(pruner.model, pruner.num_layers, heals=Healing.of(heal).heals)
    check_items(held_out)
    refuse_overlap(held_out, plan.data.get("prompts", ()), "held out", "layers were chosen on")
    if Healing.of(heal).heals and heal_data:
        refuse_overlap(held_out, prompt_keys(heal_data), "held out", "to heal with")
    reads = read_for(pruner.model)
    on_first(lambda: check_output(output_dir, overwrite=overwrite, reads=reads))
    pruner.layers.remove(plan.remove)  # what the architecture cannot express is refused here
    check_comparable(held_out)
    if not plan.held_out:
        plan = replace(plan, held_out=pruner.measure_choice(plan.remove, held_out))
    pruned, plan = pruner.carry_out(plan, heal, heal_data, lora)

    def finish() -> PruningReport:
        files = pruned, pruner.tokenizer, plan, output_dir
        with new_checkpoint(*files, overwrite=overwrite) as stage:
            report = _compared(pruner, pruned, plan, held_out, seed, stage, tasks)
            report = replace(
                report,
                output_dir=str(output_dir),
                command=command,
                seconds=time.monotonic() - start,
            )
            _write_report(pruner, pruned, report, held_out, stage, figures)
        return report

    return on_first(finish), pruned


def with_scores(
    pruner: BasePruner, plan: PruningPlan, calibration: Sequence[EvalItem]
) -> PruningPlan:
    """`plan` with the layer scores that its figures show, computed if its search did without."""
    if plan.scores is not None or plan.strategy != pruner.name:
        return plan
    draws = pruner.scores_to_draw if isinstance(pruner, SmartPruner) else None
    scores = (draws or pruner.compute_layer_scores)(calibration)
    return replace(plan, scores=scores if isinstance(scores, LayerScores) else LayerScores(scores))


def _compared(
    pruner: BasePruner,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    held_out: Sequence[EvalItem],
    seed: int,
    folder: Path,
    tasks: MeasureTasks | None,
) -> PruningReport:
    """Both models on the same items, and what each of them costs to keep and to run."""
    elsewhere = bool(pruned_gguf(folder))
    model, tokenizer, batch_size = pruner.model, pruner.tokenizer, pruner.batch_size
    logger.info("Comparing both models")
    quality, before, after = compare_quality(
        model,
        pruned,
        tokenizer,
        held_out,
        batch_size=batch_size,
        seed=seed,
        window=pruner.max_length,
    )
    if tasks is not None:
        logger.info("Comparing both models on tasks of lm-eval")
        sides = [tasks(one, tokenizer) for one in (model, pruned)]
        quality += [
            replace(row, name=f"{row.name[:-1]}, lm-eval)") for row in compare_results(*sides)
        ]
    healing = dict(plan.healing)
    if healing["method"] != "none":  # what the removal costs without it, for comparison
        unhealed = pruner.layers.remove(plan.remove)
        how = batch_size, pruner.max_length
        healing["cut_quality"] = measure_quality(unhealed, tokenizer, held_out, *how)
    if not elsewhere:
        logger.info("Measuring speed")
    cost = compare_cost(
        model,
        pruned,
        tokenizer,
        batch=batch_size,
        layers_path=pruner.layers.paths[0],
        stored=stored_bytes(pruned, folder),
        timed=not elsewhere,
    )
    return PruningReport(
        plan=plan,
        output_dir="",
        comparisons=[*cost, *quality],
        heal=healing,
        evaluation_data={"items": len(held_out), "fingerprint": fingerprint(held_out)},
        samples=_answers_to_show(held_out, before, after),
        versions=package_versions(),
        machine=machine(model),
        protocol={
            "seed": seed,
            "items": len(held_out),
            "batch_size": batch_size,
            "bootstrap_draws": DRAWS,
            "interval": "95 %, paired",
            "checkpoint": IN_GGUF if elsewhere else "reloaded and verified",
        },
    )


def measure_quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[EvalItem],
    batch_size: int = 8,
    max_length: int = MAX_LENGTH,
) -> dict[str, Any]:
    """Perplexity, and for items with references the similarity of answers and task scores.

    Returns:
        ``perplexity``; ``similarity``, of answers; ``tasks``, score by task and ``mean``; the last
        two None for running text.
    """
    questions = [item for item in check_items(items) if isinstance(item, dict)]
    quality: dict[str, Any] = {
        "perplexity": perplexity(
            model, tokenizer, items, batch_size=batch_size, max_length=max_length
        ),
        "similarity": None,
        "tasks": None,
    }
    if questions:
        evaluator = HolisticEvaluator(model, tokenizer, batch_size=batch_size)
        answers = evaluator.generate([item["prompt"] for item in questions])
        quality["similarity"] = evaluator.evaluate(questions, answers)
        quality["tasks"] = evaluator.run_benchmark(questions, answers)
    return quality


def _answers_to_show(
    items: Sequence[EvalItem], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """A few questions with both answers, first those whose right answer has changed."""
    questions = [item for item in items if isinstance(item, dict)]
    rows = [
        {
            "prompt": prompt_text(item["prompt"]),
            "reference": item["reference"],
            "before": old,
            "after": new,
        }
        for item, old, new in zip(questions, before, after, strict=True)
    ]
    rows.sort(key=lambda row: (row["before"] != row["reference"], row["before"] == row["after"]))
    return rows[:ANSWERS_SHOWN]


def _write_report(
    pruner: BasePruner,
    pruned: PreTrainedModel,
    report: PruningReport,
    held_out: Sequence[EvalItem],
    folder: Path,
    as_files: bool,
) -> None:
    """Write the report into `folder`: as JSON, as a model card, as a page, as figures."""
    from .report.figures import report_figures, save_figures
    from .report.html_page import write_html
    from .report.model_card import write_card

    report.save(folder / REPORT_FILE)
    write_card(report, folder)
    protected = [layer for layer in report.plan.keep if layer not in pruner.candidates]
    curve = _curve(report)
    skipped = () if as_files else ("holistic_benchmark",)  # which the page does not show
    figures = report_figures(report, protected=protected, curve=curve, skip=skipped)
    figures |= _model_figures(pruner, pruned, report, held_out)
    write_html(report, folder / PAGE_FILE, figures=figures, curve=curve)
    if as_files:
        save_figures(figures, folder / FIGURES)


def _curve(report: PruningReport) -> DepthCurve | None:
    """The depth curve of the same model that ``--sweep`` has left beside this output, if any."""
    path = Path(f"{report.output_dir.rstrip('/')}.curve.json")
    curve = DepthCurve.load(path) if path.is_file() else None
    of_plan = report.plan.model_id, report.plan.num_layers
    return curve if curve and (curve.model_id, curve.num_layers) == of_plan else None


def _model_figures(
    pruner: BasePruner,
    pruned: PreTrainedModel,
    report: PruningReport,
    held_out: Sequence[EvalItem],
) -> dict[str, Figure]:
    """Figures of both models on one prompt: of the first answer shown, or the first text."""
    from .visualization.models import plot_activation_comparison, plot_semantic_comparison

    prompt = report.samples[0]["prompt"] if report.samples else str(held_out[0])[:PROMPT_LENGTH]
    model, tokenizer, removed = pruner.model, pruner.tokenizer, report.plan.remove
    title = None
    if report.heal.get("method", "none") != "none":
        count = f"{len(removed)} of {pruner.num_layers}"
        title = f"Residual stream with {count} layers removed, before healing"
    streams = plot_activation_comparison(model, tokenizer, prompt, removed, title=title)
    return {
        "activation_comparison": streams,
        "semantic_comparison": plot_semantic_comparison(model, pruned, tokenizer, prompt),
    }
