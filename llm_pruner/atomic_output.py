"""Output: one writer at a time, checked before work starts, staged, put in place in one step.

An output folder is at any moment absent, the earlier one, or the new one, complete, also when
the process is killed or the machine stops. Beside ``out`` there are for a while:

    .out.lock               held by the run that writes ``out``
    .out.partial-XXXXXXXX   what is being written, or being removed
    .out.old-XXXXXXXX       the earlier output, where two folders cannot be swapped in one step

A killed run leaves them; the next run of that output removes them, or puts the old one back.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import OutputError
from .output_rules import (
    as_path,
    entries,
    holds_something,
    os_errors_as,
    refuse_what_stands,
    write_list,
)
from .utils import logger, readable

KEY_FILE = "healing.json"  # marks a folder of training checkpoints as ours
SPARE = 12  # descriptors kept back, so that a stage can be removed when no others are left
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
CANNOT_SWAP = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def own_checkpoints(folder: Path) -> list[Path]:
    """The training checkpoints in a folder that is for nothing else, the oldest first.

    Raises:
        OutputError: the folder holds something, and llm_pruner did not make it.
    """
    if not folder.exists():
        return []
    if any(folder.iterdir()) and not (folder / KEY_FILE).exists():
        raise OutputError(
            f"{str(folder)!r} is where checkpoints of the healing would go, and it holds something "
            "that llm_pruner did not write: move it, or choose another place."
        )
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]))


def claim_checkpoints(folder: Path, key: str, need: int) -> str | None:
    """Reserve a folder for a training; return the training checkpoint it resumes from, if any.

    Checkpoints of another training and incomplete ones are deleted: ``trainer_state.json`` is
    written last, so a checkpoint is complete when that file is.

    Args:
        folder: empty or used for this before, or to be made.
        key: tells the training from others.
        need: bytes that its checkpoints will take at the most.

    Raises:
        OutputError: the folder holds something else, or its disk has less room.
    """
    key_file = folder / KEY_FILE
    checkpoints = own_checkpoints(folder)
    same = key_file.exists() and key_file.read_text(encoding="utf-8") == key
    last = None
    for path in checkpoints:
        complete = False
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete = True
        if same and complete:
            last = path
        else:
            shutil.rmtree(path)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if need > (free := shutil.disk_usage(disk).free + there):
        raise OutputError(
            f"The training's checkpoints need up to {need:,} bytes, and {free:,} are free on the "
            f"disk of {str(folder)!r}: make room, or choose another place (--output, or "
            "LoraSettings(checkpoints=...); else TMPDIR)."
        )
    write_atomically(key_file, key)
    if last:
        logger.info("Resuming from %s", last)
    return str(last) if last else None


def clear_checkpoints(folder: Path) -> None:
    """Remove training checkpoints, and their folder if nothing else is in it."""
    if not (folder / KEY_FILE).exists():
        return
    for path in own_checkpoints(folder):
        shutil.rmtree(path)
    (folder / KEY_FILE).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def check_output(
    output_dir: str | Path, *, overwrite: bool = False, reads: Iterable[str | Path] = ()
) -> Path:
    """Return `output_dir` as a path if a checkpoint can be written there.

    Args:
        output_dir: where the output is to go.
        overwrite: whether an output that llm_pruner wrote may be replaced.
        reads: files and folders that are read for it, which may not be inside it.

    Raises:
        OutputError: it is a file, it is not empty (without `overwrite`), it holds something that
            is read, that this package did not write, or the current folder, another run writes
            it, or its parent cannot be written to.
    """
    path = as_path(output_dir)
    with hold_output(path), os_errors_as(f"Output folder {str(path)!r} cannot be written"):
        refuse_what_stands(path, overwrite, reads)
    return path


@contextmanager
def hold_output(output_dir: str | Path) -> Iterator[None]:
    """Be the only writer of `output_dir` inside the block; remove first what killed runs left.

    Blocks of one thread may be nested. The hold ends with the process, however it ends.

    Raises:
        OutputError: another run or thread holds it, or its parent cannot be written to.
    """
    from filelock import FileLock, Timeout, UnixFileLock

    path = _place(output_dir)
    with ExitStack() as stack:
        with os_errors_as(f"Output folder {str(output_dir)!r} cannot be written"):
            for folder in reversed([path.parent, *path.parent.parents]):
                if not folder.exists():
                    folder.mkdir(exist_ok=True)
                    stack.callback(_remove_if_empty, folder)
            file = path.parent / f".{path.name}.lock"
            lock = FileLock(file, blocking=False, is_singleton=True)
            if not lock.is_locked and not _can_be_lock(file):
                raise OutputError(
                    f"{str(file)!r} is where the lock of this output goes, and it is no lock of "
                    "llm_pruner: move it, or choose another output."
                )
            new = not os.path.lexists(file)
            try:  # one that is made here is free: what refuses it, a file system, may pass
                lock.acquire(blocking=new, timeout=0.2)
            except Timeout:
                raise OutputError(
                    f"Another run is writing {str(output_dir)!r}: wait for it, or choose another "
                    "output."
                ) from None
            except OSError as error:
                if new:
                    stack.callback(_unlink, file)
                if error.errno not in NO_LOCKS:
                    raise
                message = "The file system of %s has no locks: let no other run write there."
                logger.warning(message, path)
            except BaseException:  # an interrupt
                if new:
                    _unlink(file)
                raise
            stack.callback(lock.release)
            if lock.lock_counter == 1:
                if isinstance(lock, UnixFileLock):  # others remove their file themselves
                    stack.callback(_unlink, file)
                _clear_leftovers(path)
        yield


@contextmanager
def staged_output(
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    need: int = 0,
    reads: Iterable[str | Path] = (),
) -> Iterator[Path]:
    """A folder beside `output_dir` to write into, put in its place when the block ends well.

    If the block raises, nothing is left behind and what stood at `output_dir` still stands.

    Args:
        output_dir: where the output goes.
        overwrite: replace an output that llm_pruner wrote.
        need: bytes that will be written, as far as known; a disk with less room is refused.
        reads: files and folders that are read for it.

    Raises:
        OutputError: see `check_output` and `hold_output`; also a full disk.
    """
    path = _place(output_dir)
    with hold_output(output_dir):
        check_output(output_dir, overwrite=overwrite, reads=reads)
        with os_errors_as(f"Writing {str(output_dir)!r} failed", " Nothing was left."):
            free = shutil.disk_usage(path.parent).free
            if need > free:
                raise OutputError(
                    f"Output folder {str(output_dir)!r} needs {need:,} bytes, and {free:,} are "
                    "free on its disk: make room, or choose another place."
                )
            with _spare_descriptors() as give_back:
                stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
                try:
                    yield stage
                    write_list(stage)
                    _apply_umask(stage)
                    for written in (*entries(stage), stage):
                        _sync(written)
                    refuse_what_stands(path, overwrite, reads)  # what may have come meanwhile
                    _put_in_place(stage, path)
                finally:
                    give_back()
                    try:
                        _remove(stage)
                    except BaseException:  # an interrupt: it may still be removed
                        _remove(stage)
                        raise


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write one file and the folders above it: it holds the old content, or all of the new.

    Text becomes UTF-8. A link is followed. A pipe or a device is written to directly.

    Raises:
        OutputError: it cannot be written.
    """
    data = readable(content).encode() if isinstance(content, str) else content
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        with os_errors_as(f"Cannot write {str(path)!r}"):
            target.write_bytes(data)
        return
    with replaced_file(path) as file:
        file.write(data)


