"""What healing gives back: cuts of a quarter and a third of the layers, repaired step by step.

    python benchmarks/healing.py                                        # the demo model
    python benchmarks/healing.py --model M --eval-dataset D.jsonl --n-samples 24 --batch-size 2 \\
        --steps 600

Prints a Markdown table. Layers are chosen by `smart` and as `pruneme`'s block, each on the same
items; weights are repaired on others; perplexity is that of a third set. "Returned" is the share
of the loss (nats per token) lost by the cut that a repair gives back. `lora` trains on top of what
`linear` left. Memory is the most that was resident during a repair, above what was before it.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import psutil
import torch

from llm_pruner import get_strategy, load_data, load_model
from llm_pruner.data.tokens import pad_sequences
from llm_pruner.evaluation.likelihood import mean_nll
from llm_pruner.healing.heal import BATCH_SIZE, HealingData, heal_lora
from llm_pruner.healing.linear import heal_linear
from llm_pruner.healing.lora_settings import LoraSettings

SHARES = (1 / 4, 1 / 3)


def main() -> None:
    """Choose, cut, repair, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--eval-dataset", default=None)
    parser.add_argument("--n-samples", type=int, default=160)
    parser.add_argument("--steps", type=int, default=None, help="of training")
    parser.add_argument("--batch-size", type=int, default=8, help="of training")
    parser.add_argument("--rank", type=int, default=LoraSettings.rank)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--chosen-by", nargs="+", default=["smart", "pruneme"])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for tiny models")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load_model(args.model, device=args.device)
    source = args.eval_dataset or ("demo" if args.model == "demo" else None)
    data = load_data(source, args.n_samples, healing=True)
    healing = HealingData.of(model, tokenizer, data.healing)
    tokens = sum(len(row.ids) for row in healing.train)
    settings = LoraSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        rank=args.rank,
        learning_rate=args.learning_rate,
    )
    full = mean_nll(model, tokenizer, data.judging)
    print(
        f"{args.model}: {len(data.scoring)} items to choose, {len(data.healing)} to heal ", end=""
    )
    print(f"({tokens:,} tokens to train on), {len(data.judging)} to judge; full model's ", end="")
    print(f"perplexity {math.exp(full):.3f}.\n")
    print("| chosen by | removed (0-based) | cut | + linear | returned | time | memory ", end="")
    print("| + lora | returned | time | memory |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    back: dict[str, list[float]] = {"linear": [], "lora": []}
    for name in args.chosen_by:
        pruner = get_strategy(name)(model, tokenizer)
        for share in args.shares:
            count = round(share * pruner.num_layers)
            removed = pruner.plan(data.scoring, n_layers=count).remove
            stack = pruner.layers
            pruned = stack.remove(removed)
            cut = mean_nll(pruned, tokenizer, data.judging)
            cells = [name, ", ".join(map(str, removed)), f"{math.exp(cut):.3f}"]
            train = pad_sequences(tokenizer, healing.train, BATCH_SIZE)
            linear, cost = watched(heal_linear, stack, removed, pruned, train, healing.tune)
            lora, dear = watched(heal_lora, stack, removed, linear, tokenizer, healing, settings)
            for method, healed, (seconds, memory) in (
                ("linear", linear, cost),
                ("lora", lora, dear),
            ):
                loss = mean_nll(healed, tokenizer, data.judging)
                back[method].append((cut - loss) / (cut - full))
                cells += [f"{math.exp(loss):.3f}", f"{back[method][-1]:.0%}"]
                cells += [f"{seconds:.0f} s", f"{memory:.0f} MiB"]
            print(f"| {' | '.join(cells)} |", flush=True)
    for method, shares in back.items():
        print(f"\n`{method}` returns {median(shares):.0%} of the lost loss (median).", end="")
    print()


def watched(repair: Callable[..., tuple[Any, Any]], *given: Any) -> tuple[Any, tuple[float, float]]:
    """The model that a repair returns, and seconds and MiB that it took."""
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
        model, _ = repair(*given)
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return model, (seconds, (most - before) / 2**20)


if __name__ == "__main__":
    main()
