"""Copies of a model: without layers, as its new config describes it, or with its own weights."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..config.layer_names import LayerNames
from ..config.outer_rules import prune_outer, refuse_injected
from ..config.rules import COUNT_FIELDS, prune_config, text_config
from ..errors import UnsupportedModelError
from .architecture_rules import COMPENSATIONS
from .loading import stored_tensors

# Where a layer stores its index, to address its slot of the KV cache, and the layer count, which
# only initialisation reads. Verification shows whether that is all they do.
SLOT_NAMES = ("layer_idx", "layer_id", "layer_number", *COUNT_FIELDS)
# The type of the next layer (glm5_next), and what only training uses (big_bird's seed).
FOLLOWS_THE_CONFIG = ("next_skip_topk", "seed")
HALF = (torch.float16, torch.bfloat16)
TIES = ("_tied_weights_keys", "all_tied_weights_keys")


def share_copy(model: Any) -> Any:
    """A copy of the module tree that shares every tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def trainable_copy(model: Any, layers: Iterable[nn.Module]) -> Any:
    """A copy whose layers have float32 weights of their own, to be trained; the rest is frozen.

    The rest is shared with `model`, and frozen there too. Of a model in half precision all is
    copied in float32, since float32 layers want float32 states.
    """
    trained = {id(weight) for layer in layers for weight in layer.parameters()}
    half = any(weight.dtype in HALF for weight in model.parameters())
    student = share_copy(model)
    copies: dict[int, nn.Parameter] = {}  # by the weight; some belong to several modules
    for module in student.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            trains = id(weight) in trained
            if not trains and not half:
                weight.requires_grad_(False)
                continue
            if id(weight) not in copies:
                exact = torch.promote_types(weight.dtype, torch.float32)
                own = weight.detach().to(exact, copy=True)
                copies[id(weight)] = nn.Parameter(own, requires_grad=trains)
            module._parameters[name] = copies[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in HALF:
                module._buffers[name] = buffer.float()
    return student


def with_trained(model: Any, student: Any) -> Any:
    """A copy of `model` with what was trained in its `trainable_copy`, of the types it had."""
    trained = {
        name: weight
        for name, weight in student.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    healed = share_copy(model)
    copies: dict[int, nn.Parameter] = {}
    for path, module in healed.named_modules():
        for name, weight in module._parameters.items():
            new = trained.get(f"{path}.{name}")
            if weight is None or new is None:
                continue
            if id(new) not in copies:
                typed = new.detach().to(weight.dtype)
                copies[id(new)] = nn.Parameter(typed, requires_grad=False)
            module._parameters[name] = copies[id(new)]
    return healed


def remove_layers(
    model: nn.Module, names: LayerNames, kept: Sequence[int], reference: nn.Module | None
) -> Any:
    """A copy of `model` that has only the layers `kept`; see `LayerStack.remove`.

    Args:
        kept: indices of the layers to keep, ascending.
        reference: `skeleton` of `model`.

    Raises:
        UnsupportedModelError: the architecture's config cannot express the result.
    """
    refuse_injected(getattr(model, "config", None), kept)
    pruned = share_copy(model)
    for path in (prefix.removesuffix(".") for prefix in names.prefixes):
        layers = pruned.get_submodule(path)
        pruned.set_submodule(path, nn.ModuleList(layers[index] for index in kept))
    if reference is None:
        _renumber(pruned, names, kept)
        return pruned
    config = text_config(pruned.config)
    prune_config(config, kept, names.num_layers)
    if config is not pruned.config:
        prune_outer(pruned.config, kept)
    compensate = COMPENSATIONS.get(getattr(config, "model_type", ""))
    first_list = pruned.get_submodule(names.prefixes[0].removesuffix("."))
    settled = compensate(pruned, first_list, list(kept)) if compensate else ()
    after = skeleton(pruned)
    _slice_tensors(pruned, reference, after, names, kept)
    _compare_tensors(pruned, after, _differing(model, reference), names, kept)
    _copy_attributes(pruned, reference, after, names, kept, settled)
    return pruned


def skeleton(model: Any) -> Any:
    """A model without memory, built from the config as it will be read back from disk.

    None for a model that is not built from a config.

    Raises:
        UnsupportedModelError: the config is not valid.
    """
    if getattr(model, "config", None) is None or not hasattr(type(model), "_from_config"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            config = type(model.config).from_pretrained(folder)
            with torch.device("meta"):
                return type(model)._from_config(config)
        except (ValueError, TypeError, KeyError, IndexError, StrictDataclassError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no valid config without these layers: "
                f"{' '.join(str(error).split())}"
            ) from error


def _renumber(pruned: nn.Module, names: LayerNames, kept: Sequence[int]) -> None:
    """Without a config to build from: give cache slots that hold the old index the new one."""
    for name, module in pruned.named_modules():
        old = names.index(names.original(name, kept))
        for slot in SLOT_NAMES:
            if old is not None and vars(module).get(slot) == old:
                setattr(module, slot, names.index(name))


def _slice_tensors(
    pruned: nn.Module, before: nn.Module, after: nn.Module, names: LayerNames, kept: Sequence[int]
) -> None:
    """Keep the kept layers' blocks of tensors outside the layers that hold one block per layer.

    Such as per-layer embeddings: one dimension is the same multiple of the layer count in both.
    """
    old_shapes = {name: tensor.shape for name, tensor in before.named_parameters()}
    for name, tensor in after.named_parameters():
        old, new = old_shapes.get(name, ()), tensor.shape
        if names.index(name) is not None or len(old) != len(new):
            continue
        for dim, (was, now) in enumerate(zip(old, new, strict=True)):
            width = now // len(kept)
            if was != now and was == width * names.num_layers and now == width * len(kept):
                owner, _, leaf = name.rpartition(".")
                whole: Any = pruned.get_parameter(name)
                blocks = whole.detach().unflatten(dim, (names.num_layers, width))
                part = blocks.index_select(dim, torch.tensor(kept, device=whole.device))
                sliced = nn.Parameter(part.flatten(dim, dim + 1), whole.requires_grad)
                setattr(pruned.get_submodule(owner), leaf, sliced)


def _differing(model: nn.Module, skeleton: nn.Module) -> set[str]:
    """Names of tensors whose shapes differ, or that only one of the two has."""
    have, want = (
        {name: tuple(tensor.shape) for name, tensor in stored_tensors(one).items()}
        for one in (model, skeleton)
    )
    return {name for name, _ in have.items() ^ want.items()}


def _compare_tensors(
    pruned: nn.Module,
    after: nn.Module,
    differed: set[str],
    names: LayerNames,
    kept: Sequence[int],
) -> None:
    """Refuse tensors that the config does not describe, unless it never did (quantised ones).

    Args:
        pruned: the pruned model.
        after: a model built from its config.
        differed: the `_differing` tensors of the original, by their old names.
        names: the layers of the original.
        kept: which of them are kept.
    """
    differing = _differing(pruned, after)
    differing -= {names.rename(name, kept) for name in differed}
    if differing:
        name = min(differing)
        here, there = (
            tuple(state[name].shape) if name in state else None
            for state in (stored_tensors(pruned), stored_tensors(after))
        )
        raise UnsupportedModelError(
            f"{type(pruned).__name__} without these layers cannot be reloaded: "
            f"{len(differing)} tensors differ from what its config describes, first {name!r} "
            f"(here {here}, in the config's model {there})."
        )


def _copy_attributes(
    pruned: nn.Module,
    before: nn.Module,
    after: nn.Module,
    names: LayerNames,
    kept: Sequence[int],
    settled: Sequence[str],
) -> None:
    """Give `pruned` every plain attribute that a model built from its config has.

    Where a kept layer differs between the old and the new skeleton, it depends on its index. Cache
    slots, what follows a per-layer list, and what a compensation has `settled` are copied, and
    what lies outside the layers; anything else is refused.
    """
    depends: list[str] = []
    targets, references, built = (
        dict(model.named_modules(remove_duplicate=False)) for model in (pruned, before, after)
    )
    for name, module in built.items():
        old_name = names.original(name, kept)
        reference = references.get(old_name)
        if reference is None or type(reference) is not type(module):
            depends.append(f"{old_name} ({type(reference).__name__} -> {type(module).__name__})")
            continue
        was, now = _plain(reference), _plain(module)
        for key in sorted(was.keys() | now.keys()):
            old, new = was.get(key), now.get(key)
            if _same(old, new):
                continue
            free = old_name == name or key in (*SLOT_NAMES, *FOLLOWS_THE_CONFIG, *settled)
            if free or _is_sliced(old, new, kept):
                setattr(targets[name], key, new)
            else:
                depends.append(f"{old_name}.{key} ({old!r} -> {new!r})")
    if depends:
        raise UnsupportedModelError(
            f"{type(pruned).__name__} without these layers cannot be written exactly: kept "
            f"layers would change with their index: {'; '.join(sorted(depends)[:5])}."
        )


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-12)  # a compensated constant, up to rounding
    return bool(old == new)


def _is_sliced(old: Any, new: Any, kept: Sequence[int]) -> bool:
    """Whether `new` is the list with one entry per layer `old`, without the removed layers."""
    if not isinstance(old, list | tuple) or len(old) <= max(kept):
        return False
    return list(new or ()) == [old[index] for index in kept]


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values."""
    return {
        name: value
        for name, value in vars(module).items()
        if (name in TIES or not name.startswith("_")) and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | dict):
        return all(map(_is_plain, value.items() if isinstance(value, dict) else value))
    return value is None or isinstance(value, int | float | str | bool)
