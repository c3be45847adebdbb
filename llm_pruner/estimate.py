"""What a run will take on this machine, before anything is measured: from one timed batch."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .data.items import EvalItem, prompt_of
from .data.sampling import DataSplit
from .evaluation.cost_comparison import seconds_to_compare
from .evaluation.generation import ModelEvaluator
from .goals.budget import Budget
from .healing.heal import RUN_BEFORE, SHARE_BEFORE
from .healing.job import Heal, Healing, HealingJob
from .healing.linear import RUNS
from .healing.lora_settings import STEP_RUNS, TRAININGS, LoraSettings, default_steps
from .model.layer_stack import LayerStack
from .progress import duration
from .pruners.base import BasePruner
from .pruners.measured import SmartPruner
from .search.passes import reduced
from .search.removal_quality import RemovalQuality
from .storage.origin import gguf_of
from .utils import count_bytes, format_bytes

TIMED = 4096  # characters of the items that are timed, about 1,024 tokens
JUDGING = 4.5  # passes over the held-out items: both models twice, and comparing their logits
LOWEST = 1 / 3  # of the depth, below which no layer goes: a guess
CHECKS = 1.25  # of the time of a training, its checks included


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: what is done.
        passes: how many passes of the full model over the items it is worth; 0 without items.
        tokens: tokens of the items, padding included.
        seconds: by the clock.
    """

    name: str
    passes: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        stages: in their order.
        memory: bytes at the peak, of what is loaded already and what comes on top.
        disk: bytes that the output will have.
    """

    stages: list[Stage]
    memory: int
    disk: int

    @property
    def seconds(self) -> float:
        """All stages, by the clock."""
        return sum(stage.seconds for stage in self.stages)

    def text(self) -> str:
        """A short table."""
        work = [
            f"{one.passes:8.1f} passes over {one.tokens:>9,} tokens" if one.tokens else ""
            for one in self.stages
        ]
        rows = [
            f"  {one.name:<28} {text:<37}  about {duration(one.seconds)}"
            for one, text in zip(self.stages, work, strict=True)
        ]
        lines = [
            "What this will take on this machine, once loaded, from one timed batch:",
            *rows,
            f"  in all                       about {duration(self.seconds)}",
            f"  memory                       about {format_bytes(self.memory)} at the peak",
            f"  disk                         about {format_bytes(self.disk)}",
        ]
        return "\n".join(lines) + "\n"


def estimate(
    pruner: BasePruner,
    data: DataSplit,
    budget: Budget,
    heal: Heal = "none",
    lora: LoraSettings | None = None,
    *,
    figures: bool = False,
) -> Estimate:
    """What choosing layers, healing and comparing both models will take.

    About 1,024 tokens are run and timed, in reduced precision too where a search would use it, for
    items with references a batch of answers, and one generation of each kind that is timed in the
    end. The rest is arithmetic on the multiply-adds of layers and head (`TokenCost`): how many
    swaps a search will try, and from which layer on is healed, can only be guessed; a training may
    stop before its last step.

    Args:
        figures: whether the scores of all layers are drawn, which a search does without.

    Raises:
        InvalidPlanError: an impossible amount.
        InvalidDataError: too few items to heal with.
    """
    budget = pruner.with_count(budget)
    quality = pruner.comparing(data.scoring, budget)
    count = budget.count(pruner.removable) or max(1, len(pruner.candidates) // 4)
    exact, rough = pruner.expected_passes(quality, count)
    full, bytes_on_top = _seconds(pruner, pruner.layers, data.scoring, quality), 0
    half, faster = reduced(pruner.layers) if rough else None, full
    if half is not None:
        faster = _seconds(pruner, half, data.scoring, quality)
        bytes_on_top = count_bytes(half.model)
    tokens, name = quality.tokens, f"choosing ({pruner.name})"
    stages = [Stage(name, exact + rough, tokens, (exact * full + rough * faster) * tokens)]
    if figures and isinstance(pruner, SmartPruner) and budget.threshold is None:
        passes = pruner.passes_of_scores(quality) * pruner.share_to_draw(quality)
        stages.append(Stage("layer scores for figures", passes, tokens, passes * faster * tokens))
    how = Healing.of(heal)
    if how.heals:
        stages += _healing(pruner, data.healing, how, lora, full)
    if data.held_out:
        held_out = pruner.quality(data.held_out)
        each = _seconds(pruner, pruner.layers, data.held_out, held_out) * held_out.tokens
        passes = JUDGING + how.heals  # what the removal costs without healing is shown too
        stages.append(Stage("comparing both models", passes, held_out.tokens, passes * each))
        if questions := [item for item in data.held_out if isinstance(item, dict)]:
            stages.append(_answers(pruner, questions, held_out.tokens))
        if not (pruner.layers.offloaded or gguf_of(pruner.model)):
            spent = seconds_to_compare(pruner.model, pruner.tokenizer, pruner.batch_size)
            stages.append(Stage("timing both models", 0.0, 0, spent))
    layers = sum(count_bytes(layer) for layer in pruner.layers)
    gone = layers / count_bytes(pruner.model) * count / pruner.num_layers
    # Files in GGUF keep their bits, unless they are healed.
    files = [path.stat().st_size for path in gguf_of(pruner.model) if not how.heals]
    disk = round((sum(files) or count_bytes(pruner.model)) * (1 - gone))
    vocabulary = getattr(pruner.model.config.get_text_config(), "vocab_size", 0)
    logits = 3 * 4 * vocabulary * pruner.batch_size * pruner.max_length  # of two models, and a copy
    if how.method == "full":  # float32: the weights, their gradients, the optimiser's two states
        trained = sum(one.numel() for layer in pruner.layers for one in layer.parameters())
        bytes_on_top = max(bytes_on_top, 4 * 4 * round(trained * (1 - count / pruner.num_layers)))
    memory = _resident() + bytes_on_top + logits
    return Estimate(stages, memory, disk)


def _seconds(
    pruner: BasePruner, stack: LayerStack, items: Sequence[EvalItem], quality: RemovalQuality
) -> float:
    """Seconds that a model takes for a token, scoring as `quality` does included."""
    sizes = accumulate(len(prompt_of(item)) for item in items)
    few = [item for item, size in zip(items, sizes, strict=True) if size <= TIMED] or items[:1]
    how: dict[str, Any] = {"batch_size": pruner.batch_size, "max_length": pruner.max_length}
    how["objective"] = quality.measures
    timed = RemovalQuality(stack, pruner.tokenizer, few, **how)
    timed.measure([()])  # the first pass is slower, and what is compared with is kept
    begin = time.perf_counter()
    timed.measure([(pruner.candidates[0],)])
    spent = time.perf_counter() - begin
    depth, cost = len(stack), timed.token_cost
    return spent / timed.tokens * cost.of_pass(depth) / cost.of_pass(depth - 1)


def _healing(
    pruner: BasePruner,
    items: Sequence[EvalItem],
    how: Healing,
    lora: LoraSettings | None,
    each: float,
) -> list[Stage]:
    """The stages of healing, `each` being seconds of a full pass for a token."""
    job = HealingJob.of(pruner.layers, (), pruner.tokenizer, items, lora, how)
    tokens = sum(len(row.ids) for row in job.train)
    methods = (*RUN_BEFORE.get(how.method, ()), how.method)
    stages = []
    left = math.inf if how.minutes is None else 60 * how.minutes
    for method in methods:
        passes = LOWEST + RUNS * (1 - LOWEST)
        if method in TRAININGS:
            timed = how.minutes is not None
            steps = job.lora.steps or default_steps(len(job.train), job.lora.batch_size, timed)
            epochs = steps * job.lora.batch_size * job.lora.accumulate / len(job.train)
            passes = STEP_RUNS * CHECKS * epochs
        share = 1.0 if method == how.method else SHARE_BEFORE
        seconds = min(passes * tokens * each, share * left)
        left -= seconds
        stages.append(Stage(f"healing ({method}), at most", passes, tokens, seconds))
    return stages


def _answers(pruner: BasePruner, questions: Sequence[dict[str, Any]], tokens: int) -> Stage:
    """Both models' answers, from one timed batch."""
    few = questions[: pruner.batch_size]
    evaluator = ModelEvaluator(pruner.model, pruner.tokenizer, batch_size=pruner.batch_size)
    begin = time.perf_counter()
    evaluator.generate([item["prompt"] for item in few])
    spent = time.perf_counter() - begin
    return Stage("both models' answers", 2.0, tokens, 2 * spent * len(questions) / len(few))


def _resident() -> int:
    """Bytes of memory that this process has used at the most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
