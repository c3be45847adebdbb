"""Settings of the trainings that heal a pruned model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import InvalidPlanError

TRAININGS = ("lora", "full")  # methods of healing
EPOCHS, MAX_STEPS = 30, 1000
# Forward passes that a step of training takes as long as: the full model's, the student's, and
# twice that backwards.
STEP_RUNS = 4.5
Target = Literal["teacher", "text"]
Precision = Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class LoraSettings:
    """Settings of ``heal="lora"``, and of ``"full"``; the defaults suit most models.

    Attributes:
        steps: maximum number of optimizer steps; 30 passes over the data if None, and at most 1,000
            steps if healing has no limit of time.
        target: what to learn: ``teacher``, the full model's next-token distribution
            (Kullback-Leibler divergence), or ``text``, the scored tokens of the data themselves.
        hidden_weight: weight, added to the divergence, of the squared distance of the hidden
            states after every kept layer from the full model's, relative to their size.
        learning_rate: peak of the cosine schedule; see `default_rate` and `full_rate` if None.
        rank: of the adapters, which sit on every linear map of the layers; alpha is twice the rank.
            Of no meaning for ``full``, which has none.
        batch_size: sequences per forward pass and process.
        accumulate: forward passes per step.
        precision: of the arithmetic; ``auto`` is mixed where the weights are half precision, and on
            a CPU that computes in bfloat16 itself, which takes about two thirds of the time.
        patience: checks (up to 20 in a training) without improvement before the training stops.
        checkpoints: folder for training checkpoints, empty or used for them before. A training
            resumes from its own last one and deletes those of others. Temporary if None.
        seed: of the adapters and the order of the data.

    Raises:
        InvalidPlanError: an impossible setting.
    """

    steps: int | None = None
    target: Target = "teacher"
    hidden_weight: float = 0.0
    learning_rate: float | None = None
    rank: int = 16
    batch_size: int = 8
    accumulate: int = 1
    precision: Precision = "auto"
    patience: int = 10
    checkpoints: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch_size", "accumulate", "patience"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidPlanError(f"{name}={value!r} must be a whole number from 1.")
        if (rate := self.learning_rate) is not None and not 0 < rate < math.inf:
            raise InvalidPlanError(f"learning_rate={rate!r} must be a positive number, e.g. 2e-4.")
        if not 0 <= self.hidden_weight < math.inf:
            raise InvalidPlanError(f"hidden_weight={self.hidden_weight!r} must be a number from 0.")
        for name, known in (("target", get_args(Target)), ("precision", get_args(Precision))):
            if getattr(self, name) not in known:
                raise InvalidPlanError(
                    f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}."
                )
        if self.target == "text" and self.hidden_weight:
            raise InvalidPlanError(
                f"hidden_weight={self.hidden_weight} has no meaning for target='text', which does "
                "not use the full model: leave it out."
            )

    def identity(self) -> str:
        """What must be equal for one training to resume another."""
        names = [field.name for field in fields(self) if field.name != "checkpoints"]
        return ",".join(f"{name}={getattr(self, name)!r}" for name in names)


def default_steps(sequences: int, batch_size: int, timed: bool) -> int:
    """30 passes over the data; at most 1,000 steps where no time ends the training."""
    passes = EPOCHS * -(-sequences // batch_size)
    return passes if timed else min(MAX_STEPS, passes)


def default_rate(config: Any, steps: int = 1000) -> float:
    """LoRA's usual 2e-4 at a hidden size of 4,096, scaled by 1 / sqrt(hidden size).

    A training of fewer than 1,000 steps takes longer ones, by 1 / sqrt(steps), eight times as long
    at most: in ten steps, SmolLM2 without 6 of its 30 layers learned a half more at eight times
    the rate.
    """
    size: int = config.get_text_config().hidden_size
    return 2e-4 * math.sqrt(4096 / size) * min(8.0, max(1.0, math.sqrt(1000 / steps)))


def full_rate(config: Any, steps: int = 1000) -> float:
    """For ``full``: 4e-4 at a hidden size of 576, less for wider and for narrower models.

    Adam's best rate falls with 1 / width (Yang et al., arXiv:2203.03466). On SmolLM2 without 6 of
    its 30 layers 24 steps brought the share of the lost log-likelihood that is back from 42 to 63 %
    at 3e-4, to 65 % at 6e-4, and to 56 % at 1.2e-3. A departure below that width: the demo model,
    128 wide, went in 400 steps from 82 to 86 % at 1e-4, to 81 % at 4e-4, and to 1 % at 1.8e-3.
    """
    size: int = config.get_text_config().hidden_size
    return 4e-4 * min(size / 576, 576 / size)
