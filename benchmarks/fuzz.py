"""What foreign bytes do to the parsers: coverage-guided fuzzing with atheris.

    pip install atheris                                    # Linux; not needed for anything else
    python benchmarks/fuzz.py safetensors --seconds 600    # headers and the index
    python benchmarks/fuzz.py gguf --seconds 600           # headers, of one file or of two parts
    python benchmarks/fuzz.py json --seconds 600           # plans, reports, manifests, journals

Begins with small valid files and changes them, half of the time as bytes and half of the time as
what they are (a JSON document, a header, a list of fields); what reaches new code of llm_pruner is
kept and changed further. A failure is

    an exception       other than an `LLMPrunerError`, of the parser or of what is done at once with
                       what it returned; MemoryError too: a case may take 512 MB (inputs are at most
                       64 KB)
    TooLong            a case took more than 5 s
    Inconsistent       what was accepted is not what it says: the tensors do not cover the file, it
                       is written and read again as something else, or the format's own library
                       (safetensors, gguf) refuses it or reads something else

Prints executions, coverage as libFuzzer counts it, the lines of all functions entered that were
reached (and which were not), and a table of the failures, of which those of one kind at one place
count once: the smallest input, which is also saved in the folder of --save, and what is said. Files
that the safetensors library reads and llm_pruner refuses are listed too, and are no failures. Ends
with exit status 1 after a failure. An input is a sequence of files, each after its length (4 bytes,
little-endian); of `json` the first file is the kind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

try:
    import atheris
except ImportError:
    sys.exit("This needs atheris: pip install atheris")

CHILD = "--child"
with atheris.instrument_imports(["llm_pruner"]) if CHILD in sys.argv else nullcontext():
    from llm_pruner.errors import LLMPrunerError
    from llm_pruner.results import DepthCurve, PruningPlan, PruningReport
    from llm_pruner.search.journal import Journal
    from llm_pruner.storage import gguf_files, gguf_models, safetensors_files
    from llm_pruner.storage.manifest import Manifest
    from llm_pruner.storage.sources import INDEX_FILE, SINGLE_FILE, LocalFolder

PACKAGE = Path(gguf_files.__file__).parents[1]
SECONDS = 5  # of the processor, that a case may take
BACKSTOP = 60  # seconds after which libFuzzer ends the process, where no signal helps
MEMORY = 512 * 2**20  # that a case may take
LONGEST = 65_535  # bytes of an input
MEMORY_DISK = Path("/dev/shm")
STRICTER = "Stricter"  # than the format's own library: listed, and no failure
PARTS = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
SHARDS = ("a.safetensors", "b.safetensors")


class TooLong(BaseException):
    """A case takes too long; nothing in between catches it."""


class InconsistentError(Exception):
    """What was accepted is not what it says."""


class StricterError(Exception):
    """What was refused, the format's own library reads."""


class Target(NamedTuple):
    """What is fuzzed."""

    seeds: Callable[[], list[list[bytes]]]  # files that are valid
    check: Callable[[list[bytes], Path], None]  # raises where something is wrong
    change: Callable[[list[bytes], random.Random], list[bytes]]  # ValueError if it cannot


