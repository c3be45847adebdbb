"""What `faults.py` runs its cases in: rooms, forks of a loaded process, and judges.

A room is a new folder in which the command is run, beside a home and a folder for temporary files;
all three are listed before and after. No computing is done in the process that forks, so that
no thread of a library is lost in a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import numbered_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import llm_pruner
from llm_pruner import cli

LAYERS = 8
MEMORY = 12 * 2**30  # bytes of addresses that a case may have
DOCUMENTED = {2, 3, 4, 5, 6, 130}
BESIDE = ("journal.jsonl", "healing", "partial_plan.json", "curve.json", "curve.png")
BAD = ("SILENT WRONG", "TRACEBACK", "HANG", "LOST OR STRAY")
COLUMNS = ("right", "refused", "garbage-in accepted", *BAD)
SCORED = ["--eval-dataset", "d.jsonl", "--n-samples", "6", "--batch-size", "4", "--device", "cpu"]


@dataclass
class Ended:
    """How a run ended; `code` is None if it was stopped at the limit of time."""

    code: int | None
    out: str
    err: str


@dataclass
class Case:
    """One run in a room that is prepared already, and what may come of it.

    Attributes:
        kind: what cases of one cause have in common.
        what: this one, in a few words.
        words: the command line.
        removed: the layers that must be missing in the output; None if none is written.
        source: the model as stock transformers is to read it.
        output: where the output has to be.
        check: looks at a run that ended with 0, and complains.
        must: it has to end with 0.
        garbage: it must not end with 0.
        intact: the model is as the base has it, so that its bytes alone are compared.
        may_change: paths in the room that may change, or come.
        twin: prepares the same case in a form beyond doubt; the plans must agree.
        run: runs it instead of a fork; returns how it ended.
        said: what `run` found wrong: columns and complaints.
    """

    kind: str
    what: str
    words: list[str]
    removed: list[int] | None = None
    source: str = "m"
    output: str = "o"
    check: Callable[[Path, Ended], str | None] | None = None
    must: bool = False
    garbage: bool = False
    intact: bool = False
    may_change: tuple[str, ...] = ()
    twin: Callable[[Path, Path], list[str] | None] | None = None
    run: Callable[[Case, Path, float], Ended] | None = None
    said: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Base:
    """What all rooms are made of: models ``m`` and ``s`` (in shards), an output, plans, data."""

    folder: Path
    limit: float

    def copy(self, name: str, target: Path) -> Path:
        """One of its files or folders, copied."""
        path = self.folder / name
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        return target

    def json(self, name: str) -> Any:
        """The contents of one of its files."""
        return json.loads((self.folder / name).read_text())


SEARCHES = {
    "ablation": ["--strategy", "ablation", "--n-layers", "2"],
    "smart": ["--strategy", "smart", "--n-layers", "2"],
    "smart3": ["--strategy", "smart", "--n-layers", "3", "--objective", "nll=0.7,kl=0.3"],
    "bi": ["--strategy", "bi", "--n-layers", "2"],
}


def preload() -> None:
    """Import what a run may import, so that forks need not."""
    for found in pkgutil.walk_packages(llm_pruner.__path__, "llm_pruner."):
        importlib.import_module(found.name)
    for name in ("transformers.models.llama.modeling_llama", "yaml", "jinja2", "filelock"):
        importlib.import_module(name)


# --- forks --------------------------------------------------------------------------------------
def forked(job: Callable[[], int], place: Path, limit: float, streams: str = "") -> Ended:
    """Run a job in a fork with `place`/room as its folder; its exit status is what it returns."""
    out, err = place / f"{streams}out", place / f"{streams}err"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setpgid(0, 0)
            _become(place, out, err)
            code = job()
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code & 0xFF)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    descriptor = os.pidfd_open(pid)
    hung = not select.select([descriptor], [], [], limit)[0]
    os.close(descriptor)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = None if hung else os.waitstatus_to_exitcode(status)
    return Ended(code, _read(out), _read(err))


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(2_000_000).decode("utf-8", "replace")


def _become(place: Path, out: Path, err: Path) -> None:
    """The folder, streams, environment and signals of a new process."""
    for name in ("room", "home", "tmp"):
        (place / name).mkdir(exist_ok=True)
    os.chdir(place / "room")
    os.environ.update(HOME=str(place / "home"), TMPDIR=str(place / "tmp"))
    tempfile.tempdir = None
    for number, path, flags in ((0, "/dev/null", os.O_RDONLY), (1, out, None), (2, err, None)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if flags is None else flags
        descriptor = os.open(path, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def command(words: list[str], begin: Callable[[], None] = lambda: None) -> Callable[[], int]:
    """The job that is the command, and ends as the interpreter would end it."""

    def job() -> int:
        sys.argv = ["llm-pruner", *words]
        code: Any = 0
        try:
            begin()
            code = cli.main()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        try:
            sys.stdout.flush()
        except OSError as error:
            print(f"Exception ignored in: <stdout>\n{error!r}", file=sys.stderr)
            code = 120
        return int(code or 0)

    return job


def run_command(case: Case, place: Path, limit: float) -> Ended:
    """The case's command in a fork."""
    return forked(command(case.words), place, limit)


def run_process(
    case: Case, place: Path, limit: float, environment: dict[str, str | None], shell: str = ""
) -> Ended:
    """The case's command in a new process, behind a line of shell that has it as ``"$@"``."""
    env: dict[str, str] = {**os.environ, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    script = Path(sys.executable).with_name("llm-pruner")
    words = ["bash", "-c", shell or '"$@"', "bash", sys.executable, str(script), *case.words]
    with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
        process = subprocess.Popen(
            words,
            cwd=place / "room",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ended(code, _read(place / "out"), _read(place / "err"))


def muted(job: Callable[[], Any]) -> Callable[[], int]:
    """A job in a fork that prints its result as JSON and nothing else."""

    def told() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            result = job()
        print(json.dumps(result), flush=True)
        return 0

    return told


# --- the base -----------------------------------------------------------------------------------
def build(folder: Path, limit: float) -> Base:
    """Make the base; what is computed is computed in forks."""
    base = Base(folder, limit)
    place = folder / "making"
    (place / "room").mkdir(parents=True)

    def models() -> int:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
        model = LlamaForCausalLM(config)
        for name, size in (("m", "1GB"), ("s", "60KB")):
            model.save_pretrained(name, max_shard_size=size)
            numbered_tokenizer(64).save_pretrained(name)
            card = "---\nlicense: mit\nlanguage: en\n---\n# A model\n"
            Path(name, "README.md").write_text(card)
        return 0

    _demand(forked(models, place, limit))
    Path(place, "room", "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items(40)))
    for name, words in SEARCHES.items():
        asked = ["--model", "m", *words, *SCORED, "--dry-run", "--resume", "--json"]
        ended = forked(command([*asked, "--output", name]), place, limit)
        _demand(ended)
        (place / "room" / f"{name}.plan.json").write_text(ended.out)
    _demand(forked(command(["--model", "m", "--layers", "3", "--output", "o"]), place, limit))
    for path in (place / "room").iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(place)
    return base


def _demand(ended: Ended) -> None:
    if ended.code:
        raise SystemExit(f"What the cases are made of could not be made:\n{ended.err}")


def items(count: int, seed: int = 1) -> list[dict[str, str]]:
    """Question items of the tokenizer's words."""
    state, found = seed, []
    for _ in range(count):
        words = []
        for _ in range(10):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(f"t{4 + (state >> 8) % 60:03d}")
        found.append({"prompt": " ".join(words[:6]), "reference": " ".join(words[6:])})
    return found
