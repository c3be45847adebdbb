"""Models larger than the memory: layer by layer from the checkpoint, many forward passes at once.

`load_streamed` makes a model without weights; `StreamedStack` is its `LayerStack`, with which
strategies work as with any other, as long as they run the model in `LayerStack.sweep`.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from ..errors import InvalidPlanError, LoadError, UnsupportedModelError
from ..model.bypass import Bypass, ReturnForm, learn_forms
from ..model.forward import evaluating
from ..model.layer_stack import Entry, LayerStack, Observer
from ..model.loading import load_model, model_class, read_model
from ..results import check_layers
from ..utils import count_bytes, explain_load_failure, format_bytes, get_device, logger
from .scheduler import Job, Sweep, running_job
from .waiting_layers import WAY_OUT, Gate, gated, only_in_a_sweep
from .weight_store import Stations, Weights, weights_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROOM = 3 * 2**28  # beside weights and waiting states: interpreter, libraries, one batch's work
T = TypeVar("T")


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
    if place.type == "cuda" and place.index is None:  # every thread has a current device of its own
        place = torch.device("cuda", torch.cuda.current_device())
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
    index = weights_index(model)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():  # each keeps a reference to its own method otherwise
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(place)
    model.register_forward_pre_hook(only_in_a_sweep, with_kwargs=True)
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
        self._stations = Stations(model, self.paths[0], self._weights)
        self._dependent: bool | None = None
        self.budget = self._left_for_states(source.max_memory)

    def _left_for_states(self, max_memory: int | None) -> int | None:
        sizes = self._stations.sizes
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
        calls, running = list(calls), running_job()
        if not calls:
            return
        if running is not None and running.sweep.stack is self:
            sweep, results = running.sweep, running.fork(calls, alike)
        else:
            sweep = Sweep(self, self._stations, self.budget)
            with gated(self.model, self._list):
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
        self._forms[self.paths[0]] = learn_forms(calls, len(self))
        self._dependent = len(calls) < len(self) or any(
            other is None or not torch.allclose(other, whole, rtol=1e-4, atol=1e-5, equal_nan=True)
            for other in others
        )

    def _return_forms(self, path: str | None = None) -> list[ReturnForm]:
        self.prepare()
        return super()._return_forms(path)

    def _job(self) -> Job:
        """The call that is running in this thread."""
        job = running_job()
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
        job.bypassed = {index: Bypass(layers[index], forms[index]) for index in mask}
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


@dataclass(frozen=True)
class _Source:
    """Where a streamed model's weights are, and how many bytes the process may take."""

    weights: Weights
    max_memory: int | None


_SOURCES: weakref.WeakKeyDictionary[nn.Module, _Source] = weakref.WeakKeyDictionary()


def _originals(stack: StreamedStack) -> list[nn.Module]:
    return [layer.layer if isinstance(layer, Gate) else layer for layer in stack]


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
