"""What a checkpoint says of its layers: where their tensors are, and its config without some.

torch is imported only where the model's class has to work out the pruned config (`SPELLED_OUT`
lists the others), and no weight is loaded even then.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.layer_names import LayerNames
from ..config.rules import OTHER_TOWERS, layer_counts_in_file, prune_config_file
from ..errors import LoadError, UnsupportedModelError
from ..results import PruningPlan
from ..utils import logger
from .safetensors_files import Checkpoint, read_checkpoint
from .sources import LocalFolder, cached_source

MOST_LAYERS = 10_000  # a config that claims more is damaged


class NeedsMemoryError(UnsupportedModelError):
    """The removal changes weights, so that byte ranges alone do not make the pruned model."""


def model_identity(model: Any, num_layers: int) -> dict[str, str]:
    """`Checkpoint.identity` of what a model was loaded from; empty if that is not known.

    A model of `num_layers` layers was not loaded from a checkpoint of another depth.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    commit = getattr(config, "_commit_hash", None)
    local = bool(name) and Path(name).is_dir()
    source = LocalFolder(name) if local else name and commit and cached_source(name, commit)
    if not source:
        return {"revision": commit} if commit else {}
    try:
        counts = layer_counts_in_file(source.read_json("config.json"))
        return read_checkpoint(source).identity() if num_layers in counts else {}
    except LoadError as error:  # pickled weights, say
        logger.info("The plan does not record the checkpoint: %s", error)
        return {}


def find_layers(checkpoint: Checkpoint) -> LayerNames:
    """The layers, by their tensors' names: indices from 0 on, as many as the config counts.

    Raises NeedsMemoryError if there are none.
    """
    indices: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        match = re.match(r"((?:[^.]*\.)*?)(\d+)\.", name)
        if match and not any(tower in match[1] for tower in OTHER_TOWERS):
            indices.setdefault(match[1], set()).add(int(match[2]))
    counts = layer_counts_in_file(checkpoint.config)
    fitting = {
        prefix: count
        for prefix, found in indices.items()
        for count in sorted(counts)
        if count <= MOST_LAYERS and set(range(count)) <= found
    }
    # A part with fewer layers than another cannot be told from the beginning of one with more.
    most = max(fitting.values(), default=0)
    prefixes = tuple(prefix for prefix, count in fitting.items() if count == most)
    if not prefixes:
        raise NeedsMemoryError(
            f"No layers were found in checkpoint {checkpoint.source.name!r}: its config counts "
            f"{sorted(counts) or 'none'}, and no tensors are numbered so. Use "
            "BasePruner.prune_and_save, which loads the model."
        )
    return LayerNames(prefixes, most)


def pruned_config(
    checkpoint: Checkpoint,
    layers: LayerNames,
    plan: PruningPlan,
    *,
    trust_remote_code: bool,
    verify: bool,
) -> dict[str, Any]:
    """The contents of the pruned config.json, checked by the model's class to `verify` it.

    Raises:
        LoadError: the model's class is needed, and cannot be loaded.
        UnsupportedModelError: the architecture's config cannot express the pruned model.
    """
    config = None
    if len(layers.prefixes) == 1:
        config = prune_config_file(checkpoint.config, plan.keep, layers.num_layers)
    if config is None or verify:
        by_class = _config_by_class(checkpoint, layers, plan, trust_remote_code)
        config = by_class if config is None else config
    quantization = config.get("quantization_config")
    if quantization is not None:
        config["quantization_config"] = _renamed(quantization, layers, plan.keep)
    return config


def _config_by_class(
    checkpoint: Checkpoint, layers: LayerNames, plan: PruningPlan, trust_remote_code: bool
) -> dict[str, Any]:
    """The pruned config from `LayerStack.remove`, which may not change a weight."""
    from ..model.architecture_rules import loadable_config
    from ..model.layer_stack import LayerStack
    from ..model.loading import empty_model

    source = checkpoint.source
    revision = None if source.folder else source.revision
    name = str(source.folder or source.name)
    model = empty_model(name, trust_remote_code=trust_remote_code, revision=revision)
    stack = LayerStack(model)
    lists, stored = (
        {prefix.removesuffix(".").rpartition(".")[2] for prefix in names.prefixes}
        for names in (stack.names, layers)
    )
    same_depth = len(stack) == layers.num_layers
    if not same_depth or len(stack.paths) != len(layers.prefixes) or lists != stored:
        raise NeedsMemoryError(
            f"{type(model).__name__} has {len(stack)} layers at {list(stack.paths)}, and the "
            f"checkpoint's tensors are numbered to {layers.num_layers} at "
            f"{list(layers.prefixes)}: use BasePruner.prune_and_save, which loads the model."
        )
    pruned = stack.remove(plan.remove)
    changed = _changed_weights(checkpoint, layers, stack, pruned, plan)
    if changed:
        raise NeedsMemoryError(
            f"Without these layers {type(model).__name__} needs other weights than the checkpoint "
            f"holds ({changed[0]} and {len(changed) - 1} more): use BasePruner.prune_and_save, "
            "which loads the model."
        )
    with tempfile.TemporaryDirectory() as folder:
        loadable_config(pruned).save_pretrained(folder)
        return LocalFolder(folder).read_json("config.json")


def _changed_weights(
    checkpoint: Checkpoint, layers: LayerNames, stack: Any, pruned: Any, plan: PruningPlan
) -> list[str]:
    """Names of weights for which byte ranges of the checkpoint are not enough.

    The removal replaces them, drops them outside the layers or takes them from a removed layer; or
    transformers knows them, numbered and outside the layers, by another name.
    """
    model, names, keep = stack.model, stack.names, plan.keep
    before, after = (dict(one.named_parameters()) for one in (model, pruned))
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    removed = {
        id(tensor)
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if names.rename(name, keep) is None
    }
    changed = [n for n, tensor in after.items() if id(tensor) not in known or id(tensor) in removed]
    changed += [name for name in before if name not in after and names.index(name) is None]
    loaded = model.state_dict().keys()
    changed += [
        name
        for name in checkpoint.tensors
        if re.search(r"\.\d+(\.|$)", name)
        and name not in loaded
        and layers.index(name) is None
        and not any(tower in name for tower in OTHER_TOWERS)
    ]
    return changed


def _renamed(value: Any, layers: LayerNames, kept: Sequence[int]) -> Any:
    """A JSON value in which every string that names a layer's module follows the layer."""
    if isinstance(value, str):
        return layers.rename(value, kept)
    if isinstance(value, list):
        parts = [(part, _renamed(part, layers, kept)) for part in value]
        return [new for old, new in parts if new is not None or old is None]
    if isinstance(value, dict):
        parts = [(layers.rename(key, kept), part) for key, part in value.items()]
        return {key: _renamed(part, layers, kept) for key, part in parts if key is not None}
    return value