@contextmanager
def replaced_file(path: str | Path, *, need: int = 0) -> Iterator[BinaryIO]:
    """A new file beside `path`, which takes its place when the block ends well.

    Args:
        path: a file that need not exist; a link is followed.
        need: bytes that will be written, as far as known; a disk with less room is refused.

    Raises:
        OutputError: it cannot be written.
    """
    with os_errors_as(f"Cannot write {str(path)!r}"):
        target = Path(path).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if need > free:
            raise OutputError(
                f"{str(path)!r} needs {need:,} bytes, and {free:,} are free on its disk: make room."
            )
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
        temporary = Path(name)
        try:
            with open(descriptor, "w+b") as file:
                yield file
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(target.parent)


def _place(output_dir: str | Path) -> Path:
    """One path for one output, however it is spelled; the output itself may be a link."""
    path = as_path(output_dir)
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _can_be_lock(file: Path) -> bool:
    """Whether nothing stands there, or an empty file as a killed run leaves it."""
    try:
        there = file.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(there.st_mode) and not there.st_size


@contextmanager
def _spare_descriptors() -> Iterator[Callable[[], None]]:
    """Hold some descriptors until the block calls what it is given."""
    with ExitStack() as held:
        for _ in range(SPARE):
            held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield held.close


def _remove(stage: Path) -> None:
    """Remove a stage that may be gone; the next run removes what cannot be."""
    try:
        shutil.rmtree(stage)
    except FileNotFoundError:
        return
    except OSError as error:
        message = "%s could not be removed (%s): the next run of this output does it."
        logger.warning(message, stage, error.strerror)


# --- one step -----------------------------------------------------------------------------------
def _put_in_place(stage: Path, path: Path) -> None:
    """Give the stage the output's name; an earlier output has the stage's name after it."""
    if not holds_something(path):
        stage.rename(path)  # the system refuses it if something has come meanwhile
    elif not _swap(stage, path):
        old = path.with_name(stage.name.replace(".partial-", ".old-"))
        path.rename(old)
        try:
            stage.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(stage)
    _sync(path.parent)


def _swap(left: Path, right: Path) -> bool:
    """Swap the names of two folders in one step; False where that cannot be done."""
    if sys.platform not in ("linux", "darwin"):
        return False
    libc: Any = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(left), os.fsencode(right)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, on macOS RENAME_SWAP
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, swap)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(here, names[0], here, names[1], swap)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in CANNOT_SWAP:
        raise OSError(code, os.strerror(code), str(left), None, str(right))
    return not failed


def _clear_leftovers(path: Path) -> None:
    """Remove what killed runs have left of this output; put the old one back if it is missing.

    Only under the lock, when no other run can be using them.
    """
    for old in _leftovers(path, "old"):
        if path.is_symlink() or path.is_file() or holds_something(path):
            old.rename(old.with_name(old.name.replace(".old-", ".partial-")))
        else:
            old.rename(path)
    for partial in _leftovers(path, "partial"):
        shutil.rmtree(partial)


def _leftovers(path: Path, kind: str) -> list[Path]:
    name = re.compile(rf"{re.escape(f'.{path.name}.{kind}-')}[a-z0-9_]{{8}}")  # as mkdtemp does
    entries = [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]
    return [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            logger.warning("%s is empty and could not be removed: %s.", folder, error.strerror)


def _unlink(file: Path) -> None:
    """Remove a lock; what was done under it is done if that fails."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is of no use and could not be removed: %s.", file, error.strerror)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _apply_umask(folder: Path) -> None:
    """safetensors and mkdtemp make everything private; give the modes a plain write would."""
    allowed = ~_umask()
    for path in (folder, *entries(folder)):
        if path.is_dir():
            path.chmod(0o777 & allowed)
        elif path.stat().st_nlink == 1:  # a linked file has the mode of another
            path.chmod(0o666 & allowed)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
