"""An objective of one's own against likelihood: what each keeps, on items that neither has seen.

    python benchmarks/own_objective.py --model smollm2 --strategy smart --k 3
    python benchmarks/own_objective.py --model smollm2 --rows arc_easy.jsonl --k 4 --n-items 400

The first objective is that of `examples/valid_json.py`, on prompts that are made here: facts that
are to be written as one JSON object, with one example. The other is a task of lm-eval over the rows
of a file, see `lm_eval_command.py`: the probability of the right choice, beside which the accuracy
is shown. Layers are chosen on a part of the items by either objective, and both measure both
choices on the others.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval_command import definition

from llm_pruner import (
    LayerStack,
    get_strategy,
    load_eval_dataset,
    load_model,
    register_objective,
)
from llm_pruner.data.sampling import split_items
from llm_pruner.lm_eval.task_items import LmEvalTasks
from llm_pruner.search.removal_quality import RemovalQuality

VALID_JSON = f"{Path(__file__).parents[1] / 'examples' / 'valid_json.py'}:valid-json"
PEOPLE = ("Anna", "Ben", "Chiara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas")
TOWNS = ("Lisbon", "Oslo", "Quito", "Nairobi", "Hanoi", "Lyon", "Perth", "Kyoto", "Cork", "Graz")
JOBS = ("baker", "pilot", "nurse", "farmer", "judge", "painter", "driver", "teacher", "chemist")


def main() -> None:
    """Choose by both, measure by both, print a table."""
    args = _options().parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    own, tasks = VALID_JSON, None
    items: Any
    if args.rows:
        with tempfile.TemporaryDirectory() as folder:
            task = str(definition(args.rows, Path(folder)))
            tasks = LmEvalTasks([task], limit=args.n_items, batch_size=args.batch_size)
        own, items = "tasks", tasks.items
        register_objective(own)(tasks)
    elif args.items:
        own, items = args.objective, load_eval_dataset(args.n_items, args.items, up_to=True)
    else:
        items = json_prompts(args.n_items)
    choosing, unseen = split_items(items, args.choosing)
    if not (args.rows or args.items):
        unseen += json_prompts(args.more, seed=1)
    options: dict[str, Any] = {"batch_size": args.batch_size}
    if args.minutes is not None:
        options["time_limit"] = 60 * args.minutes
    stack = get_strategy(args.strategy)(model, tokenizer).layers
    judges: list[Callable[..., float]] = [
        RemovalQuality(stack, tokenizer, unseen, objective=name, batch_size=args.batch_size)
        for name in ("nll", own)
    ]
    if tasks:
        judges.append(partial(accuracy, tasks, stack, tokenizer, unseen))
    print(f"{len(choosing)} items choose, {len(unseen)} others judge\n")
    columns = ["likelihood", "own objective", *(["accuracy"] if tasks else []), "seconds"]
    print(f"| layers | chosen by | removed (0-based) | {' | '.join(columns)} |")
    print("|---" * (3 + len(columns)) + "|")
    full = " | ".join(f"{judge():.3f}" for judge in judges)
    print(f"| | full model | | {full} | |", flush=True)
    for removed in args.judge:
        found = " | ".join(f"{judge(removed):.3f}" for judge in judges)
        layers = ", ".join(map(str, removed))
        print(f"| {len(removed)} | | {layers} | {found} | |", flush=True)
    for k in args.k:
        for name in ("nll", own):
            begin = time.perf_counter()
            pruner = get_strategy(args.strategy)(model, tokenizer, objective=name, **options)
            removed = pruner.plan(choosing, n_layers=k).remove
            spent = time.perf_counter() - begin
            found = " | ".join(f"{judge(removed):.3f}" for judge in judges)
            layers = ", ".join(map(str, removed))
            shown = name.rpartition(":")[2]
            print(f"| {k} | `{shown}` | {layers} | {found} | {spent:.0f} |", flush=True)


def accuracy(
    tasks: LmEvalTasks, stack: LayerStack, tokenizer: Any, items: Any, removed: Any = ()
) -> float:
    """The mean over tasks of the first metric of each, without layers."""
    model = stack.remove(removed) if removed else stack.model
    results = tasks.results(model, tokenizer, items).values()
    return statistics.fmean(next(iter(one.means.values())) for one in results)


def json_prompts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Facts about a person, each with its right answer; all with the same example before them."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        shown, asked = (
            (draw.choice(PEOPLE), draw.randint(18, 80), draw.choice(TOWNS), draw.choice(JOBS))
            for _ in range(2)
        )
        lines = ["Write the facts as one JSON object.", "", *_facts(shown), _json(shown), ""]
        items.append({
            "task": "json",
            "prompt": "\n".join([*lines, *_facts(asked), "JSON:"]),
            "reference": _json(asked).removeprefix("JSON: "),
        })  # fmt: skip
    return items


def _facts(person: tuple[str, int, str, str]) -> list[str]:
    name, age, town, job = person
    return [f"Facts: {name} is {age} years old, lives in {town} and works as a {job}."]


def _json(person: tuple[str, int, str, str]) -> str:
    name, age, town, job = person
    return f'JSON: {{"name": "{name}", "age": {age}, "city": "{town}", "job": "{job}"}}'


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=Path, help="of a task of lm-eval: query, choices, gold")
    parser.add_argument("--items", help="items of one's own, for --objective")
    parser.add_argument("--objective", default=VALID_JSON)
    parser.add_argument("--n-items", type=int, default=60)
    parser.add_argument("--choosing", type=float, default=0.4, help="share of them that choose")
    parser.add_argument("--more", type=int, default=0, help="prompts for JSON that judge as well")
    parser.add_argument("--strategy", default="smart")
    parser.add_argument("--k", type=int, nargs="*", default=[3], help="how many layers go")
    parser.add_argument("--judge", nargs="+", default=[], help="sets of layers, such as 4,7,25",
                        type=lambda text: tuple(map(int, text.split(","))))  # fmt: skip
    parser.add_argument("--minutes", type=float, help="the most that each search may take")
    parser.add_argument("--batch-size", type=int, default=32, help="items at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
