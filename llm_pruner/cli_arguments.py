"""The options of the ``llm-pruner`` command, and how their words are read.

Nothing heavy is imported here, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from . import __version__
from .cli_request import Request
from .distributed import TIMEOUT
from .engines.verdict import ENGINES, check_engines
from .errors import InvalidPlanError
from .goals.budget import MEASURES, SPEEDS, Budget, Drop
from .output_rules import as_path
from .pruners.registry import BUILTIN
from .results import CONTEXT
from .streams import say
from .utils import parse_bytes, parse_seconds

EPILOG = """\
examples:
  llm-pruner --model demo --strategy smart --n-layers 3 --output pruned_demo --visualize
  llm-pruner --model my/model --strategy pruneme --ratio 0.25 --dry-run
  llm-pruner --model my/model --layers 3,7,11 --heal lora --output pruned_model

exit codes: 0 done; 2 usage; 3 unusable model or data; 4 output or environment; 5 hub;
6 verification failed; 70 a fault of llm_pruner; 130 interrupted (continue with --resume)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, one flat list of options."""
    parser = _Parser(
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
    add(
        "--model",
        required=True,
        metavar="M",
        help="'demo', a local folder, a GGUF file or a hub id",
    )
    add("--device", help="cpu, cuda, cuda:1, mps, or auto to spread over devices (default: best)")
    add(
        "--max-memory",
        type=_size,
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
        help="what to choose layers on: chats, instructions, questions or running text, in a file "
        "(.jsonl .json .csv .tsv .parquet .arrow .txt .md, also .gz .zst), a folder, a dataset's "
        "name or hub id; several with shares, a.jsonl=2,b.txt (default: the demo's own with "
        "--model demo, else six benchmarks of the hub)",
    )
    add(
        "--fields",
        type=_fields,
        metavar="F=NAME,F=NAME",
        help="which field of the data is which, e.g. prompt=question,reference=answer or "
        "text=body, where its names do not say it",
    )
    add(
        "--tasks",
        type=_words,
        default=(),
        metavar="T,T",
        help="also compare both models on tasks of lm-eval: names, groups, definitions (.yaml), or "
        "FOLDER/TASK.jsonl with rows of a task's dataset; of each the first --n-samples items, "
        "all by default",
    )
    add(
        "--n-samples",
        type=_count,
        metavar="N",
        help="items to choose layers on; the result is measured on as many others (default: at "
        "most 80, of 4096 tokens together)",
    )
    add(
        "--n-tokens",
        type=_count,
        metavar="N",
        help="the same in tokens: as many items as have so many together",
    )
    add(
        "--max-length",
        type=_length,
        default=512,
        metavar="N",
        help="tokens of a window of running text, and of a question (default: 512)",
    )
    add(
        "--batch-size", type=_count, default=8, metavar="N", help="sequences at a time (default: 8)"
    )
    add("--seed", type=_seed, default=0, help="random seed of sampling and healing (default: 0)")
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
    add(
        "--ratio",
        type=_ratio,
        metavar="R",
        help="share of all layers to remove, e.g. 0.25 or 25%%, rounded down",
    )
    add(
        "--ratio-of",
        default="layers",
        choices=MEASURES,
        help="what the ratio is of; of params and bytes at least so much goes (default: layers)",
    )
    add("--n-layers", type=_count, metavar="K", help="exactly K layers")
    add("--target-size", type=_size, metavar="SIZE", help="weights of at most so much, e.g. 400MB")
    add("--target-params", type=_number, metavar="N", help="at most so many parameters, e.g. 100M")
    add(
        "--target-speedup",
        type=_speedup,
        metavar="X",
        help="so many times the tokens per second on this machine, --batch-size at a time, e.g. "
        "1.3 (decoding) or prefill=1.3",
    )
    add(
        "--target-memory",
        type=_size,
        metavar="SIZE",
        help="weights and the cache of --context tokens in at most so much, e.g. 6GiB",
    )
    add(
        "--context",
        type=_count,
        default=CONTEXT,
        metavar="N",
        help=f"tokens of the sequence that --target-memory counts (default: {CONTEXT})",
    )
    add(
        "--max-drop",
        type=_drops,
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
        "--sweep",
        type=_count,
        metavar="K",
        help="what removing 1 to K layers costs: written to DIR.curve.json; no model is written",
    )
    add(
        "--layers",
        type=_numbers,
        metavar="3,7,11",
        help="remove these layers; nothing is scored. Alone, this copies bytes on disk and loads "
        "no model; with --eval-dataset, --heal, --visualize or --export-yaml it does",
    )
    add("--plan", metavar="FILE", help="the same with the layers of a plan (--dry-run --json)")
    add(
        "--protect",
        type=_pair,
        metavar="A,B",
        help="never remove the first A and last B layers (2,2)",
    )
    add(
        "--serve-with",
        type=_names,
        action="extend",
        default=[],
        metavar="E,E",
        help=f"only sets of layers without which these engines compute the model right: "
        f"{', '.join(ENGINES)}; several work out what a layer is from its position",
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
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the strategy's class, e.g. contiguous=false for pruneme; repeatable",
    )
    add(
        "--heal-every",
        type=_count,
        metavar="K",
        help="smart: heal after every K removals, and choose the next on the healed model",
    )
    add(
        "--time",
        type=_seconds,
        metavar="T",
        help="smart: end the search after this time, e.g. 10m, with the best layers so far",
    )
    add("--resume", action="store_true", help="continue an interrupted run")


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--output", default="./pruned_model", metavar="DIR", help="default: ./pruned_model")
    add("--overwrite", action="store_true", help="replace an earlier output of llm-pruner")
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
    add("--heal-steps", type=_count, metavar="N", help="lora, full: steps at most (1000)")
    add("--heal-tokens", type=_count, metavar="N", help="tokens to heal on at most (default: all)")
    add("--heal-time", type=_seconds, metavar="T", help="most time for healing, e.g. 30m or 2h")
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
    add("--dry-run", action="store_true", help="print scores and plan; write nothing")
    add(
        "--estimate",
        action="store_true",
        help="say what choosing and comparing would take on this machine: time, memory, disk; no "
        "more is done",
    )
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress, no notes")


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as every other error is reported, without the usage above it."""

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message)

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):
            raise InvalidPlanError(f"{message.removeprefix('argument ')}.")
        raise InvalidPlanError(f"{message}; see {self.prog} --help.")


