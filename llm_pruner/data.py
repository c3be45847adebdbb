"""Evaluation items from benchmarks, local files and the Hugging Face hub, all in one format.

`layouts.py` says what an item is and which benchmarks are known; `files.py` reads local files.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidDataError, LoadError, UnknownNameError
from .files import READERS, read_local
from .hub import http_error, upload
from .layouts import (
    DATASETS,
    DEFAULT_SOURCES,
    digest,
    find_benchmarks,
    normalize_item,
    to_item,
)
from .utils import DEMO_DIR, explain_load_failure, logger

if TYPE_CHECKING:
    from .batching import EvalItem

DEMO_FILES = {
    "demo": "calibration.jsonl",
    "demo-eval": "evaluation.jsonl",
    "demo-heal": "healing.jsonl",
}
__all__ = [
    "DATASETS",
    "load_dataset_from_hub",
    "load_eval_dataset",
    "normalize_item",
    "safe_sample",
    "split_items",
    "upload_dataset_to_hub",
]
MAX_BAD_ROWS = 100  # a source whose rows all fail is given up after so many


def _hub_failures() -> tuple[type[Exception], ...]:
    """What `datasets` raises for a source that cannot be had; StopIteration: an empty file."""
    from datasets.exceptions import DatasetsError
    from pyarrow.lib import ArrowException

    builtin = (OSError, ValueError, RuntimeError, LookupError, StopIteration)
    return (*builtin, DatasetsError, ArrowException, http_error())


def _download(repo_id: str, subset: str | None, split: str | None) -> dict[str, Any]:
    """The rows of each split, in the order in which splits are tried."""
    import datasets

    order = ("test", "validation", "train")
    try:
        if split:
            return {split: datasets.load_dataset(repo_id, subset, split=split)}
        splits = datasets.load_dataset(repo_id, subset)
    except _hub_failures() as error:
        hint = " Choose one with subset=." if "config" in str(error).lower() else ""
        raise LoadError(explain_load_failure("dataset", repo_id, error) + hint) from error
    names = [name for name in order if name in splits]
    return {name: splits[name] for name in [*names, *(n for n in splits if n not in order)]}


def _from_hub(
    repo_id: str, subset: str | None, split: str | None, k: int | None = None, seed: int = 0
) -> list[EvalItem]:
    """Items of the first split that has usable rows: all in order, or `k` drawn by `seed`."""
    known = find_benchmarks(repo_id, subset)
    if len(known) > 1 and subset is None:
        raise LoadError(f"{repo_id!r} holds several benchmarks: choose {' or '.join(known)}.")
    name = repo_id
    if known:
        name, row = known[0], DATASETS[known[0]]
        repo_id, subset, split = row.repo_id, subset or row.subset, split or row.split
    reasons = []
    for tried, rows in _download(repo_id, subset, split).items():
        try:
            return _normalize_rows(rows, name, k, seed)
        except InvalidDataError as error:
            reasons.append(f"split {tried!r}: {error}")
    raise LoadError(f"Dataset {repo_id!r} has no usable split. " + " ".join(reasons))


def _normalize_rows(rows: Any, name: str, k: int | None, seed: int) -> list[EvalItem]:
    """Items of the usable rows; how many were passed over, and why, goes to the log."""
    order: Sequence[int] = range(len(rows))
    if k is not None:
        order = random.Random(seed).sample(order, len(order))
    items: list[EvalItem] = []
    bad: list[str] = []
    for index in order:
        if len(items) == k or (not items and len(bad) == MAX_BAD_ROWS):
            break
        try:
            items.append(to_item(rows[index], name))
        except InvalidDataError as error:
            bad.append(f"row {index}: {error}")
    if not items:
        raise InvalidDataError(bad[0] if bad else "it has no rows.")
    if bad:
        logger.warning("%s: passed over %d unusable rows; the first is %s", name, len(bad), bad[0])
    return items


def load_dataset_from_hub(
    repo_id: str, *, split: str | None = None, subset: str | None = None
) -> list[EvalItem]:
    """All items of a dataset on the hub.

    Args:
        repo_id: its id, or a short name of `DATASETS`.
        split: the split to read. If None, that of `DATASETS` for a benchmark listed there, else
            the first of test, validation, train that has labels.
        subset: the configuration, where the dataset has several.

    Raises:
        LoadError: unknown, gated, unreachable, or without a usable split.
    """
    return _from_hub(repo_id, subset, split)


def _check_count(name: str, n: object) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InvalidDataError(f"{name}={n!r} must be an integer of at least 1.")


def _sample(
    source: str, subset: str | None, split: str | None, k: int, seed: int
) -> list[EvalItem]:
    """At most `k` items of a benchmark, a local path or a hub id, looked for in this order."""
    known = find_benchmarks(source)
    path = DEMO_DIR / DEMO_FILES[source] if source in DEMO_FILES else Path(source).expanduser()
    local = source in DEMO_FILES or path.exists() or path.suffix.lower() in READERS
    if local and not known:
        items = read_local(path)
        chosen = random.Random(seed).sample(range(len(items)), min(k, len(items)))
        return [items[index] for index in sorted(chosen)]
    if not known and "/" not in source:
        raise UnknownNameError.of("dataset", source, [*DATASETS, *DEMO_FILES])
    return _from_hub(source, subset, split, k, seed)


def safe_sample(
    dataset_name: str, subset: str | None, split: str | None, k: int, *, seed: int = 0
) -> list[EvalItem]:
    """At most `k` items of one source, drawn by `seed`; none, and a warning, if it fails.

    Args:
        dataset_name: a short name of `DATASETS`, a hub id, or a local file or folder.
        subset: the dataset's configuration; None for the usual one.
        split: the split to draw from; None for the usual one.
    """
    _check_count("k", k)
    try:
        return _sample(dataset_name, subset, split, k, seed)
    except (LoadError, InvalidDataError, UnknownNameError) as error:
        logger.warning("No items from %s: %s", dataset_name, error)
        return []


def load_eval_dataset(
    n: int, source: str | None = None, *, seed: int = 0, up_to: bool = False
) -> list[EvalItem]:
    """`n` evaluation items, drawn by `seed`; fewer, with a warning, if there are not so many.

    Args:
        source: None for a mixture of `DEFAULT_SOURCES` in equal shares, where the others fill
            the share of one that fails; or ``demo``, ``demo-eval`` or ``demo-heal`` (own items),
            a short name of `DATASETS`, a file (.jsonl, .json, .csv, .txt), a folder of such
            files, or a hub id. Write ``./sciq`` for a folder with the name of a benchmark.
        up_to: `n` is the most that is wanted: no warning if there are fewer.

    Raises:
        InvalidDataError: `n` below 1, or a file with something that cannot be used.
        LoadError: the source, or every source of the mixture, cannot be had.
        UnknownNameError: no such source.
    """
    _check_count("n", n)
    items = _mixture(n, seed) if source is None else _sample(str(source), None, None, n, seed)
    if len(items) < n and not up_to:
        logger.warning("%d items asked for, only %d available: using these.", n, len(items))
    return items


def _mixture(n: int, seed: int) -> list[EvalItem]:
    pools, reasons = [], []
    for name in DEFAULT_SOURCES:
        try:
            pools.append(_sample(name, None, None, n, seed))
        except (LoadError, InvalidDataError) as error:
            reasons.append(f"{name}: {error}")
    if not pools:
        raise LoadError(
            "None of the evaluation datasets could be loaded; without a network use a local file "
            "or the source 'demo'.\n  " + "\n  ".join(reasons)
        )
    for reason in reasons:
        logger.warning("No items from %s", reason)
    rounds = zip_longest(*pools)
    return [item for items in rounds for item in items if item is not None][:n]


def split_items(
    items: Sequence[EvalItem], first: float = 0.5, *, seed: int = 0
) -> tuple[list[EvalItem], list[EvalItem]]:
    """Split into two lists, scoring and held-out, that have no prompt in common.

    Which side a prompt goes to depends on `seed` and the prompts, not on their order.

    Args:
        first: size of the first list: a share between 0 and 1, or a number of items. Repeated
            prompts stay together and may make it fewer, never more.

    Raises:
        InvalidDataError: the items cannot be used, or one list would be empty.
    """
    from .batching import check_items

    groups: dict[str, list[int]] = {}
    for index, item in enumerate(check_items(items)):
        prompt = item if isinstance(item, str) else item["prompt"]
        groups.setdefault(" ".join(prompt.split()), []).append(index)
    share = isinstance(first, float) and 0 < first < 1
    if not share and type(first) is not int:
        raise InvalidDataError(f"first={first!r} must be a share between 0 and 1 or an integer.")
    wanted = max(1, round(first * len(items))) if share else first
    taken: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: digest(seed, prompt)):
        if len(taken) + len(groups[prompt]) <= wanted:
            taken.update(groups[prompt])
    if not 0 < len(taken) < len(items):
        raise InvalidDataError(
            f"Cannot put {wanted} of {len(items)} items with {len(groups)} different prompts on "
            "one side: both sides need at least one. Give more items or another number."
        )
    left = [item for index, item in enumerate(items) if index in taken]
    right = [item for index, item in enumerate(items) if index not in taken]
    return left, right


def upload_dataset_to_hub(
    data: Sequence[EvalItem], repo_id: str, token: str | None = None, *, private: bool = True
) -> str:
    """Write the items and a card to a dataset repository on the hub, in one commit.

    The repository is created if need be; one that exists keeps its visibility, and its
    ``data.jsonl`` and ``README.md`` are replaced. Nothing is written to the local disk.

    Args:
        token: a token with write access; None for the one stored by ``hf auth login``.

    Returns:
        The repository's URL.

    Raises:
        InvalidDataError: the items cannot be used; nothing was sent.
        HubError: the hub refused or could not be reached; the message says what to do.
    """
    from .batching import check_items

    lines = b"".join(_json_line(i, item) for i, item in enumerate(check_items(data)))
    return upload(
        {"data.jsonl": lines, "README.md": _card(data, repo_id).encode()},
        repo_id,
        "dataset",
        message=f"Upload {len(data)} items with llm_pruner",
        private=private,
        token=token,
    )


def _json_line(index: int, item: EvalItem) -> bytes:
    row = {"text": item} if isinstance(item, str) else item
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InvalidDataError(f"data[{index}] cannot be written as JSON: {error}.") from None


def _card(data: Sequence[EvalItem], repo_id: str) -> str:
    from huggingface_hub import DatasetCard, DatasetCardData

    from .batching import fingerprint

    files = [{"split": "test", "path": "data.jsonl"}]
    meta = DatasetCardData(
        tags=["llm-pruner"], configs=[{"config_name": "default", "data_files": files}]
    )
    tasks = Counter("text" if isinstance(i, str) else str(i.get("task", "")) for i in data)
    # Task names come from anywhere: keep them from being read as Markdown or HTML.
    names = {task: re.sub(r"[^A-Za-z0-9_.-]", "_", task) or "-" for task in tasks}
    table = "\n".join(f"| {names[task]} | {count} |" for task, count in tasks.items())
    body = f"""# {repo_id}

{len(data)} items for measuring language models before and after pruning, one JSON object a line:
`task`, `prompt`, `reference`, and where they apply `choices` (the reference is one of them) and
`aliases` (all accepted answers); running text is in `text`. Fingerprint: `{fingerprint(data)}`.

| task | items |
|---|---|
{table}

Read them with `llm_pruner.load_dataset_from_hub("{repo_id}")`. The items keep the licences of
the datasets they were taken from.
"""
    return str(DatasetCard(f"---\n{meta.to_yaml()}\n---\n\n{body}"))
