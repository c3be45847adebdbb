"""Two real processes give what one gives; when one of them stops, the other reports it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import worker
from conftest import WORDS, items, tiny_llama, word_tokenizer

from llm_pruner import AblationPruner, SmartPruner, cli, distributed, get_device, load_model
from llm_pruner.errors import InvalidPlanError, LoadError, NonFiniteError, ProcessGroupError
from llm_pruner.search.journal import Journal

HERE = Path(__file__).parent


class Done(NamedTuple):
    """What a run of two processes left: exit code, and for each process its output and file."""

    code: int
    out: list[str]
    err: list[str]
    found: list[Any]
    seconds: float


@pytest.fixture
def two(tmp_path):
    """Run a task of worker.py in two processes, each with a log of its own."""

    def run(task: str, *words: str, limit: float = 100) -> Done:
        folder = tmp_path / f"{task}.found"
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "2", "--redirects", "3", "--log-dir", str(folder / "log")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
        start = time.monotonic()
        done = subprocess.run(
            [*command, str(HERE / "worker.py"), task, str(folder), *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
        seconds = time.monotonic() - start
        logs = [
            [next(folder.glob(f"log/*/*/{rank}/{stream}.log")).read_text() for rank in (0, 1)]
            for stream in ("stdout", "stderr")
        ]
        files = [folder / f"{rank}.json" for rank in (0, 1)]
        found = [json.loads(path.read_text()) if path.exists() else None for path in files]
        return Done(done.returncode, *logs, found, seconds)

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model on disk, and texts."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(WORDS[i * step % len(WORDS)] for i in range(12)) for step in range(1, 17)]
    more = [" ".join(WORDS[i % 17 : i % 17 + 2] * (2 + i // 17)) for i in range(17 * 8)]
    rows = [{"text": text} for text in (*texts, *more)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def words(saved: Path, *more: str) -> list[str]:
    base = ["--model", str(saved / "model"), "--device", "cpu", "--n-samples", "24"]
    base += ["--eval-dataset", str(saved / "texts.jsonl"), "--batch-size", "4"]
    return [*base, *map(str, more)]


def readings(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines() if line]


SEARCH = ["--strategy", "smart", "--n-layers", "3", "--output", "out"]


def numbers(scores: dict[str, list[str]]) -> dict[str, list[float]]:
    return {key: [float.fromhex(value) for value in values] for key, values in scores.items()}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(two, tmp_path):
    done = two("library")
    assert done.code == 0, done.err
    first, second = done.found
    one = worker.found()
    assert first["scores"] == second["scores"]  # to the last bit
    for key, values in numbers(one["scores"]).items():
        assert numbers(first["scores"])[key] == pytest.approx(values, rel=1e-9), key
    assert first["plan"] == second["plan"]
    assert first["plan"] == one["plan"]
    for key, measured in one["measured"].items():
        counts = first["measured"][key], second["measured"][key]
        assert sum(counts) == measured, key
        assert min(counts) > 0, key
    assert first["search"] + second["search"] == one["search"]
    lines = readings(tmp_path / "library.found" / "journal.jsonl")
    assert len(lines) > one["search"]  # the held-out measurements too
    known = [(line["key"], tuple(line["removed"]), line["chunk"]) for line in lines]
    assert len(set(known)) == len(known)  # nothing was measured twice
    assert first["alone"] == second["alone"] == ["0", ["x"], [0, 1, 2]]
    expected = "InvalidPlanError: only the first knows"
    for found in (first, second):
        assert "measure different sets of layers" in found["errors"].pop()
    assert first["errors"] == [expected, "ZeroDivisionError: a fault"]
    assert second["errors"] == [expected, "ProcessGroupError: Rank 0: ZeroDivisionError: a fault"]
    assert (first["portion"], second["portion"]) == ([0], [1, 2, 3, 4, 5])
    assert first["after"] == second["after"] == [0, 1]


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what is another in every run."""
    rows = [row for row in report["comparisons"] if row["group"] != "speed"]
    assert len(report["comparisons"]) == len(rows) + 5
    for healing in (report["heal"], report["plan"]["healing"]):
        for stage in healing["stages"]:
            del stage["seconds"]
    changing = ("seconds", "output_dir", "command", "checksum")
    report["plan"].pop("checksum", None)
    rest = {name: value for name, value in report.items() if name not in changing}
    return {**rest, "comparisons": rows}


