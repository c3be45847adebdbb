"""Measured removal: the quality of a model without given layers, and searches that rest on it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batching import EvalItem, fingerprint
from .errors import InvalidPlanError, NonFiniteError, OutputError, UnknownNameError
from .evaluation import ModelEvaluator
from .layers import LayerStack
from .likelihood import batch_nll, encode_for
from .utils import logger, model_fingerprint, progress, tokenizer_fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Mask = tuple[int, ...]


class NllObjective:
    """Quality as the likelihood per token of the references: exp(-NLL), or 1 / perplexity.

    A relative change of -0.02 means: perplexity is 2 % higher. (A relative change of the NLL
    itself would call every cut a catastrophe where the full model's NLL is near 0.)
    """

    unit = "relative change of likelihood per token"
    generates = False

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        eval_data: Sequence[EvalItem],
        batch_size: int,
    ) -> None:
        self._batches = encode_for(model, tokenizer, eval_data, batch_size)

    def __call__(self, model: torch.nn.Module) -> float:
        return math.exp(-batch_nll(model, self._batches))


class SimilarityObjective:
    """Quality as the mean cosine similarity of generated answers to the references."""

    unit = "relative change of answer similarity"
    generates = True

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        eval_data: Sequence[EvalItem],
        batch_size: int,
    ) -> None:
        self._tokenizer, self._data, self._batch_size = tokenizer, eval_data, batch_size

    def __call__(self, model: torch.nn.Module) -> float:
        evaluator = ModelEvaluator(model, self._tokenizer, batch_size=self._batch_size)
        return evaluator.evaluate(self._data)


OBJECTIVES: dict[str, type[NllObjective] | type[SimilarityObjective]] = {
    "nll": NllObjective,
    "similarity": SimilarityObjective,
}


class Journal:
    """Measured qualities in a JSON-lines file, so that a killed search does not start again.

    Every line is one measurement, keyed by model, data and objective; lines of other keys and
    a last line cut short by a crash are passed over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self, key: str) -> dict[Mask, float]:
        """All measurements recorded under `key`.

        Raises:
            OutputError: the file cannot be read.
        """
        known: dict[Mask, float] = {}
        if not self.path.exists():
            return known
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"Cannot read the journal {str(self.path)!r}: {error}.") from error
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if entry["key"] == key:
                    known[tuple(entry["removed"])] = float(entry["quality"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s:%d is not a measurement and is ignored.", self.path, number)
        return known

    def append(self, key: str, removed: Mask, quality: float) -> None:
        """Record one measurement; it is on disk when this returns.

        Raises:
            OutputError: the file cannot be written.
        """
        line = json.dumps({"key": key, "removed": removed, "quality": quality})
        try:
            with self.path.open("ab+") as file:
                if file.tell() and (file.seek(-1, 2), file.read())[1] != b"\n":
                    file.write(b"\n")  # a crash cut the last line short
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise OutputError(f"Cannot write the journal {str(self.path)!r}: {error}.") from error


class RemovalQuality:
    """Quality of a model without a set of layers; nothing is measured twice.

    Args:
        stack: the layers.
        tokenizer: the model's tokenizer.
        eval_data: what quality is measured on.
        objective: a name of `OBJECTIVES`; higher quality is better for each.
        batch_size: sequences per forward pass; does not change the result.
        journal: file that keeps measurements across runs, if any.

    Raises:
        UnknownNameError: no objective of that name.
    """

    def __init__(
        self,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        eval_data: Sequence[EvalItem],
        *,
        objective: str = "nll",
        batch_size: int = 8,
        journal: str | Path | None = None,
    ) -> None:
        if objective not in OBJECTIVES:
            raise UnknownNameError.of("objective", objective, OBJECTIVES)
        self.stack = stack
        self._measure = OBJECTIVES[objective](stack.model, tokenizer, eval_data, batch_size)
        self._journal = Journal(journal) if journal is not None else None
        self._key = ":".join(
            (
                model_fingerprint(stack.model),
                tokenizer_fingerprint(tokenizer),
                fingerprint(eval_data),
                objective,
            )
        )
        self._known = self._journal.read(self._key) if self._journal else {}
        self.measured = 0  # masks measured by this object, not taken from the journal

    @property
    def unit(self) -> str:
        """What `change` measures."""
        return self._measure.unit

    def __call__(self, removed: Iterable[int] = ()) -> float:
        """Quality without the layers `removed`; higher is better.

        Raises:
            NonFiniteError: the full model itself has no finite quality.
        """
        mask = tuple(sorted(removed))
        if mask not in self._known:
            self._known[mask] = self._measured(mask)
            if self._journal:
                self._journal.append(self._key, mask, self._known[mask])
        return self._known[mask]

    def change(self, removed: Iterable[int]) -> float:
        """Relative change of quality against the full model: -0.02 is 2 % worse."""
        full = self(())
        if full == 0:
            raise NonFiniteError("The full model's quality is 0: no relative change is defined.")
        return (self(removed) - full) / abs(full)

    def _measured(self, mask: Mask) -> float:
        self.measured += 1
        if self._measure.generates and mask:
            quality = self._measure(self.stack.remove(mask))
        else:
            with self.stack.bypass(mask) as model:
                quality = self._measure(model)
        if not math.isfinite(quality):
            raise NonFiniteError(
                f"The model without layers {list(mask)} has quality {quality}: its weights or "
                "activations are NaN or overflow. Check the checkpoint, or load it in float32."
            )
        return quality


def single_removals(quality: RemovalQuality, layers: Sequence[int]) -> dict[int, float]:
    """Relative change of quality for each of `layers` removed alone: len(layers) + 1 passes."""
    quality(())
    return {index: quality.change([index]) for index in progress(layers, "Ablating layers")}


def greedy_removal(
    quality: RemovalQuality,
    candidates: Sequence[int],
    *,
    tolerance: float | None,
    n_layers: int | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Remove layers one at a time, measuring anew after every cut.

    Each round tries every candidate left on top of the cuts made so far and takes the one that
    costs least; of equals the deeper. A cut that brings the total relative change below
    ``-tolerance`` is rolled back and ends the search. Costs up to
    ``len(candidates) * rounds`` measurements.

    Args:
        quality: measures the model without layers.
        candidates: 0-based layers that may go.
        tolerance: largest relative loss allowed in total (0.015: 1.5 %); None for no limit.
        n_layers: stop after this many; None for no limit.
        on_step: called with every step as it is made.

    Returns:
        The removed layers, ascending, and one record per round: ``layer``, ``change`` (total,
        relative), ``kept`` and ``tried`` (candidate -> change).

    Raises:
        InvalidPlanError: more layers are asked for than there are candidates.
    """
    most = min(len(candidates), len(quality.stack) - 1)
    if n_layers is not None and not (type(n_layers) is int and 0 < n_layers <= most):
        raise InvalidPlanError(
            f"n_layers={n_layers} must be from 1 to {most}, the number of layers that may go: ask "
            "for fewer, or protect fewer."
        )
    removed: list[int] = []
    steps: list[dict[str, Any]] = []
    while len(removed) < (n_layers or most):
        left = [index for index in candidates if index not in removed]
        tried = {
            index: quality.change([*removed, index])
            for index in progress(left, f"Smart round {len(removed) + 1}")
        }
        best = max(tried, key=lambda index: (tried[index], index))
        kept = tolerance is None or tried[best] >= -tolerance
        step = {"layer": best, "change": tried[best], "kept": kept, "tried": tried}
        steps.append({**step, "tried": {str(index): value for index, value in tried.items()}})
        if on_step:
            on_step(steps[-1])
        if not kept:
            break
        removed.append(best)
    return sorted(removed), steps
