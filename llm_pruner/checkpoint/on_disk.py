"""Pruning a checkpoint where it lies: new headers, copied byte ranges, no model in memory.

torch is imported only for architectures whose config has to be worked out by their class
(`configs.SPELLED_OUT` lists the others), and even then no weight is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..atomic_output import PLAN_FILE, check_output, staged_output
from ..errors import InvalidPlanError, LoadError, VerificationError
from ..report.model_card import CARD_FILE, card_text
from ..results import Manifest, PruningPlan, check_layers
from ..utils import logger, package_versions, progress
from .locate import open_source
from .on_disk_config import find_layers, pruned_config
from .safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    StoredTensor,
    header_bytes,
    new_shards,
    read_checkpoint,
    read_json,
    runs,
    tensor_hash,
)
from .sources import LocalFolder, Source

MANIFEST_FILE = "pruning_manifest.json"
# Files that hold weights in other formats or belong to another program: not carried along.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
REPORTS = ("pruning_report.json", "report.html")  # of the source, where that is pruned itself
OWN_FILES = (INDEX_FILE, "config.json", PLAN_FILE, MANIFEST_FILE, CARD_FILE, *REPORTS)
WRITERS = 4  # files at a time
Shards = dict[str, list[tuple[StoredTensor, StoredTensor]]]


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

    Kept tensors are copied byte by byte, in the kernel where that can be; from the hub only they
    are downloaded. The config follows the rules that `BasePruner.prune_and_save` follows, and
    the model card is a new one with the metadata of the old; all other files are carried along,
    custom code and tokenizer too. ``pruning_manifest.json`` of
    the output says for every tensor where it came from.

    Args:
        model_id: ``demo``, a local folder, or an id on the Hugging Face hub.
        layers: 0-based indices to remove, or a plan.
        output_dir: folder to write; it appears complete or not at all.
        revision: branch, tag or commit of a hub repository.
        overwrite: replace an earlier output.
        link: hard-link files in which nothing changes instead of copying them.
        verify: also hash every kept tensor on both sides, which the manifest then records, check
            the config against a freshly built model, and reload the output with transformers,
            which takes the memory of the pruned model.
        trust_remote_code: run code that comes with the checkpoint, if its config needs it.

    Raises:
        LoadError: no checkpoint, a damaged one, or one that is not in safetensors format.
        InvalidPlanError: indices that do not fit the model, or a plan made for another one.
        UnsupportedModelError: the architecture cannot express the pruned model;
            `NeedsMemoryError` where `BasePruner.prune_and_save` can do it.
        OutputError: the output exists, or cannot be written.
        VerificationError: what was written is not what was read.
    """
    check_output(output_dir, overwrite=overwrite)
    source = open_source(model_id, revision)
    checkpoint = read_checkpoint(source)
    _refuse_adapter(source)
    values = read_json(source, "config.json")
    plan = layers if isinstance(layers, PruningPlan) else None
    found = find_layers(checkpoint, values)
    if plan is None:
        assert not isinstance(layers, PruningPlan)
        removed = check_layers(layers, found.num_layers)
        plan = PruningPlan(str(model_id), found.num_layers, removed, versions=package_versions())
    identity = checkpoint.identity()
    plan.check_model(found.num_layers, identity)
    plan = replace(plan, model=identity)
    if not plan.remove:
        raise InvalidPlanError("layers=[]: there is nothing to remove.")
    config = pruned_config(checkpoint, values, found, plan, trust_remote_code, verify)
    kept = [
        (tensor, name)
        for tensor in checkpoint.tensors.values()
        if (name := found.rename(tensor.name, plan.keep)) is not None
    ]
    shards = new_shards(kept)
    side_files = _side_files(source)
    need = sum(new.size for pairs in shards.values() for _, new in pairs)
    need += sum(map(source.size, side_files))
    manifest = _manifest(checkpoint, plan, shards, hashed=verify)
    with staged_output(output_dir, overwrite=overwrite, need=0 if link else need) as stage:
        with _writing_shards(checkpoint, stage, shards, link=link):
            _write_index(stage, shards)
            for file in side_files:
                (stage / file).parent.mkdir(parents=True, exist_ok=True)
                with (stage / file).open("wb") as target:
                    source.copy(file, 0, source.size(file), target)
            text = json.dumps(config, indent=2) + "\n"
            (stage / "config.json").write_text(text, encoding="utf-8")
            (stage / CARD_FILE).write_text(_card(source, plan), encoding="utf-8")
            plan.save(stage / PLAN_FILE)
            manifest.save(stage / MANIFEST_FILE)
        check_manifest(stage)
        if verify:
            _reload(stage, trust_remote_code)
    return manifest


