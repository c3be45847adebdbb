"""The options of the ``llm-pruner`` command, and its help.

Nothing heavy is imported here, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from . import __version__, cli_values
from .cli_request import Request
from .distributed import TIMEOUT
from .engines.verdict import ENGINES
from .errors import InvalidPlanError
from .goals.budget import MEASURES, SPEEDS, Budget
from .output_rules import as_path
from .pruners.registry import BUILTIN
from .results import CONTEXT
from .streams import say

USUAL = (  # what most people need
    "--model --eval-dataset --ratio --n-layers --target-size --max-drop --layers --strategy "
    "--serve-with --time --resume --heal --output --visualize --dry-run --estimate --show"
).split()
EXAMPLES = """\
examples:
  llm-pruner --model demo --strategy smart --n-layers 3 --output pruned_demo --visualize
  llm-pruner --model my/model --strategy pruneme --ratio 0.25 --dry-run
  llm-pruner --model my/model --layers 3,7,11 --heal lora --output pruned_model
"""
EPILOG = f"""\
{EXAMPLES}
exit codes: 0 done; 1 your own code; 2 usage; 3 unusable model or data; 4 output or environment;
5 hub; 6 verification failed; 70 a fault of llm_pruner; 130 interrupted (continue with --resume)
"""


def build_parser(*, everything: bool = True) -> argparse.ArgumentParser:
    """The command line, one flat list of options.

    Args:
        everything: whether its help shows all of them, or those that most people need.
    """
    parser = _Parser(
        prog="llm-pruner",
        description="Remove whole decoder layers from a Hugging Face language model, and measure "
        "what it costs. Layer numbers are 0-based everywhere.",
        epilog=EPILOG if everything else f"{EXAMPLES}\nAll options: llm-pruner --help-all\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        usage=None if everything else "llm-pruner --model M --n-layers K --output DIR [options]",
    )
    add = parser.add_argument
    add("-h", "--help", action=_Help, const=False, help="show the usual options, and exit")
    add("--help-all", action=_Help, const=True, help="show all options, and exit")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    for title, add_options in (
        ("model and data", _add_input),
        ("how much to remove", _add_amount),
        ("which layers", _add_choice),
        ("healing", _add_healing),
        ("output", _add_output),
    ):
        add_options(_Options(parser.add_argument_group(title), everything))
    return parser


class _Options:
    """A group of options, of which a short help shows only the usual ones."""

    def __init__(self, group: Any, everything: bool) -> None:
        self._group, self._everything = group, everything

    def add_argument(self, name: str, **options: Any) -> None:
        """Add an option."""
        if not self._everything and name not in USUAL:
            options["help"] = argparse.SUPPRESS
        self._group.add_argument(name, **options)


class _Help(argparse.Action):
    """Prints the help with the usual options, or with all."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: bool, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        say(build_parser(everything=bool(self.const)).format_help())
        parser.exit()


def _add_input(group: _Options) -> None:
    add = group.add_argument
    add(
        "--model",
        default="",
        metavar="M",
        help="'demo', a local folder, a GGUF file or a hub id",
    )
    add(
        "--eval-dataset",
        metavar="D",
        help="what to choose layers on: chats, instructions, questions or running text, in a file "
        "(.jsonl .json .csv .tsv .parquet .arrow .txt .md, also .gz .zst), a folder, a dataset's "
        "name or hub id; several with shares, a.jsonl=2,b.txt (default: the demo's own with "
        "--model demo, else six benchmarks of the hub)",
    )
    add(
        "--fields",
        type=cli_values.field_names,
        metavar="F=NAME,F=NAME",
        help="which field of the data is which, e.g. prompt=question,reference=answer or "
        "text=body, where its names do not say it",
    )
    add(
        "--n-samples",
        type=cli_values.count,
        metavar="N",
        help="items to choose layers on; the result is measured on as many others (default: at "
        "most 80, of 4096 tokens together)",
    )
    add(
        "--n-tokens",
        type=cli_values.count,
        metavar="N",
        help="the same in tokens: as many items as have so many together",
    )
    add(
        "--tasks",
        type=cli_values.words,
        default=(),
        metavar="T,T",
        help="also compare both models on tasks of lm-eval: names, groups, definitions (.yaml), or "
        "FOLDER/TASK.jsonl with rows of a task's dataset; of each the first --n-samples items, "
        "all by default",
    )
    add(
        "--max-length",
        type=cli_values.length,
        default=512,
        metavar="N",
        help="tokens of a window of running text, and of a question (default: 512)",
    )
    add(
        "--batch-size",
        type=cli_values.count,
        default=8,
        metavar="N",
        help="sequences at a time (default: 8)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps, or auto to spread over devices (default: best)")
    add(
        "--max-memory",
        type=cli_values.size,
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
        "--seed",
        type=cli_values.seed,
        default=0,
        help="random seed of sampling and healing (default: 0)",
    )
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long one of several processes waits for another (default: 1800)",
    )


