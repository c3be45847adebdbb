"""What an offloaded model runs in place of its layers: each pass waits there for its turn.

The model's own forward runs unmodified: only layers, embedding and head are replaced. Bypasses and
observers belong to the job that asked for them, and take effect here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from accelerate.utils import send_to_device
from torch import nn

from ..errors import UnsupportedModelError
from ..model.bypass import BYPASS_ANSWERS, hidden_in, hidden_out, with_hidden
from .scheduler import Job, running_job
from .weight_store import ends_of

WAY_OUT = (
    "Choose the layers with it, and remove them on disk, with llm_pruner.prune_checkpoint or the "
    "command."
)


class WaitingLayer(nn.Module):
    """Takes a layer's place: a pass waits here until the layer's weights are in memory."""

    layer: nn.Module
    index: int

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        # Not a submodule, so that walks over the modules find no weights that are not in memory.
        vars(self).update(layer=layer, index=index, training=layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns, or its bypass, when it is this pass's turn."""
        job, index = _this_job(), self.index
        if index in job.bypassed:
            job.trace = (*job.trace, ~index)
            if job.group is not None:  # the pass may change its own state, not that of others
                args, kwargs = with_hidden(args, kwargs, hidden_in(args, kwargs).clone())
            return job.bypassed[index](*args, **kwargs)
        output = job.ask(index, self.layer, args, kwargs)
        if job.records is not None:
            job.records[index] = (args, kwargs, output)
        if job.observers:
            before, after = hidden_in(args, kwargs), hidden_out(output)
            store = job.scheduler.store
            store.keep((before, after))  # an observer may keep them too
            for observer in job.observers:
                observer(index, before, after)
            store.restore(output)  # for what the model does with it before the next layer
        return output

    def __getattr__(self, name: str) -> Any:
        job = running_job()
        if name in BYPASS_ANSWERS and job is not None and job.skips(self.index):
            return BYPASS_ANSWERS[name]
        return getattr(self.layer, name)


@contextmanager
def waiting(model: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
    """Inside the block passes wait at every layer, at the embedding and at the head."""
    with ExitStack() as originals:
        for station, module in ends_of(model, len(layers)).items():
            if "forward" in vars(module):
                originals.callback(setattr, module, "forward", module.forward)
            else:
                originals.callback(delattr, module, "forward")
            module.forward = partial(_wait, station, module.forward)
        for index, layer in enumerate(list(layers)):
            originals.callback(layers.__setitem__, index, layer)
            layers[index] = WaitingLayer(layer, index)
        yield


def _wait(station: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _this_job().ask(station, forward, args, kwargs)


def _this_job() -> Job:
    job = running_job()
    assert job is not None
    return job


def before_forward(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A forward pre-hook: move the inputs to the layers' device; refuse passes outside a job."""
    job = running_job()
    if job is None:
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are not in memory: they are read layer by "
            f"layer, for scores and plans only. {WAY_OUT}"
        )
    device = job.scheduler.stack.device
    return send_to_device(args, device), send_to_device(kwargs, device)
