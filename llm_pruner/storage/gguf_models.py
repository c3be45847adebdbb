"""Models in GGUF: where their files are, and what they hold together."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LoadError
from ..utils import resolve_model_id, user_path
from .gguf_files import MAGIC, Field, GgufFile, read_gguf, write_gguf
from .safetensors_files import Checkpoint, StoredTensor
from .sources import PICKLES, LocalFolder

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # of a model that is split into files
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = SPLIT_KEYS = (
    "split.no",
    "split.count",
    "split.tensors.count",
)


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A model in GGUF: one file, or several that belong together.

    Attributes:
        files: by name, the first one first: it holds the metadata.
    """

    files: dict[str, GgufFile] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Field]:
        """The metadata."""
        return next(iter(self.files.values())).fields

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the kind of model, such as ``llama``."""
        return str(self.values.get("general.architecture", ""))

    @property
    def values(self) -> dict[str, Any]:
        """The values of the metadata by key; None for those that are not kept in memory."""
        return {key: entry.value for key, entry in self.fields.items()}


def find_gguf(model_id: str | Path) -> list[Path]:
    """The files of the GGUF model that a path means; empty where it means none.

    The path is that of a file, of any part of a split model, or of a folder that holds one model
    in GGUF and no checkpoint of another form; ``smollm2`` is the file of that package.

    Raises:
        LoadError: there is no such file, a part is missing, or a folder holds several models, or
            folders with some.
    """
    path = user_path(resolve_model_id(model_id))
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() != ".gguf" and not _begins_as_gguf(path):
        return []
    if not path.is_file():
        raise LoadError(f"There is no file {str(path)!r}: give the path of a GGUF file.")
    match = PART.fullmatch(path.name)
    count = int(match[3]) if match else 0
    if match is None or not 0 < int(match[2]) <= count:
        return [path]
    parts = [path.with_name(part_name(match[1], number, count)) for number in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise LoadError(
            f"{path.name!r} is one of {count} files of a model, and {len(missing)} of them are not "
            f"beside it, such as {missing[0]!r}: fetch them all."
        )
    return parts


def _begins_as_gguf(path: Path) -> bool:
    """Whether it is a file that says so itself, as those of some programs do under other names."""
    if not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # what cannot be read, other errors tell
        return False


def part_name(stem: str, number: int, count: int) -> str:
    """The name of a part of a split model; `number` counts from 0, the name from 1."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def _in_folder(folder: Path) -> list[Path]:
    names = sorted(os.listdir(folder))
    pickled = "config.json" in names and any(name.endswith(PICKLES) for name in names)
    if pickled or any(name.endswith(".safetensors") for name in names):
        return []
    files = [name for name in names if name.endswith(".gguf") and (folder / name).is_file()]
    below = sorted(folder.glob("*/*.gguf")) if not files and "config.json" not in names else []
    if below:
        raise LoadError(
            f"{str(folder)!r} holds models in GGUF in folders of their own: name one of these, "
            f"e.g. {str(below[0].parent)!r}."
        )
    models: dict[str, str] = {}  # the first file of each
    for name in [name for name in files if not is_companion(name)] or files:
        match = PART.fullmatch(name)
        models.setdefault(part_name(match[1], 0, int(match[3])) if match else name, name)
    if len(models) > 1:
        raise LoadError(
            f"{str(folder)!r} holds {len(models)} models in GGUF ({', '.join([*models][:4])}): "
            f"name the file of one, e.g. {str(folder / min(models.values()))!r}."
        )
    return [path for name in models.values() for path in find_gguf(folder / name)]


def is_companion(name: str) -> bool:
    """Whether a file's name says that it goes with a model: a projector, or an imatrix."""
    return re.search(r"mmproj|imatrix", name, re.IGNORECASE) is not None


def read_gguf_checkpoint(paths: Sequence[Path], name: str = "") -> GgufCheckpoint:
    """All metadata and tensors of a model in GGUF, checked against its files.

    Args:
        paths: the files, as `find_gguf` gives them.
        name: the model as the user named it.

    Raises:
        LoadError: damaged files, or files that do not belong together; the message names the file.
        MissingDependencyError: the ``gguf`` package is needed.
    """
    source = LocalFolder(paths[0].parent, name or str(paths[0]))
    files = {path.name: read_gguf(source, path.name) for path in paths}
    tensors: dict[str, StoredTensor] = {}
    for number, (file, found) in enumerate(files.items()):
        place, count = (
            found.fields[key].value if key in found.fields else None
            for key in (SPLIT_NUMBER, SPLIT_COUNT)
        )
        if len(files) > 1 and (place, count) != (number, len(files)):
            raise source.broken(
                file,
                f"its metadata says that it is part {place} of {count} (from 0 on), and its name "
                f"that it is {number} of {len(files)}",
            )
        if len(files) == 1 and type(count) is int and count > 1:
            raise source.broken(
                file, f"it is one of {count} parts of a model, by its metadata: keep their names"
            )
        for tensor in found.tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                raise source.broken(file, f"tensor {tensor.name!r} stands in {other!r} too")
            tensors[tensor.name] = tensor
    total = files[paths[0].name].fields.get(SPLIT_TENSORS)
    if total is not None and total.value not in (0, len(tensors)):
        raise source.broken(
            paths[0].name, f"it says that the model has {total.value} tensors, not {len(tensors)}"
        )
    return GgufCheckpoint(source, tensors, {file: {} for file in files}, files)


def write_joined(checkpoint: GgufCheckpoint, target: BinaryIO) -> None:
    """Write the files of a split model as one."""
    first = next(iter(checkpoint.files.values()))
    fields = [entry for key, entry in first.fields.items() if key not in SPLIT_KEYS]
    pairs = [(tensor, tensor.name) for tensor in checkpoint.tensors.values()]
    write_gguf(checkpoint.source, first, fields, pairs, target)
