"""Where a checkpoint is read from: a local folder, or a repository of the Hugging Face hub.

Bytes are read in ranges, so that what is not needed is neither loaded nor downloaded. Nothing
here imports torch.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LoadError
from ..utils import explain_load_failure

FILE_BLOCK = 4096  # what file systems share, if they do
BLOCK = 2**24  # bytes read at once where the kernel cannot copy by itself
NOT_IN_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}


class Source(ABC):
    """Files of a checkpoint, by their names relative to its root.

    Attributes:
        name: the folder or repository as it was named.
        revision: commit of a hub repository; None for a folder.
        folder: the folder, if it is on this machine.
    """

    name: str
    revision: str | None = None
    folder: Path | None = None

    @abstractmethod
    def files(self) -> list[str]:
        """Names of all files, sorted, with ``/`` between folders."""

    @abstractmethod
    def size(self, file: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def read(self, file: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end` of a file; fewer only where it ends before."""

    def copy(self, file: str, start: int, end: int, target: BinaryIO) -> None:
        """Append the bytes from `start` up to `end` of a file to `target`.

        Raises:
            LoadError: the file ends before.
            OSError: `target` cannot be written.
        """
        for block in self.blocks(file, start, end):
            target.write(block)

    def blocks(self, file: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to `end` of a file, a limited number at a time.

        Raises:
            LoadError: the file ends before.
        """
        for begin in range(start, end, BLOCK):
            wanted = min(BLOCK, end - begin)
            block = self.read(file, begin, begin + wanted)
            if len(block) != wanted:
                raise self.broken(file, f"it ends at byte {begin + len(block)}, before {end}")
            yield block

    def broken(self, file: str, reason: str) -> LoadError:
        """The error for a file that is not what it should be."""
        return LoadError(
            f"{file!r} of checkpoint {self.name!r} cannot be used: {reason}. Fetch the checkpoint "
            "again, or use another."
        )


class LocalFolder(Source):
    """A checkpoint in a folder."""

    def __init__(self, folder: str | Path, name: str = "", revision: str | None = None) -> None:
        self.folder = self._root = Path(folder)
        self.name, self.revision = name or str(folder), revision

    def files(self) -> list[str]:
        found = (path for path in self._root.rglob("*") if path.is_file())
        return sorted(path.relative_to(self._root).as_posix() for path in found)

    def size(self, file: str) -> int:
        with self._reading(file):
            return (self._root / file).stat().st_size

    def read(self, file: str, start: int, end: int) -> bytes:
        with self._reading(file), (self._root / file).open("rb", buffering=0) as opened:
            opened.seek(start)
            return opened.read(end - start) or b""

    def copy(self, file: str, start: int, end: int, target: BinaryIO) -> None:
        """Append a range of a file to `target`, in the kernel where it can be."""
        target.flush()
        with self._reading(file):
            opened = (self._root / file).open("rb", buffering=0)
        with opened:
            done = _copy_in_kernel(opened.fileno(), target.fileno(), start, end)
        if done < end:
            target.seek(0, os.SEEK_END)
            super().copy(file, done, end, target)

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.broken(file, error.strerror or str(error)) from error


def _copy_in_kernel(source: int, target: int, start: int, end: int) -> int:
    """Copy a range as far as the kernel does it by itself; returns where that stopped.

    ``copy_file_range`` shares the blocks on file systems that can, from the beginning of a block
    on; ``sendfile`` works across file systems.
    """
    ways: list[Any] = []
    if hasattr(os, "copy_file_range"):
        ways.append(lambda at, size: os.copy_file_range(source, target, size, at))
    if hasattr(os, "sendfile"):
        ways.append(lambda at, size: os.sendfile(target, source, at, size))
    for way in ways:
        try:
            while start < end:
                size = min(end - start, -start % FILE_BLOCK or end - start)
                copied = way(start, size)
                if not copied:
                    break
                start += copied
        except OSError as error:
            if error.errno not in NOT_IN_KERNEL:
                raise
    return start


class HubRepository(Source):
    """A checkpoint on the Hugging Face hub, read by ranges over HTTP."""

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.name = repo_id
        with self._fetching():
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        self.revision = info.sha
        self._sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}

    def files(self) -> list[str]:
        return sorted(self._sizes)

    def size(self, file: str) -> int:
        if file not in self._sizes:
            raise self.broken(file, "the repository has no such file")
        return self._sizes[file]

    def read(self, file: str, start: int, end: int) -> bytes:
        end = min(end, self.size(file))
        if start >= end:
            return b""
        from huggingface_hub import constants, hf_hub_url, utils

        http: Any = utils  # its functions are public by its documentation alone
        url = hf_hub_url(self.name, file, revision=self.revision)
        headers = {**http.build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self._fetching():
            answer = http.http_backoff("GET", url, headers=headers, timeout=timeout)
            http.hf_raise_for_status(answer)
        if answer.status_code != 206 and end - start < self.size(file):
            raise self.broken(file, "the server does not send parts of files")
        return bytes(answer.content)

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise LoadError(explain_load_failure("model", self.name, error)) from error
