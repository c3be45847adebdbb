"""Quality of a model without layers: measured sample by sample, remembered, compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..data.items import EvalItem, fingerprint
from ..data.tokens import encode_rows
from ..distributed import gather, portion, working_together
from ..errors import NonFiniteError, ProcessGroupError, UnsupportedModelError
from ..model.forward import HINT, position_limit
from ..model.layer_stack import LayerStack
from ..results import check_layers
from ..stats import bootstrap_counts
from ..utils import at_least_one, logger, progress, tokenizer_fingerprint
from .journal import Journal
from .objectives import MAX_LENGTH, OBJECTIVES, Measure, ObjectiveLike, Samples, parse_objective
from .prefix_sharing import Mask, executions, in_tree_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BLOCK = 16  # samples on which a comparison begins, at least
Share = tuple[int, ...]  # chunks of samples
Task = tuple[int, list[Mask]]  # a chunk, and the masks to be measured on it


class RemovalQuality:
    """Quality of a model without a set of layers; nothing is measured twice.

    Samples are drawn into an order of their own, so that the first ones speak for all: `rungs`
    are growing shares of them, each about twice the last, on which masks can be compared before
    everything is measured. The full model is measured on all samples at once.

    Args:
        stack: the layers.
        tokenizer: the model's tokenizer.
        eval_data: what quality is measured on.
        objective: a name of `OBJECTIVES`, or several with weights: ``"nll=0.7,kl=0.3"``.
        batch_size: sequences per forward pass; does not change the result.
        journal: file that keeps measurements across runs, if any.
        seed: of the order of samples; does not change the result on all of them.

    Attributes:
        rungs: numbers of chunks of samples; the last is all of them.
        measured: chunks measured by this object, over all masks; those of the journal, and of other
            processes, not counted.
        refused: masks that cannot be, and why.

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
        journal: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.stack = stack
        self._shares = parse_objective(objective)
        at_least_one(batch_size=batch_size)
        length = min(MAX_LENGTH, position_limit(stack.model))
        rows = encode_rows(tokenizer, eval_data, max_length=length)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        blocks = _blocks(order, batch_size)
        for block in blocks:
            block.sort(key=lambda row: len(rows[row].ids))  # of similar length, less padding
        rows = [rows[index] for block in blocks for index in block]
        self._lengths = [len(row.ids) for row in rows]
        self._chunks: list[range] = []
        self._blocks: list[list[int]] = []
        for begin, block in zip(_starts(blocks), blocks, strict=True):
            first = len(self._chunks)
            stops = range(begin, begin + len(block), batch_size)
            self._chunks += [range(x, min(x + batch_size, begin + len(block))) for x in stops]
            self._blocks.append(list(range(first, len(self._chunks))))
        items = [item if isinstance(item := eval_data[row.item], dict) else None for row in rows]
        self._items = [row.item for row in rows]
        samples = Samples(stack, tokenizer, rows, items, batch_size)
        names: dict[type, list[str]] = {}
        for name in self._shares:
            names.setdefault(OBJECTIVES[name].measured_by, []).append(name)
        self._measures = [cls(samples, group) for cls, group in names.items()]
        self._names = [name for group in names.values() for name in group]
        self._weights = torch.cat([measure.weights() for measure in self._measures])
        self._values: dict[Mask, torch.Tensor] = {}
        self._done: dict[Mask, set[int]] = {}
        self._columns_of: dict[Share | None, torch.Tensor] = {}
        self.measured = 0
        self.refused: dict[Mask, str] = {}
        self._journal = Journal(journal) if journal is not None else None
        self._key = ":".join(
            (
                stack.fingerprint,
                tokenizer_fingerprint(tokenizer),
                fingerprint(eval_data),
                "+".join(self._names),
                f"1.{BLOCK}.{batch_size}.{seed}",
            )
        )
        self._take_up()

    def _take_up(self) -> None:
        """Take in what the journal knows."""
        if self._journal is None:
            return
        # From all processes, before any of them writes: from here on they know the same.
        parts = gather(self._journal.read(self._key))
        found = {(mask, chunk): values for part in parts for mask, chunk, values in part}
        for (mask, chunk), values in found.items():
            known = torch.tensor(values, dtype=torch.float64)
            fits = 0 <= chunk < len(self._chunks) and known.isfinite().all()
            if not fits or known.shape != (len(self._names), len(self._chunks[chunk])):
                logger.warning("%s: a reading of %s is damaged.", self._journal.path, list(mask))
                continue
            self._keep(mask, chunk, known)
        if found:
            logger.info("%d measurements taken up from %s", len(found), self._journal.path)

    @property
    def unit(self) -> str:
        """What `change` measures."""
        if len(self._names) == 1:
            return f"relative change of {OBJECTIVES[self._names[0]].unit}"
        parts = (f"{share:.2g} {name}" for name, share in self._shares.items())
        return f"weighted relative change ({', '.join(parts)})"

    @property
    def items(self) -> int:
        """How many items of the data play a part."""
        counted = self._weights.sum(0).nonzero().flatten().tolist()
        return len({self._items[place] for place in counted})

    @property
    def can_bypass(self) -> bool:
        """Whether any set can be measured, also one that the architecture cannot do without."""
        return self.stack.can_bypass and not any(measure.prunes for measure in self._measures)

    def __call__(self, removed: Iterable[int] = ()) -> float:
        """Quality without the layers `removed`; higher is better.

        With several measures: 1 plus the weighted relative change, so 1 for the full model.

        Raises:
            NonFiniteError: it is not finite.
        """
        mask = check_layers(removed, len(self.stack))
        self.measure([mask])
        if len(self._names) == 1:
            return self._qualities(mask, self._columns(None))[0]
        return 1.0 + self.change(mask)

    def change(self, removed: Iterable[int], share: Share | None = None) -> float:
        """Relative change of quality against the full model: -0.02 is 2 % worse.

        Args:
            removed: layers to remove.
            share: samples to measure on, an element of a `ladder`; all if None.

        Raises:
            NonFiniteError: it is not finite, or the full model's quality is 0.
        """
        mask = check_layers(removed, len(self.stack))
        self.measure([mask], share)
        columns = self._columns(share)
        changes = zip(
            self._names,
            self._qualities(mask, columns),
            self._qualities((), columns),
            self._full(),
            strict=True,
        )
        return math.fsum(
            self._shares[name] * (found - full) / abs(scale) for name, found, full, scale in changes
        )

    def gap(self, left: Mask, right: Mask, share: Share) -> tuple[float, float]:
        """How much better `left` is than `right`, and the standard error of that.

        Both are changes on the samples of the share, paired sample by sample. The error is that
        of the estimate for all samples, linearised; on all of them it is 0. Of measures that count
        it is at least what one sample or token makes, since on few samples two sets often agree
        in all.
        """
        difference = self.change(left, share) - self.change(right, share)
        columns = self._columns(share)
        count, total = len(columns), self._weights.shape[1]
        if count == total:
            return difference, 0.0
        paired = self._influence(left, columns) - self._influence(right, columns)
        least = sum(
            (self._shares[name] / abs(full) / float(weight)) ** 2
            for name, full, weight in zip(
                self._names, self._full(), self._weights[:, columns].sum(1), strict=True
            )
            if not OBJECTIVES[name].is_loss and weight
        )
        spread = max(float(paired.square().sum()), least) * count / max(1, count - 1)
        return difference, math.sqrt(spread * (1 - count / total))

    def interval(
        self, removed: Iterable[int], level: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """Paired bootstrap interval of `change` on all samples: (low, high).

        Samples are drawn with replacement, the same for both models (Efron's percentile method).
        """
        mask = check_layers(removed, len(self.stack))
        self.measure([mask])
        counts = bootstrap_counts(self._weights.shape[1], draws, seed)
        weight = (counts @ self._weights.T).clamp(min=1e-12)
        found, full = (counts @ self._values[one].T / weight for one in (mask, ()))
        total = torch.zeros(draws, dtype=torch.float64)
        for part, (name, scale) in enumerate(zip(self._names, self._full(), strict=True)):
            objective = OBJECTIVES[name]
            gains = [
                objective.quality(one) - objective.quality(other)
                for one, other in zip(found[:, part].tolist(), full[:, part].tolist(), strict=True)
            ]
            total += self._shares[name] / abs(scale) * torch.tensor(gains, dtype=torch.float64)
        tail = (1 - level) / 2
        low, high = total.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return low, high

    def ladder(self, turn: int = 0) -> list[Share]:
        """Growing shares of the samples, each about twice the last; the last is all of them.

        Every turn begins with other samples, so that comparisons of many turns do not all rest
        on the same few.
        """
        count = len(self._blocks)
        order = [self._blocks[(turn + number) % count] for number in range(count)]
        sizes = [2**step for step in range(count.bit_length()) if 2**step < count]
        return [tuple(sorted(chain(*order[:size]))) for size in [*sizes, count]]

    def samples(self, share: Share | None = None) -> int:
        """How many samples a share holds."""
        return len(self._columns(share))

    def measure(
        self, masks: Iterable[Mask], share: Share | None = None, label: str = "Measuring"
    ) -> None:
        """Measure what is not known yet of `masks` on the samples of a share, all in one sweep.

        Of several processes each measures its portion, and all come to know everything.

        Raises:
            NonFiniteError: NaN or infinite values; the message names the layers.
        """
        wanted = dict.fromkeys(masks)
        todo = []
        for chunk in range(len(self._chunks)):
            here = wanted if share is None or chunk in share else ()
            missing = [
                mask
                for mask in dict.fromkeys([(), *here])  # the full model always, on all samples
                if chunk not in self._done.get(mask, ())
            ]
            if missing:
                todo.append((chunk, missing))
        own = self._portion(todo)
        if any(any(missing) for _, missing in own):
            self.stack.prepare()
        calls = []
        for chunk, missing in own:
            parts: dict[Mask, list[torch.Tensor]] = {}
            calls += [
                partial(self._measure, chunk, missing, part, parts) for part in self._measures
            ]
        for _ in progress(self.stack.run_all(calls), label, total=len(calls)):
            pass
        if todo and working_together() > 1:
            self._exchange(own, todo)

    def _portion(self, todo: list[Task]) -> list[Task]:
        """What of it falls to this process; masks that share states stay together."""
        units: list[tuple[int, Mask]] = []
        costs: list[int] = []
        for chunk, masks in todo:
            ordered = in_tree_order(masks, len(self.stack))
            lengths = [self._lengths[row] for row in self._chunks[chunk]]
            units += [(chunk, mask) for mask in ordered]
            padded = len(lengths) * max(lengths)
            costs += [padded * layers for layers in executions(self.stack, ordered)]
        own: dict[int, list[Mask]] = {}
        for place in portion(costs):
            chunk, mask = units[place]
            own.setdefault(chunk, []).append(mask)
        return list(own.items())

    def _exchange(self, own: list[Task], todo: list[Task]) -> None:
        """Take in what the other processes have measured."""
        found = {
            (mask, chunk): self._values[mask][:, span.start : span.stop].tolist()
            for chunk, masks in own
            for mask in masks
            if (span := self._chunks[chunk])
        }
        wanted = hash(tuple((chunk, tuple(masks)) for chunk, masks in todo))
        everything = gather((wanted, found))
        if any(other != wanted for other, _ in everything):
            raise ProcessGroupError(
                "The processes measure different sets of layers, so they have come to different "
                "decisions: all need the same model and data, and a strategy no chance of its own."
            )
        for _, part in everything:
            for (mask, chunk), values in part.items():
                self._keep(mask, chunk, torch.tensor(values, dtype=torch.float64))

    def refusal(self, mask: Mask) -> str:
        """Why the architecture cannot do without these layers; empty if it can."""
        if mask not in self.refused:
            try:
                self.stack.remove(mask)
                return ""
            except UnsupportedModelError as error:
                self.refused[mask] = str(error)
        return self.refused[mask]

    def _measure(
        self, chunk: int, masks: list[Mask], measure: Measure, parts: dict[Mask, list[torch.Tensor]]
    ) -> None:
        """One measure on a chunk; where all of them have been read, `parts` is recorded."""
        for mask, values in measure.read(self._chunks[chunk], masks):
            parts.setdefault(mask, []).append(values)
            if len(parts[mask]) == len(self._measures):
                found = torch.cat(parts.pop(mask))
                self._check_finite(mask, chunk, found)
                self.measured += 1
                self._keep(mask, chunk, found)
                if self._journal:
                    self._journal.append(self._key, mask, chunk, found.tolist())

    def _check_finite(self, mask: Mask, chunk: int, values: torch.Tensor) -> None:
        bad = (~values.isfinite()).any(0).nonzero().flatten().tolist()
        if bad:
            items = sorted({self._items[self._chunks[chunk].start + place] for place in bad})
            which = f"The model without layers {list(mask)}" if mask else "The full model"
            raise NonFiniteError(
                f"{which} gives NaN or infinite values on items {items[:10]}: its weights or {HINT}"
            )

    def _keep(self, mask: Mask, chunk: int, values: torch.Tensor) -> None:
        if mask not in self._values:
            self._values[mask] = torch.zeros_like(self._weights)
            self._done[mask] = set()
        samples = self._chunks[chunk]
        self._values[mask][:, samples.start : samples.stop] = values
        self._done[mask].add(chunk)

    def _columns(self, share: Share | None) -> torch.Tensor:
        """Positions of the samples of a share."""
        if share not in self._columns_of:
            chunks = range(len(self._chunks)) if share is None else share
            rows = [row for chunk in chunks for row in self._chunks[chunk]]
            self._columns_of[share] = torch.tensor(rows)
        return self._columns_of[share]

    def full(self) -> dict[str, float]:
        """The quality of the model with all its layers, by measure.

        Raises:
            NonFiniteError: one is not finite, or 0.
        """
        self.measure([()])
        return dict(zip(self._names, self._full(), strict=True))

    def change_from(self, other: RemovalQuality) -> float:
        """Relative change of this full model against the full model of another measurement.

        For models that are not one another's cut (a repaired one); measures that compare with the
        full model itself have no meaning here.
        """
        pairs = ((name, value, other.full()[name]) for name, value in self.full().items())
        return math.fsum(
            self._shares[name] * (found - full) / abs(full) for name, found, full in pairs
        )

    def _full(self) -> list[float]:
        """The full model's qualities on all samples."""
        qualities = self._qualities((), self._columns(None))
        if not all(qualities):
            raise NonFiniteError("The full model's quality is 0: no relative change is defined.")
        return qualities

    def _means(self, mask: Mask, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of each measure over samples, and the total weight: (measures,)."""
        weight = self._weights[:, columns].sum(1).clamp(min=1e-12)
        return self._values[mask][:, columns].sum(1) / weight, weight

    def _qualities(self, mask: Mask, columns: torch.Tensor) -> list[float]:
        means, _ = self._means(mask, columns)
        pairs = zip(self._names, means.tolist(), strict=True)
        return [OBJECTIVES[name].quality(mean) for name, mean in pairs]

    def _influence(self, mask: Mask, columns: torch.Tensor) -> torch.Tensor:
        """First-order share of each sample in the relative change."""
        means, weight = self._means(mask, columns)
        each = self._values[mask][:, columns] - means[:, None] * self._weights[:, columns]
        factors = [
            self._shares[name] * OBJECTIVES[name].slope(mean) / abs(full)
            for name, mean, full in zip(self._names, means.tolist(), self._full(), strict=True)
        ]
        return (torch.tensor(factors, dtype=torch.float64) / weight) @ each


def _blocks(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Samples in blocks of whole batches; a remainder joins the last block."""
    size = -(-BLOCK // batch_size) * batch_size
    count = max(1, len(order) // size)
    ends = [*range(size, size * count, size), len(order)]
    return [list(order[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def _starts(blocks: Sequence[Sequence[int]]) -> list[int]:
    return [sum(len(block) for block in blocks[:number]) for number in range(len(blocks))]
