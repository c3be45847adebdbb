"""An adapter to lm-eval, EleutherAI's evaluation harness: tasks run on a model in memory.

Written for lm-eval 0.4.13 (extra ``eval``), imported when the first task runs. Its ``use_cache``
stays off: it identifies a model by name, and a pruned model in memory has the original's.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.metadata
import importlib.util
import io
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

from ..chat_template import render_within_limits
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
from ..utils import at_least_one, quiet_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Task = str | Mapping[str, Any]
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
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
        return {metric: math.fsum(each) / len(each) for metric, each in self.scores.items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Standard error of the mean by metric; 0 for a single item."""
        return {
            metric: statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0
            for metric, each in self.scores.items()
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
    """Run tasks of lm-eval on a model in memory.

    Of several processes that work together only the first runs them.

    Args:
        model: a causal language model of transformers; it stays where and as it is.
        tokenizer: its tokenizer; it is not changed.
        tasks: names that lm-eval knows (a group or tag stands for its tasks), paths of task
            definitions (``.yaml``), or definitions as dicts.
        data: a folder with the items of every named task, ``TASK.jsonl`` or ``TASK.json``, rows as
            in the task's own dataset; few-shot examples are other rows of that file. The
            datasets of the hub if None.
        batch_size: sequences per forward pass.
        num_fewshot: examples before every question; the task's own number if None.
        limit: use only the first items of each task, so many; all if None.
        seed: of the few-shot examples and everything else a task draws.
        apply_chat_template: put the tokenizer's chat template around the prompts, which lm-eval
            does not do by default.

    Returns:
        A result per task, in the order of `tasks`.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: lm-eval has no such task.
        LoadError: a task's data cannot be loaded, or the chat template cannot be used.
        InvalidDataError: an impossible count, a task without a score in [0, 1] per item, a task
            that does not fit the model, or a group where `data` is given.
        NonFiniteError: the model's logits are not finite.
        ProcessGroupError: a process other than the first, outside of a process group.
    """
    at_least_one(batch_size=batch_size, limit=1 if limit is None else limit)
    if num_fewshot is not None and num_fewshot < 0:
        raise InvalidDataError(f"num_fewshot={num_fewshot} must be at least 0.")
    if isinstance(tasks, str) or not tasks:
        raise InvalidDataError(f"tasks={tasks!r} must be a list of one or more tasks.")
    require_lm_eval()
    settings = {"limit": limit, "apply_chat_template": apply_chat_template}
    options = {"num_fewshot": num_fewshot, **settings, **dict.fromkeys(SEEDS, seed)}

    def work() -> dict[str, TaskResult]:
        with _contained(seed):
            loaded: dict[str, Any] = {}
            for task in tasks:
                loaded |= _load(task, None if data is None else Path(data))
            found = _evaluate(model, tokenizer, loaded, batch_size, options)
        return _results(found, loaded, {**settings, "seed": seed})

    return on_first(work)


def _results(
    found: Mapping[str, Any], loaded: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, TaskResult]:
    shared = {**settings, "lm_eval": importlib.metadata.version("lm_eval")}
    return {name: _result(name, found, shared) for name in loaded}


class LmEvalTasks:
    """Tasks of lm-eval whose items serve two purposes: choosing layers, and comparing models.

    The object itself is an objective: called with a model, its tokenizer and some of the items it
    gives each the score of its task's first metric (`search.objectives.register_objective`).

    Args:
        tasks: names, groups and ``.yaml`` files as in `run_tasks`, or files of rows,
            ``FOLDER/TASK.jsonl``, for the task of that name.
        limit: use only the first items of each task, so many; all if None.
        seed, batch_size, num_fewshot: as in `run_tasks`.

    Attributes:
        items: what the tasks ask: `task`, `prompt`, `reference`, perhaps `choices`, and `doc`,
            its place in the task.

    Raises:
        As `run_tasks` before it runs anything.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        limit: int | None = None,
        seed: int = 1234,
        batch_size: int = 8,
        num_fewshot: int | None = None,
    ) -> None:
        require_lm_eval()
        at_least_one(batch_size=batch_size, limit=1 if limit is None else limit)
        self._batch_size, self._num_fewshot = batch_size, num_fewshot
        self._settings: dict[str, Any] = {
            "limit": limit,
            "apply_chat_template": False,
            "seed": seed,
        }
        self._loaded: dict[str, Any] = {}
        with _contained(seed):
            for task in tasks:
                path = Path(task)
                rows = path.suffix in (".jsonl", ".json")
                self._loaded |= _load(path.stem, path.parent) if rows else _load(task, None)
            for one in self._loaded.values():
                _configure(one, num_fewshot, seed)
        self.items: list[dict[str, Any]] = []
        for name, task in self._loaded.items():
            docs = list(task.eval_docs)[:limit]
            self.items += [_asked(name, task, place, doc) for place, doc in enumerate(docs)]

    def __repr__(self) -> str:
        versions = {name: str(task.VERSION) for name, task in self._loaded.items()}
        return f"LmEvalTasks({versions}, {self._settings}, {self._num_fewshot})"

    def __call__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Any]
    ) -> list[float]:
        """The score of each item by its task's first metric."""
        results = self.results(model, tokenizer, items)
        scores = {
            (name, place): score
            for name, result in results.items()
            for place, score in zip(self._places(items)[name], result.item_scores, strict=True)
        }
        return [scores[item["task"], item["doc"]] for item in items]

    def results(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, TaskResult]:
        """What lm-eval measures on these items, all if None; see `run_tasks`."""
        places = self._places(self.items if items is None else items)
        loaded = {name: task for name, task in self._loaded.items() if name in places}

        def work() -> dict[str, TaskResult]:
            with _contained(self._settings["seed"]):
                found = _evaluate(model, tokenizer, loaded, self._batch_size, places=places)
            return _results(found, loaded, self._settings)

        return on_first(work)

    @staticmethod
    def _places(items: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
        """The places of items in their tasks, ascending, as lm-eval goes through them."""
        places: dict[str, list[int]] = {}
        for item in items:
            places.setdefault(item["task"], []).append(item["doc"])
        return {name: sorted(each) for name, each in places.items()}


def _configure(task: Any, num_fewshot: int | None, seed: int) -> None:
    """Give a task the settings that `simple_evaluate` gives it."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def _asked(name: str, task: Any, place: int, doc: Any) -> dict[str, Any]:
    """A task's item as this package has items, for what else is done with them."""
    prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
    item: dict[str, Any] = {"task": name, "doc": place}
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
    if choices:
        item["choices"] = [str(choice).strip() for choice in choices]
        target = item["choices"][target] if isinstance(target, int) else target
    if isinstance(target, list):
        target = target[0] if target else ""
    item["prompt"] = str(prompt).strip() or f"{name} {place}"
    item["reference"] = str(target).strip() or "-"
    if choices and item["reference"] not in item["choices"]:
        del item["choices"]  # the prompt is what differs, as in WinoGrande
    return item


def require_lm_eval() -> None:
    """Raise MissingDependencyError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "Tasks of lm-eval need lm-eval: pip install 'llm_pruner[eval]', or use the built-in "
            "scorer (backend='built-in')."
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


def _load(task: Task, folder: Path | None) -> dict[str, Any]:
    """The tasks that `task` stands for, by name, as objects of lm-eval with their items."""
    named = isinstance(task, str) and not task.endswith((".yaml", ".yml"))
    source = f" from folder {str(folder)!r}" if named and folder else ""
    if isinstance(task, str):
        name, spec = task, _named(task, folder) if named else task
    else:
        name, spec = task.get("task", "(a dict without 'task')"), copy.deepcopy(dict(task))
    try:
        loaded: dict[str, Any] = _manager(named).load([spec])["tasks"]
    except Exception as error:  # whatever datasets, jinja2 or a task's own code raise
        reason = " ".join(str(error).split())
        raise LoadError(
            f"Cannot load task {name!r}{source}: {type(error).__name__}: {reason:.300} Rows need "
            "the fields of the task's own dataset. Without a network give a folder with a file "
            "of rows for every task (data=)."
        ) from error
    return loaded


@cache
def _manager(defaults: bool) -> Any:
    """lm-eval's list of tasks; reading all those that come with it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _named(name: str, folder: Path | None) -> str | dict[str, Any]:
    """A task that comes with lm-eval: its name, or a definition that reads items from a folder."""
    manager = _manager(True)
    if name not in (known := manager.all_tasks):
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownNameError(
            f"lm-eval has no task {name!r}.{hint} All {len(known)}: lm-eval ls tasks."
        )
    if folder is None:
        return name
    if name not in manager.all_subtasks:
        raise InvalidDataError(
            f"{name!r} is a group of tasks of lm-eval: with your own items name single tasks."
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
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": "test",
    }
    # Within a group a dict builds on the task it names; alone it does not.
    return {"group": f"{name} of {folder.name}", "task": [{"task": name, **rows}]}


def _evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    batch_size: int,
    options: Mapping[str, Any] | None = None,
    places: Mapping[str, list[int]] | None = None,
) -> dict[str, Any]:
    """What `simple_evaluate` returns for one model.

    With `places`, of tasks that `_configure` has configured, it is what `evaluate` returns, which
    knows the same of the items, and does not spend seconds to describe the machine.
    """
    from lm_eval import evaluate, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    def refuse_nan(_module: Any, _args: Any, output: Any) -> None:
        if bool(output.logits[:, -1].isnan().any()):  # of a batch's last token, as in generation
            raise NonFiniteError(f"The model's logits are NaN: its weights or {HINT}")

    own = copy.deepcopy(tokenizer)  # it is given a padding token
    with evaluating(model), contextlib.ExitStack() as cleanup:
        cleanup.callback(model.register_forward_hook(refuse_nan).remove)
        lm: Any = HFLM(pretrained=model, tokenizer=own, batch_size=batch_size)
        apply = lm.apply_chat_template
        lm.apply_chat_template = lambda *args, **more: render_within_limits(
            lambda: apply(*args, **more)
        )
        try:
            found: dict[str, Any] | None
            if places is not None:
                found = evaluate(
                    lm,
                    {"tasks": dict(tasks), "groups": {}},
                    samples=dict(places),
                    bootstrap_iters=0,
                    fewshot_as_multiturn=True,
                )
            else:
                found = simple_evaluate(
                    lm,
                    tasks=list(tasks.values()),
                    task_manager=_manager(False),
                    batch_size=batch_size,
                    bootstrap_iters=0,
                    **(options or {}),
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
            "lm-eval returns results only in the first process of a machine: start one process, "
            "or call this within distributed.group()."
        )
    return found


def _result(name: str, found: Mapping[str, Any], shared: Mapping[str, Any]) -> TaskResult:
    """A task's result from what `simple_evaluate` returns."""
    samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    by_filter: dict[str, list[Any]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    output_type = found["configs"][name]["output_type"]
    if output_type != "generate_until":
        _check_finite(name, samples)
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
        if output_type == "multiple_choice" and metric in CHOICE_METRICS:
            targets = [(sample["target"], len(sample["resps"])) for sample in by_filter[kind]]
            floors[shown] = statistics.fmean(
                (len(right) if isinstance(right, list) else 1) / choices
                for right, choices in targets
            )
    if not scores:
        raise InvalidDataError(
            f"Task {name!r} has no score in [0, 1] per item (its metrics: "
            f"{', '.join(found['higher_is_better'][name])}): leave it out. For running text use "
            "perplexity()."
        )
    items = [str(sample["doc_hash"]) for sample in next(iter(by_filter.values()))]
    settings = {"num_fewshot": found["n-shot"][name], **shared}
    return TaskResult(name, scores, items, floors, str(found["versions"][name]), settings)


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


@contextlib.contextmanager
def _contained(seed: int) -> Iterator[None]:
    """lm-eval seeded without effect on others, silent but for errors, bars on a terminal only."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    shown = sys.stderr.isatty()
    silence = contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO())
    with torch.random.fork_rng(), quiet_logger("lm_eval"), silence:
        for seed_one in (random.seed, numpy.random.seed, torch.manual_seed):
            seed_one(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
