"""What a second process brings: the same scores, about half of the work each.

    python benchmarks/processes.py

Starts one process, and then as many as asked for (gloo, on the CPU, one thread each), and prints a
Markdown table for the demo model. Largest difference: of a score, or of the total change after a
step of `smart`, from that of one process, relative. Layer executions are counted by hooks, one per
layer and token, padding included; the share is that of the process with most of them. It is above
1 / processes by what portions of one tree of cuts run twice, and by what cannot be divided evenly.
Times are the best of alternating runs, those of the slowest process, without starting and loading;
they need as many idle cores as processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import counted

from llm_pruner import distributed, get_strategy, load_data, load_model
from llm_pruner.utils import disable_progress_bars

STRATEGIES = ("ablation", "smart", "pruneme", "bi", "avss")


def main() -> None:
    """Compare one process with several, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--n-samples", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs to time")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(args.worker, args.n_samples)
        return
    runs: dict[int, list[list[Any]]] = {1: [], args.processes: []}
    for _ in range(args.rounds):
        for count, found in runs.items():
            found.append(_started(count, args.n_samples))
    print("| strategy | largest difference | executions: 1 process ", end="")
    print(f"| each of {args.processes} | share | time: 1 process | {args.processes} | share |")
    print("|---|---|---|---|---|---|---|---|")
    for name in STRATEGIES:
        print(f"| `{name}` | {_row(name, runs[1], runs[args.processes])} |")


def _row(name: str, alone: list[list[Any]], together: list[list[Any]]) -> str:
    (one,), several = ([part[name] for part in runs[0]] for runs in (alone, together))
    pairs = zip(one["scores"], several[0]["scores"], strict=True)
    difference = max(abs(found / wanted - 1) for wanted, found in pairs)
    portions = [part["executions"] for part in several]
    seconds = [
        min(max(part[name]["seconds"] for part in run) for run in runs)
        for runs in (alone, together)
    ]
    cells = [f"{difference:.1e}", f"{one['executions']:,}", ", ".join(f"{n:,}" for n in portions)]
    cells += [f"{max(portions) / one['executions']:.3f}", f"{seconds[0]:.2f} s"]
    return " | ".join([*cells, f"{seconds[1]:.2f} s", f"{seconds[1] / seconds[0]:.2f}"])


def _started(count: int, n_samples: int) -> list[Any]:
    """What each of `count` processes found, in the order of their ranks."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        worker = [__file__, "--worker", folder, "--n-samples", str(n_samples)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *worker], env=environment, check=True)
        files = [Path(folder) / f"{rank}.json" for rank in range(count)]
        return [json.loads(path.read_text()) for path in files]


def _work(folder: Path, n_samples: int) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    model, tokenizer = load_model("demo", device="cpu")
    items = load_data("demo", n_samples).scoring
    found = {}
    with distributed.group():
        for name in STRATEGIES:
            pruner = get_strategy(name)(model, tokenizer)
            distributed.gather(None)  # all begin together
            start = time.perf_counter()
            with counted(pruner.layers) as executions:
                if name == "smart":
                    plan = pruner.plan(items, n_layers=3)
                    scores = [step["change"] for step in plan.steps]
                else:
                    scores = list(pruner.compute_layer_scores(items).values())
            seconds = time.perf_counter() - start
            total = executions.total()
            found[name] = {"scores": scores, "executions": total, "seconds": seconds}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
