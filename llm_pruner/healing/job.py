"""What every healer works from: the original model, the removed layers, the items, the budget."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..data.items import MAX_LENGTH, EvalItem, fingerprint
from ..data.sampling import split_items
from ..data.tokens import Batch, TokenSequence, encode_sequences, pad_sequences
from ..distributed import on_first
from ..errors import InvalidDataError, InvalidPlanError
from ..model.forward import position_limit
from ..model.layer_stack import LayerStack
from ..model.loading import model_fingerprint
from ..progress import duration
from .lora_settings import TRAININGS, LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN, VALIDATION = 0.6, 0.5  # fractions: of all items to train on; of the rest to validate on
MIN_ITEMS = 20  # fewer cannot be divided into three meaningful parts
BATCH_SIZE = 8
WARMUP = 1 / 20  # of a training
ENOUGH = (
    8192  # tokens to validate on, and to hold out; where there are more, the rest is trained on
)


@dataclass(frozen=True)
class Healing:
    """How to heal, and how much of it: may be given wherever the name of a method may.

    Attributes:
        method: ``none``, ``linear``, ``lora`` or ``full``.
        tokens: most tokens to train on; all there are if None. Drawn at random, by sequence.
        minutes: how long healing may take. `linear` then uses as many tokens as it can afford, a
            training ends with the best state so far; both keep what was reached. No limit if None.

    Raises:
        InvalidPlanError: a limit that is none, or one without a method.
    """

    method: str
    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            raise InvalidPlanError(f"tokens={self.tokens!r} must be a whole number from 1.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InvalidPlanError(f"minutes={self.minutes!r} must be a positive number, e.g. 30.")
        if self.method == "none" and self.budget:
            raise InvalidPlanError("method='none' heals nothing: leave tokens and minutes out.")

    @classmethod
    def of(cls, heal: str | Healing) -> Healing:
        """What a method's name means: no limits."""
        return heal if isinstance(heal, cls) else cls(str(heal))

    @property
    def heals(self) -> bool:
        """Whether anything is healed."""
        return self.method != "none"

    @property
    def trains(self) -> bool:
        """Whether it is by training."""
        return self.method in TRAININGS

    @property
    def budget(self) -> dict[str, float]:
        """The limits that are set, by name."""
        limits = ((one.name, getattr(self, one.name)) for one in fields(self)[1:])
        return {name: limit for name, limit in limits if limit is not None}

    def identity(self) -> str:
        """Tells two ways of healing apart."""
        return ",".join([self.method, *(f"{name}={value}" for name, value in self.budget.items())])


Heal = str | Healing  # the name of a method, or that with limits


