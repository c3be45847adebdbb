"""lm-eval, EleutherAI's evaluation harness, run on a model in memory.

Written for lm-eval 0.4.13 (extra ``eval``), imported when the first task runs. Its ``use_cache``
stays off: it identifies a model by name, and a pruned model in memory has the original's.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import io
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from ..utils import at_least_one, quiet_logger
from .task_results import TaskResult, read_results

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Task = str | Mapping[str, Any]
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


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
        with contained(seed):
            loaded: dict[str, Any] = {}
            for task in tasks:
                loaded |= load_task(task, None if data is None else Path(data))
            found = run_harness(model, tokenizer, loaded, batch_size, options)
        return read_results(found, loaded, {**settings, "seed": seed})

    return on_first(work)


def require_lm_eval() -> None:
    """Raise MissingDependencyError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "Tasks of lm-eval need lm-eval: pip install 'llm_pruner[eval]', or use the built-in "
            "scorer (backend='built-in')."
        )


def load_task(task: Task, folder: Path | None) -> dict[str, Any]:
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


def run_harness(
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


@contextlib.contextmanager
def contained(seed: int) -> Iterator[None]:
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
