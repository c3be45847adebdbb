"""Pruning a checkpoint on disk: new headers and copied byte ranges, no model in memory."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from ..atomic_output import PLAN_FILE, check_output, staged_output
from ..config.layer_names import LayerNames
from ..errors import InvalidPlanError, LoadError, VerificationError
from ..report.model_card import CARD_FILE, card_text
from ..results import Manifest, PruningPlan, check_layers, layout_hash
from ..utils import logger, package_versions, progress
from .on_disk_config import find_layers, pruned_config
from .safetensors_files import (
    Checkpoint,
    Pair,
    StoredTensor,
    byte_ranges,
    header_bytes,
    new_shards,
    read_checkpoint,
    tensor_hashes,
)
from .sources import INDEX_FILE, PICKLES, SINGLE_FILE, LocalFolder, Source, open_source

MANIFEST_FILE = "pruning_manifest.json"
# Files that hold weights in other formats: not carried along.
WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
REPORTS = ("pruning_report.json", "report.html")  # of the source, if that was pruned itself
WRITTEN_ANEW = (INDEX_FILE, "config.json", PLAN_FILE, MANIFEST_FILE, CARD_FILE, *REPORTS)
THREADS = 4  # files written at a time


def prune_checkpoint(
    model_id: str | Path,
    layers: Sequence[int] | PruningPlan,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    link: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> Manifest:
    """Remove layers from a checkpoint on disk or on the hub without building the model.

    The bytes of kept tensors are copied, in the kernel where possible; from the hub only they are
    downloaded. The config follows the same rules as in `BasePruner.prune_and_save`. The model card
    is a new one with the metadata of the old; all other files but weights are carried along.
    ``pruning_manifest.json`` of the output says where its tensors came from.

    Args:
        model_id: ``demo``, a local folder, or an id on the Hugging Face hub.
        layers: 0-based indices to remove, or a plan.
        output_dir: folder to write; it appears complete or not at all.
        revision: branch, tag or commit of a hub repository.
        overwrite: replace an earlier output.
        link: hard-link unchanged files instead of copying them.
        verify: also hash every kept tensor on both sides (the manifest records the hashes), check
            the config against a freshly built model, and reload the output with transformers,
            which takes the memory of the pruned model.
        trust_remote_code: run code that comes with the checkpoint, if its config needs it.

    Raises:
        LoadError: no checkpoint, a damaged one, or one that is not in safetensors format.
        InvalidPlanError: indices that do not fit the model, or a plan made for another one.
        UnsupportedModelError: the architecture cannot express the pruned model;
            `NeedsMemoryError` where `BasePruner.prune_and_save` can do it.
        OutputError: the output exists, or cannot be written.
        VerificationError: the output is not what it should be; nothing is left of it.
    """
    _, manifest = prune_on_disk(
        model_id,
        layers,
        output_dir,
        revision=revision,
        overwrite=overwrite,
        link=link,
        verify=verify,
        trust_remote_code=trust_remote_code,
    )
    return manifest


def prune_on_disk(
    model_id: str | Path,
    layers: Sequence[int] | PruningPlan,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    link: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PruningPlan, Manifest]:
    """`prune_checkpoint`, and the plan as it was carried out."""
    check_output(output_dir, overwrite=overwrite)
    source = open_source(model_id, revision)
    checkpoint = read_checkpoint(source)
    if "adapter_config.json" in source.files():
        raise LoadError(
            f"Checkpoint {source.name!r} holds an adapter, whose weights belong to single layers: "
            "merge it into the model first (peft: merge_and_unload, then save_pretrained)."
        )
    names = find_layers(checkpoint)
    plan = _checked_plan(checkpoint, names, layers, str(model_id))
    config = pruned_config(
        checkpoint, names, plan, trust_remote_code=trust_remote_code, verify=verify
    )
    keep = plan.keep
    shards = new_shards(
        (tensor, new_name)
        for tensor in checkpoint.tensors.values()
        if (new_name := names.rename(tensor.name, keep)) is not None
    )
    manifest = _manifest(checkpoint, names, plan, shards, hashed=verify)
    side_files = _side_files(source)
    need = 0 if link else manifest.bytes_after + sum(map(source.size, side_files))
    with staged_output(output_dir, overwrite=overwrite, need=need) as stage:
        _write_shards(checkpoint, stage, shards, link=link)
        for file in side_files:
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            with (stage / file).open("wb") as target:
                source.copy(file, 0, source.size(file), target)
        if list(shards) != [SINGLE_FILE]:
            _write_index(stage / INDEX_FILE, shards, manifest.bytes_after)
        del checkpoint, shards  # make room for the headers of the output
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (stage / CARD_FILE).write_text(_card(source, plan), encoding="utf-8")
        plan.save(stage / PLAN_FILE)
        manifest.save(stage / MANIFEST_FILE)
        check_manifest(stage)
        if verify:
            from ..model.loading import model_class
            from .verify import load_cleanly

            _, auto, _ = model_class(str(stage), trust_remote_code=trust_remote_code)
            load_cleanly(stage, auto, trust_remote_code=trust_remote_code)
    return plan, manifest


def _checked_plan(
    checkpoint: Checkpoint, names: LayerNames, layers: Sequence[int] | PruningPlan, model_id: str
) -> PruningPlan:
    """The plan that was given, or one for the layers that were, with the checkpoint's identity."""
    if isinstance(layers, PruningPlan):
        plan = layers
    else:
        removed = check_layers(layers, names.num_layers)
        plan = PruningPlan(model_id, names.num_layers, removed, versions=package_versions())
    identity = checkpoint.identity()
    plan.check_model(names.num_layers, identity)
    if not plan.remove:
        raise InvalidPlanError("layers=[]: there is nothing to remove. Name at least one layer.")
    return replace(plan, model=identity)


