"""An activation cache: hidden states that wait for their turn, within a number of bytes.

A tensor that does not fit moves into a mapped file; it stays the same tensor object. A file cannot
be mapped into an accelerator's memory: such a tensor is on the CPU until it is restored.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import Any

import torch

from ..errors import OutputError
from ..model.forward import tensors_in
from ..utils import format_bytes

SMALL = 2**16  # bytes; smaller tensors are not counted


class ActivationStore:
    """Keeps tensors within a number of bytes of memory; the others lie in temporary files.

    The files are unlinked once they are mapped, so they vanish with the tensors or the process.

    Args:
        budget: bytes to keep in memory; no limit if None.

    Attributes:
        bytes_written: bytes that went into files so far.
    """

    def __init__(self, budget: int | None) -> None:
        self._budget, self._held = budget, 0
        self._known: dict[int, tuple[int, torch.device]] = {}  # bytes it holds; device it had
        self.bytes_written = 0

    def keep(self, values: Any) -> None:
        """Take charge of every tensor in `values`, which may be nested.

        Raises:
            OutputError: there is no space for a file.
        """
        if self._budget is None:
            return
        for tensor in tensors_in(values):
            if id(tensor) in self._known or tensor.nbytes <= SMALL:
                continue
            if self._held + tensor.nbytes <= self._budget or not _owns_its_memory(tensor):
                self._note(tensor, tensor.nbytes)
            else:
                self._note(tensor, 0)
                tensor.data = self._mapped(tensor)

    def restore(self, values: Any, *, for_good: bool = False) -> None:
        """Bring the tensors in `values` back to their device; those of a CPU never left it.

        Args:
            values: tensors, which may be nested.
            for_good: whether they stay there from now on.
        """
        for tensor in tensors_in(values):
            _, device = self._known.get(id(tensor), (0, tensor.device))
            if device != tensor.device:
                tensor.data = tensor.to(device)
                del self._known[id(tensor)]
            if for_good and tensor.device.type != "cpu" and id(tensor) not in self._known:
                self._note(tensor, tensor.nbytes)

    def _note(self, tensor: torch.Tensor, held: int) -> None:
        self._known[id(tensor)] = held, tensor.device
        self._held += held
        weakref.finalize(tensor, self._forget, id(tensor)).atexit = False

    def _forget(self, key: int) -> None:
        held, _ = self._known.pop(key, (0, None))
        self._held -= held

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


def _owns_its_memory(tensor: torch.Tensor) -> bool:
    """Whether no other tensor uses this memory, and the tensor fills it in order."""
    storage = tensor.untyped_storage()
    alone = torch._C._storage_Use_Count(storage._cdata) == 2  # the tensor, and `storage` itself
    return alone and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
