"""Hostile file trees for `faults.py`: what stands in an old output, and in a model's folder.

Each function draws one case and prepares its room.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_models import Area, special
from fault_rooms import SCORED, Base, Case


def old_with(name: str, content: str = "mine") -> Callable[[Path, Base], None]:
    """A file of the user in the old output."""

    def prepare(room: Path, base: Base) -> None:
        path = room / "o" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return prepare


def _model_in_output(room: Path, base: Base) -> None:
    (room / "m").rename(room / "o" / "m")


def _in_model(name: str) -> Callable[[Path, Base], None]:
    def prepare(room: Path, base: Base) -> None:
        base.copy("o", room / "m" / name)

    return prepare


def _made(make: Callable[[Path], Any]) -> Callable[[Path, Base], None]:
    return lambda room, base: make(room) and None


def _linked(name: str, to: str) -> Callable[[Path, Base], None]:
    def prepare(room: Path, base: Base) -> None:
        path = room / name
        if path.is_dir() and not path.is_symlink():
            path.rename(room / f"{name}-real")
            to_real = f"{name}-real" if to == "real" else to
            path.symlink_to(to_real)
        else:
            path.unlink(missing_ok=True)
            path.symlink_to(to)

    return prepare


def _special(name: str, kind: str) -> Callable[[Path, Base], None]:
    return lambda room, base: special(room / name, kind)


def _deep(room: Path) -> None:
    path = room / "m"
    for _ in range(300):
        path = path / "d"
    path.mkdir(parents=True)
    (path / "x.json").write_text("{}")


def _many(room: Path) -> None:
    for number in range(2000):
        (room / "m" / f"n{number}.txt").write_text("x")


def _named(name: str) -> Callable[[Path], Any]:
    return lambda room: (room / "m" / name).write_text("x")


def _emptied(room: Path) -> None:
    for path in (room / "o").iterdir():
        if path.name != "pruning_plan.json":
            path.unlink()


def _plan_as_folder(room: Path) -> None:
    (room / "o" / "pruning_plan.json").unlink()
    (room / "o" / "pruning_plan.json").mkdir()


def _data_in_output(room: Path, base: Base) -> None:
    (room / "d.jsonl").rename(room / "o" / "w.jsonl")


DISK = ["--model", "m", "--layers", "1,2", "--output", "o"]
OVER = [*DISK, "--overwrite"]
INSIDE = ["--model", "o/m", *OVER[2:]]
MEMORY = ["--model", "m", "--layers", "1,2", "--output", "o", "--overwrite", *SCORED]
DATA_INSIDE = [word if word != "d.jsonl" else "o/w.jsonl" for word in MEMORY]
# What is prepared, the words, whether it must succeed
TREES: dict[str, tuple[Callable[[Path, Base], Any], list[str], bool]] = {
    "clean": (_made(lambda room: None), OVER, True),
    "the model inside the old output": (_model_in_output, INSIDE, False),
    "data inside the old output": (_data_in_output, DATA_INSIDE, False),
    "the plan of the old output": (
        _made(lambda room: None),
        ["--model", "m", "--plan", "o/pruning_plan.json", "--output", "o", "--overwrite"],
        False,
    ),
    **{
        f"{name} in the old output": (old_with(name), OVER, False)
        for name in (
            "notes.txt",
            "sub/x.txt",
            ".hidden",
            "model-extra.safetensors",
            "figures/mine.png",
            "tokenizer.model",
            "\udcff",
            "x\ny",
            "training.log",
            ".git/HEAD",
            "LICENSE",
        )
    },
    **{
        f"{kind} in the old output": (_special("o/thing", kind), OVER, False)
        for kind in ("FIFO", "socket", "folder", "loop", "dangling link", "../f.txt", "../m")
    },
    "an old output without weights": (_made(_emptied), OVER, False),
    "a plan that is a folder in the old output": (_made(_plan_as_folder), OVER, False),
    "a plan that is damaged in the old output": (
        old_with("pruning_plan.json", "mine"),
        OVER,
        False,
    ),
    "a plan that is empty in the old output": (old_with("pruning_plan.json", ""), OVER, False),
    "the old output is a link": (_linked("o", "real"), OVER, False),
    "the model is a link": (_linked("m", "real"), OVER, True),
    "no --overwrite": (_made(lambda room: None), DISK, False),
    "output inside the model": (
        _made(lambda room: None),
        ["--model", "m", "--layers", "1,2", "--output", "m/p"],
        False,
    ),
    **{
        f"an old output in the model, at {name}": (_in_model(name), OVER, False)
        for name in ("p", "pruned_model", "sub/p", "original", ".p")
    },
    **{
        f"{kind} in the model": (_special(f"m/{name}", kind), OVER, must)
        for kind, name, must in (
            ("FIFO", "pipe.txt", False),
            ("FIFO", "LICENSE", False),
            ("socket", "s.txt", False),
            ("folder", "x.json", False),
            ("loop", "x.json", False),
            ("dangling link", "x.json", False),
            (".", "loop", False),
            ("..", "up", False),
            ("/", "root", False),
            ("../f.txt", "notes.txt", False),
            ("../d.jsonl", "x.jsonl", False),
            ("/dev/zero", "zero.txt", False),
            ("/proc/self/mem", "mem.txt", False),
        )
    },
    "300 folders deep in the model": (_made(_deep), OVER, False),
    "2,000 files in the model": (_made(_many), OVER, True),
    **{
        f"a file named {name[:12]!r} in the model": (_made(_named(name)), OVER, False)
        for name in (
            "a\nb.txt",
            "\udcff.txt",
            "x" * 250 + ".txt",
            "-rf.txt",
            "%s.json",
            "pruning_plan.json",
            "pruning_manifest.json",
            "\u202e.md",
            " .txt",
            "a\\b.txt",
            "model.gguf",
        )
    },
    "--link": (_made(lambda room: None), [*OVER, "--link"], True),
    "--link into the model's link": (_linked("m", "real"), [*OVER, "--link"], True),
}


def trees_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """An old output, a model, and something of the user in one of them."""
    base.copy("m", room / "m")
    base.copy("o", room / "o")
    base.copy("d.jsonl", room / "d.jsonl")
    (room / "f.txt").write_text("mine")
    what = list(TREES)[number % len(TREES)]
    prepare, words, must = TREES[what]
    prepare(room, base)
    if number >= len(TREES) and words[:1] == ["--model"] and "--plan" not in words:
        more = drawn.choice([["--verify"], ["--json"], ["--link"], ["--quiet"], ["--drop-mtp"]])
        if "--eval-dataset" not in words:
            words, what = [*words, *more], f"{what} ({more[0]})"
    removed = [3] if "--plan" in words else [1, 2]
    output = words[words.index("--output") + 1]
    kind = re.sub(r"^.+(?= in the (old output|model))", "something", what.split(" (")[0])
    return Case(kind, what, list(words), removed, output=output, must=must, intact=True)


AREAS = {"trees": Area(200, trees_case)}
