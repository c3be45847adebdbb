"""Cutting and healing in turns: each next cut is chosen on the healed model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.items import EvalItem
from ..engines.layer_sets import Fits, LayerSets
from ..errors import InvalidPlanError, UnsupportedModelError
from ..healing.heal import HEALERS
from ..healing.job import Heal, Healing
from ..healing.lora_settings import LoraSettings
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy
from ..search.layer_search import check_number, search_layers
from ..search.moves import OnStep, Step
from ..search.removal_quality import RemovalQuality
from ..utils import logger

# Measures that compare a cut model with the uncut one, so they cannot judge a healed model.
RELATIVE_MEASURES = ("kl", "agreement")
LISTS = ("out", "in", "layers")  # entries of a step that list layers


class HealedModel:
    """The model that was healed last: a search that heals as it goes has made what is saved."""

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._model: Any = None
        self._record: dict[str, Any] = {}

    def get(
        self, key: tuple[str, ...], make: Callable[[], tuple[Any, dict[str, Any]]]
    ) -> tuple[Any, dict[str, Any]]:
        """A copy of the model under `key`, which shares its weights, and its healing record."""
        if key != self._key:
            self._model, self._record = make()
            self._key = key
        return share_copy(self._model), self._record


@dataclass(frozen=True)
class Repairs:
    """How a search heals the model between cuts.

    Attributes:
        items: what to heal with; other items than the layers are chosen on.
        every: cuts between two healings.
        heal: ``linear``, ``lora`` or ``full``, or a `Healing` with limits, for each healing.
        lora: how to train, for ``lora`` and ``full``.

    Raises:
        InvalidPlanError: `every` is not a number of cuts, or `heal` is unknown.
    """

    items: Sequence[EvalItem]
    every: int = 1
    heal: Heal = "linear"
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise InvalidPlanError(f"every={self.every!r} must be a whole number from 1.")
        if (method := Healing.of(self.heal).method) not in HEALERS:
            raise InvalidPlanError(
                f"heal={method!r} must be {' or '.join(HEALERS)} to heal between cuts."
            )


def search_in_rounds(
    stack: LayerStack,
    quality_of: Callable[[LayerStack], RemovalQuality],
    heal_without: Callable[[Sequence[int]], tuple[Any, dict[str, Any]]],
    candidates: Sequence[int],
    *,
    every: int = 1,
    n_layers: int | None = None,
    tolerance: float | None = None,
    fits: Fits | None = None,
    on_step: OnStep | None = None,
) -> list[int]:
    """Cut a few layers, heal, choose the next ones on the healed model, and so on.

    Each round runs `search_layers` on the model healed last. All layers chosen so far are then
    removed from the full model, which is healed afresh. A round whose healed model is worse than
    the full one by more than the tolerance is rolled back and ends the search.

    Args:
        quality_of: makes the measuring instrument for the layers of a model.
        heal_without: makes the healed model without a set of layers, and the healing record.
        candidates: 0-based layers of the full model that may be removed.
        every: cuts between two healings.
        n_layers: how many to remove; as many as `tolerance` allows if None.
        tolerance: largest relative loss of the healed model; None for no limit.
        fits: restricts the sets that may be removed, see `LayerSets`.
        on_step: see `search_layers`; a healing is a step too, with ``action`` ``repair``.

    Returns:
        0-based indices, ascending.

    Raises:
        InvalidPlanError: `n_layers` is impossible, or the objective compares with the full model.
        Also what `search_layers` and `heal_model` raise.
    """
    start = quality = quality_of(stack)
    if relative := [name for name in RELATIVE_MEASURES if name in start.measures]:
        raise InvalidPlanError(
            f"Objective {relative[0]!r} compares a cut model with its own uncut one, so it cannot "
            "judge healed models: use nll, accuracy or similarity, or do not heal between cuts."
        )
    sets = LayerSets(len(stack), candidates, fits)
    limit = check_number(sets, n_layers)
    removed: list[int] = []
    while len(removed) < limit:
        kept = [index for index in range(len(stack)) if index not in removed]
        pool = [i for i, index in enumerate(kept) if index in candidates]
        cuts: list[Step] = []
        try:
            here = sets.within(kept)
            count = _next_size(here, every, limit - len(removed))
            limits: dict[str, Any] = {"n_layers": count, "fits": here.fits}
            chosen = search_layers(quality, pool, **limits, on_step=cuts.append)
        except UnsupportedModelError as error:
            if tolerance is None or not removed:
                raise
            logger.info("%s", error)  # no further layer can be removed
            break
        grown = sorted([*removed, *(kept[i] for i in chosen)])
        healed, record = heal_without(grown)
        quality = quality_of(LayerStack(healed, stack.paths[0]))
        change = quality.change_from(start)
        allowed = tolerance is None or change >= -tolerance
        logger.info("Healed without %s: total change %+.4f", grown, change)
        if on_step:  # only now: cuts count once the healed model has been judged
            outcome = {} if allowed else {"kept": False, "removed": removed}
            for step in cuts:
                on_step({**_in_full_model(step, kept, removed), **outcome})
            healing: Step = {"action": "repair", "method": record["method"], "kept": allowed}
            healing |= {"removed": grown if allowed else removed, "change": change}
            on_step({**healing, "samples": quality.size(), "loss": record["healed"]})
        if not allowed:
            break
        removed = grown
    return removed


def _next_size(sets: LayerSets, every: int, left: int) -> int:
    """How many layers to remove next: `every` or, where that cannot be, the next larger number."""
    sizes = [size for size in sets.sizes if size <= left]
    if not sizes:
        raise UnsupportedModelError(
            f"The layers removed so far cannot be completed: {left} more may go, and the engines "
            f"to serve with allow {sets.sizes_text}. Heal after more removals, or at the end."
        )
    return next((size for size in sizes if size >= every), sizes[-1])


def _in_full_model(step: Step, kept: Sequence[int], removed: Sequence[int]) -> Step:
    """A search step on a cut model, with the layer indices of the full one."""
    renamed = {**step, "removed": sorted([*removed, *(kept[i] for i in step["removed"])])}
    if "layer" in step:
        renamed["layer"] = kept[step["layer"]]
    if step["action"] == "cut":
        renamed["tried"] = {str(kept[int(i)]): value for i, value in step["tried"].items()}
    return renamed | {name: [kept[i] for i in step[name]] for name in LISTS if name in step}
