"""The tensors of a checkpoint, read when asked for, and where a pass needs which.

A pass stops at stations, in turn: the embedding, every layer, the head. A parameter that one of
them alone needs is in memory while passes are there. One that several need, or none that is
known, is in memory all the time. Between its times a parameter's place holds an empty one on the
meta device.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..errors import LoadError, UnsupportedModelError
from ..model.config_rules import OTHER_TOWERS

EMBEDDING = -1  # the station before layer 0; the head's is the number of layers
TOWERS = -2  # of weights for other inputs than text


class Weights:
    """The tensors of a checkpoint, read when asked for.

    Args:
        index: name in the model -> file, name in the file, and dtype to load with.
        device: where to put them.
        folder: of the files that had to be written; it goes with this object.

    Attributes:
        bytes_read: bytes read so far, as stored in the files.
    """

    def __init__(
        self,
        index: dict[str, dict[str, str]],
        device: torch.device,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._index, self.device, self._folder = index, device, folder
        self.bytes_read = 0

    def name_of(self, names: Iterable[str]) -> str:
        """That one of a tensor's `names` in the model under which it is stored.

        Raises:
            LoadError: none is.
        """
        names = list(names)
        for name in names:
            if name in self._index:
                return name
        raise LoadError(f"No file of the checkpoint holds {names[0]!r}: it cannot be streamed.")

    def _wrote(self, file: str) -> bool:
        return self._folder is not None and file.startswith(self._folder.name)

    def fingerprint(self, model: nn.Module) -> str:
        """Short hash of the config of `model` and of the beginning of every tensor."""
        digest = hashlib.sha256(model.config.to_json_string().encode())  # type: ignore[operator, union-attr]
        for name, place in sorted(self._index.items()):
            with safe_open(place["safetensors_file"], framework="pt") as opened:
                stored = opened.get_tensor(place.get("weight_name", name))
                first = stored.reshape(-1)[:256].float()
                digest.update(f"{name}{tuple(stored.shape)}{stored.dtype}".encode())
                digest.update(first.numpy().tobytes())
        return digest.hexdigest()[:16]

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The tensors of these names, each file opened once.

        Raises:
            LoadError: a file cannot be read any more.
        """
        found: dict[str, torch.Tensor] = {}
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self._index[name]["safetensors_file"], []).append(name)
        for file, inside in files.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in inside:
                        stored = opened.get_tensor(self._index[name].get("weight_name", name))
                        self.bytes_read += stored.nbytes
                        dtype = getattr(torch, self._index[name]["dtype"])
                        # As transformers does, to the alignment, which some kernels look at: what
                        # is used as stored is mapped from its file, what was converted is new.
                        found[name] = stored.to(self.device, dtype, copy=self._wrote(file))
            except OSError as error:
                raise LoadError(f"Cannot read {file!r} any more: {error}.") from error
        return [found[name] for name in names]


class Stations:
    """The parameters of a model that lie in the checkpoint, by the station that needs them.

    Args:
        model: the model, whose parameters are on the meta device.
        path: dotted name of its list of layers.
        weights: where they are read from.
    """

    def __init__(self, model: nn.Module, path: str, weights: Weights) -> None:
        self._model, self._weights = model, weights
        self._groups: dict[int | None, list[_Tensor]] = {}
        for tensor in _placed(model, path, weights.name_of):
            self._groups.setdefault(tensor.station, []).append(tensor)
        for tensor in self._groups.pop(TOWERS, []):  # never needed, but asked for their device
            if tensor.empty.is_floating_point():
                nothing = torch.full((), torch.nan, dtype=tensor.empty.dtype, device=weights.device)
                tensor.put(nn.Parameter(nothing.expand_as(tensor.empty)))

    @property
    def sizes(self) -> dict[int | None, int]:
        """Bytes of weights by station; those of None are needed everywhere."""
        return {
            station: sum(tensor.empty.nbytes for tensor in group)
            for station, group in self._groups.items()
        }

    @contextmanager
    def loaded(self, station: int | None) -> Iterator[None]:
        """The weights of a station in memory; None for those that all of a sweep needs."""
        group = self._groups.get(station, [])
        for tensor, found in zip(group, self._weights.read([t.name for t in group]), strict=True):
            tensor.put(nn.Parameter(found, tensor.empty.requires_grad))  # which kernels look at
            del found
        try:
            yield
        finally:
            for tensor in group:
                tensor.put(tensor.empty)

    def check_untouched(self) -> None:
        """Raise UnsupportedModelError if the model has changed weights that are not in memory."""
        changed = [t.name for group in self._groups.values() for t in group if t.is_changed()]
        if changed:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} changes its own weights as it runs ({changed[0]}), "
                "so they cannot be read from the disk: load it whole, without a limit of memory."
            )


@dataclass
class _Tensor:
    """A parameter, all its places in the module tree, and the one station that needs it, if one."""

    empty: nn.Parameter
    places: list[tuple[nn.Module, str]]
    name: str
    station: int | None
    version: int

    def put(self, parameter: nn.Parameter) -> None:
        for owner, leaf in self.places:
            owner._parameters[leaf] = parameter

    def is_changed(self) -> bool:
        return self.empty._version != self.version


def _placed(
    model: nn.Module, path: str, name_of: Callable[[Iterable[str]], str]
) -> Iterator[_Tensor]:
    """The parameters that are not in memory, and where they belong."""
    depth = len(model.get_submodule(path))  # type: ignore[arg-type]
    ends = {id(m): station for station, end in ends_of(model, depth).items() for m in end.modules()}
    prefix = path + "."

    def station_of(name: str, module: nn.Module) -> int | None:
        inside = name.startswith(prefix)
        return int(name[len(prefix) :].partition(".")[0]) if inside else ends.get(id(module))

    found: dict[int, tuple[nn.Parameter, list[str], list[tuple[nn.Module, str]]]] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                _, names, places = found.setdefault(id(parameter), (parameter, [], []))
                names.append(f"{owner}.{leaf}".lstrip("."))
                places.append((module, leaf))
    for parameter, names, places in found.values():
        pairs = zip(names, places, strict=True)
        stations = {station_of(name, module) for name, (module, _) in pairs}
        station = stations.pop() if len(stations) == 1 else None
        if all(any(tower in name for tower in OTHER_TOWERS) for name in names):
            station = TOWERS
        yield _Tensor(parameter, places, name_of(names), station, parameter._version)


def ends_of(model: Any, depth: int) -> dict[int, nn.Module]:
    """The embedding and the head, by station: before and after all layers."""
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
    """Where accelerate has found the parameters of a model that it offloads to the disk."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "weights_map", None) is not None:
                index: dict[str, dict[str, str]] = one.weights_map.dataset.index
                return index
    raise LoadError(f"The weights of this {type(model).__name__} are not in safetensors files.")
