"""Datasets of the Hugging Face hub: read as items, and uploaded."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidDataError, LoadError
from ..hub import failures, upload
from ..utils import explain_load_failure
from .row_formats import DATASETS, find_benchmarks
from .tables import by_use, items_of_rows, unreadable

if TYPE_CHECKING:
    from .items import EvalItem


def _download_failures() -> tuple[type[Exception], ...]:
    """What `datasets` raises for a source that cannot be had; StopIteration: an empty file."""
    return (*failures(), *unreadable(), StopIteration)


def _download(repo_id: str, subset: str | None, split: str | None) -> dict[str, Any]:
    """The rows of each split, in the order in which splits are tried."""
    import datasets

    try:
        if split:
            return {split: datasets.load_dataset(repo_id, subset, split=split)}
        splits = datasets.load_dataset(repo_id, subset)
    except _download_failures() as error:
        hint = " Choose one with subset=." if "config" in str(error).lower() else ""
        raise LoadError(explain_load_failure("dataset", repo_id, error) + hint) from error
    return {name: splits[name] for name in by_use(splits)}


def read_hub_dataset(
    repo_id: str,
    subset: str | None,
    split: str | None,
    k: int | None = None,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
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
            return items_of_rows(rows, name, k, seed, fields, ordered=k is None)
        except InvalidDataError as error:
            reasons.append(f"split {tried!r}: {error}")
    raise LoadError(f"Dataset {repo_id!r} has no usable split. " + " ".join(reasons))


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
    return read_hub_dataset(repo_id, subset, split)


def upload_dataset_to_hub(
    data: Sequence[EvalItem], repo_id: str, token: str | None = None, *, private: bool = True
) -> str:
    """Upload the items and a card to a dataset repository on the hub, in one commit.

    Creates the repository if it does not exist; an existing one keeps its visibility, and its
    ``data.jsonl`` and ``README.md`` are replaced.

    Args:
        token: a token with write access; None for that of ``HF_TOKEN`` or ``hf auth login``.

    Returns:
        The repository's URL.

    Raises:
        InvalidDataError: the items cannot be used; nothing was sent.
        HubError: the upload failed; the message says why and what to do.
    """
    from .items import check_items

    lines = b"".join(_json_line(i, item) for i, item in enumerate(check_items(data)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.jsonl").write_bytes(lines)
        (folder / "README.md").write_bytes(_card(data, repo_id).encode())
        message = f"Upload {len(data)} items with llm_pruner"
        return upload(folder, repo_id, "dataset", message, private=private, token=token)


def _json_line(index: int, item: EvalItem) -> bytes:
    row = {"text": item} if isinstance(item, str) else item
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidDataError(f"data[{index}] cannot be written as JSON: {error}.") from None


def _card(data: Sequence[EvalItem], repo_id: str) -> str:
    from huggingface_hub import DatasetCard, DatasetCardData

    from .items import fingerprint

    files = [{"split": "test", "path": "data.jsonl"}]
    configs = [{"config_name": "default", "data_files": files}]
    meta = DatasetCardData(tags=["llm-pruner"], configs=configs)
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
