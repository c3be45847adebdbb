"""Benchmark tasks by lm-eval (EleutherAI's evaluation harness); all that is known of it is here.

Written for lm-eval 0.4.13 (extra ``eval``), which is imported when the first task is run. Its
``use_cache`` is never used: it knows a model by its name, and a pruned model in memory has that of
the original.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import io
import logging
import math
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..distributed import on_first
from ..errors import (
    InvalidDataError,
    LoadError,
    MissingDependencyError,
    NonFiniteError,
    ProcessGroupError,
    UnknownNameError,
)
from ..model.forward import HINT, evaluating
from ..results import Comparison
from ..stats import paired_interval
from ..utils import at_least_one

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Task = str | Mapping[str, Any]
SPLIT = "test"  # what the rows of a local file are to lm-eval


@dataclass(frozen=True)
class TaskResult:
    """What lm-eval measured on one task.

    Attributes:
        name: the task.
        scores: by metric, such as ``acc`` or ``exact_match (strict-match)``, one score in [0, 1]
            per item, in the order of the items. The task's metrics that are means of such scores
            and for which more is better; the task's first one first.
        items: lm-eval's hash of every item, to tell whether two runs have seen the same.
        floors: by metric, what picking a choice blindly scores; where there are choices.
        version: of the task's definition.
        settings: ``num_fewshot``, ``limit``, ``seed``, ``apply_chat_template`` and the version of
            ``lm_eval``.
    """

    name: str
    scores: dict[str, list[float]]
    items: list[str]
    floors: dict[str, float]
    version: str
    settings: dict[str, Any]

    @property
    def item_scores(self) -> list[float]:
        """The scores of the task's first metric."""
        return next(iter(self.scores.values()))

    @property
    def means(self) -> dict[str, float]:
        """Mean score by metric."""
        return {name: math.fsum(each) / len(each) for name, each in self.scores.items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Standard error of the mean by metric; 0 for a single item."""
        return {
            name: statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0
            for name, each in self.scores.items()
        }


def run_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    data: str | Path | None = None,
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
    apply_chat_template: bool = False,
) -> dict[str, TaskResult]:
    """Run a model that is in memory through tasks of lm-eval.

    Of several processes that work together the first alone runs them.

    Args:
        model: a causal language model of transformers; it stays where and as it is.
        tokenizer: its tokenizer; it is not changed.
        tasks: names that lm-eval knows (a group or tag stands for its tasks), paths of task
            definitions (``.yaml``), or definitions as dicts.
        data: a folder with the items of every named task, ``TASK.jsonl`` or ``TASK.json``, rows as
            in the task's own dataset; few-shot examples are other rows of that file. The
            datasets of the hub if None.
        batch_size: sequences at a time.
        num_fewshot: examples before every question; what each task says if None.
        limit: items per task, the first ones; all if None.
        seed: of the few-shot examples and whatever else a task draws.
        apply_chat_template: put the tokenizer's chat template around the prompts, which lm-eval
            does not do by itself.

    Returns:
        A result by task, in the order of `tasks`.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: a task that lm-eval does not have.
        LoadError: a task's data cannot be had.
        InvalidDataError: a count that cannot be, a task that has no score in [0, 1] per item, one
            that does not fit the model, or a group where `data` is given.
        NonFiniteError: the model's logits are not finite.
        ProcessGroupError: one of several processes that do not work together, but the first.
    """
    settings = _settings(batch_size, num_fewshot, limit, seed, apply_chat_template)
    return on_first(lambda: _run(model, tokenizer, _loaded(tasks, data, seed), settings))


def compare_tasks(
    original: Any,
    pruned: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    data: str | Path | None = None,
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
    apply_chat_template: bool = False,
) -> list[Comparison]:
    """Every metric of every task for two models, with 95 % paired bootstrap intervals over items.

    Args:
        original, pruned: the models.
        tokenizer: of both.
        tasks, data, batch_size, num_fewshot, limit, seed, apply_chat_template: as in `run_tasks`.

    Raises:
        Whatever `run_tasks` raises.
    """
    settings = _settings(batch_size, num_fewshot, limit, seed, apply_chat_template)

    def work() -> list[Comparison]:
        loaded = _loaded(tasks, data, seed)
        before, after = (_run(model, tokenizer, loaded, settings) for model in (original, pruned))
        return [line for name in before for line in compare_results(before[name], after[name])]

    return on_first(work)


def compare_results(before: TaskResult, after: TaskResult) -> list[Comparison]:
    """One line for every metric of a task that two models were run on.

    Raises:
        InvalidDataError: the results are of different items, metrics or settings.
    """
    for part in ("name", "items", "version", "settings"):
        one, other = getattr(before, part), getattr(after, part)
        if one != other:
            raise InvalidDataError(
                f"Two results of {before.name!r} differ in {part} ({one!r:.60}, {other!r:.60}): "
                "run both models on the same task with the same settings."
            )
    shots = before.settings["num_fewshot"]
    lines = []
    for metric, scores in before.scores.items():
        pair = torch.tensor([scores, after.scores[metric]], dtype=torch.float64)
        low, high = paired_interval(pair[0], pair[1])
        lines.append(
            Comparison(
                name=f"{before.name} ({metric})",
                group="tasks",
                unit="",
                before=before.means[metric],
                after=after.means[metric],
                higher_is_better=True,
                count=len(scores),
                low=low,
                high=high,
                floor=before.floors.get(metric),
                note=f"lm-eval {before.settings['lm_eval']}, version {before.version}, "
                f"{shots} examples",
            )
        )
    return lines


def _settings(
    batch_size: int, num_fewshot: int | None, limit: int | None, seed: int, chat: bool
) -> dict[str, Any]:
    """Arguments of `simple_evaluate`, checked."""
    at_least_one(batch_size=batch_size, limit=1 if limit is None else limit)
    if num_fewshot is not None and num_fewshot < 0:
        raise InvalidDataError(f"num_fewshot={num_fewshot} must be at least 0.")
    return {
        "batch_size": batch_size,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": chat,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "torch_random_seed": seed,
        "fewshot_random_seed": seed,
    }


def _loaded(tasks: Sequence[Task], data: str | Path | None, seed: int) -> dict[str, Any]:
    """The tasks by name as objects of lm-eval, with their items."""
    if isinstance(tasks, str) or not tasks:
        raise InvalidDataError(f"tasks={tasks!r} must be a list of one or more tasks.")
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "Tasks of lm-eval need lm-eval: pip install 'llm_pruner[eval]', or use the built-in "
            "scorer (backend='built-in')."
        )
    found: dict[str, Any] = {}
    with _quiet(), _seeded(seed):
        for task in tasks:
            found.update(_load(task, None if data is None else Path(data)))
    return found


def _load(task: Task, folder: Path | None) -> dict[str, Any]:
    named = isinstance(task, str) and not task.endswith((".yaml", ".yml"))
    spec: Any = task if isinstance(task, str) else copy.deepcopy(dict(task))
    if named:
        spec = _check_name(str(task)) if folder is None else _with_rows(str(task), folder)
    name = task if isinstance(task, str) else task.get("task", "(a dict without 'task')")
    try:
        loaded: dict[str, Any] = _manager(named).load([spec])["tasks"]
    except Exception as error:  # whatever datasets, jinja2 or a task's own code make of it
        reason = " ".join(str(error).split())
        source = "" if folder is None or not named else f" from folder {str(folder)!r}"
        raise LoadError(
            f"Cannot load task {name!r}{source}: {type(error).__name__}: {reason:.300} Rows need "
            "the fields of the task's own dataset. Without a network give a folder with a file "
            "of rows for every task (data=)."
        ) from error
    return loaded


@cache
def _manager(defaults: bool) -> Any:
    """lm-eval's list of tasks; it takes seconds to read all those that come with it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _check_name(name: str) -> str:
    """Raise UnknownNameError if lm-eval has no task of this name."""
    known = _manager(True).all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownNameError(
            f"lm-eval has no task {name!r}.{hint} All {len(known)}: lm-eval ls tasks."
        )
    return name


def _with_rows(name: str, folder: Path) -> dict[str, Any]:
    """The definition of a task that reads its items from a file in a folder.

    A dict that names a task does not build on the task of that name; within a group it does.
    """
    if _check_name(name) not in _manager(True).all_subtasks:
        raise InvalidDataError(
            f"{name!r} is a group of tasks of lm-eval: with items of your own name single tasks."
        )
    files = [folder / f"{name}.{ending}" for ending in ("jsonl", "json")]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise LoadError(
            f"No items of task {name!r}: neither {str(files[0])!r} nor {files[1].name!r} exists."
        )
    rows = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {SPLIT: str(file.resolve())}},
        "test_split": SPLIT,
        "validation_split": None,
        "training_split": None,
        "fewshot_split": SPLIT,
    }
    return {"group": f"{name} of {folder.name}", "task": [{"task": name, **rows}]}


