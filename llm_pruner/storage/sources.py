"""Where a checkpoint is read from: a local folder, the hub's cache, or the Hugging Face hub.

Bytes are read in ranges, so that only what is needed is downloaded. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LoadError
from ..hub import failures
from ..json_files import parse_json
from ..utils import explain_load_failure, logger, regular_file, resolve_model_id, user_path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FILE_BLOCK = 4096  # bytes: the unit in which file systems share data, if they do
BLOCK = 2**24  # bytes read at once where the kernel cannot copy
MOST_FILES = 100_000
MAX_NAME = 255  # bytes of the name of a file or a folder, the limit of most file systems
MAX_PATH = 1000  # bytes of a file's name with its folders
MAX_JSON = 100_000_000  # bytes, the limit of the safetensors library for a header
Read = Callable[[int, int], bytes]  # of a file that is open, the bytes of a range
NOT_IN_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}


def open_source(model_id: str | Path, revision: str | None = None) -> Source:
    """A local folder, a complete copy of a hub repository in the cache, or the hub itself.

    Raises LoadError if there is nothing of that name.
    """
    name = str(model_id)
    folder = user_path(resolve_model_id(name))
    if (folder / "config.json").exists():
        return LocalFolder(folder, name)
    if folder.is_dir():
        raise LoadError(
            f"Folder {name!r} holds no config.json, so it is no checkpoint: give the folder that "
            "save_pretrained has written, or an id on the hub."
        )
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")):
        raise LoadError(f"Checkpoint {name!r} is not a folder: give a folder, or an id on the hub.")
    return cached_source(name, revision) or HubRepository(name, revision)


def cached_source(repo_id: str, revision: str | None = None) -> LocalFolder | None:
    """The copy of a hub repository in the local cache, if its weights are complete."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except HFValidationError as error:  # a URL, say
        raise LoadError(explain_load_failure("model", repo_id, error)) from error
    if not isinstance(found, str):
        return None
    source = LocalFolder(Path(found).parent, repo_id, Path(found).parent.name)
    try:
        source.weight_files()
    except LoadError:  # not all of them are here
        return None
    return source


class Source(ABC):
    """Files of a checkpoint, by their names relative to its root.

    Attributes:
        name: the folder or repository, as the user named it.
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

    @contextmanager
    def opened(self, file: str) -> Iterator[Read]:
        """`read` for one file, for many ranges of it."""
        yield lambda start, end: self.read(file, start, end)

    def stamp(self, file: str) -> Any:
        """What differs if a file has changed; always None where a file cannot."""
        return None

    def copy(self, file: str, start: int, end: int, target: BinaryIO) -> None:
        """Append the same bytes to `target`; LoadError if the file ends before."""
        with self.opened(file) as read:
            target.writelines(self.blocks(file, start, end, read))

    def blocks(self, file: str, start: int, end: int, read: Read) -> Iterator[bytes]:
        """The same bytes, a limited number at a time; LoadError if the file ends before.

        `read` is what `opened` gives for the file.
        """
        for begin in range(start, end, BLOCK):
            wanted = min(BLOCK, end - begin)
            block = read(begin, begin + wanted)
            if len(block) != wanted:
                raise self.broken(file, f"it ends at byte {begin + len(block)}, before {end}")
            yield block

    def read_json(
        self, file: str, start: int = 0, end: int | None = None, *, encoding: str | None = None
    ) -> dict[str, Any]:
        """The JSON object in a file, or in a range of its bytes; LoadError if there is none.

        The encoding is one of Unicode's, and is found out if it is not given.
        """
        end = self.size(file) if end is None else end
        if end - start > MAX_JSON:
            raise self.broken(file, f"it has {end - start:,} bytes")
        try:
            found = parse_json(self._text(file, start, end, encoding))
        except ValueError as error:
            raise self.broken(file, f"not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise self.broken(file, "it holds no JSON object")
        return found

    def _text(self, file: str, start: int, end: int, encoding: str | None) -> str:
        raw = self.read(file, start, end)  # freed before the text is taken apart
        return raw.decode(encoding or json.detect_encoding(raw))

    def weight_files(self) -> list[str]:
        """The safetensors files that hold the weights, sorted; see `weight_map`."""
        index = self.weight_map()
        return [SINGLE_FILE] if index is None else sorted(set(index.values()))

    def weight_map(self) -> dict[str, str] | None:
        """The file of every tensor by its name, as the index has it; None for one file alone.

        Raises:
            LoadError: there are no weights, or the index names anything but files beside it.
        """
        there = set(self.files())
        if SINGLE_FILE in there:
            return None  # also beside an index, as transformers does
        if INDEX_FILE not in there:
            raise LoadError(_no_weights(self.name, there))
        weight_map = self.read_json(INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise self.broken(INDEX_FILE, "it has no 'weight_map' from tensors to files")
        known = {file: file for file in there if _is_plain(file)}
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or file not in known:
                reason = "there" if _is_plain(file) else "the name of a file beside it"
                raise self.broken(INDEX_FILE, f"it refers to {file!r}, which is not {reason}")
            weight_map[tensor] = known[file]  # one text for all tensors of a file
        return weight_map

    def refuse_changed(self, before: dict[str, Any]) -> None:
        """Raise LoadError if a file is not what it was when its `stamp` was taken."""
        for file, stamp in before.items():
            if self.stamp(file) != stamp:
                raise self.broken(file, "it was changed while it was read")

    def broken(self, file: str, reason: str) -> LoadError:
        """The error for a file that is not what it should be."""
        return LoadError(
            f"{file!r} of checkpoint {self.name!r} cannot be used: {reason}. Fetch the checkpoint "
            "again, or use another."
        )


def _is_plain(file: Any) -> bool:
    """Whether it is the name of a safetensors file without a folder."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and file == Path(file).name
        and "\\" not in file
    )


