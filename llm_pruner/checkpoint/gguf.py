"""GGUF without some layers: the file's own bytes, and metadata that says what is left.

What llama.cpp would otherwise work out from a layer's index, or from their number, is written down
where the format has a key for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..atomic_output import replaced_file
from ..config.config_file import decoder_part, is_mtp, layer_count
from ..config.gguf_metadata import INT32, UINT16, find_blocks, prune_metadata
from ..config.layer_names import LayerNames
from ..engines.llama_cpp import ARCHITECTURES, LLAMA_CPP
from ..engines.serving import GgufLayers, Serving
from ..engines.verdict import check_engines
from ..errors import InvalidPlanError, LoadError, OutputError, UnsupportedModelError
from ..output_rules import MANIFEST_FILE, PLAN_FILE
from ..results import PruningPlan
from ..storage.gguf_files import Field, GgufFile, encode_field, read_gguf, write_gguf
from ..storage.gguf_models import (
    PART,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    GgufCheckpoint,
    find_gguf,
    is_companion,
    part_name,
    read_gguf_checkpoint,
)
from ..storage.manifest import Manifest, kept_tensors, new_manifest
from ..storage.safetensors_files import Pair
from ..utils import logger
from .side_files import side_files

TOKENS = "tokenizer.ggml.tokens"
NAMED_TENSORS = "general.tensor_extra.name"  # a list that others go along with
ALONGSIDE = "general.tensor_extra."
PROJECTORS = ("mmproj", "clip")  # what a file says it is


@dataclass(frozen=True)
class GgufModel:
    """A model in GGUF, and what is known of its layers."""

    checkpoint: GgufCheckpoint

    @property
    def name(self) -> str:
        """The model, as the user named it."""
        return self.checkpoint.source.name

    @cached_property
    def _blocks(self) -> tuple[LayerNames, int]:
        return find_blocks(self.checkpoint.values, self.checkpoint.tensors, self.name)

    @property
    def names(self) -> LayerNames:
        """The layers among the names of tensors."""
        return self._blocks[0]

    @property
    def extra(self) -> int:
        """How many blocks for multi-token prediction follow the last layer."""
        return self._blocks[1]

    @cached_property
    def layers(self) -> GgufLayers:
        """What llama.cpp takes the layers for."""
        tokens = self.checkpoint.fields.get(TOKENS)
        vocabulary = tokens.count if tokens else None
        return GgufLayers(self.checkpoint.values, self.names.num_layers, vocabulary)

    @property
    def serving(self) -> Serving:
        """The sets of layers without which llama.cpp computes the model right."""
        return Serving.of_gguf(self.layers)

    @property
    def engines(self) -> dict[str, str]:
        """What serving engines make of the pruned model, for `PruningPlan.engines`."""
        return {"llama.cpp": "right"} if self.layers.known else {}

    def changes(self, plan: PruningPlan) -> dict[str, tuple[int, Any]]:
        """What the metadata says after a removal and did not before, by key: type and value.

        Raises:
            UnsupportedModelError: the kept layers cannot work without the removed ones.
            InvalidPlanError: llama.cpp would not compute the model right without these layers.
        """
        values, fields = self.checkpoint.values, self.checkpoint.fields
        num_layers = self.names.num_layers
        changed = {
            key: (fields[key].type, value)
            for key, value in prune_metadata(
                values, plan.keep, num_layers, drop_mtp=plan.drop_mtp
            ).items()
        }
        self.serving.refuse_misplaced(plan.remove, num_layers)
        extra = 0 if plan.drop_mtp else self.extra
        return changed | self.layers.said(plan.keep, extra) | self._named_tensors(plan)

    def _named_tensors(self, plan: PruningPlan) -> dict[str, tuple[int, Any]]:
        """Lists that go along with one of tensors' names."""
        fields = self.checkpoint.fields
        given = fields.get(NAMED_TENSORS)
        if given is None:
            return {}
        lists = {key: entry for key, entry in fields.items() if key.startswith(ALONGSIDE)}
        for key, entry in lists.items():
            if not isinstance(entry.value, list) or entry.count != given.count:
                raise LoadError(
                    f"{key} of {self.name!r} is not a list as long as {NAMED_TENSORS}, or too long "
                    "to be read."
                )
        new = [_new_name(str(name), self.names, plan) for name in given.value]
        stay = [place for place, name in enumerate(new) if name is not None]
        return {
            key: (entry.type, [(new if key == NAMED_TENSORS else entry.value)[i] for i in stay])
            for key, entry in lists.items()
        }


