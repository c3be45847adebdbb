"""How much to remove, and from which layers: checked once, here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..checkpoint.gguf import GgufModel, read_gguf_model, refuse_other_engines
from ..engines.layer_sets import LayerSets
from ..engines.serving import Serving
from ..engines.verdict import check_engines, verdicts
from ..errors import InvalidPlanError, LoadError
from ..storage.origin import gguf_of

DEFAULT_PROTECT = (2, 2)


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
class Budget:
    """How much to remove: at most one amount, and a limit on the loss.

    Attributes:
        ratio: share of all layers, in (0, 1), rounded down to whole layers.
        n_layers: exact number of layers.
        threshold: every layer whose score is beyond it.
        tolerance: largest relative loss of quality in total; 0.015 is 1.5 %.

    Raises:
        InvalidPlanError: an amount that is impossible for any model, or two amounts.
    """

    ratio: float | None = None
    n_layers: int | None = None
    threshold: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        amounts = [name for name in self.given if name != "tolerance"]
        if len(amounts) > 1:
            raise InvalidPlanError(f"{' and '.join(amounts)} exclude each other: give one.")
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

    @property
    def given(self) -> dict[str, float]:
        """What was asked for, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def count(self, removable: Removable) -> int | None:
        """The number of layers this asks for; None if the scores or a limit decide.

        Raises:
            InvalidPlanError: no layer, or a number that cannot go.
        """
        sizes = removable.sets.sizes
        if not sizes:
            raise InvalidPlanError(f"No layer can be removed: {removable}.")
        if self.ratio is not None:
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