def _run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, TaskResult]:
    """Every loaded task's result for one model."""
    from lm_eval import __version__, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seed = settings["random_seed"]
    with evaluating(model), _quiet(), _seeded(seed), _refusing_nan(model):
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
            batch_size=settings["batch_size"],
        )
        try:
            found = simple_evaluate(
                lm,
                tasks=list(tasks.values()),
                task_manager=_manager(False),
                bootstrap_iters=0,
                **settings,
            )
        except (AssertionError, ValueError) as error:  # max_gen_toks, few-shot examples, ...
            reason = str(error) or "a choice has no tokens, or more than the model has positions"
            raise InvalidDataError(
                f"lm-eval cannot run these tasks ({', '.join(tasks)}) on this model: "
                f"{reason.rstrip('.')}. The model takes {lm.max_length} tokens; leave such a task "
                "out, or give its definition as a dict with other settings."
            ) from error
    if found is None:
        raise ProcessGroupError(
            "lm-eval gives results to the first process of a machine alone: start one process, or "
            "call this within processes.group()."
        )
    shared = {
        "limit": settings["limit"],
        "seed": seed,
        "apply_chat_template": settings["apply_chat_template"],
        "lm_eval": __version__,
    }
    return {name: _result(name, found, shared) for name in tasks}


def _result(name: str, found: Mapping[str, Any], shared: Mapping[str, Any]) -> TaskResult:
    """A task's result from what `simple_evaluate` gives."""
    samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    by_filter: dict[str, list[Any]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    config = found["configs"][name]
    choosing = config["output_type"] == "multiple_choice"
    if config["output_type"] != "generate_until":
        _check_finite(name, samples)
    scores: dict[str, list[float]] = {}
    floors: dict[str, float] = {}
    for key, mean in found["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or not found["higher_is_better"][name].get(metric):
            continue
        values = [sample[metric] for sample in by_filter[kind]]
        if not all(_is_score(value) for value in values):
            continue
        values = [float(value) for value in values]
        if not math.isclose(math.fsum(values) / len(values), mean, abs_tol=1e-9):
            continue
        shown = metric if kind == "none" else f"{metric} ({kind})"
        scores[shown] = values
        if choosing and metric in ("acc", "acc_norm", "acc_bytes"):
            floors[shown] = statistics.fmean(map(_chance, by_filter[kind]))
    if not scores:
        raise InvalidDataError(
            f"Task {name!r} has no score in [0, 1] per item (its metrics: "
            f"{', '.join(found['higher_is_better'][name])}): leave it out. For running text use "
            "perplexity()."
        )
    return TaskResult(
        name=name,
        scores=scores,
        items=[str(sample["doc_hash"]) for sample in next(iter(by_filter.values()))],
        floors=floors,
        version=str(found["versions"][name]),
        settings={"num_fewshot": found["n-shot"][name], **shared},
    )


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1  # numpy's numbers are floats, too


def _chance(sample: Mapping[str, Any]) -> float:
    """How often a choice taken blindly is the target, or one of them."""
    target = sample["target"]
    return (len(target) if isinstance(target, list) else 1) / len(sample["resps"])


def _check_finite(name: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise NonFiniteError if a log-likelihood is not finite: the greatest of them would be NaN."""
    bad = [
        sample["doc_id"]
        for sample in samples
        for response in sample["resps"]
        if not math.isfinite(response[0][0] if isinstance(response[0], tuple) else response[0])
    ]
    if bad:
        raise NonFiniteError(
            f"Task {name!r}: the log-likelihood of {len(set(bad))} of {len(samples)} items is NaN "
            f"or infinite (items {sorted(set(bad))[:10]}): the model's weights or {HINT}"
        )


@contextlib.contextmanager
def _refusing_nan(model: torch.nn.Module) -> Iterator[None]:
    """Raise NonFiniteError where the logits of a batch's last token are NaN: as when generating."""

    def check(_module: Any, _args: Any, output: Any) -> None:
        if bool(output.logits[:, -1].isnan().any()):
            raise NonFiniteError(f"The model's logits are NaN: its weights or {HINT}")

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random generators seeded; as they were afterwards."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No notes of lm-eval, and its progress bars on a terminal alone."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    shown = sys.stderr.isatty()
    try:
        with contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
