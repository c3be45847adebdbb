"""An objective of one's own against likelihood: what each keeps, on items that neither has seen.

    python benchmarks/own_objective.py --model smollm2 --items prompts.jsonl \\
        --objective examples/valid_json.py:valid-json --k 3

Layers are chosen on half of the items by either objective and measured by both on the other half.
"""

from __future__ import annotations

import argparse
import time

import torch

from llm_pruner import get_strategy, load_eval_dataset, load_model
from llm_pruner.data.sampling import split_items
from llm_pruner.search.removal_quality import RemovalQuality


def main() -> None:
    """Choose by both, measure by both, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--items", required=True)
    parser.add_argument("--n-items", type=int, default=48)
    parser.add_argument("--objective", required=True)
    parser.add_argument("--strategy", default="ablation")
    parser.add_argument("--k", type=int, default=3, help="how many layers go")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device="cpu", dtype=args.dtype)
    choosing, unseen = split_items(load_eval_dataset(args.n_items, args.items, up_to=True), 0.4)
    names = {"nll": "nll", "own": args.objective}
    stack = get_strategy(args.strategy)(model, tokenizer).layers
    judges = {key: RemovalQuality(stack, tokenizer, unseen, objective=name)
              for key, name in names.items()}  # fmt: skip
    print(f"{len(choosing)} items choose, {len(unseen)} others judge\n")
    print("| chosen by | removed (0-based) | likelihood per token | own objective | seconds |")
    print("|---|---|---|---|---|")
    full = " | ".join(f"{judge():.3f}" for judge in judges.values())
    print(f"| full model | | {full} | |", flush=True)
    for name in names.values():
        begin = time.perf_counter()
        pruner = get_strategy(args.strategy)(model, tokenizer, objective=name)
        removed = pruner.plan(choosing, n_layers=args.k).remove
        spent = time.perf_counter() - begin
        found = " | ".join(f"{judge(removed):.3f}" for judge in judges.values())
        layers = ", ".join(map(str, removed))
        print(f"| `{name}` | {layers} | {found} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
