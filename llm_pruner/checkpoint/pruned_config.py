"""The config.json of a pruned checkpoint: the source's own, with only what the removal changes.

torch is imported only where the model's class has to say what a file leaves to it
(`config.config_file.SPELLED_OUT` lists the others), and no weight is loaded even then.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.config_file import (
    NeedsMemoryError,
    is_spelled_out,
    prune_config_file,
    stored_quantization,
)
from ..config.layer_names import LayerNames
from ..config.rules import MTP_COUNTS
from ..config.tensor_shapes import find_misfit
from ..errors import LLMPrunerError, LoadError, UnsupportedModelError
from ..results import PruningPlan
from ..storage.safetensors_files import Checkpoint
from ..utils import logger

# What a config says of the program and the moment rather than of the model.
NOT_OF_MODEL = frozenset(
    "transformers_version _name_or_path architectures dtype torch_dtype use_cache auto_map "
    "quantization_config compression_config".split()
) | {*MTP_COUNTS}
ROUNDS = 3  # a field that is written out may change what a class derives from it


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
    values = checkpoint.config
    try:
        config = prune_config_file(values, plan.keep, layers.num_layers, drop_mtp=plan.drop_mtp)
    except LLMPrunerError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise checkpoint.source.broken(
            "config.json", f"its values do not go together ({type(error).__name__}: {error})"
        ) from error
    one_list = len(layers.prefixes) == 1
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors.values()}
    if verify or not one_list or not is_spelled_out(values, layers.num_layers):
        config = as_read(config, _by_class(checkpoint, layers, plan, trust_remote_code))
    elif misfit := find_misfit(shapes, values, layers):
        logger.info("The model's class is asked about the tensors: %s.", misfit)
        _refuse_unloadable(checkpoint, _empty_model(checkpoint, trust_remote_code))
    return config


def as_read(values: dict[str, Any], wanted: Any) -> dict[str, Any]:
    """`values` of a config.json with those fields added that its class needs to read `wanted`.

    What the class derives from an index, a period or the number of layers is written out; whatever
    stands there already stays beside it.

    Raises:
        UnsupportedModelError: no such fields make the class read `wanted`.
    """
    values = copy.deepcopy(values)
    want = _plain(wanted)
    for _ in range(ROUNDS):
        differing = list(_differences(_plain(_read(values, type(wanted))), want))
        if not differing:
            return values
        for path in differing:
            _put(values, path, want, wanted)
    named = ", ".join(".".join(path) for path in differing)
    raise UnsupportedModelError(
        f"config.json cannot express the pruned model: {type(wanted).__name__} would read other "
        f"values of {named}."
    )


def _read(values: dict[str, Any], cls: Any) -> Any:
    """What transformers reads from a config.json of these values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(values), encoding="utf-8")
        return cls.from_pretrained(folder)


def _plain(config: Any) -> dict[str, Any]:
    """A config of transformers as JSON values, all fields written out."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def _differences(
    found: dict[str, Any], wanted: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The paths of fields that differ; inside nested configs, those of their fields."""
    for name, new in wanted.items():
        old = found.get(name)
        if name in NOT_OF_MODEL or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict) and name.endswith("_config"):
            yield from _differences(old, new, (*path, name))
        else:
            yield (*path, name)


def _put(values: dict[str, Any], path: tuple[str, ...], want: dict[str, Any], config: Any) -> None:
    """Write one field of `want` into `values`, under the name that stands there already."""
    for name in path[:-1]:
        values = values.setdefault(name, {})
        want, config = want[name], getattr(config, name, None)
    name = path[-1]
    others = [old for old, new in getattr(config, "attribute_map", {}).items() if new == name]
    spelled = next((other for other in others if name not in values and other in values), name)
    values[spelled] = want[name]


