"""Streams that are closed, full, broken or narrow, and environments that say nonsense."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
from conftest import tiny_llama, word_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    tiny_llama().save_pretrained(folder / "m\u00e9")
    word_tokenizer().save_pretrained(folder / "m\u00e9")
    return folder


def run(place, redirect, **environment):
    """The exit code of a run that prunes on disk, and what it said on stderr."""
    out = place / "out"
    words = ["--model", "m\u00e9", "--layers", "2,5", "--output", "out", "--overwrite"]
    command = shlex.join([sys.executable, "-m", "llm_pruner.cli", *words])
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    for name in [name for name, value in environment.items() if value is None]:
        del variables[name]
    whole = f"set -o pipefail; {command} {redirect}"
    done = subprocess.run(
        ["bash", "-c", whole], cwd=place, env=variables, capture_output=True, timeout=100
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode(), out.is_dir()


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_closed_stream_stops_nothing(place, redirect):
    code, _, err, written = run(place, redirect)
    assert (code, written) == (0, True), err
    assert "Traceback" not in err


def test_a_reader_that_leaves_stops_nothing(place):
    code, out, err, written = run(place, "| true")
    assert (code, out, err, written) == (0, "", "", True)


def test_python_without_docstrings_is_refused(place):
    code, _, err, _ = run(place, "", PYTHONOPTIMIZE="2")
    assert code == 4, err
    assert err.startswith("error: python -OO")
    assert run(place, "", PYTHONOPTIMIZE="1")[0] == 0


def test_a_full_disk_behind_stdout_is_said_after_the_work(place):
    code, _, err, written = run(place, ">/dev/full")
    assert (code, written) == (4, True)
    assert err.startswith("error: The result could not be printed to stdout: No space left")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "tr_TR.UTF-8", "PYTHONUTF8": "0"},
        {"HOME": None, "XDG_CACHE_HOME": None},
        {"HOME": "/nonexistent"},
        {"TZ": "Nowhere/Else"},
        {"WORLD_SIZE": "many"},
    ],
    ids=str,
)
def test_an_odd_environment_changes_nothing(place, environment):
    code, out, err, written = run(place, "", **environment)
    assert (code, written) == (0, True), err
    assert "Removed 2 of 8" in out


@pytest.mark.parametrize(
    "environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "5", "WORLD_SIZE": "2"}], ids=str
)
def test_a_launcher_that_says_nonsense_is_refused(place, environment):
    code, _, err, _ = run(place, "", **environment)
    assert code == 2
    assert err.startswith("error: The environment says RANK=")
