"""The sets of layers that may be removed, where not every set may be.

A serving engine may demand of every kept layer that it fits its new position. Whether there is such
a set, and which is the cheapest, is found exactly, layer by layer (dynamic programming over how
many layers are kept so far).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations

LayerSet = tuple[int, ...]
Fits = Callable[[int, int, int], bool]  # of a layer, its new position, and how many are kept
MOST_TRIED = 100_000  # swaps that are looked at one by one


class LayerSets:
    """Sets of layers that may be removed from a model.

    Args:
        num_layers: the model's depth.
        candidates: 0-based layers that may be removed.
        fits: whether a layer may be kept, from its index, its new position and the number of
            layers kept. Every set may be removed without.
        runs: only layers that follow one another may be removed.
    """

    def __init__(
        self,
        num_layers: int,
        candidates: Sequence[int],
        fits: Fits | None = None,
        *,
        runs: bool = False,
    ) -> None:
        self.num_layers, self.candidates, self.runs = num_layers, list(candidates), runs
        self.fits = fits

    def allows(self, removed: Collection[int]) -> bool:
        """Whether the set may be removed, candidates or not."""
        if self.runs and removed and max(removed) - min(removed) >= len(removed):
            return False
        if self.fits is None:
            return True
        kept = [index for index in range(self.num_layers) if index not in removed]
        return all(self.fits(index, place, len(kept)) for place, index in enumerate(kept))

    @cached_property
    def sizes(self) -> list[int]:
        """How many layers can be removed, ascending; 0 is not among them."""
        most = min(len(self.candidates), self.num_layers - 1)
        if self.fits is None:
            return list(range(1, most + 1))
        if self.runs:
            return [n for n in range(1, most + 1) if any(map(self.allows, self.of_size(n)))]
        return [size for size in range(1, most + 1) if self._exists(size)]

    @property
    def sizes_text(self) -> str:
        """How many layers can be removed, in words: ``from 1 to 8``, ``one of 1, 6, 7, 12``."""
        sizes = self.sizes
        if not sizes:
            return "a number that does not exist"
        if len(sizes) == 1:
            return str(sizes[0])
        if sizes == list(range(sizes[0], sizes[-1] + 1)):
            return f"from {sizes[0]} to {sizes[-1]}"
        return f"one of {', '.join(map(str, sizes))}"

    def _exists(self, size: int) -> bool:
        """Whether `size` candidates can be removed."""
        count = self.num_layers - size
        places = {0}  # how many layers may be kept so far
        for index in range(self.num_layers):
            stays = (p for p in places if p < count and self._may(index, p, count))
            kept = {place + 1 for place in stays}
            places = kept | places if index in self.candidates else kept
        return count in places

    def _may(self, index: int, place: int, count: int) -> bool:
        return self.fits is None or self.fits(index, place, count)

    def of_size(self, size: int) -> Iterator[range]:
        """The runs of `size` candidates that follow one another, whether allowed or not."""
        for start in self.candidates:
            run = range(start, start + size)
            if run[-1] in self.candidates:
                yield run

    def cheapest(
        self,
        costs: Mapping[int, float],
        size: int,
        *,
        must: Collection[int] = (),
        never: Collection[int] = (),
    ) -> LayerSet | None:
        """The allowed set of `size` candidates with the smallest sum of costs; None without any.

        Of equal sums the one with the deeper layers.

        Args:
            costs: of each layer; 0 for those that are missing.
            size: how many layers it has.
            must: layers that are in it.
            never: layers that are not.
        """
        if self.runs:
            runs = [run for run in self.of_size(size) if self.allows(run)]
            fitting = [r for r in runs if {*must} <= {*r} and not {*never} & {*r}]
            key = min(
                fitting, key=lambda r: (sum(costs.get(i, 0.0) for i in r), -r.start), default=None
            )
            return None if key is None else tuple(key)
        count = self.num_layers - size
        removable = {*self.candidates} - {*never}
        # By how many layers are kept so far: the costs of what is removed, and the choice made.
        best: dict[int, tuple[float, int, LayerSet]] = {0: (0.0, 0, ())}
        for index in range(self.num_layers):
            found: dict[int, tuple[float, int, LayerSet]] = {}
            for place, (cost, depth, removed) in best.items():
                ways = []
                if index in removable and len(removed) < size:
                    more = cost + costs.get(index, 0.0), depth - index, (*removed, index)
                    ways.append((place, more))
                if index not in must and place < count and self._may(index, place, count):
                    ways.append((place + 1, (cost, depth, removed)))
                for new, way in ways:
                    if new not in found or way < found[new]:
                        found[new] = way
            best = found
        return best[count][2] if count in best else None

    def grown(self, removed: LayerSet) -> dict[int, LayerSet]:
        """For each further candidate, the set of the next allowed size that it is removed in.

        Where every set may be removed that is `removed` and the layer. Elsewhere it is the set
        with what is removed and the layer in it, if there is one, or with the layer alone, and
        the other layers next to it.
        """
        left = [layer for layer in self.candidates if layer not in removed]
        if self.fits is None:
            return {layer: tuple(sorted((*removed, layer))) for layer in left}
        found: dict[int, LayerSet] = {}
        size = next((size for size in self.sizes if size > len(removed)), 0)
        for layer in left if size else ():
            near = {other: float(abs(other - layer)) for other in self.candidates}
            grown = self.cheapest(near, size, must={*removed, layer})
            near |= dict.fromkeys(removed, 0.0)
            grown = grown or self.cheapest(near, size, must={layer})
            if grown is not None and grown not in found.values():
                found[layer] = grown
        return found

    def swaps(self, removed: LayerSet, size: int) -> Iterator[LayerSet]:
        """Allowed sets in which `size` layers are swapped for others.

        With `fits`, among the single swaps are also the sets nearest to `removed` without one of
        its layers, or with one more, whatever else has to change.
        """
        stay = [layer for layer in self.candidates if layer not in removed]
        pairs = (
            tuple(sorted({*removed, *back} - set(out)))
            for out in combinations(removed, size)
            for back in combinations(stay, size)
        )
        if self.fits is None:
            yield from pairs
            return
        seen = {removed}
        for number, other in enumerate(pairs):
            if number >= MOST_TRIED:
                break
            if self.allows(other) and other not in seen:
                seen.add(other)
                yield other
        if size == 1:
            near = {layer: 0.0 if layer in removed else 1.0 for layer in self.candidates}
            for layer in self.candidates:
                way = {"never" if layer in removed else "must": (layer,)}
                found = self.cheapest(near, len(removed), **way)
                if found is not None and found not in seen:
                    seen.add(found)
                    yield found

    def within(self, kept: Sequence[int]) -> LayerSets:
        """The sets of the model that has only the layers `kept`, in its own numbers."""
        candidates = [new for new, old in enumerate(kept) if old in self.candidates]
        fits = self.fits

        def fits_here(index: int, place: int, count: int) -> bool:
            return fits is None or fits(kept[index], place, count)

        return LayerSets(len(kept), candidates, fits_here if fits else None, runs=self.runs)