@dataclass(frozen=True)
class HealingJob:
    """Everything a healer needs besides the pruned model; the three parts share no prompt.

    Attributes:
        stack: the layers of the original model, the teacher.
        removed: the 0-based layers that the pruned model lacks.
        train: sequences to heal with.
        validation: batches that tune a healer: its ridge, its best training step.
        held_out: batches that judge the result and serve no other purpose.
        items_key: fingerprint of all items.
        deadline: when healing has to end, on the clock of `time.monotonic`.
    """

    stack: LayerStack
    removed: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase
    train: list[TokenSequence]
    validation: list[Batch]
    held_out: list[Batch]
    items_key: str = ""
    lora: LoraSettings = field(default_factory=LoraSettings)
    deadline: float = math.inf

    @classmethod
    def of(
        cls,
        stack: LayerStack,
        removed: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[EvalItem] | None,
        lora: LoraSettings | None = None,
        healing: Healing | None = None,
    ) -> HealingJob:
        """Divide the items: three fifths to train, one to validate, one held out.

        Where a fifth has more than `ENOUGH` tokens, only so many validate and are held out, and the
        rest is trained on too.

        Raises:
            InvalidDataError: no items, too few, or nothing but padding in one part.
        """
        if not items:
            raise InvalidDataError(
                "Healing needs heal_data: pass items (prompt and reference, or text) other than "
                "those the layers were chosen on."
            )
        length = min(MAX_LENGTH, position_limit(stack.model))
        share = TRAIN
        if len(items) >= MIN_ITEMS:
            encoded = encode_sequences(tokenizer, items, max_length=length)
            share = max(TRAIN, 1 - 2 * ENOUGH / sum(len(row.ids) for row in encoded))
            share = min(share, 1 - 2 / len(items))
        train, rest = split_items(items, share) if len(items) >= MIN_ITEMS else ([], [])
        if len(rest) < 2:
            raise InvalidDataError(
                f"heal_data has {len(items)} items; healing needs at least {MIN_ITEMS} with "
                "different prompts, to train, to validate and to judge the result on. Split long "
                "texts, or pass more items."
            )
        parts = [
            encode_sequences(tokenizer, part, max_length=length)
            for part in (train, *split_items(rest, VALIDATION))
        ]
        padding = tokenizer.pad_token_id
        if any(all(set(row.ids) <= {padding} for row in part) for part in parts):
            raise InvalidDataError(
                "heal_data (or a part of it) holds nothing but padding tokens: pass text."
            )
        validation, held_out = (pad_sequences(tokenizer, part, BATCH_SIZE) for part in parts[1:])
        how = healing or Healing("linear")
        limit = math.inf if how.minutes is None else time.monotonic() + 60 * how.minutes
        settings = fingerprint(items), lora or LoraSettings(), limit
        train_rows = _at_most(parts[0], how.tokens)
        return cls(stack, tuple(removed), tokenizer, train_rows, validation, held_out, *settings)

    def describe(self) -> str:
        """Which parts there are, and how large, by the names that the log uses afterwards."""
        train = sum(len(row.ids) for row in self.train)
        validation, held_out = (
            sum(int(batch.attention_mask.sum()) for batch in part)
            for part in (self.validation, self.held_out)
        )
        left = f" Time limit: {duration(self.seconds_left)}." if self.deadline < math.inf else ""
        return (
            f"Healing: {train:,} tokens to train on, {validation:,} for validation, "
            f"{held_out:,} held out.{left}"
        )

    @property
    def kept(self) -> list[int]:
        """For each layer of the pruned model its index in the original, ascending."""
        return [index for index in range(len(self.stack)) if index not in self.removed]

    @property
    def key(self) -> str:
        """Identifies the model, the removed layers and the items."""
        return f"{model_fingerprint(self.stack.model)}:{list(self.removed)}:{self.items_key}"

    @property
    def seconds_left(self) -> float:
        """Until the deadline; infinity if there is none, 0 if it has passed."""
        return max(0.0, self.deadline - time.monotonic())

    def train_batches(self) -> list[Batch]:
        """The sequences to heal with, padded."""
        return pad_sequences(self.tokenizer, self.train, BATCH_SIZE)

    def layers_of(self, model: Any) -> LayerStack:
        """The layers of a pruned model, found where the original has its own."""
        return LayerStack(model, self.stack.paths[0])


class Pace:
    """How much of a training is done: by its steps, or by the clock where that is more."""

    def __init__(self, job: HealingJob, steps: int) -> None:
        self._steps, self._seconds, self._begun = steps, job.seconds_left, time.monotonic()

    def share(self, step: int) -> float:
        """0 to 1; the same in every process."""
        done = step / self._steps
        if self._seconds < math.inf:
            spent = (time.monotonic() - self._begun) / max(self._seconds, 1e-9)
            done = on_first(lambda: max(done, spent))
        return min(1.0, done)

    def rate(self, step: int) -> float:
        """The learning rate, relative to its peak: a rise over a twentieth, then half a cosine."""
        done = self.share(step)
        if done < WARMUP:
            return done / WARMUP
        return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def _at_most(rows: list[TokenSequence], tokens: int | None) -> list[TokenSequence]:
    """Sequences drawn at random that together have at most so many tokens, one at least."""
    if tokens is None:
        return rows
    order = random.Random(0).sample(range(len(rows)), len(rows))
    taken: list[int] = []
    for place in order:
        tokens -= len(rows[place].ids)
        if tokens >= 0 or not taken:
            taken.append(place)
        if tokens <= 0:
            break
    return [rows[place] for place in sorted(taken)]


# Takes the job and the pruned model, which it leaves unchanged; returns the healed model and what
# to record about it. Raises UnsupportedModelError where the architecture does not allow it.
Healer = Callable[[HealingJob, Any], tuple[Any, dict[str, Any]]]
