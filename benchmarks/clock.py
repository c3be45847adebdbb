"""What a choice of layers costs on a real model, by the clock: `smart` and `ablation` against SLEB.

    python benchmarks/clock.py --model smollm2 --text wikitext.jsonl --n-tokens 1500 --k 4 8

Prints a Markdown table. SLEB is plain greedy search: in every round a whole pass of the model, head
and loss included, for each layer that may go. It is really run, once, for the largest k; smaller
ones are on its way. `smart` is run as `SmartPruner` runs it, by likelihood as SLEB is: its first
row is the moment at which it had a set of k layers as good as SLEB's on all data, its second the
end, with the check that no swap of one layer improves it. What each set is worth is measured apart
and not counted. Seconds are by the clock and FLOPs two per parameter and token of layers and head,
all in one run on one machine; shares are of SLEB's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import Work, worked
from search import swaps

from llm_pruner import AblationPruner, LayerStack, SmartPruner, load_data, load_model
from llm_pruner.evaluation.likelihood import batch_nll, encode_for
from llm_pruner.search.removal_quality import RemovalQuality

PROTECT = (2, 2)


def main() -> None:
    """Run SLEB, ablation and smart on the same tokens; print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True, help=".txt, or .jsonl with a field text")
    parser.add_argument("--n-tokens", type=int, default=1500)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    texts = load_data(args.text, args.n_tokens // 16).within(tokenizer, args.n_tokens).scoring
    judge = RemovalQuality(LayerStack(model), tokenizer, texts)
    print(f"{len(texts)} texts, {judge.tokens} tokens with padding, {args.threads} threads\n")
    print("| search | k | layers removed (0-based) | change | seconds | share | TFLOP | share |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    sleb = greedy(model, tokenizer, texts, max(args.k))
    for k in args.k:
        row("SLEB", k, sleb[k - 1], judge, sleb[k - 1][1])
    pruner = AblationPruner(model, tokenizer, protect=PROTECT)
    with worked(pruner.layers) as work:
        pruner.compute_layer_scores(texts)
    print(f"| `ablation`, all layers | | | | {work.seconds:.1f} | | {work.flops / 1e12:.2f} | |")
    for k in args.k:
        smart(model, tokenizer, texts, judge, k, sleb[k - 1])


Found = tuple[tuple[int, ...], Work]


def greedy(model: Any, tokenizer: Any, texts: Sequence[Any], count: int) -> list[Found]:
    """SLEB's set of 1, 2, ... layers, and what it has taken until then."""
    stack = LayerStack(model)
    batches = encode_for(model, tokenizer, texts)
    left = list(range(PROTECT[0], len(stack) - PROTECT[1]))
    removed: tuple[int, ...] = ()
    spent, found = Work(), list[Found]()
    for _ in range(count):
        losses = {}
        with worked(stack) as work:
            for layer in left:
                with stack.bypass((*removed, layer)) as cut:
                    losses[layer] = batch_nll(cut, batches)
        best = min(left, key=lambda layer: (losses[layer], -layer))
        left.remove(best)
        removed = tuple(sorted((*removed, best)))
        spent = Work(spent.seconds + work.seconds, flops=spent.flops + work.flops)
        found.append((removed, spent))
    return found


class Watched(SmartPruner):
    """`smart`, with the time at which it had each of its sets."""

    reached: list[tuple[float, tuple[int, ...]]]

    def _search_once(self, pool: Any, eval_data: Any, limits: dict[str, Any]) -> list[int]:
        note = limits["on_step"]

        def told(step: dict[str, Any]) -> None:
            self.reached.append((time.perf_counter(), tuple(step["removed"])))
            note(step)

        return super()._search_once(pool, eval_data, {**limits, "on_step": told})


def smart(
    model: Any, tokenizer: Any, texts: Sequence[Any], judge: RemovalQuality, k: int, sleb: Found
) -> None:
    """Print the rows of `smart`."""
    pruner = Watched(model, tokenizer, objective="nll", protect=PROTECT)
    pruner.reached = []
    begun = time.perf_counter()
    with worked(pruner.layers) as work:
        end = tuple(pruner.optimize_selection(None, texts, n_layers=k))
    wanted = judge.change(sleb[0])
    first = next(
        (
            (seconds - begun, removed)
            for seconds, removed in pruner.reached
            if len(removed) == k and judge.change(removed) >= wanted
        ),
        None,
    )
    if first is None:
        print(f"| `smart`, as good | {k} | never | | | | | |")
    else:
        row("`smart`, as good", k, (first[1], Work(first[0])), judge, sleb[1])
    row("`smart`, refined", k, (end, work), judge, sleb[1])
    others = swaps(end, pruner.candidates)
    judge.measure(others)
    better = sum(judge.change(one) > judge.change(end) for one in others)
    print(f"| swaps of one layer that improve it | {k} | {better} of {len(others)} | | | | | |")


def row(name: str, k: int, found: Found, judge: RemovalQuality, naive: Work) -> None:
    """Print one row."""
    removed, work = found
    layers = ", ".join(map(str, removed))
    share = f"{work.flops / naive.flops:.3f}" if work.flops else ""
    flops = f"{work.flops / 1e12:.2f}" if work.flops else ""
    cells = [name, str(k), layers, f"{judge.change(removed):+.4f}", f"{work.seconds:.1f}"]
    cells += [f"{work.seconds / naive.seconds:.3f}", flops, share]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
