"""What a killed search loses: it is killed, taken up again from its journal, and compared.

    python benchmarks/resume.py

Prints a Markdown table. A search of `smart` on the demo model runs in a process of its own; that
process is killed (SIGKILL) at five moments, drawn at random from five equal parts of the time the
search takes, and started again with the same journal. Layer executions are counted by hooks, one
per layer and token, padding included, into a file that outlives the kill.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from counting import counted

from llm_pruner import SmartPruner, load_data, load_model

KILLS = 5


def main() -> None:
    """Run unkilled, kill and resume, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-layers", type=int, default=4, help="how many layers go")
    parser.add_argument("--n-samples", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--search-in", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search_in:
        search(args.search_in, args.n_samples, args.n_layers)
        return

    amount = ["--n-samples", str(args.n_samples), "--n-layers", str(args.n_layers)]
    drawn = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, seconds = run(folder / "whole", amount)
        plan, work, size = result(folder / "whole"), whole, readings(folder / "whole")
        print(f"demo: {args.n_layers} layers by `smart`, {args.n_samples} items, unkilled ", end="")
        print(f"{work:,} layer executions x tokens, {size} readings, {seconds:.1f} s.\n")
        print("| killed after | readings kept | executions until then ", end="")
        print("| of the resumed run | recomputed | same plan |")
        print("|---|---|---|---|---|---|")
        for part in range(KILLS):
            place = folder / f"killed{part}"
            moment = seconds * (part + drawn.random()) / KILLS
            before, _ = run(place, amount, kill_after=moment)
            killed = not (place / "plan.json").exists()
            kept = readings(place)
            after, _ = run(place, amount)
            again = (before + after - work) / work
            cells = [f"{moment:.1f} s" if killed else "not in time", f"{kept} of {size}"]
            cells += [f"{before:,}", f"{after:,}", f"{again:+.2%}"]
            print(f"| {' | '.join(cells)} | {'yes' if result(place) == plan else 'NO'} |")


def run(place: Path, amount: list[str], kill_after: float | None = None) -> tuple[int, float]:
    """Search in another process; what it executed, and how long it searched."""
    place.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--search-in", str(place), *amount]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()  # the model is loaded
    started = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.stdout.readline()  # the search is done, or killed
    seconds = time.perf_counter() - started
    if process.wait() and kill_after is None:
        raise SystemExit(f"The search failed with exit status {process.returncode}.")
    return int.from_bytes((place / "executions").read_bytes(), "little"), seconds


def search(place: Path, n_samples: int, n_layers: int) -> None:
    """The process that is killed."""
    torch.set_num_threads(1)
    model, tokenizer = load_model("demo", device="cpu")
    items = load_data("demo", n_samples).scoring
    pruner = SmartPruner(model, tokenizer, journal=place / "journal.jsonl")
    (place / "executions").write_bytes(bytes(8))
    with (place / "executions").open("r+b") as file, mmap.mmap(file.fileno(), 8) as shown:

        def note(tokens: int) -> None:
            shown[:] = (int.from_bytes(shown[:], "little") + tokens).to_bytes(8, "little")

        print("ready", flush=True)
        with counted(pruner.layers, note):
            plan = pruner.plan(items, model_id="demo", n_layers=n_layers)
        plan.save(place / "plan.json")
        print("done", flush=True)


def result(place: Path) -> Any:
    """The plan that was written, all of it."""
    return json.loads((place / "plan.json").read_text())


def readings(place: Path) -> int:
    """How many lines the journal has."""
    journal = place / "journal.jsonl"
    return len(journal.read_text().splitlines()) if journal.exists() else 0


if __name__ == "__main__":
    main()
