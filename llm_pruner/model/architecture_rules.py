"""What discovery and config rules cannot see: layers whose arithmetic depends on their index.

A compensation changes weights of a kept layer (copies of them: the original's stay) so that at
its new index it computes what it computed at the old one. It returns the attributes it has
thereby settled, which then take the value of the new index.
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

# Where rounding explains more than elsewhere: RWKV divides weights and stream by powers of two
# around norms whose epsilon stays as it is. Relative to the largest logit.
LOOSE = {"rwkv": 5e-4}
Compensation = Callable[[Any, Any, list[int]], Sequence[str]]  # model, its layers, kept -> names


def _own(module: Any, name: str, value: torch.Tensor) -> None:
    """Give a module a parameter of its own in place of one it shares with the original."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().to(old.dtype), old.requires_grad))


def _beam(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Residual additions are averages over depth: x_k = a / sqrt(k) + x_(k-1) sqrt((k-1) / k).

    y_k = sqrt(k) x_k is then a plain sum, and every reader normalises, so only the proportions
    of what is added matter. A gap in the numbering multiplies the stream by sqrt((k-1) / m), m
    being the last addition before the gap; what is added later is scaled by the inverse.
    """
    scale, last = 1.0, 1
    for layer, index in zip(layers, kept, strict=True):
        scale *= math.sqrt(last / (2 * index + 1))
        last = 2 * index + 3
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            _own(norm, "weight", norm.weight * scale)
    return "attn_residual_add_idx", "mlp_residual_add_idx"


def _diffllama(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """lambda = exp(q1.k1) - exp(q2.k2) + lambda_init(index); the output carries 1 - lambda_init."""
    for position, (layer, index) in enumerate(zip(layers, kept, strict=True)):
        attention = layer.self_attn
        old, new = (0.8 - 0.6 * math.exp(-0.3 * place) for place in (index, position))
        if index == position:
            continue
        q1, k1 = attention.lambda_q1.double(), attention.lambda_k1.double()
        product = torch.log((q1 @ k1).exp() + old - new)  # old >= new: layers only move up
        direction = k1 / k1.square().sum()  # q1 = product * direction gives q1.k1 = product
        _own(attention, "lambda_q1", product * direction)
        weight = attention.o_proj.weight
        _own(attention.o_proj, "weight", weight * ((1 - old) / (1 - new)))
    return ("lambda_init",)


def _gpt2(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Attention scores may be divided by index + 1: the queries make up for the new index."""
    if not model.config.scale_attn_by_inverse_layer_idx:
        return ()
    for position, (layer, index) in enumerate(zip(layers, kept, strict=True)):
        if index == position:
            continue
        projection, size = layer.attn.c_attn, layer.attn.embed_dim
        factor = torch.ones(3 * size, device=projection.weight.device)
        factor[:size] = (position + 1) / (index + 1)
        _own(projection, "weight", projection.weight * factor)  # Conv1D: outputs are columns
        _own(projection, "bias", projection.bias * factor)
    return ("scaling",)


def _zamba2(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """The shared block holds one adapter per hybrid layer: those of removed layers go."""
    hybrids = [layer for layer in layers if hasattr(layer, "shared_transformer")]
    if not hybrids:
        return ()
    order = list(hybrids[0].shared_transformer.self_attn.layer_block_map)
    stay = [place for place, index in enumerate(order) if index in kept]
    for layer in hybrids:
        for module in layer.modules():
            for name, child in list(module.named_children()):
                if name.endswith("_adapter_list") and len(child) == len(order):
                    setattr(module, name, nn.ModuleList(child[place] for place in stay))
    return "layer_block_map", "layer_dic", "num_fwd_mem_blocks"


def _rwkv(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Evaluation divides weights by 2 ** (index // rescale_every), in place.

    The kept layers get copies as they were before; the pruned model divides anew.
    """
    base = next(module for module in model.modules() if hasattr(module, "layers_are_rescaled"))
    every = model.config.rescale_every
    for layer, index in zip(layers, kept, strict=True):
        factor = 2 ** (index // every) if every > 0 and base.layers_are_rescaled else 1
        for linear in (layer.attention.output, layer.feed_forward.value):
            _own(linear, "weight", linear.weight * factor)
    base.layers_are_rescaled = False
    return ()


def _zaya(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """The first layer has no scale for the router state of a layer before it, and needs none."""
    for module in layers[0].modules():
        if "router_states_scale" in module._parameters:
            del module.router_states_scale
    return ("use_eda",)


def _gpt_neox_japanese(model: Any, layers: Any, kept: list[int]) -> Sequence[str]:
    """Only the last layer has a bias behind its attention: a new last one gets a zero bias."""
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
    """Inside the block the weights are what a checkpoint should hold.

    RWKV divides weights in place when it evaluates; saved then, they would be divided again.
    """
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
    """The config under which ``AutoModelForCausalLM`` finds the model again.

    That is the model's own, but for text-only classes of composite models (Emu3, Mllama): their
    config has no entry in the auto mapping, and the composite one around it has.
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
    """The Auto class of transformers that builds `model` from its checkpoint.

    ``AutoModelForCausalLM`` for language models; for a wrapper around one (vision, audio), the
    class in whose mapping it stands.
    """
    import transformers

    names = ("CausalLM", "ImageTextToText", "MultimodalLM", "SpeechSeq2Seq", "Seq2SeqLM")
    for name in names:
        auto = getattr(transformers, f"AutoModelFor{name}", None)
        known = auto._model_mapping.get(type(loadable_config(model)), None) if auto else None
        if known is not None and type(model) in (known if isinstance(known, tuple) else (known,)):
            return auto
    return transformers.AutoModelForCausalLM
