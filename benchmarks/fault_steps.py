"""Hostile systems for `faults.py`: signals and errors at any step, streams, limits, environments.

Each function draws one case and prepares its room.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fault_judges import compare_bytes, differing, listing, plan_of, strayed
from fault_models import Area
from fault_rooms import (
    DOCUMENTED,
    SCORED,
    SEARCHES,
    Base,
    Case,
    Ended,
    command,
    forked,
    run_process,
)

# --- signals and failing steps --------------------------------------------------------------------
STEPS = {
    *"open os.chmod os.mkdir os.remove os.rename os.rmdir os.listdir os.scandir os.link".split(),
    *"fcntl.flock os.truncate shutil.rmtree shutil.copyfile tempfile.mkdtemp".split(),
}
REMOVING = {
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "os.scandir",
    "os.listdir",
    "os.rename",
    "open",
}
CALLS = ("fsync", "copy_file_range", "sendfile", "posix_fallocate")
ERRORS = ["ENOSPC", "EMFILE", "EIO", "EROFS", "EDQUOT", "EACCES", "EINTR", "ENOMEM"]
WRITES = {"os.chmod", "os.mkdir", "os.rename", "os.link", "fsync", "copy_file_range", "sendfile"}
SCENES: dict[str, tuple[str, list[str]]] = {
    "on disk": ("m", ["--layers", "1,2", "--output", "o"]),
    "on disk, over an old output": ("m", ["--layers", "1,2", "--output", "o", "--overwrite"]),
    "on disk, in shards": ("s", ["--layers", "1,2", "--output", "o"]),
    "a search": (
        "m",
        [*SEARCHES["ablation"], *SCORED, "--dry-run", "--json", "--resume", "--output", "o"],
    ),
    "a sweep": ("m", ["--strategy", "ablation", "--sweep", "1", *SCORED, "--output", "o"]),
    "in memory": ("m", ["--layers", "1,2", *SCORED, "--output", "o"]),
}


class Steps:
    """The steps of a run in its room: what Python audits, and calls that it does not.

    Args:
        place: where the room is.
        at: the number of a step, from 1.
        act: called with that step's name before it is taken.
    """

    def __init__(self, place: Path, at: int = 0, act: Callable[[str], None] | None = None) -> None:
        self.room, self.at, self.act = str(place / "room"), at, act
        self.taken, self.within = 0, False

    def begin(self) -> None:
        """Count from here on, in this process, which cannot stop it again."""
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in STEPS and not self.within and (event == "fcntl.flock" or self.is_here(args)):
            self._take("read" if event == "open" and _reads(args) else event)

    def is_here(self, args: tuple[Any, ...]) -> bool:
        """Whether a step is one in the room."""
        path = args[0] if args and isinstance(args[0], str | bytes | os.PathLike) else ""
        name = os.fsdecode(path)
        return name.startswith(self.room) or (name != "" and not name.startswith("/"))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            self._take(name)
            return call(*args, **options)

        return called

    def _take(self, step: str) -> None:
        if self.within:
            return
        self.within = True
        try:
            self.taken += 1
            if self.taken == self.at and self.act is not None:
                self.act(step)
        finally:
            self.within = False


def _reads(args: tuple[Any, ...]) -> bool:
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
    return not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def counted(words: list[str], place: Path, limit: float) -> int:
    """How many steps a run takes; it is made on a copy."""
    other = place / "rehearsal"
    shutil.copytree(place / "room", other / "room", symlinks=True)

    def job() -> int:
        steps = Steps(other)
        command(words, steps.begin)()
        (other / "count").write_text(str(steps.taken))
        return 0

    forked(job, other, limit)
    found = other / "count"
    count = int(found.read_text()) if found.exists() else 1
    shutil.rmtree(other)
    return count


def signals_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A signal, or an error of the system, at one step of a run; then the run again."""
    quick = list(SCENES)[:-1]
    scene = drawn.choice([*quick, *quick[:3], *quick[:2]]) if number % 40 != 7 else "in memory"
    model, asked = SCENES[scene]
    base.copy(model, room / "m")
    base.copy("d.jsonl", room / "d.jsonl")
    if "over" in scene:
        base.copy("o", room / "o")
    fault = drawn.choice(["SIGINT", "SIGTERM", "SIGKILL", *ERRORS, "ENOSPC from then on"])
    words, where = ["--model", "m", *asked], drawn.random()
    removed = [1, 2] if "--layers" in asked else None
    case = Case(f"{fault}, {scene}", f"{fault}, {scene}", words, removed, intact=True, must=True)
    if removed is None and "--json" in words:
        wanted = base.json("ablation.plan.json")
        case.check = lambda room, ended: differing(plan_of(ended.out), wanted)
    case.run = partial(run_with_fault, base=base, fault=fault, where=where)
    return case


