"""What `faults.py` runs its cases in: rooms, forks of a loaded process, and judges.

A room is a new folder in which the command is run, beside a home and a folder for temporary files;
all three are listed before and after. No computing is done in the process that forks, so that
no thread of a library is lost in a fork.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import resource
import select
import shutil
import signal
import stat
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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llm_pruner
from llm_pruner import cli

LAYERS = 8
MEMORY = 12 * 2**30  # bytes of addresses that a case may have
DOCUMENTED = {2, 3, 4, 5, 6, 130}
BESIDE = ("journal.jsonl", "healing", "partial_plan.json", "curve.json", "curve.png")
BAD = ("SILENT WRONG", "TRACEBACK", "HANG", "LOST OR STRAY")
COLUMNS = ("right", "refused", "garbage-in accepted", *BAD)
Listing = dict[str, tuple[Any, ...]]
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
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(
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


# --- judges -------------------------------------------------------------------------------------
def listing(place: Path) -> Listing:
    """Everything in the room, the home and the temporary folder."""
    found: Listing = {}
    pending = [place / name for name in ("room", "home", "tmp") if (place / name).is_dir()]
    while pending:
        for entry in os.scandir(pending.pop()):
            name = os.path.relpath(entry.path, place)
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                found[name] = ("link", os.readlink(entry.path))
            elif stat.S_ISDIR(mode):
                found[name] = ("folder",)
                pending.append(Path(entry.path))
            elif stat.S_ISREG(mode):
                raw = Path(entry.path).read_bytes()
                found[name] = ("file", len(raw), hashlib.sha256(raw).hexdigest())
            else:
                found[name] = ("special", stat.S_IFMT(mode))
    return found


def resolved(name: str, place: Path) -> str:
    """Where a path given in the room is, relative to the place; a link at its end is itself."""
    home = str(place / "home")
    path = home + name[1:] if name == "~" or name.startswith("~/") else name
    parent, last = os.path.split(os.path.join(place / "room", path.rstrip("/") or path))
    if last in ("", ".", ".."):
        return os.path.relpath(os.path.realpath(os.path.join(parent, last)), place)
    return os.path.relpath(os.path.join(os.path.realpath(parent), last), place)


def strayed(case: Case, place: Path, before: Listing, after: Listing, ended: Ended) -> str | None:
    """What was lost, changed, or left where it should not be."""
    output = resolved(case.output, place)
    beside = tuple(f"{output}.{ending}" for ending in BESIDE)
    free = tuple(resolved(name, place) for name in case.may_change)
    replaces = "--overwrite" in case.words and ended.code == 0 and case.removed is not None

    def within(name: str, roots: tuple[str, ...]) -> bool:
        return any(name == root or name.startswith(f"{root}/") for root in roots)

    written = {f"{output}/{name}" for name in OLD_OUTPUT}
    for name, entry in before.items():
        if after.get(name) != entry and not within(name, free):
            if replaces and name in written:
                continue
            return f"{name} is {'gone' if name not in after else 'changed'}"
    asked = (output,) if ended.code == 0 and case.removed is not None else ()
    for name in after.keys() - before.keys():
        above = any(path.startswith(f"{name}/") for path in asked)
        caches = within(name, ("home/.cache", "home/.config"))
        if not (within(name, asked) or above or within(name, (*beside, *free)) or caches):
            return f"{name} is left"
    return None


OLD_OUTPUT: set[str] = set()  # what llm_pruner wrote into the base's output


def tensors_of(folder: Path) -> dict[str, str]:
    """Hash of every tensor as the files say, by name; an independent reader."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                tag = f"{entry['dtype']}{entry['shape']}".encode()
                assert name not in found, f"{name} is there twice"
                found[name] = hashlib.sha256(tag + raw[start:end]).hexdigest()
    return found


