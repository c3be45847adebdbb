"""Measurements kept in a file, so that a killed search does not start over."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from ..json_files import parse_json
from ..utils import logger

if TYPE_CHECKING:
    from .passes import LayerSet

FIELDS = ("key", "removed", "chunk", "values")
BEGINS = b'{"key": "'
LONGEST = 10_000_000  # bytes of a line that is looked at
LOOKED_AT = 1000  # lines of a file that may be a journal


class Journal:
    """Measurements in a JSON-lines file.

    Every line holds the values of one set of removed layers on one chunk of the data, under a key
    that stands for model, data and measures, and a checksum of all that. Lines of other keys are
    skipped. So are lines that are damaged, or were cut short by a crash: what they held is
    measured again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self, key: str) -> list[tuple[LayerSet, int, list[list[float]]]]:
        """(removed layers, chunk, values) of everything recorded under `key`.

        Raises:
            OutputError: the file cannot be read, or is no journal.
        """
        if not self.path.exists():
            return []
        self.check()
        entries: list[tuple[LayerSet, int, list[list[float]]]] = []
        damaged = 0
        try:
            with self.path.open("rb") as file:
                while line := file.readline(LONGEST):
                    if not line.strip():  # two processes wrote, and one saw half of the other's
                        continue
                    entry = _parsed(line)
                    if entry.get("check") != _checksum(entry):
                        damaged += 1
                    elif entry["key"] == key:
                        entries.append((tuple(entry["removed"]), entry["chunk"], entry["values"]))
        except OSError as error:
            raise OutputError(f"Cannot read the journal {str(self.path)!r}: {error}.") from error
        if damaged:
            message = "%s: %d measurements are damaged, and are made again."
            logger.warning(message, self.path, damaged)
        return entries

    def check(self) -> None:
        """Raise OutputError if something stands at the path that is no journal."""
        if not self.path.exists():
            return
        try:
            if self.path.is_file() and is_journal(self.path):
                return
        except OSError as error:
            raise OutputError(f"Cannot read the journal {str(self.path)!r}: {error}.") from error
        raise OutputError(
            f"{str(self.path)!r} is where measurements are kept, and it is no journal of "
            "llm_pruner: move it, or choose another output."
        )

    def remove(self) -> None:
        """Remove the file, if there is one.

        Raises:
            OutputError: it is no journal.
        """
        self.check()
        self.path.unlink(missing_ok=True)

    def append(self, key: str, removed: LayerSet, chunk: int, values: list[list[float]]) -> None:
        """Record one measurement; the operating system has it when this returns.

        The line is written in one system call, so several processes can share a journal.

        Raises:
            OutputError: the file cannot be written.
        """
        entry = {"key": key, "removed": list(removed), "chunk": chunk, "values": values}
        line = json.dumps({**entry, "check": _checksum(entry)})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                whole = not file.tell() or (file.seek(-1, 2), file.read(1))[1] == b"\n"
                data = (f"{line}\n" if whole else f"\n{line}\n").encode()  # after a cut line
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OutputError(f"Cannot write the journal {str(self.path)!r}: {error}.") from error


def is_journal(path: Path) -> bool:
    """Whether a file is empty, or holds a measurement as `Journal` writes it, damaged or not."""
    with path.open("rb") as file:
        first = file.readline(LONGEST)
        lines = islice(iter(lambda: file.readline(LONGEST), b""), LOOKED_AT)
        return not first or any(line.startswith(BEGINS) for line in (first, *lines))


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; empty if there is none."""
    try:
        found = parse_json(line.decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _checksum(entry: dict[str, Any]) -> str:
    values = json.dumps([entry.get(name) for name in FIELDS])
    return hashlib.sha256(values.encode()).hexdigest()[:16]
