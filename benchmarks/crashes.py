"""What faults leave of an output: processes killed while they save, two at once, no room, no right.

    python benchmarks/crashes.py              # a few minutes
    python benchmarks/crashes.py --compare    # plain save_pretrained under the same faults, too

Prints a Markdown table of fault, outcomes and what is said; ends with exit status 1 if an outcome
is wrong. A save is that of a model in memory, or pruning on disk, which is also given damaged
checkpoints. What is saved are two random Llamas of one shape, "old" and "new", 40 MB in shards of
5 MB. A save is killed (SIGKILL) at moments drawn at random, one from each of N equal parts of the
time that an unbroken save takes. What is found then is loaded with stock transformers, tokenizer
included, and compared by config and a checksum of all tensors:

    absent, old, new    nothing there, or exactly that model
    unloadable          something is there that does not load
    wrong               it loads and is neither
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import numbered_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llm_pruner import LayerStack, PruningPlan, prune_checkpoint, utils
from llm_pruner.checkpoint.save import save_checkpoint

VOCABULARY, LAYERS = 2048, 12
TOKENIZER = numbered_tokenizer(VOCABULARY)
Save = Callable[["Version", Path], None]
failures: list[str] = []


class Version(NamedTuple):
    """A pruned model, all that is saved with it, and what tells it from any other."""

    model: Any
    tokenizer: Any
    plan: PruningPlan
    digest: str
    source: Path  # the checkpoint before


def main() -> None:
    """Do every fault, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of each kind (20)")
    parser.add_argument("--compare", action="store_true", help="with plain save_pretrained, too")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    drawn = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        old, new = version(place, 0, [3]), version(place, 1, [5])
        seconds = duration(ours, new, place / "timed")
        print(f"One save: {utils.count_bytes(new.model):,} bytes, {seconds:.2f} s", end="")
        if args.compare:
            print(f"; plain save_pretrained {duration(plain, new, place / 'plain'):.2f} s", end="")
        print(".\n\n| fault | outcomes | what is said |\n|---|---|---|")
        killed(place, ours, old, new, args.kills, drawn)
        killed(place, sliced, old, new, args.kills, drawn)
        if args.compare:
            killed(place, plain, old, new, args.kills, drawn)
        two_at_once(place, ours, old, new, 5)
        if args.compare:
            two_at_once(place, plain, old, new, 5)
        no_room(place, old, new, args.compare)
        not_ours(place, old, new)
        damaged(place, new)
    for failure in failures:
        print(f"\nWRONG: {failure}")
    raise SystemExit(bool(failures))


def version(place: Path, seed: int, removed: list[int]) -> Version:
    """A random Llama without some layers; of all seeds the same shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=128,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    whole, source, tokenizer = LlamaForCausalLM(config).eval(), place / f"source-{seed}", TOKENIZER
    whole.save_pretrained(source, max_shard_size="5MB")
    tokenizer.save_pretrained(source)
    model: Any = LayerStack(whole).remove(removed)
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="5MB")
    plan = PruningPlan(model_id="random", num_layers=LAYERS, remove=tuple(removed))
    return Version(model, tokenizer, plan, digest(model), source)


def digest(model: Any) -> str:
    """A checksum of the config and of all tensors."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(name, None)
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def ours(one: Version, out: Path) -> None:
    """What `prune_and_save` ends with."""
    save_checkpoint(one.model, one.tokenizer, one.plan, out, overwrite=True)


def sliced(one: Version, out: Path) -> None:
    """Pruning on disk."""
    prune_checkpoint(one.source, one.plan.remove, out, overwrite=True)


def plain(one: Version, out: Path) -> None:
    """The usual way."""
    one.model.save_pretrained(out)
    one.tokenizer.save_pretrained(out)


# --- faults -----------------------------------------------------------------------------------


def killed(
    place: Path, save: Save, old: Version, new: Version, kills: int, drawn: random.Random
) -> None:
    """Kill saves into a fresh folder and over an earlier output; save again after each."""
    for over in (False, True):
        outcomes: Counter[str] = Counter()
        again: Counter[str] = Counter()
        seconds = duration(save, new, place / "timed", over=old if over else None)
        for part in range(kills):
            folder = place / f"kill-{save.__name__}-{over}-{part}"
            out = folder / "out"
            if over:
                save(old, out)
            child = Child(functools.partial(save, new, out))
            time.sleep(seconds * (part + drawn.random()) / kills)
            child.kill()
            outcomes[judge(out, old, new)] += 1
            said = Child(functools.partial(save, new, out)).told()
            clean = os.listdir(folder) == ["out"]
            again["complete" if judge(out, old, new) == "new" and clean else f"WRONG {said}"] += 1
            shutil.rmtree(folder)
        where = "over an earlier output" if over else "into a fresh folder"
        allowed = {"old", "new"} if over else {"absent", "new"}
        fault = f"killed at {kills} moments, saving {where}{label(save)}"
        row(fault, outcomes, f"the next run: {told(again)}")
        if save is not plain:
            demand(set(outcomes) <= allowed and set(again) == {"complete"}, fault)