def _refuse_adapter(source: Source) -> None:
    if "adapter_config.json" in source.files():
        raise LoadError(
            f"Checkpoint {source.name!r} holds an adapter, whose weights belong to single layers: "
            "merge it into the model first (peft: merge_and_unload, then save_pretrained)."
        )


def _side_files(source: Source) -> list[str]:
    """What is carried along: everything but weights, what is written anew, and hidden files."""
    return [
        file
        for file in source.files()
        if file not in OWN_FILES
        and not file.endswith((*WEIGHTS, ".index.json"))
        and not any(part.startswith(".") for part in file.split("/"))
    ]


def _card(source: Source, plan: PruningPlan) -> str:
    """A model card with the metadata of the source's."""
    original = b""
    if CARD_FILE in source.files():
        original = source.read(CARD_FILE, 0, source.size(CARD_FILE))
    return card_text(plan, original.decode("utf-8", "replace"))


def _manifest(
    checkpoint: Checkpoint, plan: PruningPlan, shards: Shards, *, hashed: bool
) -> Manifest:
    tensors = {}
    for file, pairs in shards.items():
        for old, new in pairs:
            tensors[new.name] = {
                "file": file,
                "dtype": new.dtype,
                "shape": list(new.shape),
                "from": old.name,
                "from_file": old.file,
                "sha256": tensor_hash(checkpoint.source, old) if hashed else None,
            }
    return Manifest(
        source=checkpoint.source.name,
        revision=checkpoint.source.revision,
        num_layers=plan.num_layers,
        remove=plan.remove,
        bytes_before=checkpoint.bytes,
        bytes_after=sum(new.size for pairs in shards.values() for _, new in pairs),
        tensors=tensors,
    )


@contextmanager
def _writing_shards(
    checkpoint: Checkpoint, stage: Path, shards: Shards, *, link: bool
) -> Iterator[None]:
    """Write the files beside what the block does, several at once; they are there at its end."""
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = [
            pool.submit(_write_shard, checkpoint, stage / file, pairs, link=link)
            for file, pairs in shards.items()
        ]
        try:
            yield
            for job in progress(as_completed(jobs), "Copying files", total=len(jobs)):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(
    checkpoint: Checkpoint,
    path: Path,
    pairs: Sequence[tuple[StoredTensor, StoredTensor]],
    *,
    link: bool,
) -> None:
    file = pairs[0][0].file
    whole = [tensor for tensor in checkpoint.tensors.values() if tensor.file == file]
    untouched = len(whole) == len(pairs) and all(old.name == new.name for old, new in pairs)
    if untouched and link and checkpoint.source.folder is not None:
        origin = (checkpoint.source.folder / file).resolve()
        try:
            os.link(origin, path)
            return
        except OSError as error:
            logger.warning("%s is copied, since it cannot be linked: %s.", file, error.strerror)
    first = pairs[0][0].start
    header = header_bytes([new for _, new in pairs], checkpoint.metadata[file], first)
    with path.open("wb") as target:
        target.write(header)
        for start, end in runs(old for old, _ in pairs):
            checkpoint.source.copy(file, start, end, target)
        target.flush()
        os.fsync(target.fileno())


def _write_index(stage: Path, shards: Shards) -> None:
    if list(shards) == [SINGLE_FILE]:
        return
    weight_map = {new.name: file for file, pairs in shards.items() for _, new in pairs}
    total = sum(new.size for pairs in shards.values() for _, new in pairs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (stage / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: str | Path) -> Manifest:
    """Compare a pruned checkpoint with its manifest: names, dtypes, shapes, bytes, and hashes.

    Returns the manifest.

    Raises:
        VerificationError: they differ; the message names a tensor.
        LoadError, InvalidPlanError: the checkpoint or its manifest cannot be read.
    """
    checkpoint = read_checkpoint(LocalFolder(folder))
    manifest = Manifest.load(Path(folder) / MANIFEST_FILE)
    for name in sorted(checkpoint.tensors.keys() | manifest.tensors.keys()):
        there, entry = checkpoint.tensors.get(name), manifest.tensors.get(name)
        if there is None or entry is None:
            where = "checkpoint" if there is None else "manifest"
            raise VerificationError(f"Tensor {name!r} is not in the {where} of {str(folder)!r}.")
        same = (there.file, there.dtype, list(there.shape)) == (
            entry["file"],
            entry["dtype"],
            entry["shape"],
        )
        hashed = entry["sha256"]
        if not same or (hashed and tensor_hash(checkpoint.source, there) != hashed):
            raise VerificationError(
                f"Tensor {name!r} in {str(folder)!r} is not what its manifest says: prune again."
            )
    return manifest


def _reload(folder: Path, trust_remote_code: bool) -> None:
    from ..model.loading import model_class
    from .verify import load_cleanly

    _, auto, _ = model_class(str(folder), trust_remote_code=trust_remote_code)
    load_cleanly(folder, auto, trust_remote_code=trust_remote_code)
