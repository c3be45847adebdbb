"""Many forward passes in step, so that each weight is read once for all of them.

Each call of a sweep is a `Job`: a thread of its own, of which one runs at any time. Its pass waits
where it comes to a station (the embedding, a layer, the head). The `Sweep` has a station's weights
read, runs the station for every waiting pass, in its own thread, and lets the pass go on to the
next one: so whatever travels between the layers stays in the frames of the passes. Passes that
have come the same way share a result.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..model.bypass import Bypass
from ..model.layer_stack import Entry, LayerStack, Observer
from ..utils import progress
from .activation_store import StateStore, tensors_in
from .weight_store import EMBEDDING, Stations

THREAD_STACK = 2**20  # bytes; the layers themselves run in the thread that called the sweep
Trace = tuple[int, ...]  # what a pass has done: i where it ran layer i, ~i where it bypassed it


class Sweep:
    """Many calls in step: station after station, each taking its turn at each.

    Args:
        stack: the layers, of which the model knows only gates while the sweep runs.
        stations: their weights.
        budget: bytes that waiting states may take; None for no limit.

    Attributes:
        stack: the layers.
        store: of the states that wait.
        baton: who releases it lets the sweep go on.
        stopping: whether the calls that wait are to end.
    """

    def __init__(self, stack: LayerStack, stations: Stations, budget: int | None) -> None:
        self.stack, self.store = stack, StateStore(budget)
        self.baton = threading.Semaphore(0)
        self.stopping = False
        self._stations = stations
        self._orders = count()
        self._jobs: list[Job] = []
        self._new: deque[Job] = deque()  # those that have not begun
        self._ready: deque[Job] = deque()  # those whose own calls are done
        self._waiting: dict[int, list[tuple[int, Job]]] = {}  # station -> heap
        self._shared: list[tuple[weakref.ref[torch.Tensor], int]] = []  # and its version

    def run(self, calls: Sequence[Callable[[], Any]], alike: bool) -> list[Any]:
        """What all calls return. The gates are in place meanwhile; the caller sees to it."""
        with self._stations.loaded(None):
            jobs = self.add(calls, alike, None)
            try:
                for station in progress(self._turns(), "Layers", total=len(self.stack) + 2):
                    with self._stations.loaded(station):
                        if station == EMBEDDING:  # a model may look at it before it calls it
                            self._begin()
                            self._stations.check_untouched()
                        self._serve_all(station)
            except BaseException:
                self._stop()
                raise
        return [job.take() for job in jobs]

    def add(self, calls: Sequence[Callable[[], Any]], alike: bool, parent: Job | None) -> list[Job]:
        """Take in calls, those of another one if `parent` is given; they begin in their turn."""
        group = object() if alike else None
        jobs = [Job(self, next(self._orders), call, parent, group) for call in calls]
        self._jobs += jobs
        self._new.extend(jobs)
        if parent is not None:
            parent.children = len(jobs)
        return jobs

    def enqueue(self, job: Job) -> None:
        """Let a job wait at the station that it asks for."""
        assert job.request is not None
        heapq.heappush(self._waiting.setdefault(job.request.station, []), (job.order, job))

    def _turns(self) -> Iterator[int]:
        """Where somebody waits, in turn, until nobody does."""
        station = EMBEDDING - 1
        while places := self._places():
            station = min((p for p in places if p > station), default=min(places))
            yield station

    def _places(self) -> set[int]:
        places = {place for place, heap in self._waiting.items() if heap}
        return places | {EMBEDDING} if self._new else places

    def _begin(self) -> None:
        """Run the calls that are new up to where they wait."""
        while self._new:
            self._resume(self._new.popleft())
            self._settle()

    def _serve_all(self, station: int) -> None:
        heap = self._waiting.setdefault(station, [])
        left = Counter(self._key(job) for _, job in heap)
        results: dict[Any, _Result] = {}
        while heap:
            _, job = heapq.heappop(heap)
            key = self._key(job)
            left[key] -= 1
            result = results.get(key)
            if result is None or not result.serves(job):
                result = self._answer(job)
                if key is not None and left[key] > 0 and not isinstance(result.answer, _Failure):
                    results[key] = result
            else:
                assert job.request is not None
                self.store.restore((job.request.args, job.request.kwargs))
                self.store.restore(result.answer, for_good=True)
                self._shared += [(weakref.ref(x), x._version) for x in tensors_in(result.answer)]
            if left[key] <= 0:
                results.pop(key, None)
            job.answer = result.answer
            del result
            job.trace = (*job.trace, station)
            self._resume(job)
            self._settle()
        self._check_shared()

    def _key(self, job: Job) -> Any:
        """Equal for jobs whose passes have come the same way to the same place."""
        return None if job.group is None else (id(job.group), job.trace)

    def _answer(self, job: Job) -> _Result:
        request = job.request
        assert request is not None
        given = request.args, request.kwargs
        self.store.restore(given)
        if any(tensor.is_meta for tensor in tensors_in(given)):
            raise UnsupportedModelError(
                f"{type(self.stack.model).__name__} looks at weights outside of their layer, so it "
                "cannot be streamed: load it whole, without a limit of memory."
            )
        before = _marks(given)
        try:
            answer = request.answer()
        except Exception as error:  # for the model's own code to handle, or the call's
            return _Result(_Failure(error), request.station, False, [])
        if job.records is not None and 0 <= request.station < len(self.stack):
            job.records[request.station] = (*given, answer)
        return _Result(answer, request.station, before == _marks(given), _marks(answer))

    def _check_shared(self) -> None:
        """Raise UnsupportedModelError if a pass has changed what it has in common with another."""
        live = [(tensor, version) for ref, version in self._shared if (tensor := ref()) is not None]
        if any(tensor._version != version for tensor, version in live):
            raise UnsupportedModelError(
                f"{type(self.stack.model).__name__} changes states of earlier layers as it runs, "
                "so it cannot be streamed: load it whole, without a limit of memory."
            )
        self._shared = [(weakref.ref(tensor), version) for tensor, version in live]

    def _settle(self) -> None:
        """Run those whose own calls are done."""
        while self._ready:
            self._resume(self._ready.popleft())

    def _resume(self, job: Job) -> None:
        job.resume()
        if job.error is not None:
            raise job.error
        if job.done and job.parent is not None:
            job.parent.children -= 1
            if not job.parent.children:
                self._ready.appendleft(job.parent)

    def _stop(self) -> None:
        self.stopping = True
        for job in reversed(self._jobs):
            job.end()


class Job:
    """One call of a sweep: a thread that runs when it is its turn.

    Attributes:
        order: the place in which it takes its turns.
        group: an object that calls have in common which are alike.
        trace: what its passes have done so far.
        bypassed: stand-ins, by layer.
        observers, entries: who sees what goes in and out of the layers.
        borrows: layers below which results of its group are taken unseen; None: where safe.
        records: where to note what goes in and out of every layer, if anywhere.
        request: what it waits for: station, function, arguments, modes.
    """

    def __init__(
        self, sweep: Sweep, order: int, call: Callable[[], Any], parent: Job | None, group: object
    ) -> None:
        self.sweep, self.order, self.parent, self.group = sweep, order, parent, group
        self.trace: Trace = ()
        self.bypassed: dict[int, Bypass] = {}
        self.observers: list[Observer] = []
        self.entries: list[tuple[frozenset[int], Entry]] = []
        self.borrows: int | None = None
        self.records: dict[int, Any] | None = None
        self.request: _Request | None = None
        self.children = 0
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.answer: Any = None
        self._call: Callable[[], Any] | None = call
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="llm_pruner pass", daemon=True)

    def resume(self) -> None:
        """Let it run until it waits or ends; called by the sweep."""
        if self._thread.ident is None:
            before = threading.stack_size(THREAD_STACK)
            threads = torch.get_num_threads()
            try:
                self._thread.start()
                self.sweep.baton.acquire()
            finally:
                threading.stack_size(before)
                torch.set_num_threads(threads)
        else:
            self._turn.release()
            self.sweep.baton.acquire()

    def end(self) -> None:
        """Let it unwind; called by the sweep, which is stopping."""
        if self._thread.ident is not None:
            self._turn.release()
            self._thread.join()

    def _run(self) -> None:
        _thread.job = self
        torch.set_num_threads(1)  # or every thread would have a team of OpenMP threads of its own
        call, self._call = self._call, None
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
            self.sweep.baton.release()

    def _wait(self) -> Any:
        """Give the turn back; what the sweep answers when it is this call's again."""
        if self.sweep.stopping:
            raise _Stop
        self.sweep.baton.release()
        self._turn.acquire()
        if self.sweep.stopping:
            raise _Stop
        answer, self.answer, self.request = self.answer, None, None
        if isinstance(answer, _Failure):
            raise answer.error
        return answer

    def ask(self, station: int, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `function` returns when the station's weights are in memory."""
        self.sweep.store.keep((args, kwargs))
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.request = _Request(station, function, args, kwargs, modes)
        self.sweep.enqueue(self)
        del args, kwargs
        return self._wait()

    def fork(self, calls: Sequence[Callable[[], Any]], alike: bool) -> list[Any]:
        """Run `calls` in step with all others of the sweep; what they return."""
        jobs = self.sweep.add(calls, alike, self)
        self._wait()
        return [job.take() for job in jobs]

    def is_without(self, index: int) -> bool:
        """Whether the layer is not run for it: bypassed, or its result taken from another."""
        return index in self.bypassed or index < (self.borrows or 0)

    def take(self) -> Any:
        """The result, which is then no longer kept here."""
        result, self.result = self.result, None
        return result


@dataclass
class _Request:
    station: int
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    modes: tuple[bool, bool]

    def answer(self) -> Any:
        """Call the function as the waiting thread would."""
        grad, inference = self.modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return self.function(*self.args, **self.kwargs)


@dataclass
class _Failure:
    """What a layer raised, to be raised in the pass that ran it."""

    error: Exception


@dataclass
class _Result:
    """What a station has answered a pass, for others that have come the same way.

    Attributes:
        answer: what it returned, or a `_Failure`.
        station: where.
        pure: whether it has left its inputs alone.
        marks: those of the answer, when it was new.
    """

    answer: Any
    station: int
    pure: bool
    marks: list[Any]

    def serves(self, job: Job) -> bool:
        """Whether another pass may have it too: all effects of the call are in it, unchanged."""
        if self.marks != _marks(self.answer):  # the pass that asked first has changed it since
            return False
        return self.pure if job.borrows is None else self.station < job.borrows


class _Stop(BaseException):
    """Ends a call because the sweep has ended."""


_thread = threading.local()


def running_job() -> Job | None:
    """The call that is running in this thread, if any."""
    job: Job | None = getattr(_thread, "job", None)
    return job


def _marks(values: Any) -> list[Any]:
    """Changes when a function has changed something in `values`, or might have."""
    if isinstance(values, torch.Tensor):
        return [id(values), object() if values.is_inference() else values._version]
    if isinstance(values, tuple | list | dict):
        inside = list(values.items()) if isinstance(values, dict) else values
        return [id(values), len(values), *(mark for value in inside for mark in _marks(value))]
    if values is None or isinstance(values, bool | int | float | str | torch.dtype | torch.device):
        return [values]
    return [object()]
