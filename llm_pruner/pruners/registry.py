"""Strategies by name: the built-in ones, those a script registers, and those of plug-ins.

Names can be listed and checked before torch is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from ..errors import InvalidPlanError, LoadError, UnknownNameError

if TYPE_CHECKING:
    from .base import BasePruner


S = TypeVar("S", bound="type[BasePruner]")
# name -> module of this package
BUILTIN = {
    "ablation": "measured",
    "avss": "avss",
    "bi": "similarity",
    "pruneme": "similarity",
    "smart": "measured",
}
ENTRY_POINTS = "llm_pruner.strategies"
_registered: dict[str, type[BasePruner]] = {}


def register_strategy(name: str) -> Callable[[S], S]:
    """Class decorator: make a strategy usable by `name`, in `get_strategy` and on the command line.

    Example:
        >>> from llm_pruner import BasePruner, register_strategy
        >>> @register_strategy("deepest-first")
        ... class DeepestFirst(BasePruner):
        ...     def description(self):
        ...         return "Removes the deepest layers."
        ...     def compute_layer_scores(self, eval_data):
        ...         return {i: float(-i) for i in range(self.num_layers)}

    Raises:
        InvalidPlanError: another class already has the name.
    """

    def decorate(cls: S) -> S:
        known = _registered.get(name)
        taken = known is not None and _full_name(known) != _full_name(cls)
        home = f"{__package__}.{BUILTIN[name]}" if name in BUILTIN else cls.__module__
        if taken or cls.__module__ != home:
            owner = _full_name(known) if known is not None else home
            raise InvalidPlanError(
                f"Strategy name {name!r} is already taken by {owner}: choose another name."
            )
        cls.name = name
        _registered[name] = cls
        return cls

    return decorate


def strategy_names() -> list[str]:
    """Every name `get_strategy` knows: built-in, registered, and from installed plug-ins."""
    return sorted({*BUILTIN, *_registered, *_plugins()})


def get_strategy(name: str) -> type[BasePruner]:
    """The strategy class called `name`.

    Args:
        name: a name of `strategy_names`, or ``FILE.py:NAME`` for a class, or a registered
            name, in a Python file; the file is run.

    Raises:
        UnknownNameError: no such strategy; the message lists the known ones.
        LoadError: the file or plug-in cannot be imported.
    """
    if ":" in name:
        return _from_file(name)
    if name in BUILTIN:
        importlib.import_module(f"{__package__}.{BUILTIN[name]}")
    elif name not in _registered and name in _plugins():
        return _load_plugin(name)
    if name not in _registered:
        raise UnknownNameError.of("strategy", name, strategy_names())
    return _registered[name]


def check_strategy_name(name: str) -> None:
    """Raise as `get_strategy` would for a name it cannot know, without importing anything."""
    if ":" in name:
        path = Path(name.rpartition(":")[0])
        if not path.is_file():
            raise LoadError(f"Strategy file {str(path)!r} does not exist (from {name!r}).")
    elif name not in strategy_names():
        raise UnknownNameError.of("strategy", name, strategy_names())


def _plugins() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_strategy(found: object) -> TypeGuard[type[BasePruner]]:
    from .base import BasePruner

    if not inspect.isclass(found) or inspect.isabstract(found):
        return False
    return issubclass(found, BasePruner)


def _load_plugin(name: str) -> type[BasePruner]:
    try:
        found = _plugins()[name].load()
    except Exception as error:
        raise LoadError(
            f"Plug-in strategy {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not _is_strategy(found):
        raise LoadError(f"Plug-in strategy {name!r} is {found!r}, not a subclass of BasePruner.")
    return register_strategy(name)(found)


def _from_file(name: str) -> type[BasePruner]:
    check_strategy_name(name)
    path, _, wanted = name.rpartition(":")
    # A name of its own, so that a file called torch.py hides nothing.
    spec = importlib.util.spec_from_file_location(f"_strategy_file_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path!r} is not a Python file: write FILE.py:NAME.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise LoadError(f"{path!r} cannot be run: {type(error).__name__}: {error}") from error
    own = {
        key: value
        for cls in vars(module).values()
        if _is_strategy(cls) and cls.__module__ == spec.name
        for key, value in ((cls.__name__, cls), (cls.name, cls))
        if key != "custom"
    }
    if wanted not in own:
        raise UnknownNameError.of(f"strategy in {path}", wanted, own)
    return own[wanted]


def option_names(cls: type[BasePruner]) -> list[str]:
    """The keyword options of a strategy's constructor, its base classes' included."""
    found = [
        parameter.name
        for owner in cls.__mro__
        if "__init__" in vars(owner)
        for parameter in inspect.signature(vars(owner)["__init__"]).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return sorted(set(found))
