"""Running a model: modes, devices, limits and cheap forward passes. No loss."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..errors import InvalidDataError, ModelInUseError, UnsupportedModelError
from ..utils import logger

NO_POSITION_LIMIT = 2**20
WAIT_SILENTLY = 10.0  # seconds that a thread waits for a model before it says so
HINT = "activations are NaN or overflow. Check the checkpoint, or load it with dtype float32."


class _Lock:
    """Who is using a model: a thread, how often it has said so, and those who wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.owner: int | None = None
        self.depth = 0


class _Thread(threading.local):
    """Of this thread: the thread that it works for, and how many holds on models it has."""

    works_for: int | None = None
    holds = 0


_locks: weakref.WeakKeyDictionary[torch.nn.Module, _Lock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()
_thread = _Thread()


def owner() -> int:
    """The thread for which this one uses models: itself, unless `work_for` was called."""
    return _thread.works_for or threading.get_ident()


def work_for(thread: int) -> None:
    """Let this thread use what `thread` is using, which waits for it meanwhile."""
    _thread.works_for = thread


@contextmanager
def using(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block no other thread uses the model by this package: it waits for its end.

    Blocks of one thread may be nested.

    Raises:
        ModelInUseError: another thread uses it while this one uses another model; both would wait
            for each other if that thread came to need the other model.
    """
    with _locks_guard:
        lock = _locks.setdefault(model, _Lock())
    me = owner()
    with lock.changed:
        if lock.owner not in (None, me) and _thread.holds:
            raise ModelInUseError(
                f"Another thread is using this {type(model).__name__}: let one end before the "
                "other begins, or load the model once for each."
            )
        while lock.owner not in (None, me):
            if not lock.changed.wait(WAIT_SILENTLY):
                logger.warning("Waiting for another thread that is using the model.")
        lock.owner = me
        lock.depth += 1
    _thread.holds += 1
    try:
        yield
    finally:
        _thread.holds -= 1
        with lock.changed:
            lock.depth -= 1
            if not lock.depth:
                lock.owner = None
                lock.changed.notify()


@contextmanager
def undoing() -> Iterator[list[Any]]:
    """A list for calls that are made when the block ends, from the last to the first.

    All are made, whatever is raised and whenever an interrupt comes; a call may be made twice.
    """
    back: list[Any] = []
    try:
        yield back
    finally:
        try:
            _undo(back)
        finally:  # also if the interrupt came before its first line
            _undo(back)


def _undo(steps: list[Any]) -> None:
    interrupt: BaseException | None = None
    while steps:
        try:
            while steps:
                steps[-1]()
                steps.pop()
        except BaseException as error:
            if interrupt is not None:  # a step that fails by itself
                raise
            interrupt = error
    if interrupt is not None:
        raise interrupt


def hook_before(back: list[Any], layer: torch.nn.Module, hook: Any) -> None:
    """Call ``hook(layer, args, kwargs)`` before a layer runs; see `hook_after`."""
    back.append(partial(_forget, layer._forward_pre_hooks, hook))
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def hook_after(back: list[Any], layer: torch.nn.Module, hook: Any) -> None:
    """Call ``hook(layer, args, kwargs, output)`` after a layer has run.

    What takes it away again is noted in `back` first: no interrupt comes between.
    """
    back.append(partial(_forget, layer._forward_hooks, hook))
    layer.register_forward_hook(hook, with_kwargs=True)


def _forget(hooks: Any, hook: Any) -> None:
    """Remove a hook, if it is there."""
    for number in [number for number, known in hooks.items() if known is hook]:
        del hooks[number]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; both are restored afterwards, whatever interrupts.

    Raises:
        ModelInUseError: see `using`.
    """
    with using(model), undoing() as back:
        training = [module for module in model.modules() if module.training]
        back += [partial(setattr, module, "training", True) for module in training]
        back.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
        model.eval()
        with torch.no_grad():  # after inference_mode, cached buffers could not be trained
            yield


@contextmanager
def keeping_state(model: torch.nn.Module) -> Iterator[None]:
    """What a pass leaves on the modules, such as the positions of an image, is taken back."""
    before = [(module, _state(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, state in before:
            for name, value in state.items():
                if vars(module).get(name) is not value:
                    setattr(module, name, value)


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The attributes of a module that are tensors, or may become one."""
    plain = ((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    return {name: value for name, value in plain if value is None or torch.is_tensor(value)}


def computed(output: Any) -> torch.Tensor:
    """What a model computes: logits, or hidden states where it has no head; labels or tokens."""
    logits = getattr(output, "logits", None)
    found: torch.Tensor = output.last_hidden_state if logits is None else logits
    return found


def require_language_model(model: Any, purpose: str) -> None:
    """Raise UnsupportedModelError if `purpose` needs the likelihood of tokens, and there is none.

    Classifiers, reward models and embedding models have no language model's head.
    """
    head = getattr(model, "get_output_embeddings", None)
    generates = getattr(model, "can_generate", None)
    if head is not None and head() is None and not (generates and generates()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language model's head, and {purpose} needs one. avss, "
            "bi and pruneme choose without it, in scripts (plan without held_out, then "
            "prune_and_save); so do layers that you name (--layers)."
        )


def refuse_adapters(model: Any) -> None:
    """Raise UnsupportedModelError for a model that peft has wrapped, or put adapters into."""
    wrapped = type(model).__module__.partition(".")[0] == "peft"
    if wrapped or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries adapters of peft, whose weights belong to single "
            "layers: merge them first, model = model.merge_and_unload()."
        )


def require_loaded(model: Any) -> None:
    """Raise UnsupportedModelError for a model that was built without weights, on the meta device.

    Those that accelerate keeps elsewhere come back when they are needed.
    """
    empty = any(parameter.is_meta for parameter in model.parameters())
    if empty and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights (it is on the meta device): load them, with "
            "from_pretrained or load_model."
        )


def forward_options(model: torch.nn.Module, logits_to_keep: int | None = None) -> dict[str, Any]:
    """Arguments that keep a forward pass cheap, as far as the model accepts them.

    No cache, and only the logits of the last `logits_to_keep` positions if that is given.
    """
    wanted: dict[str, Any] = {"use_cache": False}
    if logits_to_keep is not None:
        wanted["logits_to_keep"] = logits_to_keep
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in wanted.items() if name in accepted}


def input_device(model: Any) -> torch.device:
    """Where token ids have to be: with the embedding, or on the CPU if it is offloaded."""
    device: torch.device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def check_ids(model: Any, ids: torch.Tensor) -> None:
    """Raise InvalidDataError if `ids` holds a token that the model does not have."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and int(ids.max()) >= known:
        raise InvalidDataError(
            f"Token id {int(ids.max())} is outside the model's vocabulary (0 to {known - 1}): the "
            "tokenizer belongs to another model. Load both from the same checkpoint."
        )


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


def position_limit(model: Any) -> int:
    """The longest sequence the model's config allows, in tokens."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if limit and limit > 0), NO_POSITION_LIMIT)
