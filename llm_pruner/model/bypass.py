"""Bypasses: stand-ins that hand on what enters a layer, in the form the layer returns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# What a stand-in answers differently from its layer: it begins no block of layers (inkling2).
STAND_IN_ANSWERS = {"is_block_boundary": False}
Source = int | str | None  # a positional argument, a keyword argument, or nothing


@dataclass(frozen=True)
class ReturnForm:
    """What a layer returns, and from which of its own inputs a stand-in takes each part.

    Attributes:
        build: makes the layer's kind of result from the parts; None for a bare tensor.
        sources: for each part, the input that the next layer would get it as.
    """

    build: Callable[[list[Any]], Any] | None = None
    sources: tuple[Source, ...] = ()


def learn_forms(
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]], n_layers: int
) -> list[ReturnForm]:
    """Return forms from what went in and out of the layers in one pass.

    A layer may return more than the hidden state, and some of it is carried to the next layer
    (a router's state, attention indices). Where part j of a result reappears as an input of the
    next layer, a stand-in has to hand its own such input on.
    """
    forms: list[ReturnForm] = []
    for index in range(n_layers):
        output = calls[index][2] if index in calls else None
        if not isinstance(output, tuple | list):
            forms.append(ReturnForm())
            continue
        args, kwargs, _ = calls.get(index + 1, ((), {}, None))
        inputs = _by_source(args, kwargs)
        sources = tuple(
            None if part is None else next((k for k, v in inputs.items() if v is part), None)
            for part in output
        )
        forms.append(ReturnForm(_builder(output), sources))
    known = {len(form.sources): form for form in forms if form.sources and _goes_on(form)}
    return [
        form if not form.sources or _goes_on(form) else known.get(len(form.sources), form)
        for form in forms
    ]


def _goes_on(form: ReturnForm) -> bool:
    """Whether anything the layer returns was seen to go on (not so for the last layer)."""
    return any(source is not None for source in form.sources)


def _builder(output: tuple[Any, ...] | list[Any]) -> Callable[[list[Any]], Any]:
    kind: Any = type(output)
    build: Callable[[list[Any]], Any] = getattr(kind, "_make", kind)  # of a named tuple, or not
    return build


def _by_source(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Source, Any]:
    inputs: dict[Source, Any] = dict(enumerate(args))
    inputs.update(kwargs)
    return inputs


class Bypass(nn.Module):
    """Stands in for a layer: hands its input on, answers every attribute like the layer.

    Args:
        layer: the layer.
        form: how the layer returns its result.
        adds: whether its result is added to its input elsewhere, so that it has to be zero.
    """

    def __init__(self, layer: nn.Module, form: ReturnForm, *, adds: bool = False) -> None:
        super().__init__()
        # Not a submodule: the layer's parameters must not appear a second time.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_form", form)
        object.__setattr__(self, "_adds", adds)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state among the arguments, in the form in which the layer returns it."""
        hidden = hidden_in(args, kwargs)
        if self.__dict__["_adds"]:
            hidden = torch.zeros_like(hidden)
        form: ReturnForm = self.__dict__["_form"]
        if form.build is None:
            return hidden
        inputs = _by_source(args, kwargs)
        parts = [None if source is None else inputs.get(source) for source in form.sources]
        if not _goes_on(form):
            parts[0] = hidden
        return form.build(parts)

    def __getattr__(self, name: str) -> Any:
        if name in STAND_IN_ANSWERS:
            return STAND_IN_ANSWERS[name]
        return getattr(self.__dict__["_layer"], name)


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state among a layer's arguments: (sequences, tokens, hidden)."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def hidden_out(output: Any) -> torch.Tensor:
    """The hidden state in what a layer returns: (sequences, tokens, hidden)."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden
