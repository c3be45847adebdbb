"""Repair by training: low-rank adapters that learn from the full model, merged in the end.

Training is `transformers.Trainer`'s: mixed precision, accumulation, checkpoints, several processes.
Imported when it is needed: the trainer is slow to load.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from ..atomic_output import KEY_FILE, own_checkpoints, write_atomically
from ..data.tokens import IGNORED, Batch, TokenSequence, pad_sequences
from ..distributed import told_plainly
from ..errors import InvalidPlanError, MissingDependencyError, NonFiniteError
from ..evaluation.likelihood import batch_nll
from ..model.forward import evaluating
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy
from ..utils import logger, progress
from .lora_settings import LoraSettings, default_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


EPOCHS, MOST_STEPS = 30, 1000  # the default number of steps: so many epochs, at most so many
CHECKS = 20  # times in a training that held-out loss is measured and a checkpoint written


def train_lora(
    stack: LayerStack,
    removed: Sequence[int],
    pruned: Any,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[TokenSequence],
    held_out: Sequence[Batch],
    settings: LoraSettings,
    key: str,
) -> tuple[Any, dict[str, Any]]:
    """See `healing.heal_lora`; `key` says which training a checkpoint belongs to."""
    peft = _require_peft()
    flags = [
        (parameter, parameter.requires_grad)
        for model in (stack.model, pruned)
        for parameter in model.parameters()
    ]
    steps = settings.steps or min(MOST_STEPS, EPOCHS * -(-len(train) // settings.batch_size))
    with _seeds_kept(settings.seed), _quiet(), _folder(settings.checkpoints) as folder:
        try:
            config = peft.LoraConfig(
                r=settings.rank,
                lora_alpha=2 * settings.rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
                fan_in_fan_out=any(isinstance(module, Conv1D) for module in pruned.modules()),
            )
            student = peft.get_peft_model(share_copy(pruned), config)
            student.peft_config["default"].base_model_name_or_path = None  # not to be looked up
            arguments = _arguments(student, steps, settings)
            arguments.output_dir = _agreed(str(folder))
            with arguments.main_process_first():
                start = _claim(Path(arguments.output_dir), f"{key}:{settings.identity()}")
            trainer = _Recovery(
                model=student,
                args=arguments,
                train_dataset=list(train),
                data_collator=_Collator(tokenizer),
                callbacks=[EarlyStoppingCallback(settings.patience), _Bar()],
                teacher=stack,
                removed=removed,
                held_out=held_out,
                settings=settings,
            )
            trainer.remove_callback(PrinterCallback)
            with told_plainly():
                trainer.train(resume_from_checkpoint=start)
                trainer.accelerator.wait_for_everyone()  # the best state is in the folder
            state = trainer.state
            outcome = {"steps": state.global_step, "best_step": state.best_global_step}
            merged = _merged(student)
            if hasattr(pruned.config, "use_cache"):  # the trainer switches it off
                merged.config.use_cache = pruned.config.use_cache
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
    for parameter, twin in zip(merged.parameters(), pruned.parameters(), strict=True):
        parameter.requires_grad_(twin.requires_grad)
    return merged.eval(), outcome


class _Recovery(Trainer):
    """A trainer whose loss is the distance from the full model, and whose evaluation is the NLL."""

    def __init__(
        self,
        *,
        teacher: LayerStack,
        removed: Sequence[int],
        held_out: Sequence[Batch],
        settings: LoraSettings,
        **options: Any,
    ) -> None:
        super().__init__(eval_dataset=held_out, **options)
        self.model_accepts_loss_kwargs = False  # our loss is a mean already
        self._teacher, self._held_out, self._settings = teacher, held_out, settings
        kept = [index for index in range(len(teacher)) if index not in set(removed)]
        # For each kept layer the full model's layer after which the stream should be the same.
        self._ends = [index - 1 for index in [*kept[1:], len(teacher)]]

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Mean over real (or scored) tokens, in nats, and the hidden states' part."""
        settings = self._settings
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        states: dict[int, torch.Tensor] = {}
        with ExitStack() as observing:
            if settings.hidden_weight:
                inner = self.accelerator.unwrap_model(model).get_base_model()
                own = LayerStack(inner, self._teacher.paths[0])
                observing.enter_context(own.observe(_keep(states)))
            found = model(**given, use_cache=False).logits
        if settings.target == "text":
            scored = inputs["labels"][:, 1:] != IGNORED
            labels = inputs["labels"][:, 1:][scored]
            loss = cross_entropy(found[:, :-1][scored].float(), labels)
        else:
            targets: dict[int, torch.Tensor] = {}
            with ExitStack() as observing:
                observing.enter_context(evaluating(self._teacher.model))
                if settings.hidden_weight:
                    observing.enter_context(self._teacher.observe(_keep(targets)))
                wanted = self._teacher.model(**given, use_cache=False).logits
            real = given["attention_mask"].bool()
            target = wanted[real].to(found.device).float().log_softmax(-1)
            output = found[real].float().log_softmax(-1)
            loss = (target.exp() * (target - output)).sum(-1).mean()
            if settings.hidden_weight:
                pairs = [(states[place], targets[end]) for place, end in enumerate(self._ends)]
                distances = [_distance(*pair, real).to(loss.device) for pair in pairs]
                loss = loss + settings.hidden_weight * torch.stack(distances).mean()
        if not torch.isfinite(loss):
            raise NonFiniteError(self._advice(f"loss became {loss.item()}"))
        return loss

    def _advice(self, what: str) -> str:
        return (
            f"Healing: {what} at step {self.state.global_step}. Lower the learning rate (it is "
            f"{self.args.learning_rate:.2g}), or load the model in float32."
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss in nats per scored token; the same in every process."""
        model: Any = self.model
        try:
            metrics = {"eval_loss": batch_nll(model, self._held_out)}
        except NonFiniteError as error:
            raise NonFiniteError(self._advice("held-out loss is not finite")) from error
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _keep(states: dict[int, torch.Tensor]) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
    def keep(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        states[index] = leaving

    return keep


def _distance(found: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Squared distance relative to the wanted state's size, averaged over real tokens."""
    target = wanted.to(found.device)[real.to(found.device)].float()
    gap = found[real.to(found.device)].float() - target
    return (gap.square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)).mean()