def refuse_other_engines(names: Iterable[str]) -> None:
    """Raise InvalidPlanError if others than llama.cpp are to serve a model in GGUF."""
    others = [name for name in check_engines(names) if name != LLAMA_CPP.name]
    if others:
        raise InvalidPlanError(
            f"--serve-with {','.join(others)}: a model in GGUF is for llama.cpp, in which it is "
            "always right. Use the original model for other engines."
        )


def read_gguf_model(paths: Sequence[Path], name: str = "") -> GgufModel:
    """A decoder-only language model in GGUF, from its files; see `read_gguf_checkpoint`."""
    model = GgufModel(read_gguf_checkpoint(paths, name))
    logger.debug("%s has %d layers", model.name, model.names.num_layers)
    if not model.layers.known:
        logger.warning(
            "It is not known what llama.cpp works out by itself of the layers of a %s model: "
            "compare its output with that of the whole model.",
            model.checkpoint.architecture,
        )
    return model


def write_pruned_gguf(
    stage: Path,
    model: GgufModel,
    plan: PruningPlan,
    *,
    hashed: bool = False,
    folder: bool = False,
) -> Manifest:
    """Write a model in GGUF without the layers of `plan`, its plan and its manifest.

    Args:
        stage: an empty folder.
        model: the whole model.
        plan: which layers are removed.
        hashed: record a hash of every tensor.
        folder: carry along what lies around the model in its folder.

    Raises:
        UnsupportedModelError, InvalidPlanError: see `GgufModel.changes`.
    """
    original = model.checkpoint
    changes = model.changes(plan)
    kept = kept_tensors(original, model.names, plan)
    first = next(iter(original.files))
    parts = [(file, kept.get(file, [])) for file in original.files if file in kept or file == first]
    names = _new_names([file for file, _ in parts])
    total = sum(len(pairs) for _, pairs in parts)
    for number, (file, pairs) in enumerate(parts):
        split = {
            SPLIT_NUMBER: (UINT16, number),
            SPLIT_COUNT: (UINT16, len(parts)),
            SPLIT_TENSORS: (INT32, total),
        }
        found = original.files[file]
        said: dict[str, tuple[int, Any]] = {
            key: value for key, value in split.items() if key in found.fields
        }
        if file == first:
            said |= changes
        _write(stage / names[number], original, found, pairs, said)
    manifest = new_manifest(
        original,
        model.names,
        plan,
        {name: pairs for name, (_, pairs) in zip(names, parts, strict=True)},
        hashed=hashed,
    )
    left = _surround(stage, model, plan) if folder else _beside(model)
    manifest = replace(manifest, left_behind=left)
    plan.save(stage / PLAN_FILE)
    manifest.save(stage / MANIFEST_FILE)
    return manifest


def _new_name(name: str, names: LayerNames, plan: PruningPlan) -> str | None:
    """What a tensor is called without the layers of a plan; None if it goes with them."""
    return None if plan.drop_mtp and is_mtp(name, names) else names.rename(name, plan.keep)


def _new_names(files: Sequence[str]) -> list[str]:
    match = PART.fullmatch(files[0])
    if match is None:
        stem = files[0][:-5] if files[0].lower().endswith(".gguf") else files[0]
        return [f"{stem}-pruned.gguf"]
    return [part_name(f"{match[1]}-pruned", number, len(files)) for number in range(len(files))]


def _write(
    path: Path,
    original: GgufCheckpoint,
    file: GgufFile,
    pairs: Sequence[Pair],
    changes: Mapping[str, tuple[int, Any]],
) -> None:
    """Write one file, and wait until it is on the disk."""
    with path.open("wb") as target:
        write_gguf(original.source, file, _entries(file, changes), pairs, target)
        target.flush()
        os.fsync(target.fileno())


