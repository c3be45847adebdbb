"""The two moves of a search for layers: one more cut, and a swap.

Sets of layers are compared on growing subsets of the data, most of them only on the smallest, and
where it is faster in reduced precision. What is decided on all data is decided in full precision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from ..engines.layer_sets import Fits, LayerSets
from ..errors import InvalidPlanError, UnsupportedModelError
from ..progress import duration
from ..utils import counted, logger
from .passes import LayerSet
from .removal_quality import RemovalQuality, Subset

WIDTHS = (8, 4, 2)  # candidates that stay in a round after each subset of the data
DECAY = 0.5  # weight per round of what earlier rounds have learned about a candidate
# Stages of refinement: how many layers are swapped at a time, and by how many standard errors a
# rival must be worse to be dropped.
STAGES = ((1, 1.0), (1, 3.0), (2, 3.0))
MOST_PAIRS = 1000  # swaps of two layers are tried where there are no more
LIKELY = 8  # swaps that promise most are tried before all others
RACE = 4  # token sequences on which swaps are compared, at least
ROUNDING = 5e-3  # of a change in reduced precision: rivals so close are compared in full
Step = dict[str, Any]
OnStep = Callable[[Step], None]


class LayerSearch:
    """One search: what it has learned about the candidates, and its two moves.

    Args:
        quality: measures the model without layers.
        candidates: 0-based layers that may be removed.
        on_step, fits, work: see `search_layers`.
        rough: measures the same on the same data, faster and less exactly: it drops what is
            clearly worse, and `quality` alone has the last word on swaps. `quality` itself if None.

    Attributes:
        sets: the sets of layers that may be removed.
        wanted: how many layers the result has to have; 0 if any number will do.
        best: the best set so far; it may have fewer layers than wanted.
        start: the set of lowest scores of a single pass; empty without scores.
    """

    def __init__(
        self,
        quality: RemovalQuality,
        candidates: Sequence[int],
        on_step: OnStep | None = None,
        fits: Fits | None = None,
        rough: RemovalQuality | None = None,
        work: float = math.inf,
    ) -> None:
        self.quality, self.rough, self._on_step = quality, rough or quality, on_step
        self.sets = LayerSets(len(quality.stack), candidates, fits)
        self.wanted = 0
        self.best: LayerSet = ()
        self.start: LayerSet = ()
        self._scores: Mapping[int, float] = {}
        self._work = work
        self._gains: dict[int, tuple[float, float]] = {}  # layer -> (sum of gains, weight)
        self._turn = 0
        self.begun, self._before = time.monotonic(), self._spent()

    def begin(self, scores: Mapping[int, float]) -> None:
        """Take the set of lowest scores for a first result, measured on a part of the data."""
        self._scores, found = scores, self.sets.cheapest(scores, self.wanted)
        if found is None or self.quality.refusal(found) or not self._allowed([found])[0]:
            return
        subset = self.rough.subsets()[0]
        step: Step = {"action": "start", "change": self.rough.change(found, subset)}
        step["samples"] = self.rough.size(subset)
        message = "First result: layers %s, total change %+.4f on %s"
        size = counted(step["samples"], "sequence")
        logger.info(message, list(found), step["change"], size)
        self.start = found
        self.report(step, kept=True, removed=found)

    def better_of(self, grown: LayerSet, other: LayerSet) -> LayerSet:
        """The better of two sets on all data; the first if the other is empty or as good."""
        if other in ((), grown) or self.rough.change(other) < self.rough.change(grown) - ROUNDING:
            return grown
        if self.quality.change(other) <= self.quality.change(grown):
            return grown
        self.best = other
        self.report(self._exchange(grown, other, 1), kept=True, removed=other)
        return other

    def stop(self, why: str) -> LayerSet:
        """End where the search stands: the best set so far, with as many layers as are wanted."""
        self.rough.deadline = self.quality.deadline = None
        cut = found = self.best
        if len(cut) < self.wanted:
            whole = self._completed(cut)
            if not whole:
                raise InvalidPlanError(
                    f"Search: {why} before {self.wanted} layers were found: allow more time."
                )
            few = self.rough.subsets()[0]
            self.rough.measure(whole, few)
            found = max(whole, key=lambda one: self.rough.change(one, few))
            why = f"{why} after {len(cut)} of {self.wanted} cuts; the best of {len(whole)} sets"
        logger.info("Search: %s.", why)
        known = not self.quality.work_for([found])
        judge, subset = (self.quality, None) if known else (self.rough, self.rough.subsets()[0])
        step: Step = {"action": "stop", "why": why, "change": judge.change(found, subset)}
        self.report(step | {"samples": judge.size(subset)}, kept=True, removed=found)
        return found

    def _completed(self, cut: LayerSet) -> list[LayerSet]:
        """Whole sets at hand: `cut` filled up by the scores or by what was measured, the first."""
        measured = {layer: -_mean(gains) for layer, gains in self._gains.items()}
        filled = [
            self.sets.cheapest(costs, self.wanted, must=cut)
            for costs in (self._scores, measured)
            if {*self.sets.candidates} <= costs.keys()
        ]
        sets = dict.fromkeys(one for one in (*filled, self.start) if one)
        return [one for one in sets if not self.quality.refusal(one)]

    def note(self) -> str:
        """How far the search has come, for the log."""
        said = [f"best so far {list(self.best)}"] if self.best else []
        running = {id(one): one.under_way for one in (self.quality, self.rough)}
        done = self._spent() - self._before + sum(running.values())
        left = self._expected() - done
        if done > 0 and left > 0:
            seconds = (time.monotonic() - self.begun) * left / done
            if self.quality.deadline is not None:
                seconds = min(seconds, self.quality.deadline - time.monotonic())
            said.append(f"about {duration(max(0.0, seconds))} left to the end of the search")
        return ", ".join(said)

    def _expected(self) -> float:
        """Multiply-adds that a search for the wanted number of layers takes, about; 0: unknown."""
        quality, count = self.rough, self.wanted
        shares = [quality.size(subset) / quality.size() for subset in quality.subsets()]
        return (
            quality.token_cost.of_search(
                len(self.sets.candidates), count, shares, replays=quality.stack.can_replay
            )
            * quality.tokens
        )

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
        quality, subsets = self.rough, self._subsets()
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
            if not (why := self.quality.refusal(sets[layer])):
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
        self.best = removed if on_step is None else self.best
        while stage < len(STAGES) and STAGES[stage][0] <= len(removed):
            if enough is not None and self.quality.change(removed) >= enough:
                break
            size, errors = STAGES[stage]
            if self._spent() > self._work:
                if on_step is None:
                    self.stop("swaps ended: more would cost more than plain greedy search")
                break
            rivals = list(self.sets.swaps(removed, size))
            better = None
            if size == 1 or len(rivals) <= MOST_PAIRS:
                better = self._best_swap(removed, rivals, errors)
            if not better:
                stage += 1
                continue
            step = self._exchange(removed, better, len(rivals))
            if on_step:
                on_step({**step, "removed": list(better)})
            else:
                self.best = better
                self.report(step, kept=True, removed=better)
            removed, stage = better, 0
        return removed

    def _spent(self) -> float:
        """Multiply-adds of all measurements."""
        other = 0.0 if self.rough is self.quality else self.rough.work
        return self.quality.work + other

    def _exchange(self, removed: LayerSet, better: LayerSet, tried: int) -> Step:
        out, back = sorted({*removed} - {*better}), sorted({*better} - {*removed})
        change = self.quality.change(better)
        logger.info("Removing %s instead of %s: total change %+.4f", back, out, change)
        step: Step = {"action": "exchange", "out": out, "in": back, "tried": tried}
        return step | {"change": change, "samples": self.quality.size()}

    def _best_swap(
        self, removed: LayerSet, rivals: Sequence[LayerSet], errors: float
    ) -> LayerSet | None:
        """The best swap, if it is better on all data; not all are tried where that is dear."""
        left, _ = self._allowed(rivals)
        race = self._race()
        single = bool(left) and len({*left[0]} - {*removed}) == 1
        dear = self._would_take(left, race) > self._work
        if (single or dear) and len(left) > 3 * LIKELY and self.quality.can_bypass:
            better, left = self._try_likely(removed, left, race)
            if better:
                return better
            while left and self._would_take(left, race) > self._work:
                left = left[: len(left) // 2]
        return self._improved(removed, left, errors, race)

    def _would_take(self, rivals: Sequence[LayerSet], race: Sequence[Subset]) -> float:
        """What will have been spent once these were measured on the first subset."""
        return self._spent() + self.rough.work_for(rivals, race[0])

    def _try_likely(
        self, removed: LayerSet, rivals: Sequence[LayerSet], race: Sequence[Subset]
    ) -> tuple[LayerSet | None, list[LayerSet]]:
        """A better set among the swaps that promise most, and those worth a try, the best first.

        The change of a swap is taken for the sum of those of its halves, of removing one layer
        less and of removing one more: one measurement per layer instead of one per swap. By
        how much this errs on the few that are tried says which others may still be better: those
        that promise more than the set itself less three times the typical error.
        """
        subset, change = race[0], self.rough.change
        halves = {layer: tuple(sorted({*removed} ^ {layer})) for layer in self.sets.candidates}
        self.rough.measure([removed, *halves.values()], subset, "Looking for swaps")
        bar = change(removed, subset)
        gains = {layer: change(half, subset) - bar for layer, half in halves.items()}
        promise = {one: sum(gains[layer] for layer in {*one} ^ {*removed}) for one in rivals}
        ordered = sorted(rivals, key=lambda one: (promise[one], one), reverse=True)
        likely = ordered[:LIKELY]
        better = self._improved(removed, likely, STAGES[1][1], race)
        errors = [change(one, subset) - bar - promise[one] for one in likely]
        margin = 3 * math.sqrt(sum(error**2 for error in errors) / len(errors))
        return better, [one for one in ordered if promise[one] + margin > 0]

    def _improved(
        self,
        champion: LayerSet,
        rivals: Iterable[LayerSet],
        errors: float,
        race: Sequence[Subset],
    ) -> LayerSet | None:
        """The best rival that the architecture allows, if it is better on all data."""
        left = list(rivals)
        while better := self._winner(champion, left, errors, race):
            if not self.quality.refusal(better):
                return better
            left.remove(better)
        return None

    def report(self, step: Step, *, kept: bool, removed: Iterable[int]) -> None:
        """Pass a step on, with whether it is kept and which layers are removed after it."""
        step |= {"kept": kept, "removed": list(removed)}
        if self._on_step:
            self._on_step(step)

    def _winner(
        self,
        champion: LayerSet,
        rivals: Sequence[LayerSet],
        errors: float,
        race: Sequence[Subset],
    ) -> LayerSet | None:
        quality, alive = self.rough, list(rivals)
        for subset in race:
            field = [champion, *alive]
            quality.measure(field, subset, f"Comparing {len(alive)} swaps")
            leader = max(field, key=lambda one: (quality.change(one, subset), one))
            gaps = {one: quality.gap(one, leader, subset) for one in alive if one != leader}
            typical = median(error for _, error in gaps.values()) if gaps else 0.0
            slack = 0.0 if quality is self.quality else ROUNDING
            alive = [
                one
                for one in alive
                if one == leader or gaps[one][0] + errors * max(gaps[one][1], typical) + slack > 0
            ]
        if quality is not self.quality:
            alive = sorted(alive, key=quality.change)[-2:]
            self.quality.measure([champion, *alive], label="Comparing the best in full precision")
        bar = self.quality.change(champion)
        better = [one for one in alive if self.quality.change(one) > bar]
        return max(better, key=lambda one: (self.quality.change(one), one), default=None)

    def _race(self) -> list[Subset]:
        """Subsets on which swaps are compared one after another: the smallest are left out."""
        subsets = self._subsets()
        return [one for one in subsets if self.quality.size(one) >= RACE] or subsets[-1:]

    def _subsets(self) -> list[Subset]:
        self._turn += 1
        return self.quality.subsets(self._turn - 1)

    def _allowed(self, layer_sets: Iterable[LayerSet]) -> tuple[list[LayerSet], str]:
        """The sets that can be measured, and why the last of the others cannot."""
        whys = {removed: obstacle(self.quality, removed) for removed in layer_sets}
        refusals = [why for why in whys.values() if why]
        return [removed for removed, why in whys.items() if not why], "".join(refusals[-1:])


def obstacle(quality: RemovalQuality, removed: LayerSet) -> str:
    """Why a set cannot even be measured; empty if it can.

    Only models whose layers depend on one another are asked: there a bypass may fail. For all
    others only the winners are checked against the architecture, which is less work.
    """
    return "" if quality.can_bypass else quality.refusal(removed)


def _mean(gains: tuple[float, float] | None) -> float:
    return gains[0] / gains[1] if gains and gains[1] else 0.0
