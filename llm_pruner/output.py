"""Output folders: checked before work starts, staged, and put in place in one step."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

PLAN_FILE = "pruning_plan.json"  # what marks a folder as written by this package
KEY_FILE = "healing.json"  # what marks a folder of a training's checkpoints as ours


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training in a folder that is its own, the oldest first.

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
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def clear_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a training, and its folder if nothing else is in it."""
    if not (folder / KEY_FILE).exists():
        return
    for path in own_checkpoints(folder):
        shutil.rmtree(path)
    (folder / KEY_FILE).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def check_output(output_dir: str | Path, *, overwrite: bool = False) -> Path:
    """Return `output_dir` as a path if a checkpoint can be written there.

    Raises:
        OutputError: it is a file, it is not empty (without `overwrite`), it holds something
            this package did not write, or its parent cannot be written to.
    """
    path = Path(output_dir).expanduser()
    try:
        if path.is_file() or path.is_symlink():
            raise OutputError(f"Output {str(path)!r} is not a folder: choose another path.")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                raise OutputError(
                    f"Output folder {str(path)!r} is not empty: choose another, or replace it "
                    "with overwrite=True (--overwrite)."
                )
            if not (path / PLAN_FILE).is_file():
                raise OutputError(
                    f"Output folder {str(path)!r} has no {PLAN_FILE}, so llm_pruner did not write "
                    "it and will not replace it: choose another, or empty it yourself."
                )
        above = next(parent for parent in path.absolute().parents if parent.exists())
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", dir=above))  # permissions can mislead
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"Output folder {str(path)!r} cannot be written: {error}.") from error
    return path


@contextmanager
def staged_output(
    output_dir: str | Path, *, overwrite: bool = False, need: int = 0
) -> Iterator[Path]:
    """A folder beside `output_dir` to write into, put in its place when the block ends well.

    If the block raises, nothing is left behind and what stood at `output_dir` still stands.

    Raises:
        OutputError: see `check_output`; also a full disk.
    """
    path = check_output(output_dir, overwrite=overwrite)
    stage = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield stage
        _apply_umask(stage)
        _put_in_place(stage, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"Writing {str(path)!r} failed: {error}. Nothing was left.") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _put_in_place(stage: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        path.replace(old)
        stage.replace(path)
        shutil.rmtree(old)
    else:
        stage.replace(path)


def _apply_umask(folder: Path) -> None:
    """safetensors and mkdtemp make everything private; give the modes a plain write would."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