def main() -> None:
    """Fuzz in child processes until the time is over, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="another one tries other inputs")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failures"), metavar="FOLDER")
    parser.add_argument(CHILD, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger("llm_pruner").setLevel(logging.CRITICAL)
    target = TARGETS[args.target]
    if args.child:
        fuzz(target, args.child, args.seconds, args.seed)
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as name:
        place = Path(name)
        for folder in ("corpus", "found", "crashes"):
            (place / folder).mkdir()
        for number, files in enumerate(target.seeds()):
            (place / "corpus" / f"seed-{number}").write_bytes(joined(files))
        for files in target.seeds():
            target.check(files, place)
        end, runs, coverage = time.monotonic() + args.seconds, 0, 0
        while (left := int(end - time.monotonic())) > 0:
            done = start(args.target, place, left, args.seed + runs)
            runs, coverage = runs + done[0], max(coverage, done[1])
        found = findings(target, place)
        kept = [path.read_bytes() for path in sorted((place / "corpus").iterdir())]
        print(f"{args.target}: {runs:,} executions in {args.seconds} s, ", end="")
        print(f"coverage {coverage:,}, {len(kept):,} inputs kept; {reached(target, kept, place)}.")
    report(args.target, found, args.save)
    raise SystemExit(any(not one.kind.startswith(STRICTER) for one in found))


# --- the fuzzing process ------------------------------------------------------------------------


def start(name: str, place: Path, seconds: int, seed: int) -> tuple[int, int]:
    """Fuzz in a child process; its executions and coverage. It ends early where it is killed."""
    command = [sys.executable, __file__, name, "--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(
        [*command, CHILD, place], capture_output=True, text=True, errors="replace"
    )
    runs = [int(number) for number in re.findall(r"^#(\d+)\s", done.stderr, re.MULTILINE)]
    coverage = [int(number) for number in re.findall(r"\bcov: (\d+)", done.stderr)]
    if not runs or "Traceback" in done.stderr:  # a mistake of this script
        sys.exit(f"The fuzzer failed:\n{done.stdout}{done.stderr}")
    return max(runs), max(coverage, default=0)


def fuzz(target: Target, place: Path, seconds: int, seed: int) -> None:
    """Call libFuzzer, which does not return; failures go into files of `place`."""
    seen: set[str] = set()

    def once(data: bytes) -> None:
        failed = failure(target, data, place)
        if failed is not None:
            note(place / "found", failed.kind, data, seen)

    def changed(data: bytes, longest: int, number: int) -> bytes:
        drawn = random.Random(number)
        if drawn.random() < 0.5:
            with suppress(ValueError, RecursionError, LLMPrunerError, OverflowError, struct.error):
                made = joined(target.change(divided(data), drawn))
                if len(made) <= longest:
                    return made
        return atheris.Mutate(data, longest)

    words = [sys.argv[0], str(place / "corpus"), f"-max_total_time={seconds}", f"-seed={seed + 1}"]
    words += [f"-artifact_prefix={place / 'crashes'}/", f"-timeout={BACKSTOP}", "-rss_limit_mb=0"]
    words += [f"-max_len={LONGEST}", "-print_final_stats=1"]
    atheris.Setup(words, once, custom_mutator=changed)
    limit_case()
    atheris.Fuzz()


def limit_case() -> None:
    """Let memory grow by so much, and prepare the alarm."""
    (size,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(size) + MEMORY, resource.RLIM_INFINITY))

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, stop)


class Failure(NamedTuple):
    """What is wrong with a case, and where; what was said."""

    kind: str
    said: str = ""


def failure(target: Target, data: bytes, place: Path) -> Failure | None:
    """What is wrong with a case; None if nothing is."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.check(divided(data), place)
    except LLMPrunerError:
        return None
    except (InconsistentError, StricterError) as error:
        return Failure(f"{type(error).__name__.removesuffix('Error')}: {error}")
    except (Exception, TooLong) as error:
        return Failure(f"{type(error).__name__} in {where(error)}", str(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def where(error: BaseException) -> str:
    """The innermost line of the package that an error went through."""
    place, trace = "benchmark", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if Path(code.co_filename).is_relative_to(PACKAGE):
            name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            place = f"{name}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return place


def general(message: str) -> str:
    """A message without what belongs to one input."""
    text = re.sub(r"\(.*|(['\"`]).*\1|[\[{].*", "…", message.split("\n")[0])
    text = re.sub(r"(invalid type|key must be a string|expected value)\b.*", r"\1", text)
    return re.sub(r"\S*\d\S*", "N", text)[:100].strip()


def note(folder: Path, kind: str, data: bytes, seen: set[str]) -> None:
    """Keep the smallest input of every kind."""
    path = folder / hashlib.sha256(kind.encode()).hexdigest()[:12]
    if kind not in seen:
        path.with_suffix(".kind").write_text(kind, errors="backslashreplace")
    seen.add(kind)
    if not path.exists() or len(data) < path.stat().st_size:
        path.write_bytes(data)


# --- afterwards ---------------------------------------------------------------------------------


class Finding(NamedTuple):
    """A failure, its smallest input, and what is said of it."""

    kind: str
    data: bytes
    said: str = ""


def findings(target: Target, place: Path) -> list[Finding]:
    """Everything that was found, the inputs reduced."""
    found = []
    for path in sorted((place / "found").glob("*.kind")):
        kind, data = path.read_text(), path.with_suffix("").read_bytes()
        said = ""
        if not kind.startswith(("TooLong", "MemoryError")):
            data = reduced(target, kind, data, place)
            said = (failure(target, data, place) or Failure("")).said
        found.append(Finding(kind, data, said))
    for path in sorted((place / "crashes").iterdir()):
        found.append(Finding(f"the process ended: {path.name.split('-')[0]}", path.read_bytes()))
    return sorted(found, key=lambda one: (one.kind.startswith(STRICTER), one.kind))


def reduced(target: Target, kind: str, data: bytes, place: Path, seconds: float = 10) -> bytes:
    """The input without the bytes that the failure does not need."""
    end, files = time.monotonic() + seconds, divided(data)
    size = max(map(len, files), default=0)
    while size and time.monotonic() < end:
        for number, begin in [(n, b) for n, f in enumerate(files) for b in range(0, len(f), size)]:
            shorter = [*files]
            shorter[number] = files[number][:begin] + files[number][begin + size :]
            failed = failure(target, joined(shorter), place)
            if failed is not None and failed.kind == kind:
                files, size = shorter, size * 2  # and again from the first byte on
                break
        size //= 2
    return joined(files)


def reached(target: Target, inputs: Sequence[bytes], place: Path) -> str:
    """Which lines of the functions entered the inputs reach."""
    lines: dict[CodeType, set[int]] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            return None
        there = lines.setdefault(frame.f_code, set())
        there.add(frame.f_lineno)

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            there.add(frame.f_lineno)
            return local

        return local

    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    sys.settrace(trace)
    for data in inputs:
        failure(target, data, place)
    sys.settrace(None)
    missed, total = [], 0
    for code, there in lines.items():
        every = {line for *_, line in code.co_lines() if line}
        total += len(every)
        name = Path(code.co_filename).name
        missed += [f"{name}:{line}" for line in sorted(every - there)]
    listed = f" (not {', '.join(sorted(missed))})" if missed else ""
    return f"{total - len(missed)} of {total} lines reached of the functions entered{listed}"


def report(name: str, found: Sequence[Finding], folder: Path) -> None:
    """Print the failures and save their inputs."""
    if not found:
        return
    folder.mkdir(parents=True, exist_ok=True)
    print("\n| failure | what is said | smallest input | file |\n|---|---|---|---|")
    for kind, data, said in found:
        path = folder / f"{name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
        path.write_bytes(data)
        shown = " + ".join(ascii(part)[1:] for part in divided(data))
        shown = shown if len(shown) <= 200 else f"{len(data):,} bytes: {shown[:150]}…"
        print(f"| {kind} | {said[:100]} | {shown} | {path.name} |".replace("\n", " "), flush=True)


# --- inputs of several files --------------------------------------------------------------------


def joined(files: Sequence[bytes]) -> bytes:
    """The files as one input."""
    return b"".join(len(file).to_bytes(4, "little") + file for file in files)


def divided(data: bytes, most: int = 3) -> list[bytes]:
    """The files of any input; a length that is too large means the rest."""
    files = []
    while data and len(files) < most:
        size = int.from_bytes(data[:4], "little")
        files.append(data[4 : 4 + size])
        data = data[4 + size :]
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Files into a folder that always has files of these names."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- JSON documents -----------------------------------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """An object, in which a name may be twice."""


class Raw(str):
    """JSON text that stands for itself."""


POOL = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308),
    *("", "a", "0", "1", "F32", "BF16", "F4", "BOOL", "F8_E4M3FNUZ", "../a", "a.safetensors"),
    *("lowest", "highest", "format", "llm_pruner.plan/1", "llm_pruner.manifest/1", "\0", "\u2028"),
    *([], [0], [1, 2], [[]], [0, 2**62], Pairs(), Pairs([("a", 1)])),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "1E400", '"\\ud800"', "1.0", "-0", "1e2")),
    *(Raw("9" * size) for size in (400, 4000, 5000)),
    *(Raw("[" * depth + "]" * depth) for depth in (50, 990, 5000)),
    *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in (50, 990, 5000)),
)


def parsed(text: bytes) -> Any:
    """JSON with objects as `Pairs`; ValueError or RecursionError if it is none."""
    return json.loads(text, object_pairs_hook=Pairs)


def written(value: Any) -> str:
    """The text of what `parsed` gives."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{written(one)}" for name, one in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def changed_json(value: Any, drawn: random.Random) -> Any:
    """The document with one to four changes."""
    holder = [value]
    for _ in range(drawn.choice((1, 1, 2, 4))):
        places = list(_places(holder))
        if not places:  # everything was deleted
            return value
        parent, index = drawn.choice(places)
        _change(parent, index, places, drawn)
    return holder[0] if len(holder) == 1 else value


def _places(node: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Every value below: the list or object that holds it, and its index there."""
    for index, entry in enumerate(node):
        yield node, index
        value = entry[1] if isinstance(node, Pairs) else entry
        if isinstance(value, list):
            yield from _places(value)


def _change(
    parent: list[Any], index: int, places: list[tuple[list[Any], int]], drawn: random.Random
) -> None:
    named = isinstance(parent, Pairs)
    name, value = parent[index] if named else ("", parent[index])
    other_parent, other_index = drawn.choice(places)
    other = other_parent[other_index]
    if isinstance(other_parent, Pairs):
        other = drawn.choice(other)  # a name, or its value
    how = drawn.randrange(8)
    if how == 0:
        del parent[index]
        return
    if how == 1:  # twice
        parent.insert(index, (name, drawn.choice((value, other))) if named else value)
        return
    if how == 2 and named:
        name = drawn.choice((f"{name}x", name.upper(), str(drawn.choice(POOL[:30])), str(other)))
    elif how in (3, 4) and type(value) in (int, float):
        value = drawn.choice((value + 1, value - 1, -value, value * 2, value + 64, 0))
    elif how == 5:
        value = [value] if drawn.random() < 0.5 else Pairs([("a", value)])
    elif how == 6 and not _holds(other, parent):
        value = other
    else:
        value = drawn.choice(POOL)
    if isinstance(value, list) and any(value is one for one in POOL):
        value = type(value)(value)
    parent[index] = (name, value) if named else value


def _holds(value: Any, wanted: list[Any]) -> bool:
    """Whether a list is below another: it must not become its own entry."""
    return isinstance(value, list) and (
        value is wanted
        or any(_holds(one[1] if isinstance(value, Pairs) else one, wanted) for one in value)
    )


# --- safetensors --------------------------------------------------------------------------------


def safetensors_seeds() -> list[list[bytes]]:
    """One file; a small one; an index and two shards."""
    whole = {"a": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("I64", []), "d": ("U8", [0, 7])}
    shards = [{"a": ("F16", [2, 2])}, {"b": ("F8_E4M3", [3]), "c": ("BOOL", [1])}]
    index = {"metadata": {"total_size": 12}, "weight_map": {"a": SHARDS[0]}}
    index["weight_map"] |= dict.fromkeys("bc", SHARDS[1])
    return [
        [st_file(whole, {"format": "pt"})],
        [st_file({"a": ("F32", [1])})],
        [st_file({})],
        [json.dumps(index).encode(), *map(st_file, shards)],
    ]


def st_file(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None
) -> bytes:
    """A file of zeros."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * safetensors_files.BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def change_safetensors(files: list[bytes], drawn: random.Random) -> list[bytes]:
    """Change the header of a file, or the index; the file then mostly has the bytes it needs."""
    number = drawn.randrange(len(files))
    file = files[number]
    if len(files) > 1 and number == 0:
        files[0] = written(changed_json(parsed(file), drawn)).encode()
        return files
    length = int.from_bytes(file[:8], "little")
    header = changed_json(parsed(file[8 : 8 + length]), drawn)
    text, data = written(header).encode(), file[8 + length :]
    if drawn.random() < 0.1:
        text = text.decode().encode(drawn.choice(("utf-16", "utf-16-le", "utf-8-sig", "utf-32")))
    if drawn.random() < 0.2:
        text = drawn.choice((b" ", b"\n", b"")) * 8 + text + drawn.choice((b" ", b"\0", b"")) * 8
    if drawn.random() < 0.8:
        ends = [int(x) for x in re.findall(rb'"data_offsets"\s*:\s*\[\d+,\s*(\d{1,4})\]', text)]
        data = bytes(max(ends, default=0))
    files[number] = len(text).to_bytes(8, "little") + text + data
    return files


def check_safetensors(files: list[bytes], place: Path) -> None:
    """Read a checkpoint, describe it, write its headers, read them again."""
    if len(files) < 2:
        folder = write(place / "single", {SINGLE_FILE: b"".join(files)})
    else:
        shards = dict(zip(SHARDS, [*files[1:], b""], strict=False))
        folder = write(place / "several", {INDEX_FILE: files[0], **shards})
    source = LocalFolder(folder)
    try:
        checkpoint = safetensors_files.read_checkpoint(source)
    except LLMPrunerError as error:
        if len(files) == 1 and library_refuses(files[0]) is None:
            reason = str(error).partition("cannot be used: ")[2]
            raise StricterError(f"the library reads it, and: {general(reason)}") from error
        raise
    used = {tensor.file for tensor in checkpoint.tensors.values()}
    for name in used or {SINGLE_FILE}:
        content = (folder / name).read_bytes()
        refusal = library_refuses(content)
        if refusal is not None:
            raise InconsistentError(f"the library refuses it: {general(refusal)}")
        cover(content, [one for one in checkpoint.tensors.values() if one.file == name])
    checkpoint.identity()
    for name, metadata in checkpoint.metadata.items():
        pairs = [(one, one.name) for one in checkpoint.tensors.values() if one.file == name]
        header = safetensors_files.header_bytes(pairs, metadata)
        again = header + bytes(sum(one.size for one, _ in pairs))
        folder = write(place / "again", {SINGLE_FILE: again})
        second = safetensors_files.read_checkpoint(LocalFolder(folder))
        same = [(one.name, one.dtype, one.shape) for one, _ in pairs]
        if [(one.name, one.dtype, one.shape) for one in second.tensors.values()] != same:
            raise InconsistentError("its tensors, written and read again, are others")
        if second.metadata != {SINGLE_FILE: metadata}:
            raise InconsistentError("its metadata, written and read again, are others")


def library_refuses(content: bytes) -> str | None:
    """What the safetensors library says against a file; None if it reads it."""
    from safetensors import SafetensorError, deserialize

    try:
        deserialize(content)
    except SafetensorError as error:
        return str(error)
    return None


def cover(content: bytes, tensors: Sequence[safetensors_files.StoredTensor]) -> None:
    """Raise unless the tensors are the whole file after its header."""
    position = 8 + int.from_bytes(content[:8], "little")
    for one in tensors:
        bits = math.prod(one.shape) * safetensors_files.BITS[one.dtype]
        if one.start != position or 8 * one.size != bits:
            raise InconsistentError("a tensor is not where the one before ends")
        position = one.end
    if position != len(content):
        raise InconsistentError("the tensors do not cover the file")


# --- GGUF ---------------------------------------------------------------------------------------

Entry = tuple[str, int, Any]  # of the metadata: key, type, value
Listed = tuple[str, tuple[int, ...], int, int]  # a tensor: name, shape, type, offset
TYPES = (*gguf_files.NUMBERS, gguf_files.STRING)


def gguf_seeds() -> list[list[bytes]]:
    """A model in one file, as the gguf package writes it, and one in two parts."""
    import numpy as np
    from gguf import GGUFWriter

    def made(entries: dict[str, Any], names: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.gguf"
            writer = GGUFWriter(path, "llama")
            writer.add_block_count(2)
            writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
            writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
            writer.add_array("llama.feed_forward_length", [3, 4])
            writer.add_array("general.tags", ["x", "yz"])
            writer.add_bool("general.bool", True)
            writer.add_float64("general.float", 0.25)
            for key, value in entries.items():
                writer.add_uint16(key, value)
            for number, name in enumerate(names):
                kind = (np.float32, np.float16)[number % 2]
                writer.add_tensor(f"blk.0.{name}", np.zeros((2, 32), kind))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return path.read_bytes()

    halves = [{"split.no": number, "split.count": 2} for number in (0, 1)]
    return [
        [made({}, "abc")],
        [gguf_bytes(3, [("general.alignment", 4, 64), ("a", 8, "")], [("t", (32,), 0, 0)], b"")],
        [gguf_bytes(2, [], [], b"")],
        [made(halves[0], "ab"), made(halves[1], "c")],
    ]


def gguf_bytes(
    version: int, entries: Sequence[Entry], tensors: Sequence[Listed], data: bytes
) -> bytes:
    """A file that need not be right; it is filled up to 4 KB of what its tensors need."""
    text = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    for key, kind, value in entries:
        text += gguf_files.encode_field(key, kind, value)
    for name, shape, kind, offset in tensors:
        encoded = name.encode()
        text += struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(shape))
        text += struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)
    alignments = [value for key, _, value in entries if key == "general.alignment"]
    alignment = alignments[-1] if alignments and type(alignments[-1]) is int else 32
    text += bytes(-len(text) % max(1, min(alignment, 4096)))
    sizes = gguf_files._type_sizes()
    needs = [0]
    for _, shape, kind, offset in tensors:
        _, block, size = sizes.get(kind, ("", 1, 0))
        needs.append(offset + math.prod(shape) // block * size)
    return text + data + bytes(max(0, min(4096, max(needs)) - len(data)))


def change_gguf(files: list[bytes], drawn: random.Random) -> list[bytes]:
    """Change entries and tensors of a valid file."""
    number = drawn.randrange(len(files))
    content = files[number]
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        (Path(folder) / "m.gguf").write_bytes(content)
        found = gguf_files.read_gguf(LocalFolder(folder), "m.gguf")
        types = {name: kind for kind, (name, _, _) in gguf_files._type_sizes().items()}
    base = min((one.start for one in found.tensors), default=len(content))
    entries = [
        (one.key, one.type, one.value) for one in found.fields.values() if one.value is not None
    ]
    tensors = [(t.name, t.shape, types[t.dtype], t.start - base) for t in found.tensors]
    version, data = found.version, content[base:]
    for _ in range(drawn.choice((1, 1, 2, 4))):
        how = drawn.randrange(10)
        if how < 5 and entries:
            _change_entry(entries, drawn)
        elif how < 9 and tensors:
            _change_tensor(tensors, [*types.values()], drawn)
        else:
            version, data = drawn.choice((2, 3, version)), drawn.choice((data, b"", data[:-1]))
    files[number] = gguf_bytes(version, entries, tensors, data)
    return files


def _change_entry(entries: list[Entry], drawn: random.Random) -> None:
    index = drawn.randrange(len(entries))
    key, kind, value = entries[index]
    how = drawn.randrange(6)
    if how == 0:
        del entries[index]
        return
    if how == 1:
        keys = ("split.count", "split.no", "split.tensors.count", "general.alignment")
        entries.append((drawn.choice(keys), drawn.choice((2, 4, 5)), drawn.choice((0, 1, 2, 64))))
        return
    if how == 2:
        entries.append((drawn.choice((key, f"{key}x", "", "k" * 300)), kind, value))
        return
    kind = drawn.choice(TYPES)
    numbers = (0, 1, 2, 3, 8, 32, 64, 255, 2**16, 2**31, 2**63, -1, -(2**31))
    value = drawn.choice(("", "a", "é" * 5)) if kind == gguf_files.STRING else drawn.choice(numbers)
    if drawn.random() < 0.4:
        value = [value] * drawn.choice((0, 1, 3, 100))
    gguf_files.encode_field(key, kind, value)  # struct.error where the number does not fit
    entries[index] = (key, kind, value)


def _change_tensor(tensors: list[Listed], types: Sequence[int], drawn: random.Random) -> None:
    index = drawn.randrange(len(tensors))
    name, shape, kind, offset = tensors[index]
    how = drawn.randrange(6)
    if how == 0:
        del tensors[index]
        return
    if how == 1:
        tensors.append((drawn.choice((name, f"{name}x", "")), shape, kind, offset + 256))
    elif how == 2:
        numbers = (0, 1, 2, 31, 32, 33, 256, 2**31, 2**32, 2**63, 2**64 - 1)
        shape = tuple(drawn.choice((*shape, *numbers)) for _ in range(drawn.randrange(6)))
    elif how == 3:
        kind = drawn.choice(types)
    elif how == 4:
        offset = drawn.choice((0, 1, 32, 64, offset + 32, offset + 1, 2**63, 2**64 - 32))
    else:
        name = drawn.choice(("", "blk.0.a", "n" * 64, "n" * 1025, "é"))
    tensors[index] = (name, shape, kind, offset)


def check_gguf(files: list[bytes], place: Path) -> None:
    """Read a model in one file or two, write it as one, read it again."""
    if len(files) < 2:
        folder = write(place / "single", {"m.gguf": b"".join(files)})
        paths = [folder / "m.gguf"]
    else:
        folder = write(place / "several", dict(zip(PARTS, files, strict=False)))
        paths = [folder / name for name in PARTS]
    checkpoint = gguf_models.read_gguf_checkpoint(paths)
    checkpoint.identity()
    for name, found in checkpoint.files.items():
        placed(found, (folder / name).stat().st_size)
    entries: list[Any] = []
    for key, entry in checkpoint.fields.items():
        if key not in gguf_models.SPLIT_KEYS:
            entries.append(entry if entry.value is None else entry.encoded(entry.value))
    first = next(iter(checkpoint.files.values()))
    pairs = [(one, one.name) for one in checkpoint.tensors.values()]
    target = place / "again.gguf"
    with target.open("w+b") as file:
        gguf_files.write_gguf(checkpoint.source, first, entries, pairs, file)
    second = gguf_models.read_gguf_checkpoint([target])
    described = [
        {key: repr(value) for key, value in one.values.items() if key not in gguf_models.SPLIT_KEYS}
        for one in (checkpoint, second)
    ]
    if described[0] != described[1]:
        raise InconsistentError("its metadata, written and read again, are others")
    tensors = [
        [(one.name, one.dtype, one.shape, one.size) for one in part.tensors.values()]
        for part in (checkpoint, second)
    ]
    if tensors[0] != tensors[1]:
        raise InconsistentError("its tensors, written and read again, are others")
    if len(files) < 2:
        as_the_package_reads_it(paths[0], checkpoint)


def placed(found: gguf_files.GgufFile, size: int) -> None:
    """Raise unless the tensors follow one another inside the file."""
    position = found.tensors[0].start if found.tensors else 0
    for one in found.tensors:
        if one.start < position or one.start % found.alignment or one.end > size:
            raise InconsistentError("a tensor lies where another is, or outside the file")
        position = one.end


def as_the_package_reads_it(path: Path, checkpoint: gguf_models.GgufCheckpoint) -> None:
    """Raise unless the gguf package reads the same tensors, where it reads the file."""
    from gguf import GGUFReader

    if checkpoint.source.size(path.name) > LONGEST or not checkpoint.fields:
        return
    try:
        read = GGUFReader(path)
    except IndexError:  # it cannot read scalars, which llama.cpp can
        return
    except Exception as error:  # it has no errors of its own
        reason = f"{type(error).__name__}: {general(str(error))}"
        raise InconsistentError(f"the gguf package does not read it: {reason}") from error
    theirs = {
        one.name: (one.tensor_type.name, tuple(map(int, one.shape)), one.data_offset, one.n_bytes)
        for one in read.tensors
    }
    ours = {
        one.name: (one.dtype, one.shape, one.start, one.size) for one in checkpoint.tensors.values()
    }
    if {name: (*rest[:3], int(rest[3])) for name, rest in theirs.items()} != ours:
        raise InconsistentError("the gguf package reads other tensors")


# --- plans, reports, journals -------------------------------------------------------------------

KINDS: dict[bytes, Any] = {
    b"plan": PruningPlan,
    b"curve": DepthCurve,
    b"report": PruningReport,
    b"manifest": Manifest,
    b"journal": Journal,
}
KEY = "k"


def json_seeds() -> list[list[bytes]]:
    """A file of every kind, and of every earlier format."""
    scores = {"strategy": "ablation", "unit": "x", "removes": "lowest", "scores": {"0": 0.5}}
    held_out = {"change": -0.1, "low": -0.2, "high": 0.0, "unit": "x", "items": 3}
    plan = {
        "format": "llm_pruner.plan/2",
        "model_id": "m",
        "num_layers": 4,
        "remove": [1, 3],
        "strategy": "ablation",
        "options": {"ratio": 0.5},
        "scores": {**scores, "blocks": [[0.5]]},
        "steps": [{"change": -0.1, "removed": [1]}],
        "data": {"items": 2, "fingerprint": "f", "prompts": ["p"]},
        "held_out": held_out,
        "versions": {"torch": "2"},
        "model": {"tensors": "t"},
        "healing": {"stages": []},
        "drop_mtp": False,
        "engines": {"vllm": "right"},
    }
    earlier = {
        "format": "llm_pruner.plan/1",
        "model_id": "m",
        "num_layers": 4,
        "remove": [1],
        "options": {"heal": {"loss": 1.0}},
    }
    point = {"n_layers": 1, "removed": [2], "change": -0.1, "held_out": held_out}
    curve = {
        "format": "llm_pruner.curve/1",
        "model_id": "m",
        "num_layers": 4,
        "strategy": "smart",
        "unit": "x",
        "points": [point, {**point, "n_layers": 2, "removed": [1, 2], "held_out": None}],
    }
    comparison = {"name": "perplexity", "group": "text", "unit": "", "before": 2.0, "after": 3.0}
    report = {
        "format": "llm_pruner.report/2",
        "plan": plan,
        "output_dir": "o",
        "comparisons": [{**comparison, "count": 3, "low": 0.1, "high": 0.2, "floor": None}],
        "samples": [{"prompt": "p", "reference": "r", "before": "b", "after": "a"}],
        "seconds": 1.5,
    }
    file = {"from": ["a"], "tensors": 1, "layout": "l"}
    manifest = {
        "format": "llm_pruner.manifest/2",
        "source": "s",
        "revision": None,
        "num_layers": 4,
        "remove": [1],
        "prefixes": ["model.layers."],
        "bytes_before": 8,
        "bytes_after": 4,
        "tensors": 1,
        "files": {SINGLE_FILE: file},
        "from_memory": ["x"],
        "sha256": {"x": "0"},
    }
    tensor = {"from": "l.1.w", "from_file": "a", "file": "b", "dtype": "F32", "shape": [1]}
    before = {
        name: manifest[name]
        for name in "source revision num_layers remove bytes_before bytes_after".split()
    }
    before |= {"format": "llm_pruner.manifest/1", "tensors": {"l.0.w": {**tensor, "sha256": "0"}}}
    line = {"key": KEY, "removed": [0, 2], "chunk": 1, "values": [[0.5, 1.5], [2.0]]}
    lines = json.dumps([line, {**line, "removed": []}])
    documents = {b"curve": curve, b"report": report}
    return [
        [b"plan", json.dumps(plan).encode()],
        [b"plan", json.dumps(earlier).encode()],
        [b"manifest", json.dumps(manifest).encode()],
        [b"manifest", json.dumps(before).encode()],
        *([kind, json.dumps(document).encode()] for kind, document in documents.items()),
        [b"journal", b"\n".join(map(str.encode, map(json.dumps, json.loads(lines))))],
    ]


def change_json(files: list[bytes], drawn: random.Random) -> list[bytes]:
    """Change a document; in a journal, one line."""
    kind, text = files
    lines = text.split(b"\n") if kind == b"journal" else [text]
    number = drawn.randrange(len(lines))
    encoding = "utf-16" if drawn.random() < 0.02 else "utf-8"
    lines[number] = written(changed_json(parsed(lines[number]), drawn)).encode(encoding)
    return [kind, b"\n".join(lines)]


def check_json(files: list[bytes], place: Path) -> None:
    """Read a file, write what was read, and read that."""
    name, text = (*files, b"", b"")[:2]
    kind = KINDS.get(name) or [*KINDS.values()][sum(name) % len(KINDS)]
    path = write(place / "json", {"file": text}) / "file"
    if kind is Journal:
        check_journal(path)
        return
    value = kind.load(path)
    text_again = value.to_json()
    again = kind.from_json(text_again)
    if again != value:
        raise InconsistentError(f"{kind.__name__}, written and read again, is another")
    if again.to_json() != text_again:
        raise InconsistentError(f"{kind.__name__} is written in two ways")
    path.write_text(text_again, encoding="utf-8")


def check_journal(path: Path) -> None:
    """Read a journal; its entries have the types they should have, and survive being written."""
    journal = Journal(path)
    entries = journal.read(KEY)
    for removed, chunk, values in entries:
        if any(type(one) is not int for one in (*removed, chunk)):
            raise InconsistentError("a journal's layers or chunk are no whole numbers")
        if any(not math.isfinite(one) for part in values for one in part):
            raise InconsistentError("a journal's values are not finite")
    path.unlink()
    for entry in entries:
        journal.append(KEY, *entry)
    if journal.read(KEY) != entries:
        raise InconsistentError("a journal, written and read again, is another")


TARGETS = {
    "safetensors": Target(safetensors_seeds, check_safetensors, change_safetensors),
    "gguf": Target(gguf_seeds, check_gguf, change_gguf),
    "json": Target(json_seeds, check_json, change_json),
}


if __name__ == "__main__":
    main()
