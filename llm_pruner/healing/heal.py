"""Repairing a pruned model, and judging the repair: closed form, then training, gated.

Every repair is compared, on items that no repair has seen, with the model as it was before it,
and undone if the loss is not lower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..data.items import EvalItem, fingerprint
from ..data.sampling import split_items
from ..data.tokens import Batch, TokenSequence, encode_sequences, pad_sequences
from ..errors import InvalidDataError, InvalidPlanError, OutOfMemoryError, UnsupportedModelError
from ..evaluation.likelihood import batch_nll
from ..model.forward import position_limit
from ..model.layer_stack import LayerStack
from ..model.loading import model_fingerprint
from ..utils import logger
from .linear import heal_linear
from .lora_settings import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Heal = Literal["none", "linear", "lora"]
TRAIN, HELD_OUT = 0.6, 0.5  # shares: of all items to train on; of the rest to tune on
LEAST_ITEMS = 20  # fewer cannot be divided into three parts that say anything
MAX_LENGTH = 512  # tokens of a sequence
BATCH_SIZE = 8


@dataclass(frozen=True)
class HealingData:
    """Items in three parts that share no prompt.

    Attributes:
        train: sequences to repair with.
        tune: batches that choose a repair's strength: the ridge, the best state of a training.
        gate: batches that judge the outcome and have no other part in it.
        key: fingerprint of all items.
    """

    train: list[TokenSequence]
    tune: list[Batch]
    gate: list[Batch]
    key: str

    @classmethod
    def of(
        cls, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[EvalItem] | None
    ) -> HealingData:
        """Divide items: three fifths to train, one to tune, one to judge.

        Raises:
            InvalidDataError: none, too few, or such that hold nothing but padding.
        """
        if not items:
            raise InvalidDataError(
                "Healing needs heal_data: pass items (prompt and reference, or text) other than "
                "those the layers were chosen on."
            )
        train, held_out = split_items(items, TRAIN) if len(items) > 1 else (list(items), [])
        if len(items) < LEAST_ITEMS or len(held_out) < 2:
            raise InvalidDataError(
                f"heal_data has {len(items)} items, and healing takes at least {LEAST_ITEMS} with "
                "different prompts: some to repair with, others to tune on, others to judge by. "
                "Cut a long text into several, or give more."
            )
        tune, gate = split_items(held_out, HELD_OUT)
        length = min(MAX_LENGTH, position_limit(model))
        parts = [
            encode_sequences(tokenizer, part, max_length=length) for part in (train, tune, gate)
        ]
        padding = tokenizer.pad_token_id
        for part in parts:
            if padding is not None and all(set(row.ids) <= {padding} for row in part):
                raise InvalidDataError(
                    "heal_data (or a part of it) holds nothing but padding tokens: give text."
                )
        return cls(
            parts[0],
            pad_sequences(tokenizer, parts[1], BATCH_SIZE),
            pad_sequences(tokenizer, parts[2], BATCH_SIZE),
            fingerprint(items),
        )


def heal_model(
    stack: LayerStack,
    removed: Sequence[int],
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heal: Heal,
    heal_data: Sequence[EvalItem] | None,
    *,
    lora: LoraSettings | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Repair `pruned`, and keep of every repair only what lowers the held-out loss.

    ``linear`` is `heal_linear`; ``lora`` is `heal_linear` where the architecture allows it, then
    `heal_lora` on top. The original model, and the weights that `pruned` shares with it, are never
    changed: repaired weights are copies.

    Args:
        stack: the layers of the original model, the teacher.
        removed: the 0-based layers that `pruned` lacks.
        pruned: the pruned model, from ``stack.remove(removed)``.
        tokenizer: the model's tokenizer.
        heal: ``none``, ``linear`` or ``lora``.
        heal_data: items to repair with, at least 20.
        lora: how to train.

    Returns:
        The healed model (`pruned` itself if nothing helped), and the record: ``method``; held-out
        losses ``full``, ``cut`` and ``healed`` (nats per token); ``accepted``, whether any repair
        was kept; ``stages``, for each repair its ``method``, ``loss`` after it, ``kept``,
        ``seconds`` and what the method tells, or why it was left out (``skipped``).

    Raises:
        InvalidPlanError: unknown method.
        InvalidDataError: no data, or too little.
        UnsupportedModelError: the architecture cannot be healed this way.
        NonFiniteError: a loss became NaN or infinite.
        OutOfMemoryError: the memory does not suffice.
        MissingDependencyError: peft is not installed.
    """
    if heal not in get_args(Heal):
        raise InvalidPlanError(f"heal={heal!r} must be one of {', '.join(get_args(Heal))}.")
    if heal == "none":
        return pruned, {"method": "none"}
    data = HealingData.of(stack.model, tokenizer, heal_data)

    def fit(model: Any) -> tuple[Any, dict[str, Any]]:
        train = pad_sequences(tokenizer, data.train, BATCH_SIZE)
        healed, layers = heal_linear(stack, removed, model, train, data.tune)
        return healed, {"layers": layers}

    def learn(model: Any) -> tuple[Any, dict[str, Any]]:
        return heal_lora(stack, removed, model, tokenizer, data, lora)

    repairs: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {"linear": fit}
    if heal == "lora":
        repairs["lora"] = learn
    with _memory_errors():
        full, cut = batch_nll(stack.model, data.gate), batch_nll(pruned, data.gate)
        healed, best, stages = pruned, cut, list[dict[str, Any]]()
        logger.info("Held-out loss: full %.4f, cut %.4f", full, cut)
        for name, repair in repairs.items():
            start = time.monotonic()
            try:
                candidate, told = repair(healed)
            except UnsupportedModelError as error:
                if name == heal:
                    raise
                logger.info("Left out: %s", error)
                stages.append({"method": name, "skipped": str(error)})
                continue
            loss = batch_nll(candidate, data.gate)
            stage = {"method": name, "loss": loss, "kept": loss < best}
            stages.append({**stage, "seconds": time.monotonic() - start, **told})
            logger.info("Held-out loss after %s: %.4f", name, loss)
            if loss < best:
                healed, best = candidate, loss
            else:
                logger.warning("Healing (%s) did not lower it and was rolled back.", name)
    record = {"method": heal, "full": full, "cut": cut, "healed": best, "accepted": best < cut}
    return healed, {**record, "stages": stages}