def _add_amount(group: _Options) -> None:
    add = group.add_argument
    add(
        "--ratio",
        type=cli_values.ratio,
        metavar="R",
        help="share of all layers to remove, e.g. 0.25 or 25%%, rounded down",
    )
    add(
        "--ratio-of",
        default="layers",
        choices=MEASURES,
        help="what the ratio is of; of params and bytes at least so much goes (default: layers)",
    )
    add("--n-layers", type=cli_values.count, metavar="K", help="exactly K layers")
    add(
        "--target-size",
        type=cli_values.size,
        metavar="SIZE",
        help="weights of at most so much, e.g. 400MB",
    )
    add(
        "--target-params",
        type=cli_values.number,
        metavar="N",
        help="at most so many parameters, e.g. 100M",
    )
    add(
        "--target-speedup",
        type=cli_values.speedup,
        metavar="X",
        help="so many times the tokens per second on this machine, --batch-size at a time, e.g. "
        "1.3 (decoding) or prefill=1.3",
    )
    add(
        "--target-memory",
        type=cli_values.size,
        metavar="SIZE",
        help="weights and the cache of --context tokens in at most so much, e.g. 6GiB",
    )
    add(
        "--context",
        type=cli_values.count,
        default=CONTEXT,
        metavar="N",
        help=f"tokens of the sequence that --target-memory counts (default: {CONTEXT})",
    )
    add(
        "--max-drop",
        type=cli_values.drops,
        metavar="NAME=X,..",
        help="by how much perplexity, a task of the data or their mean may become worse, in points "
        "or percent: arc_easy=0.02,perplexity=10%%; checked on half of the items; alone, as many "
        "layers go as it allows",
    )
    add(
        "--confident",
        action="store_true",
        help="--max-drop holds at the upper end of the 95 %% interval of each drop",
    )
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
        "--layers",
        type=cli_values.layers,
        metavar="3,7-11",
        help="remove these layers; nothing is scored. Alone, this copies bytes on disk and loads "
        "no model; with --eval-dataset, --heal, --visualize or --export-yaml it does",
    )
    add("--plan", metavar="FILE", help="the same with the layers of a plan (--dry-run --json)")
    add(
        "--sweep",
        type=cli_values.count,
        metavar="K",
        help="what removing 1 to K layers costs: written to DIR.curve.json; no model is written",
    )


def _add_choice(group: _Options) -> None:
    add = group.add_argument
    add(
        "--strategy",
        default="smart",
        metavar="S",
        help=f"{', '.join(BUILTIN)}, a plug-in's name, or FILE.py:CLASS (default: smart)",
    )
    add(
        "--objective",
        metavar="O",
        help="what ablation and smart measure: nll (likelihood of references or text), kl or "
        "agreement (with the full model), accuracy (of multiple choice), similarity (of answers), "
        "tasks (the scores of --tasks), a function of your own (FILE.py:NAME), or a mixture, "
        "nll=0.7,accuracy=0.3 (default: smart chooses a number of layers by kl; all else is nll)",
    )
    add(
        "--option",
        type=cli_values.option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the strategy's class, e.g. contiguous=false for pruneme; repeatable",
    )
    add(
        "--protect",
        type=cli_values.pair,
        metavar="A,B",
        help="never remove the first A and last B layers (2,2)",
    )
    add(
        "--serve-with",
        type=cli_values.engines,
        action="extend",
        default=[],
        metavar="E,E",
        help=f"only sets of layers without which these engines compute the model right: "
        f"{', '.join(ENGINES)}; several work out what a layer is from its position",
    )
    add(
        "--time",
        type=cli_values.seconds,
        metavar="T",
        help="smart: end the search after this time, e.g. 10m, with the best layers so far",
    )
    add("--resume", action="store_true", help="continue an interrupted run")


