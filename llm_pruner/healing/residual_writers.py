"""What a layer adds to the residual stream, part by part: found by trial, not by name.

A decoder layer is x + w_1 + w_2 + ...: attention adds something, the feed-forward part adds
something, perhaps times a constant. A writer is the module that makes such a part. If its output is
shifted, and the parts added later are left out, the layer's output shifts in proportion; nothing
else does that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..data.tokens import Batch
from ..errors import UnsupportedModelError
from ..model.forward import evaluating
from ..model.layer_stack import LayerStack

PROBE = 4  # tokens that a trial runs on


@dataclass(frozen=True)
class Writer:
    """One part that a layer adds to the stream.

    Attributes:
        part: name, inside the layer, of the module whose output is added.
        tuned: name of the module whose weights set that part by a linear rule: a linear map, or
            the gain of a norm; None if there is none (experts).
        scale: what the part is multiplied by before it is added, 1 in most architectures.
        later: the writers of the parts that are added after this one.
    """

    part: str
    tuned: str | None
    scale: float
    later: tuple[Writer, ...]


class _Reached(Exception):
    """The layer of interest has run; what comes above it is not needed."""


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Inside the block ``hook(module, args, output)`` is called after the module."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_layers(
    stack: LayerStack, batch: Batch, first: int, last: int, entering: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a few layers on a batch; what enters the first and what leaves the last of them.

    Both are (sequences, tokens, hidden), as they are: padding included.

    Args:
        stack: the layers.
        batch: the tokens.
        first, last: 0-based, both included.
        entering: what enters layer `first`, if it is known and the model can begin there
            (`LayerStack.can_replay`); without it, all layers below run too.

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
    with ExitStack() as stands, evaluating(stack.model):
        if entering is not None and first > 0 and stack.can_replay:
            stands.enter_context(stack.replay(first, entering))
        stands.enter_context(stack.observe(watch))
        with suppress(_Reached):
            stack.model(**inputs, use_cache=False)
    if len(seen) < 2:
        raise UnsupportedModelError(
            f"Layers {first} to {last} of {type(stack.model).__name__} do not run on text alone."
        )
    return seen["entering"], seen["leaving"]


def find_writers(stack: LayerStack, index: int) -> list[Writer]:
    """The parts that layer `index` adds to the stream, in the order in which they are added.

    Parts that are added at once (attention and feed-forward part side by side) come in the order
    in which they are computed. Empty for a layer that does not end in a sum, as where a norm
    follows it (post-norm models).
    """
    return _Trial(stack, index).writers()


class _Trial:
    """Runs one layer again and again on a few tokens, parts of it shifted or left out."""

    def __init__(self, stack: LayerStack, index: int) -> None:
        self._stack, self._index, self._layer = stack, index, stack[index]
        ids = torch.tensor([range(PROBE)])
        self._batch = Batch(ids, torch.ones_like(ids), ids, (0,))
        self._entering: torch.Tensor | None = None
        _ = stack.can_replay  # found out by passes of its own, which are not to be shifted
        self._finished: dict[str, torch.Tensor] = {}  # part -> its output, in order of execution
        base = self._run({}, note=True)
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        self._shift = (shift * base.double().cpu().square().mean().sqrt()).to(base)

    def writers(self) -> list[Writer]:
        found: tuple[Writer, ...] = ()
        while scales := self._scales([writer.part for writer in found]):
            part = list(scales)[-1]
            muted = [part, *(writer.part for writer in found)]
            same = [name for name in scales if not self._matters(name, muted)]
            fit = (name for name in reversed(same) if is_tunable(self._layer.get_submodule(name)))
            found = (Writer(part, next(fit, None), scales[part], found), *found)
        return list(found)

    def _scales(self, later: Sequence[str]) -> dict[str, float]:
        """By how much the layer's output shifts as a module's does, without the parts `later`.

        Of the modules with which it shifts in proportion, in order of execution.
        """
        still = self._run(set(), later)
        scales: dict[str, float] = {}
        exact = self._shift.dtype in (torch.float32, torch.float64)
        shift = self._shift.double()
        for name in self._finished:
            if name in later:
                continue
            moved = (self._run({name}, later) - still).double()
            scale = float((moved * shift).sum() / shift.square().sum())
            off = float((moved - scale * shift).abs().max() / shift.abs().max())
            if abs(scale) > 1e-3 and off < (1e-4 if exact else 5e-2) * max(1.0, abs(scale)):
                scales[name] = scale
        return scales

    def _matters(self, name: str, later: Sequence[str]) -> bool:
        """Whether the module makes a difference at all, without the parts `later`."""
        return not torch.equal(self._run({name}, later), self._run(set(), later))

    def _run(
        self, shifted: set[str] | dict[str, Any], muted: Sequence[str] = (), note: bool = False
    ) -> torch.Tensor:
        """The layer's output, with some modules' outputs shifted and others' set to zero."""
        calls: Counter[str] = Counter()

        def hook(name: str) -> Callable[..., Any]:
            def call(module: nn.Module, args: Any, output: Any) -> Any:
                whole = output if isinstance(output, torch.Tensor) else None
                if whole is None and isinstance(output, tuple) and output:
                    whole = output[0] if isinstance(output[0], torch.Tensor) else None
                if whole is None:
                    return None
                if note:
                    self._finished[name] = whole
                    calls[name] += 1
                if name in muted:
                    whole = torch.zeros_like(whole)
                elif name in shifted and whole.numel() == self._shift.numel():
                    whole = whole + self._shift.view_as(whole)
                else:
                    return None
                if isinstance(output, torch.Tensor):
                    return whole
                build: Callable[..., Any] = getattr(type(output), "_make", tuple)  # a named tuple
                return build([whole, *output[1:]])

            return call

        watched = [
            (name, module)
            for name, module in self._layer.named_modules()
            if name and (note or name in shifted or name in muted)
        ]
        with ExitStack() as hooks:
            for name, module in watched:
                hooks.enter_context(hooked(module, hook(name)))
            self._entering, leaving = run_layers(
                self._stack, self._batch, self._index, self._index, self._entering
            )
        if note:
            self._finished = {
                name: part
                for name, part in self._finished.items()
                if part.numel() == leaving.numel()
                and part.shape[-1] == leaving.shape[-1]
                and calls[name] == 1  # one that is used twice makes no part of its own
            }
        return leaving


