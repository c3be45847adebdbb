"""Healing a pruned model: run each healer, and keep its result only if the held-out loss falls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..data.items import EvalItem
from ..errors import InvalidPlanError, OutOfMemoryError, UnsupportedModelError
from ..evaluation.likelihood import batch_nll
from ..model.layer_stack import LayerStack
from ..utils import logger
from .job import Heal, Healer, Healing, HealingJob
from .linear import heal_linear
from .lora_settings import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _heal_lora(job: HealingJob, pruned: Any) -> tuple[Any, dict[str, Any]]:
    from .lora import heal_lora  # on use: the trainer takes seconds to import

    return heal_lora(job, pruned)


def _heal_full(job: HealingJob, pruned: Any) -> tuple[Any, dict[str, Any]]:
    from .lora import heal_full

    return heal_full(job, pruned)


HEALERS: dict[str, Healer] = {"linear": heal_linear, "lora": _heal_lora, "full": _heal_full}
# What runs before a healer, where the architecture allows it.
RUN_BEFORE = {"lora": ("linear",), "full": ("linear",)}
# Of a limited time, its share: on SmolLM2 four times the tokens gave `linear` one point more of
# what was lost, three times the steps gave `lora` five.
SHARE_BEFORE = 1 / 6


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
    """Heal `pruned` in stages, and roll back every stage that does not lower the held-out loss.

    ``linear`` is `linear.heal_linear`; ``lora`` and ``full`` are `linear` where the architecture
    allows it, then `lora.heal_lora` or `lora.heal_full`. The original model, and the weights that
    `pruned` shares with it, are never changed: healed weights are copies.

    Args:
        stack: the layers of the original model, the teacher.
        removed: the 0-based layers that `pruned` lacks.
        pruned: the pruned model, from ``stack.remove(removed)``.
        heal: ``none``, ``linear``, ``lora`` or ``full``, or a `Healing`, which also limits tokens
            and time.
        heal_data: items to heal with, at least 20.

    Returns:
        The healed model (`pruned` itself if nothing helped), and the record: ``method``, and
        ``tokens`` and ``minutes`` if limited; held-out losses ``full``, ``cut`` and ``healed``
        (nats per token); ``accepted``, whether any stage was kept; ``stages``, each with its
        ``method``, ``loss`` after it, ``kept``, ``seconds`` and what its healer reports, or why
        it was ``skipped``.

    Raises:
        InvalidPlanError: unknown method.
        InvalidDataError: no data, or too little.
        UnsupportedModelError: the architecture cannot be healed this way.
        NonFiniteError: a loss became NaN or infinite.
        OutOfMemoryError: the memory does not suffice.
        MissingDependencyError: peft is not installed.
    """
    how = Healing.of(heal)
    if not how.heals:
        return pruned, {"method": how.method}
    if how.method not in HEALERS:
        raise InvalidPlanError(f"heal={how.method!r} must be one of none, {', '.join(HEALERS)}.")
    job = HealingJob.of(stack, removed, tokenizer, heal_data, lora, how)
    logger.info("%s", job.describe())
    methods = (*RUN_BEFORE.get(how.method, ()), how.method)
    with _memory_errors():
        full, cut = batch_nll(stack.model, job.held_out), batch_nll(pruned, job.held_out)
        healed, best, stages = pruned, cut, list[dict[str, Any]]()
        logger.info("Held-out loss: full %.4f, cut %.4f", full, cut)
        for method in methods:
            start = time.monotonic()
            share = 1.0 if method == how.method else SHARE_BEFORE
            try:
                limited = replace(job, deadline=start + share * job.seconds_left)
                candidate, details = HEALERS[method](limited, healed)
            except UnsupportedModelError as error:
                if method == how.method:
                    raise
                logger.info("Skipped: %s", error)
                stages.append({"method": method, "skipped": str(error)})
                continue
            loss = batch_nll(candidate, job.held_out)
            stage = {"method": method, "loss": loss, "kept": loss < best}
            stages.append({**stage, "seconds": time.monotonic() - start, **details})
            logger.info("Held-out loss after %s: %.4f", method, loss)
            if loss < best:
                healed, best = candidate, loss
            else:
                logger.warning("Healing (%s) did not lower it and was rolled back.", method)
    record = {"method": how.method, **how.budget, "full": full, "cut": cut, "healed": best}
    return healed, {**record, "accepted": best < cut, "stages": stages}


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise `OutOfMemoryError` for every way in which frameworks and devices report it."""
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
