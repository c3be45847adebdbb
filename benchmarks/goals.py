"""Goals: what was asked of the pruned model, what was predicted, and what it is.

    python benchmarks/goals.py --model demo
    python benchmarks/goals.py --model smollm2 --text passages.jsonl --questions arc_easy.jsonl

Sizes are those of the model that comes out; speeds are timed anew, with the full model in turns;
drops are measured on items that neither chose the layers nor checked the drop. Layers are chosen by
`--strategy`: goals are the same for all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from llm_pruner import get_strategy, load_data, load_eval_dataset, load_model
from llm_pruner.data.sampling import split_items
from llm_pruner.errors import InvalidPlanError
from llm_pruner.evaluation.cost_comparison import cache_bytes, speedup
from llm_pruner.goals.budget import Budget
from llm_pruner.goals.drops import Drops
from llm_pruner.report.summary import PARAMETERS, SPEEDUP, figure
from llm_pruner.utils import count_bytes, count_parameters

SHARES = (0.9, 0.75, 0.6)
FACTORS = (1.1, 1.3)
KINDS = ("sizes", "speeds", "drops")


def main() -> None:
    """Ask for every goal and print a table."""
    args = _options().parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device="cpu")
    if args.text:
        items = [*load_eval_dataset(args.n_items, args.text, up_to=True)]
        if args.questions:
            items += load_eval_dataset(args.n_items, args.questions, up_to=True)
        choosing, held_out = split_items(items, 0.6)
    else:
        data = load_data(args.model, args.n_items)
        choosing, held_out = data.scoring, data.held_out
    pruner = get_strategy(args.strategy)(model, tokenizer)
    print("| goal | layers that go | asked | predicted | measured |\n|---|---|---|---|---|")
    for budget in _budgets(model) if "sizes" in args.only else []:
        _sizes_and_speeds(pruner, choosing, budget)
    for what in ("decode", "prefill") if "speeds" in args.only else ():
        for factor in FACTORS:
            budget = Budget(target_speedup=factor, speedup_of=what)
            _sizes_and_speeds(pruner, choosing, budget)
    if "drops" not in args.only:
        return
    tasks = sorted({str(item["task"]) for item in held_out if isinstance(item, dict)})
    limits = [{"perplexity": "10%"}, {"perplexity": "30%"}, {"perplexity": "100%"}]
    limits += [{tasks[0]: 0.05}, {tasks[0]: 0.02, "perplexity": "50%"}] if tasks else []
    for limit in limits:
        for confident in (False, True):
            _drops(pruner, choosing, held_out, Budget(max_drop=limit, confident=confident))


def _budgets(model: Any) -> list[Budget]:
    """Goals of size, of parameters and of memory, as shares of what the model has."""
    bytes_, parameters, cache = count_bytes(model), count_parameters(model), cache_bytes(model)
    budgets = [Budget(target_size=round(share * bytes_)) for share in SHARES]
    budgets += [Budget(target_params=round(share * parameters)) for share in SHARES]
    budgets += [Budget(ratio=0.25, ratio_of=of) for of in ("params", "bytes")]
    for context in (1024, 8192):
        memory = bytes_ + context * cache
        budgets.append(Budget(target_memory=round(0.75 * memory), context=context))
    return budgets


def _sizes_and_speeds(pruner: Any, items: Sequence[Any], budget: Budget) -> None:
    plan = pruner.plan(items, budget=budget)
    pruned = pruner.layers.remove(plan.remove)
    for one in plan.options["goals"]:
        goal = one["goal"]
        if goal == SPEEDUP:
            how = pruner.tokenizer, pruner.batch_size, budget.speedup_of
            measured = statistics.median(speedup(pruner.model, pruned, *how) for _ in range(3))
        elif goal in PARAMETERS:
            measured = count_parameters(pruned)
        else:
            measured = count_bytes(pruned)
            if budget.target_memory is not None:
                measured += budget.context * cache_bytes(pruned)
        name = f"{goal} ({budget.speedup_of})" if goal == SPEEDUP else goal
        name += f" ({budget.context} tokens)" if budget.target_memory is not None else ""
        cells = (figure(goal, value) for value in (one["asked"], one["predicted"], measured))
        print(f"| {name} | {len(plan.remove)} | {' | '.join(cells)} |", flush=True)


def _drops(pruner: Any, items: Sequence[Any], unseen: Sequence[Any], budget: Budget) -> None:
    name = "max_drop, confident" if budget.confident else "max_drop"
    try:
        plan = pruner.plan(items, budget=budget)
    except InvalidPlanError as error:
        print(f"| {name} | 0 | {budget.given['max_drop']} | {error} | |")
        return
    how = {"batch_size": pruner.batch_size, "max_length": pruner.max_length}
    drops = Drops(pruner.layers, pruner.tokenizer, unseen, budget.limits, confident=False, **how)
    measured = drops.of(plan.remove)
    for one in plan.options["goals"]:
        figure_of = one["goal"].removeprefix("max_drop ")
        found = measured[figure_of]
        checked = f"{drops.text(figure_of, one['predicted'])} (at most "
        checked += f"{drops.text(figure_of, one['high'])})"
        after = f"{drops.text(figure_of, found['drop'])} (at most "
        after += f"{drops.text(figure_of, found['high'])})"
        row = f"{name}: {figure_of}", len(plan.remove), one["asked"], checked, after
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="", help="what to choose and check on")
    parser.add_argument("--questions", default="", help="and items with choices")
    parser.add_argument("--n-items", type=int, default=200, help="of each, or of the demo's own")
    parser.add_argument("--strategy", default="bi")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
