"""What each process of tests/test_distributed.py runs; each writes its results to its own file.

torchrun ... tests/worker.py TASK FOLDER [arguments of the command]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, items, time_shortly, tiny_llama, word_tokenizer

from llm_pruner import BasePruner, cli, distributed, get_strategy, workflow
from llm_pruner.checkpoint import save
from llm_pruner.errors import InvalidPlanError, LLMPrunerError, ProcessGroupError
from llm_pruner.model.loading import model_fingerprint
from llm_pruner.pruners.measured import MeasuredPruner
from llm_pruner.search import journal

ODD = 11  # items; in batches of 2 they cannot be divided evenly
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("pruneme", {}),
    ("bi", {}),
    ("avss", {}),
    *(("avss", {"variant": "published", "pool": pool, "epsilon": 0.1})
      for pool in ("sequence", "none")),
    ("ablation", {}),
    ("ablation", {"objective": "nll=0.5,kl=0.5"}),
    ("smart", {}),
    ("ablation", {"objective": f"{Path(__file__).with_name('own_objectives.py')}:likelihood"}),
]  # fmt: skip


class SmallestUpdate(BasePruner):
    """A strategy that is not aware of several processes."""

    def description(self) -> str:
        return "The strategy of CONTRIBUTING.md."

    def compute_layer_scores(self, eval_data: Sequence[Any]) -> dict[int, float]:
        total = [0.0] * self.num_layers
        for states, real in self.hidden_states(eval_data):
            for i in range(self.num_layers):
                total[i] += (states[i + 1] - states[i])[real].norm(dim=-1).sum().item()
        return dict(enumerate(total))


def found(journal: Path | None = None) -> dict[str, Any]:
    """The exact scores of every strategy, the plan of `smart`, and the measurements made here."""
    model, tokenizer = tiny_llama(), word_tokenizer()
    results: dict[str, Any] = {"scores": {}, "measured": {}}
    for n_items in (ODD, 1):
        for name, options in VARIANTS:
            pruner = get_strategy(name)(model, tokenizer, batch_size=2, **options)
            scores = pruner.compute_layer_scores(items(n_items))
            key = f"{n_items} {name} {options}"
            results["scores"][key] = [scores[i].hex() for i in range(N_LAYERS)]
            if isinstance(pruner, MeasuredPruner):
                results["measured"][key] = pruner.quality(items(n_items)).measured
    own = SmallestUpdate(model, tokenizer, batch_size=2).compute_layer_scores(items(ODD))
    results["scores"]["own"] = [own[i].hex() for i in range(N_LAYERS)]
    smart = get_strategy("smart")(model, tokenizer, batch_size=2, journal=journal)
    plan = smart.plan(items(48), n_layers=3, held_out=items(60)[48:])
    results["plan"] = json.loads(plan.to_json())
    results["search"] = smart.quality(items(48)).measured
    return results


def library(folder: Path) -> None:
    """What the library finds and what `on_first` does, in one of several processes."""
    with distributed.group(60):
        results = found(folder / "journal.jsonl")
        results["alone"] = distributed.on_first(
            lambda: [
                os.environ["RANK"],
                distributed.gather("x"),
                list(distributed.portion([1, 1, 1])),
            ]
        )

        def fail() -> None:
            raise InvalidPlanError("only the first knows")

        def break_down() -> None:
            raise ZeroDivisionError("a fault")

        results["errors"] = []
        for work in (fail, break_down):
            try:
                distributed.on_first(work)
            except (LLMPrunerError, ZeroDivisionError) as error:
                results["errors"].append(f"{type(error).__name__}: {error}")
        results["portion"] = list(distributed.portion([5, 1, 1, 1, 1, 1]))
        measure = get_strategy("ablation")(tiny_llama(), word_tokenizer()).quality(items()).measure
        try:
            measure([(distributed.rank(),)])  # a different set in each
        except ProcessGroupError as error:
            results["errors"].append(str(error))
        results["after"] = distributed.gather(distributed.rank())
    write(folder, results)


def command(folder: Path) -> None:
    """The whole command; which model this process ends with."""
    results: dict[str, Any] = {}
    carry_out = workflow.carry_out

    def watched(*args: Any, **kwargs: Any) -> Any:
        report, pruned = carry_out(*args, **kwargs)
        results.update(model=model_fingerprint(pruned), report=json.loads(report.to_json()))
        return report, pruned

    workflow.carry_out = watched  # type: ignore[assignment]
    results["code"] = cli.main(sys.argv[3:])
    write(folder, results)
    sys.exit(results["code"])


def second_stops(folder: Path, how: Callable[[], None], after: int) -> None:
    """The command; its second process stops in the middle of its measurements."""
    append = journal.Journal.append
    measured = 0

    def counting(*args: Any) -> None:
        nonlocal measured
        measured += 1
        if distributed.rank() == 1 and measured > after:
            how()
        append(*args)

    journal.Journal.append = counting  # type: ignore[method-assign]
    command(folder)


def disk_is_full(*args: Any) -> None:
    """What writing a model to a full disk does."""
    raise OSError(28, "No space left on device")


def write(folder: Path, results: dict[str, Any]) -> None:
    """Save the results of this process."""
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    time_shortly(pytest.MonkeyPatch())
    task, place = sys.argv[1], Path(sys.argv[2])
    if task == "library":
        library(place)
    elif task == "killed":
        second_stops(place, lambda: os.kill(os.getpid(), signal.SIGKILL), after=25)
    elif task == "hung":
        second_stops(place, lambda: time.sleep(600), after=25)
    elif task == "full":
        save.write_model = disk_is_full
        command(place)
    else:
        command(place)
