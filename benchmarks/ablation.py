"""What ablating every layer alone costs: shared prefixes, against one whole pass per layer.

    python benchmarks/ablation.py

Prints a Markdown table, for the demo model on its own items and for a planted model of 32 layers
on texts of its own. The naive twin runs the bypassed model once per layer and the full model once,
on the same batches. Layer executions are counted by hooks, one per layer and token, padding
included. Times are the best of alternating runs; they include encoding the items for `ablation`
and not for the naive twin. Largest difference: of a score, relative. The share of executions that
sharing prefixes leaves is near (L + 1) / (2 L), a half and a little.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import batches_of, counted, naive_losses, planted, timed

from llm_pruner import AblationPruner, LayerStack, load_data, load_model


def main() -> None:
    """Compare on two models, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-samples", type=int, default=80, help="items for the demo model")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs to time")
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for tiny models")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    demo = (*load_model("demo", device="cpu"), load_data("demo", args.n_samples).scoring)
    print("| model | items | tokens | largest difference | executions: naive ", end="")
    print("| `ablation` | share | time: naive | `ablation` | share |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, model, tokenizer, items in (
        ("demo, 12 layers", *demo),
        ("planted, 32 layers", *planted(32)[:3]),
    ):
        print(f"| {name} | {len(items)} | {_row(model, tokenizer, items, args.rounds)} |")


def _row(model: Any, tokenizer: Any, items: Any, rounds: int) -> str:
    stack = LayerStack(model)
    batches = batches_of(AblationPruner(model, tokenizer).quality(items))
    layer_sets = [(), *((layer,) for layer in range(len(stack)))]

    def naive() -> dict[int, float]:
        losses = naive_losses(stack, batches, layer_sets)
        return {
            layer_set[0]: math.expm1(losses[()] - losses[layer_set])
            for layer_set in layer_sets
            if layer_set
        }

    def ours() -> Any:
        return AblationPruner(model, tokenizer).compute_layer_scores(items)

    with counted(stack) as executions:
        slow = naive()
        slow_total = executions.total()
    with counted(stack) as executions:
        fast = ours()
        fast_total = executions.total()
    difference = max(abs(fast[layer] / slow[layer] - 1) for layer in slow)
    seconds = {naive: math.inf, ours: math.inf}
    for _ in range(rounds):
        for run in seconds:
            seconds[run] = min(seconds[run], timed(run))
    tokens = sum(batch.input_ids.numel() for batch in batches)
    cells = [f"{tokens:,}", f"{difference:.1e}", f"{slow_total:,}", f"{fast_total:,}"]
    cells += [f"{fast_total / slow_total:.3f}", f"{seconds[naive]:.2f} s"]
    cells += [f"{seconds[ours]:.2f} s", f"{seconds[ours] / seconds[naive]:.3f}"]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
