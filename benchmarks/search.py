"""What the search of `smart` costs and finds, against naive greedy search.

    python benchmarks/search.py                       # planted models of 32 layers, three seeds
    python scripts/train_demo.py --layers 32 --hidden 64 --output deep_demo
    python benchmarks/search.py --model deep_demo     # a trained one, on running text

Prints a Markdown table. Naive greedy search runs the whole cut model on all texts for every
candidate of every round, and the full model once. Its values are computed on shared prefixes
here, which give the same; its executions are a formula, and both are first compared with a naive
search that is really run, on a small planted model. The executions of `smart` are counted by
hooks, one per layer and token, padding and the full model's pass included. What its set is worth
at each step is measured apart, on all texts, and not counted; so is the check that no single
swap improves the set it ends with.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from common import batches_of, counted, naive_losses, planted
from demo_corpus import training_samples

from llm_pruner import LayerStack, SmartPruner, load_model
from llm_pruner.search.layer_search import search_layers
from llm_pruner.search.passes import LayerSet
from llm_pruner.search.removal_quality import RemovalQuality

PROTECT = (2, 2)
TEXT_SEED = 99  # of running text; the demo models are trained on the streams of seeds 0 to 2


def main() -> None:
    """Check the naive side, search, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="a deep demo model; planted models if none")
    parser.add_argument("--layers", type=int, default=32, help="of the planted models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="planted models")
    parser.add_argument("--n-layers", type=int, default=8, help="how many layers go")
    parser.add_argument("--n-samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for tiny models")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    check_formula()
    print("| model | search | layers removed (0-based) | change | executions x tokens ", end="")
    print("| share of naive | single swaps that improve |")
    print("|---|---|---|---|---|---|---|")
    if args.model:
        model, tokenizer = load_model(args.model, device="cpu")
        texts = [sample.text for sample in islice(training_samples(TEXT_SEED), args.n_samples)]
        compare(Path(args.model).name, model, tokenizer, texts, args.n_layers)
        return
    for seed in args.seeds:
        model, tokenizer, texts, _ = planted(args.layers, seed, args.n_samples)
        compare(f"planted, seed {seed}", model, tokenizer, texts, args.n_layers)


def compare(name: str, model: Any, tokenizer: Any, texts: list[str], count: int) -> None:
    """Print the rows of one model."""
    pruner = SmartPruner(model, tokenizer, protect=PROTECT)
    stack, candidates = pruner.layers, pruner.candidates
    judge = RemovalQuality(stack, tokenizer, texts)
    tokens = sum(batch.input_ids.numel() for batch in batches_of(judge))
    naive = naive_executions(len(stack), len(candidates), count) * tokens

    def measured(layer_sets: Sequence[LayerSet]) -> dict[LayerSet, float]:
        judge.measure(layer_sets)
        return {layer_set: judge.change(layer_set) for layer_set in layer_sets}

    def row(search: str, layer_set: LayerSet, executions: int, better: str = "") -> None:
        layers = ", ".join(map(str, layer_set))
        cells = [search, layers, f"{judge.change(layer_set):+.5f}", f"{executions:,}"]
        cells += [f"{executions / naive:.3f}", better]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    greedy = greedy_search(candidates, count, measured)
    row("naive greedy", greedy, naive)
    reached: list[tuple[LayerSet, int]] = []
    with counted(stack) as executions:

        def note(step: dict[str, Any]) -> None:
            reached.append((tuple(step["removed"]), executions.total()))

        quality = RemovalQuality(stack, tokenizer, texts)
        refined = tuple(search_layers(quality, candidates, n_layers=count, on_step=note))
        total = executions.total()
    for layer_set, spent in reached:
        if len(layer_set) == count and judge.change(layer_set) >= judge.change(greedy):
            row("`smart`, as good", layer_set, spent)
            break
    else:
        print(f"| {name} | `smart`, as good | never |  |  |  |  |")
    others = measured(list(swaps(refined, candidates)))
    better = sum(change > judge.change(refined) for change in others.values())
    row("`smart`, refined", refined, total, f"{better} of {len(others)}")


def greedy_search(
    candidates: Sequence[int],
    count: int,
    measured: Callable[[Sequence[LayerSet]], dict[LayerSet, float]],
) -> LayerSet:
    """The layer whose removal on top costs least, again and again; of equals the deeper."""
    removed: LayerSet = ()
    for _ in range(count):
        left = [layer for layer in candidates if layer not in removed]
        changes = measured([tuple(sorted((*removed, layer))) for layer in left])
        removed = max(changes, key=lambda layer_set: (changes[layer_set], layer_set))
    return removed


def naive_executions(depth: int, candidates: int, count: int) -> int:
    """Layer executions per token of naive greedy search, the full model's pass included."""
    return depth + sum((candidates - cut) * (depth - cut - 1) for cut in range(count))


def swaps(removed: LayerSet, candidates: Sequence[int]) -> list[LayerSet]:
    """Every set with one layer swapped for a candidate."""
    left = [layer for layer in candidates if layer not in removed]
    return [tuple(sorted({*removed, back} - {out})) for out in removed for back in left]


def check_formula() -> None:
    """Run naive greedy search on a small model: its count is the formula, its values are ours."""
    model, tokenizer, texts, _ = planted(8, 0, 64)
    stack, candidates = LayerStack(model), range(2, 6)
    judge = RemovalQuality(stack, tokenizer, texts)
    batches = batches_of(judge)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    losses: dict[LayerSet, float] = {}

    def by_hand(layer_sets: Sequence[LayerSet]) -> dict[LayerSet, float]:
        losses.update(naive_losses(stack, batches, layer_sets))
        return {layer_set: math.expm1(losses[()] - losses[layer_set]) for layer_set in layer_sets}

    def shared(layer_sets: Sequence[LayerSet]) -> dict[LayerSet, float]:
        return {layer_set: judge.change(layer_set) for layer_set in layer_sets}

    with stack.bypass([0]):  # learns what layers return, by two tokens that are not to be counted
        pass
    with counted(stack) as executions:
        by_hand([()])
        greedy = greedy_search(candidates, 2, by_hand)
    count = executions.total()
    same = greedy == greedy_search(candidates, 2, shared)
    difference = max(
        abs(judge.change(layer_set) / math.expm1(losses[()] - loss) - 1)
        for layer_set, loss in losses.items()
        if layer_set
    )
    formula = naive_executions(8, len(candidates), 2) * tokens
    print(
        f"Naive greedy search, really run on 8 layers: {count:,} executions x tokens, the ", end=""
    )
    print(f"formula {formula:,}; {'the same' if same else 'ANOTHER'} set as on shared ", end="")
    print(f"prefixes; largest difference of a change {difference:.1e}, relative.\n")


if __name__ == "__main__":
    main()
