"""What a run may write over: nothing that it reads, and nothing that llm_pruner did not write."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LLMPrunerError, LoadError, OutputError
from .utils import user_path

# What an output holds beside the checkpoint; the plan marks a folder as written by this package.
PLAN_FILE = "pruning_plan.json"
REPORT_FILE = "pruning_report.json"
PAGE_FILE = "report.html"
MANIFEST_FILE = "pruning_manifest.json"
FIGURES = "figures"
RECIPE_HEAD = "# A MergeKit recipe by llm_pruner"
OUTPUT_FILES = "output_files"  # in the plan of an output: the names of all its files


def as_path(output: Any) -> Path:
    """The path of an output that a user has named."""
    if not isinstance(output, str | os.PathLike) or not str(output):
        raise OutputError(f"Output {output!r} is no path: name a place to write to.")
    try:
        return user_path(os.fspath(output))
    except LoadError as error:
        raise OutputError(f"The output cannot be written: {error}") from error


def check_file(
    path: str | Path, is_ours: Callable[[Path], bool], *, reads: Iterable[str | Path] = ()
) -> None:
    """Check, before the work, that a single file can be written where it was asked for.

    Args:
        path: where it is to go. A device is written to.
        is_ours: whether a file that stands there was written by llm_pruner, and may be replaced.
        reads: files that are read for it.

    Raises:
        OutputError: it cannot be written, or something else stands there.
    """
    target = as_path(path)
    with os_errors_as(f"Cannot write {str(path)!r}"):
        if target.is_dir():
            raise OutputError(f"{str(path)!r} is a folder: name a file.")
        if target.is_file():
            if any(_is_path(read) and target.samefile(read) for read in reads):
                raise OutputError(f"{str(path)!r} is read by this run: name another file.")
            if not is_ours(target):
                raise OutputError(
                    f"{str(path)!r} is there, and llm_pruner did not write it: move it, or choose "
                    "another place."
                )
        if target.is_fifo() or target.is_socket():
            raise OutputError(f"{str(path)!r} is a pipe: name a file.")
        if target.exists() and not target.is_file():
            return
        folder = target.resolve().parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass


def is_recipe(path: Path) -> bool:
    """Whether a file is a MergeKit recipe of llm_pruner."""
    return _begins(path, RECIPE_HEAD)


def is_plan(path: Path) -> bool:
    """Whether a file is a plan of llm_pruner, by its first line."""
    return _begins(path, '{\n  "format": "llm_pruner.plan/')


def is_curve(path: Path) -> bool:
    """Whether a file is a depth curve of llm_pruner, by its first line, or the picture of one."""
    return _begins(path.with_suffix(".json"), '{\n  "format": "llm_pruner.curve/')


def _begins(path: Path, text: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(text)) == text.encode()


def refuse_what_stands(path: Path, overwrite: bool, reads: Iterable[str | Path]) -> None:
    """Raise OutputError if an output folder would replace what it may not; see `check_output`."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"Output {str(path)!r} is not a folder: choose another path.")
    if Path.cwd().is_relative_to(path.resolve()):
        raise OutputError(
            f"Output folder {str(path)!r} holds the current folder, which cannot be replaced: "
            "choose another, or call from elsewhere."
        )
    if not holds_something(path):
        return
    if not overwrite:
        raise OutputError(
            f"Output folder {str(path)!r} is not empty: choose another, or replace it "
            "with overwrite=True (--overwrite)."
        )
    for read in filter(_is_path, reads):
        if user_path(read).resolve().is_relative_to(path.resolve()):
            raise OutputError(
                f"Output folder {str(path)!r} holds {str(read)!r}, which this run reads: choose "
                "another output."
            )
    if not (path / PLAN_FILE).is_file():
        raise OutputError(
            f"Output folder {str(path)!r} has no {PLAN_FILE}, so llm_pruner did not write "
            "it and will not replace it: choose another, or empty it yourself."
        )
    foreign = sorted(set(_files(path)) - _written_files(path))
    if foreign:
        raise OutputError(
            f"Output folder {str(path)!r} holds {foreign[0]!r} ({len(foreign)} such), which "
            f"{PLAN_FILE} does not list as written by llm_pruner, and which would be lost: move "
            "it, or choose another output."
        )


def holds_something(path: Path) -> bool:
    """Whether it is a folder that is not empty."""
    return path.is_dir() and any(path.iterdir())


def write_list(stage: Path) -> None:
    """Note in an output's plan which files it consists of: no others are ever replaced with it."""
    path = stage / PLAN_FILE
    if path.is_file():
        plan: dict[str, Any] = json.loads(path.read_bytes())
        text = json.dumps({**plan, OUTPUT_FILES: _files(stage)}, indent=2)
        path.write_text(f"{text}\n", encoding="utf-8")


def _files(folder: Path) -> list[str]:
    """The names of everything in a folder but of folders that hold something, sorted."""
    found = (path for path in entries(folder) if path.is_symlink() or not holds_something(path))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def entries(folder: Path) -> Iterator[Path]:
    """Everything below a folder; unlike with `rglob`, what cannot be listed is an OSError."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from entries(path)


def _written_files(folder: Path) -> set[str]:
    """The files that llm_pruner wrote into an output, as its plan lists them."""
    try:
        listed = json.loads((folder / PLAN_FILE).read_bytes())[OUTPUT_FILES]
        return {str(name) for name in listed}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise OutputError(
            f"Output folder {str(folder)!r} cannot be replaced, since its {PLAN_FILE} does not "
            "list which files llm_pruner wrote: remove the folder yourself, or choose another."
        ) from error


def _is_path(read: str | Path) -> bool:
    """Whether what a run reads is a file or a folder of this machine."""
    try:
        return user_path(read).exists()
    except LoadError:  # its reader will say so
        return False


@contextmanager
def os_errors_as(refusal: str, note: str = "") -> Iterator[None]:
    """Raise OutputError where the system refuses something, such as on a full disk."""
    try:
        yield
    except LLMPrunerError:
        raise
    except Exception as error:  # safetensors and tokenizers, in Rust, raise their own kinds
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise OutputError(f"{refusal}: {error}.{note}") from error