@pytest.mark.slow
def test_the_whole_command_does_what_one_process_does(two, saved, tmp_path, monkeypatch, capsys):
    more = ["--heal", "linear", "--visualize", "--export-yaml"]
    done = two("command", *words(saved, *SEARCH, *more, tmp_path / "two.yaml"))
    assert done.code == 0, done.err
    monkeypatch.chdir(tmp_path)
    assert cli.main(words(saved, *SEARCH[:-1], "alone", *more, "alone.yaml")) == 0
    capsys.readouterr()
    first, second = done.found
    assert first["model"] == second["model"]
    assert comparable(first["report"]) == comparable(second["report"])
    out, alone = tmp_path / "out", tmp_path / "alone"
    reports = [json.loads((place / "pruning_report.json").read_text()) for place in (out, alone)]
    assert comparable(reports[0]) == comparable(reports[1])
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == sorted(
        p.relative_to(alone) for p in alone.rglob("*")
    )
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    assert (tmp_path / "two.yaml").read_text() == (tmp_path / "alone.yaml").read_text()
    assert "Removed 3 of 8 layers" in done.out[0]
    assert done.out[1] == ""
    assert "Cut 3 of 3" in done.err[0]
    assert done.err[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "limit"),
    [("lora", []), ("full", ["--heal-time", "1h"])],  # by the clock of the first process
)
def test_what_is_trained_is_the_same_in_all_processes(two, saved, tmp_path, method, limit):
    training = ["--layers", "3,5", "--heal", method, "--heal-steps", "40", "--output", "out"]
    done = two("command", *words(saved, *training, *limit))
    assert done.code == 0, done.err
    first, second = done.found
    assert first["model"] == second["model"]
    stages = first["report"]["heal"]["stages"]
    assert [stage["method"] for stage in stages] == ["linear", method]
    assert stages[1]["kept"]
    assert stages[1]["loss"] < stages[0]["loss"]
    assert stages[1]["steps"] == 40
    assert (tmp_path / "out" / "pruning_report.json").exists()
    assert not (tmp_path / "out.healing").exists()


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_its_work_is_kept(
    two, saved, tmp_path, monkeypatch, capsys
):
    done = two("killed", *words(saved, *SEARCH))
    assert done.code != 0
    assert "another process has ended" in done.err[0].lower()
    assert "--resume" in done.err[0]
    assert "Traceback" not in done.err[0]
    assert {path.name for path in tmp_path.iterdir()} - {"killed.found"} <= {
        "out.journal.jsonl",
        "out.partial_plan.json",
    }
    kept = len(readings(tmp_path / "out.journal.jsonl"))
    assert kept > 25
    monkeypatch.chdir(tmp_path)
    appended = []
    append = Journal.append

    def counting(*args: Any) -> None:
        appended.append(args)
        append(*args)

    monkeypatch.setattr(Journal, "append", counting)
    assert cli.main(words(saved, *SEARCH, "--resume")) == 0
    resumed = json.loads((tmp_path / "out" / "pruning_plan.json").read_text())
    rest = len(appended)
    appended.clear()
    assert cli.main(words(saved, *SEARCH[:-1], "alone")) == 0
    alone = json.loads((tmp_path / "alone" / "pruning_plan.json").read_text())
    assert resumed == alone
    assert rest == len(appended) - kept  # nothing was measured again
    capsys.readouterr()


@pytest.mark.slow
def test_a_hung_process_is_waited_for_until_the_timeout(two, saved, tmp_path):
    done = two("hung", *words(saved, *SEARCH, "--timeout", "4"))
    assert done.code != 0
    assert "error: Another process has ended, or does not answer within 4 seconds" in done.err[0]
    assert done.err[1].startswith("error: rank 1: stopped by the launcher: another process has")
    assert done.found[0]["code"] == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_output_that_the_first_cannot_write_ends_all(two, saved, tmp_path):
    done = two("full", *words(saved, "--layers", "3", "--output", "out"))
    assert done.code != 0
    assert "error: Writing 'out' failed: [Errno 28] No space left" in done.err[0]
    assert done.err[1] == ""  # one error, reported once
    assert [found["code"] for found in done.found if found] == [4] * sum(map(bool, done.found))
    assert {path.name for path in tmp_path.iterdir()} == {"full.found"}


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with distributed.group():
        assert distributed.gather(3) == [3]
        assert distributed.on_first(lambda: 4) == 4
        assert distributed.portion([1.0, 2.0]) == range(2)
    assert (distributed.launched(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
    assert not distributed.reported_by_first("an error")


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout):
    message = "must be a number of seconds above 0"
    with pytest.raises(InvalidPlanError, match=message), distributed.group(timeout):
        pass


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/src/gloo/pair.cc:1] Connection closed by peer. And so on"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("another thing"), False),
        (NonFiniteError("a loss"), False),
    ],
    ids=str,
)
def test_a_lost_process_is_our_own_error(monkeypatch, error, is_lost):
    monkeypatch.setattr(distributed, "_group", distributed._Group(None, 7.0))
    message = "Another process has ended, or does not answer within 7 seconds"
    kind, text = (ProcessGroupError, message) if is_lost else (type(error), str(error))
    with pytest.raises(kind, match=text) as raised, distributed.lost_process_errors():
        raise error
    assert is_lost == ("--resume" in str(raised.value))


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), NonFiniteError("mine")], ids=repr)
def test_an_error_of_the_first_process_is_told_though_the_others_have_ended(monkeypatch, error):
    def lost(value):
        raise ProcessGroupError("the others have ended")

    def fail():
        raise error

    monkeypatch.setattr(distributed, "_group", distributed._Group(None, 1.0))
    monkeypatch.setattr(distributed, "gather", lost)
    with pytest.raises(type(error), match="mine") as raised:
        distributed.on_first(fail)
    assert isinstance(raised.value.__cause__, ProcessGroupError)
    with pytest.raises(ProcessGroupError, match="the others have ended"):
        distributed.on_first(lambda: 1)


