"""Pruned checkpoints from memory: written, verified by reloading and published in one step.

What was loaded from a checkpoint is written as that checkpoint without the layers (`overlay`).
Pickled weights are written by ``save_pretrained``, with the files of their folder around them; a
model that was built in Python, or healed after it was read from GGUF, by ``save_pretrained`` alone.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_output import staged_output
from ..config.config_file import (
    decoder_part,
    find_layers,
    layer_count,
    prune_config_file,
    stored_quantization,
)
from ..errors import UnsupportedModelError
from ..model.architecture_rules import as_stored, loadable_config
from ..model.layer_stack import LayerStack
from ..model.loading import quantization_method, stored_tensors
from ..output_rules import MANIFEST_FILE, PLAN_FILE
from ..report.model_card import CARD_FILE, card_text, original_card, pruned_gguf
from ..results import PruningPlan
from ..storage.gguf_models import GgufCheckpoint, read_gguf_checkpoint
from ..storage.manifest import Manifest, kept_tensors
from ..storage.origin import gguf_of, loaded_from, original_checkpoint, read_for
from ..storage.safetensors_files import Checkpoint, Kept, read_checkpoint
from ..storage.sources import LocalFolder, with_all_files
from ..utils import count_bytes, logger
from .gguf import GgufModel, write_pruned_gguf
from .on_disk import carry_along, check_manifest, write_checkpoint, write_json
from .overlay import put_over, stored_dtype
from .pruned_config import as_read
from .verify import verify_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def new_checkpoint(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Write and verify a checkpoint; publish it, with what the block adds, when the block ends.

    Yields:
        The folder that becomes `output_dir`; it holds everything but the model card.

    Raises:
        UnsupportedModelError: see `check_saveable`.
        OutputError: it cannot be written.
        VerificationError: it does not load cleanly, or computes something else than `pruned`.
    """
    healed = plan.healing.get("method", "none") != "none"
    original = check_saveable(pruned, plan.num_layers, heals=healed)
    rules: dict[str, Any] = {"overwrite": overwrite, "reads": read_for(pruned)}
    if isinstance(original, GgufCheckpoint):
        with staged_output(output_dir, need=original.bytes, **rules) as stage:
            folder = Path(plan.model_id).expanduser().is_dir()
            write_pruned_gguf(stage, GgufModel(original), plan, folder=folder)
            check_manifest(stage)
            yield stage
        return
    need = count_bytes(pruned) * (1 if original is None else 2)  # as it is compared
    with staged_output(output_dir, need=need, **rules) as stage:
        unused: set[str] = set()
        if original is not None:
            unused = _write_pruned(original, pruned, plan, stage)
        else:
            write_model(pruned, stage)
            _surround(pruned, plan, stage)
            plan.save(stage / PLAN_FILE)
        if _is_another(tokenizer, stage):
            tokenizer.save_pretrained(stage)
        if original is not None:
            check_manifest(stage)
        verify_checkpoint(stage, pruned, unused=unused)
        yield stage


