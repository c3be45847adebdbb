"""Cutting and repairing in turns: what is cut next is chosen on the repaired model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.items import EvalItem
from ..errors import InvalidPlanError, UnsupportedModelError
from ..healing.heal import Heal
from ..healing.lora_settings import LoraSettings
from ..model.layer_stack import LayerStack
from ..search.layer_search import OnStep, Step, check_number, search_layers
from ..search.removal_quality import RemovalQuality
from ..utils import logger

# Measures that compare a cut model with the full one: of a repaired model they tell nothing.
OWN_REFERENCE = ("kl", "agreement")


@dataclass(frozen=True)
class Repairs:
    """How a search repairs on its way.

    Attributes:
        items: what to repair with; other items than layers are chosen on.
        every: cuts between two repairs.
        heal: ``linear`` or ``lora``.
        lora: how to train, for ``lora``.

    Raises:
        InvalidPlanError: `every` is no number of cuts, or `heal` no repair.
    """

    items: Sequence[EvalItem]
    every: int = 1
    heal: Heal = "linear"
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise InvalidPlanError(f"every={self.every!r} must be a whole number from 1.")
        if self.heal not in ("linear", "lora"):
            raise InvalidPlanError(f"heal={self.heal!r} must be linear or lora to repair with.")


def search_in_rounds(
    stack: LayerStack,
    measured: Callable[[LayerStack], RemovalQuality],
    repaired: Callable[[Sequence[int]], tuple[Any, dict[str, Any]]],
    candidates: Sequence[int],
    *,
    every: int = 1,
    n_layers: int | None = None,
    tolerance: float | None = None,
    on_step: OnStep | None = None,
) -> list[int]:
    """Cut a few layers, repair, choose the next ones on the repaired model; and so on.

    In every round the search of `search_layers` runs on the model as it was repaired last, and all
    layers cut so far are then removed from the full model and repaired anew, against the full
    model. A round whose repaired model is worse than the full one by more than the tolerance is
    rolled back and ends the search.

    Args:
        stack: the layers of the full model.
        measured: makes the measuring instrument for the layers of a model.
        repaired: makes the repaired model without a set of layers, and the record of its healing.
        candidates: 0-based layers of the full model that may go.
        every: cuts between two repairs.
        n_layers: how many go; as many as `tolerance` allows if None.
        tolerance: largest relative loss of the repaired model; None for no limit.
        on_step: see `search_layers`; a repair is a step too, with ``action`` ``repair``.

    Returns:
        0-based indices, ascending.

    Raises:
        InvalidPlanError: `n_layers` cannot be, or the objective compares with the full model.
        Also what `search_layers` and `heal_model` raise.
    """
    start = measured(stack)
    if unfit := [name for name in OWN_REFERENCE if name in start.full()]:
        raise InvalidPlanError(
            f"Objective {unfit[0]!r} compares a cut model with its own full one, so it cannot "
            "judge repaired models: use nll, accuracy or similarity, or do not repair in between."
        )
    most = check_number(start, candidates, n_layers)
    removed: list[int] = []
    quality = start
    while len(removed) < most:
        kept = [index for index in range(len(stack)) if index not in removed]
        places = [place for place, index in enumerate(kept) if index in candidates]
        count = min(every, most - len(removed))
        made: list[Step] = []
        try:
            found = search_layers(quality, places, n_layers=count, on_step=made.append)
        except UnsupportedModelError as error:
            if tolerance is None or not removed:
                raise
            logger.info("%s", error)  # so many layers are all there are
            break
        grown = sorted([*removed, *(kept[place] for place in found)])
        healed, record = repaired(grown)
        quality = measured(LayerStack(healed, stack.paths[0]))
        change = quality.change_from(start)
        allowed = tolerance is None or change >= -tolerance
        logger.info("Repaired without %s: total change %+.4f", grown, change)
        if on_step:  # cuts are told when their repair has been judged: till then nothing is kept
            for step in made:
                told = _translated(step, kept, removed)
                on_step(told if allowed else {**told, "kept": False, "removed": removed})
            repair: Step = {"action": "repair", "method": record["method"], "kept": allowed}
            repair |= {"removed": grown if allowed else removed, "change": change}
            on_step({**repair, "samples": quality.size(), "loss": record["healed"]})
        if not allowed:
            break
        removed = grown
    return removed


def _translated(step: Step, kept: Sequence[int], removed: Sequence[int]) -> Step:
    """A step on a cut model, told in layers of the full one."""
    told = {**step, "removed": sorted([*removed, *(kept[i] for i in step["removed"])])}
    if "layer" in step:
        told["layer"] = kept[step["layer"]]
        told["tried"] = {str(kept[int(i)]): value for i, value in step["tried"].items()}
    for name in ("out", "in"):
        if name in step:
            told[name] = [kept[i] for i in step[name]]
    return told
