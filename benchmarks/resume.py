"""What a killed run loses: it is killed, resumed, and compared with one that was not.

    python benchmarks/resume.py                # a search, resumed from its journal
    python benchmarks/resume.py --training     # healing by LoRA, from its last checkpoint

Prints a Markdown table. A search of `smart` on the demo model, or the training that heals a cut of
it, runs in a process of its own; that process is killed (SIGKILL) at five moments, drawn at random
from five equal parts of the time the run takes, and started again. Layer executions are counted
by hooks, one per layer and token, padding included, into a file that outlives the kill. "Kept" are
the journal's readings, or the training's steps at its last training checkpoint.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import counted

from llm_pruner import LayerStack, SmartPruner, load_data, load_model
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.healing.heal import HEALERS
from llm_pruner.healing.job import HealingJob
from llm_pruner.healing.lora_settings import LoraSettings

KILLS = 5


def main() -> None:
    """Run unkilled, kill and resume, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", action="store_true", help="heal instead of searching")
    parser.add_argument("--n-layers", type=int, default=4, help="how many layers go")
    parser.add_argument("--n-samples", type=int, default=80)
    parser.add_argument("--steps", type=int, default=200, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--place", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.place:
        job = train if args.training else search
        job(args.place, args.n_samples, args.n_layers, args.steps)
        return

    what = "a training" if args.training else "a search"
    drawn = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, seconds = run(folder / "whole")
        wanted, size = result(folder / "whole"), kept(folder / "whole")
        print(f"demo, {args.n_layers} layers, {args.n_samples} items: {what}, unkilled ", end="")
        print(f"{whole:,} layer executions x tokens, {seconds:.1f} s.\n")
        print("| killed after | kept | executions until then | of the resumed run ", end="")
        print("| recomputed | result |")
        print("|---|---|---|---|---|---|")
        for part in range(KILLS):
            place = folder / f"killed{part}"
            moment = seconds * (part + drawn.random()) / KILLS
            before, _ = run(place, kill_after=moment)
            killed = not (place / "result.json").exists()
            found = kept(place)
            after, _ = run(place)
            again = (before + after - whole) / whole
            cells = [f"{moment:.1f} s" if killed else "not in time", f"{found} of {size}"]
            cells += [f"{before:,}", f"{after:,}", f"{again:+.2%}", difference(place, wanted)]
            print(f"| {' | '.join(cells)} |", flush=True)


def run(place: Path, kill_after: float | None = None) -> tuple[int, float]:
    """Run in another process, with this one's options; what it executed, and how long it took."""
    place.mkdir(exist_ok=True)
    command = [sys.executable, *sys.argv, "--place", str(place)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()  # the model is loaded
    started = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.stdout.readline()  # it is done, or killed
    seconds = time.perf_counter() - started
    if process.wait() and kill_after is None:
        raise SystemExit(f"The run failed with exit status {process.returncode}.")
    return int.from_bytes((place / "executions").read_bytes(), "little"), seconds


def search(place: Path, n_samples: int, n_layers: int, steps: int) -> None:
    """A process that is killed while it searches."""
    model, tokenizer = load_model("demo", device="cpu")
    items = load_data("demo", n_samples).scoring
    pruner = SmartPruner(model, tokenizer, journal=place / "journal.jsonl")
    with announced(place, pruner.layers):
        plan = pruner.plan(items, model_id="demo", n_layers=n_layers)
    (place / "result.json").write_text(plan.to_json())
    print("done", flush=True)


def train(place: Path, n_samples: int, n_layers: int, steps: int) -> None:
    """A process that is killed while it heals."""
    model, tokenizer = load_model("demo", device="cpu")
    stack = LayerStack(model)
    items = load_data("demo", n_samples, healing=True).healing
    settings = LoraSettings(steps=steps, checkpoints=place / "healing")
    job = HealingJob.of(stack, range(4, 4 + n_layers), tokenizer, items, settings)
    with announced(place, stack):
        healed, _ = HEALERS["lora"](job, stack.remove(job.removed))
        loss = batch_nll(healed, job.held_out)
    (place / "result.json").write_text(json.dumps(loss))
    print("done", flush=True)


@contextmanager
def announced(place: Path, layers: LayerStack) -> Iterator[None]:
    """Announce that the work begins, and keep the count of its executions in a file."""
    (place / "executions").write_bytes(bytes(8))
    with (place / "executions").open("r+b") as file, mmap.mmap(file.fileno(), 8) as shown:

        def note(tokens: int) -> None:
            shown[:] = (int.from_bytes(shown[:], "little") + tokens).to_bytes(8, "little")

        print("ready", flush=True)
        with counted(layers, note):
            yield


def result(place: Path) -> Any:
    """The plan that was written, all of it; or the healed model's held-out loss."""
    return json.loads((place / "result.json").read_text())


def difference(place: Path, wanted: Any) -> str:
    """How the result compares."""
    found = result(place)
    if isinstance(found, float):
        return f"held-out loss {found:.4f}, unkilled {wanted:.4f}"
    return "the same plan" if found == wanted else "ANOTHER PLAN"


def kept(place: Path) -> int:
    """How many lines the journal has; or after how many steps the last checkpoint was written."""
    journal = place / "journal.jsonl"
    if journal.exists():
        return len(journal.read_text().splitlines())
    written = [path.parent.name for path in place.glob("healing/checkpoint-*/trainer_state.json")]
    return max((int(name.split("-")[1]) for name in written), default=0)


if __name__ == "__main__":
    main()