def save_checkpoint(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write a complete plain checkpoint with its plan and card; see `new_checkpoint`."""
    with new_checkpoint(pruned, tokenizer, plan, output_dir, overwrite=overwrite) as stage:
        card = card_text(plan, original_card(plan.model_id), gguf=pruned_gguf(stage))
        (stage / CARD_FILE).write_text(card, encoding="utf-8")


def stored_bytes(pruned: PreTrainedModel, folder: Path) -> tuple[int, int] | None:
    """Bytes of the weights in the files that a model was loaded from, and in those of a new folder.

    None if it was not loaded from files whose tensors can be counted.
    """
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.load(folder / MANIFEST_FILE)
        return manifest.bytes_before, manifest.bytes_after
    if paths := gguf_of(pruned):  # healed
        return read_gguf_checkpoint(paths).bytes, read_checkpoint(LocalFolder(folder)).bytes
    return None


def check_saveable(model: Any, num_layers: int, *, heals: bool = False) -> Checkpoint | None:
    """The checkpoint that a model of `num_layers` layers is written over; None without any.

    Healed weights have other values than a GGUF file's blocks: they are written as they are.

    Args:
        model: the model, whole or pruned.
        num_layers: the depth of the whole model.
        heals: whether its weights are to be healed.

    Raises:
        UnsupportedModelError: the model is quantised, and is to be healed, or there is no such
            checkpoint, from whose bytes alone it can be written.
    """
    original = original_checkpoint(model, num_layers)
    if isinstance(original, GgufCheckpoint):
        return None if heals else original
    if original is not None and not _names_class(original.config, model):
        logger.info("%s is not the class that its checkpoint names", type(model).__name__)
        original = None
    method = quantization_method(model) or (original and stored_quantization(original.config))
    if method is not None and heals:
        raise UnsupportedModelError(
            f"A model quantised with {method} cannot be healed: heal the original model and "
            "quantise the result, or leave healing out."
        )
    if original is None and method is not None:
        raise UnsupportedModelError(
            f"A model quantised with {method} is written from the bytes of its checkpoint, and "
            f"{getattr(model.config, '_name_or_path', '') or 'this model'!r} holds none in "
            "safetensors format that fit it. Prune the original model, and quantise the result."
        )
    return original


def _write_pruned(original: Checkpoint, pruned: Any, plan: PruningPlan, stage: Path) -> set[str]:
    """Write the original without the layers; returns the tensors that transformers leaves alone."""
    names = find_layers(original.tensors, original.config, original.source.name)
    values = prune_config_file(original.config, plan.keep, names.num_layers, drop_mtp=plan.drop_mtp)
    config = as_read(values, pruned.config)
    kept, files = kept_tensors(original, names, plan), with_all_files(original.source)
    if files.revision is not None:
        config = without_missing_code(config, files.files())
    if quantization_method(pruned) or stored_quantization(original.config):
        write_checkpoint(stage, original, names, plan, kept, config, files)
        return {name for pairs in kept.values() for _, name in pairs}
    dtype = stored_dtype(original, original.config)
    with tempfile.TemporaryDirectory(dir=stage, prefix=".memory-") as folder:
        write_model(pruned, Path(folder))
        both, chosen = put_over(original, kept, pruned, Path(folder), dtype)
        if str(pruned.dtype).removeprefix("torch.") != dtype:
            _name_dtype(config, str(pruned.dtype).removeprefix("torch."))
        given = stage, both, names, plan, chosen, config, files
        write_checkpoint(*given, bytes_before=original.bytes)
    return _not_loaded(pruned, chosen)


def _surround(pruned: Any, plan: PruningPlan, stage: Path) -> None:
    """Put the files around pickled weights, and their config.json, around those from memory."""
    source = loaded_from(pruned)
    values = source.read_json("config.json") if source else {}
    if source and layer_count(values) == plan.num_layers and _names_class(values, pruned):
        names = replace(LayerStack(pruned).names, num_layers=plan.num_layers)
        config = as_read(
            prune_config_file(values, plan.keep, plan.num_layers, drop_mtp=plan.drop_mtp),
            pruned.config,
        )
        dtype = str(pruned.dtype).removeprefix("torch.")
        if any("torch_dtype" in part or "dtype" in part for part in (config, decoder_part(config))):
            _name_dtype(config, dtype)
        carry_along(source, stage, names, plan.keep)
        write_json(stage / "config.json", config)


def _names_class(values: dict[str, Any], model: Any) -> bool:
    """Whether a config.json is that of the model's class.

    A name that transformers does not know is that of code which the checkpoint comes with.
    """
    import transformers

    name = type(model).__name__
    named = values.get("architectures") or [name]
    return name in named or not any(hasattr(transformers, other) for other in named)


def _not_loaded(model: Any, kept: Kept) -> set[str]:
    """The keys of tensors that transformers does not load."""
    from ..model.stored_names import loading_keys

    keys = loading_keys(model, [name for pairs in kept.values() for _, name in pairs])
    state = stored_tensors(model)
    return {key for key in keys.values() if key not in state}


def _name_dtype(config: dict[str, Any], dtype: str) -> None:
    """Write the dtype of the weights wherever the config names one, or at its root."""
    named = [
        (part, key)
        for part in (config, decoder_part(config))
        for key in ("torch_dtype", "dtype")
        if key in part
    ]
    for part, key in named or [(config, "torch_dtype")]:
        part[key] = dtype


def _is_another(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer is not the one that lies in the folder."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").exists():
        return True
    try:
        beside = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        logger.info("The tokenizer is written anew: %s", error)
        return True
    same_words = beside.get_vocab() == tokenizer.get_vocab()
    return not same_words or beside.chat_template != tokenizer.chat_template


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, with a config and weights that load as the model that was saved."""
    with as_stored(model):
        model.save_pretrained(folder)
    config = loadable_config(model)
    if config is not model.config:
        config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    runnable = without_missing_code(values, os.listdir(folder))
    if runnable != values:
        write_json(folder / "config.json", runnable)


def without_missing_code(config: dict[str, Any], files: Collection[str]) -> dict[str, Any]:
    """A config that refers to no code which is not among the `files`: it would not load.

    Nobody trusted that code, or it belongs to classes for other tasks.
    """
    code = config.get("auto_map") or {}
    there = {
        name: reference
        for name, reference in code.items()
        if not isinstance(reference, str)  # a tokenizer's, which is written by itself
        or "--" in reference  # in another repository
        or f"{reference.rpartition('.')[0]}.py" in files
    }
    return {**config, "auto_map": there} if there != code else config
