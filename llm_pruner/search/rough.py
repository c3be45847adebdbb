"""A model in reduced precision, to measure with where the last digits do not matter."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ..distributed import on_first
from ..model.forward import computed, evaluating
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy
from ..utils import count_parameters, logger

SMALLEST = 2**25  # parameters of a model that is worth a copy
FASTER = 1.25  # times that a product of matrices has to be
ROWS, TRIALS = 256, 3


def reduced(stack: LayerStack) -> LayerStack | None:
    """The layers of a copy of the model in bfloat16; None where that would not be faster.

    A model in float32 is copied if it has at least `SMALLEST` parameters and its device is faster
    in bfloat16, which is tried out on one of its matrices. The copy takes half of its memory.
    """
    model: Any = stack.model
    kinds = {one.dtype for one in model.parameters()}
    if stack.offloaded or kinds != {torch.float32} or count_parameters(model) < SMALLEST:
        return None
    matrix = max((one for one in stack[0].parameters() if one.dim() == 2), key=torch.numel)
    if not on_first(lambda: _is_faster(matrix)):  # all processes do the same
        return None
    rough = share_copy(model)
    known: dict[int, nn.Parameter] = {}  # tied tensors stay tied
    for module in rough.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                if id(tensor) not in known:
                    half = tensor.detach().to(torch.bfloat16)
                    known[id(tensor)] = nn.Parameter(half, requires_grad=False)
                module._parameters[name] = known[id(tensor)]
    rough.config.dtype = torch.bfloat16
    found = LayerStack(rough, stack.paths[0] if len(stack.paths) == 1 else None)
    try:
        with evaluating(rough):
            finite = computed(found._probe()).isfinite().all()
    except RuntimeError as error:  # an architecture that mixes precisions
        logger.info("No measurements in bfloat16: %s", error)
        return None
    if not finite or found.can_replay != stack.can_replay:
        return None
    logger.info("Candidates are compared in bfloat16, the best of them in float32.")
    return found


def _is_faster(matrix: torch.Tensor) -> bool:
    """Whether products with a matrix are faster in bfloat16."""
    return _seconds(matrix, torch.float32) >= FASTER * _seconds(matrix, torch.bfloat16)


def _seconds(matrix: torch.Tensor, dtype: torch.dtype) -> float:
    """How long a product with a matrix takes, the best of a few trials."""
    weight = matrix.detach().to(dtype)
    rows = torch.ones(ROWS, weight.shape[1], dtype=dtype, device=weight.device)
    spent = []
    for _ in range(TRIALS):
        begin = time.perf_counter()
        float((rows @ weight.T).sum())  # waits for a GPU
        spent.append(time.perf_counter() - begin)
    return min(spent)
