"""The ``llm-pruner`` command: reads arguments, calls the library, prints.

Knows nothing a script could not call. Everything heavy is imported after the arguments have
been checked, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import (
    InvalidPlanError,
    LLMPrunerError,
    MissingDependencyError,
    OutputError,
    UnknownNameError,
)
from .output import PLAN_FILE, check_output, clear_checkpoints, hold_output
from .processes import TIMEOUT, group, launched, on_first, one_only, rank, told_by_first
from .registry import BUILTIN, check_strategy_name, get_strategy, option_names
from .results import PruningPlan
from .text import curve_text, manifest_text, plan_text, report_text, saved_text
from .utils import DEMO_MODEL, logger, package_versions

if TYPE_CHECKING:
    from .base import BasePruner
    from .workflow import DataSplit

INTERRUPTED = 130

EPILOG = """\
examples:
  llm-pruner --model demo --strategy smart --n-layers 3 --output pruned_demo --visualize
  llm-pruner --model my/model --strategy pruneme --ratio 0.25 --dry-run
  llm-pruner --model my/model --layers 3,7,11 --heal lora --output pruned_model

exit codes: 0 done; 2 usage; 3 unusable model or data; 4 output or environment;
6 verification failed; 130 interrupted (take it up again with --resume)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, one flat list of options."""
    parser = argparse.ArgumentParser(
        prog="llm-pruner",
        description="Remove whole decoder layers from a Hugging Face language model, and measure "
        "what it costs. Layer numbers are 0-based everywhere.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_input(parser.add_argument_group("model and data"))
    _add_choice(parser.add_argument_group("which layers, and how many"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_input(group: Any) -> None:
    add = group.add_argument
    add("--model", required=True, metavar="M", help="'demo', a local folder or a hub id")
    add("--device", help="cpu, cuda, cuda:1, mps, or auto to spread over devices (default: best)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add(
        "--layers-path",
        metavar="NAME",
        help="where the layers are in a model in which they are not found, e.g. model.blocks",
    )
    add(
        "--eval-dataset",
        metavar="D",
        help="a local .jsonl/.json/.csv/.txt file or folder, a dataset name or hub id "
        "(default: the demo's own with --model demo, else six benchmarks of the hub)",
    )
    add(
        "--n-samples",
        type=int,
        default=80,
        metavar="N",
        help="items to choose layers on; as many others judge the result (default: 80)",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (default: 8)")
    add("--seed", type=int, default=0, help="random seed of sampling and healing (default: 0)")
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long one of several processes waits for another (default: 1800)",
    )


def _add_choice(group: Any) -> None:
    add = group.add_argument
    add(
        "--strategy",
        default="smart",
        metavar="S",
        help=f"{', '.join(BUILTIN)}, a plug-in's name, or FILE.py:CLASS (default: smart)",
    )
    add("--ratio", type=float, help="share of all layers to remove, e.g. 0.25")
    add("--n-layers", type=int, metavar="K", help="exactly K layers")
    add(
        "--threshold",
        type=float,
        help="remove every layer beyond this score; ablation and smart: relative change of "
        "quality, e.g. -0.02 for at most 2 %% worse",
    )
    add(
        "--tolerance",
        type=float,
        help="smart: largest total loss of quality, e.g. 0.015; with --n-layers at most so many",
    )
    add(
        "--sweep",
        type=int,
        metavar="K",
        help="what removing 1 to K layers costs: written to DIR.curve.json; no model is written",
    )
    add(
        "--layers",
        metavar="3,7,11",
        help="remove these layers; nothing is scored. Alone, this copies bytes on disk and loads "
        "no model; with --eval-dataset, --heal, --visualize or --export-yaml it does",
    )
    add("--plan", metavar="FILE", help="the same with the layers of a plan (--dry-run --json)")
    add("--protect", metavar="A,B", help="never remove the first A and last B layers (2,2)")
    add(
        "--objective",
        metavar="O",
        help="what ablation and smart measure: nll (likelihood of references or text, default), kl "
        "or agreement (with the full model), accuracy (of multiple choice), similarity (of "
        "answers), or a mixture, nll=0.7,accuracy=0.3",
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the strategy's class, e.g. contiguous=false for pruneme; repeatable",
    )
    add(
        "--heal-every",
        type=int,
        metavar="K",
        help="smart: repair (--heal) after every K cuts, and choose the next on the repaired model",
    )
    add("--resume", action="store_true", help="take an interrupted run up where it stopped")


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--output", default="./pruned_model", metavar="DIR", help="default: ./pruned_model")
    add("--overwrite", action="store_true", help="replace an earlier output of llm-pruner")
    add(
        "--heal",
        default="none",
        choices=["none", "linear", "lora"],
        help="repair the weights after the cut: linear in closed form, lora by training on top of "
        "that (default: none)",
    )
    add("--heal-data", metavar="D", help="what to repair with (default: more of --eval-dataset)")
    add("--heal-steps", type=int, metavar="N", help="lora: steps of training at most (1000)")
    add("--export-yaml", metavar="PATH", help="also write a MergeKit recipe")
    add("--visualize", action="store_true", help="draw figures into DIR/figures")
    add(
        "--verify",
        action="store_true",
        help="pruning on disk: also hash every kept tensor, and reload the output",
    )
    add(
        "--link", action="store_true", help="pruning on disk: hard-link files that stay as they are"
    )
    add("--dry-run", action="store_true", help="print scores and plan; write nothing")
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress, no notes")


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
        with group(args.timeout):
            _check(args)
            writes = not args.dry_run and rank() == 0
            with hold_output(args.output) if writes else nullcontext():
                _run(args)
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
    if not told_by_first(message):
        who = f"rank {rank()}: " if rank() > 0 else ""
        print(f"error: {who}{message}", file=sys.stderr, flush=True)


def _stop(number: int, frame: object) -> None:
    """End by an exception, so that what was begun is cleaned up."""
    raise SystemExit(128 + number)


def _check(args: argparse.Namespace) -> None:
    """Refuse what is wrong in the arguments themselves, before anything is loaded."""
    check_strategy_name(args.strategy)
    args.layers = _integers("--layers", args.layers)
    args.protect = _integers("--protect", args.protect)
    if args.protect is not None and len(args.protect) != 2:
        raise InvalidPlanError(f"--protect takes two numbers, A,B; got {len(args.protect)}.")
    amounts = {
        name: getattr(args, name.replace("-", "_"))
        for name in ("layers", "plan", "ratio", "n-layers", "threshold", "sweep")
    }
    given = [f"--{name}" for name, value in amounts.items() if value is not None]
    if len(given) > 1:
        raise InvalidPlanError(f"{' and '.join(given)} exclude each other: give one.")
    if args.ratio is not None and not 0 < args.ratio < 1:
        raise InvalidPlanError(f"--ratio {args.ratio} must lie between 0 and 1, e.g. 0.25.")
    for name in ("threshold", "tolerance"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise InvalidPlanError(f"--{name} {value} must be a number, e.g. 0.015.")
    if args.tolerance is not None and args.tolerance < 0:
        raise InvalidPlanError(f"--tolerance {args.tolerance} must not be negative, e.g. 0.015.")
    if not 0 <= args.seed < 2**32:
        raise InvalidPlanError(f"--seed {args.seed} must be from 0 to {2**32 - 1}.")
    _check_healing(args)
    _check_use(args)
    if args.heal == "lora" and importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("--heal lora needs peft: pip install 'llm_pruner[heal]'.")
    if Path(args.output).resolve() == Path(args.model).resolve():
        raise OutputError(f"--output {args.output} is the model itself: choose another folder.")
    args.option = dict(map(_option, args.option))
    for name in ("n_samples", "n_layers", "batch_size", "sweep", "heal_steps", "heal_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidPlanError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if not args.dry_run and args.sweep is None:
        on_first(lambda: check_output(args.output, overwrite=args.overwrite))


def _check_use(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect beside others."""
    idle = {"sweep": ("tolerance", "export_yaml"), "layers": ("tolerance", "objective")}
    idle["plan"] = idle["layers"]
    for option, others in idle.items():
        for other in others:
            if getattr(args, option) is not None and getattr(args, other) is not None:
                name = other.replace("_", "-")
                raise InvalidPlanError(f"--{name} has no effect with --{option}: leave it out.")
    if args.sweep is not None and args.heal != "none":
        raise InvalidPlanError("--heal has no effect with --sweep: leave it out.")
    for option in ("verify", "link"):
        if getattr(args, option) and _needs_model(args):
            raise InvalidPlanError(
                f"--{option} is for pruning on disk, by --layers or --plan without anything that "
                "needs the model in memory: leave it out."
            )


