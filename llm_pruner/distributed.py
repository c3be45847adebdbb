"""Several processes on one job: each takes its portion of the work, and all know every result.

``torchrun`` (or ``accelerate launch`` on GPUs) starts them; they find each other inside `group`.
Outside of it everything here is what one process needs, and torch.distributed is not imported.
Every process has to come to the same calls in the same order.
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
PATIENCE = 5.0  # seconds that an error waits for the first process to tell the same


@dataclass
class _Group:
    """The processes of this job.

    Attributes:
        members: their process group, over which objects go (gloo).
        timeout: seconds that one waits for another.
        apart: this process works for itself, inside `on_first`.
    """

    members: Any
    timeout: float
    apart: bool = False


_group: _Group | None = None
# Where all read and write while the launcher lives, also after the group: a store, and a key.
_board: tuple[Any, str] | None = None
_numbers = count()  # of the groups


def launched() -> int:
    """How many processes a launcher has started for this job; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """The number of this process, from 0; it is the first that writes and prints."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def local_rank() -> int:
    """The number of this process among those of its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() > 1 else 0


def launched_here() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() > 1 else 1


def one_only() -> bool:
    """Whether ``accelerate launch`` has started a single process on the CPU.

    It does so whatever ``--num_processes`` says, unless MPI is set up.
    """
    return "WORLD_SIZE" not in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True"


@contextmanager
def group(timeout: float = TIMEOUT) -> Iterator[None]:
    """Inside the block the launched processes work on one job; nothing happens if there is one.

    Args:
        timeout: seconds that one process waits for another.

    Raises:
        InvalidPlanError: `timeout` is no number of seconds.
        ProcessGroupError: the processes do not find each other.
    """
    global _group, _board
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
    except (RuntimeError, ValueError) as error:  # ValueError: the environment lacks something
        raise ProcessGroupError(
            f"The {launched()} processes did not find each other within {timeout:g} seconds "
            f"({_first_line(error)}). Start them with torchrun --standalone, or on several "
            "machines with one --rdzv-endpoint."
        ) from error
    _board = dist.distributed_c10d._get_default_store(), f"llm_pruner/error/{next(_numbers)}"
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
    """What tensors go over: NCCL between GPUs, each process on its own."""
    import torch

    if not torch.cuda.is_available():
        return "gloo"
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    return "cpu:gloo,cuda:nccl"


def working_together() -> int:
    """How many processes share the work here: all of the group, or 1."""
    return 1 if _group is None or _group.apart else launched()


def portion(costs: Sequence[float]) -> range:
    """Places of the units that fall to this process: neighbours, about its share of the cost.

    The portions of all processes, in their order, are all places; some may be empty.

    Args:
        costs: what each unit costs, in any measure.
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
    """The values of all processes in their order, in every process.

    Args:
        value: anything that can be pickled.

    Raises:
        ProcessGroupError: another process has ended, or does not answer in time.
    """
    if _group is None or _group.apart:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * launched()
    try:
        dist.all_gather_object(found, value, group=_group.members)
    except RuntimeError as error:
        raise _lost(error) from error
    return found


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process; the others wait for it, or raise its error.

    The first process is by itself meanwhile: what is called in `work` does not reach the others.

    Raises:
        LLMPrunerError: what `work` raised, in every process.
        ProcessGroupError: the first process has ended, or does not answer in time.
    """
    if _group is None or _group.apart:
        return work()
    told: tuple[Any, LLMPrunerError | None] = (None, None)
    if rank() == 0:
        _group.apart = True
        try:
            told = work(), None
        except LLMPrunerError as error:
            told = None, error
        except Exception as error:
            _group.apart = False
            gather((None, ProcessGroupError(f"Rank 0: {type(error).__name__}: {error}")))
            raise
        finally:
            _group.apart = False
    result, failure = gather(told)[0]
    if failure is not None:
        raise failure
    done: T = result
    return done


@contextmanager
def lost_process_errors() -> Iterator[None]:
    """Inside the block, which exchanges tensors by itself, losing a process is our own error.

    Raises:
        ProcessGroupError: another process has ended, or does not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        alone = _group is None or isinstance(error, LLMPrunerError)
        if alone or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise _lost(error) from error


def told_by_first(message: str) -> bool:
    """Whether the first process tells this error too, so that the others need not.

    The first process leaves its message where the others look for it, for a few seconds.
    """
    if _board is None:
        return False
    store, key = _board
    try:
        if rank() == 0:
            store.set(key, message)
            return False
        end = time.monotonic() + PATIENCE
        while not store.check([key]):  # wait() would complain on stderr
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return bool(store.get(key).decode() == message)
    except RuntimeError:  # the launcher has gone
        return False


def _lost(error: BaseException) -> ProcessGroupError:
    assert _group is not None
    return ProcessGroupError(
        f"Another process has ended, or does not answer within {_group.timeout:g} seconds "
        f"({_first_line(error)}). Its own message says why. Nothing half-written was left; go on "
        "with --resume, or give slow processes more time with --timeout."
    )


def _first_line(error: BaseException) -> str:
    """What a library says first, without the place in its source."""
    return re.sub(r"^\[\S+\] ", "", str(error)).split("\n")[0].split(". ")[0][:200]
