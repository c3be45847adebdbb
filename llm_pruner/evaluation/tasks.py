"""Benchmark tasks: multiple choice, exact match and similarity, scored per item."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import EvalItem, check_items, check_text
from ..data.sampling import safe_sample
from ..data.tokens import Batch, encode_batches
from ..errors import InvalidDataError, LoadError, UnknownNameError
from ..lm_eval.harness import run_tasks
from ..lm_eval.task_results import TaskResult
from ..model.forward import position_limit
from ..progress import progress
from ..utils import at_least_one, shown
from .generation import ModelEvaluator, check_answers, question_items
from .likelihood import sequence_nll

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BENCHMARK = "gsm8k hellaswag arc_easy arc_challenge sciq truthfulqa openbookqa triviaqa"
BACKENDS = ("built-in", "lm-eval")
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


class HolisticEvaluator(ModelEvaluator):
    """Scores a model task by task, each item by its kind.

    An item with ``choices`` scores 1 if the model finds the reference the most likely choice. An
    item of task ``gsm8k``, or with a number as reference, scores 1 if the generated answer ends in
    that number (`final_number`) or is one of the ``aliases``, word for word. Any other item scores
    the greatest cosine similarity of the generated answer to the reference or one of the
    ``aliases``, at least 0.

    With ``backend="lm-eval"``, EleutherAI's evaluation harness does all of this.

    Args:
        model, tokenizer, device, batch_size, max_new_tokens, embedder: as in `ModelEvaluator`.
        tasks: the datasets `load_diverse_data` draws from; the eight of `BENCHMARK` if None. For
            lm-eval its tasks, as in `run_tasks`.
        backend: ``built-in`` or ``lm-eval``.
        settings: for lm-eval `num_fewshot`, `limit`, `seed` and `apply_chat_template`, as in
            `run_tasks`.

    Attributes:
        item_scores: the scores of each task's items, in the order of the data, after
            `run_benchmark`.
        norm_scores: the same for items with choices, by likelihood per character of the choice
            (`choice_score_norm`): ``acc_norm`` of lm-eval, whose ``acc`` is `item_scores`.
        task_results: everything lm-eval measured on each task, after `run_benchmark`.

    Raises:
        UnknownNameError: a backend of another name.
    """

    def __init__(
        self,
        *args: Any,
        tasks: Sequence[Any] | None = None,
        backend: str = "built-in",
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if backend not in BACKENDS:
            raise UnknownNameError.of("backend", backend, BACKENDS)
        self.backend, self.settings = backend, dict(settings or {})
        self.tasks: list[Any] = BENCHMARK.split() if tasks is None else list(tasks)
        self.item_scores: dict[str, list[float]] = {}
        self.norm_scores: dict[str, list[float]] = {}
        self.task_results: dict[str, TaskResult] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Number of items behind each task's score in the last `run_benchmark`."""
        return {task: len(scores) for task, scores in self.item_scores.items()}

    def load_diverse_data(
        self, n_per_task: int = 30, source: str | None = None
    ) -> list[dict[str, Any]]:
        """Items of many tasks, up to `n_per_task` of each.

        Args:
            n_per_task: items per task; a task that has fewer gives all it has.
            source: None for the hub datasets `tasks`; otherwise ``demo-eval``, a file, a folder
                or a hub id, whose items are grouped by their ``task``.

        Raises:
            LoadError: nothing could be loaded. A single source that fails is logged and skipped.
        """
        at_least_one(n_per_task=n_per_task)
        names = self.tasks if source is None else [source]
        most = n_per_task if source is None else sys.maxsize
        taken: dict[str, list[dict[str, Any]]] = {}
        for name in progress(names, "datasets"):
            for item in safe_sample(name, None, None, most):
                if isinstance(item, dict):
                    taken.setdefault(task_of(item), []).append(item)
        if not taken:
            raise LoadError(
                f"No benchmark items from {', '.join(names) or 'an empty list of tasks'}: the log "
                "says why. Without a network use source='demo-eval' or a local file of items."
            )
        return [item for items in taken.values() for item in items[:n_per_task]]

    def run_benchmark(
        self,
        data: Sequence[EvalItem] | str | Path | None = None,
        answers: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Mean score of each task's items, in [0, 1], and ``mean``, the mean over tasks.

        Every item is checked before the model runs. An item without ``task`` counts as ``other``.

        Args:
            data: items with `prompt` and `reference`. For lm-eval None, or a folder with the
                items of every task, as in `run_tasks`.
            answers: output of `generate` for their prompts; generated where needed if None. Not
                for lm-eval.

        Raises:
            InvalidDataError: an item that cannot be scored: running text, fewer than two
                choices or none that is the reference, a gsm8k reference without a number.
            NonFiniteError: the model's logits are not finite.
            Also whatever `run_tasks` raises, with lm-eval.
        """
        if self.backend == "lm-eval":
            return self._run_tasks(data)
        if data is None or isinstance(data, str | Path):
            raise InvalidDataError(f"data={data!r} must be a list of items, as load_data gives it.")
        kinds = item_kinds(data)
        items = question_items(data)
        if answers is not None:
            check_answers(answers, len(items))
        scores: dict[int, float] = {}
        norms: dict[int, float] = {}
        for kind in sorted(set(kinds)):
            indices = [index for index, other in enumerate(kinds) if other == kind]
            some = [items[index] for index in indices]
            if kind == "choice":
                losses = choice_losses(self.model, self.tokenizer, some, self.batch_size)
                found = list(map(choice_score, some, losses))
                norms = dict(zip(indices, map(choice_score_norm, some, losses), strict=True))
            else:
                given = self._answers(some) if answers is None else [answers[i] for i in indices]
                if kind == "number":
                    found = list(map(_number_score, some, given))
                else:
                    found = [max(0.0, value) for value in self._similarities(some, given)]
            scores.update(zip(indices, found, strict=True))
        self.item_scores, self.norm_scores = _by_task(items, scores), _by_task(items, norms)
        return self._means()

    def _run_tasks(self, data: Any) -> dict[str, float]:
        if not (data is None or isinstance(data, str | Path)):
            raise InvalidDataError(
                "lm-eval has the items of its tasks: leave data out, or pass a folder with a file "
                "for every task; backend='built-in' scores lists of items."
            )
        options = {"batch_size": self.batch_size, **self.settings}
        results = run_tasks(self.model, self.tokenizer, self.tasks, data, **options)
        self.task_results = results
        self.item_scores = {task: result.item_scores for task, result in results.items()}
        norms = {task: result.scores.get("acc_norm") for task, result in results.items()}
        self.norm_scores = {task: scores for task, scores in norms.items() if scores}
        return self._means()

    def _means(self) -> dict[str, float]:
        means = {task: math.fsum(each) / len(each) for task, each in self.item_scores.items()}
        return {**means, "mean": math.fsum(means.values()) / len(means)}


def _number_score(item: Mapping[str, Any], answer: str) -> float:
    """1 where the answer's number is the reference's, or the answer is one of the aliases."""
    same = final_number(answer) == final_number(item["reference"])
    aliases = {alias.casefold() for alias in item.get("aliases") or ()}
    return float(same or answer.rstrip(".").casefold() in aliases)


def choice_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[Batch]:
    """Every choice of every item after its prompt; `Batch.items` counts choices, not items.

    Raises:
        InvalidDataError: the tokenizer makes no token of a choice.
    """
    pairs: list[EvalItem] = [
        {"prompt": item["prompt"], "reference": choice}
        for item in items
        for choice in item["choices"]
    ]
    length = position_limit(model) + 1  # the last token is scored, not read
    options = {"batch_size": batch_size, "max_length": length}
    batches = encode_batches(tokenizer, pairs, **options, closed=False)
    if sum(len(batch.items) for batch in batches) < len(pairs):
        raise InvalidDataError("The tokenizer makes no token of some choices: remove them.")
    return batches


def choice_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Mapping[str, Any]],
    batch_size: int = 8,
) -> list[list[float]]:
    """Summed negative log-likelihood of every choice of every item, in nats."""
    batches = choice_batches(model, tokenizer, items, batch_size)
    total, _ = sequence_nll(model, progress(batches, "choices"))
    losses = torch.empty_like(total)
    losses[[index for batch in batches for index in batch.items]] = total
    return by_item(items, losses)


def by_item(items: Sequence[Mapping[str, Any]], losses: torch.Tensor) -> list[list[float]]:
    """The losses of all choices, (choices,), as a list for each item."""
    left = iter(losses.tolist())
    return [list(islice(left, len(item["choices"]))) for item in items]


def item_kinds(items: Sequence[EvalItem]) -> list[str]:
    """How each item is scored: ``choice``, ``number`` or ``open``.

    Raises:
        InvalidDataError: an item that cannot be scored.
    """
    kinds = []
    for index, item in enumerate(check_items(items)):
        if isinstance(item, str) or task_of(item) == "mean":
            raise InvalidDataError(
                f"data[{index}] cannot be scored: a benchmark takes dicts with 'prompt' and "
                f"'reference', whose task is not called 'mean'; got {shown(item)}."
            )
        reference, gsm8k = item["reference"], task_of(item) == "gsm8k"
        if item.get("choices") is not None:
            check_choices(index, item)
            kinds.append("choice")
        elif gsm8k and final_number(reference) is None:
            raise InvalidDataError(
                f"data[{index}] has no number in its reference {reference!r:.60}."
            )
        else:
            number = gsm8k or NUMBER.fullmatch(reference.strip(" $"))
            kinds.append("number" if number else "open")
    return kinds


def choice_score(item: Mapping[str, Any], losses: Sequence[float]) -> float:
    """1 if the choice with the least loss (the first of equals) is the reference, else 0."""
    return float(item["choices"][losses.index(min(losses))] == item["reference"])


def choice_score_norm(item: Mapping[str, Any], losses: Sequence[float]) -> float:
    """`choice_score` of the losses per character of the choice."""
    sizes = [len(choice) for choice in item["choices"]]
    return choice_score(item, [loss / size for loss, size in zip(losses, sizes, strict=True)])


def _by_task(
    items: Sequence[Mapping[str, Any]], scores: Mapping[int, float]
) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for index, score in sorted(scores.items()):
        grouped.setdefault(task_of(items[index]), []).append(score)
    return grouped


def task_of(item: Any) -> str:
    """The task an item counts for."""
    return str(item.get("task") or "other")


def check_choices(index: int, item: Mapping[str, Any]) -> None:
    """Raise InvalidDataError if an item's choices are not several texts with the reference."""
    choices, reference = item["choices"], item["reference"]
    listed = isinstance(choices, Sequence) and not isinstance(choices, str)
    texts = [text for text in choices if isinstance(text, str) and text.strip()] if listed else []
    if not listed or len(texts) < max(2, len(choices)) or reference not in texts:
        raise InvalidDataError(
            f"data[{index}] has reference {reference!r:.60} and choices {shown(choices)}: give "
            "two or more non-empty choices, the reference among them."
        )
    for text in texts:
        check_text(f"data[{index}]['choices']", text)


def final_number(text: str) -> Decimal | None:
    """The number an answer ends in, or the first one after ``####``; None if there is none.

    ``1,234``, ``1234`` and ``1234.0`` are the same number.
    """
    _, marked, tail = text.partition("####")
    found = NUMBER.findall(tail if marked else text)
    return Decimal(found[0 if marked else -1].replace(",", "")) if found else None
