"""Hostile words for `faults.py`: names, numbers, and files of the user in the command's way.

Each function draws one case and prepares its room.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from fault_judges import a_plan
from fault_models import SPECIAL, Area, short, special
from fault_rooms import SCORED, SEARCHES, Base, Case

MODELS = [
    *["https://huggingface.co/x/y", "http://[::1", "file:///m", "hf://x/y", "s3://x/y", "a b"],
    *[" ", "", "x" * 300, "x/" * 200 + "x", "x/" * 3000, "~nouser/m", "~", "~/", "~/nothing"],
    *["loop", "loop/x", "f.txt", "f.txt/x", "empty", "\udcff", "m\udcff", "e\u0301", "/dev/null"],
    *["/dev/zero", "fifo", "m/config.json", "m/model.safetensors", "..", ".", "/", "a/b/c"],
    *["name@rev", "x:y", "a\nb", "\t", "%s%n", "{}", "../../etc", "m\\n", "\u202e", "x.gguf"],
    *["text.gguf", "dangling", "DEMO", "demo ", "-", "m m", "org/na me", "org//name"],
    *["/proc/self/fd/0", "org/..", "*", "$HOME", "\U0001f600/x", "a" * 96 + "/" + "b" * 96],
    *["--help", "-1", "m?", "m#x", "\x7f", "\ud83d", "x/y\x1b[31m"],
]
ALIASES = ["m/", "./m", "m/../m", "m/./", "link", "link/", "m//", "far/../m"]
OUTPUTS = [
    *["~/x", "~", "~/", "~nouser/x", "o/../p", "o/", "o//", "./o", "a/b/c", "x" * 255, "x" * 256],
    *["x" * 240, "x" * 248, "\u00e9" * 125, "\u00e9" * 128, "f.txt", "f.txt/x", "m", "m/", "m/o"],
    *["m/sub/o", ".", "..", "../q", "", " ", "\n", "a\nb", "\udcff", "-o", "loop/o", "loop"],
    *["link", "folder-link", "dangling", "dangling/o", "/dev/null", "/dev/null/x", "/proc/x"],
    *["/sys/x", "o.gguf", "o.journal.jsonl", ".o", ".o.lock", "...", "CON", "%s", "{}", "*"],
    *["$HOME", "o\\p", "x/" * 3000, "x/" * 100 + "x", "far/../o", "empty", "/", "//", "\ud83d"],
    *["\x1b[31m", "fifo", "full"],
]
NUMBERS = [
    *"0 -1 1 2 7 8 100 1.5 nan inf -inf 1e400 1e-400 1_0 0x10 x None true 1,2 ,".split(),
    *[
        "",
        " ",
        " 2",
        "2 ",
        "9" * 5000,
        "9" * 30,
        "-0",
        "\u0661",
        "\u00b2",
        "+2",
        "1e3",
        "\udcff",
        "[2]",
        "2;3",
        "\n",
    ],
]
OPTIONS = (
    "--ratio --n-layers --threshold --tolerance --sweep --layers --protect --n-samples "
    "--batch-size --seed --timeout --max-memory --heal-steps --heal-every --device --dtype "
    "--heal-time --heal-tokens --layers-path --strategy --objective --option --serve-with --plan "
    "--eval-dataset"
).split()
TEXTS = {
    "--max-memory": [
        *["1e999GiB", "-1GiB", "nanGiB", "1 GiB", "1KiB", "GiB", "1e3MB", "9" * 400 + "GB"],
    ],
    "--objective": [
        *["nll=nan", "nll=inf", "nll=0", "nll=-1", "nll=1e308,kl=1e308", "=", "nll,nll", "x"],
        *["nll=0.5,nll=0.5", "similarity", "accuracy", "kl=1e-320"],
    ],
    "--option": [
        *["x=1", "=", "a", "contiguous=maybe", "batch_size=0", "contiguous=[[", "journal=o/x"],
        *['batch_size="x"', "model=5", "seed=1e400", "protect=5", "layers_path=5"],
        *[f"contiguous={'[' * 9999}"],
    ],
    "--strategy": [
        *["nope", "", "x.py:Y", "f.txt:Y", "m:Y", "/dev/null:Y", "broken.py:Y", "fifo:Y"],
        *["broken.py", ":", "os:system", "BI", "loops.py:Y", "int.py:Y"],
    ],
    "--serve-with": ["nope", "", ",", "vllm,vllm", "VLLM", "vllm,,mlx", "llama.cpp"],
    "--layers-path": [
        *["", ".", "model", "model.layers", "model.layers.0", "lm_head", "..", "a" * 9999],
        *["__class__", "model.embed_tokens.weight", "model..layers"],
    ],
    "--device": ["cuda:99", "mps", "meta", "", "cpu:5", "nope", "auto", "cuda:-1", "\udcff"],
    "--layers": [
        *["1,1", "8", "-1", "0,1,2,3,4,5,6,7", "1,,2", "1 2", "1-3", "\uff11", "1_0", "1,2,"],
    ],
    "--protect": ["8,0", "0,8", "4,4", "-1,0", "1", "1,2,3", "99,99", "1e0,1", f"{'9' * 30},0"],
}


def furnish(room: Path, base: Base) -> None:
    """What the words may name."""
    base.copy("m", room / "m")
    base.copy("d.jsonl", room / "d.jsonl")
    (room / "f.txt").write_text("mine")
    (room / "text.gguf").write_text("mine")
    (room / "broken.py").write_text("def (")
    (room / "int.py").write_text("Y = 5\n")
    (room / "loops.py").write_text("from loops import Y\n")
    for name in ("empty", "full", "far"):
        (room / name).mkdir()
    (room / "full" / "thesis.tex").write_text("mine")
    for name, to in (("loop", "loop"), ("link", "m"), ("dangling", "no"), ("folder-link", "empty")):
        (room / name).symlink_to(to)
    os.mkfifo(room / "fifo")


def words_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """Odd words on the command line."""
    furnish(room, base)
    scored = [*SEARCHES["bi"], *SCORED, "--dry-run", "--json"]
    kind = drawn.choice("model model model output output output option option beside yaml".split())
    if kind == "model":
        name = drawn.choice([*MODELS, *ALIASES])
        fine, way = name in ALIASES, drawn.random()
        if way < 0.5:
            words, removed = [f"--model={name}", "--layers", "1,2", "--output", "o"], [1, 2]
        else:
            words, removed = [f"--model={name}", *scored], None
        check = None if fine else lambda room, ended: f"there is no model {short(name)!r}"
        what = f"--model={short(name)}"
        return Case("model name", what, words, removed, name, check=check, must=fine)
    if kind == "output":
        name = drawn.choice(OUTPUTS)
        words = ["--model", "m", "--layers", "1,2", f"--output={name}"]
        words += drawn.choice([[], [], ["--overwrite"], ["--verify"]])
        what, removed, check = f"--output={short(name)}", [1, 2], None
        if drawn.random() < 0.25:
            words = ["--model", "m", *SEARCHES["ablation"], *SCORED, f"--output={name}"]
            more = drawn.choice([["--dry-run"], ["--sweep", "1"]])
            words = (
                [w for w in words if w not in ("--n-layers", "2")] if "--sweep" in more else words
            )
            words, removed, what = [*words, *more], None, f"{what} {' '.join(more)}"
        return Case("output name", what, words, removed, output=name, check=check, intact=True)
    if kind == "option":
        option = drawn.choice(OPTIONS)
        value = drawn.choice([*TEXTS.get(option, []), *NUMBERS])
        words = ["--model", "m", *SCORED, f"{option}={value}", "--dry-run", "--json"]
        if option in ("--ratio", "--n-layers", "--protect", "--max-memory", "--device", "--option"):
            words += ["--strategy", "bi"]
        if option not in ("--ratio", "--n-layers", "--threshold", "--sweep", "--layers", "--plan"):
            words += ["--n-layers", "2"]
        what = f"{option}={short(value)}"
        check = a_plan if option not in ("--sweep", "--threshold", "--tolerance") else None
        return Case(f"option {option}", what, words, check=check)
    return beside_case(drawn, room) if kind == "beside" else yaml_case(drawn)


def beside_case(drawn: random.Random, room: Path) -> Case:
    """Files of the user where the command keeps its own."""
    ending = drawn.choice(
        "lock journal.jsonl healing curve.json curve.png partial_plan.json".split()
    )
    path = room / (".o.lock" if ending == "lock" else f"o.{ending}")
    what = drawn.choice(["a text", "a text", "a folder", "JSON lines", "a link", *SPECIAL[1:5]])
    if what == "a folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    elif what == "a link":
        path.symlink_to("f.txt")
    elif what == "JSON lines":
        path.write_text('{"mine": 1}\n')
    elif what == "a text":
        path.write_text("mine\n")
    else:
        special(path, what)
    search = ["--model", "m", "--strategy", "ablation", *SCORED, "--output", "o"]
    how = drawn.choice(["disk", "sweep", "sweep", "resume", "sweep and resume"])
    words: list[str] = ["--model", "m", "--layers", "1,2", "--output", "o"]
    if how != "disk":
        words = [
            *search,
            *(["--n-layers", "1", "--dry-run"] if how == "resume" else ["--sweep", "1"]),
        ]
        words += ["--resume"] if "resume" in how else []
    removed = [1, 2] if how == "disk" else None
    return Case(
        f"{path.name} of the user", f"{path.name} is {what}, {how}", words, removed, intact=True
    )


def yaml_case(drawn: random.Random) -> Case:
    """A recipe to be written where it must not be."""
    name = drawn.choice(
        [
            *["m/config.json", "m/model.safetensors", "f.txt", "m", "f.txt/x.yml", "/dev/full"],
            *["fifo", "", "d.jsonl", "o", "loop", "~nouser/x", "x" * 300, "/proc/x.yml", "full"],
            *[".", "m/README.md", "o/x.yml", "m/new.yml", "~/letter.txt", "link/config.json"],
            *["\udcff", "o.journal.jsonl"],
        ]
    )
    words = ["--model", "m", "--layers", "1,2", *SCORED, f"--export-yaml={name}", "--output", "o"]
    if drawn.random() < 0.4:
        words += ["--dry-run"]
    return Case(
        "--export-yaml",
        f"--export-yaml={short(name)}{' --dry-run' if '--dry-run' in words else ''}",
        words,
        None if "--dry-run" in words else [1, 2],
        intact=True,
        may_change=("m/new.yml", "\udcff", "o.journal.jsonl"),
    )


AREAS = {"words": Area(420, words_case)}
