"""What faults leave of a run of two processes: one of them is killed, stopped, or fails.

    python benchmarks/process_faults.py                                  # 18 cases, half an hour
    python benchmarks/process_faults.py --stages search --faults killed

torchrun starts two processes of the command (gloo, on the CPU, one thread each, the demo model),
and a third of the way through a stage something happens to one of them. Linux only. Stages:

    scoring    `ablation` measures every layer alone
    search     `smart` looks for a set of layers
    healing    adapters are trained (`--heal lora`) on given layers

and faults:

    killed     the process gets SIGKILL
    stopped    it gets SIGSTOP, and does not answer any more
    failing    it raises an error of llm_pruner (NonFiniteError) in the middle of the work
    broken     it raises another error, as of a mistake in a plug-in; only where --faults asks

Prints a Markdown table. Ends: seconds from the fault to the end of all processes, the launcher
included. The other process has to notice after `--timeout` (20 s) at the latest, and torchrun kills
what does not end by itself after another 30 s, as a stopped process. Exit: status of the launcher.
Said: the errors of the processes. Left: what is beside the output that is not there, without its
name. Resumed: exit status and seconds of the same command with --resume (and more patience: the
first process measures speed alone, which takes long on a busy machine), and whether it chose the
same layers, and wrote the same tensors to the last bit, as a run without a fault. Ends with exit
status 1 if a case is wrong: it lasts too long, leaves an output or a file that no run would remove,
prints a traceback of a process, or nothing at all, or is not resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = ("killed", "stopped", "failing", "broken")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
TIMEOUT = 20  # seconds that one process waits for another
GRACE = 30  # seconds that torchrun gives a process to end
MARGIN = 15  # seconds for everything else
PATIENCE = 600  # and in a run without a fault
LIMIT = 600  # seconds that a run may take
MARK = "PROCESS_FAULTS"  # environment variable that all processes of a case inherit
BREAK = "PROCESS_FAULTS_BREAK"  # and the one that says where to raise: fault, rank, measurement
PLANTED = "planted by the benchmark"
STEPS = 40  # of the training
OUT = "out"
KEPT = re.compile(
    r"out\.(journal\.jsonl|healing|partial_plan\.json)|\.out\.(lock|partial-[a-z0-9_]{8})"
)
STAGES: dict[str, list[str]] = {
    "scoring": ["--strategy", "ablation", "--n-layers", "3", "--n-samples", "200"],
    "search": ["--strategy", "smart", "--n-layers", "4", "--n-samples", "160"],
    "healing": ["--layers", "3,5", "--heal", "lora", "--n-samples", "40"],
}
failures: list[str] = []


class Whole(NamedTuple):
    """A run without a fault."""

    layers: list[int]
    tensors: str  # a checksum
    files: list[str]  # that it left
    progress: int  # how far the stage came: measurements, or the last training checkpoint


class Run:
    """A command in two processes, from its start on."""

    def __init__(
        self, stage: str, place: Path, *more: str, timeout: int = PATIENCE, broken: str = ""
    ) -> None:
        self.place, self.stage = place, stage
        self.log = Path(tempfile.mkdtemp(prefix="log-", dir=place.parent))
        self.mark = f"{MARK}={self.log}"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc_per_node", "2", "--redirects", "3", "--log-dir", str(self.log)]
        words += [__file__, "--worker"] if broken else ["-m", "llm_pruner.cli"]
        words += ["--model", "demo", "--device", "cpu", "--timeout", str(timeout)]
        words += ["--output", OUT, *STAGES[stage], *more]
        if stage == "healing":
            words += ["--heal-data", str(place.parent / "texts.jsonl"), "--heal-steps", str(STEPS)]
        environment = {**os.environ, MARK: str(self.log), BREAK: broken, "OMP_NUM_THREADS": "1"}
        with (self.log / "launcher").open("w") as file:
            self.launcher = subprocess.Popen(
                words, cwd=place, env=environment, stdout=file, stderr=file
            )

    def progress(self) -> int:
        """How far the stage has come."""
        if self.stage == "healing":
            names = [path.name for path in self.place.glob(f"{OUT}.healing/checkpoint-*")]
            return max((int(name.split("-")[1]) for name in names), default=0)
        journal = self.place / f"{OUT}.journal.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def wait_for(self, reached: Callable[[], bool], seconds: float = LIMIT) -> bool:
        """Wait until something is so; False if the run has ended, or takes too long."""
        end = time.monotonic() + seconds
        while not reached():
            if self.launcher.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def processes(self) -> dict[int, int]:
        """Rank by process id of all that run; -1 for those that have none."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if self.mark in variables and state not in "ZX":
                    ranks = [one[5:] for one in variables if one.startswith("RANK=")]
                    found[int(path.name)] = int(ranks[0]) if ranks else -1
        return found

    def end(self, seconds: float) -> float | None:
        """Seconds until no process is left; None if some had to be killed."""
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            if self.launcher.poll() is not None and not self.processes():
                return time.monotonic() - begin
            time.sleep(0.1)
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.launcher.wait()
        return None

    def said(self, rank: int) -> str:
        """What a process wrote to stderr."""
        paths = list(self.log.glob(f"*/*/{rank}/stderr.log"))
        return paths[0].read_text(errors="replace") if paths else ""


