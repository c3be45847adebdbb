"""Searching for the layers to remove: cut after cut, then exchanges until none improves.

Sets of layers are compared on growing shares of the samples, most of them on few.
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
from .prefix_sharing import Mask
from .removal_quality import RemovalQuality, Share

WIDTHS = (8, 4, 2)  # candidates that stay in a round after each share of the samples
DECAY = 0.5  # weight of what earlier rounds found about a candidate, per round
# Exchanges: layers at a time, and by how many standard errors worse ones are no longer pursued.
STAGES = ((1, 1.0), (1, 3.0), (2, 3.0))
MOST_PAIRS = 1000  # exchanges of two layers are tried where there are no more
Step = dict[str, Any]
OnStep = Callable[[Step], None]


def single_removals(quality: RemovalQuality, layers: Sequence[int]) -> dict[int, float]:
    """Relative change of quality for each of `layers` removed alone, all in one sweep.

    Raises:
        UnsupportedModelError: the architecture cannot do without one of them.
    """
    masks = [(layer,) for layer in layers]
    for mask in masks:
        if why := _hindrance(quality, mask):
            raise UnsupportedModelError(f"Layer {mask[0]} has no score: {why}")
    quality.measure(masks, label="Ablating layers")
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

    Layers are cut one by one, each chosen on top of those before (`LayerSearch.grow`), and the
    set is improved by exchanges in the end (`LayerSearch.refine`). A cut that takes the total
    below ``-tolerance`` is first tried to save by exchanges; if that fails it is rolled back and
    ends the search (greater depths, which may be cheaper, are not looked at).

    Args:
        quality: measures the model without layers.
        candidates: 0-based layers that may go.
        n_layers: how many; as many as `tolerance` allows if None.
        tolerance: largest relative loss allowed in total (0.015: 1.5 %); None for no limit.
        on_step: called with every step as it is made, a dict of JSON values: ``action`` (``cut``
            or ``exchange``), ``removed`` (all layers gone after it), ``change`` (relative, of
            all of them), ``samples`` (how many it was measured on), ``kept``, ``tried``
            (for a cut, candidate -> change; for an exchange, how many), and ``layer`` or
            ``out`` and ``in``.

    Returns:
        0-based indices, ascending. Never worse on all samples than before the exchanges.

    Raises:
        InvalidPlanError: more layers are asked for than there are candidates.
        UnsupportedModelError: the architecture can do without none of the sets.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InvalidPlanError(f"tolerance={tolerance} must be a number from 0, e.g. 0.015.")
    search = LayerSearch(quality, candidates, on_step)
    most = check_number(quality, candidates, n_layers)
    begin = time.monotonic()
    removed: Mask = ()
    while len(removed) < most:
        try:
            grown, step = search.grow(removed)
        except UnsupportedModelError as error:
            if tolerance is None or not removed:
                raise
            logger.info("%s", error)  # so many layers are all there are
            break
        exchanges: list[Step] = []
        kept, after = True, grown
        if tolerance is not None:
            step |= {"change": quality.change(grown), "samples": quality.samples()}
            if step["change"] < -tolerance:
                after = search.refine(grown, enough=-tolerance, on_step=exchanges.append)
                kept = quality.change(after) >= -tolerance
        for told in (step, *exchanges):
            done = told.get("removed", grown)
            search.tell(told, kept=kept, removed=done if kept else removed)
        if not kept:
            break
        removed = after
        each = (time.monotonic() - begin) / len(removed)
        logger.info(
            "Cut %d of %s: layer %d, total change %+.4f on %d samples; %s",
            len(removed),
            most if tolerance is None else f"at most {most}",
            step["layer"],
            quality.change(removed) if exchanges else step["change"],
            step["samples"],
            f"about {each * (most - len(removed)):.0f} s to the last cut, exchanges then",
        )
    return list(search.refine(removed))


def depth_curve(
    quality: RemovalQuality,
    candidates: Sequence[int],
    n_layers: int,
    on_step: OnStep | None = None,
) -> list[Mask]:
    """The best set found of 1, 2, ... `n_layers` layers, each grown from the one before.

    Every depth is refined by exchanges, so the sets need not be nested. Where the architecture can
    do without no further layer, the list ends.

    Raises:
        InvalidPlanError, UnsupportedModelError: see `search_layers`.
    """
    search = LayerSearch(quality, candidates, on_step)
    sets: list[Mask] = [()]
    for depth in range(1, check_number(quality, candidates, n_layers) + 1):
        try:
            grown, step = search.grow(sets[-1])
        except UnsupportedModelError as error:
            if depth == 1:
                raise
            logger.warning("The curve ends before %d layers. %s", depth, error)
            break
        search.tell(step, kept=True, removed=grown)
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
        candidates: 0-based layers that may go.
        on_step: see `search_layers`.
    """

    def __init__(
        self, quality: RemovalQuality, candidates: Sequence[int], on_step: OnStep | None = None
    ) -> None:
        self.quality, self.candidates, self._on_step = quality, list(candidates), on_step
        self._found: dict[int, tuple[float, float]] = {}  # layer -> (sum of gains, samples)
        self._turn = 0

    def grow(self, removed: Mask) -> tuple[Mask, Step]:
        """`removed` with the layer added whose removal on top costs least; of equals the deeper.

        Candidates are compared on growing shares of the samples and the worse ones left out
        (successive halving, Jamieson and Talwalkar, arXiv:1502.07943). What is known of a
        candidate is its mean gain over the samples of this round and, with decreasing weight,
        of the rounds before, which lay on other samples; only the better half by that is
        measured at all (lazy evaluation, Minoux 1978: a heuristic here, since the loss is not
        submodular). Where there are too few samples to share out, every candidate is measured
        on all of them, which is the plain greedy step.

        Raises:
            UnsupportedModelError: no candidate can go.
        """
        quality = self.quality
        every, why = self._allowed((*removed, layer) for layer in self._left(removed))
        left = list(every)
        known = {layer: (DECAY * a, DECAY * b) for layer, (a, b) in self._found.items()}
        shares = self._shares()
        if len(shares) > 1 and len(known) > len(left):
            left.sort(key=lambda mask: _mean(known.get(mask[-1])), reverse=True)
            left = left[: max(WIDTHS[0], (len(left) + 1) // 2)]
        tried: dict[int, float] = {}
        share = shares[0]
        for width, share in zip([*WIDTHS, 1], shares, strict=False):
            masks = {mask[-1]: tuple(sorted(mask)) for mask in left}
            label = f"Cut {len(removed) + 1}, {len(masks)} candidates"
            quality.measure([removed, *masks.values()], share, label)
            base, samples = quality.change(removed, share), quality.samples(share)
            tried |= {layer: quality.change(mask, share) for layer, mask in masks.items()}
            for layer in masks:
                total, weight = known.get(layer, (0.0, 0.0)) if len(shares) > 1 else (0.0, 0.0)
                gain = (tried[layer] - base) * samples
                self._found[layer] = (total + gain, weight + samples)
            left.sort(key=lambda mask: (_mean(self._found[mask[-1]]), mask[-1]), reverse=True)
            left = left[:width] if share != shares[-1] else left
            if len(left) == 1:
                break
        rest = [mask for mask in every if mask not in left]  # should the best be refused
        rest.sort(key=lambda mask: (_mean(self._found.get(mask[-1])), mask[-1]), reverse=True)
        for mask in [*left, *rest]:
            grown = tuple(sorted(mask))
            if not (why := quality.refusal(grown)):
                best: Step = {
                    "action": "cut",
                    "layer": mask[-1],
                    "change": quality.change(grown, share),
                    "samples": quality.samples(share),
                    "tried": {str(layer): change for layer, change in sorted(tried.items())},
                }
                return grown, best
        raise UnsupportedModelError(f"No further layer can be removed with {list(removed)}: {why}")

    def refine(
        self, removed: Mask, enough: float | None = None, on_step: OnStep | None = None
    ) -> Mask:
        """`removed` after exchanges of layers, each of them better on all samples, until none is.

        One removed layer against one that stays; then two against two, where there are at most
        1,000 such exchanges. On the way from few samples to all, rivals are left out when they
        are worse than the leader by a number of standard errors of the paired difference (of the
        typical one if that is larger): by one as long as that finds improvements, by three
        before it is said that there are none. With too few samples to share out none is left out.

        Args:
            removed: the set to improve.
            enough: stop when the change reaches this.
            on_step: told the exchanges; the search's own listener if None.
        """
        stage = 0
        shares = self._shares()
        while stage < len(STAGES) and STAGES[stage][0] <= len(removed):
            if enough is not None and self.quality.change(removed) >= enough:
                break
            size, errors = STAGES[stage]
            rivals = list(self._exchanges(removed, size))
            few = size == 1 or len(rivals) <= MOST_PAIRS
            better = self._race(removed, rivals, shares, errors) if few else None
            if better:
                step = self._exchange(removed, better, len(rivals))
                if on_step:
                    on_step({**step, "removed": list(better)})
                else:
                    self.tell(step, kept=True, removed=better)
                removed, stage, shares = better, 0, self._shares()
            else:
                stage += 1
        return removed

    def _exchange(self, removed: Mask, better: Mask, tried: int) -> Step:
        out, back = sorted(set(removed) - set(better)), sorted(set(better) - set(removed))
        change = self.quality.change(better)
        logger.info("Removing %s instead of %s: total change %+.4f", back, out, change)
        return {
            "action": "exchange",
            "out": out,
            "in": back,
            "tried": tried,
            "change": change,
            "samples": self.quality.samples(),
        }

    def tell(self, step: Step, **more: Any) -> None:
        """Report a step with what was found out since."""
        step |= more
        step["removed"] = list(step["removed"])
        if self._on_step:
            self._on_step(step)

    def _race(
        self, champion: Mask, rivals: Iterable[Mask], shares: Sequence[Share], errors: float
    ) -> Mask | None:
        """The best of the rivals that can go, if it is better than the champion on all samples."""
        left, _ = self._allowed(rivals)
        while best := self._fastest(champion, left, shares, errors):
            if not self.quality.refusal(best):
                return best
            left.remove(best)
        return None

    def _fastest(
        self, champion: Mask, rivals: Sequence[Mask], shares: Sequence[Share], errors: float
    ) -> Mask | None:
        quality, alive = self.quality, list(rivals)
        for share in shares:
            quality.measure([champion, *alive], share, f"Comparing {len(alive)} exchanges")
            field = [champion, *alive]
            leader = max(field, key=lambda mask: (quality.change(mask, share), mask))
            gaps = {mask: quality.gap(mask, leader, share) for mask in alive if mask != leader}
            typical = median(error for _, error in gaps.values()) if gaps else 0.0
            alive = [
                mask
                for mask in alive
                if mask == leader or gaps[mask][0] + errors * max(gaps[mask][1], typical) > 0
            ]
        bar = quality.change(champion)
        better = [mask for mask in alive if quality.change(mask) > bar]
        return max(better, key=lambda mask: (quality.change(mask), mask), default=None)

    def _exchanges(self, removed: Mask, size: int) -> Iterator[Mask]:
        for out in combinations(removed, size):
            for back in combinations(self._left(removed), size):
                yield tuple(sorted({*removed, *back} - set(out)))

    def _left(self, removed: Mask) -> list[int]:
        return [layer for layer in self.candidates if layer not in removed]

    def _shares(self) -> list[Share]:
        self._turn += 1
        return self.quality.ladder(self._turn - 1)

    def _allowed(self, masks: Iterable[Mask]) -> tuple[list[Mask], str]:
        """Those of the masks that can be measured, and why one of the others cannot."""
        allowed, why = [], ""
        for mask in masks:
            if found := _hindrance(self.quality, mask):
                why = found
            else:
                allowed.append(mask)
        return allowed, why


def check_number(quality: RemovalQuality, candidates: Sequence[int], n_layers: int | None) -> int:
    """`n_layers`, or the largest number of candidates that can go.

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


def _hindrance(quality: RemovalQuality, mask: Mask) -> str:
    """Why a mask cannot even be measured; empty if it can.

    Asked only of models whose layers depend on one another: there a bypass may fail. For all
    others the architecture is asked about the winners alone, which is less work.
    """
    return "" if quality.can_bypass else quality.refusal(tuple(sorted(mask)))


def _mean(found: tuple[float, float] | None) -> float:
    return found[0] / found[1] if found and found[1] else 0.0
