"""What the ``llm-pruner`` command was asked for, checked as a whole: options that go together.

Nothing heavy is imported here, so that mistakes are answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import InvalidPlanError
from .goals.budget import AMOUNTS, Budget
from .healing.lora_settings import TRAININGS

TASKS = "tasks"  # --objective: the scores of --tasks
OWN_WORDS = "self"  # --heal-data: what the model itself writes


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; the fields are its options.

    Attributes:
        budget: how much to remove, and the goals: ``--ratio`` to ``--tolerance``.
        option: options of the strategy's class, by name.
        words: the command line itself.

    Raises:
        InvalidPlanError: options that exclude each other, or that would have no effect.
    """

    model: str
    device: str | None
    max_memory: int | None
    dtype: str
    trust_remote_code: bool
    layers_path: str | None
    eval_dataset: str | None
    fields: dict[str, str] | None
    n_samples: int | None
    n_tokens: int | None
    max_length: int
    batch_size: int
    seed: int
    timeout: float
    strategy: str
    budget: Budget
    sweep: int | None
    layers: tuple[int, ...] | None
    plan: str | None
    protect: tuple[int, int] | None
    serve_with: tuple[str, ...]
    objective: str | None
    tasks: tuple[str, ...]
    option: dict[str, Any]
    heal_every: int | None
    time: float | None
    resume: bool
    output: str
    overwrite: bool
    heal: Literal["none", "linear", "lora", "full"]
    heal_data: str | None
    heal_steps: int | None
    heal_tokens: int | None
    heal_time: float | None
    export_yaml: str | None
    push_to_hub: str | None
    visualize: bool
    verify: bool
    link: bool
    drop_mtp: bool
    fix_gguf: str | None
    show: str | None
    dry_run: bool
    estimate: bool
    json: bool
    quiet: bool
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.show is not None:
            _check_alone("--show", self.show, self.words)
            return
        if not self.model:
            raise InvalidPlanError(
                "--model is required: name a folder, a GGUF file, a hub id, or demo; see "
                "llm-pruner --help."
            )
        named: dict[str, Any] = {
            "--layers": self.layers,
            "--plan": self.plan,
            "--sweep": self.sweep,
            "--fix-gguf": self.fix_gguf,
        }
        named |= {_option(name): getattr(self.budget, name) for name in AMOUNTS}
        _exclusive(named)
        _exclusive({"--heal-every": self.heal_every, "--sweep": self.sweep})
        _exclusive(
            {"--max-memory": self.max_memory, "--device auto": self.device == "auto" or None}
        )
        sweeps = self.sweep is not None
        no_healing = "without --heal linear, lora or full"
        given = "--layers" if self.layers is not None else "--plan"
        is_given = self.layers is not None or self.plan is not None
        of_what, context, sure = map(self.budget.given.get, ("ratio_of", "context", "confident"))
        nothing_compared = (self.dry_run or sweeps) and not self.chooses_on_tasks
        no_data = self.eval_dataset is None and self.heal_data is None
        tolerance = self.budget.tolerance
        goals = [(_option(name), value) for name, value in self.budget.goals.items()]
        others: list[tuple[str, Any]] = [
            ("--eval-dataset", self.eval_dataset),
            ("--tasks", self.tasks or None),
            ("--export-yaml", self.export_yaml),
            ("--heal", None if self.heal == "none" else self.heal),
            ("--push-to-hub", self.push_to_hub),
            ("--serve-with", self.serve_with or None),
            ("--dry-run", self.dry_run or None),
        ]
        for name, value, has_none, reason in (
            ("--fields", self.fields, no_data, "without --eval-dataset"),
            ("--tasks", self.tasks or None, nothing_compared, "with --dry-run, or --sweep"),
            ("--heal-data", self.heal_data, self.heal == "none", no_healing),
            ("--heal-every", self.heal_every, self.heal == "none", no_healing),
            ("--heal-tokens", self.heal_tokens, self.heal == "none", no_healing),
            ("--heal-time", self.heal_time, self.heal == "none", no_healing),
            ("--heal-steps", self.heal_steps, not self.trains, "without --heal lora or full"),
            ("--tolerance", tolerance, is_given, f"with {given}"),
            ("--objective", self.objective, is_given, f"with {given}"),
            ("--tolerance", tolerance, sweeps, "with --sweep"),
            ("--export-yaml", self.export_yaml, sweeps, "with --sweep"),
            ("--heal", None if self.heal == "none" else self.heal, sweeps, "with --sweep"),
            ("--push-to-hub", self.push_to_hub, self.dry_run, "with --dry-run"),
            ("--push-to-hub", self.push_to_hub, sweeps, "with --sweep"),
            ("--drop-mtp", self.drop_mtp or None, sweeps, "with --sweep"),
            *((name, value, is_given, f"with {given}") for name, value in goals),
            *((name, value, sweeps, "with --sweep") for name, value in goals),
            *(
                (name, value, self.fix_gguf is not None, "with --fix-gguf")
                for name, value in [*goals, *others]
            ),
            ("--ratio-of", of_what, self.budget.ratio is None, "without --ratio"),
            ("--context", context, self.budget.target_memory is None, "without --target-memory"),
            ("--confident", sure, self.budget.max_drop is None, "without --max-drop"),
        ):
            if value is not None and has_none:
                raise InvalidPlanError(f"{name} has no effect {reason}: leave it out.")
        if self.estimate and (not self.chooses or sweeps):
            raise InvalidPlanError(
                "--estimate is for a choice of layers, by a strategy and an amount: leave it out."
            )
        if self.estimate and self.heal_data == OWN_WORDS:
            raise InvalidPlanError(
                f"--estimate cannot say what --heal-data {OWN_WORDS} takes: the model has to write "
                "its answers first. Leave either out; --heal-time limits both."
            )
        if self.chooses_on_tasks and not self.tasks:
            raise InvalidPlanError(f"--objective {TASKS} needs --tasks, which name them.")
        if self.time is not None and (self.strategy != "smart" or is_given or sweeps):
            raise InvalidPlanError("--time is for a search by --strategy smart: leave it out.")
        if self.heal_every is not None and (self.strategy != "smart" or is_given):
            raise InvalidPlanError("--heal-every is for layers that --strategy smart chooses.")
        for name in ("verify", "link"):
            if getattr(self, name) and self.needs_model:
                raise InvalidPlanError(
                    f"--{name} is for pruning on disk, by --layers or --plan without anything "
                    "that needs the model in memory: leave it out."
                )

    @property
    def _objectives(self) -> list[str]:
        """The names of objectives."""
        return [part.partition("=")[0].strip() for part in (self.objective or "").split(",")]

    @property
    def own_objectives(self) -> list[str]:
        """The objectives that are in files of the user's, ``FILE.py:NAME``."""
        return [name for name in self._objectives if ":" in name]

    @property
    def chooses_on_tasks(self) -> bool:
        """Whether layers are chosen by the scores of ``--tasks``."""
        return TASKS in self._objectives

    @property
    def chooses(self) -> bool:
        """Whether layers are to be chosen, by scores or a search."""
        return self.layers is None and self.plan is None and self.fix_gguf is None

    @property
    def trains(self) -> bool:
        """Whether healing is a training."""
        return self.heal in TRAININGS

    @property
    def needs_model(self) -> bool:
        """Whether something is asked for that needs the model in memory."""
        loads = self.dtype != "auto" or self.layers_path is not None or self.dry_run
        measures = self.eval_dataset is not None or bool(self.tasks) or self.visualize
        recipe = self.export_yaml is not None
        return self.chooses or loads or measures or recipe or self.heal != "none"

    @property
    def keeps_journal(self) -> bool:
        """Whether measurements are kept beside the output; a dry run does where it can."""
        folder = self.beside("journal.jsonl").parent
        if self.dry_run and not self.resume and self.beside("journal.jsonl").exists():
            return False  # it is of another run, to be read with --resume
        writable = not self.dry_run or os.access(folder, os.W_OK)
        return self.chooses and not self.estimate and writable

    @property
    def writes_nothing(self) -> bool:
        """Whether only a plan, or an estimate, is asked for."""
        return self.dry_run or self.estimate

    @property
    def writes_model(self) -> bool:
        """Whether the output folder is written."""
        return not self.writes_nothing and self.sweep is None and self.fix_gguf is None

    def beside(self, ending: str) -> Path:
        """A file beside the output folder, named after it."""
        return Path(f"{self.output}.{ending}")


def _check_alone(option: str, value: str, words: Sequence[str]) -> None:
    """Refuse other options beside one that goes alone, but for how it is printed."""
    known = (option, f"{option}={value}", value, "--json", "--quiet")
    if others := [word for word in words if word not in known]:
        raise InvalidPlanError(f"{option} goes alone, or with --json: leave out {others[0]}.")


def _option(name: str) -> str:
    """An option of the command, by the name of what it gives."""
    return f"--{name.replace('_', '-')}"


def _exclusive(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InvalidPlanError(f"{' and '.join(given)} exclude each other: give one.")
