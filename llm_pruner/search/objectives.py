"""What quality is: measures of a model on items, alone or in a weighted mixture.

The mean of a measure is turned into a quality, for which more is always better. Thresholds and
tolerances limit the relative change of that quality: -0.02 is 2 % less.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from ..errors import InvalidPlanError, UnknownNameError
from ..plugins import load_plugin, plugins, run_file
from .measures import (
    AnswerMeasure,
    ChoiceMeasure,
    EncodedData,
    FunctionMeasure,
    Measure,
    OwnMeasure,
    TokenMeasures,
)

F = TypeVar("F", bound=OwnMeasure)
ENTRY_POINTS = "llm_pruner.objectives"
BETTER = ("higher", "lower")


@dataclass(frozen=True)
class Objective:
    """How a measure becomes a quality, for which more is better.

    Attributes:
        measured_by: makes what reads it.
        unit: what the quality is, in words.
        is_loss: whether the mean is a loss in nats and the quality exp(-mean); otherwise the
            quality is the mean itself.
        better: whether ``higher`` or ``lower`` means are; of lower ones the quality is -mean.
        version: tells apart what has the same name in two runs; empty for what comes with this
            package.
    """

    measured_by: Callable[[EncodedData, Sequence[str]], Measure]
    unit: str
    is_loss: bool = False
    better: str = "higher"
    version: str = ""

    def quality(self, mean: float) -> float:
        """The quality of a mean."""
        return math.exp(-mean) if self.is_loss else self._sign * mean

    def slope(self, mean: float) -> float:
        """Derivative of `quality`."""
        return -math.exp(-mean) if self.is_loss else self._sign

    def relative(self, differences: torch.Tensor, full: float) -> torch.Tensor:
        """The relative changes of quality that many differences of means are.

        A difference of losses says the change of likelihood by itself, which stays above -1.
        """
        if self.is_loss:
            return torch.expm1(-differences)
        return self._sign * differences / abs(full)

    @property
    def _sign(self) -> float:
        return 1.0 if self.better == "higher" else -1.0


OBJECTIVES: dict[str, Objective] = {
    "nll": Objective(TokenMeasures, "likelihood per token", is_loss=True),
    "kl": Objective(TokenMeasures, "exp(-KL divergence from the full model)", is_loss=True),
    "agreement": Objective(TokenMeasures, "top-1 agreement with the full model"),
    "accuracy": Objective(ChoiceMeasure, "multiple-choice accuracy"),
    "similarity": Objective(AnswerMeasure, "answer similarity"),
}
BUILTIN = frozenset(OBJECTIVES)
ObjectiveLike = str | Mapping[str, float]


def register_objective(name: str, *, better: str = "higher", unit: str = "") -> Callable[[F], F]:
    """Decorator: make a function an objective, by `name`, in Python and on the command line.

    The function gets a model (the full one, or one without layers), its tokenizer and a list of
    items, and returns one number for each. It is called with a few items at a time, so the number
    of an item must not depend on the others. Every set of layers that a search tries is such a
    call, and the numbers are kept in the journal.

    Args:
        name: without commas, ``=`` and colons.
        better: whether ``higher`` or ``lower`` numbers are.
        unit: what the mean of the numbers is, in words; the name if empty.

    Example:
        >>> from llm_pruner import register_objective
        >>> @register_objective("short-answers", better="lower", unit="characters of an answer")
        ... def length(model, tokenizer, items):
        ...     from llm_pruner import ModelEvaluator
        ...     prompts = [item["prompt"] for item in items]
        ...     return [len(text) for text in ModelEvaluator(model, tokenizer).generate(prompts)]

    Raises:
        InvalidPlanError: another objective has the name, or it cannot be one.
    """

    def decorate(function: F) -> F:
        known = OBJECTIVES.get(name)
        if name in BUILTIN or (known and known.version != _version(function)):
            raise InvalidPlanError(
                f"Objective name {name!r} is already taken: choose another name."
            )
        if not name.strip() or any(sign in name for sign in ",=:"):
            raise InvalidPlanError(f"Objective name {name!r} must have no comma, '=' or colon.")
        OBJECTIVES[name] = _own(function, name, better, unit)
        return function

    return decorate


def _own(function: OwnMeasure, name: str, better: str = "higher", unit: str = "") -> Objective:
    if not callable(function):
        raise InvalidPlanError(f"Objective {name!r} is {function!r:.80}, not a function.")
    if better not in BETTER:
        raise InvalidPlanError(f"better={better!r} must be 'higher' or 'lower'.")
    reads = partial(FunctionMeasure, function)
    return Objective(reads, unit or name, better=better, version=_version(function))


def _version(function: OwnMeasure) -> str:
    """A hash of the file that a function is in, or of what the interpreter makes of it."""
    try:
        source = Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        source = repr(function).encode() if code is None else code.co_code
    return hashlib.sha256(source).hexdigest()[:12]


def load_objective(name: str) -> None:
    """Make an objective known that is in a file (``FILE.py:NAME``) or comes with a plug-in.

    In a file, NAME is a function, for which higher numbers are better, or the name that it was
    registered by.

    Raises:
        UnknownNameError: no such objective; the message lists the known ones.
        LoadError: the file or the plug-in cannot be imported.
    """
    if name in OBJECTIVES:
        return
    if ":" in name:
        module, wanted = run_file(name, "objective")
        own = _of_module(module)
        if wanted not in own:
            raise UnknownNameError.of(f"objective in {module.__file__}", wanted, own)
        OBJECTIVES[name] = own[wanted]
    elif name in plugins(ENTRY_POINTS):
        found: Any = load_plugin(ENTRY_POINTS, name, "objective")
        OBJECTIVES.setdefault(name, _own(found, name))  # it may have registered itself
    else:
        raise UnknownNameError.of("objective", name, {*OBJECTIVES, *plugins(ENTRY_POINTS)})


def _of_module(module: ModuleType) -> dict[str, Objective]:
    """The objectives of a file: its functions, by their names and those they registered."""
    registered = {
        name: one
        for name, one in OBJECTIVES.items()
        if getattr(_function(one), "__module__", "") == module.__name__
    }
    own = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    known = {_function(one): one for one in registered.values()}
    return {name: known.get(one) or _own(one, name) for name, one in own.items()} | registered


def _function(objective: Objective) -> Any:
    """The function that an objective reads with; None for those of this package."""
    reads = objective.measured_by
    return reads.args[0] if isinstance(reads, partial) else None


def parse_objective(objective: ObjectiveLike) -> dict[str, float]:
    """Measures and their weights, which add up to 1.

    Args:
        objective: a name of `OBJECTIVES`, of a plug-in, or ``FILE.py:NAME`` for a function (see
            `register_objective`); several as ``"nll=0.7,kl=0.3"``, or a dict.

    Raises:
        UnknownNameError: no measure of a name.
        InvalidPlanError: a weight that is not a positive number, or a name given twice.
    """
    if not isinstance(objective, str | Mapping):
        raise InvalidPlanError(
            f"objective={objective!r} must be a name, as nll, or several with weights, as "
            "nll=0.7,kl=0.3."
        )
    if isinstance(objective, Mapping):
        pairs = [(name, _number(weight)) for name, weight in objective.items()]
    else:
        fields = [part.partition("=") for part in objective.split(",")]
        pairs = [(name.strip(), _number(weight) if eq else 1.0) for name, eq, weight in fields]
    for name, weight in pairs:
        load_objective(name)
        if not 0 < weight < math.inf:
            raise InvalidPlanError(
                f"Objective {objective!r}: the weight of {name!r} must be a positive number, as "
                "in nll=0.7,kl=0.3."
            )
    if not pairs or len({name for name, _ in pairs}) < len(pairs):
        raise InvalidPlanError(f"Objective {objective!r} must name each measure once.")
    total = math.fsum(weight for _, weight in pairs)
    return {name: weight / total for name, weight in pairs}


def _number(value: Any) -> float:
    """The number that `value` is; NaN, which no weight may be, if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
