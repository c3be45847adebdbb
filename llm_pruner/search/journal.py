"""Measurements kept in a file, so that a killed search does not start over."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from ..errors import OutputError
from ..utils import logger
from .prefix_sharing import LayerSet


class Journal:
    """Measurements in a JSON-lines file.

    Every line holds the values of one set of removed layers on one chunk of the data, under a key
    that stands for model, data and measures. Lines of other keys are skipped, and so is a last
    line cut short by a crash.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self, key: str) -> list[tuple[LayerSet, int, list[list[float]]]]:
        """(removed layers, chunk, values) of everything recorded under `key`.

        Raises:
            OutputError: the file cannot be read.
        """
        if not self.path.exists():
            return []
        entries: list[tuple[LayerSet, int, list[list[float]]]] = []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"Cannot read the journal {str(self.path)!r}: {error}.") from error
        for number, line in enumerate(lines, 1):
            if not line:  # two processes wrote, and one saw half of the other's line
                continue
            try:
                entry = json.loads(line)
                if entry["key"] == key:
                    values = [[float(value) for value in part] for part in entry["values"]]
                    entries.append((tuple(entry["removed"]), int(entry["chunk"]), values))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s:%d is not a measurement and is ignored.", self.path, number)
        return entries

    def append(self, key: str, removed: LayerSet, chunk: int, values: list[list[float]]) -> None:
        """Record one measurement; the operating system has it when this returns.

        The line is written in one system call, so several processes can share a journal.

        Raises:
            OutputError: the file cannot be written.
        """
        line = json.dumps({"key": key, "removed": removed, "chunk": chunk, "values": values})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                whole = not file.tell() or (file.seek(-1, 2), file.read(1))[1] == b"\n"
                data = (f"{line}\n" if whole else f"\n{line}\n").encode()  # after a cut line
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OutputError(f"Cannot write the journal {str(self.path)!r}: {error}.") from error
