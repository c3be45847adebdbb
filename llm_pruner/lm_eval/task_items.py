"""Tasks of lm-eval as items that choose layers, and that compare models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..distributed import on_first
from ..utils import at_least_one
from .harness import contained, load_task, require_lm_eval, run_harness
from .task_results import TaskResult, read_results

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LmEvalTasks:
    """Tasks of lm-eval whose items serve two purposes: choosing layers, and comparing models.

    The object itself is an objective (`search.objectives.register_objective`): called with a model,
    its tokenizer and some of the items it gives each a score. Of a multiple-choice task that is the
    probability of the right choice among the choices, exp(log-likelihood) in proportion, which
    tells sets of layers apart on fewer items than right and wrong do; of any other task it is the
    score of its first metric.

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
        with contained(seed):
            for task in tasks:
                path = Path(task)
                rows = path.suffix in (".jsonl", ".json")
                self._loaded |= load_task(path.stem, path.parent) if rows else load_task(task, None)
            for one in self._loaded.values():
                _configure(one, num_fewshot, seed)
        self.items: list[dict[str, Any]] = []
        self._right: dict[tuple[str, int], Collection[int]] = {}
        for name, task in self._loaded.items():
            for place, doc in enumerate(list(task.eval_docs)[:limit]):
                self.items.append(_asked(name, task, place, doc))
                if task.OUTPUT_TYPE == "multiple_choice":
                    self._right[name, place] = _right(task, doc)

    def __repr__(self) -> str:
        versions = {name: str(task.VERSION) for name, task in self._loaded.items()}
        return f"LmEvalTasks({versions}, {self._settings}, {self._num_fewshot})"

    def __call__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Any]
    ) -> list[float]:
        """A score in [0, 1] for each item."""
        scores: dict[tuple[str, int], float] = {}
        places = self._places(items)
        for name, result in self.results(model, tokenizer, items).items():
            found = result.item_scores
            if result.likelihoods:
                right = [self._right[name, place] for place in places[name]]
                found = list(map(_chance, result.likelihoods, right))
            scores |= zip(((name, place) for place in places[name]), found, strict=True)
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
            with contained(self._settings["seed"]):
                found = run_harness(model, tokenizer, loaded, self._batch_size, places=places)
            return read_results(found, loaded, self._settings)

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


def _right(task: Any, doc: Any) -> Collection[int]:
    """Places of the right ones among the choices of a document, as lm-eval finds them.

    It warns of a document none of whose choices is the right one, and scores it 0.
    """
    choices = list(task.doc_to_choice(doc))
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(target, str):
        target = choices.index(target) if target in choices else len(choices)
    places = target if isinstance(target, list) else [target]
    return {place for place in places if place < len(choices)}


def _chance(likelihoods: Sequence[float], right: Collection[int]) -> float:
    """The probability of the right choices, given log-likelihoods of them all."""
    chances = torch.tensor(likelihoods, dtype=torch.float64).softmax(0)
    return float(chances[sorted(right)].sum())
