"""Inputs that two models are compared on."""

from __future__ import annotations

from typing import Any

import torch

from .forward import input_device, position_limit

PROBE_TOKENS = 16


def probe_inputs(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Text."""
    config = model.config.get_text_config(decoder=True)
    length = min(PROBE_TOKENS, position_limit(model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    return {"text": {"input_ids": ids.to(input_device(model))}}
