"""What measuring costs: multiply-adds of layers, head and softmax, per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..model.layer_stack import LayerStack

# What the softmax of one logit takes, in multiply-adds of a matrix product: 0.29 of the time of
# a head of width 576 and 49,152 tokens (SmolLM2-135M in float32 on one core).
SOFTMAX = 165
# Of all swaps of one layer the share that a search measures, and on how much of the data, about.
TRIED, SWAP_SHARE = 0.6, 0.5


@dataclass(frozen=True)
class TokenCost:
    """Multiply-adds that a token costs.

    Attributes:
        layer: in one layer, the mean of all.
        head: behind the layers, if it is scored.
        depth: how many layers there are.
    """

    layer: float
    head: float
    depth: int

    @classmethod
    def of(cls, stack: LayerStack) -> TokenCost:
        """From the numbers of parameters; that attention looks back is left out."""
        sizes = [sum(one.numel() for one in layer.parameters()) for layer in stack]
        find_head = getattr(stack.model, "get_output_embeddings", lambda: None)
        weight = getattr(find_head(), "weight", None)
        head = 0.0 if weight is None else weight.shape[0] * (weight.shape[-1] + SOFTMAX)
        return cls(max(1.0, sum(sizes) / len(sizes)), float(head), len(stack))

    def of_pass(self, layers: int) -> float:
        """A pass through so many layers and the head."""
        return layers * self.layer + self.head

    def of_naive_greedy(self, candidates: int, count: int) -> float:
        """Greedy search for `count` layers by whole passes, one per set (SLEB), of one token.

        Every round runs the cut model without each candidate that is left; the full model runs
        once.
        """
        rounds = range(min(count, candidates))
        cuts = sum((candidates - cut) * self.of_pass(self.depth - cut - 1) for cut in rounds)
        return self.of_pass(self.depth) + cuts

    def of_search(
        self, candidates: int, count: int, shares: Sequence[float], *, replays: bool
    ) -> float:
        """What `LayerSearch` takes for `count` layers, per token of the data, about.

        Args:
            shares: of the data that is in each of its growing subsets, the last of them 1.
            replays: whether passes begin where sets of layers differ, half way on average.
        """
        each = self.of_pass(self.depth // 2 if replays else self.depth)
        steps = [share - before for before, share in pairwise([0.0, *shares])]
        cuts = 0.0
        for cut in range(count):
            widths = [candidates if not cut else max(8, (candidates - cut) // 2), 8, 4, 2]
            cuts += sum(width * step for width, step in zip(widths, steps, strict=False))
        swaps = TRIED * count * (candidates - count) + candidates
        return 2 * self.of_pass(self.depth) + each * (cuts + swaps * SWAP_SHARE)
