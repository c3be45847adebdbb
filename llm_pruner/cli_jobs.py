"""The jobs of the ``llm-pruner`` command: what it does with a request that has been checked.

Knows nothing a script could not call. Everything heavy is imported where it is used.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic_output import clear_checkpoints
from .cli_request import OWN_WORDS, TASKS, Request
from .distributed import on_first, rank
from .errors import InvalidPlanError, LLMPrunerError, LoadError, UnknownNameError
from .output_rules import FIGURES, MANIFEST_FILE, PAGE_FILE, PLAN_FILE, REPORT_FILE
from .pruners.registry import get_strategy, option_names
from .report.console import (
    curve_text,
    manifest_text,
    output_text,
    plan_text,
    report_text,
    saved_text,
)
from .results import PruningPlan, PruningReport
from .search.journal import Journal
from .streams import say, say_aside
from .utils import DEMO_MODEL, count_bytes, format_bytes, logger, user_path

if TYPE_CHECKING:
    from .data.sampling import DataSplit
    from .healing.lora_settings import LoraSettings
    from .lm_eval.task_items import LmEvalTasks
    from .pruners.base import BasePruner

N_SAMPLES, N_TOKENS = 80, 4096  # to choose layers on, at most, unless one of them is given
LEAST_TOKENS = 32  # of an item, where a number of tokens is asked for
WRITING = 1 / 3  # of the time for healing, where the model writes what it is healed with
CHARACTERS = 4  # of a token of running text, about


def show_output(request: Request, folder: str) -> None:
    """Print what was done to the model in a folder."""
    from .storage.manifest import Manifest

    path = user_path(folder)
    if not path.is_dir():
        raise LoadError(f"There is no folder {folder}.")
    if not (path / PLAN_FILE).is_file():
        raise LoadError(f"{folder} has no {PLAN_FILE}, so llm-pruner has not made it.")
    plan = PruningPlan.load(path / PLAN_FILE)
    report, manifest = path / REPORT_FILE, path / MANIFEST_FILE
    measured = PruningReport.load(report) if report.is_file() else None
    copied = Manifest.load(manifest) if manifest.is_file() else None
    text = output_text(plan, measured, copied, folder)
    say((measured or plan).to_json() if request.json else text)


def fix_converted(request: Request, path: str) -> None:
    """Correct the metadata of a converted file, and print which keys were written."""
    from .checkpoint.gguf import fix_gguf
    from .storage.sources import open_source

    config = open_source(request.model).read_json("config.json")
    keys = on_first(lambda: fix_gguf(path, config))
    if request.json:
        say(json.dumps({"file": path, "written": keys}, indent=2) + "\n")
    elif keys:
        say(f"Wrote {', '.join(keys)} into {path}: llama.cpp computes it right now.\n")
    else:
        say(f"{path} says everything already: nothing was changed.\n")


def run_on_disk(request: Request) -> None:
    """Remove layers that are given; the model is loaded only if bytes alone do not do it."""
    from .config.config_file import NeedsMemoryError

    plan = _given_plan(request)
    try:
        _copy_on_disk(request, request.layers or () if plan is None else plan)
        return
    except NeedsMemoryError as error:
        logger.info("%s\nLoading the model instead.", error)
    pruner = _make_pruner(request)
    plan = plan or pruner.manual_plan(request.layers or (), request.model)
    plan = replace(plan, drop_mtp=plan.drop_mtp or request.drop_mtp)
    _, saved = pruner.save_pruned(plan, request.output, overwrite=request.overwrite)
    say(saved.to_json() if request.json else saved_text(saved, request.output))


def _copy_on_disk(request: Request, plan: PruningPlan | Sequence[int]) -> None:
    """Prune the checkpoint on disk, and print what was written."""
    from .checkpoint.on_disk import prune_on_disk

    if request.verify:
        _silence_transformers(request)
    saved, manifest = on_first(
        lambda: prune_on_disk(
            request.model,
            plan,
            request.output,
            overwrite=request.overwrite,
            link=request.link,
            drop_mtp=request.drop_mtp,
            serve_with=request.serve_with,
            verify=request.verify,
            trust_remote_code=request.trust_remote_code,
        )
    )
    text = manifest_text(manifest, saved, request.output)
    say(saved.to_json() if request.json else text)


def _silence_transformers(request: Request) -> None:
    from transformers.utils import logging as transformers_logging

    from .progress import disable_progress_bars

    transformers_logging.set_verbosity(logging.ERROR)
    if request.quiet or rank() > 0 or not sys.stderr.isatty():
        disable_progress_bars()


def _load(request: Request) -> tuple[Any, Any]:
    from transformers import set_seed

    from .model.loading import load_model

    _silence_transformers(request)
    set_seed(request.seed)
    logger.info("Loading %s", request.model)
    load: Callable[..., tuple[Any, Any]] = load_model
    if request.max_memory is not None:
        from .offload.offloaded_stack import load_within

        load = partial(load_within, request.max_memory)
    return load(
        request.model,
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )


def _make_pruner(request: Request) -> BasePruner:
    """The strategy on the loaded model, with those options that were given and that it has."""
    from .pruners.measured import MeasuredPruner

    cls = get_strategy(request.strategy)
    for name in request.option:
        if name not in option_names(cls):
            raise UnknownNameError.of(f"option of {request.strategy!r}", name, option_names(cls))
    options: dict[str, Any] = {
        "batch_size": request.batch_size,
        "max_length": request.max_length,
        "layers_path": request.layers_path,
        "protect": request.protect,
        "serve_with": request.serve_with,
    }
    if issubclass(cls, MeasuredPruner):
        options["seed"] = request.seed
        if request.keeps_journal:
            options["journal"] = request.beside("journal.jsonl")
        if request.objective is not None:
            options["objective"] = request.objective
        if request.time is not None:
            options["time_limit"] = request.time
    elif request.objective is not None:
        raise InvalidPlanError(
            f"--objective has no meaning for {request.strategy!r}, which reads activations: leave "
            "it out, or use ablation or smart."
        )
    model, tokenizer = _load(request)
    return cls(model, tokenizer, **{**options, **request.option})


def _check_model(request: Request, named: bool) -> None:
    """Refuse a model that is not there, or an amount that is not for it, before data is read.

    The layers are counted in the model without its weights. What restricts their choice beyond
    that, such as engines, is known when it is loaded.

    Args:
        named: the layers to remove are known.
    """
    from .checkpoint.gguf import read_gguf_model
    from .goals.budget import Removable
    from .model.layer_stack import LayerStack
    from .model.loading import empty_model, model_class
    from .storage.gguf_models import find_gguf

    _silence_transformers(request)
    if paths := find_gguf(request.model):
        depth = read_gguf_model(paths).names.num_layers
    elif named or request.trust_remote_code:  # foreign code may need the weights
        model_class(request.model, trust_remote_code=request.trust_remote_code)
        return
    else:
        empty = empty_model(request.model, trust_remote_code=False)
        depth = len(LayerStack(empty, request.layers_path))
    if not named:
        request.budget.count(Removable.of(depth, request.protect))


def _given_plan(request: Request) -> PruningPlan | None:
    path = request.plan
    return None if path is None else on_first(lambda: PruningPlan.load(path))


def run_in_memory(request: Request) -> None:
    """Load the model, choose layers unless they are given, and carry the choice out."""
    from .data.sampling import DataSplit
    from .healing.lora_settings import LoraSettings
    from .search.objectives import parse_objective
    from .storage.origin import gguf_of

    given = _given_plan(request)
    named = request.layers is not None or given is not None
    _check_model(request, named)
    data = DataSplit([], [], [])
    tasks = _tasks(request) if request.tasks else None
    if request.objective is not None:
        parse_objective(request.objective)  # names that are unknown are refused here
    if not (named and request.dry_run and request.eval_dataset is None):
        data = on_first(lambda: _load_data(request, given, tasks))
    pruner = _make_pruner(request)
    n_tokens = request.n_tokens or (N_TOKENS if request.n_samples is None else None)
    if n_tokens is not None:
        data = data.within(pruner.tokenizer, n_tokens, request.max_length)
    lora = LoraSettings(steps=request.heal_steps, seed=request.seed, batch_size=request.batch_size)
    if request.estimate:
        say(_estimated(request, pruner, data, lora))
        return
    if request.heal != "none" or request.visualize:
        purpose = "healing" if request.heal != "none" else "drawing figures"
        pruner.layers.require_weights(purpose)
    if request.writes_model and not pruner.layers.offloaded:
        from .checkpoint.save import check_saveable
        from .workflow import check_comparable

        check_saveable(pruner.model, pruner.num_layers, heals=request.heal != "none")
        check_comparable(data.held_out)
        if request.heal != "none" and gguf_of(pruner.model):
            logger.warning(
                "Healed weights are written as safetensors in %s: before the cut these would have "
                "%s, whatever the GGUF file has.",
                str(pruner.model.dtype).removeprefix("torch."),
                format_bytes(count_bytes(pruner.model)),
            )
    if not request.resume and not request.dry_run:
        on_first(lambda: _clear(request))
    if request.heal_data == OWN_WORDS and not (named and request.dry_run):
        data = replace(data, healing=_own_words(request, pruner, data))
    if request.heal_every is not None:
        _heal_as_it_goes(request, pruner, data, lora)
    if request.sweep is not None:
        _sweep(request, request.sweep, pruner, data)
        return
    with _without_traces(request):
        plan = _make_plan(request, pruner, data, given)
    plan = replace(plan, drop_mtp=plan.drop_mtp or request.drop_mtp)
    if request.dry_run:
        say(plan.to_json() if request.json else plan_text(plan))
    elif pruner.layers.offloaded:
        _export_yaml(request, pruner, plan)
        held_out = plan.held_out or pruner.measure_choice(plan.remove, data.held_out)
        _copy_on_disk(request, replace(plan, held_out=held_out))
    else:
        _carry_out(request, pruner, plan, data, lora, tasks)


@contextmanager
def _without_traces(request: Request) -> Iterator[None]:
    """Leave no journal of a dry run that ends, well or not; one that is stopped keeps its own."""
    journal = Journal(request.beside("journal.jsonl"))
    new = request.dry_run and request.keeps_journal and not journal.path.exists()
    try:
        yield
    except LLMPrunerError:
        if new:
            on_first(journal.remove)
        raise
    if new:
        on_first(journal.remove)


def _estimated(request: Request, pruner: BasePruner, data: DataSplit, lora: LoraSettings) -> str:
    """What the request would take, as text or JSON."""
    from .estimate import estimate

    given = pruner, data, request.budget, _healing(request), lora
    found = estimate(*given, figures=request.visualize)
    values = {**asdict(found), "seconds": found.seconds}
    return json.dumps(values, indent=2) + "\n" if request.json else found.text()


def _tasks(request: Request) -> LmEvalTasks:
    """The tasks that were named; as an objective, too, if they are to choose layers."""
    from .lm_eval.task_items import LmEvalTasks
    from .search.objectives import register_objective

    limit, batch_size = request.n_samples, request.batch_size
    tasks = LmEvalTasks(request.tasks, limit=limit, batch_size=batch_size)
    if request.chooses_on_tasks:
        register_objective(TASKS, unit=f"score in {', '.join(request.tasks)}")(tasks)
    return tasks


def _load_data(
    request: Request, given: PruningPlan | None, tasks: LmEvalTasks | None = None
) -> DataSplit:
    """What the request needs; tasks that choose layers choose on half of their items."""
    from .data.sampling import DataSplit, load_data, split_items

    if tasks is not None and request.chooses_on_tasks:
        choosing, others = split_items(tasks.items, 0.5, seed=request.seed)
        healing = []
        if request.heal != "none":
            healing = _load_data(replace(request, objective=None), given).healing
        return DataSplit(choosing, healing, others)
    source = request.eval_dataset or (DEMO_MODEL if request.model == DEMO_MODEL else None)
    n_samples = request.n_samples or max(N_SAMPLES, (request.n_tokens or 0) // LEAST_TOKENS)
    return load_data(
        source,
        n_samples,
        passage=CHARACTERS * request.max_length,
        fields=request.fields,
        heal_source=None if request.heal_data == OWN_WORDS else request.heal_data,
        healing=request.heal != "none",
        taken=given.data.get("prompts", ()) if given else (),
        seed=request.seed,
    )


def _heal_as_it_goes(request: Request, pruner: BasePruner, data: DataSplit, lora: Any) -> None:
    from .pruners.healing_search import Repairs
    from .pruners.measured import SmartPruner

    assert isinstance(pruner, SmartPruner)
    assert request.heal_every is not None
    pruner.repairs = Repairs(data.healing, request.heal_every, _healing(request), lora)


def _own_words(request: Request, pruner: BasePruner, data: DataSplit) -> list[Any]:
    """What the model itself makes of the healing prompts."""
    from .data.sampling import HEAL_ITEMS
    from .healing.own_words import self_generated

    count = (request.n_samples or N_SAMPLES) * HEAL_ITEMS
    if request.heal_tokens is not None:  # which three fifths of the items are to hold
        count = min(count, 1 + 5 * request.heal_tokens // (3 * LEAST_TOKENS))
    minutes = None if request.heal_time is None else request.heal_time / 60 * WRITING
    options: dict[str, Any] = {"prompts": data.healing, "batch_size": request.batch_size}
    given = pruner.model, pruner.tokenizer, count, request.seed
    return self_generated(*given, **options, minutes=minutes)


def _healing(request: Request) -> Any:
    from .healing.job import Healing

    minutes = None if request.heal_time is None else request.heal_time / 60
    if minutes is not None and request.heal_data == OWN_WORDS:
        minutes *= 1 - WRITING
    return Healing(request.heal, request.heal_tokens, minutes)


def _carry_out(
    request: Request,
    pruner: BasePruner,
    plan: PruningPlan,
    data: DataSplit,
    lora: Any,
    tasks: LmEvalTasks | None,
) -> None:
    """Prune, heal, compare and write; print the report and what was written."""
    from .workflow import carry_out, with_scores

    logger.info("Removing layers %s", list(plan.remove))
    if request.visualize:
        plan = with_scores(pruner, plan, data.scoring)
    checkpoints = request.beside("healing")
    unused: Any = data.held_out if request.chooses_on_tasks else None
    report, _ = carry_out(
        pruner,
        plan,
        request.output,
        data.held_out,
        heal=_healing(request),
        heal_data=data.healing,
        lora=replace(lora, checkpoints=checkpoints),
        overwrite=request.overwrite,
        figures=request.visualize,
        seed=request.seed,
        command=shlex.join(["llm-pruner", *request.words]),
        tasks=None if tasks is None else partial(tasks.results, items=unused),
    )
    on_first(lambda: clear_checkpoints(checkpoints))
    _export_yaml(request, pruner, plan)
    if request.json:
        say(report.to_json())
        return
    folder = Path(request.output)
    written = [folder / PAGE_FILE]
    written += sorted((folder / FIGURES).iterdir()) if request.visualize else []
    written += [Path(request.export_yaml)] if request.export_yaml else []
    say(report_text(report) + "".join(f"Wrote {path}\n" for path in written))


def _export_yaml(request: Request, pruner: BasePruner, plan: PruningPlan) -> None:
    if request.export_yaml:
        pruner.export_mergekit_yaml(plan.remove, request.export_yaml, request.model)


def _clear(request: Request) -> None:
    """Remove what an earlier run with this output has left to be resumed."""
    if request.chooses:
        Journal(request.beside("journal.jsonl")).remove()
    clear_checkpoints(request.beside("healing"))


def _sweep(request: Request, n_layers: int, pruner: BasePruner, data: DataSplit) -> None:
    curve = pruner.sweep(data.scoring, n_layers, model_id=request.model, held_out=data.held_out)
    written = []
    if not request.dry_run:
        written.append(request.beside("curve.json"))
        on_first(lambda: curve.save(written[0]))
    if request.visualize and not request.dry_run:
        from .visualization.quality import plot_depth_curve

        written.append(request.beside("curve.png"))
        on_first(lambda: plot_depth_curve(curve, save_path=written[1]) and None)
    if request.json:
        say(curve.to_json())
    else:
        say(curve_text(curve) + "".join(f"Wrote {path}\n" for path in written))


def _make_plan(
    request: Request, pruner: BasePruner, data: DataSplit, given: PruningPlan | None
) -> PruningPlan:
    if request.layers is not None:
        given = pruner.manual_plan(request.layers, request.model)
    if given is not None:
        given.check_model(pruner.num_layers, pruner.identity)
        if request.dry_run and data.held_out:  # otherwise it is measured when it is carried out
            given = replace(given, held_out=pruner.measure_choice(given.remove, data.held_out))
        return given
    logger.info("Scoring %d layers: %s", pruner.num_layers, pruner.description())
    partial_plan = request.beside("partial_plan.json")
    try:
        plan = pruner.plan(
            data.scoring, model_id=request.model, budget=request.budget, held_out=data.held_out
        )
        if request.resume and not request.dry_run:
            on_first(lambda: partial_plan.unlink(missing_ok=True))
        source = request.eval_dataset or "default"
        return replace(plan, data={**plan.data, "source": source, "seed": request.seed})
    except BaseException:
        if pruner.partial_plan and not request.dry_run and rank() == 0:
            pruner.partial_plan.save(partial_plan)
            resumable = request.beside("journal.jsonl").exists()
            say_aside(
                f"\nThe search had come to {len(pruner.partial_plan.remove)} layers: use them with "
                f"--plan {partial_plan}{', or go on with --resume' if resumable else ''}."
            )
        raise
