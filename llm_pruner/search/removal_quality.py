"""Quality of a model without layers: measured in chunks, remembered, compared."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import MAX_LENGTH, EvalItem, fingerprint, kind_of
from ..distributed import gather, portion, working_together
from ..errors import NonFiniteError, ProcessGroupError, UnsupportedModelError
from ..model.forward import HINT, evaluating, position_limit, require_language_model
from ..model.layer_stack import LayerStack
from ..progress import Progress
from ..results import check_layers
from ..stats import paired_draws, percentiles
from ..utils import at_least_one, logger, tokenizer_fingerprint
from .journal import Journal
from .measures import COMPARING, EncodedData, Measure
from .mixture import Mixture, OverKinds
from .objectives import OBJECTIVES, ObjectiveLike, parse_objective
from .passes import LayerSet, TokenCost, executions, in_tree_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Subset = tuple[int, ...]  # chunks
Work = list[tuple[int, list[LayerSet]]]  # chunks, and the sets to measure on each


class TimeIsUp(Exception):
    """The time that was given to a search has passed."""


class RemovalQuality:
    """Quality of a model without a set of layers; nothing is measured twice.

    The data are token sequences (items, or windows of running text) in random order, cut into
    chunks of one batch each. Sets of layers can be compared on growing `subsets` of the chunks
    before they are measured on all. The full model is always measured on all.

    Args:
        stack: the layers.
        tokenizer: the model's tokenizer.
        eval_data: what quality is measured on.
        objective: a name of `OBJECTIVES`, or several with weights: ``"nll=0.7,kl=0.3"``.
        batch_size: sequences per forward pass; does not change the result.
        max_length: longest sequence, in tokens; running text is cut into windows.
        over_kinds: of data of several kinds (`kind_of`) the ``mean`` change, or the ``worst``.
        journal: file that keeps measurements across runs, if any.
        seed: of the order of the sequences; does not change the result on all of them.

    Attributes:
        unit: what `change` measures, in words.
        measures: the measures and their weights.
        token_cost: what a token costs to measure.
        measured: chunks measured by this object, over all sets of layers; measurements from the
            journal and of other processes do not count.
        work: multiply-adds of all that has been measured, by all processes.
        deadline: when `measure` stops, by ``time.monotonic``; never if None.

    Raises:
        UnknownNameError, InvalidPlanError: no such objective.
        InvalidDataError: the data does not fit the objective.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        eval_data: Sequence[EvalItem],
        *,
        objective: ObjectiveLike = "nll",
        batch_size: int = 8,
        max_length: int = MAX_LENGTH,
        over_kinds: OverKinds = "mean",
        journal: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        require_language_model(stack.model, "measuring quality")
        self.stack = stack
        mixture = parse_objective(objective)
        self.unit = _unit(mixture)
        at_least_one(batch_size=batch_size, max_length=max_length)
        length = min(max_length, position_limit(stack.model))
        data = EncodedData.of(stack, tokenizer, eval_data, batch_size, length, seed)
        self._chunks, self._blocks = data.chunks, data.blocks
        self._lengths = [len(one.ids) for one in data.sequences]
        compares = not COMPARING.isdisjoint(mixture)
        self.token_cost, self.work = TokenCost.of(stack, compares=compares), 0.0
        self.under_way = 0.0  # of the work, what the measurement that runs has done
        self.deadline: float | None = None
        self._items = [one.item for one in data.sequences]
        names: dict[Callable[..., Measure], list[str]] = {}
        for name in mixture:
            names.setdefault(OBJECTIVES[name].measured_by, []).append(name)
        self._measures = [make(data, group) for make, group in names.items()]
        self.measures = {name: mixture[name] for group in names.values() for name in group}
        weights = torch.cat([measure.weights() for measure in self._measures])
        kinds = [kind_of(eval_data[n]) for n in self._items]
        self._mixture = Mixture(self.measures, weights, kinds, over_kinds)
        self._values: dict[tuple[LayerSet, int], torch.Tensor] = {}  # of a set on a chunk
        self.measured = 0
        self._refusals: dict[LayerSet, str] = {}
        self._journal = Journal(journal) if journal is not None else None
        self._fingerprint = fingerprint(eval_data)
        prints = stack.fingerprint, tokenizer_fingerprint(tokenizer), self._fingerprint
        layout = f"3.{length}.{batch_size}.{data.block_tokens}.{seed}"
        versions = "".join(OBJECTIVES[name].version for name in self.measures)
        settings = "+".join(self.measures) + versions, layout
        self._key = ":".join((*prints, *settings))
        if self._journal:
            self._read_journal(self._journal)

    def _read_journal(self, journal: Journal) -> None:
        # From all processes, before any of them writes: from here on they know the same.
        parts = gather(journal.read(self._key))
        entries = {(removed, chunk): values for part in parts for removed, chunk, values in part}
        for (removed, chunk), values in entries.items():
            known = torch.tensor(values, dtype=torch.float64)
            fits = 0 <= chunk < len(self._chunks) and known.isfinite().all()
            if not fits or known.shape != (len(self.measures), len(self._chunks[chunk])):
                logger.warning("%s: an entry for %s is damaged.", journal.path, list(removed))
                continue
            self._values[removed, chunk] = known
        if entries:
            logger.info("%d measurements read from %s", len(entries), journal.path)

    @property
    def items(self) -> int:
        """How many items of the data count."""
        counted = self._mixture.weights.sum(0).nonzero().flatten().tolist()
        return len({self._items[index] for index in counted})

    @property
    def can_bypass(self) -> bool:
        """Whether any set can be measured, even one that the architecture cannot do without."""
        needs = any(measure.needs_pruned_model for measure in self._measures)
        return self.stack.can_bypass and not needs

    def __call__(self, removed: Iterable[int] = ()) -> float:
        """Quality without the layers `removed`; higher is better.

        With several measures or kinds of data: 1 plus the weighted relative change, so 1 for the
        full model.

        Raises:
            NonFiniteError: it is not finite.
        """
        layers = check_layers(removed, len(self.stack))
        self.measure([layers])
        if len(self._mixture.parts) == 1:
            return self._qualities(layers, None)[0]
        return 1.0 + self.change(layers)

    def change(self, removed: Iterable[int], subset: Subset | None = None) -> float:
        """Relative change of quality against the full model: -0.02 is 2 % worse.

        Args:
            removed: layers to remove.
            subset: the part of the data to measure on, of `subsets`; all of it if None.

        Raises:
            NonFiniteError: it is not finite, or the full model's quality is 0.
        """
        layers = check_layers(removed, len(self.stack))
        self.measure([layers], subset)
        return self._mixture.change(*self._compared(layers, subset))

    def _compared(self, layers: LayerSet, subset: Subset | None) -> tuple[list[float], ...]:
        """Qualities without layers, of the full model, and of that on all data."""
        return self._qualities(layers, subset), self._qualities((), subset), self._full()

    def gap(self, left: LayerSet, right: LayerSet, subset: Subset) -> tuple[float, float]:
        """How much better `left` is than `right`, and the standard error of that.

        Both are changes on the subset, paired sequence by sequence. The error is that of the
        estimate for all data, linearised; on all data it is 0. For measures that count, it is at
        least what one item or token contributes, because on few items two sets often agree in all.
        """
        difference = self.change(left, subset) - self.change(right, subset)
        weights = self._mixture.weights_on(self._columns(subset))
        count, total = weights.shape[1], self.size()
        if count == total:
            return difference, 0.0
        paired = self._influence(left, subset) - self._influence(right, subset)
        parts = zip(self._mixture.parts, self._full(), weights.sum(1), strict=True)
        least = sum(
            (part.weight / abs(full) / float(size)) ** 2
            for part, full, size in parts
            if not OBJECTIVES[part.name].is_loss and size
        )
        spread = max(float(paired.square().sum()), least) * count / max(1, count - 1)
        return difference, math.sqrt(spread * (1 - count / total))

    def rival(self, removed: LayerSet) -> tuple[LayerSet, float, float] | None:
        """The best other set of as many layers that is known on all data, and how far it is behind.

        Returns:
            The set, by how much its change is worse, and half of the 95 % interval of that (paired
            sequence by sequence, linearised); None if none is known, or `removed` is not.
        """
        chunks = Counter(layers for layers, _ in self._values if len(layers) == len(removed))
        whole = [layers for layers, number in chunks.items() if number == len(self._chunks)]
        others = [layers for layers in whole if layers != removed]
        if removed not in whole or not others:
            return None
        best = max(others, key=self.change)
        every = tuple(range(len(self._chunks)))
        paired = self._influence(removed, every) - self._influence(best, every)
        spread = float(paired.square().sum()) * len(paired) / max(1, len(paired) - 1)
        return best, self.change(removed) - self.change(best), 1.96 * math.sqrt(spread)

    def interval(
        self, removed: Iterable[int], level: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float] | tuple[None, None]:
        """Paired bootstrap interval of `change` on all data: (low, high).

        Sequences are drawn with replacement, the same for both models (Efron's percentile method).
        One sequence alone says nothing about the spread: (None, None).
        """
        layers = check_layers(removed, len(self.stack))
        if self.size() < 2:
            return None, None
        drawn = self._draws(layers, draws, seed)
        low, high = percentiles(self._mixture.combined(drawn), level).tolist()
        return low, high

    def _draws(self, layers: LayerSet, draws: int = 1000, seed: int = 0) -> torch.Tensor:
        """Changes of every part of the mixture on data drawn again: (parts, draws)."""
        self.measure([layers])
        changes = []
        sides = (self._mixture.values(self._on(removed), None) for removed in ((), layers))
        weights = self._mixture.weights
        parts = zip(self._mixture.parts, self._full(), *sides, weights, strict=True)
        for part, full, before, after, counts in parts:
            drawn = paired_draws(before, after, counts, draws=draws, seed=seed)
            changes.append(OBJECTIVES[part.name].relative(drawn, full))
        return torch.stack(changes)

    @property
    def has_kinds(self) -> bool:
        """Whether the items are of several kinds."""
        return len(self._mixture.kinds) > 1

    def by_kind(self, removed: Iterable[int]) -> dict[str, dict[str, Any]]:
        """The change on each kind of data and its interval; empty where there is only one kind."""
        layers = check_layers(removed, len(self.stack))
        drawn = self._draws(layers)
        found = self._mixture.by_kind(*self._compared(layers, None))
        if len(found) < 2:
            return {}
        costs = {}
        for kind, change in found.items():
            bounds: list[float | None] = [None, None]
            if self._mixture.count(kind) > 1:
                bounds = percentiles(self._mixture.of_kind(drawn, kind)).tolist()
            costs[kind] = {"change": change, "low": bounds[0], "high": bounds[1]}
        return costs

    def cost(self, removed: Iterable[int]) -> dict[str, Any]:
        """What removing layers costs on all data, as `PruningPlan.held_out` describes it."""
        layers = check_layers(removed, len(self.stack))
        self.measure([layers], label="Measuring what the choice costs")
        low, high = self.interval(layers)
        kinds = self.by_kind(layers)
        return {
            "change": self.change(layers),
            "low": low,
            "high": high,
            "unit": self.unit,
            "items": self.items,
            "fingerprint": self._fingerprint,
            **({"kinds": kinds} if kinds else {}),
        }

    def subsets(self, turn: int = 0) -> list[Subset]:
        """Growing subsets of the data, each about twice the last; the last is all of it.

        Every turn begins with other sequences, so that many comparisons do not all rest on the
        same few.
        """
        count = len(self._blocks)
        order = [self._blocks[(turn + number) % count] for number in range(count)]
        sizes = [2**step for step in range(count.bit_length()) if 2**step < count]
        return [tuple(sorted(chain(*order[:size]))) for size in [*sizes, count]]

    def size(self, subset: Subset | None = None) -> int:
        """How many sequences a subset holds; all of the data if None."""
        columns = self._columns(subset)
        return len(self._lengths) if columns is None else len(columns)

    def measure(
        self, layer_sets: Iterable[LayerSet], subset: Subset | None = None, label: str = "Measuring"
    ) -> None:
        """Measure what is not known yet of `layer_sets` on a subset, all in one run.

        Of several processes each measures its portion, and all learn everything.

        Raises:
            NonFiniteError: NaN or infinite values; the message names the layers.
            TimeIsUp: the deadline has come; what was measured is known.
        """
        todo = self._unknown(layer_sets, subset)
        if not todo:
            return
        self._refuse_late(together=True)
        mine = self._portion(todo)
        if any(any(missing) for _, missing in mine):
            self.stack.prepare()
        total, self.under_way = sum(self._work(chunk, missing) for chunk, missing in mine), 0.0
        with evaluating(self.stack.model), Progress(label, total, counts=False) as stage:
            calls = [partial(self._measure, *one, stage) for one in mine]
            for _ in self.stack.run_all(calls):
                pass
        if working_together() > 1:
            self._exchange(mine, todo)
        self.work += sum(self._work(chunk, missing) for chunk, missing in todo)
        self.under_way = 0.0

    def work_for(self, layer_sets: Iterable[LayerSet], subset: Subset | None = None) -> float:
        """Multiply-adds that `measure` would take; what is known already is free."""
        return sum(self._work(chunk, sets) for chunk, sets in self._unknown(layer_sets, subset))

    @property
    def tokens(self) -> int:
        """Tokens of the data, padding included."""
        return sum(self._padded(chunk) for chunk in self._chunks)

    def _padded(self, chunk: range) -> int:
        return len(chunk) * max(self._lengths[index] for index in chunk)

    def _unknown(self, layer_sets: Iterable[LayerSet], subset: Subset | None) -> Work:
        """By chunk what has not been measured; the full model always, on all data."""
        wanted = dict.fromkeys(layer_sets)
        todo: Work = []
        for chunk in range(len(self._chunks)):
            here = wanted if subset is None or chunk in subset else ()
            sets = dict.fromkeys([(), *here])
            if missing := [removed for removed in sets if (removed, chunk) not in self._values]:
                todo.append((chunk, missing))
        return todo

    def _work(self, chunk: int, layer_sets: Iterable[LayerSet]) -> float:
        ordered = in_tree_order(layer_sets, len(self.stack))
        passes = map(self.token_cost.of_pass, executions(self.stack, ordered))
        return sum(passes) * self._padded(self._chunks[chunk])

    def _refuse_late(self, *, together: bool = False) -> None:
        late = self.deadline is not None and time.monotonic() >= self.deadline
        if any(gather(late)) if together and self.deadline is not None else late:
            raise TimeIsUp

    def _portion(self, todo: Work) -> Work:
        """What falls to this process, in tree order; sets that share states stay together."""
        units: list[tuple[int, LayerSet]] = []
        costs: list[int] = []
        for chunk, missing in todo:
            ordered = in_tree_order(missing, len(self.stack))
            units += [(chunk, removed) for removed in ordered]
            padded = self._padded(self._chunks[chunk])
            passes = map(self.token_cost.of_pass, executions(self.stack, ordered))
            costs += [round(padded * cost) for cost in passes]
        mine: dict[int, list[LayerSet]] = {}
        for index in portion(costs):
            chunk, removed = units[index]
            mine.setdefault(chunk, []).append(removed)
        return list(mine.items())

    def _exchange(self, mine: Work, todo: Work) -> None:
        """Take in what the other processes have measured."""
        keys = [(removed, chunk) for chunk, layer_sets in mine for removed in layer_sets]
        values = {key: self._values[key].tolist() for key in keys}
        asked = hash(tuple((chunk, tuple(layer_sets)) for chunk, layer_sets in todo))
        everything = gather((asked, values))
        if any(other != asked for other, _ in everything):
            raise ProcessGroupError(
                "The processes measure different sets of layers, so they have come to different "
                "decisions: all need the same model and data, and a strategy without randomness "
                "of its own."
            )
        for _, part in everything:
            for key, found in part.items():
                self._values[key] = torch.tensor(found, dtype=torch.float64)

    def refusal(self, removed: LayerSet) -> str:
        """Why the architecture cannot do without these layers; empty if it can."""
        if removed not in self._refusals:
            try:
                self.stack.remove(removed)
                return ""
            except UnsupportedModelError as error:
                self._refusals[removed] = str(error)
        return self._refusals[removed]

    def _measure(self, chunk: int, layer_sets: list[LayerSet], stage: Progress) -> None:
        """Measure sets of layers on a chunk; each is recorded as soon as its values are there."""
        each = self._work(chunk, layer_sets) / len(layer_sets)
        readings: Iterable[Iterable[tuple[LayerSet, torch.Tensor]]]
        readings = [measure.read(self._chunks[chunk], layer_sets) for measure in self._measures]
        if self.stack.offloaded:  # in step, so that every weight is read once for all measures
            readings = self.stack.run_all([partial(list, one) for one in readings])
        for parts in zip(*readings, strict=True):
            removed, values = parts[0][0], torch.cat([values for _, values in parts])
            bad = (~values.isfinite()).any(0).nonzero().flatten().tolist()
            if bad:
                items = sorted({self._items[self._chunks[chunk][index]] for index in bad})
                which = f"The model without layers {list(removed)}" if removed else "The full model"
                raise NonFiniteError(
                    f"{which} gives NaN or infinite values on items {items[:10]}: its weights or "
                    f"{HINT}"
                )
            self.measured += 1
            self._values[removed, chunk] = values
            if self._journal:
                self._journal.append(self._key, removed, chunk, values.tolist())
            self.under_way += each
            stage.advance(each)
            if working_together() == 1:  # otherwise all stop at the same place
                self._refuse_late()

    def full(self) -> dict[str, float]:
        """The quality of the model with all its layers, by measure (and kind of data).

        Raises:
            NonFiniteError: one is not finite, or 0.
        """
        self.measure([()])
        labels = (part.label for part in self._mixture.parts)
        return dict(zip(labels, self._full(), strict=True))

    def change_from(self, other: RemovalQuality) -> float:
        """Relative change of this full model against the full model of another measurement.

        For models of which neither is the other without layers (a healed one). Measures that
        compare with the full model itself have no meaning here.
        """
        before = [*other.full().values()]
        return self._mixture.change([*self.full().values()], before, before)

    def _full(self) -> list[float]:
        """The full model's qualities on all data."""
        qualities = self._qualities((), None)
        if not all(qualities):
            raise NonFiniteError("The full model's quality is 0: no relative change is defined.")
        return qualities

    def _on(self, removed: LayerSet, subset: Subset | None = None) -> torch.Tensor:
        """The values on a subset: (measures, sequences)."""
        chunks = range(len(self._chunks)) if subset is None else subset
        return torch.cat([self._values[removed, chunk] for chunk in chunks], dim=1)

    def _columns(self, subset: Subset | None) -> list[int] | None:
        """The sequences of a subset."""
        return None if subset is None else list(chain(*(self._chunks[n] for n in subset)))

    def _qualities(self, removed: LayerSet, subset: Subset | None) -> list[float]:
        return self._mixture.qualities(self._on(removed, subset), self._columns(subset))

    def _influence(self, removed: LayerSet, subset: Subset) -> torch.Tensor:
        """First-order contribution of each sequence to the relative change."""
        found = self._mixture.by_kind(*self._compared(removed, subset))
        worst = min(found, key=found.__getitem__)
        columns = self._columns(subset)
        return self._mixture.influence(self._on(removed, subset), columns, self._full(), worst)


def _unit(mixture: Mapping[str, float]) -> str:
    if len(mixture) == 1:
        (name,) = mixture
        return f"relative change of {OBJECTIVES[name].unit}"
    parts = (f"{weight:.2g} {name}" for name, weight in mixture.items())
    return f"weighted relative change ({', '.join(parts)})"