def run_with_fault(
    case: Case, place: Path, limit: float, *, base: Base, fault: str, where: float
) -> Ended:
    """The faulty run, judged; then another, which must go well and is judged as usual."""
    before = listing(place)
    total = counted(case.words, place, limit)
    at = 1 + int(where * total)
    told = place / "step"

    def act(event: str) -> None:
        told.write_text(event)
        if fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
            return
        code = getattr(errno, fault.split()[0])
        if fault.endswith("on"):
            sys.addaudithook(refuse_writing)
        if code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT) and event in (
            "read",
            *(REMOVING - {"open"}),
        ):
            return  # that is no error of such a step
        raise OSError(code, os.strerror(code))

    def refuse_writing(event: str, args: tuple[Any, ...]) -> None:
        wrote = event in WRITES - {"os.rename"} or (event == "open" and not _reads(args))
        if wrote and steps.is_here(args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    steps = Steps(place, at, act)
    first = forked(command(case.words, steps.begin), place, limit, "first-")
    step = told.read_text() if told.exists() else "none"
    case.what = f"{fault} at step {at} of {total} ({step}), {case.kind.split(', ', 1)[1]}"
    after = listing(place)
    codes = {"SIGINT": {0, 130}, "SIGTERM": {0, 143, -15}, "SIGKILL": {0, -9}}
    if first.code is None:
        case.said.append(("HANG", "the faulty run does not end"))
    elif first.code not in codes.get(fault, DOCUMENTED | {0}):
        case.said.append(("TRACEBACK", f"exit status {first.code}: {first.err[-200:]}"))
    elif first.code and not fault.startswith("SIG") and "error: " not in first.err:
        case.said.append(("TRACEBACK", f"exit status {first.code} without a message"))
    allowed = fault == "SIGKILL" or (not fault.startswith("SIG") and step in REMOVING)
    out = place / "room" / "o"
    if case.removed is not None:
        state = _state(out, base, before, after, case.removed)
        lost = state == "absent" and "room/o" in before
        if state == "wrong" or lost or (first.code == 0 and state != "new"):
            case.said.append(("SILENT WRONG", f"the output is {state} after it"))
        done = state == "new" or first.code == 0
        seen = Ended(0 if done else first.code, first.out, first.err)
        hidden = {name: entry for name, entry in after.items() if not _is_leftover(name)}
        if stray := strayed(case, place, before, hidden if allowed else after, seen):
            case.said.append(("LOST OR STRAY", stray))
        if "--overwrite" not in case.words:
            case.words = [*case.words, "--overwrite"]
    else:
        stray = strayed(case, place, before, after, first)
        if stray and not (allowed and _is_leftover(stray.split(" is ")[0])):
            case.said.append(("LOST OR STRAY", stray))
    second = forked(command(case.words), place, limit)
    return Ended(second.code, second.out, f"{first.err}\n{second.err}")


def _is_leftover(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _state(out: Path, base: Base, before: Any, after: Any, removed: list[int]) -> str:
    """What is at the output."""

    def within(found: Any) -> dict[str, Any]:
        return {name: one for name, one in found.items() if name.startswith("room/o/")}

    if not out.exists():
        return "absent"
    if within(before) and within(before) == within(after):
        return "old"
    complete = (out / "pruning_plan.json").exists() and (out / "README.md").exists()
    right = complete and compare_bytes(base.folder / "m", out, removed) is None
    return "new" if right else "wrong"


# --- streams and the environment ------------------------------------------------------------------
PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# A line of shell, the environment, which streams cannot be used, whether it must succeed
STREAMS: dict[str, tuple[str, dict[str, str | None], str, bool]] = {
    "clean": ("", {}, "", True),
    "stdin closed": ('"$@" <&-', {}, "", True),
    "stdout closed": ('"$@" >&-', {}, "out", False),
    "stderr closed": ('"$@" 2>&-', {}, "err", True),
    "all streams closed": ('"$@" <&- >&- 2>&-', {}, "out err", False),
    "stdout is /dev/full": ('"$@" >/dev/full', {}, "out", False),
    "stderr is /dev/full": ('"$@" 2>/dev/full', {}, "err", False),
    "both are /dev/full": ('"$@" >/dev/full 2>&1', {}, "out err", False),
    "a reader that has gone": ('set -o pipefail; "$@" | true', {}, "out", False),
    "a reader of one byte": ('set -o pipefail; "$@" | head -c1', {}, "out", False),
    "stderr to a reader that has gone": (
        'set -o pipefail; "$@" 2>&1 >/dev/null | true',
        {},
        "err",
        False,
    ),
    "no HOME": ("", {"HOME": None}, "", True),
    "HOME empty": ("", {"HOME": ""}, "", True),
    "HOME nowhere": ("", {"HOME": "/nonexistent"}, "", True),
    "TMPDIR nowhere": ("", {"TMPDIR": "/nonexistent"}, "", True),
    **{
        f"LC_ALL={name}": ("", {"LC_ALL": name, **PLAIN}, "", True)
        for name in ("C", "POSIX", "tr_TR.UTF-8", "nope", "en_US.ISO-8859-1", "")
    },
    "PYTHONIOENCODING=ascii": ("", {"PYTHONIOENCODING": "ascii"}, "", True),
    "PYTHONIOENCODING=utf-16": ("", {"PYTHONIOENCODING": "utf-16"}, "", True),
    **{f"TZ={name}": ("", {"TZ": name}, "", True) for name in ("Nope/Nope", ":", "UTC+99", "")},
    **{
        f"{name}": ("", dict(pair.split("=") for pair in name.split()), "", False)
        for name in (
            "RANK=x",
            "RANK=0 WORLD_SIZE=y",
            "RANK= WORLD_SIZE=",
            "RANK=-1 WORLD_SIZE=2",
            "RANK=5 WORLD_SIZE=2",
            "RANK=0 WORLD_SIZE=0",
            "RANK=0 WORLD_SIZE=-3",
            "RANK=0 WORLD_SIZE=1 LOCAL_RANK=x",
            "RANK=1.5 WORLD_SIZE=2",
            "WORLD_SIZE=z",
            "RANK=0 WORLD_SIZE=1",
        )
    },
    **{f"COLUMNS={name}": ("", {"COLUMNS": name}, "", True) for name in ("0", "1", "x", "-5")},
    "an empty environment": (
        "",
        {"PATH": None, "LANG": None, "LC_ALL": None, "TERM": None},
        "",
        True,
    ),
    "PYTHONHASHSEED=1 and -O": ("", {"PYTHONHASHSEED": "1", "PYTHONOPTIMIZE": "1"}, "", True),
    "python -OO": ("", {"PYTHONOPTIMIZE": "2"}, "", False),
    "warnings are errors": ("", {"PYTHONWARNINGS": "error"}, "", False),
    **{
        f"ulimit -n {number}": (f'ulimit -n {number}; "$@"', {}, "", False)
        for number in (8, 10, 12, 14, 16, 20, 30, 40, 64)
    },
    **{
        f"ulimit -f {number}": (f'ulimit -f {number}; "$@"', {}, "" if number else "out err", False)
        for number in (0, 1, 4, 16, 64, 150, 190, 205, 300)
    },
    **{
        f"ulimit -v {number * 1000}": (f'ulimit -v {number * 1000}; "$@"', {}, "", False)
        for number in (40, 60, 100, 200, 300, 500)
    },
    "umask 777": ('umask 777; "$@"', {}, "", False),
    "umask 0": ('umask 0; "$@"', {}, "", True),
    "the folder is gone": ('cd gone && rmdir ../gone && "$@"', {}, "", False),
}


def streams_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A new process with odd streams, limits or environment."""
    what = list(STREAMS)[number % len(STREAMS)]
    shell, environment, lost, must = STREAMS[what]
    model, output = ("m\u00e9", "o\u00e9") if "LC_ALL" in what and number % 2 else ("m", "o")
    base.copy("m", room / model)
    base.copy("d.jsonl", room / "d.jsonl")
    (room / "gone").mkdir()
    words = ["--model", model, "--layers", "1,2", "--output", output]
    removed: list[int] | None = [1, 2]
    if number >= len(STREAMS):
        way = drawn.choice(["dry", "json", "help", "wrong", "verify"])
        if way == "dry" and not what.startswith("ulimit -v"):
            words, removed = ["--model", model, *SEARCHES["bi"], *SCORED, "--dry-run"], None
            must = must and model == "m"  # tokenizers take no name of another encoding
        elif way == "help":
            words, removed = ["--help"], None
        elif way == "wrong":
            words, removed, must = ["--model", "nope\u00e9/x y", "--layers", "1,2"], None, False
        else:
            words = [*words, f"--{'verify' if way == 'verify' else 'json'}"]
    if what == "the folder is gone":
        words = [word if word not in (model, output) else f"../{word}" for word in words]
        output = f"../{output}"
    source = model
    case = Case(
        f"streams: {what}",
        f"{what}: {' '.join(words[2:])[:60]}",
        words,
        removed,
        source,
        output if what != "the folder is gone" else output[3:],
        must=must and not lost,
        intact=True,
        may_change=("gone",),
    )

    def run(case: Case, place: Path, limit: float) -> Ended:
        if what.startswith("ulimit"):
            probe = """ "$1" -c 'import llm_pruner.cli' 2>/dev/null || exit 222; """
            first, words = shell.split("; ")
            line = f"{first};{probe}{words}"
            ended = run_process(case, place, limit, environment, line)
            if ended.code == 222:
                return Ended(4, "", "error: the interpreter itself does not start")
        else:
            ended = run_process(case, place, limit, environment, shell)
        code, err = ended.code, ended.err
        if "err" in lost and code in DOCUMENTED:
            err = "error: said to nobody"
        there = (place / "room" / output).exists()
        if "out" in lost and code in (4, 141, -13) and (there or removed is None):
            code = 0  # it could not be told; whether it is right is judged
        return Ended(code, ended.out, err)

    case.run = run
    return case


AREAS = {"signals": Area(330, signals_case), "streams": Area(130, streams_case)}
