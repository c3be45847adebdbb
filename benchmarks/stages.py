"""Time and peak memory of every stage of a run on a real model, each in a process of its own.

    python benchmarks/stages.py --model smollm2 --text passages.jsonl --n-tokens 1024 --n-layers 6

Prints a Markdown table. Memory is the most that was resident (ru_maxrss), interpreter and libraries
included; on a GPU (`--device cuda`) also the most that PyTorch allocated there. `write`, `compare`
(which writes too) and healing remove the layers in the middle.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

STAGES = ("load", "bi", "ablation", "smart", "linear", "lora", "write", "compare")


def main() -> None:
    """Run the stages, print. Imports nothing large: a process inherits the mark of its parent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True, help=".txt, or .jsonl with a field text")
    parser.add_argument("--n-tokens", type=int, default=1024)
    parser.add_argument("--heal-tokens", type=int, default=4096)
    parser.add_argument("--n-layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="of lora")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--stage", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(measured(args)))
        return
    print(
        f"{args.model} in {args.dtype}, {args.threads} threads; {args.n_tokens:,} tokens, ", end=""
    )
    print(f"{args.heal_tokens:,} to train on; {args.n_layers} layers go.\n")
    print("| stage | seconds | peak memory, GB | on the GPU, GB |")
    print("|---|---|---|---|")
    for stage in args.stages:
        command = [sys.executable, *sys.argv, "--stage", stage]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        gpu = "" if found["gpu"] is None else f"{found['gpu'] / 1e9:.2f}"
        cells = f"{found['seconds']:.1f} | {found['peak'] / 1e9:.2f} | {gpu}"
        print(f"| {stage} | {cells} |", flush=True)


def measured(args: argparse.Namespace) -> dict[str, float | None]:
    """Seconds of a stage, once model and data are loaded; most bytes in memory, and on the GPU."""
    import torch
    from common import timed

    from llm_pruner import LayerStack, load_data, load_model

    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    loaded = load_data(args.text, args.n_tokens // 16, healing=True)
    data = replace(loaded.within(tokenizer, args.n_tokens), healing=loaded.healing)
    seconds = timed(lambda: run(args, LayerStack(model), tokenizer, data))
    on_gpu = model.device.type == "cuda"
    return {
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def run(args: argparse.Namespace, stack: Any, tokenizer: Any, data: Any) -> None:
    """One stage."""
    from llm_pruner import Healing, carry_out, get_strategy, heal_model
    from llm_pruner.checkpoint.save import write_model
    from llm_pruner.healing.lora_settings import LoraSettings

    stage = args.stage
    if stage == "load":
        return
    scoring = stage in ("bi", "ablation", "smart")
    pruner = get_strategy(stage if scoring else "bi")(stack.model, tokenizer)
    if scoring:
        pruner.plan(data.scoring, n_layers=args.n_layers)
        return
    middle = (len(stack) - args.n_layers) // 2
    removed = tuple(range(middle, middle + args.n_layers))
    with tempfile.TemporaryDirectory() as folder:
        if stage == "write":
            write_model(stack.remove(removed), Path(folder))
        elif stage == "compare":
            plan = pruner.manual_plan(removed, args.model)
            carry_out(pruner, plan, Path(folder) / "output", data.held_out)
        else:
            how = Healing(stage, tokens=args.heal_tokens)
            given = stack, removed, stack.remove(removed), tokenizer, how, data.healing
            heal_model(*given, lora=LoraSettings(steps=args.steps))


if __name__ == "__main__":
    main()
