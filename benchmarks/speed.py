"""What removed layers bring in time: decoding and prefill against the ideal.

    python benchmarks/speed.py --threads 1

Prints a Markdown table for the demo model without 3 of its 12 layers, and for a random Llama of 16
layers, 4 removed, in which nearly all of the work is in the layers. Rates are medians of
alternating runs (`llm_pruner.speed.compare_cost`); ideal is L / (L - k), what layers without
embedding, head and overhead would give. Exits with 1 where the layers-dominated shape decodes at
less than 0.9 of the ideal. Times need an idle machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_pruner import LayerStack, get_device, load_model
from llm_pruner.evaluation.cost_comparison import compare_cost

GOAL = 0.9  # of the ideal


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model | quantity | before | after | ratio | of pairs | of the ideal |")
    print("|---|---|---|---|---|---|---|")
    decode = 0.0
    for name, model, tokenizer, removed in shapes():
        count = len(LayerStack(model))
        ideal = count / (count - len(removed))
        pruned = LayerStack(model).remove(removed)
        rows = compare_cost(model, pruned, tokenizer, batch=args.batch, repeats=args.repeats)
        for row in rows:
            if row.group == "speed" and row.unit == "tokens/s":
                ratio = row.after / row.before
                low, high = (1 + (bound or 0.0) / row.before for bound in (row.low, row.high))
                cells = [name, row.name, f"{row.before:,.0f}", f"{row.after:,.0f}", f"{ratio:.2f}"]
                cells += [f"{low:.2f} to {high:.2f}", f"{ratio / ideal:.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
                if row.name == "decode, batch 1":
                    decode = ratio / ideal
    sys.exit(decode < GOAL)


def shapes() -> Iterator[tuple[str, Any, Any, list[int]]]:
    """Name, model, tokenizer and layers to remove; the layers-dominated model last."""
    demo, tokenizer = load_model("demo")
    yield "demo, 12 - 3 layers", demo, tokenizer, [2, 7, 8]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    random = LlamaForCausalLM(config).eval().to(get_device())
    yield "random, 16 - 4 layers", random, tokenizer, [6, 7, 8, 9]


if __name__ == "__main__":
    main()