def _by_class(
    checkpoint: Checkpoint, layers: LayerNames, plan: PruningPlan, trust_remote_code: bool
) -> Any:
    """The pruned config from `LayerStack.remove`, which may not change a weight."""
    from ..model.layer_stack import LayerStack

    model = _empty_model(checkpoint, trust_remote_code)
    stack = LayerStack(model)
    _refuse_unloadable(checkpoint, model)
    _refuse_other_layers(checkpoint, layers, stack)
    pruned = stack.remove(plan.remove)
    changed = _changed_weights(stack, pruned, plan)
    if changed:
        raise NeedsMemoryError(
            f"Without these layers {type(model).__name__} needs other weights than the checkpoint "
            f"holds ({changed[0]} and {len(changed) - 1} more): use BasePruner.prune_and_save, "
            "which loads the model."
        )
    return pruned.config


def _empty_model(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from ..model.loading import empty_model

    source = checkpoint.source
    revision = None if source.folder else source.revision
    name = str(source.folder or source.name)
    return empty_model(name, trust_remote_code=trust_remote_code, revision=revision)


def _refuse_unloadable(checkpoint: Checkpoint, model: Any) -> None:
    """Raise LoadError if transformers could not load the original: its output could not be either.

    Weights that are quantised, or that are put together when they are loaded, have other shapes in
    memory, and are not compared.
    """
    from ..model.stored_names import loading_keys, one_of_each

    if stored_quantization(checkpoint.config):
        return
    keys = loading_keys(model, one_of_each(checkpoint.tensors))
    sources = Counter(keys.values())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    needed = dict(model.named_parameters(remove_duplicate=False))
    wrong = [
        f"{key!r} is not there"
        for key in needed
        if key not in sources
        and key not in (*tied, *tied.values())
        and not any(re.search(pattern, key) for pattern in optional)
    ]
    for name, key in keys.items():
        alone = sources[key] == 1 and name.split(".")[-2:] == key.split(".")[-2:]
        shape = checkpoint.tensors[name].shape
        if alone and key in needed and tuple(needed[key].shape) != shape:
            wanted = list(needed[key].shape)
            wrong.append(f"{name!r} is of shape {list(shape)}, and would have to be {wanted}")
    if wrong:
        raise LoadError(
            f"Checkpoint {checkpoint.source.name!r} does not fit {type(model).__name__}, so "
            f"nothing could load it, whole or pruned: {wrong[0]} ({len(wrong)} such). Fetch the "
            "checkpoint again, or correct its config.json."
        )


def _refuse_other_layers(checkpoint: Checkpoint, layers: LayerNames, stack: Any) -> None:
    """Raise NeedsMemoryError unless transformers puts the tensors of each layer into that layer."""
    from ..model.loading import stored_tensors
    from ..model.stored_names import loading_keys, one_of_each

    model, misplaced = stack.model, []
    if len(stack) == layers.num_layers:
        there = stored_tensors(model)
        for tensor, key in loading_keys(model, one_of_each(checkpoint.tensors)).items():
            if key in there and stack.names.index(key) != layers.index(tensor):
                misplaced.append(f"{tensor} -> {key}")
    if misplaced or len(stack) != layers.num_layers:
        raise NeedsMemoryError(
            f"{type(model).__name__} has {len(stack)} layers at {list(stack.paths)}, and the "
            f"checkpoint's tensors are numbered to {layers.num_layers} at "
            f"{list(layers.prefixes)} ({', '.join(misplaced[:2]) or 'no more'}): use "
            "BasePruner.prune_and_save, which loads the model."
        )


def _changed_weights(stack: Any, pruned: Any, plan: PruningPlan) -> list[str]:
    """Names of weights for which byte ranges of the checkpoint are not enough.

    The removal replaces them, drops them outside the layers or takes them from a removed layer.
    """
    model, names = stack.model, stack.names
    before, after = (dict(one.named_parameters()) for one in (model, pruned))
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    removed = {
        id(tensor)
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if names.rename(name, plan.keep) is None
    }
    changed = [n for n, tensor in after.items() if id(tensor) not in known or id(tensor) in removed]
    return changed + [n for n in before if n not in after and names.index(n) is None]
