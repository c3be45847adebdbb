"""Kill a process before every step that it takes on the file system, one run per step.

    python tests/crashing.py FOLDER {fresh,over,over-in-two-steps,file}

A step is what Python audits (open, rename, remove, mkdir, ...), an fsync, or a lookup of the
system call that swaps two folders. Every run is a fork that ends at once (`os._exit`, as after
SIGKILL) when it comes to its step; what it leaves is judged, and the next run must succeed. Prints
JSON: one list per step, [step, what was found]. `test_atomic_output.py` reads it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llm_pruner import atomic_output
from llm_pruner.atomic_output import staged_output, write_atomically
from llm_pruner.output_rules import PLAN_FILE

STEPS = {
    "ctypes.dlsym",
    "fcntl.flock",
    "open",
    "os.chmod",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
}
KILLED = 77
state = {"left": -1, "step": ""}  # steps that may still be taken; the last that was


def take(step: str, *_: object) -> None:
    """One step; the process ends here if it was not to take it."""
    if step not in STEPS and step != "os.fsync":
        return
    if state["left"] == 0:
        os.write(3, step.encode())
        os._exit(KILLED)
    state["left"] -= 1


def write(out: Path, version: str) -> None:
    """An output of several files and a folder, each file written in two halves."""
    with staged_output(out, overwrite=True) as stage:
        (stage / "sub").mkdir()
        for name in (PLAN_FILE, "model.safetensors", "sub/tokenizer.json"):
            halves = ('{"version": "' + version, '"}') if name == PLAN_FILE else (version, name)
            with open(stage / name, "w") as file:
                file.write(halves[0])
                file.flush()
                take("os.fsync")  # stands for a kill between two halves
                file.write(halves[1])


def write_file(out: Path, version: str) -> None:
    """A single file."""
    write_atomically(out, version)


def found(out: Path) -> dict[str, str] | str | None:
    """All that is at the output: the content of each file."""
    if out.is_dir():
        files = sorted(path for path in out.rglob("*") if path.is_file())
        return {str(path.relative_to(out)): path.read_text() for path in files}
    return out.read_text() if out.exists() else None


def killed_at(number: int, run: Callable[[], None]) -> str | None:
    """The step at which a fork was killed that had taken `number`; None if it came to its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 3)
        sync = os.fsync
        os.fsync = lambda descriptor: (take("os.fsync"), sync(descriptor))[1]
        sys.addaudithook(take)
        state["left"] = number
        run()
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    step = os.read(reading, 100).decode()
    os.close(reading)
    code = os.waitstatus_to_exitcode(status)
    assert code == (KILLED if step else 0), f"The run failed with exit status {code}."
    return step or None


def main() -> None:
    """All steps of one kind of run."""
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    job = write_file if kind == "file" else write
    if kind == "over-in-two-steps":
        atomic_output._swap = lambda left, right: False
    judged: list[tuple[str, str]] = []
    while True:
        place = folder / str(len(judged))
        out = place / "deep" / "out"
        if kind != "fresh":
            job(out, "old")
        old = found(out)
        job(place / "wanted", "new")
        new = found(place / "wanted")
        step = killed_at(len(judged), partial(job, out, "new"))
        names = {str(old): "old", str(new): "new"}
        names[str(None)] = "absent" if kind == "fresh" else "gone"
        outcome = names.get(str(found(out)), f"WRONG: {found(out)}")
        aside = out.parent.glob(".out.old-*") if out.parent.exists() else ()
        if any(found(folder) != old for folder in aside):
            outcome = "HALF OLD"  # which a later run might put back
        job(out, "next")
        left = sorted(path.name for path in out.parent.iterdir())
        if left != ["out"] and kind != "file":  # a file's leftover is hidden, and stays
            outcome = f"LEFT: {left}"
        if "next" not in str(found(out)) or "new" in str(found(out)):
            outcome = f"NEXT RUN: {found(out)}"
        judged.append((step or "end", outcome))
        if step is None:
            break
    print(json.dumps(judged))


if __name__ == "__main__":
    main()
