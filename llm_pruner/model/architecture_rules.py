"""What config rules cannot express: layers whose arithmetic depends on their index.

A compensation changes copies of a kept layer's weights so that the layer computes at its new
index what it computed at the old one. It returns the names of the attributes that it has thereby
settled; they take the value of the new index.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Larger differences that rounding explains, relative to the largest logit: RWKV divides weights
# and residual stream by powers of two around norms whose epsilon stays as it is.
LOOSE = {"rwkv": 5e-4}
Compensation = Callable[[Any, Any, list[int]], Sequence[str]]  # model, its layers, kept -> names


def _replace(module: Any, name: str, value: torch.Tensor) -> None:
    """Give a module a new parameter instead of the one that it shares with the original."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().to(old.dtype), old.requires_grad))


def _beam(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Residual additions are averages over depth: x_k = a / sqrt(k) + x_(k-1) sqrt((k-1) / k).

    y_k = sqrt(k) x_k is then a plain sum, and every reader normalises, so only the proportions
    of the terms matter. A gap in the indices multiplies the residual stream by sqrt((k-1) / m), m
    being the last addition before the gap; later terms are scaled by the inverse.
    """
    scale, last = 1.0, 1
    for layer, index in zip(layers, kept, strict=True):
        scale *= math.sqrt(last / (2 * index + 1))
        last = 2 * index + 3
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            _replace(norm, "weight", norm.weight * scale)
    return "attn_residual_add_idx", "mlp_residual_add_idx"


def _diffllama(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """lambda = exp(q1.k1) - exp(q2.k2) + lambda_init(index); the output carries 1 - lambda_init."""
    for new_index, (layer, old_index) in enumerate(zip(layers, kept, strict=True)):
        if old_index == new_index:
            continue
        attention = layer.self_attn
        old, new = (0.8 - 0.6 * math.exp(-0.3 * index) for index in (old_index, new_index))
        q1, k1 = attention.lambda_q1.double(), attention.lambda_k1.double()
        product = torch.log((q1 @ k1).exp() + old - new)  # old >= new: indices only shrink
        direction = k1 / k1.square().sum()  # q1 = product * direction gives q1.k1 = product
        _replace(attention, "lambda_q1", product * direction)
        weight = attention.o_proj.weight
        _replace(attention.o_proj, "weight", weight * ((1 - old) / (1 - new)))
    return ("lambda_init",)


def _gpt2(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Attention scores may be divided by index + 1: the queries are scaled for the new index."""
    if not model.config.scale_attn_by_inverse_layer_idx:
        return ()
    for new_index, (layer, old_index) in enumerate(zip(layers, kept, strict=True)):
        if old_index == new_index:
            continue
        projection, size = layer.attn.c_attn, layer.attn.embed_dim
        factor = torch.ones(3 * size, device=projection.weight.device)
        factor[:size] = (new_index + 1) / (old_index + 1)
        _replace(projection, "weight", projection.weight * factor)  # Conv1D: outputs are columns
        _replace(projection, "bias", projection.bias * factor)
    return ("scaling",)


def _zamba2(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """The shared block holds one adapter per hybrid layer: drop those of removed layers."""
    hybrids = [layer for layer in layers if hasattr(layer, "shared_transformer")]
    if not hybrids:
        return ()
    order = list(hybrids[0].shared_transformer.self_attn.layer_block_map)
    stay = [adapter for adapter, index in enumerate(order) if index in kept]
    for layer in hybrids:
        for module in layer.modules():
            for name, child in list(module.named_children()):
                if name.endswith("_adapter_list") and len(child) == len(order):
                    setattr(module, name, nn.ModuleList(child[i] for i in stay))
    return "layer_block_map", "layer_dic", "num_fwd_mem_blocks"


def _rwkv(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Evaluation divides weights by 2 ** (index // rescale_every), in place.

    The kept layers get undivided copies; the pruned model divides them anew.
    """
    base = next(module for module in model.modules() if hasattr(module, "layers_are_rescaled"))
    every = model.config.rescale_every
    for layer, index in zip(layers, kept, strict=True):
        factor = 2 ** (index // every) if every > 0 and base.layers_are_rescaled else 1
        for linear in (layer.attention.output, layer.feed_forward.value):
            _replace(linear, "weight", linear.weight * factor)
    base.layers_are_rescaled = False
    return ()


def _zaya(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """The first layer has no scale for the router state of the previous layer."""
    for module in layers[0].modules():
        if "router_states_scale" in module._parameters:
            del module.router_states_scale
    return ("use_eda",)


def _gpt_neox_japanese(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Only the last layer has a bias after its attention: a new last layer gets a zero bias."""
    attention = layers[-1].attention
    if attention.dense_bias is None:
        weight = attention.dense.weight
        attention.dense_bias = nn.Parameter(weight.new_zeros(weight.shape[0]))
    return ()


COMPENSATIONS: dict[str, Compensation] = {
    "beam": _beam,
    "diffllama": _diffllama,
    "gpt2": _gpt2,
    "gpt_neox_japanese": _gpt_neox_japanese,
    "rwkv": _rwkv,
    "zaya": _zaya,
    "zamba2": _zamba2,
}


@contextmanager
def as_stored(model: Any) -> Iterator[None]:
    """Inside the block RWKV's weights are undivided: loading will divide them again."""
    divided = [m for m in model.modules() if getattr(m, "layers_are_rescaled", False)]
    modes = [(module, module.training) for module in divided]
    for module in divided:
        module.training = True
        module._rescale_layers()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def loadable_config(model: Any) -> Any:
    """The config under which ``AutoModelForCausalLM`` finds the model again: mostly its own.

    Of text-only classes of composite models (Emu3, Mllama) it knows only the composite config.
    """
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping
    config = model.config
    if type(config) in known or getattr(config, "auto_map", None):
        return config
    for cls in vars(sys.modules[type(config).__module__]).values():
        parts = getattr(cls, "sub_configs", None) if inspect.isclass(cls) else None
        if parts and parts.get("text_config") is type(config) and cls in known:
            composite: Any = cls(text_config=config.to_dict())
            composite.architectures = [type(model).__name__]
            composite.dtype = config.dtype
            return composite
    return config


def auto_class(model: Any) -> Any:
    """The Auto class that builds a model from its checkpoint, whatever head it has."""
    from transformers import AutoModelForCausalLM

    from .loading import find_auto_class

    return find_auto_class(type(loadable_config(model)), type(model)) or AutoModelForCausalLM
