"""What healing gives back: cuts of a quarter and a third of the layers, healed step by step.

    python benchmarks/healing.py                                        # the demo model
    python benchmarks/healing.py --model M --eval-dataset D.jsonl --n-samples 24 --batch-size 2 \\
        --steps 600

Prints a Markdown table. Layers are chosen by `smart` and as `pruneme`'s block, each on the same
items; weights are healed on others; perplexity is that of a third set. "Returned" is the part of
the loss (nats per token) caused by the cut that a healer takes back. `lora` and `full` each train
on top of what `linear` left. Memory is the peak resident size while healing, above what was
resident before.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from statistics import median
from typing import Any

import psutil
from common import loaded, model_options

from llm_pruner import LayerStack, get_strategy
from llm_pruner.evaluation.likelihood import mean_nll
from llm_pruner.healing.heal import HEALERS
from llm_pruner.healing.job import Healer, HealingJob
from llm_pruner.healing.lora_settings import LoraSettings

SHARES = (1 / 4, 1 / 3)


def main() -> None:
    """Choose, cut, heal, measure, print."""
    parser = model_options(__doc__, 160)
    parser.add_argument("--steps", type=int, default=None, help="of training")
    parser.add_argument("--batch-size", type=int, default=8, help="of training")
    parser.add_argument("--rank", type=int, default=LoraSettings.rank)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--chosen-by", nargs="+", default=["smart", "pruneme"])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    args = parser.parse_args()
    model, tokenizer, data = loaded(args, healing=True)
    settings = LoraSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        rank=args.rank,
        learning_rate=args.learning_rate,
    )
    whole = HealingJob.of(LayerStack(model), (), tokenizer, data.healing, settings)
    tokens = sum(len(row.ids) for row in whole.train)
    full = mean_nll(model, tokenizer, data.held_out)
    print(
        f"{args.model}: {len(data.scoring)} items to choose, {len(data.healing)} to heal ", end=""
    )
    print(f"({tokens:,} tokens to train on), {len(data.held_out)} held out; full model's ", end="")
    print(f"perplexity {math.exp(full):.3f}.\n")
    print("| chosen by | removed (0-based) | cut | + linear | returned | time | memory ", end="")
    print("| + lora | returned | time | memory | + full | returned | time | memory |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    back: dict[str, list[float]] = {"linear": [], "lora": [], "full": []}
    for name in args.chosen_by:
        pruner = get_strategy(name)(model, tokenizer)
        for share in args.shares:
            count = round(share * pruner.num_layers)
            removed = pruner.plan(data.scoring, n_layers=count).remove
            job = replace(whole, stack=pruner.layers, removed=removed)
            pruned = pruner.layers.remove(removed)
            cut = mean_nll(pruned, tokenizer, data.held_out)
            cells = [name, ", ".join(map(str, removed)), f"{math.exp(cut):.3f}"]
            for method in back:
                healed, seconds, memory = watched(HEALERS[method], job, pruned)
                if method == "linear":  # the others begin with what it has left
                    pruned = healed
                loss = mean_nll(healed, tokenizer, data.held_out)
                back[method].append((cut - loss) / (cut - full))
                cells += [f"{math.exp(loss):.3f}", f"{back[method][-1]:.0%}"]
                cells += [f"{seconds:.0f} s", f"{memory:.0f} MiB"]
            print(f"| {' | '.join(cells)} |", flush=True)
    for method, shares in back.items():
        print(f"\n`{method}` returns {median(shares):.0%} of the lost loss (median).", end="")
    print()


def watched(healer: Healer, job: HealingJob, pruned: Any) -> tuple[Any, float, float]:
    """The model that a healer returns, and the seconds and MiB that it took."""
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def look() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    started = time.perf_counter()
    try:
        model, _ = healer(job, pruned)
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return model, seconds, (most - before) / 2**20


if __name__ == "__main__":
    main()
