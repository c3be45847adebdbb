"""Finding a checkpoint: a local folder, the hub's cache, or the hub itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..model.config_rules import config_parts, layer_counts
from ..utils import logger, resolve_model_id
from .safetensors_files import INDEX_FILE, SINGLE_FILE, read_checkpoint, read_json, shard_names
from .sources import HubRepository, LocalFolder, Source


def open_source(model_id: str | Path, revision: str | None = None) -> Source:
    """A local folder; the cached copy of a hub repository if it is complete; or the hub itself.

    Args:
        model_id: ``demo``, a local folder, or an id on the Hugging Face hub.
        revision: branch, tag or commit of a hub repository.

    Raises:
        LoadError: there is nothing of that name.
    """
    name = str(model_id)
    folder = Path(resolve_model_id(name)).expanduser()
    if folder.is_dir():
        return LocalFolder(folder, name)
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")):
        raise LoadError(f"Checkpoint {name!r} is not a folder: give a folder, or an id on the hub.")
    return cached_source(name, revision) or HubRepository(name, revision)


def cached_source(repo_id: str, revision: str | None = None) -> LocalFolder | None:
    """The copy of a hub repository in the local cache, if its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    source = LocalFolder(Path(found).parent, repo_id, Path(found).parent.name)
    there = set(source.files())
    if not there & {INDEX_FILE, SINGLE_FILE}:
        return None
    try:
        shard_names(source)
    except LoadError:  # some of them are not here
        return None
    return source


def model_identity(model: Any, num_layers: int) -> dict[str, str]:
    """`Checkpoint.identity` of what a model was loaded from; empty where that is not known.

    Args:
        model: a model of transformers.
        num_layers: its depth; a checkpoint of another depth is not the one it was loaded from.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    commit = getattr(config, "_commit_hash", None)
    source: Source | None = None
    if name and Path(name).is_dir():
        source = LocalFolder(name)
    elif name and commit:
        source = cached_source(name, commit)
    if source is None:
        return {"revision": commit} if commit else {}
    try:
        parts = config_parts(read_json(source, "config.json"))
        fits = any(num_layers in layer_counts(part) for part in parts)
        return read_checkpoint(source).identity() if fits else {}
    except LoadError as error:  # pickled weights, say
        logger.info("The plan does not record the checkpoint: %s", error)
        return {}