def two_at_once(place: Path, save: Save, old: Version, new: Version, times: int) -> None:
    """Two processes that save into one output, begun at the same time."""
    outcomes: Counter[str] = Counter()
    said: Counter[str] = Counter()
    for number in range(times):
        folder = place / f"two-{save.__name__}-{number}"
        out = folder / "out"
        children = [Child(functools.partial(save, one, out)) for one in (old, new)]
        for child in children:
            said[child.told().replace(str(folder), "")] += 1
        outcomes[judge(out, old, new)] += 1
        clean = os.listdir(folder) == ["out"]
        demand(clean or save is not ours, f"two processes left {os.listdir(folder)}")
        shutil.rmtree(folder)
    fault = f"two processes into one output, {times} times{label(save)}"
    row(fault, outcomes, told(said))
    if save is ours:
        refused = [words for words in said if "Another run is writing" in words]
        demand(set(outcomes) <= {"old", "new"} and set(said) == {"done", *refused}, fault)


def no_room(place: Path, old: Version, new: Version, compare: bool) -> None:
    """A disk with too little room, seen before and met while writing; and a limit on files."""

    def unchecked(one: Version, out: Path) -> None:
        utils.count_bytes = lambda model: 0  # as if others had filled the disk meanwhile
        ours(one, out)

    def limited(save: Save, one: Version, out: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
        save(one, out)

    below = functools.partial(limited, ours)
    once(place, "files of at most 3 MB", below, old, new, "Nothing was left")
    if compare:
        below = functools.partial(limited, plain)
        once(place, f"files of at most 3 MB{label(plain)}", below, old, new, None)
    for fault, save, words in (
        ("a disk of 60 MB", ours, "bytes, and "),
        ("a disk of 60 MB that fills while it is written to", unchecked, "Nothing was left"),
        *([(f"a disk of 60 MB{label(plain)}", plain, None)] if compare else []),
    ):
        with mounted(place / "small", "size=60m") as there:
            if there:
                once(place / "small", fault, save, old, new, words)
            else:
                row(fault, Counter(), "not tried: no right to mount one")


def not_ours(place: Path, old: Version, new: Version) -> None:
    """Places where nothing may be written."""
    with mounted(place / "fixed", "size=60m") as there:
        if there:
            ours(old, place / "fixed" / "out")
            subprocess.run(["mount", "-o", "remount,ro", place / "fixed"], check=True)
            refused(place / "fixed" / "out", "a read-only disk", old, new, "Read-only file system")
        else:
            (place / "fixed").mkdir(exist_ok=True)
            ours(old, place / "fixed" / "out")
            (place / "fixed").chmod(0o555)
            refused(place / "fixed" / "out", "a read-only folder", old, new, "Permission denied")
            (place / "fixed").chmod(0o755)
    out = place / "notes"
    out.write_text("mine")
    refused(out, "the output is a file", old, new, "is not a folder")
    demand(out.read_text() == "mine", "the file is another")
    out = place / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("mine")
    refused(out, "the output is someone else's folder", old, new, "did not write it")
    demand((out / "chapter.tex").read_text() == "mine", "the folder is another")


def damaged(place: Path, new: Version) -> None:
    """Checkpoints that are not what they should be, pruned on disk."""
    for fault, (damage, words) in DAMAGES.items():
        source, out = place / "damaged" / "source", place / "damaged" / "out"
        shutil.copytree(new.source, source)
        damage(source, sorted(source.glob("*.safetensors"))[1])
        child = Child(functools.partial(prune_checkpoint, source, new.plan.remove, out))
        said = child.told()
        row(fault, Counter(["absent" if not out.exists() else "written"]), said)
        demand(said.startswith("LoadError") and words in said, f"{fault}: {said}")
        demand(os.listdir(place / "damaged") == ["source"], f"{fault} left something")
        shutil.rmtree(place / "damaged")


def truncate(source: Path, file: Path) -> None:
    """The last byte is missing."""
    os.truncate(file, file.stat().st_size - 1)


def lie(source: Path, file: Path) -> None:
    """The header gives a tensor the bytes of its neighbour, too."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 64
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def twice(source: Path, file: Path) -> None:
    """A tensor stands in two files."""
    other = sorted(source.glob("*.safetensors"))[0]
    save_file({**load_file(other), **load_file(file)}, file, metadata={"format": "pt"})


def point(to: str, source: Path, file: Path) -> None:
    """The index names another file for a tensor."""
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = to
    path.write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a shard is cut short": (truncate, "the file at"),
    "a header lies about offsets": (lie, "its offsets give it"),
    "the index points at a missing shard": (
        functools.partial(point, "model-00099-of-00099.safetensors"),
        "which is not there",
    ),
    "the index points outside the folder": (
        functools.partial(point, "../source-0/model-00001-of-00009.safetensors"),
        "not the name of a file beside it",
    ),
    "a tensor stands in two shards": (twice, "too"),
}


def once(
    place: Path, fault: str, save: Save, old: Version, new: Version, words: str | None
) -> None:
    """One save over an earlier output that fails; `words` must be said, if any."""
    out = place / "room" / "out"
    ours(old, out)
    said = Child(lambda: save(new, out)).told()
    outcome = judge(out, old, new)
    row(fault, Counter([outcome]), said.replace(str(place), ""))
    if words is not None:
        demand(outcome == "old" and words in said, f"{fault}: {said}")
        demand(os.listdir(out.parent) == ["out"], f"{fault} left {os.listdir(out.parent)}")
    shutil.rmtree(out.parent)


def refused(out: Path, fault: str, old: Version, new: Version, words: str) -> None:
    """One save that must be refused, and leave everything as it was."""
    before = sorted(os.listdir(out.parent))
    said = Child(lambda: ours(new, out)).told()
    outcome = judge(out, old, new) if (out / "config.json").exists() else "untouched"
    row(fault, Counter([outcome]), said.replace(str(out.parent), ""))
    demand(outcome in ("old", "untouched") and words in said, f"{fault}: {said}")
    demand(sorted(os.listdir(out.parent)) == before, f"{fault} left {os.listdir(out.parent)}")


# --- tools ------------------------------------------------------------------------------------


class Child:
    """A fork that does a job, has begun it when this returns, and tells how it ended."""

    def __init__(self, job: Callable[[], None]) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.write(writing, b"begun\n")
            try:
                job()
                said = "done"
            except BaseException as error:
                said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            os.write(writing, said.encode())
            os._exit(0)
        os.close(writing)
        self._pipe = os.fdopen(reading)
        self._pipe.readline()

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)
        self.told()

    def told(self) -> str:
        """What it said at its end; nothing if it was killed."""
        with self._pipe:
            said = self._pipe.read()
        os.waitpid(self.pid, 0)
        return said


def duration(save: Save, new: Version, folder: Path, over: Version | None = None) -> float:
    """Seconds that an unbroken save takes, the median of three."""
    seconds = []
    for _ in range(3):
        if over:
            save(over, folder / "out")
        child = Child(lambda: save(new, folder / "out"))
        started = time.perf_counter()
        said = child.told()
        seconds.append(time.perf_counter() - started)
        assert said == "done", said
        shutil.rmtree(folder)
    return statistics.median(seconds)


def judge(out: Path, old: Version, new: Version) -> str:
    """What is at the output."""
    if not out.exists():
        return "absent"
    try:
        model = AutoModelForCausalLM.from_pretrained(out)
        AutoTokenizer.from_pretrained(out)
    except Exception:  # whatever it is, a user cannot load it
        return "unloadable"
    return {old.digest: "old", new.digest: "new"}.get(digest(model), "wrong")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A disk of its own at `folder`, in memory; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    there = not subprocess.run(command, capture_output=True).returncode
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)


def label(save: Save) -> str:
    """How a row tells the ways to save apart."""
    return {plain: " (plain `save_pretrained`)", sliced: " (on disk)"}.get(save, "")


def told(counts: Counter[str]) -> str:
    """Counts in words."""
    return "; ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def row(fault: str, outcomes: Counter[str], said: str) -> None:
    """One line of the table."""
    print(f"| {fault} | {told(outcomes)} | {said.replace('|', '/')} |", flush=True)


def demand(right: bool, fault: str) -> None:
    """Remember what went wrong."""
    if not right:
        failures.append(fault)


if __name__ == "__main__":
    main()
