"""Inputs of the fuzzer: a sequence of files, and what may be wrong with what was read from them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

LONGEST = 65_535  # bytes of an input
MEMORY_DISK = Path("/dev/shm")


class InconsistentError(Exception):
    """What was accepted is not what it says."""


class StricterError(Exception):
    """What was refused, the format's own library reads."""


class Target(NamedTuple):
    """What is fuzzed."""

    seeds: Callable[[], list[list[bytes]]]  # files that are valid
    check: Callable[[list[bytes], Path], None]  # raises where something is wrong
    change: Callable[[list[bytes], random.Random], list[bytes]]  # ValueError if it cannot


def joined(files: Sequence[bytes]) -> bytes:
    """The files as one input."""
    return b"".join(len(file).to_bytes(4, "little") + file for file in files)


def divided(data: bytes, most: int = 3) -> list[bytes]:
    """The files of any input; a length that is too large means the rest."""
    files = []
    while data and len(files) < most:
        size = int.from_bytes(data[:4], "little")
        files.append(data[4 : 4 + size])
        data = data[4 + size :]
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Files into a folder that always has files of these names."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def general(message: str) -> str:
    """A message without what belongs to one input."""
    text = re.sub(r"\(.*|(['\"`]).*\1|[\[{].*", "…", message.split("\n")[0])
    text = re.sub(r"(invalid type|key must be a string|expected value)\b.*", r"\1", text)
    return re.sub(r"\S*\d\S*", "N", text)[:100].strip()