def _side_files(source: Source) -> list[str]:
    """Files to carry along: all but weights, what is written anew, and hidden files."""
    return [
        file
        for file in source.files()
        if file not in WRITTEN_ANEW
        and not file.endswith((*WEIGHTS, ".index.json"))
        and not any(part.startswith(".") for part in file.split("/"))
    ]


def _card(source: Source, plan: PruningPlan) -> str:
    """A model card with the metadata of the source's card."""
    original = b""
    if CARD_FILE in source.files():
        original = source.read(CARD_FILE, 0, source.size(CARD_FILE))
    return card_text(plan, original.decode("utf-8", "replace"))


def _manifest(
    checkpoint: Checkpoint,
    names: LayerNames,
    plan: PruningPlan,
    shards: dict[str, list[Pair]],
    *,
    hashed: bool,
) -> Manifest:
    files = {
        file: {
            "from": sorted({old.file for old, _ in pairs}),
            "tensors": len(pairs),
            "layout": layout_hash((name, old.dtype, old.shape) for old, name in pairs),
        }
        for file, pairs in shards.items()
    }
    hashes: dict[str, str] = {}
    for pairs in shards.values() if hashed else ():
        found = tensor_hashes(checkpoint.source, (old for old, _ in pairs))
        hashes.update(zip((name for _, name in pairs), found, strict=True))
    return Manifest(
        source=checkpoint.source.name,
        revision=checkpoint.source.revision,
        num_layers=plan.num_layers,
        remove=plan.remove,
        prefixes=names.prefixes,
        bytes_before=checkpoint.bytes,
        bytes_after=sum(old.size for pairs in shards.values() for old, _ in pairs),
        tensors=sum(map(len, shards.values())),
        files=files,
        sha256=hashes,
    )


