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
import logging
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from fuzz_files import (
    LONGEST,
    MEMORY_DISK,
    InconsistentError,
    StricterError,
    Target,
    divided,
    joined,
)

try:
    import atheris
except ImportError:
    sys.exit("This needs atheris: pip install atheris")

CHILD = "--child"
with atheris.instrument_imports(["llm_pruner"]) if CHILD in sys.argv else nullcontext():
    import fuzz_json
    import fuzz_tensors

    from llm_pruner.errors import LLMPrunerError
    from llm_pruner.storage import gguf_files

PACKAGE = Path(gguf_files.__file__).parents[1]
SECONDS = 5  # of the processor, that a case may take
BACKSTOP = 60  # seconds after which libFuzzer ends the process, where no signal helps
MEMORY = 512 * 2**20  # that a case may take
STRICTER = "Stricter"  # than the format's own library: listed, and no failure


class TooLong(BaseException):
    """A case takes too long; nothing in between catches it."""


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


TARGETS = {
    "safetensors": fuzz_tensors.SAFETENSORS,
    "gguf": fuzz_tensors.GGUF,
    "json": fuzz_json.JSON,
}


if __name__ == "__main__":
    main()
