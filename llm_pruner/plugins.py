"""Code of the user's: a name in a Python file, or an entry point of an installed package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .errors import LoadError

_run: set[str] = set()  # the names of the modules that `run_file` has made


def check_file(name: str, kind: str) -> None:
    """Raise LoadError if the file of ``FILE.py:NAME`` is not there; nothing is run.

    Args:
        name: with a colon.
        kind: what it is to be, for the message, such as ``strategy``.
    """
    path = Path(name.rpartition(":")[0])
    if not path.is_file():
        raise LoadError(f"{kind.capitalize()} file {str(path)!r} does not exist (from {name!r}).")


def run_file(name: str, kind: str) -> tuple[ModuleType, str]:
    """Run the file of ``FILE.py:NAME``: the module, and NAME.

    Raises:
        LoadError: there is no such file, or it cannot be run.
    """
    check_file(name, kind)
    path, _, wanted = name.rpartition(":")
    # A name of its own, so that a file called torch.py hides nothing.
    spec = importlib.util.spec_from_file_location(f"_{kind}_file_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path!r} is not a Python file: write FILE.py:NAME.")
    module = importlib.util.module_from_spec(spec)
    _run.add(spec.name)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise LoadError(f"{path!r} cannot be run: {type(error).__name__}: {error}") from error
    return module, wanted


def place_in_own_code(error: BaseException) -> str:
    """The file and line of code that `run_file` has run where an error passed; empty without."""
    place, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") in _run:
            place = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


def plugins(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of a group, by name; nothing is imported."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}


def load_plugin(group: str, name: str, kind: str) -> object:
    """What an entry point stands for.

    Raises:
        LoadError: it cannot be imported.
    """
    try:
        return plugins(group)[name].load()
    except Exception as error:
        raise LoadError(
            f"Plug-in {kind} {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
