"""The checkpoint that a model in memory was loaded from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..config.config_file import find_layers
from ..config.gguf_metadata import find_blocks
from ..errors import LLMPrunerError
from ..output_rules import PLAN_FILE
from ..results import PruningPlan
from ..utils import logger
from .gguf_models import find_gguf, read_gguf_checkpoint
from .safetensors_files import Checkpoint, read_checkpoint
from .sources import LocalFolder, Source, cached_source


def loaded_from(model: Any) -> Source | None:
    """The folder or the hub's cache that a model was loaded from; None if that is not known."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    commit = getattr(config, "_commit_hash", None)
    if name and (Path(name) / "config.json").is_file():
        return LocalFolder(name)
    return cached_source(name, commit) if name and commit else None


def gguf_of(model: Any) -> list[Path]:
    """The GGUF files that a model was loaded from; none if it was not."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    settings = getattr(config, "quantization_config", None)  # where transformers notes it
    given = settings.get("gguf_file") if isinstance(settings, dict) else None
    file = getattr(settings, "gguf_file", given)
    if file and os.path.isdir(name):
        name = str(Path(name) / file)
    return find_gguf(name) if os.path.isfile(name) else []


def read_for(model: Any) -> list[Path]:
    """The files or the folder of this machine that a model was loaded from, if any."""
    source = loaded_from(model)
    return gguf_of(model) or ([source.folder] if source and source.folder else [])


def original_checkpoint(model: Any, num_layers: int) -> Checkpoint | None:
    """The checkpoint that a model of `num_layers` layers was loaded from, if it can be read.

    A model of another depth than the checkpoint's was not loaded from it, or has been changed.
    """
    if paths := gguf_of(model):
        gguf = read_gguf_checkpoint(paths)
        names, _ = find_blocks(gguf.values, gguf.tensors, gguf.source.name)
        return gguf if names.num_layers == num_layers else None
    source = loaded_from(model)
    if source is None:
        return None
    try:
        checkpoint = read_checkpoint(source)
        depth = find_layers(checkpoint.tensors, checkpoint.config, source.name).num_layers
    except LLMPrunerError as error:  # pickled weights, say
        logger.info("The original checkpoint is not used: %s", error)
        return None
    return checkpoint if depth == num_layers else None


def model_identity(model: Any, num_layers: int) -> dict[str, str]:
    """`Checkpoint.identity` of what a model was loaded from; empty if that is not known."""
    checkpoint = original_checkpoint(model, num_layers)
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    if checkpoint is not None:
        return checkpoint.identity(whole=True)
    return {"revision": commit} if commit and loaded_from(model) is None else {}


def lineage(source: Source | None, num_layers: int) -> list[dict[str, Any]]:
    """The cuts that made a model of `num_layers` layers, by the plan beside its checkpoint.

    Empty where there is no plan, or one that does not fit the model.
    """
    if source is None or PLAN_FILE not in source.files():
        return []
    try:
        plan = PruningPlan.of_data(source.read_json(PLAN_FILE))
    except LLMPrunerError as error:
        logger.warning("What was pruned from %s before is not known: %s", source.name, error)
        return []
    return plan.as_earlier() if len(plan.keep) == num_layers else []


def lineage_of(model: Any, num_layers: int) -> list[dict[str, Any]]:
    """`lineage` of a model in memory."""
    if paths := gguf_of(model):
        return lineage(LocalFolder(paths[0].parent), num_layers)
    return lineage(loaded_from(model), num_layers)
