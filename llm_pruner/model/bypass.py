"""Bypasses: they return a layer's input in the form in which the layer returns its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Attributes that a bypass does not take from its layer: it begins no block of layers (inkling2).
BYPASS_ANSWERS = {"is_block_boundary": False}
Argument = int | str | None  # a positional argument, a keyword argument, or nothing


@dataclass(frozen=True)
class ReturnForm:
    """What a layer returns, and from which of its own inputs a bypass takes each part."""

    build: Callable[[list[Any]], Any] | None = None  # from its parts; None for a bare tensor
    sources: tuple[Argument, ...] = ()  # of each part: as which the next layer receives it

    @property
    def carried(self) -> int:
        """How many parts of the result the next layer takes; 0 for the last layer."""
        return sum(source is not None for source in self.sources)


def learn_forms(
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]], n_layers: int
) -> list[ReturnForm]:
    """Return forms from the inputs and outputs of the layers in one pass.

    A layer may return more than the hidden state (a router's state, attention indices). Where a
    part of its result reappears as an input of the next layer, a bypass passes on its own input of
    that name. The `calls` are by layer: positional arguments, keyword arguments and output.
    """
    forms: list[ReturnForm] = []
    for index in range(n_layers):
        output = calls[index][2] if index in calls else None
        if not isinstance(output, tuple | list):
            forms.append(ReturnForm())
            continue
        args, kwargs, _ = calls.get(index + 1, ((), {}, None))
        inputs = _arguments(args, kwargs)
        sources = tuple(
            None if part is None else next((k for k, v in inputs.items() if v is part), None)
            for part in output
        )
        build = getattr(type(output), "_make", type(output))  # of a named tuple, or not
        forms.append(ReturnForm(build, sources))
    known = {len(form.sources): form for form in forms if form.carried}
    return [form if form.carried else known.get(len(form.sources), form) for form in forms]


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Argument, Any]:
    inputs: dict[Argument, Any] = dict(enumerate(args))
    return inputs | dict(kwargs)


class Bypass(nn.Module):
    """Takes a layer's place: returns its input, and answers for every attribute like the layer.

    If the layer `adds`, its result is added to its input elsewhere, so that it has to be zero.
    """

    _layer: nn.Module

    def __init__(self, layer: nn.Module, form: ReturnForm, *, adds: bool = False) -> None:
        super().__init__()
        vars(self)["_layer"] = layer  # no submodule: its parameters must not be listed twice
        self._form, self._adds = form, adds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state among the arguments, in the form in which the layer returns it."""
        hidden = hidden_in(args, kwargs)
        if self._adds:
            hidden = torch.zeros_like(hidden)
        if self._form.build is None:
            return hidden
        inputs = _arguments(args, kwargs)
        parts = [None if source is None else inputs.get(source) for source in self._form.sources]
        if not self._form.carried:
            parts[0] = hidden
        return self._form.build(parts)

    def __getattr__(self, name: str) -> Any:
        if name in BYPASS_ANSWERS:
            return BYPASS_ANSWERS[name]
        return getattr(self._layer, name)


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state among a layer's arguments: (sequences, tokens, hidden)."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with another hidden state."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def hidden_out(output: Any) -> torch.Tensor:
    """The hidden state in what a layer returns: (sequences, tokens, hidden)."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden
