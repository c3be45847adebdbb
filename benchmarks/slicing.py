"""Pruning a checkpoint on disk against copying it, transformers and MergeKit: time and memory.

    python benchmarks/slicing.py --gigabytes 2 --mergekit /path/to/mergekit-yaml
    python benchmarks/slicing.py --gigabytes 8
    python benchmarks/slicing.py --tensors 90000 --shards 191

Prints a Markdown table. The checkpoint is a random Llama in bfloat16, written tensor by tensor; a
quarter of its layers goes. Every road runs in a process of its own, start included, in turns:

- ``cp``: copies a folder that holds exactly the kept bytes; ``cp, synced`` waits until they are
  on the disk, as pruning on disk does;
- ``on disk``: `llm_pruner.checkpoint.on_disk.prune_checkpoint`;
- ``transformers``: load, drop, renumber, `save_pretrained`;
- ``mergekit``: `mergekit-yaml`, with a passthrough recipe, if its path is given.

With ``--tensors`` the checkpoint is a mixture of experts in FP8 with as many tensors, of a few
bytes each, so that only the bookkeeping costs anything; it is pruned on disk alone, without torch.

Memory is the peak of a process's resident pages. Every result is compared with the kept tensors,
bit for bit; how many differ is in the last column.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from llm_pruner.checkpoint.on_disk import MANIFEST_FILE, prune_checkpoint
from llm_pruner.storage.safetensors_files import read_checkpoint, tensor_hashes
from llm_pruner.storage.sources import LocalFolder

SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8},
    "2": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16},
    "8": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 20},
}
PER_SHARD = 2**30  # bytes

TRANSFORMERS = """
import sys
from torch import nn
from transformers import AutoModelForCausalLM
source, target, removed = sys.argv[1], sys.argv[2], set(map(int, sys.argv[3].split(",")))
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
kept = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
for index, layer in enumerate(kept):
    layer.self_attn.layer_idx = index
