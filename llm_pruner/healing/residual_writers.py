"""What a layer adds to the residual stream, part by part; found by trial, not by name.

A decoder layer computes x + w_1 + w_2 + ...: attention adds a part, the feed-forward network adds
a part, perhaps times a constant. A writer is the module that makes such a part. Shift its output,
with all later parts set to zero, and the layer's output shifts in proportion. Nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..data.tokens import Batch
from ..errors import UnsupportedModelError
from ..model.forward import evaluating
from ..model.layer_stack import LayerStack

PROBE = 4  # tokens that a trial runs on
Change = Callable[[torch.Tensor], torch.Tensor | None]  # None: leave the output as it is


@dataclass(frozen=True)
class Writer:
    """One part that a layer adds to the residual stream.

    Attributes:
        part: name, inside the layer, of the module whose output is added.
        tuned: name of the module whose weights determine that part by a linear rule: a linear map,
            or the gain of a norm; None if there is none (experts).
        scale: what the part is multiplied by before it is added, 1 in most architectures.
        later: the writers of the parts that are added after this one.
    """

    part: str
    tuned: str | None
    scale: float
    later: tuple[Writer, ...]


class _Reached(Exception):
    """The last layer of interest has run; those above it need not."""


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, call ``hook(module, args, output)`` after the module."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_layers(
    stack: LayerStack, batch: Batch, first: int, last: int, entering: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run some layers on a batch; return what enters the first and what leaves the last of them.

    Both are (sequences, tokens, hidden), padding included.

    Args:
        first, last: 0-based, both included.
        entering: what enters layer `first`, if known. Without it, or where a pass cannot start
            there (`LayerStack.can_replay`), all layers below run too.

    Raises:
        UnsupportedModelError: the layers do not run, or are not one list.
    """
    seen: dict[str, torch.Tensor] = {}

    def watch(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if index == first:
            seen["entering"] = before
        if index == last:
            seen["leaving"] = after
            raise _Reached

    inputs = batch.to(stack.device).inputs()
    with ExitStack() as stack_changes, evaluating(stack.model):
        if entering is not None and first > 0 and stack.can_replay:
            stack_changes.enter_context(stack.replay(first, entering))
        stack_changes.enter_context(stack.observe(watch))
        with suppress(_Reached):
            stack.model(**inputs, use_cache=False)
    if len(seen) < 2:
        raise UnsupportedModelError(
            f"Layers {first} to {last} of {type(stack.model).__name__} do not run on text alone."
        )
    return seen["entering"], seen["leaving"]


def find_writers(stack: LayerStack, index: int) -> list[Writer]:
    """The parts that layer `index` adds to the residual stream, in the order of addition.

    Parts added at once (attention and feed-forward network side by side) come in the order of
    computation. None in a layer that does not end in a sum, as where a norm follows (post-norm).
    """
    return _Trial(stack, index).writers()


class _Trial:
    """Runs one layer repeatedly on a few tokens, with the outputs of some modules changed."""

    def __init__(self, stack: LayerStack, index: int) -> None:
        self._stack, self._index, self._layer = stack, index, stack[index]
        ids = torch.tensor([range(PROBE)])
        self._batch = Batch(ids, torch.ones_like(ids), ids, (0,))
        self._entering: torch.Tensor | None = None
        _ = stack.can_replay  # tested by passes of its own, which must run unchanged
        outputs: dict[str, list[torch.Tensor]] = {}  # module -> outputs, in order of execution

        def record(name: str, output: torch.Tensor) -> None:
            outputs.setdefault(name, []).append(output)

        names = [name for name, _ in self._layer.named_modules() if name]
        base = self._run({name: partial(record, name) for name in names})
        # A module that runs twice makes no part by itself.
        self._names = [
            name
            for name, (out, *more) in outputs.items()
            if not more and out.numel() == base.numel() and out.shape[-1] == base.shape[-1]
        ]
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        self._shift = (shift * base.double().cpu().square().mean().sqrt()).to(base)

    def writers(self) -> list[Writer]:
        """The parts from the last to the first; each is found with those after it set to zero."""
        found: tuple[Writer, ...] = ()
        while scales := self._scales([writer.part for writer in found]):
            part = list(scales)[-1]
            zeroed = [part, *(writer.part for writer in found)]
            still = self._leaving(zeroed)
            within = [name for name in scales if torch.equal(self._leaving(zeroed, name), still)]
            tuned = (n for n in reversed(within) if is_tunable(self._layer.get_submodule(n)))
            found = (Writer(part, next(tuned, None), scales[part], found), *found)
        return list(found)

    def _scales(self, zeroed: Sequence[str]) -> dict[str, float]:
        """The modules in whose proportion the layer's output shifts, and the factor.

        In order of execution; the modules `zeroed` add nothing.
        """
        still, shift = self._leaving(zeroed), self._shift.double()
        exact = self._shift.dtype in (torch.float32, torch.float64)
        scales: dict[str, float] = {}
        for name in [name for name in self._names if name not in zeroed]:
            moved = (self._leaving(zeroed, name) - still).double()
            scale = float((moved * shift).sum() / shift.square().sum())
            error = float((moved - scale * shift).abs().max() / shift.abs().max())
            if abs(scale) > 1e-3 and error < (1e-4 if exact else 5e-2) * max(1.0, abs(scale)):
                scales[name] = scale
        return scales

    def _leaving(self, zeroed: Sequence[str], shifted: str | None = None) -> torch.Tensor:
        """The layer's output with some modules' outputs set to zero and another's shifted."""
        changes: dict[str, Change] = dict.fromkeys(zeroed, torch.zeros_like)
        if shifted is not None:
            changes.setdefault(shifted, lambda output: output + self._shift.view_as(output))
        return self._run(changes)

    def _run(self, changes: Mapping[str, Change]) -> torch.Tensor:
        def hook(change: Change, module: nn.Module, args: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) and output else output
            changed = change(whole) if isinstance(whole, torch.Tensor) else None
            if changed is None or whole is output:
                return changed
            build: Callable[..., Any] = getattr(type(output), "_make", tuple)  # a named tuple
            return build([changed, *output[1:]])

        with ExitStack() as hooks:
            for name, change in changes.items():
                hooks.enter_context(hooked(self._layer.get_submodule(name), partial(hook, change)))
            self._entering, leaving = run_layers(
                self._stack, self._batch, self._index, self._index, self._entering
            )
        return leaving


def is_tunable(module: nn.Module) -> bool:
    """Whether a module's output depends on its weights by a known linear rule.

    That is a plain linear map, or a norm whose gain is its one-dimensional ``weight``. The module
    is tried on a probe, which tells quantised maps and others apart.
    """
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return False
    is_map = isinstance(module, nn.Linear | Conv1D)
    if weight.dim() != (2 if is_map else 1):
        return False
    matrix = weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()
    probe = torch.linspace(-1, 1, 2 * matrix.shape[-1]).view(2, -1).to(weight)
    if is_map:
        bias: Any = module.bias
        with torch.no_grad():
            return bool(torch.allclose(module(probe), linear(probe, matrix, bias), atol=1e-3))
    if not {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
        return False
    once, twice = gain_slope(module, probe), gain_slope(module, probe, 2.0) / 2
    return bool(torch.allclose(once.float(), twice.float(), rtol=0.05, atol=0.02))


def gain_slope(module: Any, entering: torch.Tensor, step: float = 1.0) -> torch.Tensor:
    """How a norm's output changes, channel by channel, when its gain grows by `step`."""
    weight = module.weight
    with torch.no_grad():
        same: torch.Tensor = module.forward(entering)  # a call would run its hooks
        try:
            module.weight = nn.Parameter(weight + step, requires_grad=False)
            more: torch.Tensor = module.forward(entering)
        finally:
            module.weight = weight
    return more - same
