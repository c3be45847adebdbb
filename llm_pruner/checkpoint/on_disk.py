"""Pruning a checkpoint on disk: new headers and copied byte ranges, no model in memory."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..atomic_output import check_output, staged_output
from ..config.config_file import find_layers, stored_quantization
from ..config.layer_names import LayerNames
from ..config.module_patterns import (
    QUANTIZATION_FILES,
    follow_config,
    follow_removal,
    module_names,
)
from ..engines.serving import Serving
from ..engines.verdict import check_engines, judge, refuse_wrong, verdicts
from ..errors import InvalidPlanError, LoadError, VerificationError
from ..output_rules import MANIFEST_FILE, PLAN_FILE
from ..progress import progress
from ..report.model_card import CARD_FILE, card_text, original_card
from ..results import PruningPlan, check_layers
from ..storage.gguf_models import find_gguf, read_gguf_checkpoint
from ..storage.manifest import Manifest, kept_tensors, layout_hash, new_manifest
from ..storage.origin import lineage
from ..storage.safetensors_files import (
    Checkpoint,
    Kept,
    Pair,
    StoredTensor,
    byte_ranges,
    header_bytes,
    new_shards,
    read_checkpoint,
    tensor_hashes,
)
from ..storage.sources import (
    INDEX_FILE,
    SINGLE_FILE,
    LocalFolder,
    Source,
    open_source,
    with_all_files,
)
from ..utils import logger, package_versions, resolve_model_id
from .gguf import read_gguf_model, refuse_other_engines, write_pruned_gguf
from .pruned_config import pruned_config
from .side_files import side_files

THREADS = 4  # files written at a time


def prune_checkpoint(
    model_id: str | Path,
    layers: Sequence[int] | PruningPlan,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    link: bool = False,
    drop_mtp: bool = False,
    serve_with: Sequence[str] = (),
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
        drop_mtp: leave out the blocks for multi-token prediction. They are kept otherwise, and
            follow the new last layer.
        serve_with: engines that have to compute the output right, of `engines.ENGINES`.
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
        drop_mtp=drop_mtp,
        serve_with=serve_with,
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
    drop_mtp: bool = False,
    serve_with: Sequence[str] = (),
    verify: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PruningPlan, Manifest]:
    """`prune_checkpoint`, and the plan as it was carried out."""
    check_output(output_dir, overwrite=overwrite, reads=[resolve_model_id(str(model_id))])
    serve_with = check_engines(serve_with)
    if isinstance(layers, PruningPlan):
        layers = _not_healed(layers)
    if paths := find_gguf(model_id):
        refuse_other_engines(serve_with)
        if link:
            raise InvalidPlanError(
                "link (--link) is for safetensors: every file of a pruned GGUF model is another."
            )
        return _prune_gguf(
            model_id,
            paths,
            layers,
            output_dir,
            overwrite=overwrite,
            drop_mtp=drop_mtp,
            hashed=verify,
        )
    source = open_source(model_id, revision)
    there = source.files()
    before = {file: source.stamp(file) for file in there}
    checkpoint = read_checkpoint(source)
    if SINGLE_FILE in there and INDEX_FILE in there:
        message = "%s has %s and %s: the first is pruned, which is what transformers loads."
        logger.warning(message, source.name, SINGLE_FILE, INDEX_FILE)
    if "adapter_config.json" in there:
        raise LoadError(
            f"Checkpoint {source.name!r} holds an adapter, whose weights belong to single layers: "
            "merge it into the model first (peft: merge_and_unload, then save_pretrained)."
        )
    names = find_layers(checkpoint.tensors, checkpoint.config, source.name)
    plan = _checked_plan(checkpoint, names, layers, str(model_id))
    plan = replace(plan, drop_mtp=plan.drop_mtp or drop_mtp)
    if all(judge(checkpoint.config, engine).state == "right" for engine in serve_with):
        serving = Serving.of_config(checkpoint.config, serve_with)
        serving.refuse_misplaced(plan.remove, names.num_layers)
    config = pruned_config(
        checkpoint, names, plan, trust_remote_code=trust_remote_code, verify=verify
    )
    plan = replace(plan, engines=verdicts(config))
    refuse_wrong(config, serve_with)
    kept = kept_tensors(checkpoint, names, plan)
    files = with_all_files(source)
    carried, _ = side_files(files, checkpoint.metadata)
    need = 0 if link else sum(tensor.size for pairs in kept.values() for tensor, _ in pairs)
    need += sum(map(files.size, carried))
    with staged_output(output_dir, overwrite=overwrite, need=need) as stage:
        manifest = write_checkpoint(
            stage, checkpoint, names, plan, kept, config, files, link=link, hashed=verify
        )
        (stage / CARD_FILE).write_text(_card(source, plan), encoding="utf-8")
        if verify:
            from .verify import verify_loading

            verify_loading(stage, checkpoint, names, plan, trust_remote_code=trust_remote_code)
        del checkpoint, kept  # makes room for the headers of the output
        check_manifest(stage)
        source.refuse_changed(before)
    return plan, manifest


def _prune_gguf(
    model_id: str | Path,
    paths: Sequence[Path],
    layers: Sequence[int] | PruningPlan,
    output_dir: str | Path,
    overwrite: bool,
    *,
    drop_mtp: bool,
    hashed: bool,
) -> tuple[PruningPlan, Manifest]:
    """`prune_on_disk` for a model in GGUF."""
    source = LocalFolder(paths[0].parent)
    before = {path.name: source.stamp(path.name) for path in paths}
    model = read_gguf_model(paths, str(model_id))
    plan = _checked_plan(model.checkpoint, model.names, layers, str(model_id))
    plan = replace(plan, drop_mtp=plan.drop_mtp or drop_mtp)
    model.changes(plan)  # what cannot be is refused before anything is written
    plan = replace(plan, engines=model.engines)
    with staged_output(output_dir, overwrite=overwrite, need=model.checkpoint.bytes) as stage:
        folder = Path(model_id).expanduser().is_dir()
        manifest = write_pruned_gguf(stage, model, plan, hashed=hashed, folder=folder)
        card = card_text(plan, original_card(str(model_id)), gguf=min(manifest.files))
        (stage / CARD_FILE).write_text(card, encoding="utf-8")
        check_manifest(stage)
        source.refuse_changed(before)
    return plan, manifest


def write_checkpoint(
    stage: Path,
    checkpoint: Checkpoint,
    names: LayerNames,
    plan: PruningPlan,
    kept: Kept,
    config: dict[str, Any],
    files: Source,
    *,
    link: bool = False,
    hashed: bool = False,
    bytes_before: int | None = None,
) -> Manifest:
    """Write a pruned checkpoint with all that is carried along, but for its card.

    Args:
        stage: an empty folder.
        checkpoint: the original.
        names: its layers.
        plan: which of them are removed.
        kept: tensors to write, with their new names.
        config: the contents of config.json.
        files: where the files beside the weights are copied from.
        link: hard-link files that stay as they are.
        hashed: record a hash of every tensor.
        bytes_before: see `new_manifest`.
    """
    shards = new_shards(kept)
    how: dict[str, Any] = {"hashed": hashed, "bytes_before": bytes_before}
    manifest = new_manifest(checkpoint, names, plan, shards, **how)
    _write_shards(checkpoint, stage, shards, link=link)
    if list(shards) != [SINGLE_FILE]:
        _write_index(stage / INDEX_FILE, shards, manifest.bytes_after)
    if stored_quantization(config):
        config = follow_config(config, names, plan.keep, module_names(checkpoint.tensors))
    write_json(stage / "config.json", config)
    left = carry_along(files, stage, names, plan.keep, checkpoint.tensors, checkpoint.metadata)
    manifest = replace(manifest, left_behind=left)
    plan.save(stage / PLAN_FILE)
    manifest.save(stage / MANIFEST_FILE)
    return manifest


def carry_along(
    source: Source,
    stage: Path,
    names: LayerNames,
    kept: Sequence[int],
    tensors: Collection[str] = (),
    weights: Collection[str] = (),
) -> list[str]:
    """Copy every file beside the weights; names of layers in quantisation settings follow.

    Args:
        source: where the files are.
        stage: the folder to write to.
        names: the layers.
        kept: indices of those that stay.
        tensors: names of all tensors of the source.
        weights: its files that hold them.

    Returns:
        The files that were left behind.
    """
    carried, left = side_files(source, weights)
    for file in carried:
        target = stage / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in QUANTIZATION_FILES:
            settings = source.read_json(file)
            write_json(target, follow_removal(settings, names, kept, module_names(tensors)))
            continue
        with target.open("wb") as opened:
            source.copy(file, 0, source.size(file), opened)
    return left


def _not_healed(plan: PruningPlan) -> PruningPlan:
    """`plan` without the record of a healing, which removing layers on disk does not repeat."""
    if plan.healing.get("method", "none") != "none":
        logger.warning(
            "The model of this plan was healed (%s), and the one that is written now is not: "
            "--heal %s heals it.",
            *[plan.healing["method"]] * 2,
        )
    return replace(plan, healing={})


def _checked_plan(
    checkpoint: Checkpoint, names: LayerNames, layers: Sequence[int] | PruningPlan, model_id: str
) -> PruningPlan:
    """The plan that was given, or one for the layers that were, with the checkpoint's identity."""
    if isinstance(layers, PruningPlan):
        plan = layers
    else:
        removed = check_layers(layers, names.num_layers)
        plan = PruningPlan(model_id, names.num_layers, removed, versions=package_versions())
    identity = checkpoint.identity(whole="sha256" in plan.model)
    plan.check_model(names.num_layers, identity)
    if not plan.remove:
        raise InvalidPlanError("layers=[]: there is nothing to remove. Name at least one layer.")
    earlier = lineage(checkpoint.source, names.num_layers)
    return replace(plan, model=identity, lineage=earlier)


