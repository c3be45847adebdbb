"""Cutting layers out of a copy of a model, so that it equals what its new config describes."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..errors import UnsupportedModelError
from .architecture_rules import COMPENSATIONS
from .config_rules import COUNT_FIELDS, prune_config, text_config

# Attributes in which a layer remembers its place, to address its slot of the KV cache, and the
# layer count, which only initialisation reads. Whether that is so is what verification shows.
SLOT_NAMES = ("layer_idx", "layer_id", "layer_number", *COUNT_FIELDS)
# The type of the next layer (glm5_next), and what matters in training alone (big_bird's seed).
FOLLOWS_THE_CONFIG = ("next_skip_topk", "seed")
TIES = ("_tied_weights_keys", "all_tied_weights_keys")


def share_copy(model: Any) -> Any:
    """A copy of the module tree that shares every tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def cut_layers(model: nn.Module, paths: Sequence[str], kept: Sequence[int]) -> Any:
    """A copy of `model` that has only the layers `kept` of its layer list, or of all its lists.

    The module tree is copied and every tensor shared. The config is rewritten, and the copy
    compared with a model built freshly from it; see `LayerStack.remove`.

    Raises:
        UnsupportedModelError: the result cannot be expressed in the architecture's config.
    """
    pruned = share_copy(model)
    n_layers = 0
    for path in paths:
        layers = pruned.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        n_layers = len(layers)
        parent, _, name = path.rpartition(".")
        setattr(pruned.get_submodule(parent), name, nn.ModuleList(layers[index] for index in kept))
    config: Any = getattr(pruned, "config", None)
    if config is None or not hasattr(type(pruned), "_from_config"):
        _renumber_by_rank(pruned, paths, kept)
        return pruned
    prune_config(text_config(config), kept, n_layers)
    compensate = COMPENSATIONS.get(getattr(text_config(config), "model_type", ""))
    settled = compensate(pruned, pruned.get_submodule(paths[0]), list(kept)) if compensate else ()
    before, after = _skeleton(model), _skeleton(pruned)
    place = _Place(tuple(paths), tuple(kept), n_layers)
    _slice_tensors(pruned, before, after, place)
    _compare_tensors(pruned, after)
    _sync_attributes(pruned, before, after, place, settled)
    return pruned


@dataclass(frozen=True)
class _Place:
    """Where the layers are, and which of how many are kept."""

    paths: tuple[str, ...]
    kept: tuple[int, ...]
    n_layers: int

    def old_name(self, name: str) -> str:
        """The name that a module or tensor of the pruned model had in the original."""
        for path in self.paths:
            prefix = path + "."
            if name.startswith(prefix):
                position, dot, rest = name[len(prefix) :].partition(".")
                return f"{prefix}{self.kept[int(position)]}{dot}{rest}"
        return name

    def is_inside(self, name: str) -> bool:
        """Whether a module or tensor belongs to a layer."""
        return any(name.startswith(path + ".") for path in self.paths)


def _renumber_by_rank(pruned: nn.Module, paths: Sequence[str], kept: Sequence[int]) -> None:
    """Without a config to build from: slots that held the old index get the new one."""
    for path in paths:
        for position, old in enumerate(kept):
            for module in pruned.get_submodule(f"{path}.{position}").modules():
                for slot in SLOT_NAMES:
                    if vars(module).get(slot) == old:
                        setattr(module, slot, position)


