"""Could gradients order the candidates of a search? First-order estimates against measurements.

    python benchmarks/attribution.py                      # the demo model
    python benchmarks/attribution.py --model M --eval-dataset D.jsonl

One forward and backward pass estimates for every layer what its removal does to the loss,
-<d loss / d output, output - input>. The table shows how well that, on all samples and on the
first subset of them, ranks the candidates as measuring each on all samples does (Spearman's rank
correlation), beside measuring each on the first subset alone, with no layer removed and on the way
of a search. The search uses gradients nowhere: this is why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import loaded, model_options
from torch.nn.functional import cross_entropy

from llm_pruner import SmartPruner
from llm_pruner.data.tokens import Batch
from llm_pruner.evaluation.likelihood import encode_for
from llm_pruner.evaluation.token_measures import PreparedBatch
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.search.passes import LayerSet


def first_order(stack: LayerStack, removed: LayerSet, batches: Sequence[Batch]) -> dict[int, float]:
    """Estimated change of the summed loss for each layer removed on top of `removed`, in nats."""
    for parameter in stack.model.parameters():
        parameter.requires_grad_(False)
    total = dict.fromkeys((i for i in range(len(stack)) if i not in removed), 0.0)
    for batch in batches:
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
            leaving.retain_grad()
            states[index] = entering, leaving  # noqa: B023

        def start(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return output.requires_grad_()

        handle = stack.model.get_input_embeddings().register_forward_hook(start)
        with stack.bypass(removed), stack.observe(keep):
            scored = PreparedBatch.of(stack.model, batch).run(stack.model)
            losses = [cross_entropy(*chunk, reduction="sum") for chunk in scored.chunks()]
            torch.stack(losses).sum().backward()
        handle.remove()
        for index, (entering, leaving) in states.items():
            added = (leaving - entering).detach().double()
            total[index] -= float((leaving.grad.double() * added).sum())
    return total


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (left, right)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    """Estimate, measure, compare."""
    parser = model_options(__doc__, 160)
    parser.add_argument("--n-layers", type=int, default=4)
    args = parser.parse_args()
    model, tokenizer, items = loaded(args)
    data = items.scoring
    pruner = SmartPruner(model, tokenizer)
    quality = pruner.quality(data)
    pruner.optimize_selection(None, data, n_layers=args.n_layers)
    way = [step["removed"] for step in pruner.steps if step["action"] == "cut"]
    first = quality.subsets()[0]
    few = encode_for(model, tokenizer, data[: quality.size(first)])
    print(f"{args.model}, {len(data)} items, first subset {quality.size(first)} samples\n")
    print("| layers removed | gradients, all | gradients, first subset | measured, first subset |")
    print("|---|---|---|---|")
    for removed in [[], *way[:-1]]:
        layer_sets = {
            layer: tuple(sorted([*removed, layer]))
            for layer in pruner.candidates
            if layer not in removed
        }
        quality.measure(layer_sets.values())
        exact = [-quality.change(layer_set) for layer_set in layer_sets.values()]
        batches = encode_for(model, tokenizer, data)
        columns = [
            [first_order(pruner.layers, tuple(removed), some)[layer] for layer in layer_sets]
            for some in (batches, few)
        ]
        columns.append([-quality.change(layer_set, first) for layer_set in layer_sets.values()])
        cells = " | ".join(f"{spearman(column, exact):+.2f}" for column in columns)
        print(f"| {removed} | {cells} |")


if __name__ == "__main__":
    main()
