"""Thousands of hostile cases: what the command makes of them, in a table by area.

    python benchmarks/faults.py --cases 3000                  # 15 minutes on two idle cores
    python benchmarks/faults.py --area plans --cases 200      # one area alone
    python benchmarks/faults.py --only weights:17 --show      # one case again, with all it said

Every case runs ``llm-pruner`` in a folder of its own that is listed (names, sizes, checksums)
before and after. Case ``area:i`` is drawn from the area, ``i`` and ``--seed`` alone. The models are
tiny random Llamas. Prints a Markdown table, and below it every kind of bad case with its smallest
description; ends with exit status 1 if a column in capitals is not empty. A case counts in one:

    right                it ended with 0, and the output is the source, as stock transformers reads
                         it, without just these layers, or the plan is that of a clean run
    refused              a documented exit status, a message that begins with "error:", no output
    garbage-in accepted  it ended with 0 on what stock transformers cannot load, or on a plan, a
                         journal or data that nobody should take
    SILENT WRONG         it ended with 0, and the result is another; or a sound case was refused
    TRACEBACK            a traceback, an exit status that is not documented, no message
    HANG                 it did not end within the limit of time
    LOST OR STRAY        something that was there is gone or changed, or something is left that
                         is neither the output nor documented
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HOME"] = os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="faults-home-")

import fault_cards
import fault_data
import fault_judges
import fault_models
import fault_plans
import fault_rooms
import fault_steps
import fault_trees
import fault_words
import torch
from fault_rooms import BAD, COLUMNS, DOCUMENTED, Base, Case, Ended
from transformers.utils import logging as transformers_logging

AREAS = {
    name: area
    for module in (
        fault_words,
        fault_models,
        fault_plans,
        fault_data,
        fault_cards,
        fault_trees,
        fault_steps,
    )
    for name, area in module.AREAS.items()
}
WRONG_WORDS = re.compile(
    r"Traceback \(most recent|Exception ignored|Fatal Python error|Error in sys\.|"
    r"(?i:\bthis is a bug\b|\bunexpected error\b|\binternal error\b|This is a fault of llm_pruner)"
)


def main() -> None:
    """Run the cases, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000, metavar="N", help="in all (3000)")
    parser.add_argument("--area", nargs="+", choices=sorted(AREAS), default=list(AREAS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (2)")
    parser.add_argument("--limit", type=float, default=60, metavar="S", help="seconds a case (60)")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these cases, such as plans:3")
    parser.add_argument("--show", action="store_true", help="what every bad case said")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    fault_rooms.preload()
    gc.collect()
    gc.freeze()  # forks then share what is loaded
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        (folder / "base").mkdir()
        base = fault_rooms.build(folder / "base", args.limit)
        fault_judges.OLD_OUTPUT |= {
            str(path.relative_to(base.folder / "o")) for path in (base.folder / "o").rglob("*")
        }
        results = run_all(identifiers(args), base, folder, args)
    finally:
        clear(folder)
        clear(Path(os.environ["HF_HOME"]))
    report(results, args)
    raise SystemExit(any(result["column"] in BAD for result in results))


def identifiers(args: argparse.Namespace) -> list[tuple[str, int]]:
    """The cases asked for, the areas in turn, by the share that each has."""
    if args.only:
        return [(area, int(number)) for area, number in (one.split(":") for one in args.only)]
    total = sum(AREAS[area].share for area in args.area)
    found = []
    for area in args.area:
        count = max(1, round(args.cases * AREAS[area].share / total))
        found += [(area, number) for number in range(count)]
    return found


def run_all(
    wanted: list[tuple[str, int]], base: Base, folder: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every case in a fork of its own, some at a time; this process only waits."""
    results: list[dict[str, Any]] = []
    running: dict[int, tuple[int, Path]] = {}
    pending = list(reversed(wanted))
    started = time.monotonic()
    while pending or running:
        while pending and len(running) < args.jobs:
            area, number = pending.pop()
            place = folder / f"{area}-{number}"
            pid = os.fork()
            if pid == 0:
                _one(area, number, base, place, args)
            running[os.pidfd_open(pid)] = pid, place
        try:
            done = select.select(list(running), [], [])[0]
        except KeyboardInterrupt:  # what is known by then is still reported
            print("interrupted", file=sys.stderr)
            break
        for descriptor in done:
            pid, place = running.pop(descriptor)
            os.close(descriptor)
            os.waitpid(pid, 0)
            told = place.with_suffix(".json")
            results.append(json.loads(told.read_text()))
            clear(place)
            if len(results) % 100 == 0:
                seconds = time.monotonic() - started
                print(f"{len(results)} cases, {seconds:.0f} s", file=sys.stderr, flush=True)
    return sorted(results, key=lambda one: (list(AREAS).index(one["area"]), one["number"]))


def clear(folder: Path) -> None:
    """Remove a folder, however deep it is."""
    subprocess.run(["rm", "-rf", "--", str(folder)], check=False, stderr=subprocess.DEVNULL)


def _one(area: str, number: int, base: Base, place: Path, args: argparse.Namespace) -> None:
    """One case in this fork, which ends here: its result goes into a file beside its place."""
    result: dict[str, Any] = {"area": area, "number": number}
    try:
        (place / "room").mkdir(parents=True)
        (place / "home").mkdir()
        (place / "tmp").mkdir()
        (place / "home" / "letter.txt").write_text("mine")
        drawn = random.Random(f"{area}:{number}:{args.seed}")
        os.chdir(place / "room")
        case = AREAS[area].draw(drawn, number, place / "room", base)
        before = fault_judges.listing(place)
        started = time.monotonic()
        ended = (case.run or fault_rooms.run_command)(case, place, args.limit)
        seconds = time.monotonic() - started
        column, complaint = judged(case, place, before, ended, base)
        result |= {
            "column": column,
            "complaint": complaint,
            "kind": case.kind,
            "what": case.what,
            "words": " ".join(case.words)[:300],
            "code": ended.code,
            "out": ended.out[-6000:],
            "err": ended.err[-6000:],
            "seconds": seconds,
        }
    except BaseException as error:
        import traceback

        trace = traceback.format_exc()
        result |= {"column": "SILENT WRONG", "complaint": f"the harness failed: {error!r}"}
        result |= {"kind": "harness", "what": trace[-1500:], "words": "", "code": None}
        result |= {"out": "", "err": trace, "seconds": 0}
    place.with_suffix(".json").write_text(json.dumps(result))
    os._exit(0)


def judged(
    case: Case, place: Path, before: fault_judges.Listing, ended: Ended, base: Base
) -> tuple[str, str]:
    """The column that a case counts in, and why."""
    if ended.code is None:
        return "HANG", "not done at the limit of time"
    if found := WRONG_WORDS.search(ended.err + ended.out):
        return "TRACEBACK", signature(ended.err + ended.out) or found[0]
    if case.said:
        return case.said[0]
    stray = fault_judges.strayed(case, place, before, fault_judges.listing(place), ended)
    if ended.code != 0:
        if ended.code not in DOCUMENTED:
            return "TRACEBACK", f"exit status {ended.code}"
        if not re.search(r"^error: .", ended.err, re.MULTILINE):
            return "TRACEBACK", f"exit status {ended.code} without a message"
        if stray:
            return "LOST OR STRAY", stray
        if case.must:
            return "SILENT WRONG", f"a sound case was refused: {ended.err[-300:]}"
        return "refused", ""
    column, complaint = worth(case, place, ended, base)
    if column == "SILENT WRONG" or not stray:
        return column, complaint
    return "LOST OR STRAY", stray


def worth(case: Case, place: Path, ended: Ended, base: Base) -> tuple[str, str]:
    """What a run is worth that ended with 0."""
    room, wrong = place / "room", None
    if case.removed is not None:
        out = place / fault_judges.resolved(case.output, place)
        nested = [path for path in out.rglob("pruning_plan.json") if path.parent != out]
        if not (out / "pruning_plan.json").is_file():
            return "SILENT WRONG", "no output where it was asked for"
        if nested:
            return "SILENT WRONG", f"an earlier output is nested in it: {nested[0].parent.name}"
        if case.intact:
            wrong = fault_judges.compare_bytes(base.folder / "m", out, case.removed)
        else:
            source, removed = place / fault_judges.resolved(case.source, place), case.removed
            job = fault_rooms.muted(lambda: fault_judges.compare_models(source, out, removed))
            told = fault_rooms.forked(job, place, base.limit, "judge-")
            said = json.loads(told.out) if told.code == 0 else {"source": "does not load at all"}
            if said["source"] is not None:
                return _unloadable(said, place, case, out)
            wrong = said["output"]
    if wrong is None and case.twin is not None:
        column, wrong = against_twin(case, place, ended, base)
        if column != "right":
            return column, str(wrong)
    if wrong is None and case.check is not None:
        wrong = case.check(room, ended)
    if wrong is not None:
        return "SILENT WRONG", wrong
    return ("garbage-in accepted", case.what) if case.garbage else ("right", "")


def _unloadable(said: dict[str, Any], place: Path, case: Case, out: Path) -> tuple[str, str]:
    """A source that stock transformers cannot load was pruned: is the output sound at least?"""
    if said.get("output", "") is None and case.removed is not None:
        source = place / "room" / case.source
        if fault_judges.compare_bytes(source, out, case.removed) is None:
            return "right", ""
    return "garbage-in accepted", f"stock transformers: {said['source']}"


def against_twin(case: Case, place: Path, ended: Ended, base: Base) -> tuple[str, str | None]:
    """Compare the plan with that of the same case in a form beyond doubt."""
    twin = place / "twin"
    (twin / "room").mkdir(parents=True)
    assert case.twin is not None
    words: list[str] | None = None

    def prepare() -> list[str] | None:
        assert case.twin is not None
        return case.twin(place / "room", twin / "room")

    made = fault_rooms.forked(fault_rooms.muted(prepare), place, base.limit, "twin-")
    if made.code != 0:
        return "garbage-in accepted", signature(made.err) or made.err[-200:]
    words = json.loads(made.out)
    clean = fault_rooms.forked(fault_rooms.command(words or case.words), twin, base.limit)
    if clean.code != 0:
        return "SILENT WRONG", f"the clean run fails: {clean.err[-200:]}"
    try:
        wrong = fault_judges.differing(
            fault_judges.plan_of(ended.out), fault_judges.plan_of(clean.out)
        )
    except ValueError:
        wrong = "no plan was printed"
    return ("SILENT WRONG" if wrong else "right"), wrong


def signature(text: str) -> str:
    """The last error of a traceback, and the innermost line of llm_pruner in it."""
    frames = re.findall(r'File "[^"]*(llm_pruner/[^"]+)", line (\d+), in (\S+)', text)
    where = f" at {frames[-1][0]} in {frames[-1][2]}" if frames else ""
    errors = re.findall(r"^([\w.]*(?:Error|Exception|Interrupt|Timeout)\b[^\n]*)", text, re.M)
    return f"{errors[-1][:160]}{where}" if errors else ""


def cause_of(one: dict[str, Any]) -> str:
    """The complaint on one line, without what differs from case to case."""
    folder = re.escape(tempfile.gettempdir())
    line = " ".join(re.sub(rf"{folder}/\S+", "...", one["complaint"]).split())
    return "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in line)


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The table, and the bad cases by kind."""
    print(f"| area | cases | {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) + 1)}")
    areas = [area for area in AREAS if any(one["area"] == area for one in results)]
    for area in [*areas, "all"]:
        counts = Counter(one["column"] for one in results if area in ("all", one["area"]))
        row = " | ".join(str(counts[column]) for column in COLUMNS)
        print(f"| {area} | {counts.total()} | {row} |")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for one in results:
        if one["column"] in (*BAD, "garbage-in accepted"):
            told = cause_of(one)
            if one["column"] == "TRACEBACK":
                cause = re.sub(r"^([\w.]+)(?::.*?)?( at llm_pruner\S+ in \S+)?$", r"\1\2", told)
            else:
                cause = f"{one['kind']}: {re.sub(r'[^ ]*[/[0-9][^ ]*', '*', told)[:60]}"
            groups[one["column"], one["area"], cause].append(one)
    order = [*BAD, "garbage-in accepted"]
    for (column, area, cause), found in sorted(
        groups.items(), key=lambda pair: (order.index(pair[0][0]), -len(pair[1]))
    ):
        smallest = min(found, key=lambda one: len(one["what"]))
        names = " ".join(f"{one['area']}:{one['number']}" for one in found[:6])
        print(f"\n{column}, {area}, {len(found)} x {cause}: {smallest['what']!r:.300}")
        print(f"    {cause_of(smallest):.300}\n    llm-pruner {smallest['words']!r:.300}")
        print(f"    --only {names}{' ...' if len(found) > 6 else ''}")
    for one in results if args.show else ():
        if args.only or one["column"] in BAD:
            print(f"\n=== {one['area']}:{one['number']} {one['column']} exit {one['code']}")
            print(f"{one['what']!r:.600}\n{one['complaint']}\nllm-pruner {one['words']!r}")
            print(f"--- stdout\n{one['out']}\n--- stderr\n{one['err']}")


if __name__ == "__main__":
    main()