def _entries(file: GgufFile, changes: Mapping[str, tuple[int, Any]]) -> list[Field | bytes]:
    """A file's metadata with other values, in its order; what is new comes last."""
    new = {key: encode_field(key, type, value) for key, (type, value) in changes.items()}
    entries: list[Field | bytes] = [new.pop(key, entry) for key, entry in file.fields.items()]
    return [*entries, *new.values()]


def _beside(model: GgufModel) -> list[str]:
    """Files beside a model that was named itself which may go with it; they are left alone."""
    folder = model.checkpoint.source.folder
    others = {*os.listdir(folder)} - model.checkpoint.files.keys() if folder else ()
    return sorted(filter(is_companion, others))


def _surround(stage: Path, model: GgufModel, plan: PruningPlan) -> list[str]:
    """Copy what lies around a model in its folder; importance matrices lose the same layers.

    Returns:
        The files that were left behind.
    """
    source = model.checkpoint.source
    carried, left = side_files(source, model.checkpoint.files)
    for file in list(left):
        if "/" in file or not (file.endswith(".gguf") and is_companion(file)):
            continue
        companion = read_gguf(source, file)
        kinds = {
            companion.fields[key].value
            for key in ("general.type", "general.architecture")
            if key in companion.fields and isinstance(companion.fields[key].value, str)
        }
        pairs = [(tensor, tensor.name) for tensor in companion.tensors]
        if "imatrix" in kinds:
            renamed = ((old, _new_name(name, model.names, plan)) for old, name in pairs)
            pairs = [(old, name) for old, name in renamed if name is not None]
        elif not kinds.intersection(PROJECTORS):
            continue  # another model, whatever its name says
        with (stage / file).open("wb") as target:
            write_gguf(source, companion, companion.fields.values(), pairs, target)
        left.remove(file)
    for file in carried:
        (stage / file).parent.mkdir(parents=True, exist_ok=True)
        with (stage / file).open("wb") as target:
            source.copy(file, 0, source.size(file), target)
    return left


def fix_gguf(path: str | Path, config: Mapping[str, Any]) -> list[str]:
    """Write into a converted GGUF file what its converter leaves to llama.cpp's own reckoning.

    The file is replaced in one step; its tensors are copied byte for byte.

    Args:
        path: the GGUF file, or any part of a split one.
        config: the contents of the config.json that it was converted from.

    Returns:
        The keys that were written; none if the file says everything already.

    Raises:
        LoadError: no GGUF file, a damaged one, or one of another model.
        UnsupportedModelError: no metadata makes llama.cpp compute this model right.
        OutputError: the file cannot be written.
    """
    paths = find_gguf(path) or [Path(path)]
    checkpoint = read_gguf_checkpoint(paths, str(path))
    model, architecture = GgufModel(checkpoint), checkpoint.architecture
    types, _ = ARCHITECTURES.get(architecture, ("", ()))
    kinds = {str(part.get("model_type")) for part in (config, decoder_part(dict(config)))}
    count, depth = layer_count(dict(config)), model.names.num_layers
    if not kinds & {*types.split()} or count != depth:
        raise LoadError(
            f"{str(path)!r} is not what this config.json describes: {architecture} of "
            f"{depth} layers, not {' or '.join(sorted(kinds))} of {count}. Convert the "
            "pruned model first (convert_hf_to_gguf.py), and give both."
        )
    meant = model.layers.meant_by(config)
    problem = Serving.of_gguf(meant).problem(range(depth))
    if problem:
        raise UnsupportedModelError(
            f"No metadata makes this model right ({problem}): prune the original with "
            "--serve-with llama.cpp."
        )
    changes = meant.said(range(depth), model.extra)
    if changes:
        first = paths[0]  # the one that has the metadata
        if not first.stat().st_mode & 0o222:
            raise OutputError(f"{str(first)!r} is write-protected: allow writing, or fix a copy.")
        file, source = checkpoint.files[first.name], checkpoint.source
        pairs = [(tensor, tensor.name) for tensor in file.tensors]
        with replaced_file(first, need=source.size(first.name)) as target:
            write_gguf(source, file, _entries(file, changes), pairs, target)
    return sorted(changes)
