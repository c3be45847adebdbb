"""Several processes on one job: each does its portion of the work, and all get every result.

``torchrun`` (or ``accelerate launch`` on GPUs) starts them; they connect inside `group`. Elsewhere
everything works as for one process. Every process must make the same calls in the same order.
"""

from __future__ import annotations

import atexit
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, count
from typing import Any, TypeVar

from .errors import InvalidPlanError, LLMPrunerError, ProcessGroupError

T = TypeVar("T")
TIMEOUT = 1800.0  # seconds that one process waits for another
REPORT_WAIT = 5.0  # seconds that an error waits for the first process to report the same


@dataclass
class _Group:
    """The processes of this job."""

    members: Any  # their process group for objects (gloo)
    timeout: float  # seconds that one waits for another
    alone: bool = False  # whether this process works by itself, inside `on_first`


_group: _Group | None = None
# A store and a key in it, shared by all processes while the launcher lives, even after the group.
_error_board: tuple[Any, str] | None = None
_groups = count()


def launched() -> int:
    """Number of processes that a launcher started for this job, at least 1."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """The index of this process, from 0; the first one writes and prints."""
    return _number("RANK", 0, launched() - 1) if launched() > 1 else 0


def local_rank() -> int:
    """The index of this process on its machine, which is also the index of its GPU."""
    return _number("LOCAL_RANK", 0, launched() - 1) if launched() > 1 else 0


def launched_here() -> int:
    """Number of the processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, launched()) if launched() > 1 else 1


def _number(name: str, least: int, most: int = 1_000_000) -> int:
    """A number that a launcher has put into the environment; `least` where it has not."""
    text = os.environ.get(name, str(least))
    if not re.fullmatch("[0-9]{1,7}", text) or not least <= int(text) <= most:
        raise InvalidPlanError(
            f"The environment says {name}={text!r}, which must be a whole number from {least} to "
            f"{most}: start several processes with torchrun, or unset RANK and WORLD_SIZE for one."
        )
    return int(text)


def one_only() -> bool:
    """Whether ``accelerate launch`` started one process on the CPU, as it does without MPI."""
    return "WORLD_SIZE" not in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True"


@contextmanager
def group(timeout: float = TIMEOUT) -> Iterator[None]:
    """Connect the launched processes inside the block, if there are several.

    Args:
        timeout: seconds that one process waits for another.

    Raises:
        InvalidPlanError: `timeout` is not a positive, finite number of seconds.
        ProcessGroupError: the processes cannot connect.
    """
    global _group, _error_board
    if not 0 < timeout < math.inf:
        raise InvalidPlanError(f"timeout={timeout} must be a number of seconds above 0.")
    if launched() == 1:
        yield
        return
    import torch.distributed as dist

    limit = timedelta(seconds=timeout)
    try:
        if not dist.is_initialized():
            dist.init_process_group(_backend(), timeout=limit)
        members = dist.new_group(backend="gloo", timeout=limit)
    except (RuntimeError, ValueError) as error:  # ValueError: an environment variable is missing
        raise ProcessGroupError(
            f"The {launched()} processes could not connect within {timeout:g} seconds "
            f"({_first_line(error)}). Start them with torchrun --standalone, or on several "
            "machines with one --rdzv-endpoint."
        ) from error
    _error_board = dist.distributed_c10d._get_default_store(), f"llm_pruner/error/{next(_groups)}"
    _group = _Group(members, timeout)
    try:
        yield
    finally:
        _group = None
    # The default group stays, for the next block and for accelerate; after an error it may hang.
    dist.destroy_process_group(members)
    atexit.unregister(dist.destroy_process_group)
    atexit.register(dist.destroy_process_group)


def _backend() -> str:
    """What carries tensors: NCCL between GPUs, where each process has its own; else gloo."""
    import torch

    if not torch.cuda.is_available():
        return "gloo"
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    return "cpu:gloo,cuda:nccl"


def working_together() -> int:
    """Number of processes that divide the work here: the whole group, or 1."""
    return 1 if _group is None or _group.alone else launched()


def portion(costs: Sequence[float]) -> range:
    """Indices of the units that this process works on, given the cost of each.

    Portions are neighbours of about equal total cost. Those of all processes, in order, cover
    every unit once; some may be empty.
    """
    processes = working_together()
    if processes == 1:
        return range(len(costs))
    whole = sum(costs) or 1.0
    middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
    owners = [min(processes - 1, int(middle / whole * processes)) for middle in middles]
    first = sum(owner < rank() for owner in owners)
    return range(first, first + owners.count(rank()))


def gather(value: T) -> list[T]:
    """The (picklable) values of all processes, in order; the same list in every process.

    Raises:
        ProcessGroupError: another process has ended, or does not answer in time.
    """
    if _group is None or _group.alone:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * launched()
    try:
        dist.all_gather_object(values, value, group=_group.members)
    except RuntimeError as error:
        raise _lost(error) from error
    return values


def on_first(work: Callable[[], T]) -> T:
    """Run `work` in the first process; every process returns its result, or raises its error.

    Calls within `work` do not involve the other processes.

    Raises:
        LLMPrunerError: what `work` raised, in every process.
        ProcessGroupError: the first process has ended, or does not answer in time.
    """
    if _group is None or _group.alone:
        return work()
    outcome: tuple[Any, LLMPrunerError | None] = (None, None)
    fault: Exception | None = None
    if rank() == 0:
        _group.alone = True
        try:
            outcome = work(), None
        except LLMPrunerError as error:
            fault, outcome = error, (None, error)
        except Exception as error:
            fault = error
            outcome = None, ProcessGroupError(f"Rank 0: {type(error).__name__}: {error}")
        finally:
            _group.alone = False
    try:
        result, failure = gather(outcome)[0]
    except ProcessGroupError as error:
        if fault is not None:  # what happened here says more than that the others have ended
            raise fault from error
        raise
    if failure is not None:
        raise fault or failure
    done: T = result
    return done


@contextmanager
def lost_process_errors() -> Iterator[None]:
    """Raise ProcessGroupError if a library that exchanges tensors in the block loses a process."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if _group is None or isinstance(error, LLMPrunerError) or not lost:
            raise
        raise _lost(error) from error


def reported_by_first(message: str) -> bool:
    """Whether the first process, within seconds, reports this same error, so this one need not."""
    if _error_board is None:
        return False
    store, key = _error_board
    try:
        if rank() == 0:
            store.set(key, message)
            return False
        end = time.monotonic() + REPORT_WAIT
        while not store.check([key]):  # wait() would print to stderr
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return bool(store.get(key).decode() == message)
    except RuntimeError:  # the launcher has ended
        return False


def _lost(error: BaseException) -> ProcessGroupError:
    assert _group is not None
    return ProcessGroupError(
        f"Another process has ended, or does not answer within {_group.timeout:g} seconds "
        f"({_first_line(error)}). Its own message says why. No partial output was left; continue "
        "with --resume, or give slow processes more time with --timeout."
    )


def _first_line(error: BaseException) -> str:
    """The first sentence of a library's message, without the source location."""
    return re.sub(r"^\[\S+\] ", "", str(error)).split("\n")[0].split(". ")[0][:200]
