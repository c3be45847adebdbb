"""How much to remove, and from which layers: checked once, here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ..checkpoint.gguf import GgufModel, read_gguf_model, refuse_other_engines
from ..engines.layer_sets import LayerSets
from ..engines.serving import Serving
from ..engines.verdict import check_engines, verdicts
from ..errors import InvalidPlanError, LoadError, UnknownNameError
from ..results import CONTEXT
from ..storage.origin import gguf_of

DEFAULT_PROTECT = (2, 2)
AMOUNTS = ("ratio", "n_layers", "threshold")


@dataclass(frozen=True)
class Removable:
    """The layers of a model that may be removed.

    Attributes:
        num_layers: the model's depth.
        protect: how many layers at the start and at the end stay.
        serving: the engines that have to compute the rest right, if any.
        runs: only layers that follow one another may be removed.
    """

    num_layers: int
    protect: tuple[int, int]
    serving: Serving | None = None
    runs: bool = False

    @classmethod
    def of(
        cls,
        num_layers: int,
        protect: Sequence[int] | None = None,
        injected: int = 0,
        serving: Serving | None = None,
    ) -> Removable:
        """Check `protect`; None means (2, 2), or a quarter of the depth at each end if less.

        The first `injected` layers stay in any case: image features are added after them.

        Raises:
            InvalidPlanError: not two counts, or every layer would be protected.
        """
        if protect is None:
            first, last = (min(side, num_layers // 4) for side in DEFAULT_PROTECT)
            return cls(num_layers, (max(first, injected), last), serving)
        if (
            not isinstance(protect, Sequence)
            or len(protect) != 2
            or any(not isinstance(side, int) or side < 0 for side in protect)
        ):
            raise InvalidPlanError(
                f"protect={protect} must be two whole numbers from 0: layers kept at the start "
                "and at the end."
            )
        first, last = max(protect[0], injected), protect[1]
        if first + last >= num_layers:
            raise InvalidPlanError(
                f"protect=({first}, {last}) protects all of the model's {num_layers} layers: "
                f"together they must be below {num_layers}."
            )
        return cls(num_layers, (first, last), serving)

    @property
    def candidates(self) -> range:
        """The layers that are not protected."""
        return range(self.protect[0], self.num_layers - self.protect[1])

    @cached_property
    def sets(self) -> LayerSets:
        """The sets of layers that may be removed."""
        fits = self.serving.fits if self.serving and self.serving.restricts else None
        return LayerSets(self.num_layers, self.candidates, fits, runs=self.runs)

    @property
    def most(self) -> int:
        """The largest number of layers that can be removed."""
        return self.sets.sizes[-1] if self.sets.sizes else 0

    @property
    def options(self) -> dict[str, Any]:
        """What restricts the choice, for the record."""
        engines = {"serve_with": list(self.serving.engines)} if self.serving else {}
        return {"protect": list(self.protect), **engines}

    def cheapest(self, costs: Mapping[int, float], size: int | None = None) -> list[int]:
        """The layers of `costs` with the smallest ones, ascending: `size`, or as many as may go.

        Where engines restrict the sets it is the one with the smallest sum.

        Args:
            costs: of layers, in the order in which equal ones are taken.
        """
        order = sorted(costs, key=costs.__getitem__)
        if self.serving is None or not self.serving.restricts:
            return sorted(order[:size])
        never = [layer for layer in self.candidates if layer not in costs]
        sizes = [size] if size is not None else range(len(costs), 0, -1)
        found = (self.sets.cheapest(costs, number, never=never) for number in sizes)
        return list(next((layers for layers in found if layers), ()))

    def refuse_protected(self, layers: Sequence[int]) -> None:
        """Raise InvalidPlanError if a protected layer is among `layers`."""
        protected = [layer for layer in layers if layer not in self.candidates]
        if protected:
            first, last = self.protect
            raise InvalidPlanError(
                f"Layers {protected} are protected: the first {first} and the last {last} of "
                f"{self.num_layers} layers must stay. Change protect= (--protect) if you mean it."
            )

    def refuse_misplaced(self, layers: Sequence[int]) -> None:
        """Raise InvalidPlanError unless the engines compute the rest right; see `Serving`."""
        if self.serving is not None:
            self.serving.refuse_misplaced(layers, self.num_layers)

    def __str__(self) -> str:
        first, last = self.protect
        sizes = self.sets.sizes
        whole = (
            f"the model has {self.num_layers} layers, the first {first} and the last {last} are "
            "protected"
        )
        if self.serving is None or not self.serving.restricts:
            return f"{whole}, so 1 to {self.most} can go"
        engines = " and ".join(self.serving.engines)
        runs = " that follow one another" if self.runs else ""
        if not sizes:
            rest = [layer for layer in range(self.num_layers) if layer != self.candidates[0]]
            why = self.serving.problem(rest)
            return (
                f"{whole}, and {engines} would compute the rest wrong, whichever others go{runs} "
                f"(without layer {self.candidates[0]}: {why})"
            )
        number = ", ".join(map(str, sizes))
        return f"{whole}, and {engines} computes the rest right only if {number} layers{runs} go"


@dataclass(frozen=True)
class Drop:
    """How much worse a figure may become.

    Attributes:
        amount: points of the figure, or a share of it.
        relative: whether it is a share.
    """

    amount: float
    relative: bool = False

    @classmethod
    def of(cls, value: str | float | Drop) -> Drop:
        """What ``0.02`` (points) or ``"10%"`` (a share) means.

        Raises:
            InvalidPlanError: it means neither.
        """
        if isinstance(value, Drop):
            return value
        text = str(value).strip()
        share = text.endswith("%")
        try:
            amount = float(text.removesuffix("%")) / (100 if share else 1)
        except ValueError:
            amount = math.nan
        if not 0 <= amount < math.inf:
            raise InvalidPlanError(
                f"max_drop={value!r} must be a number from 0, in points (0.02) or as a share (10%)."
            )
        return cls(amount, share)

    def __str__(self) -> str:
        return f"{self.amount:.4g}" if not self.relative else f"{100 * self.amount:.4g}%"


MEASURES = ("layers", "params", "bytes")  # what a ratio can be of
SPEEDS = ("decode", "prefill")
TARGETS = ("target_size", "target_params", "target_speedup", "target_memory")


@dataclass(frozen=True)
class Budget:
    """How much to remove: an amount, goals that need one, and limits on the loss.

    Attributes:
        ratio: share of all layers, in (0, 1), rounded down to whole layers; of parameters or bytes
            (`ratio_of`) at least this share goes.
        n_layers: exact number of layers.
        threshold: every layer whose score is beyond it.
        tolerance: largest relative loss of quality in total; 0.015 is 1.5 %.
        ratio_of: ``layers``, ``params`` or ``bytes``.
        target_size: most bytes of the weights, as they are stored.
        target_params: most parameters.
        target_speedup: how many times as fast, in tokens a second, on this machine.
        speedup_of: what is to be faster, ``decode`` or ``prefill``.
        target_memory: most bytes of the weights and of the cache for `context` tokens.
        context: tokens of one sequence.
        max_drop: by how much figures may become worse, see `Drop`: ``perplexity``, a task of the
            data, or ``mean`` of its tasks. With an amount or goals it is a condition; alone, as
            many layers go as it allows.
        confident: whether the upper end of the 95 % interval of a drop has to hold.

    Raises:
        InvalidPlanError: an amount that is impossible for any model, or two amounts.
    """

    ratio: float | None = None
    n_layers: int | None = None
    threshold: float | None = None
    tolerance: float | None = None
    ratio_of: str = "layers"
    target_size: int | None = None
    target_params: int | None = None
    target_speedup: float | None = None
    speedup_of: str = "decode"
    target_memory: int | None = None
    context: int = CONTEXT
    max_drop: Mapping[str, Drop | str | float] | None = None
    confident: bool = False

    def __post_init__(self) -> None:
        amounts = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(amounts) > 1:
            raise InvalidPlanError(f"{' and '.join(amounts)} exclude each other: give one.")
        if self.goals and self.threshold is not None:
            raise InvalidPlanError(
                f"threshold and {', '.join(self.goals)} exclude each other: goals set the number "
                "of layers."
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise InvalidPlanError(f"ratio={self.ratio} must lie between 0 and 1, e.g. 0.25.")
        if self.n_layers is not None and (type(self.n_layers) is not int or self.n_layers < 1):
            raise InvalidPlanError(f"n_layers={self.n_layers!r} must be a whole number from 1.")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise InvalidPlanError(f"threshold={self.threshold} must be a number, e.g. -0.02.")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise InvalidPlanError(
                f"tolerance={self.tolerance} must be a number from 0, e.g. 0.015."
            )
        for name, known in (("ratio_of", MEASURES), ("speedup_of", SPEEDS)):
            if getattr(self, name) not in known:
                raise UnknownNameError.of(name, getattr(self, name), known)
        for name in ("target_size", "target_params", "target_memory", "context"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidPlanError(f"{name}={value!r} must be a whole number from 1.")
        if self.target_speedup is not None and not 1 < self.target_speedup < math.inf:
            raise InvalidPlanError(
                f"target_speedup={self.target_speedup} must be a number above 1, e.g. 1.3."
            )
        if self.max_drop is not None:
            if not isinstance(self.max_drop, Mapping) or not self.max_drop:
                raise InvalidPlanError(
                    f"max_drop={self.max_drop!r} must be a dict, e.g. {{'perplexity': '10%'}}."
                )
            limits = {name: Drop.of(value) for name, value in self.max_drop.items()}
            object.__setattr__(self, "max_drop", limits)

    @property
    def goals(self) -> dict[str, Any]:
        """What the pruned model has to be, and by how much it may be worse, by name."""
        found = {name: getattr(self, name) for name in (*TARGETS, "max_drop")}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def targets(self) -> dict[str, float]:
        """Goals that need a number of layers, by name; a ratio of parameters or bytes is one."""
        found = {name: value for name, value in self.goals.items() if name != "max_drop"}
        if self.ratio is not None and self.ratio_of != "layers":
            found[f"ratio_of_{self.ratio_of}"] = self.ratio
        return found

    @property
    def limits(self) -> dict[str, Drop]:
        """By how much figures may become worse."""
        return {name: Drop.of(value) for name, value in (self.max_drop or {}).items()}

    @property
    def given(self) -> dict[str, Any]:
        """What was asked for, by name, as JSON has it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        if self.max_drop is not None:
            given["max_drop"] = {name: str(drop) for name, drop in self.limits.items()}
        return given

    def count(self, removable: Removable) -> int | None:
        """The number of layers this asks for; None if the scores or a limit decide.

        Raises:
            InvalidPlanError: no layer, or a number that cannot go.
        """
        sizes = removable.sets.sizes
        if not sizes:
            raise InvalidPlanError(f"No layer can be removed: {removable}.")
        if self.ratio is not None and self.ratio_of == "layers":
            count = int(self.ratio * removable.num_layers + 1e-9)
            if count not in sizes:
                raise InvalidPlanError(f"ratio={self.ratio:.4g} means {count} layers: {removable}.")
            return count
        if self.n_layers is not None and self.n_layers not in sizes:
            raise InvalidPlanError(
                f"n_layers={self.n_layers} must be {removable.sets.sizes_text}: {removable}."
            )
        return self.n_layers