def _no_weights(name: str, there: set[str]) -> str:
    pickle = min((file for file in there if file.endswith(PICKLES)), default=None)
    if pickle is not None:
        return (
            f"Checkpoint {name!r} holds pickled weights ({pickle}), which can run code when they "
            "are read, so they are not. If you trust it, convert it first: load it with "
            "AutoModelForCausalLM.from_pretrained and write it with save_pretrained. Or use a "
            "revision of the repository that has safetensors."
        )
    return (
        f"Checkpoint {name!r} holds no {SINGLE_FILE} and no {INDEX_FILE}: give a folder or "
        "repository that save_pretrained has written."
    )


class LocalFolder(Source):
    """A checkpoint in a folder."""

    folder: Path

    def __init__(self, folder: str | Path, name: str = "", revision: str | None = None) -> None:
        self.folder, self.name, self.revision = Path(folder), name or str(folder), revision

    def files(self) -> list[str]:
        found: list[str] = []
        for folder, _, names in os.walk(self.folder, onerror=self._refuse):
            paths = (Path(folder, name) for name in names)
            found += [path.relative_to(self.folder).as_posix() for path in paths if path.is_file()]
            if len(found) > MOST_FILES:
                raise LoadError(
                    f"Folder {self.name!r} holds more than {MOST_FILES:,} files, so it is no "
                    "checkpoint: give the folder of one."
                )
        return sorted(found)

    def _refuse(self, error: OSError) -> None:
        raise self.broken(str(error.filename), error.strerror or str(error)) from error

    def size(self, file: str) -> int:
        with self._reading(file):
            return (self.folder / file).stat().st_size

    def read(self, file: str, start: int, end: int) -> bytes:
        with self.opened(file) as read:
            return read(start, end)

    @contextmanager
    def opened(self, file: str) -> Iterator[Read]:
        def read(start: int, end: int) -> bytes:
            with self._reading(file):
                opened.seek(start)
                return opened.read(end - start) or b""

        with self._reading(file):
            opened = regular_file(self.folder / file).open("rb", buffering=0)
        with opened:
            yield read

    def stamp(self, file: str) -> Any:
        """Which file it is, its size, and when it was last written to."""
        with self._reading(file):
            there = (self.folder / file).stat()
        return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns

    def copy(self, file: str, start: int, end: int, target: BinaryIO) -> None:
        """Append a range of a file to `target`, in the kernel where possible."""
        target.flush()
        with self._reading(file):
            opened = (self.folder / file).open("rb", buffering=0)
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
    """Copy a range as far as the kernel can; returns where it stopped.

    ``copy_file_range`` shares blocks on file systems that can, from the beginning of a block on;
    ``sendfile`` works across file systems.
    """
    calls: dict[str, Callable[[int, int], int]] = {  # Linux has both
        "copy_file_range": lambda offset, size: os.copy_file_range(source, target, size, offset),
        "sendfile": lambda offset, size: os.sendfile(target, source, offset, size),
    }
    for copy in (call for name, call in calls.items() if hasattr(os, name)):
        try:
            while start < end:
                size = min(end - start, -start % FILE_BLOCK or end - start)
                copied = copy(start, size)
                if not copied:
                    break
                start += copied
        except OSError as error:
            if error.errno not in NOT_IN_KERNEL:
                raise
    return start


