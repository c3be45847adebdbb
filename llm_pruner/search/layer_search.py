"""Searching for the layers to remove: cut after cut, then swaps until none improves."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from ..engines.layer_sets import Fits, LayerSets
from ..errors import InvalidPlanError, UnsupportedModelError
from ..progress import duration, job
from ..utils import counted, logger
from .moves import LayerSearch, OnStep, Step, obstacle
from .passes import LayerSet
from .removal_quality import RemovalQuality, TimeIsUp


def single_removals(quality: RemovalQuality, layers: Sequence[int]) -> dict[int, float]:
    """Relative change of quality for each of `layers` removed alone, all measured in one run.

    Raises:
        UnsupportedModelError: the architecture cannot do without one of them.
    """
    layer_sets = [(layer,) for layer in layers]
    for removed in layer_sets:
        if why := obstacle(quality, removed):
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
    rough: RemovalQuality | None = None,
    scores: Mapping[int, float] | None = None,
    work: float = math.inf,
) -> list[int]:
    """The layers whose removal costs least: a number of them, or as many as a loss allows.

    Layers are cut one by one, each chosen on top of those before (`LayerSearch.grow`), and swaps
    improve the set in the end (`LayerSearch.refine`). If a cut takes the total below
    ``-tolerance``, swaps first try to save it; if they fail, it is rolled back and the search ends
    (greater depths, which may be cheaper, are not tried).

    When the deadline of `quality` has come, the search ends with the best set so far. One that has
    fewer than `n_layers` is filled up by `scores` or by what the layers have cost alone, whichever
    is better on a little data, unless the set of lowest scores is better still.

    Args:
        quality: measures the model without layers.
        candidates: 0-based layers that may be removed.
        n_layers: how many to remove; as many as `tolerance` allows if None.
        tolerance: largest relative loss allowed in total (0.015: 1.5 %); None for no limit.
        fits: restricts the sets that may be removed, see `LayerSets`; a cut may then take several
            layers at once.
        on_step: called with every step as it is made, a dict of JSON values: ``action``
            (``start``: the set of lowest `scores`; ``cut``; ``exchange``, a swap; ``stop``, with
            ``why``, where time or work ended the search), ``removed`` (all layers removed after
            it), ``change`` (relative, of all of them), ``samples`` (token sequences it was
            measured on), ``kept``, ``tried`` (for a cut, candidate -> change; for a swap, how
            many), and ``layer`` (``layers`` where a cut takes several), or ``out`` and ``in``.
        rough: measures the same faster and less exactly, see `LayerSearch`.
        scores: of candidates, the lower the cheaper their removal, from a single pass. With
            `n_layers`, the set of lowest scores is the first result and a rival of the cuts.
        work: multiply-adds after which no more swaps are looked for, of `quality` and `rough`.

    Returns:
        0-based indices, ascending. On all data never worse than before the swaps.

    Raises:
        InvalidPlanError: more layers are asked for than there are candidates.
        UnsupportedModelError: the architecture can do without none of the sets.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InvalidPlanError(f"tolerance={tolerance} must be a number from 0, e.g. 0.015.")
    search = LayerSearch(quality, candidates, on_step, fits, rough, work)
    most = check_number(search.sets, n_layers)
    search.wanted = most if tolerance is None else 0
    with job(search.note):
        try:
            if scores and search.wanted:
                search.begin(scores)
            removed = _cut(search, most, tolerance)
            if search.wanted:
                removed = search.better_of(removed, search.start)
            return list(search.refine(removed))
        except TimeIsUp:
            return list(search.stop("the time is up"))


def _cut(search: LayerSearch, most: int, tolerance: float | None) -> LayerSet:
    """Cut after cut, `most` layers or as many as the tolerance allows."""
    quality = search.quality
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
        removed = search.best = after
        logger.info(
            "Cut %d of %s: %s, total change %+.4f on %s; %s so far",
            len(removed),
            most if tolerance is None else f"at most {most}",
            f"layer {step['layer']}" if "layer" in step else f"layers {step['layers']}",
            quality.change(removed) if swaps else step["change"],
            counted(step["samples"], "sequence"),
            duration(time.monotonic() - search.begun),
        )
    return removed


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