model.model.layers = nn.ModuleList(kept)
model.config.num_hidden_layers = len(kept)
model.save_pretrained(target, max_shard_size="1GB")
"""
ON_DISK = """
import sys
from llm_pruner.checkpoint.on_disk import prune_checkpoint
prune_checkpoint(sys.argv[1], list(map(int, sys.argv[3].split(","))), sys.argv[2])
assert "torch" not in sys.modules
"""
MANY_LAYERS = 61
BESIDE_EXPERTS = {  # of a layer: how many values, and their dtype
    "input_layernorm.weight": (4, "BF16"),
    **{
        f"self_attn.{name}_proj.{part}": kind
        for name in "qkvo"
        for part, kind in {"weight": (8, "F8_E4M3"), "weight_scale_inv": (1, "F32")}.items()
    },
    "post_attention_layernorm.weight": (4, "BF16"),
    "mlp.gate.weight": (4, "BF16"),
}
OF_AN_EXPERT = {
    f"{name}_proj.{part}": kind
    for name in ("gate", "up", "down")
    for part, kind in {"weight": (8, "F8_E4M3"), "weight_scale_inv": (1, "F32")}.items()
}
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def main() -> None:
    """Write the checkpoint, run every road in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", default="2", choices=sorted(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml program")
    parser.add_argument("--slow", type=int, default=1, help="rounds of transformers and MergeKit")
    parser.add_argument("--folder", type=Path, help="where there is room (default: the temporary)")
    parser.add_argument("--tensors", type=int, help="measure the bookkeeping of so many")
    parser.add_argument("--shards", type=int, default=191, help="files that hold them")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = SIZES[args.gigabytes]
    if args.write and args.tensors:
        write_experts(args.write, args.tensors, args.shards)
        return
    if args.write:  # in a process of its own: what a process has used its children seem to use
        write_llama(args.write, sizes)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        place = Path(name)
        source, reference = place / "source", place / "reference"
        subprocess.run([sys.executable, *sys.argv, "--write", str(source)], check=True)
        if args.tensors:
            report_bookkeeping(source, place / "out", args.rounds)
            return
        n_layers = sizes["num_hidden_layers"]
        removed = list(range(2, 2 + n_layers // 4))
        prune_checkpoint(source, removed, reference)
        words = [str(source), str(place / "out"), ",".join(map(str, removed))]
        roads: dict[str, tuple[list[str], int]] = {
            "cp": (["cp", "-r", str(reference), words[1]], args.rounds),
            "cp, synced": (
                ["sh", "-c", f"cp -r {reference} {words[1]} && sync -f {words[1]}"],
                args.rounds,
            ),
            "on disk": ([sys.executable, "-c", ON_DISK, *words], args.rounds),
            "transformers": ([sys.executable, "-c", TRANSFORMERS, *words], args.slow),
        }
        if args.mergekit:
            recipe = place / "recipe.yaml"
            recipe.write_text(passthrough(source, removed, n_layers))
            command = [str(args.mergekit), str(recipe), words[1], "--no-write-model-card"]
            roads["mergekit"] = (command, args.slow)
        report(source, reference, place / "out", roads, removed)


def report_bookkeeping(source: Path, out: Path, rounds: int) -> None:
    """Prune the checkpoint of many tensors in turns and print what that takes."""
    removed = range(3, MANY_LAYERS, 4)
    words = [str(source), str(out), ",".join(map(str, removed))]
    print("| CPU time (s) | time (s) | peak memory (MB) | manifest (KB) | tensors |")
    print("|---|---|---|---|---|")
    for _ in range(rounds):
        usage = run([sys.executable, "-c", ON_DISK, *words])
        manifest = (out / MANIFEST_FILE).stat().st_size
        kept = len(read_headers(out))
        shutil.rmtree(out)
        print(f"| {usage.cpu:.2f} | {usage.seconds:.2f} | {usage.peak:.0f} | ", end="")
        print(f"{manifest / 1e3:,.0f} | {len(read_headers(source)):,} to {kept:,} |")


def read_headers(folder: Path) -> list[str]:
    """The names of all tensors, read in the plainest way."""
    names: list[str] = []
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        names += header.keys() - {"__metadata__"}
    return names


def report(
    source: Path,
    reference: Path,
    out: Path,
    roads: dict[str, tuple[list[str], int]],
    removed: list[int],
) -> None:
    """Run every road in turns and print the table."""
    roads = {road: (command, rounds) for road, (command, rounds) in roads.items() if rounds}
    times: dict[str, list[float]] = {road: [] for road in roads}
    peaks: dict[str, float] = dict.fromkeys(roads, 0.0)
    wrong: dict[str, str] = {}
    wanted = hashes(source, removed)
    for turn in range(max(rounds for _, rounds in roads.values())):
        for road, (command, rounds) in roads.items():
            if turn >= rounds:
                continue
            os.sync()
            usage = run(command)
            times[road].append(usage.seconds)
            peaks[road] = max(peaks[road], usage.peak)
            if turn == 0:
                found = hashes(out)
                differ = sum(found.get(name) != value for name, value in wanted.items())
                wrong[road] = f"{differ + len(found.keys() - wanted.keys())} of {len(wanted)}"
            shutil.rmtree(out)
    before, after = (read_checkpoint(LocalFolder(folder)).bytes for folder in (source, reference))
    base = {road: statistics.median(times[road]) for road in ("cp", "cp, synced")}
    print(f"{before / 1e9:.2f} GB, {after / 1e9:.2f} GB kept; medians\n")
    print("| road | time (s) | of cp | of cp, synced | peak memory (MB) | tensors that differ |")
    print("|---|---|---|---|---|---|")
    for road, taken in times.items():
        middle = statistics.median(taken)
        shares = " | ".join(f"{middle / base[one]:.2f}" for one in base)
        all_times = ", ".join(f"{one:.1f}" for one in sorted(taken))
        print(f"| {road} | {middle:.2f} ({all_times}) | {shares} | ", end="")
        print(f"{peaks[road]:.0f} | {wrong[road]} |")


class Usage(NamedTuple):
    """What a process took: seconds, those of the CPU, and peak resident memory in MB."""

    seconds: float
    cpu: float
    peak: float


def run(command: list[str]) -> Usage:
    """Run a process to its end."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {errors.decode()[-2000:]}")
    seconds = time.monotonic() - start
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def hashes(folder: Path, removed: list[int] | None = None) -> dict[str, str]:
    """SHA-256 of every tensor; of those of a Llama that stay, under their new names."""
    checkpoint = read_checkpoint(LocalFolder(folder))
    found = {}
    stored = checkpoint.tensors
    for name, sha256 in zip(stored, tensor_hashes(checkpoint.source, stored.values()), strict=True):
        parts = name.split(".")
        if removed and parts[1] == "layers":
            if int(parts[2]) in removed:
                continue
            parts[2] = str(int(parts[2]) - sum(gone < int(parts[2]) for gone in removed))
        found[".".join(parts)] = sha256
    return found


def passthrough(source: Path, removed: list[int], n_layers: int) -> str:
    """MergeKit's recipe for a removed block."""
    ranges = [(0, removed[0]), (removed[-1] + 1, n_layers)]
    slices = "".join(
        f"- sources:\n  - model: {source}\n    layer_range: [{start}, {end}]\n"
        for start, end in ranges
    )
    return f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n"


def write_experts(folder: Path, n_tensors: int, n_files: int) -> None:
    """About `n_tensors` tensors of a mixture of experts in files of about the same number each."""
    rest = 3 + MANY_LAYERS * len(BESIDE_EXPERTS)
    experts = max(1, round((n_tensors - rest) / MANY_LAYERS / len(OF_AN_EXPERT)))
    kinds = BESIDE_EXPERTS | {
        f"mlp.experts.{expert}.{name}": kind
        for expert in range(experts)
        for name, kind in OF_AN_EXPERT.items()
    }
    tensors = [("model.embed_tokens.weight", (4, "BF16"))]
    for layer in range(MANY_LAYERS):
        tensors += [(f"model.layers.{layer}.{name}", kind) for name, kind in kinds.items()]
    tensors += [("model.norm.weight", (4, "BF16")), ("lm_head.weight", (4, "BF16"))]
    folder.mkdir()
    weight_map, total = {}, 0
    for number in range(n_files):
        file = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        begin, stop = (len(tensors) * part // n_files for part in (number, number + 1))
        header, end = {}, 0
        for name, (count, dtype) in tensors[begin:stop]:
            start, end = end, end + count * BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        data = hashlib.shake_128(file.encode()).digest(end)
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
        weight_map.update(dict.fromkeys(header, file))
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {"model_type": "mixtral", "num_hidden_layers": MANY_LAYERS}
    (folder / "config.json").write_text(json.dumps(config))


def write_llama(folder: Path, sizes: dict[str, int]) -> None:
    """A random Llama checkpoint, a shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, num_attention_heads=16, vocab_size=32000, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        names = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    shards: list[dict[str, torch.Size]] = [{}]
    room = PER_SHARD
    for name, shape in names.items():
        if 2 * shape.numel() > room and shards[-1]:
            shards.append({})
            room = PER_SHARD
        shards[-1][name] = shape
        room -= 2 * shape.numel()
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        seed = int.from_bytes(hashlib.sha256(file.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))
        total += sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
