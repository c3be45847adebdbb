"""What lm-eval measured on a task: a score per item of every metric; two models compared."""

from __future__ import annotations

import importlib.metadata
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InvalidDataError, NonFiniteError
from ..model.forward import HINT
from ..results import Comparison
from ..stats import paired_interval

CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True)
class TaskResult:
    """What lm-eval measured on one task.

    Attributes:
        name: the task.
        scores: metric, such as ``acc`` or ``exact_match (strict-match)``, -> one score in [0, 1]
            per item, in the order of the items. The task's metrics that are means of such scores
            and for which more is better; the task's first one first.
        items: lm-eval's hash of every item, to tell whether two runs used the same.
        floors: metric -> what choosing blindly scores, where there are choices.
        version: of the task's definition.
        settings: ``num_fewshot``, ``limit``, ``seed``, ``apply_chat_template`` and the version of
            ``lm_eval``.
        likelihoods: of a multiple-choice task, the log-likelihood of every choice of every item,
            in nats; empty for other tasks.
    """

    name: str
    scores: dict[str, list[float]]
    items: list[str]
    floors: dict[str, float]
    version: str
    settings: dict[str, Any]
    likelihoods: list[list[float]] = field(default_factory=list)

    @property
    def item_scores(self) -> list[float]:
        """The scores of the task's first metric."""
        return next(iter(self.scores.values()))

    @property
    def means(self) -> dict[str, float]:
        """Mean score by metric."""
        return {metric: math.fsum(each) / len(each) for metric, each in self.scores.items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Standard error of the mean by metric; 0 for a single item."""
        return {
            metric: statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0
            for metric, each in self.scores.items()
        }


def read_results(
    found: Mapping[str, Any], loaded: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, TaskResult]:
    """A result per task that was loaded, from what lm-eval returns."""
    shared = {**settings, "lm_eval": importlib.metadata.version("lm_eval")}
    return {name: _result(name, found, shared) for name in loaded}


def _result(name: str, found: Mapping[str, Any], shared: Mapping[str, Any]) -> TaskResult:
    """A task's result from what `simple_evaluate` returns."""
    samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    by_filter: dict[str, list[Any]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    output_type = found["configs"][name]["output_type"]
    if output_type != "generate_until":
        _check_finite(name, samples)
    first = next(iter(by_filter.values()))
    likelihoods = []
    if output_type == "multiple_choice":
        parts = 2 if "acc_mutual_info" in found["higher_is_better"][name] else 1
        for sample in first:  # with mutual information, every choice's without the question follow
            choices = sample["resps"][: len(sample["resps"]) // parts]
            likelihoods.append([float(choice[0][0]) for choice in choices])
    scores: dict[str, list[float]] = {}
    floors: dict[str, float] = {}
    for key, mean in found["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or not found["higher_is_better"][name].get(metric):
            continue
        values = [sample[metric] for sample in by_filter[kind]]
        numbers = all(isinstance(value, int | float) and 0 <= value <= 1 for value in values)
        if not numbers or not math.isclose(statistics.fmean(values), mean, abs_tol=1e-9):
            continue  # not the mean of its items
        shown = metric if kind == "none" else f"{metric} ({kind})"
        scores[shown] = list(map(float, values))
        if likelihoods and metric in CHOICE_METRICS:
            targets = [sample["target"] for sample in by_filter[kind]]
            floors[shown] = statistics.fmean(
                (len(right) if isinstance(right, list) else 1) / len(choices)
                for right, choices in zip(targets, likelihoods, strict=True)
            )
    if not scores:
        raise InvalidDataError(
            f"Task {name!r} has no score in [0, 1] per item (its metrics: "
            f"{', '.join(found['higher_is_better'][name])}): leave it out. For running text use "
            "perplexity()."
        )
    items = [str(sample["doc_hash"]) for sample in first]
    version = str(found["versions"][name])
    settings = {"num_fewshot": found["n-shot"][name], **shared}
    return TaskResult(name, scores, items, floors, version, settings, likelihoods)


def _check_finite(name: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise NonFiniteError if a log-likelihood is not finite: NaN would win as the greatest."""
    bad = {
        sample["doc_id"]
        for sample in samples
        for response in sample["resps"]
        if not math.isfinite(response[0][0] if isinstance(response[0], tuple) else response[0])
    }
    if bad:
        raise NonFiniteError(
            f"Task {name!r}: the log-likelihood of {len(bad)} of {len(samples)} items is NaN "
            f"or infinite (items {sorted(bad)[:10]}): the model's weights or {HINT}"
        )


def compare_results(
    before: Mapping[str, TaskResult], after: Mapping[str, TaskResult]
) -> list[Comparison]:
    """Every metric of every task, with 95 % paired bootstrap intervals over the items.

    Args:
        before, after: what `run_tasks` returned for two models.

    Raises:
        InvalidDataError: the results are of different tasks, items, metrics or settings.
    """
    if list(before) != list(after):
        raise InvalidDataError(
            f"Results of different tasks ({', '.join(before)}; {', '.join(after)}): run both "
            "models on the same tasks."
        )
    comparisons = []
    for one, other in zip(before.values(), after.values(), strict=True):
        for part in ("items", "version", "settings"):
            parts = getattr(one, part), getattr(other, part)
            if parts[0] != parts[1]:
                raise InvalidDataError(
                    f"Two results of {one.name!r} differ in {part} ({parts[0]!r:.60}, "
                    f"{parts[1]!r:.60}): run both models on the same task with the same settings."
                )
        note = (
            f"lm-eval {one.settings['lm_eval']}, version {one.version}, "
            f"{one.settings['num_fewshot']} examples"
        )
        for metric, scores in one.scores.items():
            pair = torch.tensor([scores, other.scores[metric]], dtype=torch.float64)
            low, high = paired_interval(pair[0], pair[1])
            comparisons.append(Comparison(
                f"{one.name} ({metric})", "tasks", "", one.means[metric], other.means[metric],
                True, len(scores), low, high, one.floors.get(metric), note,
            ))  # fmt: skip
    return comparisons
