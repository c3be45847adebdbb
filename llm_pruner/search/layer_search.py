"""Searching for the layers to remove: cut after cut, then swaps until none improves.

Sets of layers are compared on growing subsets of the data, most of them only on the smallest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from statistics import median
from typing import Any

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
        on_step: called with every step as it is made, a dict of JSON values: ``action`` (``cut``
            or ``exchange``, a swap), ``removed`` (all layers removed after it), ``change``
            (relative, of all of them), ``samples`` (token sequences it was measured on), ``kept``,
            ``tried`` (for a cut, candidate -> change; for a swap, how many), and ``layer``, or
            ``out`` and ``in``.

    Returns:
        0-based indices, ascending. On all data never worse than before the swaps.

    Raises:
        InvalidPlanError: more layers are asked for than there are candidates.
        UnsupportedModelError: the architecture can do without none of the sets.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InvalidPlanError(f"tolerance={tolerance} must be a number from 0, e.g. 0.015.")
    search = LayerSearch(quality, candidates, on_step)
    most = check_number(quality, candidates, n_layers)
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
            "Cut %d of %s: layer %d, total change %+.4f on %d samples; %s",
            len(removed),
            most if tolerance is None else f"at most {most}",
            step["layer"],
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
) -> list[LayerSet]:
    """The best set found of 1, 2, ... `n_layers` layers, each grown from the one before.

    Swaps refine the set at every depth, so the sets need not be nested. The list ends where the
    architecture can do without no further layer.

    Raises:
        InvalidPlanError, UnsupportedModelError: see `search_layers`.
    """
    search = LayerSearch(quality, candidates, on_step)
    sets: list[LayerSet] = [()]
    for depth in range(1, check_number(quality, candidates, n_layers) + 1):
        try:
            grown, step = search.grow(sets[-1])
        except UnsupportedModelError as error:
            if depth == 1:
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
        on_step: see `search_layers`.
    """

    def __init__(
        self, quality: RemovalQuality, candidates: Sequence[int], on_step: OnStep | None = None
    ) -> None:
        self.quality, self.candidates, self._on_step = quality, list(candidates), on_step
        self._gains: dict[int, tuple[float, float]] = {}  # layer -> (sum of gains, weight)
        self._turn = 0

    def grow(self, removed: LayerSet) -> tuple[LayerSet, Step]:
        """`removed` plus the layer that costs least on top of it; of equals, the deeper one.

        Candidates are compared on growing subsets of the data, and the worse ones dropped
        (successive halving, Jamieson and Talwalkar, arXiv:1502.07943). A candidate is judged by
        its mean gain over this round and, with decreasing weight, earlier rounds, which looked at
        other data first. Only the better half by that is measured at all (lazy evaluation,
        Minoux 1978; a heuristic here, because the loss is not submodular). With too little data
        for subsets, every candidate is measured on all of it: the plain greedy step.

        Raises:
            UnsupportedModelError: no candidate can be removed.
        """
        quality = self.quality
        every, why = self._allowed((*removed, layer) for layer in self._remaining(removed))
        left = list(every)
        known = {layer: (DECAY * a, DECAY * b) for layer, (a, b) in self._gains.items()}
        subsets = self._subsets()
        if len(subsets) > 1 and len(known) > len(left):
            left.sort(key=lambda one: _mean(known.get(one[-1])), reverse=True)
            left = left[: max(WIDTHS[0], (len(left) + 1) // 2)]

        def merit(one: LayerSet) -> tuple[float, int]:
            return _mean(self._gains.get(one[-1])), one[-1]

        tried: dict[int, float] = {}
        subset = subsets[0]
        for width, subset in zip([*WIDTHS, 1], subsets, strict=False):
            grown_by = {one[-1]: tuple(sorted(one)) for one in left}
            label = f"Cut {len(removed) + 1}, {len(grown_by)} candidates"
            quality.measure([removed, *grown_by.values()], subset, label)
            base, size = quality.change(removed, subset), quality.size(subset)
            tried |= {layer: quality.change(one, subset) for layer, one in grown_by.items()}
            for layer in grown_by:
                total, weight = known.get(layer, (0.0, 0.0)) if len(subsets) > 1 else (0.0, 0.0)
                self._gains[layer] = (total + (tried[layer] - base) * size, weight + size)
            left.sort(key=merit, reverse=True)
            left = left[:width] if subset != subsets[-1] else left
            if len(left) == 1:
                break
        dropped = [one for one in every if one not in left]  # should the best be refused
        for one in [*left, *sorted(dropped, key=merit, reverse=True)]:
            grown = tuple(sorted(one))
            if not (why := quality.refusal(grown)):
                step: Step = {
                    "action": "cut",
                    "layer": one[-1],
                    "change": quality.change(grown, subset),
                    "samples": quality.size(subset),
                    "tried": {str(layer): change for layer, change in sorted(tried.items())},
                }
                return grown, step
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
            rivals = list(self._swaps(removed, size))
            few = size == 1 or len(rivals) <= MOST_PAIRS
            better = self._race(removed, rivals, subsets, errors) if few else None
            if better:
                step = self._swap(removed, better, len(rivals))
                if on_step:
                    on_step({**step, "removed": list(better)})
                else:
                    self.report(step, kept=True, removed=better)
                removed, stage, subsets = better, 0, self._subsets()
            else:
                stage += 1
        return removed

    def _swap(self, removed: LayerSet, better: LayerSet, tried: int) -> Step:
        out, back = sorted(set(removed) - set(better)), sorted(set(better) - set(removed))
        change = self.quality.change(better)
        logger.info("Removing %s instead of %s: total change %+.4f", back, out, change)
        return {
            "action": "exchange",
            "out": out,
            "in": back,
            "tried": tried,
            "change": change,
            "samples": self.quality.size(),
        }

    def report(self, step: Step, *, kept: bool, removed: Iterable[int]) -> None:
        """Pass a step on, with whether it is kept and which layers are removed after it."""
        step |= {"kept": kept, "removed": list(removed)}
        if self._on_step:
            self._on_step(step)

    def _race(
        self,
        champion: LayerSet,
        rivals: Iterable[LayerSet],
        subsets: Sequence[Subset],
        errors: float,
    ) -> LayerSet | None:
        """The best rival that can be removed, if it beats the champion on all data."""
        left, _ = self._allowed(rivals)
        while best := self._winner(champion, left, subsets, errors):
            if not self.quality.refusal(best):
                return best
            left.remove(best)
        return None

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

    def _swaps(self, removed: LayerSet, size: int) -> Iterator[LayerSet]:
        for out in combinations(removed, size):
            for back in combinations(self._remaining(removed), size):
                yield tuple(sorted({*removed, *back} - set(out)))

    def _remaining(self, removed: LayerSet) -> list[int]:
        return [layer for layer in self.candidates if layer not in removed]

    def _subsets(self) -> list[Subset]:
        self._turn += 1
        return self.quality.subsets(self._turn - 1)

    def _allowed(self, layer_sets: Iterable[LayerSet]) -> tuple[list[LayerSet], str]:
        """The sets that can be measured, and why one of the others cannot."""
        allowed, why = [], ""
        for removed in layer_sets:
            if obstacle := _obstacle(self.quality, removed):
                why = obstacle
            else:
                allowed.append(removed)
        return allowed, why


def check_number(quality: RemovalQuality, candidates: Sequence[int], n_layers: int | None) -> int:
    """`n_layers`, or the largest number of candidates that can be removed.

    Raises:
        InvalidPlanError: `n_layers` is no such number.
    """
    most = min(len(candidates), len(quality.stack) - 1)
    if n_layers is None:
        return most
    if type(n_layers) is not int or not 0 < n_layers <= most:
        raise InvalidPlanError(
            f"n_layers={n_layers} must be from 1 to {most}, the number of layers that may go: ask "
            "for fewer, or protect fewer."
        )
    return n_layers


def _obstacle(quality: RemovalQuality, removed: LayerSet) -> str:
    """Why a set cannot even be measured; empty if it can.

    Only models whose layers depend on one another are asked: there a bypass may fail. For all
    others only the winners are checked against the architecture, which is less work.
    """
    return "" if quality.can_bypass else quality.refusal(tuple(sorted(removed)))


def _mean(gains: tuple[float, float] | None) -> float:
    return gains[0] / gains[1] if gains and gains[1] else 0.0
