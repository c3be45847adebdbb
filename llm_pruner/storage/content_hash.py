"""A hash of all weights of a checkpoint, remembered as long as no file changes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_output import write_atomically
from ..errors import LLMPrunerError
from ..json_files import parse_json
from ..progress import progress
from ..utils import logger

if TYPE_CHECKING:
    from .sources import Source

THREADS = 2  # files hashed at a time
WORTH_REMEMBERING = 64_000_000  # bytes of a file
SETTLED = 2.0  # seconds since the last change, after which another would change the times
MOST = 10_000  # files remembered
MODULUS = 2**256


def weights_hash(source: Source, tensors: Iterable[Any]) -> str:
    """A hash of every tensor's name, dtype, shape and bytes, however they are divided into files.

    The hashes of the tensors (SHA-256) are added up, so that files and their order do not matter.

    Args:
        source: where they are.
        tensors: `StoredTensor` each, those of a file one after the other.
    """
    files = [(file, list(group)) for file, group in groupby(tensors, key=lambda one: one.file)]
    known = _remembered()
    found: dict[str, int] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = {}
        for file, group in files:
            key = _key(source, file)
            if key in known:
                found[file] = int(known[key], 16)
            else:
                jobs[file] = pool.submit(_file_hash, source, file, group)
        for file, job in progress(jobs.items(), "Hashing weights", total=len(jobs)):
            found[file] = job.result()
    new = {_key(source, file): f"{found[file]:x}" for file in jobs}
    _remember({key: value for key, value in new.items() if key})
    return f"{sum(found.values()) % MODULUS:064x}"[:16]


def _file_hash(source: Source, file: str, tensors: Iterable[Any]) -> int:
    total = 0
    with source.opened(file) as read:
        for tensor in tensors:
            digest = hashlib.sha256(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            for block in source.blocks(file, tensor.start, tensor.end, read):
                digest.update(block)
            total += int.from_bytes(digest.digest(), "big")
    return total % MODULUS


def _key(source: Source, file: str) -> str:
    """What a large file on this machine is known by until it changes; empty for others."""
    if source.folder is None:
        return ""
    path = (source.folder / file).resolve()
    try:
        there = path.stat()
    except OSError:  # whoever reads it will say so
        return ""
    changed = max(there.st_mtime, there.st_ctime)
    if there.st_size < WORTH_REMEMBERING or time.time() - changed < SETTLED:
        return ""
    times = there.st_mtime_ns, there.st_ctime_ns
    return ":".join(map(str, (path, there.st_dev, there.st_ino, there.st_size, *times)))


def _memory() -> Path:
    """The file in which hashes are remembered."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "llm_pruner", "weights.json")


def _remembered() -> dict[str, str]:
    try:
        found: Any = parse_json(_memory().read_text(encoding="utf-8"))
        return {str(key): f"{int(value, 16):x}" for key, value in found.items()}
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        logger.debug("No hashes of weights are remembered: %s", error)
        return {}


def _remember(hashes: dict[str, str]) -> None:
    """Add hashes to those remembered, as far as there is a place for them."""
    if not hashes:
        return
    try:
        kept = [*{**_remembered(), **hashes}.items()][-MOST:]
        write_atomically(_memory(), json.dumps(dict(kept), indent=0))
    except (LLMPrunerError, OSError, RuntimeError) as error:  # no home, no right, no room
        logger.debug("Hashes of weights are not remembered: %s", error)