def _is_relative(file: str) -> bool:
    """Whether it names a file below a folder, with ``/`` between folders, on every system."""
    parts = [part.encode("utf-8", "replace") for part in file.split("/")]
    return (
        re.search(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]", file) is None
        and not any(part in (b"", b".", b"..") or len(part) > MAX_NAME for part in parts)
        and sum(map(len, parts)) <= MAX_PATH
    )


def _parents(file: str) -> Iterator[str]:
    """The folders that a file is in, as names."""
    places = (place for place, letter in enumerate(file) if letter == "/")
    return (file[:place] for place in places)


class HubRepository(Source):
    """A checkpoint on the Hugging Face hub, read in ranges over HTTP."""

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.name = repo_id
        with self._fetching():
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
            listed = [(entry.rfilename, entry.size) for entry in info.siblings or ()]
        self.revision = info.sha
        if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-zA-Z]{1,64}", info.sha):
            raise self._listing(f"the commit {info.sha!r:.80}, which is no hash")
        self._sizes: dict[str, int] = {}
        for file, size in listed:
            self._sizes[file] = self._checked(file, size)
        folders = {parent for file in self._sizes for parent in _parents(file)}
        if both := sorted(folders & self._sizes.keys()):
            raise self._listing(f"{both[0]!r:.80} as a file and as a folder")

    def _checked(self, file: object, size: object) -> int:
        """The bytes of a listed file; refused if they, or its name below a folder, cannot be."""
        if not isinstance(file, str) or not _is_relative(file):
            raise self._listing(f"the file {file!r:.80}, a name that cannot be written")
        if type(size) is not int or size < 0:
            raise self._listing(f"{file!r:.80} with {size!r:.40} bytes")
        if file in self._sizes:
            raise self._listing(f"{file!r:.80} twice")
        return size

    def _listing(self, what: str) -> LoadError:
        return LoadError(
            f"The hub lists {what}, in checkpoint {self.name!r}. Check the hub "
            "that HF_ENDPOINT names, or use another checkpoint."
        )

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

        http: Any = utils  # only its documentation says that its functions are public
        url = hf_hub_url(self.name, file, revision=self.revision)
        headers = {**http.build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self._fetching():
            answer = http.http_backoff("GET", url, headers=headers, timeout=timeout)
            http.hf_raise_for_status(answer)
        if answer.status_code != 206 and end - start < self.size(file):
            raise self.broken(file, "the server does not send parts of files")
        content = bytes(answer.content)
        if len(content) != end - start:
            reason = f"the server has sent {len(content)} bytes where {end - start} were asked for"
            raise self.broken(file, reason)
        return content

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        expected: tuple[type[Exception], ...] = (*failures(), AttributeError, TypeError)
        try:
            yield
        except expected as error:  # the last two: an answer that is not of the form of the hub's
            raise LoadError(explain_load_failure("model", self.name, error)) from error


class Joined(Source):
    """Files of one source under their names, though some of them are read from another.

    Args:
        listed: says which files there are, and where the source is.
        find: the source that a file is read from, and its name there.
    """

    def __init__(self, listed: Source, find: Callable[[str], tuple[Source, str]]) -> None:
        self.name, self.revision, self.folder = listed.name, listed.revision, listed.folder
        self._listed, self._find = listed, find

    def files(self) -> list[str]:
        return self._listed.files()

    def size(self, file: str) -> int:
        source, name = self._find(file)
        return source.size(name)

    def read(self, file: str, start: int, end: int) -> bytes:
        source, name = self._find(file)
        return source.read(name, start, end)

    @contextmanager
    def opened(self, file: str) -> Iterator[Read]:
        source, name = self._find(file)
        with source.opened(name) as read:
            yield read

    def stamp(self, file: str) -> Any:
        source, name = self._find(file)
        return source.stamp(name)

    def copy(self, file: str, start: int, end: int, target: BinaryIO) -> None:
        source, name = self._find(file)
        source.copy(name, start, end, target)


def with_all_files(source: Source) -> Source:
    """A source with the files that its copy in the cache may lack beside the weights.

    Where the hub cannot be reached it is the copy.
    """
    if source.folder is None or source.revision is None:
        return source
    folder = source.folder
    try:
        hub = HubRepository(source.name, source.revision)
    except LoadError as error:
        logger.warning(
            "Only the files of %s in the cache are carried along: %s", source.name, error
        )
        return source
    return Joined(hub, lambda file: (source if (folder / file).is_file() else hub, file))
