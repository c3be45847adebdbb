"""The ``llm-pruner`` command: reads arguments, calls the library, prints.

Knows nothing a script could not call. Everything heavy is imported after the arguments have
been checked, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic_output import PLAN_FILE, clear_checkpoints, hold_output
from .cli_arguments import build_parser, check_arguments, needs_model
from .distributed import group, launched, on_first, one_only, rank, reported_by_first
from .errors import InvalidPlanError, LLMPrunerError, UnknownNameError
from .hub import how_to_repeat, push_to_hub
from .pruners.registry import get_strategy, option_names
from .report.console import curve_text, manifest_text, plan_text, report_text, saved_text
from .results import PruningPlan
from .utils import DEMO_MODEL, logger, package_versions

if TYPE_CHECKING:
    from .data.sampling import DataSplit
    from .pruners.base import BasePruner


INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    Of several processes the first alone prints, but for errors that it does not have.
    """
    with redirect_stdout(StringIO()) if rank() > 0 else nullcontext():
        with redirect_stderr(StringIO()) if rank() > 0 else nullcontext():
            args = build_parser().parse_args(argv)
        args.words = list(sys.argv[1:] if argv is None else argv)
        return _main(args)


def _main(args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.ERROR if args.quiet or rank() > 0 else logging.INFO)
    try:
        signal.signal(signal.SIGTERM, _stop)
        if one_only():
            logger.warning("accelerate launch --cpu starts one process; for several use torchrun.")
        with group(args.timeout), ExitStack() as held:
            check_arguments(args)
            if not args.dry_run:
                on_first(lambda: held.enter_context(hold_output(args.output)))
            _run(args)
        if args.push_to_hub is not None and rank() == 0:  # the others need not wait for it
            _push(args)
    except LLMPrunerError as error:
        if os.environ.get("LLM_PRUNER_DEBUG"):
            raise
        _tell(str(error))
        return error.exit_code
    except SystemExit:
        if launched() > 1:  # a launcher ends all processes when one of them has ended
            _tell("stopped by the launcher: another process has ended. Go on with --resume.")
        raise
    except KeyboardInterrupt:
        left = [_beside(args, ending) for ending in ("journal.jsonl", "healing")]
        hint = ""
        if any(path.exists() for path in left):
            again = shlex.join(["llm-pruner", *args.words, *([] if args.resume else ["--resume"])])
            hint = f" Resume with: {again}"
            if launched() > 1:
                hint = " Go on with the same command and --resume."
        if rank() == 0:
            print(f"\ninterrupted; nothing half-written.{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _tell(message: str) -> None:
    """Print an error; of several processes that have the same one the first alone does."""
    if launched() > 1:  # ended by the launcher now, it could not say why
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not reported_by_first(message):
        who = f"rank {rank()}: " if rank() > 0 else ""
        print(f"error: {who}{message}", file=sys.stderr, flush=True)


def _stop(number: int, frame: object) -> None:
    """End by an exception, so that what was begun is cleaned up."""
    raise SystemExit(128 + number)


def _push(args: argparse.Namespace) -> None:
    """Upload the output, which is complete, and print where it is."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if args.quiet or not sys.stderr.isatty():
        disable_progress_bars()
    logger.info("Uploading %s to %s", args.output, args.push_to_hub)
    try:
        with hold_output(args.output):
            url = push_to_hub(args.output, args.push_to_hub)
    except KeyboardInterrupt:
        print(f"\n{how_to_repeat(args.output, args.push_to_hub)}", file=sys.stderr)
        raise
    print(f"Uploaded: {url}", file=sys.stderr if args.json else sys.stdout)


def _run(args: argparse.Namespace) -> None:
    """Prune on disk where nothing needs the model in memory, else load it."""
    if needs_model(args):
        _run_in_memory(args)
    else:
        _prune_on_disk(args)


def _prune_on_disk(args: argparse.Namespace) -> None:
    """Remove layers that are given; the model is loaded only if bytes alone do not do it."""
    from .checkpoint.on_disk_config import NeedsMemoryError

    plan = on_first(lambda: args.layers if args.plan is None else PruningPlan.load(args.plan))
    try:
        _slice(args, plan)
        return
    except NeedsMemoryError as error:
        logger.info("%s\nLoading the model instead.", error)
    pruner = _make_pruner(args, *_load(args))
    given = plan if isinstance(plan, PruningPlan) else _manual_plan(args, pruner)
    where = args.output, args.model
    pruner.prune_and_save(given.remove, *where, overwrite=args.overwrite, plan=given)
    _tell_saved(args, lambda saved: saved_text(saved, args.output))


def _slice(args: argparse.Namespace, plan: PruningPlan | list[int]) -> None:
    """Prune the checkpoint on disk, and tell."""
    from .checkpoint.on_disk import prune_checkpoint

    if args.verify:
        _hush_transformers(args)
    manifest = on_first(
        lambda: prune_checkpoint(
            args.model,
            plan,
            args.output,
            overwrite=args.overwrite,
            link=args.link,
            verify=args.verify,
            trust_remote_code=args.trust_remote_code,
        )
    )
    _tell_saved(args, lambda saved: manifest_text(manifest, saved, args.output))


def _tell_saved(args: argparse.Namespace, text: Callable[[PruningPlan], str]) -> None:
    saved = on_first(lambda: PruningPlan.load(Path(args.output) / PLAN_FILE))
    print(saved.to_json() if args.json else text(saved), end="")


def _hush_transformers(args: argparse.Namespace) -> None:
    from transformers.utils import logging as transformers_logging

    from .utils import disable_progress_bars

    transformers_logging.set_verbosity(logging.ERROR)
    if args.quiet or rank() > 0 or not sys.stderr.isatty():
        disable_progress_bars()


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import set_seed

    from .model.loading import load_model

    _hush_transformers(args)
    set_seed(args.seed)
    logger.info("Loading %s", args.model)
    if args.max_memory is not None:
        from .offload.offloaded_stack import load_within
    load = load_model if args.max_memory is None else partial(load_within, args.max_memory)
    return load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )


def _run_in_memory(args: argparse.Namespace) -> None:
    from .data.sampling import load_data
    from .healing.lora_settings import LoraSettings
    from .pruners.healing_search import Repairs
    from .pruners.measured import SmartPruner
    from .workflow import PAGE_FILE, carry_out, draw_figures

    pruner = _make_pruner(args, *_load(args))
    if args.heal != "none" or args.visualize:
        pruner.layers.require_weights("healing" if args.heal != "none" else "drawing figures")
    source = args.eval_dataset or (DEMO_MODEL if args.model == DEMO_MODEL else None)
    given = on_first(lambda: None if args.plan is None else PruningPlan.load(args.plan))
    data = on_first(
        lambda: load_data(
            source,
            args.n_samples,
            heal_source=args.heal_data,
            healing=args.heal != "none",
            taken=given.data.get("prompts", ()) if given else (),
            seed=args.seed,
        )
    )
    checkpoints = _beside(args, "healing")
    if not args.resume and not args.dry_run:
        on_first(lambda: _clear(args))
    lora = LoraSettings(
        steps=args.heal_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        checkpoints=None if args.dry_run else checkpoints,
    )
    if args.heal_every is not None:
        assert isinstance(pruner, SmartPruner)
        in_between = replace(lora, checkpoints=None)
        pruner.repairs = Repairs(data.healing, args.heal_every, args.heal, in_between)
    if args.sweep is not None:
        _sweep(args, pruner, data)
        return
    plan = _make_plan(args, pruner, data, given)
    if args.dry_run:
        print(plan.to_json() if args.json else plan_text(plan), end="")
        return
    if args.export_yaml and pruner.layers.streamed:
        pruner.export_mergekit_yaml(plan.remove, args.export_yaml, args.model)
    if pruner.layers.streamed:
        held_out = plan.held_out or pruner.measure_choice(plan.remove, data.judging)
        _slice(args, replace(plan, held_out=held_out))
        return
    logger.info("Removing layers %s", list(plan.remove))
    report, pruned = carry_out(
        pruner,
        plan,
        args.output,
        data.judging,
        heal=args.heal,
        heal_data=data.healing,
        lora=lora,
        overwrite=args.overwrite,
        seed=args.seed,
        command=shlex.join(["llm-pruner", *args.words]),
    )
    on_first(lambda: clear_checkpoints(checkpoints))
    figures = draw_figures(pruner, pruned, report, data) if args.visualize else []
    if args.export_yaml:
        pruner.export_mergekit_yaml(plan.remove, args.export_yaml, args.model)
    if args.json:
        print(report.to_json(), end="")
    else:
        print(report_text(report), end="")
        for path in [
            Path(args.output) / PAGE_FILE,
            *figures,
            *([Path(args.export_yaml)] if args.export_yaml else []),
        ]:
            print(f"Wrote {path}")


def _make_pruner(args: argparse.Namespace, model: Any, tokenizer: Any) -> BasePruner:
    """The strategy, with those options that were given and that it has."""
    from .pruners.measured import MeasuredPruner

    cls = get_strategy(args.strategy)
    for name in args.option:
        if name not in option_names(cls):
            raise UnknownNameError.of(f"option of {args.strategy!r}", name, option_names(cls))
    options: dict[str, Any] = {"batch_size": args.batch_size, "layers_path": args.layers_path}
    if args.protect is not None:
        options["protect"] = tuple(args.protect)
    measured = issubclass(cls, MeasuredPruner)
    if measured:
        options["seed"] = args.seed
    if args.objective is not None:
        if not measured:
            raise InvalidPlanError(
                f"--objective has no meaning for {args.strategy!r}, which reads activations: leave "
                "it out, or use ablation or smart."
            )
        options["objective"] = args.objective
    writes = args.resume or not args.dry_run  # a dry run leaves nothing that was not there
    if measured and writes and args.layers is None and args.plan is None:
        options["journal"] = _beside(args, "journal.jsonl")
    return cls(model, tokenizer, **{**options, **args.option})


def _beside(args: argparse.Namespace, ending: str) -> Path:
    """A file beside the output folder, named after it."""
    return Path(f"{args.output.rstrip('/')}.{ending}")


def _clear(args: argparse.Namespace) -> None:
    """Remove what an earlier run with this output has left to be taken up again."""
    _beside(args, "journal.jsonl").unlink(missing_ok=True)
    clear_checkpoints(_beside(args, "healing"))


def _sweep(args: argparse.Namespace, pruner: BasePruner, data: DataSplit) -> None:
    curve = pruner.sweep(data.scoring, args.sweep, model_id=args.model, held_out=data.judging)
    written = []
    if not args.dry_run:
        written.append(_beside(args, "curve.json"))
        on_first(lambda: curve.save(written[0]))
    if args.visualize and not args.dry_run:
        from .visualization import plot_depth_curve

        written.append(_beside(args, "curve.png"))
        on_first(lambda: plot_depth_curve(curve, save_path=written[1]) and None)
    print(curve.to_json() if args.json else curve_text(curve), end="")
    if not args.json:
        print("".join(f"Wrote {path}\n" for path in written), end="")


def _manual_plan(args: argparse.Namespace, pruner: BasePruner) -> PruningPlan:
    return PruningPlan(
        model_id=args.model,
        num_layers=pruner.num_layers,
        remove=tuple(args.layers),
        versions=package_versions(),
        model=pruner.identity,
    )


def _make_plan(
    args: argparse.Namespace, pruner: BasePruner, data: DataSplit, given: PruningPlan | None
) -> PruningPlan:
    if args.layers is not None:
        return _manual_plan(args, pruner)
    if given is not None:
        given.check_model(pruner.num_layers, pruner.identity)
        return given
    logger.info("Scoring %d layers: %s", pruner.num_layers, pruner.description())
    try:
        plan = pruner.plan(
            data.scoring,
            model_id=args.model,
            ratio=args.ratio,
            threshold=args.threshold,
            tolerance=args.tolerance,
            n_layers=args.n_layers,
            held_out=data.judging,
        )
        source = args.eval_dataset or "default"
        return replace(plan, data={**plan.data, "source": source, "seed": args.seed})
    except BaseException:
        if pruner.partial_plan and not args.dry_run and rank() == 0:
            path = _beside(args, "partial_plan.json")
            pruner.partial_plan.save(path)
            print(
                f"\nThe search had come to {len(pruner.partial_plan.remove)} layers: use them with "
                f"--plan {path}, or go on with --resume.",
                file=sys.stderr,
            )
        raise


if __name__ == "__main__":
    sys.exit(main())