def _write_shards(
    checkpoint: Checkpoint, stage: Path, shards: dict[str, list[Pair]], *, link: bool
) -> None:
    """Write the files, several at a time."""
    counts = Counter(tensor.file for tensor in checkpoint.tensors.values())
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = []
        for file, pairs in shards.items():
            complete = len(pairs) == counts[pairs[0][0].file]
            unchanged = complete and all(old.name == name for old, name in pairs)
            job = pool.submit(_write_shard, checkpoint, stage / file, pairs, link and unchanged)
            jobs.append(job)
        try:
            for job in progress(as_completed(jobs), "Copying files", total=len(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(checkpoint: Checkpoint, path: Path, pairs: Sequence[Pair], link: bool) -> None:
    file = pairs[0][0].file
    if link and checkpoint.source.folder is not None:
        try:
            os.link((checkpoint.source.folder / file).resolve(), path)
            return
        except OSError as error:
            logger.warning("%s is copied, since it cannot be linked: %s.", file, error.strerror)
    first = pairs[0][0].start
    with path.open("wb") as target:
        target.write(header_bytes(pairs, checkpoint.metadata[file], first))
        for start, end in byte_ranges(old for old, _ in pairs):
            checkpoint.source.copy(file, start, end, target)
        target.flush()
        os.fsync(target.fileno())


def _write_index(path: Path, shards: dict[str, list[Pair]], total: int) -> None:
    """Write the file of every tensor, line by line: the text of it all is never in memory."""
    entries = sorted((name, file) for file, pairs in shards.items() for _, name in pairs)
    with path.open("w", encoding="utf-8") as index:
        index.write(f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{')
        for number, (name, file) in enumerate(entries):
            index.write(f"{',' if number else ''}\n    {json.dumps(name)}: {json.dumps(file)}")
        index.write("\n  }\n}\n")


def tensor_origin(manifest: Manifest, name: str) -> str | None:
    """What the source calls a tensor of the output; None if it was not copied from there."""
    if name in manifest.from_memory:
        return None
    if not manifest.prefixes:
        return name
    return LayerNames(manifest.prefixes, manifest.num_layers).original(name, manifest.keep)


def check_manifest(folder: str | Path) -> Manifest:
    """Compare a pruned checkpoint with its manifest, which is returned.

    In every file the tensors' names, dtypes and shapes have to agree; their bytes too, where the
    manifest has hashes of them. Manifests of format 1 are read as well.

    Raises:
        VerificationError: they differ; the message names the file, or the tensor if the manifest
            has hashes.
        LoadError, InvalidPlanError: the checkpoint or its manifest cannot be read.
    """
    checkpoint = read_checkpoint(LocalFolder(folder))
    manifest = Manifest.load(Path(folder) / MANIFEST_FILE)
    if manifest.sha256:
        stored = checkpoint.tensors
        _same_names("Tensor", stored.keys(), manifest.sha256.keys(), folder)
        hashes = tensor_hashes(checkpoint.source, stored.values())
        for name, sha256 in zip(stored, hashes, strict=True):
            if sha256 != manifest.sha256[name]:
                raise VerificationError(
                    f"Tensor {name!r} in {str(folder)!r} is not what its manifest says: prune "
                    "again."
                )
    _same_names("File", checkpoint.metadata.keys(), manifest.files.keys(), folder)
    in_file: dict[str, list[StoredTensor]] = {file: [] for file in checkpoint.metadata}
    for tensor in checkpoint.tensors.values():
        in_file[tensor.file].append(tensor)
    for file, tensors in in_file.items():
        entry = manifest.files[file]
        layout = layout_hash((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
        if (len(tensors), layout) != (entry["tensors"], entry["layout"]):
            raise VerificationError(
                f"File {file!r} in {str(folder)!r} holds {len(tensors)} tensors that are not the "
                f"{entry['tensors']} of its manifest, by their names, dtypes and shapes: prune "
                "again."
            )
    return manifest


def _same_names(kind: str, stored: Set[str], listed: Set[str], folder: str | Path) -> None:
    """Raise VerificationError if names are only in the checkpoint or only in the manifest."""
    if stored != listed:
        name = min(stored ^ listed)
        where = "manifest" if name in stored else "checkpoint"
        raise VerificationError(
            f"{kind} {name!r} is not in the {where} of {str(folder)!r}: prune again."
        )
