"""Measurements kept in a file, so that a killed search does not start again."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from ..errors import OutputError
from ..utils import logger
from .prefix_sharing import Mask


class Journal:
    """Readings in a JSON-lines file, so that a killed search does not start again.

    Every line holds what one mask gave on one chunk of samples, under a key that stands for
    model, data and measures; lines of other keys and a last line cut short by a crash are
    passed over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self, key: str) -> list[tuple[Mask, int, list[list[float]]]]:
        """(mask, chunk, values) of everything recorded under `key`.

        Raises:
            OutputError: the file cannot be read.
        """
        known: list[tuple[Mask, int, list[list[float]]]] = []
        if not self.path.exists():
            return known
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"Cannot read the journal {str(self.path)!r}: {error}.") from error
        for number, line in enumerate(lines, 1):
            if not line:  # two processes wrote, and one saw the other's line half there
                continue
            try:
                entry = json.loads(line)
                if entry["key"] == key:
                    values = [[float(value) for value in part] for part in entry["values"]]
                    known.append((tuple(entry["removed"]), int(entry["chunk"]), values))
            except (ValueError, KeyError, TypeError):
                logger.warning("%s:%d is not a measurement and is ignored.", self.path, number)
        return known

    def append(self, key: str, removed: Mask, chunk: int, values: list[list[float]]) -> None:
        """Record one measurement; it is with the operating system when this returns.

        The line goes out in one system call, so that several processes can write to one journal.

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
