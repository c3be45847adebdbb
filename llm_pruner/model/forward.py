"""Running a model: modes, devices, limits and cheap forward passes. No loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import InvalidDataError

NO_POSITION_LIMIT = 2**20
HINT = "activations are NaN or overflow. Check the checkpoint, or load it with dtype float32."


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # after inference_mode, cached buffers could not be trained
            yield
    finally:
        for module in training:
            module.training = True


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