def _add_healing(group: _Options) -> None:
    add = group.add_argument
    add(
        "--heal",
        default="none",
        choices=["none", "linear", "lora", "full"],
        help="restore quality by adjusting weights: linear in closed form; on top of that, lora by "
        "training adapters, or full by training all weights of the layers, which learns faster "
        "and takes more memory (default: none)",
    )
    add(
        "--heal-data",
        metavar="D",
        help="what to heal with (default: more of --eval-dataset); 'self': what the model answers "
        "to that, or writes when it goes on from its beginnings",
    )
    add("--heal-steps", type=cli_values.count, metavar="N", help="lora, full: steps at most (1000)")
    add(
        "--heal-tokens",
        type=cli_values.count,
        metavar="N",
        help="tokens to heal on at most (default: all)",
    )
    add(
        "--heal-time",
        type=cli_values.seconds,
        metavar="T",
        help="most time for healing, e.g. 30m or 2h",
    )
    add(
        "--heal-every",
        type=cli_values.count,
        metavar="K",
        help="smart: heal after every K removals, and choose the next on the healed model",
    )


def _add_output(group: _Options) -> None:
    add = group.add_argument
    add("--output", default="./pruned_model", metavar="DIR", help="default: ./pruned_model")
    add("--overwrite", action="store_true", help="replace an earlier output of llm-pruner")
    add("--visualize", action="store_true", help="draw figures into DIR/figures")
    add("--dry-run", action="store_true", help="print scores and plan; write nothing")
    add(
        "--estimate",
        action="store_true",
        help="say what choosing and comparing would take on this machine: time, memory, disk; no "
        "more is done",
    )
    add(
        "--show",
        metavar="OUTPUT",
        help="print what was done to the model in a folder, and how to do it again",
    )
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress, no notes")
    add("--export-yaml", metavar="PATH", help="also write a MergeKit recipe")
    add(
        "--push-to-hub",
        metavar="USER/NAME",
        help="then upload DIR to this hub repository, private if it is new; the token is that of "
        "HF_TOKEN or 'hf auth login'",
    )
    add(
        "--verify",
        action="store_true",
        help="pruning on disk: also hash every kept tensor, and reload the output",
    )
    add(
        "--link", action="store_true", help="pruning on disk: hard-link files that stay as they are"
    )
    add(
        "--drop-mtp",
        action="store_true",
        help="leave out the blocks for multi-token prediction, which are kept otherwise",
    )
    add(
        "--fix-gguf",
        metavar="FILE",
        help="write into a GGUF file, converted from the pruned --model, what its converter leaves "
        "to llama.cpp's own reckoning; nothing else is done",
    )


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as every other error is reported, without the usage above it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message)

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):
            raise InvalidPlanError(f"{message.removeprefix('argument ')}.")
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidPlanError(f"{message}.{hint} See {self.prog} --help-all.")


def parse_request(words: Sequence[str]) -> Request:
    """What the words of a command line ask for.

    Raises:
        InvalidPlanError: unknown options, values that cannot be, or options that do not go
            together.
        SystemExit: after ``--help`` and ``--version``.
    """
    values = vars(build_parser().parse_args(words))
    faster = values.pop("target_speedup")
    what, factor = faster or (SPEEDS[0], None)
    amounts = {one.name: values.pop(one.name) for one in fields(Budget) if one.name in values}
    budget = Budget(**amounts, target_speedup=factor, speedup_of=what)
    values["output"] = _output_path(values["output"])
    values["option"] = dict(values["option"])
    values["serve_with"] = tuple(dict.fromkeys(values["serve_with"]))
    return Request(**values, budget=budget, words=tuple(words))


def _output_path(text: str) -> str:
    """An output as it was named, but without ``~``, ``..`` and a slash at its end."""
    path = as_path(text)
    if ".." in path.parts:
        return str(path.resolve())
    return str(path) if text.startswith("~") else text.rstrip("/") or "/"
