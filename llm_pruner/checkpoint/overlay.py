"""Weights of a model in memory, put over those of the checkpoint that it was loaded from.

A tensor that memory still holds as the checkpoint does is taken from the checkpoint, byte for byte.
One that has changed since (by healing, by training, to another dtype) comes from memory; so does
one that the checkpoint lacks. What transformers does not load, such as blocks for multi-token
prediction, comes from the checkpoint.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..model.loading import stored_tensors
from ..model.stored_names import loading_keys, natural_order
from ..storage.manifest import FROM_MEMORY
from ..storage.safetensors_files import Checkpoint, Kept, StoredTensor, read_checkpoint
from ..storage.sources import Joined, LocalFolder, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stored_dtype(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    """The dtype that transformers gives a model of this checkpoint, such as ``bfloat16``."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        named = part.get("torch_dtype") or part.get("dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    counts = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    return next((names[dtype] for dtype, _ in counts.most_common() if dtype in names), "")


@dataclass
class _Comparison:
    """The same tensors in a checkpoint and as a model in memory would be written."""

    checkpoint: Checkpoint
    memory: Checkpoint
    same_dtype: bool  # whether the model was loaded in the checkpoint's dtype

    def still_held(self, old: StoredTensor, new: StoredTensor) -> bool:
        """Whether the model in memory holds what the checkpoint holds."""
        if old.shape != new.shape:
            return False
        if old.dtype == new.dtype:
            return self._same_bytes(old, new)
        if not self.same_dtype:
            return False
        before, after = self._tensor(self.checkpoint, old), self._tensor(self.memory, new)
        return bool(torch.equal(before.to(after.dtype), after))

    def equals(self, old: StoredTensor, tensor: torch.Tensor) -> bool:
        """Whether a tensor that memory does not write twice (tied weights) is the stored one."""
        stored = self._tensor(self.checkpoint, old)
        return bool(torch.equal(stored.to(tensor.dtype), tensor.cpu()))

    def _same_bytes(self, old: StoredTensor, new: StoredTensor) -> bool:
        there, here = self.checkpoint.source, self.memory.source
        with there.opened(old.file) as read_old, here.opened(new.file) as read_new:
            before = there.blocks(old.file, old.start, old.end, read_old)
            after = here.blocks(new.file, new.start, new.end, read_new)
            return all(a == b for a, b in zip(before, after, strict=True))

    def _tensor(self, checkpoint: Checkpoint, tensor: StoredTensor) -> torch.Tensor:
        assert checkpoint.source.folder is not None
        with safe_open(checkpoint.source.folder / tensor.file, "pt") as opened:
            found: torch.Tensor = opened.get_tensor(tensor.name)
        return found


def put_over(
    checkpoint: Checkpoint, kept: Kept, model: PreTrainedModel, folder: Path, dtype: str
) -> tuple[Checkpoint, Kept]:
    """The tensors of a pruned checkpoint, from the original or from memory.

    Args:
        checkpoint: what the model was loaded from.
        kept: its tensors that stay, with their new names.
        model: the pruned model.
        folder: what ``save_pretrained`` has written of `model`.
        dtype: the `stored_dtype` of the checkpoint.

    Returns:
        A checkpoint that holds both, and its tensors with their new names.
    """
    memory = read_checkpoint(LocalFolder(folder))
    same_dtype = str(model.dtype).removeprefix("torch.") == dtype
    comparison = _Comparison(checkpoint, memory, same_dtype)
    left = dict(memory.tensors)
    new_names = {name for pairs in kept.values() for _, name in pairs}
    keys = loading_keys(model, [name for name in new_names if name not in left])
    of_memory = loading_keys(model, [name for name in left if name not in new_names])
    elsewhere = _paired(keys, of_memory)
    served, state = set(of_memory.values()), stored_tensors(model)
    chosen: Kept = {}
    for file, pairs in kept.items():
        chosen[file] = []
        for old, name in pairs:
            new = left.pop(elsewhere.get(name, name), None)
            if new is not None:
                held = comparison.still_held(old, new)
                chosen[file].append((old if held else _moved(new), name))
            elif keys.get(name) not in state or (
                keys[name] not in served and comparison.equals(old, state[keys[name]])
            ):
                chosen[file].append((old, name))
    chosen[[*kept][-1]] += [(_moved(tensor), tensor.name) for tensor in left.values()]
    files = {FROM_MEMORY + file: entry for file, entry in memory.metadata.items()}
    both = {tensor.name: tensor for pairs in chosen.values() for tensor, _ in pairs}

    def find(file: str) -> tuple[Source, str]:
        above = file.startswith(FROM_MEMORY)
        source = memory.source if above else checkpoint.source
        return source, file.removeprefix(FROM_MEMORY)

    joined = Joined(checkpoint.source, find)
    return Checkpoint(joined, both, {**checkpoint.metadata, **files}), chosen


def _moved(tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, file=FROM_MEMORY + tensor.file)


def _paired(keys: dict[str, str], of_memory: dict[str, str]) -> dict[str, str]:
    """Names that differ in checkpoint and memory, though the model loads both to one place.

    Several tensors of one place, such as the experts of a layer, correspond in their order.
    """
    there, here = _by_key(keys), _by_key(of_memory)
    found: dict[str, str] = {}
    for key, names in there.items():
        others = here.get(key, [])
        if len(names) == len(others):
            found |= dict(zip(names, others, strict=True))
    return found


def _by_key(keys: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(keys, key=natural_order):
        found.setdefault(keys[name], []).append(name)
    return found
