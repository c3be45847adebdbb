"""Models larger than the memory: sequential offload, with many forward passes in step.

`load_streamed` makes a model without weights; `OffloadedStack` is its `LayerStack`. Strategies have
to run such a model in `LayerStack.run_all`.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from ..errors import InvalidPlanError, LoadError, UnsupportedModelError
from ..model.bypass import Bypass, ReturnForm, learn_forms
from ..model.forward import evaluating
from ..model.layer_stack import LayerStack, Observer
from ..model.loading import empty_model, load_model, read_model
from ..results import check_layers
from ..utils import count_bytes, format_bytes, get_device, logger, quiet_logger
from .scheduler import Job, Scheduler, running_job
from .waiting_layers import WAY_OUT, before_forward, waiting
from .weight_store import Stations, Weights, weights_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROOM = 3 * 2**28  # bytes beside weights and waiting states: interpreter, libraries, one batch
T = TypeVar("T")
# Every offloaded model: where its weights are, and how many bytes the process may take.
_OFFLOADED: weakref.WeakKeyDictionary[nn.Module, tuple[Weights, int | None]] = (
    weakref.WeakKeyDictionary()
)


def load_streamed(
    model_id: str,
    *,
    max_memory: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose weights stay in its safetensors files, and its tokenizer.

    Strategies score and plan with it as with any other: a layer's weights are read when it is its
    turn. Anything that needs the model in memory (removing, healing, generating) refuses it.

    Args:
        model_id: ``demo``, a local folder, or an id on the Hugging Face hub.
        max_memory: bytes that the process may take; no limit if None. Hidden states that do not fit
            wait in temporary files (in ``TMPDIR``). If not even one layer fits, the model is
            refused when a strategy is made for it.
        device: where layers and states are while they are used; the best device if None.
        dtype, trust_remote_code: see `load_model`.

    Raises:
        LoadError: the model cannot be found or read, or is not stored as plain safetensors.
    """
    target = torch.device(device or get_device())
    if target.type == "cuda" and target.index is None:  # the current device is that of a thread
        target = torch.device("cuda", torch.cuda.current_device())
    folder = tempfile.TemporaryDirectory(prefix="llm-pruner-")  # for tensors that are converted
    with quiet_logger("accelerate.big_modeling"):  # it warns of offloading, which is wanted here
        model, tokenizer = read_model(
            model_id,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            device_map={"": "disk"},
            offload_folder=folder.name,
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise LoadError(
            f"Cannot offload model {model_id!r}: its weights are quantised. Give the checkpoint "
            "that it was made from, or load it whole."
        )
    index = weights_index(model)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():  # otherwise each keeps a reference cycle through its method
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(target)
    model.register_forward_pre_hook(before_forward, with_kwargs=True)
    _OFFLOADED[model] = Weights(index, target, folder), max_memory
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
    """`load_model` if the model fits into `max_memory` bytes, otherwise `load_streamed`.

    Raises:
        LoadError: see both.
    """
    torch_dtype = None if dtype == "auto" else getattr(torch, dtype)
    empty = empty_model(model_id, dtype=torch_dtype, trust_remote_code=trust_remote_code)
    size = count_bytes(empty)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if size + ROOM <= max_memory:
        logger.info("%s of weights fit into memory.", format_bytes(size))
        return load_model(model_id, **how)
    logger.info(
        "%s of weights and %s to work with exceed %s: layers are read one at a time.",
        format_bytes(size),
        format_bytes(ROOM),
        format_bytes(max_memory),
    )
    return load_streamed(model_id, max_memory=max_memory, **how)


def layers_of(model: nn.Module, path: str | None = None) -> LayerStack:
    """The layers of a model, in memory or offloaded; see `LayerStack`.

    Raises:
        UnsupportedModelError: they are not found, or cannot be offloaded.
        InvalidPlanError: not even one layer fits into the memory allowed.
    """
    stack = OffloadedStack if model in _OFFLOADED else LayerStack
    return stack(model, path)


class OffloadedStack(LayerStack):
    """The layers of a model that `load_streamed` returned; see `LayerStack`.

    Forward passes run inside `run_all`. There `bypass` and `observe` concern only the passes of the
    call that uses them.

    Attributes:
        budget: bytes that waiting hidden states may take; None for no limit.

    Raises:
        UnsupportedModelError: the layers are not one list.
        InvalidPlanError: not even one layer fits into the memory allowed.
    """

    def __init__(self, model: nn.Module, path: str | None = None) -> None:
        super().__init__(model, path)
        if len(self.paths) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} has its layers in several lists ({self.paths}), which "
                "cannot be offloaded: load it whole, without a limit of memory."
            )
        self._weights, max_memory = _OFFLOADED[model]
        self._stations = Stations(model, self.names, self._weights)
        self._dependent: bool | None = None
        sizes = self._stations.sizes
        always = sizes.pop(None, 0)
        least = always + max(sizes.values(), default=0) + ROOM
        if max_memory is not None and max_memory < least:
            raise InvalidPlanError(
                f"{format_bytes(max_memory)} of memory are not enough for this model: one layer at "
                f"a time takes {format_bytes(least)}, of which {format_bytes(always)} are weights "
                f"that all layers need and {format_bytes(ROOM)} are needed to work with. Allow "
                "that much, or load it with a smaller dtype."
            )
        self.budget = None if max_memory is None else max_memory - least

    @property
    def device(self) -> torch.device:
        return self._weights.device

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far, as stored in the files."""
        return self._weights.bytes_read

    @cached_property
    def fingerprint(self) -> str:
        return self._weights.fingerprint(self.model)

    @property
    def offloaded(self) -> bool:
        return True

    def require_weights(self, purpose: str) -> None:
        raise UnsupportedModelError(
            f"The weights of this {type(self.model).__name__} are read from disk layer by layer, "
            f"which does not work for {purpose}. {WAY_OUT}"
        )

    @property
    def can_bypass(self) -> bool:
        self.prepare()
        return not self._dependent and self._passes_one_state()

    def run_all(self, calls: Iterable[Callable[[], T]], *, alike: bool = False) -> Iterator[T]:
        """All calls in step, layer by layer; see `LayerStack.run_all`.

        Every weight is read once for the first passes of all calls, once for the second ones, and
        so on. A call may itself use `run_all`. Calls that are `alike` share a layer's result as
        long as they have bypassed the same layers.

        Raises:
            LoadError: a weight cannot be read.
            OutputError: there is no space for hidden states that wait.
            UnsupportedModelError: the model changes its weights as it runs.
            BaseException: what a call raised; the other calls are ended.
        """
        calls, running = list(calls), running_job()
        if not calls:
            return
        if running is not None and running.scheduler.stack is self:
            scheduler, results = running.scheduler, running.fork(calls, alike)
        else:
            scheduler = Scheduler(self, self._stations, self.budget)
            with waiting(self.model, self._list):
                results = scheduler.run(calls, alike)
        results.reverse()
        while results:  # so that each is freed when the caller is done with it
            result = results.pop()
            scheduler.store.restore(result)
            yield result

    def prepare(self) -> None:
        """Learn how layers return and whether they are independent, from passes of two tokens."""
        if self._dependent is not None:
            return
        calls: dict[int, Any] = {}

        def probe(borrows: int) -> torch.Tensor | None:
            job = self._job()
            job.borrows, job.records = borrows, calls if not borrows else None
            with evaluating(self.model):
                try:
                    logits: torch.Tensor = self._probe().logits
                    return logits
                except (LookupError, TypeError, AttributeError):  # lower layers did not run
                    if not borrows:
                        raise
                    return None

        starts = sorted({len(self) // 2, len(self) - 1})
        whole, *others = self.run_all([partial(probe, n) for n in (0, *starts)], alike=True)
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
        job = running_job()
        if job is None or job.scheduler.stack is not self:
            raise UnsupportedModelError(
                f"The weights of this {type(self.model).__name__} are read layer by layer: run the "
                "model in a function that is given to stack.run_all([...])."
            )
        return job

    @contextmanager
    def bypass(self, indices: Iterable[int]) -> Iterator[nn.Module]:
        """Inside the block the passes of this call bypass the layers; see `LayerStack.bypass`."""
        removed = check_layers(indices, len(self))
        job = self._job()
        forms = self._return_forms() if removed else []
        job.bypassed = {
            index: Bypass(vars(self[index])["layer"], forms[index]) for index in removed
        }
        try:
            yield self.model
        finally:
            job.bypassed = {}

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Observe the passes of this call; see `LayerStack.observe`. It may keep what it sees."""
        observers = self._job().observers
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)