def _skeleton(model: Any) -> nn.Module:
    """A model without memory, built from the config as it will be read back from disk."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            config = type(model.config).from_pretrained(folder)
            with torch.device("meta"):
                built = type(model)._from_config(config)
        except (ValueError, TypeError, KeyError, IndexError, StrictDataclassError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no valid config without these layers: "
                f"{' '.join(str(error).split())}"
            ) from error
    assert isinstance(built, nn.Module)
    return built


def _slice_tensors(pruned: nn.Module, before: nn.Module, after: nn.Module, place: _Place) -> None:
    """Keep the blocks of kept layers in tensors outside the stack that hold one block per layer.

    Per-layer embeddings are such: one of their dimensions is a multiple of the layer count in
    the old model and the same multiple of the new count in the new one.
    """
    kept, n_layers = place.kept, place.n_layers
    old_shapes = {name: tensor.shape for name, tensor in before.named_parameters()}
    targets = dict(pruned.named_modules())
    for name, tensor in after.named_parameters():
        old, new = old_shapes.get(name), tensor.shape
        if place.is_inside(name) or old is None or old == new or len(old) != len(new):
            continue
        for dim, (was, now) in enumerate(zip(old, new, strict=True)):
            width = now // len(kept)
            if was != now and was == width * n_layers and now == width * len(kept):
                owner, _, leaf = name.rpartition(".")
                whole = getattr(targets[owner], leaf)
                blocks = whole.detach().unflatten(dim, (n_layers, width))
                part = blocks.index_select(dim, torch.tensor(kept, device=whole.device))
                own = nn.Parameter(part.flatten(dim, dim + 1), whole.requires_grad)
                setattr(targets[owner], leaf, own)


def _compare_tensors(pruned: nn.Module, skeleton: nn.Module) -> None:
    have = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    want = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    differing = sorted(
        name for name in have.keys() | want.keys() if have.get(name) != want.get(name)
    )
    if differing:
        name = differing[0]
        raise UnsupportedModelError(
            f"{type(pruned).__name__} without these layers cannot be reloaded: "
            f"{len(differing)} tensors differ from what its config describes, first {name!r} "
            f"(here {have.get(name)}, in the config's model {want.get(name)})."
        )


def _sync_attributes(
    pruned: nn.Module,
    before: nn.Module,
    after: nn.Module,
    place: _Place,
    settled: Sequence[str],
) -> None:
    """Give `pruned` every plain attribute that a model built from its config has.

    Where a kept layer differs between the old and the new skeleton, its behaviour depends on its
    position: a cache slot, and what follows a per-layer list, is copied; so is what a
    compensation has `settled`; anything else is refused. Outside the layers a difference
    follows from the layer count and is copied.
    """
    depends: list[str] = []
    targets, references, skeleton = (
        dict(model.named_modules(remove_duplicate=False)) for model in (pruned, before, after)
    )
    for name, module in skeleton.items():
        old_name = place.old_name(name)
        reference = references.get(old_name)
        if reference is None or type(reference) is not type(module):
            depends.append(f"{old_name} ({type(reference).__name__} -> {type(module).__name__})")
            continue
        for key, old, new in _differences(reference, module):
            free = old_name == name or key in (*SLOT_NAMES, *FOLLOWS_THE_CONFIG, *settled)
            if free or _is_sliced(old, new, place.kept):
                setattr(targets[name], key, new)
            else:
                depends.append(f"{old_name}.{key} ({old!r} -> {new!r})")
    if depends:
        raise UnsupportedModelError(
            f"{type(pruned).__name__} without these layers cannot be written exactly: kept "
            f"layers would change with their position: {'; '.join(sorted(depends)[:5])}."
        )


def _differences(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """The plain attributes in which two modules of one class differ."""
    was, now = _plain(old), _plain(new)
    for key in sorted(was.keys() | now.keys()):
        if not _same(was.get(key), now.get(key)):
            yield key, was.get(key), now.get(key)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-12)  # a compensated constant, but for rounding
    return bool(old == new)


def _is_sliced(old: Any, new: Any, kept: Sequence[int]) -> bool:
    """Whether `new` is the list with one entry per layer `old`, without the removed layers."""
    if not isinstance(old, list | tuple) or len(old) <= max(kept):
        return False
    return list(new or ()) == [old[index] for index in kept]


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values."""
    names = vars(module).keys() - {"training", "_is_hf_initialized"}
    return {
        name: vars(module)[name]
        for name in names
        if (not name.startswith("_") or name in TIES) and _is_plain(vars(module)[name])
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, int | float | str | bool)