def serving_of(model: Any, engines: Sequence[str]) -> Serving | None:
    """What the engines make of a model's layers; None if it need not be served by any.

    A model in GGUF has to be right in llama.cpp.

    Raises:
        UnknownNameError, InvalidPlanError: see `Serving.of_config`.
        LoadError: transformers reads the layers of a GGUF file otherwise than llama.cpp.
    """
    names = check_engines(engines)
    if paths := gguf_of(model):
        refuse_other_engines(names)
        gguf = read_gguf_model(paths)
        _refuse_other_kinds(gguf, model.config.to_dict())
        return gguf.serving
    return Serving.of_config(model.config.to_dict(), names) if names else None


def _refuse_other_kinds(gguf: GgufModel, config: dict[str, Any]) -> None:
    """transformers knows not every key by which a file says what its layers are."""
    pairs = zip(gguf.layers.rules, gguf.layers.meant_by(config).rules, strict=True)
    for (rule, kinds), (_, read) in pairs:
        if list(kinds) != list(read):
            raise LoadError(
                f"transformers reads {rule} of {gguf.name!r} otherwise than llama.cpp, so scores "
                "would mean another model: score the original model, or name the layers (--layers)."
            )


def engines_of(model: Any, kept: Sequence[int]) -> dict[str, str]:
    """What serving engines make of a model of which the layers `kept` are left."""
    if paths := gguf_of(model):
        return read_gguf_model(paths).engines
    describe = getattr(getattr(model, "config", None), "to_dict", None)  # no custom class has to
    return verdicts(describe(), kept) if describe else {}
