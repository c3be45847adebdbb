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
    """What a layer returns, and from which of its own inputs a bypass takes each part.

    Attributes:
        build: makes the layer's kind of result from its parts; None for a bare tensor.
        sources: for each part, the argument as which the next layer receives it.
    """

    build: Callable[[list[Any]], Any] | None = None
    sources: tuple[Argument, ...] = ()

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
    that name.

    Args:
        calls: by layer, its positional arguments, keyword arguments and output.
        n_layers: how many layers there are.
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

    Args:
        layer: the layer.
        form: how the layer returns its result.
        adds: whether the result is added to the input elsewhere, so that it has to be zero.
    """

    def __init__(self, layer: nn.Module, form: ReturnForm, *, adds: bool = False) -> None:
        super().__init__()
        # Not a submodule: the layer's parameters must not be listed twice.
        vars(self).update(_layer=layer, _form=form, _adds=adds)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state among the arguments, in the form in which the layer returns it."""
        hidden = hidden_in(args, kwargs)
        if self.__dict__["_adds"]:
            hidden = torch.zeros_like(hidden)
        form: ReturnForm = self.__dict__["_form"]
        if form.build is None:
            return hidden
        inputs = _arguments(args, kwargs)
        parts = [None if source is None else inputs.get(source) for source in form.sources]
        if not form.carried:
            parts[0] = hidden
        return form.build(parts)

    def __getattr__(self, name: str) -> Any:
        if name in BYPASS_ANSWERS:
            return BYPASS_ANSWERS[name]
        return getattr(self.__dict__["_layer"], name)


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