def heal_lora(
    stack: LayerStack,
    removed: Sequence[int],
    pruned: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: HealingData,
    settings: LoraSettings | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Train LoRA adapters on the pruned model to match the full model, then merge them.

    The loss is the Kullback-Leibler divergence of the student's next-token distribution from the
    full model's, averaged over all real tokens (nats); see `LoraSettings` for others. The teacher
    is the original model itself, whose kept weights the student shares: there is no second copy.
    Adapters (peft) sit on every linear map of the layers. The state with the lowest loss on
    ``data.tune`` is the one merged, and training ends early when that stops falling.

    Under ``torchrun`` or ``accelerate launch`` every process trains on its share of the batches,
    and all return the same model.

    Returns:
        The repaired model, and ``steps`` done and ``best_step``.

    Raises:
        MissingDependencyError: peft is not installed.
        NonFiniteError: the loss became NaN or infinite.
        InvalidPlanError: the model is on a device that the trainer does not use.
    """
    from .lora import train_lora

    settings = settings or LoraSettings()
    key = f"{model_fingerprint(stack.model)}:{list(removed)}:{data.key}"
    return train_lora(stack, removed, pruned, tokenizer, data.train, data.tune, settings, key)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Tell in one way what frameworks and devices tell in many."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        raise OutOfMemoryError(
            f"Not enough memory to heal ({str(error).splitlines()[0]:.200}). Use a smaller "
            "batch_size with accumulate, shorter texts, a half-precision model (--dtype "
            "bfloat16), or heal='linear'."
        ) from error
