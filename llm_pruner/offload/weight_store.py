"""The weights of an offloaded model, read from its checkpoint when a pass needs them.

A parameter that only one station needs (see `Scheduler`) is in memory while passes are there. One
that several stations need, or an unknown part of the model, is always in memory. At all other times
an empty parameter on the meta device takes its place.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..config.layer_names import LayerNames
from ..config.rules import OTHER_TOWERS
from ..errors import LoadError, UnsupportedModelError
from ..storage.content_hash import weights_hash
from ..storage.safetensors_files import file_tensors
from ..storage.sources import LocalFolder

EMBEDDING = -1  # the station before layer 0; the head's is the number of layers
TOWERS = -2  # the station of weights for inputs other than text, where no pass stops


@dataclass(eq=False)
class Weights:
    """The tensors of a checkpoint, read when asked for.

    Attributes:
        index: name in the model -> file, name in the file, and dtype to load with.
        device: where to put them.
        folder: of the files that had to be written; it is removed with this object.
        bytes_read: bytes read so far, as stored in the files.
    """

    index: dict[str, dict[str, str]]
    device: torch.device
    folder: tempfile.TemporaryDirectory[str]
    bytes_read: int = 0
    _fingerprint: str = ""

    def name_of(self, names: Sequence[str]) -> str:
        """The one of a tensor's `names` under which it is stored; LoadError if there is none."""
        for name in names:
            if name in self.index:
                return name
        raise LoadError(f"No file of the checkpoint holds {names[0]!r}: it cannot be offloaded.")

    def fingerprint(self, model: nn.Module) -> str:
        """Short hash of the config of `model` and of all files that hold its weights."""
        if not self._fingerprint:
            digest = hashlib.sha256(model.config.to_json_string().encode())  # type: ignore[operator, union-attr]
            for file in sorted({Path(entry["safetensors_file"]) for entry in self.index.values()}):
                source = LocalFolder(file.parent)
                digest.update(weights_hash(source, file_tensors(source, file.name)).encode())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names; LoadError if a file can no longer be read."""
        found: dict[str, torch.Tensor] = {}
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self.index[name]["safetensors_file"], []).append(name)
        for file, inside in files.items():
            written = file.startswith(self.folder.name)
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in inside:
                        stored = opened.get_tensor(self.index[name].get("weight_name", name))
                        self.bytes_read += stored.nbytes
                        dtype = getattr(torch, self.index[name]["dtype"])
                        # As transformers does, down to the alignment, on which some kernels depend:
                        # what is used as stored is mapped from its file, what was converted is new.
                        found[name] = stored.to(self.device, dtype, copy=written)
            except OSError as error:
                raise LoadError(
                    f"Cannot read {file!r} any more: {error}. Keep the checkpoint where it is "
                    "while it is scored, and load it again."
                ) from error
        return found


class Stations:
    """The parameters of a model on the meta device, by the station that needs them."""

    def __init__(self, model: nn.Module, names: LayerNames, weights: Weights) -> None:
        self._model, self._weights = model, weights
        self._groups: dict[int | None, list[_Parameter]] = {}
        for parameter in _parameters(model, names, weights):
            self._groups.setdefault(parameter.station, []).append(parameter)
        for tower in self._groups.pop(TOWERS, []):  # never needed, but models ask for their device
            if tower.empty.is_floating_point():
                nothing = torch.full((), torch.nan, dtype=tower.empty.dtype, device=weights.device)
                tower.put(nn.Parameter(nothing.expand_as(tower.empty)))

    @property
    def sizes(self) -> dict[int | None, int]:
        """Bytes of weights by station; those of None are always in memory."""
        return {
            station: sum(parameter.empty.nbytes for parameter in group)
            for station, group in self._groups.items()
        }

    @contextmanager
    def loaded(self, station: int | None) -> Iterator[None]:
        """Inside the block a station's weights are in memory; of None, those needed everywhere."""
        group = self._groups.get(station, [])
        tensors = self._weights.read(parameter.name for parameter in group)
        for parameter in group:
            requires_grad = parameter.empty.requires_grad  # some kernels depend on it
            parameter.put(nn.Parameter(tensors.pop(parameter.name), requires_grad))
        try:
            yield
        finally:
            for parameter in group:
                parameter.put(parameter.empty)

    def check_untouched(self) -> None:
        """Raise UnsupportedModelError if the model has changed weights that are not in memory."""
        every = (parameter for group in self._groups.values() for parameter in group)
        changed = [one.name for one in every if one.empty._version != one.version]
        if changed:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} changes its own weights as it runs ({changed[0]}), "
                "so they cannot be read from disk: load it whole, without a limit of memory."
            )


@dataclass
class _Parameter:
    """A parameter, its owners in the module tree, and the only station that needs it, if one is."""

    empty: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    name: str
    station: int | None
    version: int

    def put(self, parameter: nn.Parameter) -> None:
        for owner, leaf in self.owners:
            owner._parameters[leaf] = parameter


def _parameters(model: nn.Module, layers: LayerNames, weights: Weights) -> Iterator[_Parameter]:
    """The parameters that are not in memory, and where they belong."""
    ends = {
        id(module): station
        for station, end in ends_of(model, layers.num_layers).items()
        for module in end.modules()
    }
    found: dict[int, tuple[nn.Parameter, list[str], list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                _, names, owners = found.setdefault(id(parameter), (parameter, [], []))
                names.append(f"{path}.{leaf}".lstrip("."))
                owners.append((module, leaf))
    for parameter, names, owners in found.values():
        stations = {
            layer if (layer := layers.index(name)) is not None else ends.get(id(owner))
            for name, (owner, _) in zip(names, owners, strict=True)
        }
        station = stations.pop() if len(stations) == 1 else None
        if all(any(tower in name for tower in OTHER_TOWERS) for name in names):
            station = TOWERS
        yield _Parameter(parameter, owners, weights.name_of(names), station, parameter._version)


def ends_of(model: Any, depth: int) -> dict[int, nn.Module]:
    """The embedding and the head, by station: before and after the `depth` layers."""
    ends: dict[int, nn.Module] = {}
    for station, name in ((EMBEDDING, "get_input_embeddings"), (depth, "get_output_embeddings")):
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            ends[station] = module
    return ends


def weights_index(model: nn.Module) -> dict[str, dict[str, str]]:
    """Where accelerate has found a model's parameters; LoadError if not in safetensors files."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "weights_map", None) is not None:
                index: dict[str, dict[str, str]] = one.weights_map.dataset.index
                return index
    raise LoadError(
        f"The weights of this {type(model).__name__} are not in safetensors files, so it cannot be "
        "offloaded: load it whole and write it with save_pretrained."
    )