def is_tunable(module: nn.Module) -> bool:
    """Whether a module's output depends on its weights by a linear rule that is known.

    A plain linear map, or a norm whose gain is its one-dimensional ``weight``; tried out, so that
    quantised maps and others that do more are told apart.
    """
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return False
    if isinstance(module, nn.Linear | Conv1D):
        return weight.dim() == 2 and _is_plain(module, weight)
    return weight.dim() == 1 and _is_gain(module, weight)


def _is_plain(module: Any, weight: torch.Tensor) -> bool:
    matrix = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
    probe = torch.linspace(-1, 1, 2 * matrix.shape[1]).view(2, -1).to(weight)
    with torch.no_grad():
        return bool(torch.allclose(module(probe), linear(probe, matrix, module.bias), atol=1e-3))


def _is_gain(module: nn.Module, weight: torch.Tensor) -> bool:
    if not {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
        return False
    probe = torch.linspace(-1, 1, 2 * len(weight)).view(2, -1).to(weight)
    once, twice = gain_slope(module, probe), gain_slope(module, probe, 2.0) / 2
    return bool(torch.allclose(once.float(), twice.float(), rtol=0.05, atol=0.02))


def gain_slope(module: Any, entering: torch.Tensor, step: float = 1.0) -> torch.Tensor:
    """How a norm's output changes if its gain grows by `step`, channel by channel: its slope."""
    weight = module.weight
    with torch.no_grad():
        same: torch.Tensor = module.forward(entering)  # not by a call, which would run its hooks
        try:
            module.weight = nn.Parameter(weight + step, requires_grad=False)
            more: torch.Tensor = module.forward(entering)
        finally:
            module.weight = weight
    return more - same