class _Collator:
    """Rows to a padded batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
        (batch,) = pad_sequences(self._tokenizer, rows, len(rows))
        return {**batch.inputs(), "labels": batch.labels}


class _Bar(TrainerCallback):
    """Our progress bar, and a line for every check."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = range(state.global_step, state.max_steps)
        self._bar: Iterator[int] = iter(progress(left, "Healing (lora)"))
        next(self._bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(self._bar, None)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        logger.info("Step %d of %d: held-out loss %.4f", state.global_step, state.max_steps, loss)


def _arguments(student: Any, steps: int, settings: LoraSettings) -> TrainingArguments:
    weight = next(student.parameters())
    precision = _precision(weight, settings.precision)
    every = max(1, steps // CHECKS)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # the real one is set by the caller
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate or default_rate(student.config),
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=settings.seed,
        use_cpu=weight.device.type == "cpu",
        restore_callback_states_from_checkpoint=True,  # how often in a row it was no better
        bf16=precision == "bf16",
        fp16=precision == "fp16",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one device a process; never nn.DataParallel
    spread = getattr(student, "hf_device_map", None)
    if not spread and weight.device.type == "cuda" and weight.device != arguments.device:
        raise InvalidPlanError(
            f"heal='lora' trains on {arguments.device}, and the model is on {weight.device}: make "
            f"that the first device, CUDA_VISIBLE_DEVICES={weight.device.index}."
        )
    return arguments


def _precision(weight: torch.Tensor, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return "no"
    old_gpu = weight.device.type == "cuda" and not torch.cuda.is_bf16_supported()
    return "fp16" if old_gpu else "bf16"


def _merged(student: Any) -> Any:
    """The student without adapters, their weights in those they adapted: copies, not the shared."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in student.modules():
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()  # a map, or experts whose tensors are adapted
            for name, weight in base.named_parameters(recurse=False):
                setattr(base, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return student.merge_and_unload(safe_merge=True)


def _require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "heal='lora' needs peft: pip install 'llm_pruner[heal]'."
        ) from error
    return peft


# --- checkpoints ------------------------------------------------------------------------------
@contextmanager
def _folder(checkpoints: str | Path | None) -> Iterator[Path]:
    """Where checkpoints go; a folder of its own for this run if none is named."""
    if checkpoints is not None:
        path = Path(checkpoints)
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _agreed(folder: str) -> str:
    """The folder of the first process, where there are several."""
    from accelerate.utils import broadcast_object_list

    return str(broadcast_object_list([folder])[0])


def _claim(folder: Path, key: str) -> str | None:
    """Make a folder this training's, and return the checkpoint it goes on from, if any.

    Checkpoints of another training are deleted, and those that were cut short: a checkpoint is
    whole when its ``trainer_state.json`` is, which is written last.

    Raises:
        OutputError: the folder holds something else.
    """
    mark = folder / KEY_FILE
    found = own_checkpoints(folder)
    own = mark.exists() and mark.read_text(encoding="utf-8") == key
    last = None
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            whole = True
        except (OSError, ValueError):
            whole = False
        if own and whole:
            last = str(path)
        else:
            shutil.rmtree(path)
    write_atomically(mark, key)
    if last:
        logger.info("Going on from %s", last)
    return last


# --- what is borrowed -------------------------------------------------------------------------
@contextmanager
def _seeds_kept(seed: int) -> Iterator[None]:
    """Seeded inside the block; the caller's random states are back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """The trainer's notes are not the user's, nor are its warnings about names it still uses."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
