"""Hidden states that wait for their turn, kept within a number of bytes.

A state that does not fit lies in a mapped file: it stays the same tensor object, with other memory
below it, so those that hold it see no difference. A file cannot be mapped into an accelerator's
memory, so there such a state is on the CPU until `StateStore.restore` brings it back.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors import OutputError
from ..utils import format_bytes

SMALL = 2**16  # bytes up to which a tensor is no matter for the store


class StateStore:
    """Keeps tensors within a number of bytes: those beyond it lie in temporary files.

    A tensor that does not fit is given mapped memory in place of its own, so whoever holds it may
    go on using it. The files have no name any more, and are gone with the tensors, or with the
    process.

    Args:
        budget: bytes to keep in memory; no limit if None.
    """

    def __init__(self, budget: int | None) -> None:
        self._budget, self._held = budget, 0
        self._known: dict[int, _Kept] = {}
        self.bytes_written = 0

    def keep(self, values: Any) -> None:
        """Take in every tensor of `values`, nested as they may be."""
        if self._budget is None:
            return
        for tensor in tensors_in(values):
            if id(tensor) in self._known or tensor.nbytes <= SMALL:
                continue
            fits = self._held + tensor.nbytes <= self._budget
            held = tensor.nbytes if fits or not _swappable(tensor) else 0
            self._note(tensor, held)
            if not held:
                tensor.data = self._mapped(tensor)

    def restore(self, values: Any, *, for_good: bool = False) -> None:
        """Bring tensors of `values` back to the device they were on; on a CPU they never left.

        Args:
            values: nested tensors.
            for_good: whether they stay there from now on.
        """
        for tensor in tensors_in(values):
            kept = self._known.get(id(tensor))
            if kept is not None and kept.device != tensor.device:
                tensor.data = tensor.to(kept.device)
                del self._known[id(tensor)]
            if for_good and tensor.device.type != "cpu" and id(tensor) not in self._known:
                self._note(tensor, tensor.nbytes)

    def _note(self, tensor: torch.Tensor, held: int) -> None:
        gone = weakref.ref(tensor, partial(self._forget, id(tensor)))
        self._known[id(tensor)] = _Kept(gone, held, tensor.device)
        self._held += held

    def _forget(self, key: int, gone: object) -> None:
        if key in self._known and self._known[key].gone is gone:
            self._held -= self._known.pop(key).held

    def _mapped(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        handle, path = tempfile.mkstemp(prefix="llm-pruner-")
        try:
            with open(handle, "wb") as file:
                file.write(flat.numpy().data)
            mapped = torch.from_file(path, shared=False, size=len(flat), dtype=torch.uint8)
        except OSError as error:
            raise OutputError(
                f"Cannot store {format_bytes(len(flat))} of hidden states in {path!r}: {error}. "
                "Name a folder with more space in the environment variable TMPDIR, or score on "
                "fewer items."
            ) from error
        finally:
            os.unlink(path)
        self.bytes_written += len(flat)
        return mapped.view(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class _Kept:
    """A tensor in a store: how many bytes of memory it holds, and its device when it came."""

    gone: weakref.ref[torch.Tensor]
    held: int
    device: torch.device


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _swappable(tensor: torch.Tensor) -> bool:
    """Whether nobody else sees the memory of a tensor, which lies in it as in a file."""
    storage = tensor.untyped_storage()
    alone = torch._C._storage_Use_Count(storage._cdata) == 2  # the tensor, and `storage` itself
    return alone and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
