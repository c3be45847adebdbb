"""What a pass of a sweep meets in place of the layers, the embedding and the head: it waits there.

The model's own forward runs unmodified; only what it calls at the stations is exchanged while a
sweep runs. What a call has asked for, bypassed layers and observers, is its job's and is done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate.utils import send_to_device
from torch import nn

from ..errors import UnsupportedModelError
from ..model.bypass import STAND_IN_ANSWERS, hidden_in, hidden_out
from .scheduler import running_job
from .weight_store import ends_of

WAY_OUT = (
    "Choose the layers so, and remove them on the disk, by llm_pruner.prune_checkpoint or the "
    "command."
)


class Gate(nn.Module):
    """Stands for a layer in a sweep: a pass waits here for its turn."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        # Not a submodule, so that walks over the modules do not find weights that are not there.
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "index", index)
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns, or its stand-in, once it is this pass's turn."""
        index: int = self.__dict__["index"]
        job = running_job()
        assert job is not None
        for places, entry in job.entries:
            if index in places:
                entry(index, hidden_in(args, kwargs))
        if index in job.bypassed:
            job.trace = (*job.trace, ~index)
            if job.group is not None:  # the pass may change its own state, but not that of others
                args, kwargs = _with_own_state(args, kwargs)
            return job.bypassed[index](*args, **kwargs)
        output = job.ask(index, self.__dict__["layer"], args, kwargs)
        if job.observers:
            entering, leaving = hidden_in(args, kwargs), hidden_out(output)
            job.sweep.store.keep((entering, leaving))  # an observer may keep them too
            for observer in job.observers:
                observer(index, entering, leaving)
            job.sweep.store.restore(output)  # for what the model does with it before the next layer
        return output

    def __getattr__(self, name: str) -> Any:
        job = running_job()
        if name in STAND_IN_ANSWERS and job is not None and job.is_without(self.__dict__["index"]):
            return STAND_IN_ANSWERS[name]
        return getattr(self.__dict__["layer"], name)


def _with_own_state(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a layer with a copy of the hidden state."""
    hidden = hidden_in(args, kwargs).clone()
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


@contextmanager
def gated(model: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
    """Gates in place of the layers, and around the embedding and the head."""
    originals = list(layers)
    with ExitStack() as stations:
        for station, module in ends_of(model, len(originals)).items():
            stations.enter_context(_waiting(module, station))
        try:
            for index, layer in enumerate(originals):
                layers[index] = Gate(layer, index)
            yield
        finally:
            for index, layer in enumerate(originals):
                layers[index] = layer


@contextmanager
def _waiting(module: nn.Module, station: int) -> Iterator[None]:
    """Inside the block the embedding or the head waits for its turn before it runs."""
    forward, before = module.forward, dict(vars(module))

    def wait(*args: Any, **kwargs: Any) -> Any:
        job = running_job()
        assert job is not None
        return job.ask(station, forward, args, kwargs)

    module.forward = wait
    try:
        yield
    finally:
        del module.forward
        if "forward" in before:
            module.forward = before["forward"]


def only_in_a_sweep(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Before a forward of the whole model: its inputs where its layers will be."""
    job = running_job()
    if job is None:
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are not in memory: they are read layer by "
            f"layer, for scores and plans alone. {WAY_OUT}"
        )
    device = job.sweep.stack.device
    return send_to_device(args, device), send_to_device(kwargs, device)
