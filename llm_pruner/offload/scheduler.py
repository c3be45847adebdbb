"""Many forward passes in step, so that each weight is read once for all of them.

Passes stop at stations, in turn: the embedding, every layer, the head. Every call is a `Job`, a
thread of its own, of which one runs at any time. The `Scheduler` loads a station's weights, runs
the station for every pass that waits there, and lets each pass go on. So the model's own forward
runs as it is. Passes that have come the same way share a result.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..model.bypass import Bypass
from ..model.forward import owner, tensors_in, work_for
from ..model.layer_stack import LayerStack, Observer
from ..progress import Progress
from .activation_store import ActivationStore
from .weight_store import EMBEDDING, Stations

THREAD_STACK = 2**20  # bytes; the layers themselves run in the scheduler's thread


class Scheduler:
    """Runs many calls in step: at every station each takes its turn.

    Waiting states take `budget` bytes of memory; None for no limit.

    Attributes:
        turn: a job releases it to let the scheduler go on.
        stopping: whether waiting jobs have to end.
    """

    def __init__(self, stack: LayerStack, stations: Stations, budget: int | None) -> None:
        self.stack, self.store = stack, ActivationStore(budget)
        self.turn = threading.Semaphore(0)
        self.stopping = False
        self._stations = stations
        self._jobs: list[Job] = []
        self._new: deque[Job] = deque()  # those that have not begun
        self._waiting: dict[int, list[tuple[int, Job]]] = {}  # station -> heap
        self._shared: list[tuple[weakref.ref[torch.Tensor], int]] = []  # and its version

    def run(self, calls: Sequence[Callable[[], Any]], alike: bool) -> list[Any]:
        """What all calls return. The caller has put the waiting layers in place."""
        with self._stations.loaded(None):
            jobs = self.add(calls, alike)
            try:
                with Progress("Layers", len(self.stack) + 2) as stage:
                    for station in self._next_stations():
                        self._serve(station)
                        stage.advance()
            except BaseException:
                self.stopping = True
                for job in reversed(self._jobs):
                    job.end()
                raise
        return [job.take() for job in jobs]

    def add(
        self, calls: Sequence[Callable[[], Any]], alike: bool, parent: Job | None = None
    ) -> list[Job]:
        """Take in calls, made by the job `parent` if one is given. They begin at the embedding."""
        group = object() if alike else None
        first = len(self._jobs)
        jobs = [Job(self, order, call, parent, group) for order, call in enumerate(calls, first)]
        self._jobs += jobs
        self._new.extend(jobs)
        return jobs

    def enqueue(self, job: Job) -> None:
        """Let a job wait at its station."""
        heapq.heappush(self._waiting.setdefault(job.station, []), (job.order, job))

    def _next_stations(self) -> Iterator[int]:
        """The stations where jobs wait, round after round, until none does."""
        station = EMBEDDING - 1
        while self._new or any(self._waiting.values()):
            busy = [other for other, heap in self._waiting.items() if heap]
            busy += [EMBEDDING] if self._new else []
            station = min((other for other in busy if other > station), default=min(busy))
            yield station

    def _serve(self, station: int) -> None:
        with self._stations.loaded(station):
            if station == EMBEDDING:  # a model may look at it before it calls it
                while self._new:
                    self._resume(self._new.popleft())
                self._stations.check_untouched()
            self._serve_all(station)

    def _serve_all(self, station: int) -> None:
        heap = self._waiting.setdefault(station, [])
        left = Counter(job.way for _, job in heap)
        results: dict[Any, _Result] = {}
        while heap:
            _, job = heapq.heappop(heap)
            way = job.way
            left[way] -= 1
            result = results.get(way)
            if result is None or not result.serves(job):
                result = self._answer(job)
                if way is not None and left[way] > 0 and not isinstance(result.answer, Exception):
                    results[way] = result
            else:
                self.store.restore(job.given)
                self.store.restore(result.answer, for_good=True)
                self._shared += [(weakref.ref(x), x._version) for x in tensors_in(result.answer)]
            if left[way] <= 0:
                results.pop(way, None)
            job.answer = result.answer
            del result
            job.trace = (*job.trace, station)
            self._resume(job)
        self._check_shared()

    def _answer(self, job: Job) -> _Result:
        """Run the station for a job."""
        self.store.restore(job.given)
        if any(tensor.is_meta for tensor in tensors_in(job.given)):
            raise UnsupportedModelError(
                f"{type(self.stack.model).__name__} uses weights outside of their layer, so it "
                "cannot be offloaded: load it whole, without a limit of memory."
            )
        before = _marks(job.given)
        try:
            answer = job.work()
        except Exception as error:  # for the model's own code to handle, or the call's
            return _Result(error, job.station, False, [])
        return _Result(answer, job.station, before == _marks(job.given), _marks(answer))

    def _check_shared(self) -> None:
        """Raise UnsupportedModelError if a pass has changed a state that it shares with others."""
        live = [(tensor, version) for ref, version in self._shared if (tensor := ref()) is not None]
        if any(tensor._version != version for tensor, version in live):
            raise UnsupportedModelError(
                f"{type(self.stack.model).__name__} changes states of earlier layers as it runs, "
                "so it cannot be offloaded: load it whole, without a limit of memory."
            )
        self._shared = [(weakref.ref(tensor), version) for tensor, version in live]

    def _resume(self, job: Job) -> None:
        """Let a job run on; if it was the last of those that another job waits for, that too."""
        job.resume()
        if job.error is not None:
            raise job.error
        if job.done and job.parent is not None:
            job.parent.children -= 1
            if not job.parent.children:
                self._resume(job.parent)


@dataclass(eq=False)
class Job:
    """One call: a thread that runs when it is its turn.

    Attributes:
        order: jobs with a lower number go first.
        parent: the job that made the call and waits for it; None for the caller of `Scheduler.run`.
        group: an object that calls which are alike have in common; None for a call of its own.
        trace: what its passes have done: i where one ran layer i, ~i where one bypassed it.
        bypassed: bypasses, by layer.
        borrows: below this layer it takes any result of its group; None: only where safe.
        records: where to note every layer's arguments and result; None for nowhere.
        station: where it waits.
        given: the arguments and keyword arguments for the station.
        answer: what the station returned, or raised.
        children: how many of its own calls are not done.
    """

    scheduler: Scheduler
    order: int
    call: Callable[[], Any] | None
    parent: Job | None
    group: object
    trace: tuple[int, ...] = ()
    bypassed: dict[int, Bypass] = field(default_factory=dict)
    observers: list[Observer] = field(default_factory=list)
    borrows: int | None = None
    records: dict[int, Any] | None = None
    station: int = EMBEDDING
    given: tuple[Any, Any] = ((), {})
    answer: Any = None
    children: int = 0
    done: bool = False
    result: Any = None
    error: BaseException | None = None
    _function: Callable[..., Any] | None = None
    _modes: tuple[bool, bool] = (False, False)  # of the waiting thread: gradients, inference

    def __post_init__(self) -> None:
        self._turn = threading.Semaphore(0)
        self._owner = owner()
        self._thread = threading.Thread(target=self._run, name="llm_pruner pass", daemon=True)

    @property
    def way(self) -> Any:
        """Equal for jobs whose passes have come the same way; None if it shares nothing."""
        return None if self.group is None else (self.group, self.trace)

    def skips(self, index: int) -> bool:
        """Whether it does not run the layer: bypassed, or its result taken from another job."""
        return index in self.bypassed or index < (self.borrows or 0)

    def take(self) -> Any:
        """The result, which is then no longer kept here."""
        result, self.result = self.result, None
        return result

    # Called by the scheduler, in its thread.

    def resume(self) -> None:
        """Let it run until it waits or ends."""
        if self._thread.ident is None:
            before = threading.stack_size(THREAD_STACK)
            threads = torch.get_num_threads()
            try:
                self._thread.start()
                self.scheduler.turn.acquire()
            finally:
                threading.stack_size(before)
                torch.set_num_threads(threads)
        else:
            self._turn.release()
            self.scheduler.turn.acquire()

    def work(self) -> Any:
        """Call the function that it waits for, as its own thread would."""
        assert self._function is not None
        args, kwargs = self.given
        grad, inference = self._modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return self._function(*args, **kwargs)

    def end(self) -> None:
        """Let it unwind, now that the scheduler is stopping."""
        if self._thread.ident is not None:
            self._turn.release()
            self._thread.join()

    # Run by the job, in its own thread.

    def ask(self, station: int, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `function` returns when the station's weights are in memory."""
        self.scheduler.store.keep((args, kwargs))
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.station, self.given, self._function = station, (args, kwargs), function
        self.scheduler.enqueue(self)
        del args, kwargs
        return self._wait()

    def fork(self, calls: Sequence[Callable[[], Any]], alike: bool) -> list[Any]:
        """Run `calls` in step with all other jobs; what they return."""
        jobs = self.scheduler.add(calls, alike, self)
        self.children = len(jobs)
        self._wait()
        return [job.take() for job in jobs]

    def _run(self) -> None:
        _thread.job = self
        work_for(self._owner)
        torch.set_num_threads(1)  # or every thread would have a team of OpenMP threads of its own
        call, self.call = self.call, None
        try:
            assert call is not None
            self.result = call()
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        finally:
            del call
            self.done = True
            self.scheduler.turn.release()

    def _wait(self) -> Any:
        """Give the turn back, and return the scheduler's answer when it is this job's again."""
        if self.scheduler.stopping:
            raise _Stop
        self.scheduler.turn.release()
        self._turn.acquire()
        if self.scheduler.stopping:
            raise _Stop
        answer, self.answer, self.given = self.answer, None, ((), {})
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass
class _Result:
    """What a station answered a pass, for others that have come the same way."""

    answer: Any  # what it returned, or raised
    station: int
    pure: bool  # whether it left its inputs unchanged
    marks: list[Any]  # of the answer, when it was new

    def serves(self, job: Job) -> bool:
        """Whether another pass may have it too: it holds all effects of the call, unchanged."""
        if self.marks != _marks(self.answer):  # the pass that asked first has changed it since
            return False
        return self.pure if job.borrows is None else self.station < job.borrows


class _Stop(BaseException):
    """Ends a job because the scheduler stops."""


_thread = threading.local()


def running_job() -> Job | None:
    """The job that runs in this thread, if any."""
    job: Job | None = getattr(_thread, "job", None)
    return job


def _marks(values: Any) -> list[Any]:
    """Differs from the marks before if something in `values` has changed, or might have."""
    if isinstance(values, torch.Tensor):
        return [id(values), object() if values.is_inference() else values._version]
    if isinstance(values, tuple | list | dict):
        inside = list(values.items()) if isinstance(values, dict) else values
        return [id(values), len(values), *(mark for value in inside for mark in _marks(value))]
    if values is None or isinstance(values, bool | int | float | str | torch.dtype | torch.device):
        return [values]
    return [object()]
