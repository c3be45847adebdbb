"""Rows of tables, as files of Parquet and Arrow and libraries of Python hold them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InvalidDataError, LoadError
from ..utils import counted, logger, shown
from .conversations import UnfitRowError
from .items import EvalItem
from .row_formats import to_item

MAX_BAD_ROWS = 100  # a table whose rows all fail is given up after so many
SPLITS = ("test", "validation", "train")  # in the order in which they are tried
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes into its folder


def unreadable() -> tuple[type[Exception], ...]:
    """What `datasets` and `pyarrow` raise for what they cannot read."""
    from datasets.exceptions import DatasetsError
    from pyarrow.lib import ArrowException

    return DatasetsError, ArrowException, OSError, ValueError, TypeError, KeyError, IndexError


def read_table(path: Path) -> Any:
    """The rows of a Parquet or Arrow file, or of a folder of `save_to_disk`.

    Raises:
        LoadError: it cannot be read.
    """
    import datasets
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if path.is_dir():
            return _one_split(datasets.load_from_disk(str(path)))
        if path.suffix.lower() == ".parquet":
            return datasets.Dataset(parquet.read_table(path))
        with pyarrow.memory_map(str(path)) as source:
            try:
                table = ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:  # Arrow has a format for streams, and one for files
                source.seek(0)
                table = ipc.open_file(source).read_all()
        return datasets.Dataset(table)
    except unreadable() as error:
        reason = " ".join(str(error).split())
        raise LoadError(f"Cannot read {path}: {type(error).__name__}: {reason:.300}.") from error


def _one_split(rows: Any) -> Any:
    """The rows; of several splits, those of the first that is usual to measure on."""
    if not isinstance(rows, Mapping):
        return rows
    names = by_use(rows)
    if not names:
        raise InvalidDataError("the dataset has no splits.")
    if len(names) > 1:
        logger.info("Of the splits %s, %s is read.", ", ".join(sorted(rows)), names[0])
    return rows[names[0]]


def by_use(names: Iterable[str]) -> list[str]:
    """The names of splits, those that are usual to measure on first."""
    return sorted(names, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))


def items_of_rows(
    rows: Any,
    name: str,
    k: int | None = None,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
    *,
    ordered: bool = True,
) -> list[EvalItem]:
    """Items of the usable rows of a table; how many were passed over, and why, goes to the log.

    Args:
        rows: what has a length and a row at every index.
        k: how many rows to draw, all of them if None.
        ordered: whether they stay in their order, or come as they are drawn.

    Raises:
        InvalidDataError: no row can be used.
    """
    order: Sequence[int] = range(len(rows))
    if k is not None:
        order = random.Random(seed).sample(order, len(order))
    items: dict[int, EvalItem] = {}
    bad: list[str] = []
    for index in order:
        if len(items) == k or (not items and len(bad) == MAX_BAD_ROWS):
            break
        try:
            items[index] = to_item(rows[index], name, fields)
        except InvalidDataError as error:
            bad.append(f"row {index}: {error}")
    if not items:
        raise InvalidDataError(bad[0] if bad else "it has no rows.")
    say_passed_over(name, bad)
    return [items[index] for index in (sorted(items) if ordered else items)]


def say_passed_over(name: str, bad: Sequence[str]) -> None:
    """How many rows of a source are left out, and why the first of them is."""
    if bad:
        logger.warning(
            "%s: passed over %s; the first is %s", name, counted(len(bad), "unusable row"), bad[0]
        )


def items_of_object(
    data: object, k: int, seed: int = 0, fields: Mapping[str, str] | None = None
) -> list[EvalItem]:
    """At most `k` items of rows in Python, drawn by `seed`.

    Args:
        data: a list, or another iterable, of rows or texts; a ``Dataset``, ``IterableDataset`` or
            ``DatasetDict`` of `datasets`; a ``DataFrame`` or ``Series`` of pandas; a ``Table`` of
            pyarrow. What has no length gives its first `k` rows.

    Raises:
        InvalidDataError: rows that cannot be used, or nothing that has rows.
    """
    table = _as_table(data)
    if table is not None:
        return items_of_rows(table, "data", k, seed, fields)
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise InvalidDataError(
            f"data must be the name of a source, or rows: a list, a Dataset or a DataFrame, not "
            f"{shown(data)}."
        )
    items, bad = [], []
    for number, row in enumerate(_drawn(data, k, seed)):
        try:
            items.append(to_item(row, "data", fields))
        except UnfitRowError as error:
            bad.append(f"row {number}: {error}")
        except InvalidDataError as error:
            raise InvalidDataError(f"data: row {number}: {error}") from None
    if not items:
        raise InvalidDataError(f"data: {bad[0]}" if bad else "data has no rows: one is needed.")
    say_passed_over("data", bad)
    return items


def _drawn(rows: Iterable[Any], k: int, seed: int) -> Iterator[Any]:
    if not isinstance(rows, Sequence):
        return islice(iter(rows), k)
    chosen = random.Random(seed).sample(range(len(rows)), min(k, len(rows)))
    return (rows[index] for index in sorted(chosen))


def _as_table(data: Any) -> Any:
    """Rows by index, of what a library holds; None for anything else.

    Libraries that have not been imported cannot have made it.
    """
    pandas, datasets, arrow = (sys.modules.get(name) for name in ("pandas", "datasets", "pyarrow"))
    if pandas is not None and isinstance(data, pandas.Series):
        return _plain(data.dropna().tolist())
    if pandas is not None and isinstance(data, pandas.DataFrame):
        missing = data.astype(object).where(data.notna(), None)
        return _plain(missing.to_dict("records"))
    if datasets is not None and isinstance(data, datasets.Dataset | datasets.DatasetDict):
        return _one_split(data)
    if arrow is not None and isinstance(data, arrow.Table):
        return data.to_pylist()
    return None


def _plain(value: Any) -> Any:
    """A value of pandas without the arrays of NumPy in it."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
