"""Searching for the layers to remove: cut after cut, then swaps until none improves.

Sets of layers are compared on growing subsets of the data, most of them only on the smallest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from ..engines.layer_sets import Fits, LayerSets
from ..errors import InvalidPlanError, UnsupportedModelError
from ..utils import logger
from .prefix_sharing import LayerSet
from .removal_quality import RemovalQuality, Subset

WIDTHS = (8, 4, 2)  # candidates that stay in a round after each subset of the data
DECAY = 0.5  # weight per round of what earlier rounds have learned about a candidate
# Stages of refinement: how many layers are swapped at a time, and by how many standard errors a
# rival must be worse to be dropped.
STAGES = ((1, 1.0), (1, 3.0), (2, 3.0))
MOST_PAIRS = 1000  # swaps of two layers are tried where there are no more
Step = dict[str, Any]
OnStep = Callable[[Step], None]


def single_removals(quality: RemovalQuality, layers: Sequence[int]) -> dict[int, float]:
    """Relative change of quality for each of `layers` removed alone, all measured in one run.

    Raises:
        UnsupportedModelError: the architecture cannot do without one of them.
    """
    layer_sets = [(layer,) for layer in layers]
    for removed in layer_sets:
        if why := _obstacle(quality, removed):
            raise UnsupportedModelError(f"Layer {removed[0]} has no score: {why}")
    quality.measure(layer_sets, label="Ablating layers")
    return {layer: quality.change([layer]) for layer in layers}


def search_layers(
    quality: RemovalQuality,
    candidates: Sequence[int],
    *,
    n_layers: int | None = None,
    tolerance: float | None = None,
    fits: Fits | None = None,
    on_step: OnStep | None = None,
) -> list[int]:
    """The layers whose removal costs least: a number of them, or as many as a loss allows.

    Layers are cut one by one, each chosen on top of those before (`LayerSearch.grow`), and swaps
    improve the set in the end (`LayerSearch.refine`). If a cut takes the total below
    ``-tolerance``, swaps first try to save it; if they fail, it is rolled back and the search ends
    (greater depths, which may be cheaper, are not tried).

    Args:
        quality: measures the model without layers.
        candidates: 0-based layers that may be removed.
        n_layers: how many to remove; as many as `tolerance` allows if None.
        tolerance: largest relative loss allowed in total (0.015: 1.5 %); None for no limit.
        fits: restricts the sets that may be removed, see `LayerSets`; a cut may then take several
            layers at once.
        on_step: called with every step as it is made, a dict of JSON values: ``action`` (``cut``
            or ``exchange``, a swap), ``removed`` (all layers removed after it), ``change``
            (relative, of all of them), ``samples`` (token sequences it was measured on), ``kept``,
            ``tried`` (for a cut, candidate -> change; for a swap, how many), and ``layer``
            (``layers`` where a cut takes several), or ``out`` and ``in``.

    Returns:
        0-based indices, ascending. On all data never worse than before the swaps.

    Raises:
        InvalidPlanError: more layers are asked for than there are candidates.
        UnsupportedModelError: the architecture can do without none of the sets.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InvalidPlanError(f"tolerance={tolerance} must be a number from 0, e.g. 0.015.")
    search = LayerSearch(quality, candidates, on_step, fits)
    most = check_number(search.sets, n_layers)
    begin = time.monotonic()
    removed: LayerSet = ()
    while len(removed) < most:
        try:
            grown, step = search.grow(removed)
        except UnsupportedModelError as error:
            if tolerance is None or not removed:
                raise
            logger.info("%s", error)  # no more layers can be removed
            break
        swaps: list[Step] = []
        kept, after = True, grown
        if tolerance is not None:
            step |= {"change": quality.change(grown), "samples": quality.size()}
            if step["change"] < -tolerance:
                after = search.refine(grown, enough=-tolerance, on_step=swaps.append)
                kept = quality.change(after) >= -tolerance
        for one in (step, *swaps):
            done = one.get("removed", grown)
            search.report(one, kept=kept, removed=done if kept else removed)
        if not kept:
            break
        removed = after
        each = (time.monotonic() - begin) / len(removed)
        logger.info(
            "Cut %d of %s: %s, total change %+.4f on %d samples; %s",
            len(removed),
            most if tolerance is None else f"at most {most}",
            f"layer {step['layer']}" if "layer" in step else f"layers {step['layers']}",
            quality.change(removed) if swaps else step["change"],
            step["samples"],
            f"about {each * (most - len(removed)):.0f} s to the last cut, then swaps",
        )
    return list(search.refine(removed))