def _value(what: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argument: `read`, whose ValueError means that the text is not `what`."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}") from None

    return convert


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _at_least_two(text: str) -> int:
    if (number := int(text)) < 2:
        raise ValueError
    return number


def _random_seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 2**32:
        raise ValueError
    return number


def _share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _large_number(text: str) -> int:
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
    digits = text.rstrip("kmbtKMBT")
    if (number := round(float(digits) * units[text[len(digits) :].lower()])) < 1:
        raise ValueError
    return number


def _faster(text: str) -> tuple[str, float]:
    what, equals, factor = text.rpartition("=")
    if equals and what not in SPEEDS:
        raise ValueError
    return what or SPEEDS[0], float(factor)


def _names_and_drops(text: str) -> dict[str, str]:
    return {name: str(Drop.of(drop)) for name, drop in _names_of_fields(text).items()}


def _names_of_fields(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and name.strip() for field, _, name in pairs):
        raise ValueError
    return {field.strip(): name.strip() for field, _, name in pairs}


def _listed(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise ValueError
    return parts


def _engine_names(text: str) -> tuple[str, ...]:
    return check_engines(part.strip() for part in text.split(","))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _two_integers(text: str) -> tuple[int, int]:
    first, last = _integers(text)
    return first, last


def _name_and_value(text: str) -> tuple[str, Any]:
    """The value is read as JSON, or is a text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


_count = _value("a whole number of at least 1", _at_least_one)
_seed = _value(f"a whole number from 0 to {2**32 - 1}", _random_seed)
_numbers = _value("whole numbers separated by commas, e.g. 3,7,11", _integers)
_names = _engine_names
_words = _value("names separated by commas", _listed)
_ratio = _value("a share, e.g. 0.25 or 25%", _share)
_number = _value("a number, e.g. 100M, 1.1B", _large_number)
_speedup = _value("a factor, e.g. 1.3, decode=1.3 or prefill=1.3", _faster)
_drops = _value("figures and drops, e.g. arc_easy=0.02,perplexity=10%", _names_and_drops)
_fields = _value("fields and their names, e.g. prompt=question,reference=answer", _names_of_fields)
_pair = _value("two whole numbers, A,B", _two_integers)
_length = _value("a whole number of at least 2", _at_least_two)
_seconds = _value("a time, e.g. 90s, 10m, 1h30m", parse_seconds)
_size = _value("a size of memory, e.g. 4GiB, 500MB", parse_bytes)
_option = _value("NAME=VALUE, e.g. contiguous=false", _name_and_value)


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
