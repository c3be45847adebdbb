"""Strategies by name: the built-in ones, those a script registers, and those of plug-ins.

Names can be listed and checked before torch is imported.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from ..errors import InvalidPlanError, LoadError, UnknownNameError
from ..plugins import check_file, load_plugin, plugins, run_file

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
    return sorted({*BUILTIN, *_registered, *plugins(ENTRY_POINTS)})


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
    elif name not in _registered and name in plugins(ENTRY_POINTS):
        return _load_plugin(name)
    if name not in _registered:
        raise UnknownNameError.of("strategy", name, strategy_names())
    return _registered[name]


def check_strategy_name(name: str) -> None:
    """Raise as `get_strategy` would for a name it cannot know, without importing anything."""
    if ":" in name:
        check_file(name, "strategy")
    elif name.endswith(".py"):
        raise UnknownNameError(f"Strategy {name!r} names no class: write {name}:CLASS.")
    elif name not in strategy_names():
        raise UnknownNameError.of("strategy", name, strategy_names())


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_strategy(found: object) -> TypeGuard[type[BasePruner]]:
    from .base import BasePruner

    if not inspect.isclass(found) or inspect.isabstract(found):
        return False
    return issubclass(found, BasePruner)


def _load_plugin(name: str) -> type[BasePruner]:
    found = load_plugin(ENTRY_POINTS, name, "strategy")
    if not _is_strategy(found):
        raise LoadError(f"Plug-in strategy {name!r} is {found!r}, not a subclass of BasePruner.")
    return register_strategy(name)(found)


def _from_file(name: str) -> type[BasePruner]:
    module, wanted = run_file(name, "strategy")
    own = {
        key: value
        for cls in vars(module).values()
        if _is_strategy(cls) and cls.__module__ == module.__name__
        for key, value in ((cls.__name__, cls), (cls.name, cls))
        if key != "custom"
    }
    if wanted not in own:
        raise UnknownNameError.of(f"strategy in {module.__file__}", wanted, own)
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
