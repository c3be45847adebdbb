"""What a pruned checkpoint holds, and where its tensors came from: pruning_manifest.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from ..config.config_file import is_mtp
from ..config.layer_names import LayerNames
from ..errors import InvalidPlanError
from ..json_files import JsonFile, check_type
from ..results import PruningPlan, check_layers
from .safetensors_files import Checkpoint, Kept, Pair, tensor_hashes

FROM_MEMORY = "memory/"  # begins the names of files that hold what was in memory


@dataclass(frozen=True)
class Manifest(JsonFile):
    """What a checkpoint pruned on disk holds, and where its tensors came from.

    A tensor's name in the source follows from `prefixes` and `remove`: layer ``i`` of the output
    is the ``i``-th kept one (`tensor_origin`).

    Attributes:
        source: the checkpoint that was pruned, as it was named.
        revision: its commit on the hub, if it came from there.
        num_layers: its number of decoder layers.
        remove: the 0-based indices that were removed.
        prefixes: what comes before a layer's index in the names of its tensors.
        bytes_before, bytes_after: size of all tensors.
        tensors: how many there are in the output.
        files: by name: ``from``, the files of the source whose tensors it holds; ``tensors``, how
            many; ``layout``, hash of their names, dtypes and shapes (`layout_hash`).
        from_memory: names of the tensors that were not copied from the source.
        sha256: of every tensor's bytes by its name, if they were hashed.
        mtp_tensors: how many of the tensors belong to blocks for multi-token prediction.
        left_behind: files of the source that were not carried along: weights in other formats,
            and what describes them.
        origin: the number that each layer of the source has in the first model of its lineage
            (`PruningPlan.origin`); empty where the source is that model.
    """

    FORMAT = "llm_pruner.manifest/2"
    EARLIER = ("llm_pruner.manifest/1",)

    source: str
    revision: str | None
    num_layers: int
    remove: tuple[int, ...]
    prefixes: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    tensors: int
    files: dict[str, dict[str, Any]]
    from_memory: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)
    mtp_tensors: int = 0
    left_behind: list[str] = field(default_factory=list)
    origin: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "remove", check_layers(self.remove, self.num_layers))
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        object.__setattr__(self, "from_memory", tuple(self.from_memory))
        object.__setattr__(self, "origin", tuple(self.origin))
        for file, entry in self.files.items():
            missing = {"from", "tensors", "layout"} - entry.keys()
            if missing:
                raise InvalidPlanError(f"{file!r} is listed without {min(missing)!r}.")

    @property
    def keep(self) -> tuple[int, ...]:
        """The 0-based indices that stayed, ascending."""
        return tuple(index for index in range(self.num_layers) if index not in self.remove)

    @classmethod
    def _convert(cls, data: dict[str, Any]) -> dict[str, Any]:
        """manifest/1 had an entry for every tensor, and no prefixes."""
        entries: dict[str, dict[str, Any]] = check_type(data["tensors"], dict[str, Any], "tensors")
        for name, entry in entries.items():
            check_type(entry["shape"], list[int], name)
            check_type(entry["sha256"], str | None, name)
            for part in ("from", "file", "from_file", "dtype"):
                check_type(entry[part], str, name)
        by_file: dict[str, list[str]] = {}
        for name, entry in entries.items():
            by_file.setdefault(entry["file"], []).append(name)
        files = {
            file: {
                "from": sorted({entries[name]["from_file"] for name in names}),
                "tensors": len(names),
                "layout": layout_hash((n, entries[n]["dtype"], entries[n]["shape"]) for n in names),
            }
            for file, names in sorted(by_file.items())
        }
        prefixes = {
            ".".join([*takewhile(lambda part: not part.isdecimal(), name.split(".")), ""])
            for name, entry in entries.items()
            if name != entry["from"]
        }
        return {
            **data,
            "prefixes": sorted(prefixes),
            "tensors": len(entries),
            "files": files,
            "sha256": {name: x["sha256"] for name, x in entries.items() if x["sha256"]},
        }


def layout_hash(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    """A short hash of tensors' names, dtypes and shapes, in whatever order they come."""
    digest = hashlib.sha256()
    for name, dtype, shape in sorted(tensors):
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
    return digest.hexdigest()[:16]


def tensor_origin(manifest: Manifest, name: str) -> str | None:
    """What the source calls a tensor of the output; None if it was not copied from there."""
    if name in manifest.from_memory:
        return None
    if not manifest.prefixes:
        return name
    return LayerNames(manifest.prefixes, manifest.num_layers).original(name, manifest.keep)


def kept_tensors(checkpoint: Checkpoint, names: LayerNames, plan: PruningPlan) -> Kept:
    """The tensors that stay, in their order, with their new names.

    Blocks for multi-token prediction stay, and follow the last layer as before, unless the plan
    says otherwise.
    """
    kept: Kept = {}
    keep = plan.keep
    for tensor in checkpoint.tensors.values():
        name = names.rename(tensor.name, keep)
        if name is not None and not (plan.drop_mtp and is_mtp(tensor.name, names)):
            kept.setdefault(tensor.file, []).append((tensor, name))
    return kept


def new_manifest(
    checkpoint: Checkpoint,
    names: LayerNames,
    plan: PruningPlan,
    shards: dict[str, list[Pair]],
    *,
    hashed: bool = False,
    bytes_before: int | None = None,
) -> Manifest:
    """What a checkpoint without the layers of `plan` holds.

    Args:
        checkpoint: the original.
        names: its layers.
        plan: which of them are removed.
        shards: the new files by name: tensors of the original, with their new names.
        hashed: hash every tensor.
        bytes_before: size of the original's tensors, where `checkpoint` holds other ones too.
    """
    files = {
        file: {
            "from": sorted({old.file for old, _ in pairs if not old.file.startswith(FROM_MEMORY)}),
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
        bytes_before=checkpoint.bytes if bytes_before is None else bytes_before,
        bytes_after=sum(old.size for pairs in shards.values() for old, _ in pairs),
        tensors=sum(map(len, shards.values())),
        files=files,
        mtp_tensors=sum(is_mtp(old.name, names) for pairs in shards.values() for old, _ in pairs),
        from_memory=tuple(
            sorted(
                name
                for pairs in shards.values()
                for old, name in pairs
                if old.file.startswith(FROM_MEMORY)
            )
        ),
        sha256=hashes,
        origin=plan.origin if plan.lineage else (),
    )
