"""How much to remove, and from which layers: checked once, here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..errors import InvalidPlanError

DEFAULT_PROTECT = (2, 2)


@dataclass(frozen=True)
class Removable:
    """The layers of a model that may be removed.

    Attributes:
        num_layers: the model's depth.
        protect: how many layers at the start and at the end stay.
    """

    num_layers: int
    protect: tuple[int, int]

    @classmethod
    def of(
        cls, num_layers: int, protect: Sequence[int] | None = None, injected: int = 0
    ) -> Removable:
        """Check `protect`; None means (2, 2), or a quarter of the depth at each end if less.

        The first `injected` layers stay in any case: image features are added after them.

        Raises:
            InvalidPlanError: not two counts, or every layer would be protected.
        """
        if protect is None:
            first, last = (min(side, num_layers // 4) for side in DEFAULT_PROTECT)
            return cls(num_layers, (max(first, injected), last))
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
        return cls(num_layers, (first, last))

    @property
    def candidates(self) -> range:
        """The layers that are not protected."""
        return range(self.protect[0], self.num_layers - self.protect[1])

    @property
    def most(self) -> int:
        """The largest number of layers that can be removed."""
        return min(len(self.candidates), self.num_layers - 1)

    def refuse_protected(self, layers: Sequence[int]) -> None:
        """Raise InvalidPlanError if a protected layer is among `layers`."""
        protected = [layer for layer in layers if layer not in self.candidates]
        if protected:
            first, last = self.protect
            raise InvalidPlanError(
                f"Layers {protected} are protected: the first {first} and the last {last} of "
                f"{self.num_layers} layers must stay. Change protect= (--protect) if you mean it."
            )

    def __str__(self) -> str:
        first, last = self.protect
        return (
            f"the model has {self.num_layers} layers, the first {first} and the last {last} are "
            f"protected, so 1 to {self.most} can go"
        )


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
            InvalidPlanError: no layer, or more than can go.
        """
        if self.ratio is not None:
            count = int(self.ratio * removable.num_layers + 1e-9)
            if not 0 < count <= removable.most:
                raise InvalidPlanError(f"ratio={self.ratio:.4g} means {count} layers: {removable}.")
            return count
        if self.n_layers is not None and self.n_layers > removable.most:
            raise InvalidPlanError(
                f"n_layers={self.n_layers} must be from 1 to {removable.most}: {removable}."
            )
        return self.n_layers
