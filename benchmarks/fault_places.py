"""Hostile surroundings for `faults.py`: words, file trees, signals, failing steps, streams."""

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

from fault_files import SPECIAL, Area, short, special
from fault_rooms import (
    DOCUMENTED,
    SCORED,
    SEARCHES,
    Base,
    Case,
    Ended,
    command,
    compare_bytes,
    differing,
    forked,
    listing,
    plan_of,
    run_process,
    strayed,
)
from fault_texts import a_plan

# --- words ----------------------------------------------------------------------------------------
MODELS = [
    *[
        "https://huggingface.co/x/y",
        "http://[::1",
        "file:///m",
        "hf://x/y",
        "s3://x/y",
        "a b",
        " ",
        "",
    ],
    *[
        "x" * 300,
        "x/" * 200 + "x",
        "x/" * 3000,
        "~nouser/m",
        "~",
        "~/",
        "~/nothing",
        "loop",
        "loop/x",
    ],
    *[
        "f.txt",
        "f.txt/x",
        "empty",
        "\udcff",
        "m\udcff",
        "e\u0301",
        "/dev/null",
        "/dev/zero",
        "fifo",
    ],
    *[
        "m/config.json",
        "m/model.safetensors",
        "..",
        ".",
        "/",
        "a/b/c",
        "name@rev",
        "x:y",
        "a\nb",
        "\t",
    ],
    *[
        "%s%n",
        "{}",
        "../../etc",
        "m\\n",
        "\u202e",
        "x.gguf",
        "text.gguf",
        "dangling",
        "DEMO",
        "demo ",
    ],
    *[
        "-",
        "m m",
        "org/na me",
        "org//name",
        "/proc/self/fd/0",
        "org/..",
        "*",
        "$HOME",
        "\U0001f600/x",
    ],
    *["a" * 96 + "/" + "b" * 96, "--help", "-1", "m?", "m#x", "\x7f", "\ud83d", "x/y\x1b[31m"],
]
ALIASES = ["m/", "./m", "m/../m", "m/./", "link", "link/", "m//", "far/../m"]
OUTPUTS = [
    *["~/x", "~", "~/", "~nouser/x", "o/../p", "o/", "o//", "./o", "a/b/c", "x" * 255, "x" * 256],
    *["x" * 240, "x" * 248, "\u00e9" * 125, "\u00e9" * 128, "f.txt", "f.txt/x", "m", "m/", "m/o"],
    *[
        "m/sub/o",
        ".",
        "..",
        "../q",
        "",
        " ",
        "\n",
        "a\nb",
        "\udcff",
        "-o",
        "loop/o",
        "loop",
        "link",
    ],
    *[
        "folder-link",
        "dangling",
        "dangling/o",
        "/dev/null",
        "/dev/null/x",
        "/proc/x",
        "/sys/x",
        "o.gguf",
    ],
    *[
        "o.journal.jsonl",
        ".o",
        ".o.lock",
        "...",
        "CON",
        "%s",
        "{}",
        "*",
        "$HOME",
        "o\\p",
        "x/" * 2000,
    ],
    *["x/" * 100 + "x", "far/../o", "empty", "/", "//", "\ud83d", "\x1b[31m", "fifo", "full"],
]
NUMBERS = [
    *"0 -1 1 2 7 8 100 1.5 nan inf -inf 1e400 1e-400 1_0 0x10 ١ ² x None true 1,2 ,".split(),
    *["", " ", " 2", "2 ", "9" * 5000, "9" * 30, "-0", "+2", "1e3", "\udcff", "[2]", "2;3", "\n"],
]
OPTIONS = (
    "--ratio --n-layers --threshold --tolerance --sweep --layers --protect --n-samples --batch-size "
    "--seed --timeout --max-memory --heal-steps --heal-every --device --dtype --layers-path "
    "--strategy --objective --option --serve-with --plan --eval-dataset"
).split()
TEXTS = {
    "--max-memory": [
        "1e999GiB",
        "-1GiB",
        "nanGiB",
        "1 GiB",
        "1KiB",
        "GiB",
        "1e3MB",
        "9" * 400 + "GB",
    ],
    "--objective": [
        "nll=nan",
        "nll=inf",
        "nll=0",
        "nll=-1",
        "nll=1e308,kl=1e308",
        "=",
        "nll,nll",
        "x",
    ]
    + ["nll=0.5,nll=0.5", "similarity", "accuracy", "kl=1e-320"],
    "--option": [
        "x=1",
        "=",
        "a",
        "contiguous=maybe",
        "batch_size=0",
        "contiguous=[[",
        "journal=o/x",
    ]
    + [
        'batch_size="x"',
        "model=5",
        "seed=1e400",
        "protect=5",
        "layers_path=5",
        f"contiguous={'[' * 9999}",
    ],
    "--strategy": ["nope", "", "x.py:Y", "f.txt:Y", "m:Y", "/dev/null:Y", "broken.py:Y", "fifo:Y"]
    + ["broken.py", ":", "os:system", "BI", "loops.py:Y", "int.py:Y"],
    "--serve-with": ["nope", "", ",", "vllm,vllm", "VLLM", "vllm,,mlx", "llama.cpp"],
    "--layers-path": [
        "",
        ".",
        "model",
        "model.layers",
        "model.layers.0",
        "lm_head",
        "..",
        "a" * 9999,
    ]
    + ["__class__", "model.embed_tokens.weight", "model..layers"],
    "--device": ["cuda:99", "mps", "meta", "", "cpu:5", "nope", "auto", "cuda:-1", "\udcff"],
    "--layers": [
        "1,1",
        "8",
        "-1",
        "0,1,2,3,4,5,6,7",
        "1,,2",
        "1 2",
        "1-3",
        "\uff11",
        "1_0",
        "1,2,",
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
        return Case(f"model name {what}", what, words, removed, name, check=check, must=fine)
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
        return Case(
            f"output name {what}", what, words, removed, output=name, check=check, intact=True
        )
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
        f"{path.name} is {what}", f"{path.name} is {what}, {how}", words, removed, intact=True
    )


def yaml_case(drawn: random.Random) -> Case:
    """A recipe to be written where it must not be."""
    name = drawn.choice(
        [
            "m/config.json",
            "m/model.safetensors",
            "f.txt",
            "m",
            "f.txt/x.yml",
            "/dev/full",
            "fifo",
            "",
        ]
        + [
            "d.jsonl",
            "o",
            "loop",
            "~nouser/x",
            "x" * 300,
            "/proc/x.yml",
            "full",
            ".",
            "m/README.md",
        ]
        + ["o/x.yml", "m/new.yml", "~/letter.txt", "link/config.json", "\udcff", "o.journal.jsonl"]
    )
    words = ["--model", "m", "--layers", "1,2", *SCORED, f"--export-yaml={name}", "--output", "o"]
    if drawn.random() < 0.4:
        words += ["--dry-run"]
    return Case(
        f"--export-yaml={short(name)}",
        f"--export-yaml={short(name)}{' --dry-run' if '--dry-run' in words else ''}",
        words,
        None if "--dry-run" in words else [1, 2],
        intact=True,
        may_change=("m/new.yml", "\udcff", "o.journal.jsonl"),
    )


# --- file trees -----------------------------------------------------------------------------------
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
        )
        + (
            "tokenizer.model",
            "report.html",
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
        )
        + ("pruning_manifest.json", "report.html", "\u202e.md", " .txt", "a\\b.txt", "model.gguf")
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
    return Case(what, what, list(words), removed, output=output, must=must, intact=True)


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
    "a search": ("m", [*SEARCHES["ablation"], *SCORED, "--dry-run", "--json", "--resume", "--output", "o"]),
    "a sweep": ("m", ["--strategy", "ablation", "--sweep", "1", *SCORED, "--output", "o"]),
}