def _card(source: Source, plan: PruningPlan) -> str:
    """A model card with the metadata of the source's card."""
    original = b""
    if CARD_FILE in source.files():
        original = source.read(CARD_FILE, 0, source.size(CARD_FILE))
    return card_text(plan, original.decode("utf-8", "replace"))


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
        for origin, part in groupby(pairs, key=lambda pair: pair[0].file):
            for start, end in byte_ranges(old for old, _ in part):
                checkpoint.source.copy(origin, start, end, target)
        target.flush()
        os.fsync(target.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as publishers write theirs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_index(path: Path, shards: dict[str, list[Pair]], total: int) -> None:
    """Write the file of every tensor, line by line: the text of it all is never in memory."""
    entries = sorted((name, file) for file, pairs in shards.items() for _, name in pairs)
    with path.open("w", encoding="utf-8") as index:
        index.write(f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{')
        for number, (name, file) in enumerate(entries):
            index.write(f"{',' if number else ''}\n    {json.dumps(name)}: {json.dumps(file)}")
        index.write("\n  }\n}\n")


def check_manifest(folder: str | Path) -> Manifest:
    """Compare a pruned checkpoint with its manifest, which is returned.

    In every file the tensors' names, dtypes and shapes have to agree; their bytes too, where the
    manifest has hashes of them. Manifests of format 1 are read as well.

    Raises:
        VerificationError: they differ; the message names the file, or the tensor if the manifest
            has hashes.
        LoadError, InvalidPlanError: the checkpoint or its manifest cannot be read.
    """
    paths = find_gguf(folder)
    checkpoint = read_gguf_checkpoint(paths) if paths else read_checkpoint(LocalFolder(folder))
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
