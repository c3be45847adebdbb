"""What long work says of itself: a bar on a terminal, in a log a line every half minute."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from .utils import logger

T = TypeVar("T")
Limit: TypeAlias = Callable[[], float]
FIRST, EVERY = 2.0, 30.0  # seconds before the first line of a log, and between lines
_bars = True
_notes: list[Callable[[], str]] = []  # what the work as a whole has to say, the innermost last
_jobs: list[float] = []  # when each job began, of those that are within one another
_last = -math.inf  # when a line was written


class Progress:
    """One stage of a job, of which more and more is done.

    Args:
        description: what is done, such as ``Healing (linear)``.
        total: how much there is to do.
        counts: whether `total` is a number of things, to be shown, or an amount of work of which
            only the share means something.
        limit: says how many seconds it may still take at the most.
    """

    def __init__(
        self, description: str, total: float, *, counts: bool = True, limit: Limit | None = None
    ) -> None:
        self._description, self._total, self._counts = description, total, counts
        self._limit = limit or (lambda: math.inf)
        self._done = 0.0
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        _jobs.append(self._started)
        self._open()
        return self

    def _open(self) -> None:
        if _bars and sys.stderr.isatty():
            from tqdm.auto import tqdm

            form = "{desc}: {percentage:3.0f}%|{bar}| "
            form += "{n_fmt}/{total_fmt} " if self._counts else ""
            self._bar = tqdm(
                desc=self._description,
                total=self._total,
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
                bar_format=form + "[{elapsed}<{remaining}{postfix}]",
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _jobs.remove(self._started)
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: float = 1.0) -> None:
        """So much more has been done."""
        global _last

        self._done += amount
        if self._bar is not None:
            if _notes:
                self._bar.set_postfix_str(_notes[-1](), refresh=False)
            self._bar.update(amount)
            return
        if self._done >= self._total and len(_jobs) <= 1:
            return  # what comes next will speak
        now = time.monotonic()
        if now >= max(_last + EVERY, self._began() + FIRST):
            _last = now
            logger.info("%s", self._line(now))

    def _began(self) -> float:
        """When the work began of which this is a part."""
        return min([*_jobs, self._started])

    def _line(self, now: float) -> str:
        spent = now - self._started
        share = min(1.0, self._done / self._total) if self._total else 1.0
        said = [f"{self._done:.0f} of {self._total:.0f}" if self._counts else f"{share:.0%}"]
        said.append(f"{duration(now - self._began())} so far")
        if _notes:
            said.append(_notes[-1]())
        elif share:
            left = min(spent * (1 - share) / share, self._limit())
            said.append(f"about {duration(left)} left")
        return f"{self._description}: {', '.join(filter(None, said))}"


def progress(
    items: Iterable[T], description: str, total: int | None = None, limit: Limit | None = None
) -> Iterator[T]:
    """`items`, of which it is said how many are done: see `Progress`.

    A loop that ends with an error leaves its iterator open for as long as the error is held. So
    this stage, unlike a `Progress` of its own, is none that others can be a part of.
    """
    held = items if total is not None else list(items)
    count = total if total is not None else len(held)  # type: ignore[arg-type]
    stage = Progress(description, count, limit=limit)
    stage._open()
    try:
        for item in held:
            yield item
            stage.advance()
    finally:
        stage._close()


@contextmanager
def job(note: Callable[[], str] | None = None) -> Iterator[None]:
    """Inside the block all stages are parts of one piece of work.

    Args:
        note: what to say behind each line and bar, such as the time that all stages will take;
            instead of the time that is left to the stage.
    """
    began = time.monotonic()
    _jobs.append(began)
    if note:
        _notes.append(note)
    try:
        yield
    finally:
        _jobs.remove(began)
        if note:
            _notes.remove(note)


def duration(seconds: float) -> str:
    """``40 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def disable_progress_bars() -> None:
    """Show no bars from now on, neither ours nor those of transformers."""
    from transformers.utils import logging as transformers_logging

    global _bars
    _bars = False
    silence: Any = transformers_logging.disable_progress_bar
    silence()


@contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Inside the block a library's own progress bars stay away, where bars are off."""
    with nullcontext() if _bars else redirect_stderr(StringIO()):
        yield
