"""How close every strategy comes to the best set of layers, which brute force finds.

    python benchmarks/brute_force.py                                  # demo model, 1 to 4 layers
    python benchmarks/brute_force.py --model M --eval-dataset D.jsonl --n-samples 32

Prints a Markdown table per number of layers. Sets are chosen on one half of the items: what a
removal costs is the rise of the mean loss of their tokens, and the excess of a choice is what it
costs above the best of all sets, as a share of that one's cost (of its size, where the best set is
a gain). Perplexity is that of the other items. All compare by likelihood. `greedy` is the plain
greedy search, `last` takes the last layers before the final one.
"""

from __future__ import annotations

import math
from itertools import combinations
from statistics import median

from common import loaded, model_options

from llm_pruner import SmartPruner, get_strategy, perplexity
from llm_pruner.goals.budget import Budget
from llm_pruner.search.passes import LayerSet

ONE_SHOT = ("ablation", "avss", "bi", "pruneme")


def main() -> None:
    """Measure all sets, choose by every strategy, print."""
    parser = model_options(__doc__, 80)
    parser.add_argument("--most", type=int, default=4, help="layers to remove at most")
    parser.add_argument("--protect", type=int, nargs=2, default=(0, 0))
    args = parser.parse_args()
    model, tokenizer, data = loaded(args)
    protect = tuple(args.protect)
    smart = SmartPruner(model, tokenizer, objective="nll", protect=protect)
    quality, stack, candidates = smart.quality(data.scoring), smart.layers, smart.candidates
    counts = range(1, args.most + 1)
    sets = {count: list(combinations(candidates, count)) for count in counts}
    quality.measure([layer_set for count in counts for layer_set in sets[count]])

    def cost(layer_set: LayerSet) -> float:
        return math.log(quality() / quality(layer_set))

    choices: dict[str, dict[int, LayerSet]] = {
        "best of all sets": {count: min(sets[count], key=cost) for count in counts},
        "smart": {count: smart.plan(data.scoring, n_layers=count).remove for count in counts},
        "greedy": {},
    }
    grown: LayerSet = ()
    for count in counts:
        above = [layer_set for layer_set in sets[count] if set(grown) < set(layer_set)]
        choices["greedy"][count] = grown = min(above, key=cost)
    for name in ONE_SHOT:
        pruner = get_strategy(name)(model, tokenizer, protect=protect)
        scores = pruner.compute_layer_scores(data.scoring)
        choices[name] = {
            count: tuple(pruner.choose_layers(scores, data.scoring, Budget(n_layers=count)))
            for count in counts
        }
    end = len(stack) - max(1, protect[1])
    choices["last"] = {count: tuple(range(end - count, end)) for count in counts}

    def excess(layer_set: LayerSet, count: int) -> float:
        best = cost(choices["best of all sets"][count])
        return 100 * (cost(layer_set) - best) / abs(best)

    print(
        f"{args.model}: {len(stack)} layers, protected {protect}, {len(data.scoring)} items to ",
        end="",
    )
    print(f"choose, {len(data.held_out)} others.")
    full = perplexity(model, tokenizer, data.held_out)
    held_out: dict[LayerSet, float] = {}
    for count in counts:
        print(
            f"\n{count} of {len(stack)} layers: {len(sets[count])} sets, perplexity of the ", end=""
        )
        print(f"full model on other items {full:.3f}.\n")
        print("| choice | layers removed (0-based) | loss rises by | excess | perplexity |")
        print("|---|---|---|---|---|")
        for name, chosen in choices.items():
            layer_set = chosen[count]
            if layer_set not in held_out:
                with stack.bypass(layer_set) as cut:
                    held_out[layer_set] = perplexity(cut, tokenizer, data.held_out)
            cells = [name, ", ".join(map(str, layer_set)), f"{cost(layer_set):.4f}"]
            cells.append(f"{excess(layer_set, count):.1f} %")
            print(f"| {' | '.join(cells)} | {held_out[layer_set]:.3f} |")
    excesses = [excess(choices["smart"][count], count) for count in counts]
    above = [n for n in counts if cost(choices["smart"][n]) > cost(choices["greedy"][n])]
    print(
        f"\nMedian excess of `smart`: {median(excesses):.1f} %. Above greedy search with ", end=""
    )
    print(f"{', '.join(map(str, above))} layers." if above else "no number of layers.")


if __name__ == "__main__":
    main()
