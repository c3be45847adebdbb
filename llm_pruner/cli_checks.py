"""What a request of the command needs, checked before anything heavy is loaded."""

from __future__ import annotations

import importlib.util
import sys

from .atomic_output import check_output, own_checkpoints
from .cli_request import OWN_WORDS, Request
from .distributed import on_first
from .errors import LoadError, MissingDependencyError, OutputError, UnsupportedModelError
from .hub import check_upload
from .output_rules import check_file as check_output_file
from .output_rules import is_curve, is_plan, is_recipe
from .plugins import check_file
from .pruners.registry import check_strategy_name
from .search.journal import Journal
from .storage.gguf_models import find_gguf
from .utils import resolve_model_id, user_path

TASK_FILES = (".yaml", ".yml", ".jsonl", ".json")


def check_request(request: Request) -> None:
    """Refuse what this machine cannot do, before anything is loaded.

    Raises:
        UnknownNameError, LoadError: no such strategy.
        MissingDependencyError: an optional package, or docstrings, are needed.
        OutputError, HubError: the output cannot be written or uploaded.
        UnsupportedModelError, LoadError: not with a model in GGUF, or there is no such file.
    """
    if sys.flags.optimize > 1:
        raise MissingDependencyError(
            "python -OO (or PYTHONOPTIMIZE=2) removes the docstrings, which transformers reads: "
            "use -O, or neither."
        )
    check_strategy_name(request.strategy)
    for name in request.own_objectives:
        check_file(name, "objective")
    if request.output.endswith(".gguf"):
        raise OutputError(
            f"--output {request.output} must be a folder, into which a pruned GGUF is written with "
            "its plan and card: name one without .gguf."
        )
    of_file = request.budget.target_size is not None and request.heal != "none"
    for name, asked, why in (
        ("--max-memory", request.max_memory is not None, "it is dequantised as a whole"),
        ("--export-yaml", request.export_yaml is not None, "MergeKit does not read it"),
        ("--target-size with --heal", of_file, "healed weights are not written in its precision"),
    ):
        if asked and find_gguf(request.model):
            raise UnsupportedModelError(
                f"{name} is not for a model in GGUF: {why}. Leave {name.split()[0]} out."
            )
    if request.heal == "lora" and importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("--heal lora needs peft: pip install 'llm_pruner[heal]'.")
    if request.tasks:
        if importlib.util.find_spec("lm_eval") is None:
            raise MissingDependencyError("--tasks needs lm-eval: pip install 'llm_pruner[eval]'.")
        files = [name for name in request.tasks if name.endswith(TASK_FILES)]
        if absent := [name for name in files if not user_path(name).is_file()]:
            raise LoadError(f"--tasks {absent[0]}: there is no such file.")
    if (repo_id := request.push_to_hub) is not None:
        on_first(lambda: check_upload(repo_id))
    on_first(lambda: _check_files(request))


def _check_files(request: Request) -> None:
    """Refuse outputs that cannot be written, or that would replace what they may not."""
    code = [name.rpartition(":")[0] for name in (request.strategy, *request.own_objectives)]
    heal_data = None if request.heal_data == OWN_WORDS else request.heal_data
    sources = [request.plan, request.eval_dataset, heal_data, request.fix_gguf, *code]
    reads = [resolve_model_id(request.model), *filter(None, sources)]
    if user_path(request.model).resolve() == user_path(request.output).resolve():
        raise OutputError(f"--output {request.output} is the model itself: choose another folder.")
    if request.writes_model:
        check_output(request.output, overwrite=request.overwrite, reads=reads)
    if request.keeps_journal:
        Journal(request.beside("journal.jsonl")).check()
    if request.writes_nothing:
        return
    if request.trains:
        own_checkpoints(request.beside("healing"))
    if request.chooses:
        check_output_file(request.beside("partial_plan.json"), is_plan, reads=reads)
    if request.sweep is not None:
        for ending in ("curve.json", "curve.png"):
            check_output_file(request.beside(ending), is_curve, reads=reads)
    if request.export_yaml is not None:
        check_output_file(request.export_yaml, is_recipe, reads=reads)