def depth_curve(
    quality: RemovalQuality,
    candidates: Sequence[int],
    n_layers: int,
    on_step: OnStep | None = None,
    fits: Fits | None = None,
) -> list[LayerSet]:
    """The best set found of 1, 2, ... `n_layers` layers, each grown from the one before.

    Swaps refine the set at every depth, so the sets need not be nested. The list ends where the
    architecture can do without no further layer; with `fits` it has only the numbers of layers
    that can be removed.

    Raises:
        InvalidPlanError, UnsupportedModelError: see `search_layers`.
    """
    search = LayerSearch(quality, candidates, on_step, fits)
    most = check_number(search.sets, n_layers)
    sets: list[LayerSet] = [()]
    for depth in (size for size in search.sets.sizes if size <= most):
        try:
            grown, step = search.grow(sets[-1])
        except UnsupportedModelError as error:
            if sets == [()]:
                raise
            logger.warning("The curve ends before %d layers. %s", depth, error)
            break
        search.report(step, kept=True, removed=grown)
        sets.append(search.refine(grown))
        logger.info(
            "%d of %d layers: %s, total change %+.4f",
            depth,
            n_layers,
            list(sets[-1]),
            quality.change(sets[-1]),
        )
    return sets[1:]


class LayerSearch:
    """One search: what it has learned about the candidates, and its two moves.

    Args:
        quality: measures the model without layers.
        candidates: 0-based layers that may be removed.
        on_step, fits: see `search_layers`.

    Attributes:
        sets: the sets of layers that may be removed.
    """

    def __init__(
        self,
        quality: RemovalQuality,
        candidates: Sequence[int],
        on_step: OnStep | None = None,
        fits: Fits | None = None,
    ) -> None:
        self.quality, self._on_step = quality, on_step
        self.sets = LayerSets(len(quality.stack), candidates, fits)
        self._gains: dict[int, tuple[float, float]] = {}  # layer -> (sum of gains, weight)
        self._turn = 0

    def grow(self, removed: LayerSet) -> tuple[LayerSet, Step]:
        """`removed` plus the layer that costs least on top of it; of equals, the deeper one.

        Candidates are compared on growing subsets of the data, and the worse ones dropped
        (successive halving, Jamieson and Talwalkar, arXiv:1502.07943). A candidate is judged by
        its mean gain over this round and, with decreasing weight, earlier rounds, which looked at
        other data first. Only the better half by that is measured at all (lazy evaluation,
        Minoux 1978; a heuristic here, because the loss is not submodular). With too little data
        for subsets, every candidate is measured on all of it: the plain greedy step. Where not
        every set may be removed, a candidate takes others with it (`LayerSets.grown`).

        Raises:
            UnsupportedModelError: no candidate can be removed.
        """
        quality, subsets = self.quality, self._subsets()
        sets = self.sets.grown(removed)
        allowed, why = self._allowed(sets.values())
        every = [layer for layer, one in sets.items() if one in allowed]
        left = list(every)
        past = self._gains if len(subsets) > 1 else {}
        known = {layer: (DECAY * a, DECAY * b) for layer, (a, b) in past.items()}
        if len(known) > len(left):
            left.sort(key=lambda layer: _mean(known.get(layer)), reverse=True)
            left = left[: max(WIDTHS[0], (len(left) + 1) // 2)]

        def merit(layer: int) -> tuple[float, int]:
            return _mean(self._gains.get(layer)), layer

        tried: dict[int, float] = {}
        subset = subsets[0]
        for width, subset in zip([*WIDTHS, 1], subsets, strict=False):
            label = f"Cut {len(removed) + 1}, {len(left)} candidates"
            quality.measure([removed, *(sets[layer] for layer in left)], subset, label)
            base, size = quality.change(removed, subset), quality.size(subset)
            for layer in left:
                tried[layer] = quality.change(sets[layer], subset)
                total, weight = known.get(layer, (0.0, 0.0))
                self._gains[layer] = (total + (tried[layer] - base) * size, weight + size)
            left.sort(key=merit, reverse=True)
            left = left[:width] if subset != subsets[-1] else left
            if len(left) == 1:
                break
        dropped = [layer for layer in every if layer not in left]  # should the best be refused
        for layer in [*left, *sorted(dropped, key=merit, reverse=True)]:
            if not (why := quality.refusal(sets[layer])):
                new = sorted({*sets[layer]} - {*removed})
                return sets[layer], {
                    "action": "cut",
                    **({"layer": layer} if len(new) == 1 else {"layers": new}),
                    "change": quality.change(sets[layer], subset),
                    "samples": quality.size(subset),
                    "tried": {str(layer): change for layer, change in sorted(tried.items())},
                }
        raise UnsupportedModelError(f"No further layer can be removed with {list(removed)}: {why}")

    def refine(
        self, removed: LayerSet, enough: float | None = None, on_step: OnStep | None = None
    ) -> LayerSet:
        """`removed` after swaps of layers, each better on all data, until none is.

        First a removed layer is swapped for one that stays; then two for two, where there are at
        most 1,000 such swaps. On the way from little data to all of it, rivals that are worse than
        the leader by a number of standard errors of the paired difference (of the typical one if
        that is larger) are dropped: by one as long as that finds improvements, by three before the
        search concludes that there are none. With too little data for subsets none is dropped.

        Args:
            removed: the set to improve.
            enough: stop when the change reaches this.
            on_step: called with every swap; `search_layers`' own listener if None.
        """
        stage = 0
        subsets = self._subsets()
        while stage < len(STAGES) and STAGES[stage][0] <= len(removed):
            if enough is not None and self.quality.change(removed) >= enough:
                break
            size, errors = STAGES[stage]
            rivals = list(self.sets.swaps(removed, size))
            better = None
            if size == 1 or len(rivals) <= MOST_PAIRS:
                left, _ = self._allowed(rivals)
                while (better := self._winner(removed, left, subsets, errors)) and (
                    self.quality.refusal(better)
                ):
                    left.remove(better)
            if not better:
                stage += 1
                continue
            out, back = sorted({*removed} - {*better}), sorted({*better} - {*removed})
            change = self.quality.change(better)
            logger.info("Removing %s instead of %s: total change %+.4f", back, out, change)
            step: Step = {"action": "exchange", "out": out, "in": back, "tried": len(rivals)}
            step |= {"change": change, "samples": self.quality.size()}
            if on_step:
                on_step({**step, "removed": list(better)})
            else:
                self.report(step, kept=True, removed=better)
            removed, stage, subsets = better, 0, self._subsets()
        return removed

    def report(self, step: Step, *, kept: bool, removed: Iterable[int]) -> None:
        """Pass a step on, with whether it is kept and which layers are removed after it."""
        step |= {"kept": kept, "removed": list(removed)}
        if self._on_step:
            self._on_step(step)

    def _winner(
        self,
        champion: LayerSet,
        rivals: Sequence[LayerSet],
        subsets: Sequence[Subset],
        errors: float,
    ) -> LayerSet | None:
        quality, alive = self.quality, list(rivals)
        for subset in subsets:
            field = [champion, *alive]
            quality.measure(field, subset, f"Comparing {len(alive)} swaps")
            leader = max(field, key=lambda one: (quality.change(one, subset), one))
            gaps = {one: quality.gap(one, leader, subset) for one in alive if one != leader}
            typical = median(error for _, error in gaps.values()) if gaps else 0.0
            alive = [
                one
                for one in alive
                if one == leader or gaps[one][0] + errors * max(gaps[one][1], typical) > 0
            ]
        bar = quality.change(champion)
        better = [one for one in alive if quality.change(one) > bar]
        return max(better, key=lambda one: (quality.change(one), one), default=None)

    def _subsets(self) -> list[Subset]:
        self._turn += 1
        return self.quality.subsets(self._turn - 1)

    def _allowed(self, layer_sets: Iterable[LayerSet]) -> tuple[list[LayerSet], str]:
        """The sets that can be measured, and why the last of the others cannot."""
        whys = {removed: _obstacle(self.quality, removed) for removed in layer_sets}
        refusals = [why for why in whys.values() if why]
        return [removed for removed, why in whys.items() if not why], "".join(refusals[-1:])


def check_number(sets: LayerSets, n_layers: int | None) -> int:
    """`n_layers`, or the largest number of layers that can be removed.

    Raises:
        InvalidPlanError: `n_layers` is no such number.
    """
    if n_layers is None:
        return sets.sizes[-1] if sets.sizes else 0
    if type(n_layers) is not int or n_layers not in sets.sizes:
        raise InvalidPlanError(
            f"n_layers={n_layers} must be {sets.sizes_text}, as many as may go: ask for another "
            "number, or protect fewer."
        )
    return n_layers


def _obstacle(quality: RemovalQuality, removed: LayerSet) -> str:
    """Why a set cannot even be measured; empty if it can.

    Only models whose layers depend on one another are asked: there a bypass may fail. For all
    others only the winners are checked against the architecture, which is less work.
    """
    return "" if quality.can_bypass else quality.refusal(removed)


def _mean(gains: tuple[float, float] | None) -> float:
    return gains[0] / gains[1] if gains and gains[1] else 0.0