def main() -> None:
    """Do every fault, print, judge."""
    if "--worker" in sys.argv:
        sys.exit(worker(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS[:3])
    parser.add_argument("--ranks", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    args = parser.parse_args()
    print("| stage | fault | rank | ends after | exit | said | left | resumed | layers | tensors |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few_texts(folder / "texts.jsonl")
        for stage in args.stages:
            whole = unbroken(stage, folder)
            for fault in args.faults:
                for rank in args.ranks:
                    case(stage, fault, rank, folder, whole)
    for failure in failures:
        print(f"\nWRONG: {failure}")
    raise SystemExit(bool(failures))


def few_texts(path: Path) -> None:
    """The first texts that the demo is healed with."""
    import llm_pruner

    whole = Path(llm_pruner.__file__).parent / "data" / "demo" / "healing.jsonl"
    path.write_text("".join(whole.read_text().splitlines(keepends=True)[:240]))


def unbroken(stage: str, folder: Path) -> Whole:
    """Run without a fault."""
    place = folder / f"{stage}-whole"
    place.mkdir()
    run, progress = Run(stage, place), 0
    while run.launcher.poll() is None:
        progress = max(progress, run.progress())
        time.sleep(0.05)
    if run.launcher.returncode:
        sys.exit(f"The run without a fault failed:\n{run.said(0)}{run.said(1)}")
    return Whole(chosen(place), checksum(place), sorted(os.listdir(place)), progress)


def case(stage: str, fault: str, rank: int, folder: Path, whole: Whole) -> None:
    """One fault: its row of the table, and what is wrong with it."""
    name = f"{stage}, {fault}, rank {rank}"
    place = folder / f"{stage}-{fault}-{rank}"
    place.mkdir()
    run, took = broken_run(stage, fault, rank, place, whole.progress // 3)
    found = [run.said(number) for number in (0, 1)]
    left = sorted(os.listdir(place))
    demand(took is not None, f"{name}: processes were left")
    allowed = TIMEOUT + MARGIN + (GRACE if fault == "stopped" else 0)
    demand(took is None or took < allowed, f"{name}: it took {took} s, of {allowed}")
    demand(run.launcher.returncode != 0, f"{name}: the exit status is 0")
    strange = [file for file in left if not KEPT.fullmatch(file)]
    demand(not strange, f"{name}: it left {strange}")
    errors = [line for text in found for line in text.splitlines() if line.startswith("error: ")]
    demand(bool(errors) or fault == "broken", f"{name}: no error is reported")
    for number, text in enumerate(found):
        own = fault == "broken" and number == rank  # a mistake shows where it is
        demand(own or "Traceback" not in text, f"{name}: rank {number} printed {text[-3000:]}")
    if fault == "failing":
        demand(any(PLANTED in line for line in errors), f"{name}: it said {errors}")

    begin = time.monotonic()
    again = Run(stage, place, "--resume")
    demand(again.end(LIMIT) is not None, f"{name}: the resumed run did not end")
    seconds, status = time.monotonic() - begin, again.launcher.returncode
    cells = [stage, fault, str(rank), "never" if took is None else f"{took:.1f} s"]
    cells += [str(run.launcher.returncode), "<br>".join(map(shortened, errors))]
    cells += [", ".join(file.replace(OUT, "") for file in left), f"{status} in {seconds:.0f} s"]
    if status == 0:
        same = chosen(place) == whole.layers, checksum(place) == whole.tensors
        cells += ["same" if one else "OTHERS" for one in same]
        demand(same[0], f"{name}: resumed, it chose {chosen(place)}, not {whole.layers}")
        after = sorted(set(os.listdir(place)) - {f"{OUT}.partial_plan.json"})
        demand(after == whole.files, f"{name}: after the resumed run there are {after}")
    else:
        cells += ["", ""]
        demand(False, f"{name}: resumed, it said {again.said(0)[-2000:]}{again.said(1)[-2000:]}")
    print(f"| {' | '.join(cells)} |", flush=True)
    shutil.rmtree(place)


def broken_run(
    stage: str, fault: str, rank: int, place: Path, moment: int
) -> tuple[Run, float | None]:
    """A run to which something happens; seconds until everything has ended."""
    longest = TIMEOUT + GRACE + 2 * MARGIN
    if fault in SIGNALS:
        run = Run(stage, place, timeout=TIMEOUT)
        if not run.wait_for(lambda: run.progress() >= moment):
            sys.exit(f"The run ended before its fault:\n{run.said(0)}{run.said(1)}")
        (process,) = [one for one, its_rank in run.processes().items() if its_rank == rank]
        os.kill(process, SIGNALS[fault])
    else:  # of a rank's own measurements, or steps, which both ranks divide
        number = STEPS // 3 if stage == "healing" else moment // 2
        run = Run(stage, place, timeout=TIMEOUT, broken=f"{fault} {rank} {number}")
        raised = Path(f"{run.log}/raised")
        if not run.wait_for(raised.exists):
            sys.exit(f"The run ended before its fault:\n{run.said(0)}{run.said(1)}")
    return run, run.end(longest)


def worker(words: Sequence[str]) -> int:
    """The command, which raises an error in one process at its n-th measurement or step."""
    from llm_pruner import cli, distributed
    from llm_pruner.errors import NonFiniteError
    from llm_pruner.healing import lora
    from llm_pruner.search.journal import Journal

    fault, rank, left = os.environ[BREAK].split()
    calls = 0

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if distributed.rank() == int(rank) and calls > int(left):
                Path(os.environ[MARK], "raised").touch()
                raise (NonFiniteError if fault == "failing" else ZeroDivisionError)(PLANTED)
            return call(*args, **kwargs)

        return counted

    lora.DistillationTrainer.compute_loss = counting(  # type: ignore[method-assign]
        lora.DistillationTrainer.compute_loss
    )
    Journal.append = counting(Journal.append)  # type: ignore[method-assign]
    return cli.main(words)


def chosen(place: Path) -> list[int]:
    """The layers that were removed."""
    plan: dict[str, Any] = json.loads((place / OUT / "pruning_plan.json").read_text())
    return list(plan["remove"])


def checksum(place: Path) -> str:
    """Of the tensors."""
    return hashlib.sha256((place / OUT / "model.safetensors").read_bytes()).hexdigest()


def shortened(line: str) -> str:
    """An error's first words."""
    text = line.removeprefix("error: ").replace("|", "/")
    return text if len(text) <= 90 else f"{text[:90]}…"


def demand(right: bool, fault: str) -> None:
    """Remember what went wrong."""
    if not right:
        failures.append(fault)


if __name__ == "__main__":
    main()
