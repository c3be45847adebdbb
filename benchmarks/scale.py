"""What choosing layers would take for larger models and other machines: arithmetic, not measured.

    python benchmarks/scale.py > docs/scale.md

Writes the whole page. The counts are those of `TokenCost`, by which `--estimate` says what a run
will take after it has timed one batch; here the speed of a machine is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_pruner.progress import duration
from llm_pruner.search.passes import SOFTMAX, TokenCost

TOKENS = 32_768  # to choose on
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the data, in growing subsets
BYTES = 2  # of a parameter in bfloat16
ROUNDS = 5  # comparisons of a cut, each of which reads all weights that do not fit
SWAPS = 15  # comparisons of the swaps at the end
JUDGING = 4.5  # passes over as many tokens again, to compare both models


@dataclass(frozen=True)
class Model:
    """A model by its published config.

    Attributes:
        layers: its depth.
        stored: parameters of a layer.
        active: those of them that a token meets.
        hidden, vocabulary: of the head.
    """

    name: str
    layers: int
    stored: float
    active: float
    hidden: int
    vocabulary: int

    @property
    def bytes(self) -> float:
        """Of all weights, embeddings and head included."""
        return BYTES * (self.layers * self.stored + 2 * self.hidden * self.vocabulary)

    @property
    def cost(self) -> TokenCost:
        """Multiply-adds of a token."""
        return TokenCost(self.active, self.vocabulary * (self.hidden + SOFTMAX), self.layers)


@dataclass(frozen=True)
class Machine:
    """What a machine is assumed to reach.

    Attributes:
        speed: multiply-adds per second in bfloat16, as matrix products of this size reach them.
        memory: bytes for weights.
        reading: bytes per second at which weights that do not fit are read again.
    """

    name: str
    speed: float
    memory: float
    reading: float


MODELS = (
    Model("8B (Llama 3.1)", 32, 218.1e6, 218.1e6, 4096, 128256),
    Model("70B (Llama 3.1)", 80, 855.7e6, 855.7e6, 8192, 128256),
    Model("405B (Llama 3.1)", 126, 3188.7e6, 3188.7e6, 16384, 128256),
    Model("671B MoE, 37B active (DeepSeek-V3)", 61, 10.9e9, 0.59e9, 7168, 129280),
)
MACHINES = (
    Machine("laptop: 0.4 TMAC/s, 24 GB, disk 2 GB/s", 0.4e12, 24e9, 2e9),
    Machine("one 24 GB GPU: 30 TMAC/s, 12 GB/s from memory", 30e12, 20e9, 12e9),
    Machine("eight 80 GB GPUs: 1,200 TMAC/s, 8 x 12 GB/s", 1200e12, 600e9, 96e9),
)


def seconds(model: Model, machine: Machine, work: float, readings: float) -> float:
    """Computing, or reading what does not fit, whichever takes longer."""
    reads = 0.0 if model.bytes <= machine.memory else readings * model.bytes / machine.reading
    return max(work * TOKENS / machine.speed, reads)


def row(model: Model, machine: Machine) -> str:
    """One row of the table."""
    cost, count = model.cost, round(model.layers / 5)
    whole = cost.of_pass(model.layers)
    candidates = model.layers - 4
    each = cost.of_pass(model.layers // 2)  # streamed or not, what is shared runs once
    search = cost.of_search(candidates, count, SHARES, replays=True)
    times = [
        seconds(model, machine, whole, 1),
        seconds(model, machine, whole + model.layers * each, 2),
        seconds(model, machine, search, ROUNDS * count + SWAPS),
        seconds(model, machine, JUDGING * whole, JUDGING),
    ]
    fits = "in memory" if model.bytes <= machine.memory else "streamed"
    return f"| {machine.name} | {fits} | {' | '.join(map(duration, times))} |"


def main() -> None:
    """Print the page."""
    print(
        f"""# What larger models would take

Arithmetic (`python benchmarks/scale.py`), not measurements: what choosing a fifth of the layers on
{TOKENS:,} tokens would take, and comparing both models on as many others. `--estimate` does the
same arithmetic on your machine after timing one batch.

Assumed: weights in bfloat16; the speeds of the table, which are about 40 % of what such machines
are sold for; layers and head counted, attention to earlier tokens not (a few per cent at windows of
512 tokens); weights that do not fit in memory are read anew for every comparison, {ROUNDS} for a
cut and {SWAPS} for the swaps, at the speed given, while the machine computes. One pass gives `bi`,
`pruneme` and `avss`. A mixture of experts is counted by the parameters that a token meets, and
read as a whole."""
    )
    for model in MODELS:
        print(f"\n## {model.name}\n\n{model.layers} layers, {model.bytes / 1e9:,.0f} GB.\n")
        print("| machine | weights | one pass | `ablation` | `smart` | comparing |")
        print("|---|---|---|---|---|---|")
        for machine in MACHINES:
            print(row(model, machine))


if __name__ == "__main__":
    main()