def stepping(place: Path, at: int, act: Callable[[str], None], told: Path) -> None:
    """Call `act` at the step of this number in the room, and count the steps."""
    state = {"step": 0, "within": False}
    room = str(place / "room")

    def take(event: str, *args: Any) -> None:
        if state["within"]:
            return
        state["within"] = True
        try:
            state["step"] += 1
            if state["step"] == at:
                told.write_text(event)
                act(event)
        finally:
            state["within"] = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in STEPS or state["within"]:
            return
        path = args[0] if args and isinstance(args[0], str | bytes | os.PathLike) else ""
        name = os.fsdecode(path) if path else ""
        if event == "open" and _reads(args):
            if name.startswith(room) or not name.startswith("/"):
                take("read", *args)
        elif event == "fcntl.flock" or name.startswith(room) or (name and not name.startswith("/")):
            take(event, *args)

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            take(name)
            return call(*args, **options)

        return called

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    sys.addaudithook(hook)
    stepping.count = lambda: state["step"]  # type: ignore[attr-defined]


def _reads(args: tuple[Any, ...]) -> bool:
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
    return not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def counted(words: list[str], place: Path, limit: float) -> int:
    """How many steps a run takes; it is made on a copy."""
    other = place / "rehearsal"
    shutil.copytree(place / "room", other / "room", symlinks=True)

    def job() -> int:
        run = command(words, partial(stepping, other, 0, lambda event: None, other / "step"))
        run()
        (other / "count").write_text(str(stepping.count()))  # type: ignore[attr-defined]
        return 0

    forked(job, other, limit)
    found = other / "count"
    count = int(found.read_text()) if found.exists() else 1
    shutil.rmtree(other)
    return count


