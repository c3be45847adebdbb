"""Models larger than the memory: layer by layer from the checkpoint, many forward passes at once.

The model's own forward runs unmodified, once per call of a sweep, each in a thread of its own, of
which one runs at any time. Where a pass comes to a layer it waits. The sweep reads the layer's
weights, takes every waiting pass through the layer and on to the next one, frees the weights and
goes on: so each weight is read once per sweep, and whatever travels between the layers stays in
the frames of the passes.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
import tempfile
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device
from safetensors import safe_open
from torch import nn

from .errors import InvalidPlanError, LoadError, OutputError, UnsupportedModelError
from .layers import (
    OTHER_TOWERS,
    STAND_IN_ANSWERS,
    Entry,
    LayerStack,
    Observer,
    _Bypass,
    _hidden_in,
    _hidden_out,
    _learn_forms,
    _ReturnForm,
)
from .likelihood import evaluating
from .results import check_layers
from .utils import (
    count_bytes,
    explain_load_failure,
    format_bytes,
    get_device,
    load_model,
    logger,
    model_class,
    progress,
    read_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOM = 3 * 2**28  # beside weights and waiting states: interpreter, libraries, one batch's work
THREAD_STACK = 2**20  # bytes; the layers themselves run in the thread that called the sweep
EMBEDDING = -1  # the station before layer 0; the head's is the number of layers
TOWERS = -2  # of weights for other inputs than text
SMALL = 2**16  # bytes up to which a tensor is no matter for the store
WAY_OUT = (
    "Choose the layers so, and remove them on the disk, by llm_pruner.prune_checkpoint or the "
    "command."
)
T = TypeVar("T")
Trace = tuple[int, ...]  # what a pass has done: i where it ran layer i, ~i where it bypassed it


def load_streamed(
    model_id: str,
    *,
    max_memory: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose weights stay in its safetensors files, and its tokenizer.

    Strategies score and plan with it as with any other: a layer's weights are read when its turn
    comes. What needs the model in memory (removing, healing, generating) refuses it.

    Args:
        model_id: ``demo``, a local folder, or an id on the Hugging Face hub.
        max_memory: bytes that the process may take; no limit if None. Hidden states that do not fit
            wait in temporary files (in ``TMPDIR``). Where not even one layer fits, making a
            strategy for the model is refused.
        device: where layers and states are put while they are used; the best device if None.
        dtype, trust_remote_code: see `load_model`.

    Raises:
        LoadError: the model cannot be found or read, or is not stored as plain safetensors.
    """
    place = torch.device(device or get_device())
    folder = tempfile.TemporaryDirectory(prefix="llm-pruner-")  # of what has to be converted
    with _quiet("accelerate.big_modeling"):  # which warns of what is wanted here
        model, tokenizer = read_model(
            model_id,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map={"": "disk"},
            offload_folder=folder.name,
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise LoadError(
            f"Cannot stream model {model_id!r}: its weights are quantised. Give the checkpoint "
            "that it was made from, or load it whole."
        )
    index = _weights_index(model)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():  # each keeps a reference to its own method otherwise
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(place)
    model.register_forward_pre_hook(_only_in_a_sweep, with_kwargs=True)
    _SOURCES[model] = _Source(Weights(index, place, folder), max_memory)
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def load_within(
    max_memory: int,
    model_id: str,
    *,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` where the model fits into `max_memory` bytes, `load_streamed` where not.

    Raises:
        LoadError: see both.
    """
    _, auto, config = model_class(model_id, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    try:
        with torch.device("meta"):
            skeleton = auto.from_config(config, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise LoadError(explain_load_failure("model", model_id, error)) from error
    size = count_bytes(skeleton)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if size + ROOM <= max_memory:
        logger.info("%s of weights fit into memory.", format_bytes(size))
        return load_model(model_id, **how)
    logger.info(
        "%s of weights and %s to work with exceed %s: layers are read one by one.",
        format_bytes(size),
        format_bytes(ROOM),
        format_bytes(max_memory),
    )
    return load_streamed(model_id, max_memory=max_memory, **how)


def layers_of(model: nn.Module, path: str | None = None) -> LayerStack:
    """The layers of a model, in memory or streamed; see `LayerStack`.

    Raises:
        UnsupportedModelError: they are not found, or cannot be streamed.
        InvalidPlanError: not even one layer fits into the memory allowed.
    """
    source = _SOURCES.get(model)
    return LayerStack(model, path) if source is None else StreamedStack(model, source, path)


class Weights:
    """The tensors of a checkpoint, read when asked for.

    Args:
        index: name in the model -> file, name in the file, and dtype to load with.
        device: where to put them.
        folder: of the files that had to be written; it goes with this object.

    Attributes:
        bytes_read: bytes read so far, as stored in the files.
    """

    def __init__(
        self,
        index: dict[str, dict[str, str]],
        device: torch.device,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._index, self.device, self._folder = index, device, folder
        self.bytes_read = 0

    def name_of(self, names: Iterable[str]) -> str:
        """That one of a tensor's `names` in the model under which it is stored.

        Raises:
            LoadError: none is.
        """
        names = list(names)
        for name in names:
            if name in self._index:
                return name
        raise LoadError(f"No file of the checkpoint holds {names[0]!r}: it cannot be streamed.")

    def _wrote(self, file: str) -> bool:
        return self._folder is not None and file.startswith(self._folder.name)

    def fingerprint(self, model: nn.Module) -> str:
        """Short hash of the config of `model` and of the beginning of every tensor."""
        digest = hashlib.sha256(model.config.to_json_string().encode())  # type: ignore[operator, union-attr]
        for name, place in sorted(self._index.items()):
            with safe_open(place["safetensors_file"], framework="pt") as opened:
                stored = opened.get_tensor(place.get("weight_name", name))
                first = stored.reshape(-1)[:256].float()
                digest.update(f"{name}{tuple(stored.shape)}{stored.dtype}".encode())
                digest.update(first.numpy().tobytes())
        return digest.hexdigest()[:16]

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The tensors of these names, each file opened once.

        Raises:
            LoadError: a file cannot be read any more.
        """
        found: dict[str, torch.Tensor] = {}
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self._index[name]["safetensors_file"], []).append(name)
        for file, inside in files.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in inside:
                        stored = opened.get_tensor(self._index[name].get("weight_name", name))
                        self.bytes_read += stored.nbytes
                        dtype = getattr(torch, self._index[name]["dtype"])
                        # As transformers does, to the alignment, which some kernels look at: what
                        # is used as stored is mapped from its file, what was converted is new.
                        found[name] = stored.to(self.device, dtype, copy=self._wrote(file))
            except OSError as error:
                raise LoadError(f"Cannot read {file!r} any more: {error}.") from error
        return [found[name] for name in names]


class StateStore:
    """Keeps tensors within a number of bytes: those beyond it lie in temporary files.

    A tensor that does not fit is given mapped memory in place of its own, so whoever holds it may
    go on using it. The files have no name any more, and are gone with the tensors, or with the
    process.

    Args:
        budget: bytes to keep in memory; no limit if None.
    """

    def __init__(self, budget: int | None) -> None:
        self._budget, self._held = budget, 0
        self._known: dict[int, _Kept] = {}
        self.bytes_written = 0

    def keep(self, values: Any) -> None:
        """Take in every tensor of `values`, nested as they may be."""
        if self._budget is None:
            return
        for tensor in _tensors(values):
            if id(tensor) in self._known or tensor.nbytes <= SMALL:
                continue
            fits = self._held + tensor.nbytes <= self._budget
            held = tensor.nbytes if fits or not _swappable(tensor) else 0
            self._note(tensor, held)
            if not held:
                tensor.data = self._mapped(tensor)

    def restore(self, values: Any, *, for_good: bool = False) -> None:
        """Bring tensors of `values` back to the device they were on; on a CPU they never left.

        Args:
            values: nested tensors.
            for_good: whether they stay there from now on.
        """
        for tensor in _tensors(values):
            kept = self._known.get(id(tensor))
            if kept is not None and kept.device != tensor.device:
                tensor.data = tensor.to(kept.device)
                del self._known[id(tensor)]
            if for_good and tensor.device.type != "cpu" and id(tensor) not in self._known:
                self._note(tensor, tensor.nbytes)

    def _note(self, tensor: torch.Tensor, held: int) -> None:
        gone = weakref.ref(tensor, partial(self._forget, id(tensor)))
        self._known[id(tensor)] = _Kept(gone, held, tensor.device)
        self._held += held

    def _forget(self, key: int, gone: object) -> None:
        if key in self._known and self._known[key].gone is gone:
            self._held -= self._known.pop(key).held

    def _mapped(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        handle, path = tempfile.mkstemp(prefix="llm-pruner-")
        try:
            with open(handle, "wb") as file:
                file.write(flat.numpy().data)
            mapped = torch.from_file(path, shared=False, size=len(flat), dtype=torch.uint8)
        except OSError as error:
            raise OutputError(
                f"Cannot store {format_bytes(len(flat))} of hidden states in {path!r}: {error}. "
                "Name a folder with more space in the environment variable TMPDIR, or score on "
                "fewer items."
            ) from error
        finally:
            os.unlink(path)
        self.bytes_written += len(flat)
        return mapped.view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class _Kept:
    """A tensor in a store: how many bytes of memory it holds, and its device when it came."""

    gone: weakref.ref[torch.Tensor]
    held: int
    device: torch.device


class StreamedStack(LayerStack):
    """The layers of a model whose weights stay in the checkpoint.

    Forward passes run inside `sweep`. There `bypass`, `observe` and `entering` concern the pass of
    the call that uses them alone.

    Args:
        model: what `load_streamed` returned.
        source: where its weights are.
        path: see `LayerStack`.

    Attributes:
        budget: bytes that waiting hidden states may take; None for no limit.

    Raises:
        UnsupportedModelError: the layers are not one list.
        InvalidPlanError: not even one layer fits into the memory allowed.
    """

    def __init__(self, model: nn.Module, source: _Source, path: str | None = None) -> None:
        super().__init__(model, path)
        if len(self.paths) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} has its layers in several lists ({self.paths}), which "
                "cannot be streamed one by one: load it whole, without a limit of memory."
            )
        self._weights = source.weights
        self._dependent: bool | None = None
        self._groups: dict[int | None, list[_Tensor]] = {}
        for tensor in _placed(model, self.paths[0], self._weights.name_of):
            self._groups.setdefault(tensor.station, []).append(tensor)
        for tensor in self._groups.pop(TOWERS, []):  # never needed, but asked for their device
            if tensor.empty.is_floating_point():
                nothing = torch.full((), torch.nan, dtype=tensor.empty.dtype, device=self.device)
                tensor.put(nn.Parameter(nothing.expand_as(tensor.empty)))
        self.budget = self._left_for_states(source.max_memory)

    def _left_for_states(self, max_memory: int | None) -> int | None:
        sizes = {
            station: sum(tensor.empty.nbytes for tensor in group)
            for station, group in self._groups.items()
        }
        always = sizes.pop(None, 0)
        least = always + max(sizes.values(), default=0) + ROOM
        if max_memory is not None and max_memory < least:
            raise InvalidPlanError(
                f"{format_bytes(max_memory)} of memory are not enough for this model: one layer at "
                f"a time takes {format_bytes(least)}, of which {format_bytes(always)} for weights "
                f"that all layers need and {format_bytes(ROOM)} to work with. Allow as much, or "
                "load it with a smaller dtype."
            )
        return None if max_memory is None else max_memory - least

    @property
    def device(self) -> torch.device:
        """Where layers and states are put."""
        return self._weights.device

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far, as stored in the files."""
        return self._weights.bytes_read

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the config and of the beginning of every tensor in the files."""
        return self._weights.fingerprint(self.model)

    @property
    def streamed(self) -> bool:
        return True

    def require_weights(self, purpose: str) -> None:
        """Raise UnsupportedModelError: the weights are not in memory."""
        raise UnsupportedModelError(
            f"The weights of this {type(self.model).__name__} are read from the disk layer by "
            f"layer, which does not do for {purpose}. {WAY_OUT}"
        )

    @property
    def can_replay(self) -> bool:
        """False: a pass begins at the first layer, and equal work is shared between passes."""
        return False

    @property
    def can_bypass(self) -> bool:
        """Whether the layers depend on one another by nothing but the hidden state."""
        self.prepare()
        return not self._dependent and self._hands_on_one_state()

    def sweep(self, calls: Iterable[Callable[[], T]], *, alike: bool = False) -> Iterator[T]:
        """All calls at once, layer by layer; see `LayerStack.sweep`.

        Every weight is read once for every pass that a call makes one after the other. A call may
        itself sweep. Passes that are `alike` share a layer's result as long as they have
        bypassed the same layers.

        Raises:
            LoadError: a weight cannot be read.
            OutputError: no space for hidden states that wait.
            UnsupportedModelError: the model changes its weights as it runs.
            BaseException: what a call raised; the other calls are ended.
        """
        calls, running = list(calls), _running()
        if not calls:
            return
        if running is not None and running.sweep.stack is self:
            sweep, results = running.sweep, running.fork(calls, alike)
        else:
            sweep = _Sweep(self)
            results = sweep.run(calls, alike)
        for place in range(len(results)):
            result, results[place] = results[place], None
            sweep.store.restore(result)
            yield result

    def prepare(self) -> None:
        """Learn how layers return and whether they are independent, by a sweep of two tokens."""
        if self._dependent is not None:
            return
        calls: dict[int, Any] = {}
        given = {"input_ids": torch.tensor([[0, 1]], device=self.device), "use_cache": False}

        def probe(borrows: int) -> torch.Tensor | None:
            job = self._job()
            job.borrows, job.records = borrows, calls if not borrows else None
            with evaluating(self.model):
                try:
                    logits: torch.Tensor = self.model(**given).logits
                    return logits
                except (LookupError, TypeError, AttributeError):  # what is missing below
                    if not borrows:
                        raise
                    return None

        starts = sorted({len(self) // 2, len(self) - 1})
        whole, *others = self.sweep([partial(probe, n) for n in (0, *starts)], alike=True)
        assert whole is not None
        self._forms[self.paths[0]] = _learn_forms(calls, len(self))
        self._dependent = len(calls) < len(self) or any(
            other is None or not torch.allclose(other, whole, rtol=1e-4, atol=1e-5, equal_nan=True)
            for other in others
        )

    def _return_forms(self, path: str | None = None) -> list[_ReturnForm]:
        self.prepare()
        return super()._return_forms(path)

    def _job(self) -> _Job:
        """The call that is running in this thread."""
        job = _running()
        if job is None or job.sweep.stack is not self:
            raise UnsupportedModelError(
                f"The weights of this {type(self.model).__name__} are read layer by layer: run the "
                "model in a function that is given to stack.sweep([...])."
            )
        return job

    @contextmanager
    def bypass(self, indices: Iterable[int]) -> Iterator[nn.Module]:
        """Inside the block the pass of this call bypasses the layers; see `LayerStack.bypass`."""
        mask = check_layers(indices, len(self))
        job = self._job()
        forms = self._return_forms() if mask else []
        layers = _originals(self)
        job.bypassed = {index: _Bypass(layers[index], forms[index]) for index in mask}
        try:
            yield self.model
        finally:
            job.bypassed = {}

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Observe the pass of this call; see `LayerStack.observe`. What is seen may be kept."""
        observers = self._job().observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)

    @contextmanager
    def entering(self, places: Iterable[int], observer: Entry) -> Iterator[None]:
        """Observe what enters layers in the pass of this call; see `LayerStack.entering`."""
        entries, wanted = self._job().entries, frozenset(places)
        entry = (wanted, observer)
        entries.append(entry)
        try:
            yield
        finally:
            entries.remove(entry)

    @contextmanager
    def replay(
        self, start: int, hidden: torch.Tensor, removed: Iterable[int] = ()
    ) -> Iterator[nn.Module]:
        """Refused: a pass begins at the first layer."""
        raise UnsupportedModelError(
            "A pass cannot begin in the middle of a streamed model: sweep calls that are alike, "
            "which share what they have in common."
        )
        yield self.model

    @contextmanager
    def _loaded(self, station: int | None) -> Iterator[None]:
        """The weights of a station in memory; None for those that all of a sweep needs."""
        group = self._groups.get(station, [])
        for tensor, found in zip(group, self._weights.read([t.name for t in group]), strict=True):
            tensor.put(nn.Parameter(found, tensor.empty.requires_grad))  # which kernels look at
            del found
        try:
            yield
        finally:
            for tensor in group:
                tensor.put(tensor.empty)

    @contextmanager
    def _gates(self) -> Iterator[None]:
        """Gates in place of the layers, and around the embedding and the head."""
        layers = self._list
        originals = list(layers)
        with ExitStack() as stations:
            for station, module in _ends(self.model, len(self)).items():
                stations.enter_context(_gated(module, station))
            try:
                for index, layer in enumerate(originals):
                    layers[index] = _Gate(layer, index)
                yield
            finally:
                for index, layer in enumerate(originals):
                    layers[index] = layer

    def _check_untouched(self) -> None:
        """Raise UnsupportedModelError if the model has changed weights that are not in memory."""
        changed = [t.name for group in self._groups.values() for t in group if t.is_changed()]
        if changed:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} changes its own weights as it runs ({changed[0]}), "
                "so they cannot be read from the disk: load it whole, without a limit of memory."
            )


@dataclass(frozen=True)
class _Source:
    """Where a streamed model's weights are, and how many bytes the process may take."""

    weights: Weights
    max_memory: int | None


_SOURCES: weakref.WeakKeyDictionary[nn.Module, _Source] = weakref.WeakKeyDictionary()


@dataclass
class _Tensor:
    """A parameter, all its places in the module tree, and the one station that needs it, if one."""

    empty: nn.Parameter
    places: list[tuple[nn.Module, str]]
    name: str
    station: int | None
    version: int

    def put(self, parameter: nn.Parameter) -> None:
        for owner, leaf in self.places:
            owner._parameters[leaf] = parameter

    def is_changed(self) -> bool:
        return self.empty._version != self.version


def _placed(
    model: nn.Module, path: str, name_of: Callable[[Iterable[str]], str]
) -> Iterator[_Tensor]:
    """The parameters that are not in memory, and where they belong."""
    depth = len(model.get_submodule(path))  # type: ignore[arg-type]
    ends = {id(m): station for station, end in _ends(model, depth).items() for m in end.modules()}
    prefix = path + "."

    def station_of(name: str, module: nn.Module) -> int | None:
        inside = name.startswith(prefix)
        return int(name[len(prefix) :].partition(".")[0]) if inside else ends.get(id(module))

    found: dict[int, tuple[nn.Parameter, list[str], list[tuple[nn.Module, str]]]] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                _, names, places = found.setdefault(id(parameter), (parameter, [], []))
                names.append(f"{owner}.{leaf}".lstrip("."))
                places.append((module, leaf))
    for parameter, names, places in found.values():
        pairs = zip(names, places, strict=True)
        stations = {station_of(name, module) for name, (module, _) in pairs}
        station = stations.pop() if len(stations) == 1 else None
        if all(any(tower in name for tower in OTHER_TOWERS) for name in names):
            station = TOWERS
        yield _Tensor(parameter, places, name_of(names), station, parameter._version)


def _ends(model: Any, depth: int) -> dict[int, nn.Module]:
    """The embedding and the head, by station: before and after all layers."""
    ends: dict[int, nn.Module] = {}
    for station, name in ((EMBEDDING, "get_input_embeddings"), (depth, "get_output_embeddings")):
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            ends[station] = module
    return ends


def _originals(stack: StreamedStack) -> list[nn.Module]:
    return [layer.layer if isinstance(layer, _Gate) else layer for layer in stack]


class _Stop(BaseException):
    """Ends a call because the sweep has ended."""


_thread = threading.local()


def _running() -> _Job | None:
    """The call that is running in this thread, if any."""
    job: _Job | None = getattr(_thread, "job", None)
    return job


class _Job:
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
        self, sweep: _Sweep, order: int, call: Callable[[], Any], parent: _Job | None, group: object
    ) -> None:
        self.sweep, self.order, self.parent, self.group = sweep, order, parent, group
        self.trace: Trace = ()
        self.bypassed: dict[int, _Bypass] = {}
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

    def serves(self, job: _Job) -> bool:
        """Whether another pass may have it too: all effects of the call are in it, unchanged."""
        if self.marks != _marks(self.answer):  # the pass that asked first has changed it since
            return False
        return self.pure if job.borrows is None else self.station < job.borrows


class _Sweep:
    """Many calls in step: station after station, each taking its turn at each."""

    def __init__(self, stack: StreamedStack) -> None:
        self.stack, self.store = stack, StateStore(stack.budget)
        self.baton = threading.Semaphore(0)  # who releases it lets the sweep go on
        self.stopping = False
        self._orders = count()
        self._jobs: list[_Job] = []
        self._new: deque[_Job] = deque()  # those that have not begun
        self._ready: deque[_Job] = deque()  # those whose own calls are done
        self._waiting: dict[int, list[tuple[int, _Job]]] = {}  # station -> heap
        self._shared: list[tuple[weakref.ref[torch.Tensor], int]] = []  # and its version

    def run(self, calls: Sequence[Callable[[], Any]], alike: bool) -> list[Any]:
        """What all calls return."""
        stack = self.stack
        with stack._gates(), stack._loaded(None):
            jobs = self.add(calls, alike, None)
            try:
                for station in progress(self._stations(), "Layers", total=len(stack) + 2):
                    with stack._loaded(station):
                        if station == EMBEDDING:  # a model may look at it before it calls it
                            self._begin()
                            stack._check_untouched()
                        self._serve_all(station)
            except BaseException:
                self._stop()
                raise
        return [job.take() for job in jobs]

    def add(
        self, calls: Sequence[Callable[[], Any]], alike: bool, parent: _Job | None
    ) -> list[_Job]:
        group = object() if alike else None
        jobs = [_Job(self, next(self._orders), call, parent, group) for call in calls]
        self._jobs += jobs
        self._new.extend(jobs)
        if parent is not None:
            parent.children = len(jobs)
        return jobs

    def enqueue(self, job: _Job) -> None:
        assert job.request is not None
        heapq.heappush(self._waiting.setdefault(job.request.station, []), (job.order, job))

    def _stations(self) -> Iterator[int]:
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
                self.store.restore(result.answer, for_good=True)
                self._shared += [(weakref.ref(x), x._version) for x in _tensors(result.answer)]
            if left[key] <= 0:
                results.pop(key, None)
            job.answer = result.answer
            del result
            job.trace = (*job.trace, station)
            self._resume(job)
            self._settle()
        self._check_shared()

    def _key(self, job: _Job) -> Any:
        """Equal for jobs whose passes have come the same way to the same place."""
        return None if job.group is None else (id(job.group), job.trace)

    def _answer(self, job: _Job) -> _Result:
        request = job.request
        assert request is not None
        given = request.args, request.kwargs
        self.store.restore(given)
        if any(tensor.is_meta for tensor in _tensors(given)):
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

    def _resume(self, job: _Job) -> None:
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


class _Gate(nn.Module):
    """Stands for a layer in a sweep: a pass waits here for its turn."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        # Not a submodule, so that walks over the modules do not find weights that are not there.
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "index", index)
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        index: int = self.__dict__["index"]
        job = _running()
        assert job is not None
        for places, entry in job.entries:
            if index in places:
                entry(index, _hidden_in(args, kwargs))
        if index in job.bypassed:
            job.trace = (*job.trace, ~index)
            if job.group is not None:  # the pass may change its own state, but not that of others
                args, kwargs = _with_own_state(args, kwargs)
            return job.bypassed[index](*args, **kwargs)
        output = job.ask(index, self.__dict__["layer"], args, kwargs)
        if job.observers:
            entering, leaving = _hidden_in(args, kwargs), _hidden_out(output)
            job.sweep.store.keep((entering, leaving))  # an observer may keep them too
            for observer in job.observers:
                observer(index, entering, leaving)
        return output

    def __getattr__(self, name: str) -> Any:
        job = _running()
        if name in STAND_IN_ANSWERS and job is not None and job.is_without(self.__dict__["index"]):
            return STAND_IN_ANSWERS[name]
        return getattr(self.__dict__["layer"], name)


def _with_own_state(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a layer with a copy of the hidden state."""
    hidden = _hidden_in(args, kwargs).clone()
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


@contextmanager
def _gated(module: nn.Module, station: int) -> Iterator[None]:
    """Inside the block the embedding or the head waits for its turn before it runs."""
    forward, before = module.forward, dict(vars(module))

    def wait(*args: Any, **kwargs: Any) -> Any:
        job = _running()
        assert job is not None
        return job.ask(station, forward, args, kwargs)

    module.forward = wait
    try:
        yield
    finally:
        del module.forward
        if "forward" in before:
            module.forward = before["forward"]


def _only_in_a_sweep(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Before a forward of the whole model: its inputs where its layers will be."""
    job = _running()
    if job is None:
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are not in memory: they are read layer by "
            f"layer, for scores and plans alone. {WAY_OUT}"
        )
    device = job.sweep.stack.device
    return send_to_device(args, device), send_to_device(kwargs, device)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _swappable(tensor: torch.Tensor) -> bool:
    """Whether nobody else sees the memory of a tensor, which lies in it as in a file."""
    storage = tensor.untyped_storage()
    alone = torch._C._storage_Use_Count(storage._cdata) == 2  # the tensor, and `storage` itself
    return alone and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes


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


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Inside the block a library's logger tells of errors alone."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _weights_index(model: nn.Module) -> dict[str, dict[str, str]]:
    """Where accelerate has found the parameters of a model that it offloads to the disk."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "weights_map", None) is not None:
                index: dict[str, dict[str, str]] = one.weights_map.dataset.index
                return index
    raise LoadError(f"The weights of this {type(model).__name__} are not in safetensors files.")
