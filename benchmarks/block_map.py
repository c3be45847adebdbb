"""What the similarity of every block of layers costs: one pass, against one pass per block.

    python benchmarks/block_map.py                            # demo model
    python benchmarks/block_map.py --model M --eval-dataset D.jsonl --n-samples 16

Prints a Markdown table. A block is a run of neighbouring layers; a model of L layers has
L (L + 1) / 2. Layer executions are counted by hooks on the layers, one per layer and token,
padding included. The naive loop computes Block Influence as one would write it down: for every
block a forward pass with a hook on either side. Times are the best of alternating runs, that of
the naive loop is from one. Memory is what lives at once of all tensors made during the run, above
that of the plain forward.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import counted, loaded, model_options, timed
from torch.utils._python_dispatch import TorchDispatchMode

from llm_pruner import BlockInfluencePruner, PruneMePruner
from llm_pruner.evaluation.likelihood import encode_for
from llm_pruner.model.forward import evaluating


def main() -> None:
    """Count, time, compare, print."""
    parser = model_options(__doc__, 32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="alternating runs to time")
    args = parser.parse_args()
    model, tokenizer, data = loaded(args)
    items = data.scoring
    influence = BlockInfluencePruner(model, tokenizer, batch_size=args.batch_size)
    angles = PruneMePruner(model, tokenizer, batch_size=args.batch_size)
    layers = influence.layers
    blocks = [(i, j) for i in range(len(layers)) for j in range(i + 1, len(layers) + 1)]

    def plain() -> None:
        for batch in encode_for(model, tokenizer, items, args.batch_size):
            with evaluating(model):
                model(**batch.to(layers.device).inputs(), use_cache=False)

    def naive() -> dict[tuple[int, int], float]:
        return {block: block_influence(*block) for block in blocks}

    def block_influence(start: int, end: int) -> float:
        seen: dict[str, torch.Tensor] = {}

        def before(module: Any, args: Any, kwargs: Any) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def after(module: Any, args: Any, output: Any) -> None:
            seen["out"] = output[0] if isinstance(output, tuple) else output

        total, count = 0.0, 0
        first = layers[start].register_forward_pre_hook(before, with_kwargs=True)
        last = layers[end - 1].register_forward_hook(after)
        for batch in encode_for(model, tokenizer, items, args.batch_size):
            with evaluating(model):
                model(**batch.to(layers.device).inputs(), use_cache=False)
            real = batch.attention_mask.bool()
            a, b = (seen[side][real.to(seen[side].device)].double() for side in ("in", "out"))
            total += (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).sum().item()
            count += len(a)
        first.remove()
        last.remove()
        return total / count

    runs: dict[str, Callable[[], Any]] = {
        "plain forward": plain,
        f"`bi`, all {len(blocks)} blocks": lambda: influence.distances(items),
        f"`pruneme`, all {len(blocks)} blocks": lambda: angles.distances(items),
        f"naive loop, all {len(blocks)} blocks": naive,
    }
    results, executed, memory = {}, {}, {}
    for name, run in runs.items():
        with counted(layers) as executions, Peak() as peak:
            results[name] = run()
        executed[name], memory[name] = executions.total(), peak.most
    seconds = dict.fromkeys(runs, float("inf"))
    for turn in range(args.rounds):
        for name, run in runs.items():
            if run is not naive or not turn:
                seconds[name] = min(seconds[name], timed(run))

    _, one_pass, _, by_hand = results.values()
    difference = max(abs(one_pass[i, j].item() - value) for (i, j), value in by_hand.items())
    total, first_memory, first_seconds = (
        next(iter(found.values())) for found in (executed, memory, seconds)
    )
    tokens = total // len(layers)
    print(f"{args.model}: {len(layers)} layers, {len(items)} items, ", end="")
    print(f"{tokens:,} tokens with padding, {layers.device}, {model.dtype}.\n")
    print("| run | layer executions x tokens | to a plain forward | time | extra memory |")
    print("|---|---|---|---|---|")
    for name in runs:
        cells = [f"{executed[name]:,}", f"{executed[name] / total:.2f}x"]
        cells.append(f"{seconds[name] / first_seconds:.2f}x")
        cells.append(f"{max(0, memory[name] - first_memory) / 2**20:.2f} MiB")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nLargest difference between `bi` and the naive loop: {difference:.1e}.")


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the block take at once; kernels' own not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._owners: Counter[int] = Counter()  # live tensors per storage, by its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                self.now += 0 if self._owners[address] else size
                self._owners[address] += 1
                weakref.finalize(tensor, self._release, address, size)
        self.most = max(self.most, self.now)
        return result

    def _release(self, address: int, size: int) -> None:
        self._owners[address] -= 1
        self.now -= 0 if self._owners[address] else size


if __name__ == "__main__":
    main()
