"""The options of the ``llm-pruner`` command: what they are, and what cannot be.

Nothing heavy is imported here, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from . import __version__
from .atomic_output import check_output
from .distributed import TIMEOUT, on_first
from .errors import InvalidPlanError, MissingDependencyError, OutputError
from .hub import check_upload
from .pruners.registry import BUILTIN, check_strategy_name
from .utils import parse_bytes

EPILOG = """\
examples:
  llm-pruner --model demo --strategy smart --n-layers 3 --output pruned_demo --visualize
  llm-pruner --model my/model --strategy pruneme --ratio 0.25 --dry-run
  llm-pruner --model my/model --layers 3,7,11 --heal lora --output pruned_model

exit codes: 0 done; 2 usage; 3 unusable model or data; 4 output or environment; 5 hub;
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
    add(
        "--max-memory",
        metavar="SIZE",
        help="e.g. 4GiB: a model that does not fit is scored layer by layer from the disk",
    )
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
    add(
        "--push-to-hub",
        metavar="USER/NAME",
        help="then upload DIR to this hub repository, private if it is new; the token is that of "
        "HF_TOKEN or 'hf auth login'",
    )
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


def check_arguments(args: argparse.Namespace) -> None:
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
    if args.max_memory is not None:
        args.max_memory = parse_bytes(args.max_memory)
        if args.device == "auto":
            raise InvalidPlanError("--max-memory and --device auto exclude each other: give one.")
    for name in ("n_samples", "n_layers", "batch_size", "sweep", "heal_steps", "heal_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidPlanError(f"--{name.replace('_', '-')} {value} must be at least 1.")
    if args.push_to_hub is not None:
        on_first(lambda: check_upload(args.push_to_hub))
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
    if args.push_to_hub is not None and (args.dry_run or args.sweep is not None):
        other = "--dry-run" if args.dry_run else "--sweep"
        raise InvalidPlanError(f"--push-to-hub has no effect with {other}: leave it out.")
    for option in ("verify", "link"):
        if getattr(args, option) and needs_model(args):
            raise InvalidPlanError(
                f"--{option} is for pruning on disk, by --layers or --plan without anything that "
                "needs the model in memory: leave it out."
            )


def needs_model(args: argparse.Namespace) -> bool:
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