def _needs_model(args: argparse.Namespace) -> bool:
    """Whether something is asked for that needs the model in memory."""
    chooses = args.layers is None and args.plan is None
    loads = args.dtype != "auto" or args.layers_path is not None or args.dry_run
    measures = args.eval_dataset is not None or args.visualize or args.export_yaml is not None
    return chooses or loads or measures or args.heal != "none"


def _check_healing(args: argparse.Namespace) -> None:
    """Refuse options of a repair that is not asked for."""
    given = {
        "--heal-data": args.heal_data is not None and args.heal == "none",
        "--heal-every": args.heal_every is not None and args.heal == "none",
        "--heal-steps": args.heal_steps is not None and args.heal != "lora",
    }
    for option, idle in given.items():
        if idle:
            wanted = "--heal lora" if option == "--heal-steps" else "--heal linear or --heal lora"
            raise InvalidPlanError(f"{option} has no effect without {wanted}.")
    if args.heal_every is None:
        return
    if args.strategy != "smart" or args.layers is not None or args.plan is not None:
        raise InvalidPlanError("--heal-every is for layers that --strategy smart chooses.")
    if args.sweep is not None:
        raise InvalidPlanError("--heal-every and --sweep exclude each other: give one.")


def _option(text: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``; the value is read as JSON, or is a text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InvalidPlanError(f"--option {text!r} must be NAME=VALUE, e.g. contiguous=false.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _integers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidPlanError(
            f"{option} {text!r} must be whole numbers separated by commas, e.g. 3,7,11."
        ) from None


def _run(args: argparse.Namespace) -> None:
    """Prune on disk where nothing needs the model in memory, else load it."""
    if _needs_model(args):
        _run_in_memory(args)
    else:
        _prune_on_disk(args)


def _prune_on_disk(args: argparse.Namespace) -> None:
    from .slicer import NeedsMemoryError, prune_checkpoint

    options = {"overwrite": args.overwrite, "trust_remote_code": args.trust_remote_code}
    plan = on_first(lambda: args.layers if args.plan is None else PruningPlan.load(args.plan))
    proof = {"link": args.link, "verify": args.verify}
    try:
        manifest = on_first(
            lambda: prune_checkpoint(args.model, plan, args.output, **proof, **options)
        )
        text = manifest_text(manifest, args.output)
    except NeedsMemoryError as error:
        logger.info("%s\nLoading the model instead.", error)
        pruner = _make_pruner(args, *_load(args))
        given = plan if isinstance(plan, PruningPlan) else _manual_plan(args, pruner)
        where = args.output, args.model
        pruner.prune_and_save(given.remove, *where, overwrite=args.overwrite, plan=given)
        text = saved_text(given, args.output)
    saved = on_first(lambda: PruningPlan.load(Path(args.output) / PLAN_FILE))
    print(saved.to_json() if args.json else text, end="")


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    from .utils import disable_progress_bars, load_model

    transformers_logging.set_verbosity(logging.ERROR)
    if args.quiet or rank() > 0 or not sys.stderr.isatty():
        disable_progress_bars()
    set_seed(args.seed)
    logger.info("Loading %s", args.model)
    return load_model(
        args.model,
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )


def _run_in_memory(args: argparse.Namespace) -> None:
    from .lora import LoraSettings
    from .pruners import SmartPruner
    from .rounds import Repairs
    from .workflow import PAGE_FILE, carry_out, draw_figures, load_data

    pruner = _make_pruner(args, *_load(args))
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
    from .bases import MeasuredPruner

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
