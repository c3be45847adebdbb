"""Where the layers are among the tensors of a checkpoint, and the config without some of them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import LoadError, UnsupportedModelError
from ..model.config_rules import OTHER_TOWERS, config_parts, layer_counts, prune_config_file
from ..results import PruningPlan
from ..utils import explain_load_failure
from .safetensors_files import Checkpoint, read_json
from .sources import LocalFolder

MOST_LAYERS = 10_000  # a config that claims more is not believed


class NeedsMemoryError(UnsupportedModelError):
    """The removal changes weights, so that byte ranges alone do not make the pruned model."""


class _Stack:
    """Where the layers are among the names of a checkpoint's tensors.

    Attributes:
        prefixes: what stands before the number of a layer, such as ``model.layers.``.
        num_layers: how many layers there are.
    """

    def __init__(self, prefixes: Sequence[str], num_layers: int) -> None:
        self.prefixes, self.num_layers = tuple(prefixes), num_layers
        heads = "|".join(map(re.escape, self.prefixes))
        self._layer = re.compile(rf"({heads})(\d+)((?:\..*)?)", re.DOTALL)

    def rename(self, name: str, kept: Sequence[int]) -> str | None:
        """The name in the pruned model of a tensor or module; None if it goes.

        What lies past the last layer (heads that predict further tokens) goes too: transformers
        does not read it.
        """
        match = self._layer.fullmatch(name)
        if match is None:
            return name
        index = int(match[2])
        return f"{match[1]}{kept.index(index)}{match[3]}" if index in kept else None


def find_layers(checkpoint: Checkpoint, values: dict[str, Any]) -> _Stack:
    """The layers by their names: numbers from 0 on, as many as the config counts."""
    numbers: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        match = re.match(r"(?:[^.]*\.)*?(?=\d+\.)", name)
        if match and not any(tower in match[0] for tower in OTHER_TOWERS):
            numbers.setdefault(match[0], set()).add(int(name[len(match[0]) :].partition(".")[0]))
    counts = {count for part in config_parts(values) for count in layer_counts(part)}
    fitting = {
        prefix: count
        for prefix, there in numbers.items()
        for count in counts
        if count <= MOST_LAYERS and set(range(count)) <= there
    }
    # a part with fewer layers than another cannot be told from it by counting up
    most = max(fitting.values(), default=0)
    prefixes = [prefix for prefix, count in fitting.items() if count == most]
    if not prefixes:
        raise NeedsMemoryError(
            f"No layers were found in checkpoint {checkpoint.source.name!r}: its config counts "
            f"{sorted(counts) or 'none'}, and no tensors are numbered so. Use "
            "BasePruner.prune_and_save, which loads the model."
        )
    return _Stack(prefixes, most)


def pruned_config(
    checkpoint: Checkpoint,
    values: dict[str, Any],
    found: _Stack,
    plan: PruningPlan,
    trust_remote_code: bool,
    verify: bool,
) -> dict[str, Any]:
    """The contents of the pruned config.json."""
    config = None
    if len(found.prefixes) == 1:
        config = prune_config_file(values, plan.keep, found.num_layers)
    if config is None or verify:
        checked = _config_by_class(checkpoint, found, plan, trust_remote_code)
        config = checked if config is None else config
    quantization = config.get("quantization_config")
    if quantization is not None:
        config["quantization_config"] = _renamed(
            quantization, lambda name: found.rename(name, plan.keep)
        )
    return config


def _config_by_class(
    checkpoint: Checkpoint, found: _Stack, plan: PruningPlan, trust_remote_code: bool
) -> dict[str, Any]:
    """The pruned config from the model's own class, built without memory for weights.

    That is what `LayerStack.remove` does; a removal in which it changes a weight is refused.
    """
    import torch

    from ..model.architecture_rules import loadable_config
    from ..model.layer_stack import LayerStack
    from ..model.loading import model_class

    source = checkpoint.source
    where = str(source.folder or source.name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.folder is None:
        options["revision"] = source.revision
    _, auto, config = model_class(where, **options)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise LoadError(explain_load_failure("model", source.name, error)) from error
    stack = LayerStack(model)
    names = {path.rpartition(".")[2] for path in stack.paths}
    here = {prefix.removesuffix(".").rpartition(".")[2] for prefix in found.prefixes}
    if len(stack) != found.num_layers or len(stack.paths) != len(found.prefixes) or names != here:
        raise NeedsMemoryError(
            f"{type(model).__name__} has {len(stack)} layers at {list(stack.paths)}, and the "
            f"checkpoint's tensors are numbered to {found.num_layers} at {list(found.prefixes)}: "
            "use BasePruner.prune_and_save, which loads the model."
        )
    pruned = stack.remove(plan.remove)
    changed = _changed_weights(checkpoint, found, stack, pruned, plan.remove)
    if changed:
        raise NeedsMemoryError(
            f"Without these layers {type(model).__name__} needs other weights than the checkpoint "
            f"holds ({changed[0]} and {len(changed) - 1} more): use BasePruner.prune_and_save, "
            "which loads the model."
        )
    with tempfile.TemporaryDirectory() as folder:
        loadable_config(pruned).save_pretrained(folder)
        return read_json(LocalFolder(folder), "config.json")


def _changed_weights(
    checkpoint: Checkpoint, found: _Stack, stack: Any, pruned: Any, removed: Sequence[int]
) -> list[str]:
    """Names of weights for which byte ranges of the checkpoint do not suffice.

    Those that a removal replaces, drops outside the layers or takes from a removed layer; and
    numbered ones outside the layers that transformers knows by another name, which may be a
    layer's.
    """
    model = stack.model
    layers = tuple(f"{path}." for path in stack.paths)
    before, after = (dict(one.named_parameters()) for one in (model, pruned))
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    gone = {
        id(tensor)
        for path in stack.paths
        for index in removed
        for tensor in model.get_submodule(f"{path}.{index}").parameters()
    }
    changed = [n for n, tensor in after.items() if id(tensor) not in known or id(tensor) in gone]
    changed += [name for name in before if name not in after and not name.startswith(layers)]
    names = model.state_dict().keys()
    changed += [
        name
        for name in checkpoint.tensors
        if re.search(r"\.\d+(\.|$)", name)
        and name not in names
        and not name.startswith(found.prefixes)
        and not any(tower in name for tower in OTHER_TOWERS)
    ]
    return changed


def _renamed(value: Any, rename: Callable[[str], str | None]) -> Any:
    """A JSON value in which every text that names a layer's module follows the layer."""
    if isinstance(value, str):
        return rename(value)
    if isinstance(value, list):
        parts = [(part, _renamed(part, rename)) for part in value]
        return [new for old, new in parts if new is not None or old is None]
    if isinstance(value, dict):
        return {
            new: _renamed(part, rename)
            for key, part in value.items()
            if (new := rename(key)) is not None
        }
    return value