def without(tensors: dict[str, Any], removed: list[int], count: int) -> dict[str, Any]:
    """The tensors that must be left, under their new names."""
    new = {old: n for n, old in enumerate(i for i in range(count) if i not in removed)}
    found = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name, re.DOTALL)
        if match is None:
            found[name] = value
        elif int(match[2]) in new:
            found[f"{match[1]}{new[int(match[2])]}{match[3]}"] = value
    return found


def compare_bytes(source: Path, out: Path, removed: list[int]) -> str | None:
    """What is wrong with an output of an intact source, by its bytes."""
    try:
        found = tensors_of(out)
        config = json.loads((out / "config.json").read_text())
    except Exception as error:
        return f"the output cannot be read: {type(error).__name__}: {error}"
    if found != without(tensors_of(source), removed, LAYERS):
        return "other tensors than the source's kept ones"
    if config.get("num_hidden_layers") != LAYERS - len(removed):
        return f"the config counts {config.get('num_hidden_layers')} layers"
    return None


def _stock(folder: Path) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """A model as stock transformers reads it: config, tensors, and names that it did not use."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    lacking = [*info["missing_keys"], *info["mismatched_keys"], *info.get("error_msgs", ())]
    if lacking:
        raise ValueError(f"{lacking[0]} is missing or has another shape")
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    state = {
        name: f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }
    return config, state, set(info["unexpected_keys"])


def compare_models(source: Path, out: Path, removed: list[int]) -> dict[str, str | None]:
    """What stock transformers says of the source, and of the output as the source's remainder."""
    said: dict[str, str | None] = {"source": None, "output": None}
    try:
        config, state, unused = _stock(source)
    except Exception as error:
        said["source"] = f"{type(error).__name__}: {error}"[:200]
    try:
        new_config, new_state, new_unused = _stock(out)
    except Exception as error:
        said["output"] = f"{type(error).__name__}: {error}"[:200]
        return said
    if said["source"] is not None:
        return said
    count = config["num_hidden_layers"]
    if new_config["num_hidden_layers"] != count - len(removed):
        said["output"] = f"{new_config['num_hidden_layers']} layers of {count}"
    elif new_state != without(state, removed, count):
        said["output"] = "other weights than the source's kept ones"
    elif new_unused - unused - {re.sub(r"\d+", "0", name) for name in unused} and not unused:
        said["output"] = f"tensors that no model reads: {min(new_unused)}"
    else:
        differing = [
            name
            for name in config.keys() | new_config.keys()
            if name not in ("num_hidden_layers", "layer_types")
            and json.dumps(config.get(name), default=str, sort_keys=True)
            != json.dumps(new_config.get(name), default=str, sort_keys=True)
            and config.get(name) != count
        ]
        said["output"] = f"config: {sorted(differing)}" if differing else None
    return said


def normalise(source: Path, target: Path) -> None:
    """The model as stock transformers reads it, written anew."""
    AutoConfig.from_pretrained(source)
    _stock(source)
    model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
    model.save_pretrained(target)


def plan_of(text: str) -> dict[str, Any]:
    """The plan that a dry run printed."""
    return json.loads(text[text.index("{") :])


def differing(plan: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """In what a plan differs from another beyond rounding."""
    if plan["remove"] != wanted["remove"]:
        return f"chose {plan['remove']} where a clean run chooses {wanted['remove']}"
    for part in ("scores", "steps", "held_out"):
        left, right = _numbers(plan.get(part)), _numbers(wanted.get(part))
        far = [a for a, b in zip(left, right, strict=False) if not abs(a - b) <= 1e-4]
        if len(left) != len(right) or far:
            return f"{part} differ from those of a clean run"
    return None


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [one for name in sorted(value) for one in _numbers(value[name])]
    if isinstance(value, list):
        return [one for entry in value for one in _numbers(entry)]
    return [float(value)] if isinstance(value, int | float) else []


def muted(job: Callable[[], Any]) -> Callable[[], int]:
    """A job in a fork that prints its result as JSON and nothing else."""

    def told() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            result = job()
        print(json.dumps(result), flush=True)
        return 0

    return told
