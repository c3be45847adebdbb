"""Time and memory of the closed form's solve for one layer of a wide model, on made-up features.

    python benchmarks/wide_linear.py                       # hidden 4,096, feed-forward 14,336
    python benchmarks/wide_linear.py --hidden 576 --mlp 1536 --tokens 8192

Sums over the tokens of the map that writes a feed-forward network's part (`down_proj`), then the
search among ridges, as `linear` healing does both. What makes such a width feasible: sums by block
in float32, added up in one float64 matrix (1.6 GB at 14,336); no second matrix for the validation
tokens, whose features are kept instead (they are fewer than the features); a matrix scaled to a
diagonal of ones, so that it can be factorised in float32, in place (0.8 GB); and ridges tried
downhill from the one that the layer below took, not all of them. Prints a Markdown table and, from
the measured speed, what a whole model would take. The time for sums grows with the tokens, that for
a ridge does not.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import torch

from llm_pruner.healing.least_squares import RIDGES, Sums, Tokens, best_update

BLOCK = 1024  # tokens
DIRECTIONS = 256


def main() -> None:
    """Sum, solve, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--tokens", type=int, default=2048, help="to sum over")
    parser.add_argument("--validation", type=int, default=1024, help="tokens that judge a ridge")
    parser.add_argument("--start", type=float, default=0.3, help="ridge to try first")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    truth = torch.randn(args.mlp, args.hidden, generator=torch.Generator().manual_seed(1))
    truth *= args.mlp**-0.5
    print(f"Hidden {args.hidden:,}, features {args.mlp:,}, {args.threads} threads.\n")
    print("| step | seconds | peak GB so far |")
    print("|---|---|---|")
    sums, seconds = Sums(is_map=True), 0.0
    for block in blocks(args.tokens, truth, seed=2):
        start = time.perf_counter()
        sums.add(block)
        seconds += time.perf_counter() - start
    line(f"sums over {args.tokens:,} tokens", seconds)
    judged = list(blocks(args.validation, truth, seed=3))
    tried: list[float] = []
    solve = sums.solve

    def counted(ridge: float) -> torch.Tensor | None:
        start = time.perf_counter()
        update = solve(ridge)
        tried.append(time.perf_counter() - start)
        line(f"one ridge, {ridge:g}: factorise and solve", tried[-1])
        return update

    sums.solve = counted  # type: ignore[method-assign]
    start = time.perf_counter()
    ridge, left, _ = best_update(sums, judged, args.start)
    line(f"search: {len(tried)} of {len(RIDGES)} ridges", time.perf_counter() - start)
    print(f"\nRidge {ridge} leaves {left:.1%} of the deviation on the validation tokens.")
    per_token = seconds / args.tokens
    print(f"Sums take {per_token * 1e6:.0f} us per token: 100,000 tokens {per_token * 1e5:.0f} s.")


def blocks(tokens: int, truth: torch.Tensor, seed: int) -> Iterator[Tokens]:
    """Features that mostly vary in a few hundred directions, as a language model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIRECTIONS, len(truth), generator=torch.Generator().manual_seed(4))
    for _ in range(max(1, tokens // BLOCK)):
        features = torch.randn(BLOCK, DIRECTIONS, generator=generator) @ mixing
        features += torch.randn(BLOCK, len(truth), generator=generator)
        noise = torch.randn(BLOCK, truth.shape[1], generator=generator)
        yield Tokens(features, features @ truth * DIRECTIONS**-0.5 + noise, torch.ones(BLOCK, 1))


def line(step: str, seconds: float) -> None:
    """One row of the table."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {step} | {seconds:.1f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