def launch(monkeypatch, **more: int) -> None:
    for name, value in {"WORLD_SIZE": 3, "RANK": 1, "LOCAL_RANK": 1, **more}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    "costs", [[], [1], [0, 0, 0], [9, 1, 1, 1], [1, 1, 1, 9], [1] * 12, [5, 0, 3, 8, 2, 2, 7]]
)
def test_portions_are_everything_once(monkeypatch, costs):
    monkeypatch.setattr(distributed, "_group", distributed._Group(None, 1.0))
    portions = []
    for rank in range(3):
        launch(monkeypatch, RANK=rank)
        portions.append(distributed.portion(costs))
    assert [index for portion in portions for index in portion] == list(range(len(costs)))
    totals = [sum(costs[index] for index in portion) for portion in portions]
    assert max(totals) <= sum(costs) / 3 + max(costs, default=0)


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert get_device() == torch.device("cuda")
    launch(monkeypatch)
    assert get_device() == torch.device("cuda:1")
    launch(monkeypatch, LOCAL_RANK=2)
    with pytest.raises(LoadError, match=r"no GPU, of which there are 2: start 2 processes"):
        get_device()


def test_a_model_is_spread_by_one_process_alone(monkeypatch):
    launch(monkeypatch, LOCAL_WORLD_SIZE=2)
    with pytest.raises(LoadError, match=r"2 processes are on this one: start one"):
        load_model("demo", device="auto")


def test_accelerate_that_starts_one_process_is_reported(monkeypatch, saved, caplog, capsys):
    assert not distributed.one_only()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert cli.main(words(saved, "--layers", "3", "--dry-run")) == 0
    assert "for several use torchrun" in caplog.text
    launch(monkeypatch)
    assert not distributed.one_only()


@pytest.mark.parametrize("left", [True, False])
def test_what_the_launcher_ends_says_why(left, monkeypatch, saved, tmp_path, capsys):
    """A signal from the launcher; the group itself is not needed for that."""
    monkeypatch.chdir(tmp_path)
    if left:
        (tmp_path / "pruned_model.journal.jsonl").write_text("")
    monkeypatch.setattr(cli, "launched", lambda: 2)
    monkeypatch.setattr(cli, "run_in_memory", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(words(saved, "--layers", "3", "--dry-run"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143
    hint = "another process has ended. Go on with the same command and --resume."
    assert (hint in (said := capsys.readouterr().err)) == left
    assert "another process has ended." in said


def test_a_model_partly_on_the_disk_scores_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny_llama(), word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    places = {f"model.layers.{i}": "disk" if i in (0, 3, 4, 7) else "cpu" for i in range(8)}
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    for away in ("cpu", "disk"):
        spread = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model",
            device_map={**places, **dict.fromkeys(rest, away)},
            offload_folder=tmp_path / away,
        ).eval()
        assert any(parameter.is_meta for parameter in spread.parameters())
        for name, options in worker.VARIANTS:
            here, there = (
                worker.get_strategy(name)(m, tokenizer, batch_size=2, **options)
                for m in (model, spread)
            )
            assert there.compute_layer_scores(items()) == here.compute_layer_scores(items())
        there, here = SmartPruner(spread, tokenizer), SmartPruner(model, tokenizer)
        plans = [pruner.plan(items(), n_layers=3) for pruner in (there, here)]
        assert plans[0] == replace(plans[1], model=plans[0].model)  # one came from a checkpoint
        quality = AblationPruner(spread, tokenizer).quality(items())
        assert quality._key == AblationPruner(model, tokenizer).quality(items())._key
