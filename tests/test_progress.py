"""What long work says of itself."""

from __future__ import annotations

import io
import math
import sys

import pytest

from llm_pruner import progress as module
from llm_pruner.progress import Progress, duration, job, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves on."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "_last", -math.inf)

    def move(seconds):
        now[0] += seconds

    return move


@pytest.fixture
def lines(caplog):
    caplog.set_level("INFO", "llm_pruner")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_log_has_a_line_after_two_seconds_and_then_every_half_minute(clock, lines):
    for _ in progress(range(100), "Working"):
        clock(1)
    assert lines() == [
        "Working: 2 of 100, 2 s so far, about 1 min 38 s left",
        "Working: 32 of 100, 32 s so far, about 1 min 8 s left",
        "Working: 62 of 100, 1 min 2 s so far, about 38 s left",
        "Working: 92 of 100, 1 min 32 s so far, about 8 s left",
    ]


def test_no_more_time_is_left_than_there_is(clock, lines):
    seconds = iter(range(100, 0, -1))
    for _ in progress(range(100), "Working", limit=lambda: next(seconds)):
        clock(30)
    assert lines()[1] == "Working: 2 of 100, 1 min so far, about 1 min 39 s left"


def test_short_work_says_nothing(clock, lines):
    assert list(progress(iter("ab"), "Working")) == ["a", "b"]
    for _ in progress(["one step, however long"], "Working"):
        clock(50)
    assert lines() == []


def test_the_stages_of_a_job_share_its_lines_and_its_note(clock, lines):
    with job(lambda: "best so far 7"):
        for stage in range(20):
            with Progress(f"Stage {stage}", 10.0, counts=False) as one:
                clock(2)
                one.advance(5)
                clock(1)
                one.advance(5)
    assert lines() == [
        "Stage 0: 50%, 2 s so far, best so far 7",
        "Stage 10: 50%, 32 s so far, best so far 7",
    ]


def test_an_error_ends_the_stage(clock, lines):
    with pytest.raises(ZeroDivisionError), Progress("One", 2):
        raise ZeroDivisionError
    clock(100)
    with Progress("Other", 4) as stage:
        clock(3)
        stage.advance()
    assert lines() == ["Other: 1 of 4, 3 s so far, about 9 s left"]


def test_a_loop_that_ended_badly_is_no_part_of_what_comes_after(clock, lines):
    """Whoever holds the error holds the loop's iterator, which is still open."""
    held = progress(range(4), "One")
    next(held)
    clock(1000)
    with Progress("Other", 4) as stage:
        clock(3)
        stage.advance()
    assert lines() == ["Other: 1 of 4, 3 s so far, about 9 s left"]
    next(held)  # it is indeed open


def test_stages_that_follow_one_another_quickly_share_the_lines(clock, lines):
    for stage in range(20):
        for _ in progress(range(2), f"Stage {stage}"):
            clock(3)
    assert lines() == [
        "Stage 0: 1 of 2, 3 s so far, about 3 s left",
        "Stage 5: 1 of 2, 3 s so far, about 3 s left",
        "Stage 10: 1 of 2, 3 s so far, about 3 s left",
        "Stage 15: 1 of 2, 3 s so far, about 3 s left",
    ]


def test_a_terminal_has_bars_and_no_lines(clock, lines, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "_bars", True)
    with job(lambda: "best so far 7"), Progress("Working", 4) as stage:
        for _ in range(4):
            clock(50)
            stage.advance()
    assert "Working:   0%" in terminal.getvalue()
    assert "0/4" in terminal.getvalue()
    assert lines() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