def signals_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A signal, or an error of the system, at one step of a run; then the run again."""
    scene = drawn.choice([*SCENES, *list(SCENES)[:3], *list(SCENES)[:2]])
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
        if fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
            return
        code = getattr(errno, fault.split()[0])
        if fault.endswith("on"):
            act_again()
        if code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT) and event in (
            "read",
            *(REMOVING - {"open"}),
        ):
            return  # that is no error of such a step
        raise OSError(code, os.strerror(code))

    def act_again() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            name = str(args[0]) if args else ""
            wrote = event in WRITES - {"os.rename"} or (event == "open" and not _reads(args))
            if wrote and (str(place / "room") in name or not name.startswith("/")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        sys.addaudithook(hook)

    begin = partial(stepping, place, at, act, told)
    first = forked(command(case.words, begin), place, limit, "first-")
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
        if state == "wrong" or (state == "absent" and "room/o" in before):
            case.said.append(("SILENT WRONG", f"the output is {state} after it"))
        done = state == "new" or first.code == 0
        seen = Ended(0 if done else first.code, first.out, first.err)
        hidden = {name: entry for name, entry in after.items() if not _is_leftover(name)}
        if stray := strayed(case, place, before, hidden if allowed else after, seen):
            case.said.append(("LOST OR STRAY", stray))
        if "--overwrite" not in case.words:
            case.words = [*case.words, "--overwrite"]
    elif stray := strayed(case, place, before, after, first):
        if not (allowed and _is_leftover(stray.split(" is ")[0])):
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


AREAS = {
    "words": Area(420, words_case),
    "trees": Area(200, trees_case),
    "signals": Area(330, signals_case),
}


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
    "stdin is a folder": ('"$@" </', {}, "", False),
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
    "PYTHONHASHSEED=1 and -O": ("", {"PYTHONHASHSEED": "1", "PYTHONOPTIMIZE": "2"}, "", True),
    "warnings are errors": ("", {"PYTHONWARNINGS": "error"}, "", False),
    **{
        f"ulimit -n {number}": (f'ulimit -n {number}; "$@"', {}, "", False)
        for number in (8, 10, 12, 14, 16, 20, 30, 40, 64)
    },
    **{
        f"ulimit -f {number}": (f'ulimit -f {number}; "$@"', {}, "", False)
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


AREAS["streams"] = Area(130, streams_case)
