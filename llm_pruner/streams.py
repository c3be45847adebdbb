"""Standard streams that may be closed, full, broken, or of a narrow encoding."""

from __future__ import annotations

import os
import sys
from typing import Any

from .errors import OutputError

_lost: list[OSError] = []  # why something could not be printed


def open_streams() -> None:
    """Make it safe to print, whatever streams the process was started with.

    What was closed becomes the null device, or else the next file that is opened would be written
    to by whoever prints; what an encoding lacks is printed as an escape.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)  # which a test's stream may lack
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    _lost.clear()


def say(text: str) -> None:
    """Write `text` to stdout. What cannot be printed is found by `check_said`, after the work.

    A reader that has gone away, as ``head`` does, has seen what it wanted.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _lost.append(error)
        _silence(sys.stdout)


def say_aside(text: str) -> None:
    """Write a line to stderr, if it takes any: there is nowhere else to say that it does not."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def check_said() -> None:
    """Raise OutputError if something could not be written to stdout."""
    if _lost:
        raise OutputError(
            f"The result could not be printed to stdout: {_lost[0].strerror}. All else was done."
        )


def _silence(stream: Any) -> None:
    """Let a stream end at the null device: Python flushes it once more at its exit."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no file of the system
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
