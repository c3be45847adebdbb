"""What every healer works from: the original model, the removed layers and the divided items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.items import EvalItem, fingerprint
from ..data.sampling import split_items
from ..data.tokens import Batch, TokenSequence, encode_sequences, pad_sequences
from ..errors import InvalidDataError
from ..model.forward import position_limit
from ..model.layer_stack import LayerStack
from ..model.loading import model_fingerprint
from .lora_settings import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN, VALIDATION = 0.6, 0.5  # fractions: of all items to train on; of the rest to validate on
MIN_ITEMS = 20  # fewer cannot be divided into three meaningful parts
MAX_LENGTH = 512  # tokens of a sequence
BATCH_SIZE = 8


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
    """

    stack: LayerStack
    removed: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase
    train: list[TokenSequence]
    validation: list[Batch]
    held_out: list[Batch]
    items_key: str = ""
    lora: LoraSettings = field(default_factory=LoraSettings)

    @classmethod
    def of(
        cls,
        stack: LayerStack,
        removed: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[EvalItem] | None,
        lora: LoraSettings | None = None,
    ) -> HealingJob:
        """Divide the items: three fifths to train, one to validate, one held out.

        Raises:
            InvalidDataError: no items, too few, or nothing but padding in one part.
        """
        if not items:
            raise InvalidDataError(
                "Healing needs heal_data: pass items (prompt and reference, or text) other than "
                "those the layers were chosen on."
            )
        train, rest = split_items(items, TRAIN) if len(items) >= MIN_ITEMS else ([], [])
        if len(rest) < 2:
            raise InvalidDataError(
                f"heal_data has {len(items)} items; healing needs at least {MIN_ITEMS} with "
                "different prompts, to train, to validate and to judge the result on. Split long "
                "texts, or pass more items."
            )
        length = min(MAX_LENGTH, position_limit(stack.model))
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
        settings = fingerprint(items), lora or LoraSettings()
        return cls(stack, tuple(removed), tokenizer, parts[0], validation, held_out, *settings)

    @property
    def kept(self) -> list[int]:
        """For each layer of the pruned model its index in the original, ascending."""
        return [index for index in range(len(self.stack)) if index not in self.removed]

    @property
    def key(self) -> str:
        """Identifies the model, the removed layers and the items."""
        return f"{model_fingerprint(self.stack.model)}:{list(self.removed)}:{self.items_key}"

    def train_batches(self) -> list[Batch]:
        """The sequences to heal with, padded."""
        return pad_sequences(self.tokenizer, self.train, BATCH_SIZE)

    def layers_of(self, model: Any) -> LayerStack:
        """The layers of a pruned model, found where the original has its own."""
        return LayerStack(model, self.stack.paths[0])


# Takes the job and the pruned model, which it leaves unchanged; returns the healed model and what
# to record about it. Raises UnsupportedModelError where the architecture does not allow it.
Healer = Callable[[HealingJob, Any], tuple[Any, dict[str, Any]]]
