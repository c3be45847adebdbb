"""Every strategy on one model at one ratio, against the best and the worst choice there is.

    python benchmarks/strategies.py                                   # demo model, 25 %
    python benchmarks/strategies.py --model M --eval-dataset D.jsonl --ratio 0.25

Prints a Markdown table. Layers are chosen on one half of the items and every figure is measured
on the other. Best and worst are found by brute force over all sets of unprotected layers, by the
loss on the items that layers are chosen on.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from common import loaded, model_options

from llm_pruner import get_strategy
from llm_pruner.goals.budget import Budget
from llm_pruner.pruners.measured import MeasuredPruner
from llm_pruner.pruners.registry import BUILTIN
from llm_pruner.workflow import measure_quality


def main() -> None:
    """Choose, measure, print."""
    parser = model_options(__doc__, 160)
    parser.add_argument("--ratio", type=float, default=0.25)
    args = parser.parse_args()
    model, tokenizer, data = loaded(args)
    choices: dict[str, tuple[int, ...]] = {"full model": ()}
    for name in BUILTIN:
        pruner = get_strategy(name)(model, tokenizer)
        choices[name] = pruner.plan(data.scoring, ratio=args.ratio).remove
    assert isinstance(pruner, MeasuredPruner)
    quality = pruner.quality(data.scoring)
    sets = list(combinations(pruner.candidates, Budget(ratio=args.ratio).count(pruner.removable)))
    quality.measure(sets)
    choices["best of all sets"] = max(sets, key=quality)
    choices["worst of all sets"] = min(sets, key=quality)

    print(f"{args.model}: {len(choices[name])} of {pruner.num_layers} layers removed, ", end="")
    print(f"protected {pruner.protect}, {len(data.scoring)} items to choose, ", end="")
    print(f"{len(data.held_out)} others to measure; best and worst of {len(sets)} sets.\n")
    print("| choice | layers removed (0-based) | perplexity | similarity | task mean |")
    print("|---|---|---|---|---|")
    for name, layers in choices.items():
        pruned = pruner.layers.remove(layers) if layers else model
        row = measure_quality(pruned, tokenizer, data.held_out)
        print(f"| {name} | {', '.join(map(str, layers))} | {_cells(row)} |")


def _cells(row: dict[str, Any]) -> str:
    similarity, tasks = row["similarity"], row["tasks"]
    shown = [f"{row['perplexity']:.3f}"]
    shown.append("" if similarity is None else f"{similarity:.3f}")
    shown.append("" if tasks is None else f"{tasks['mean']:.3f}")
    return " | ".join(shown)


if __name__ == "__main__":
    main()
