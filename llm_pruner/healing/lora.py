"""Healing by training: low-rank adapters, or all weights of the layers, learn from the full model.

Import this module only where it is used: `transformers.Trainer` is slow to load.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from ..atomic_output import claim_checkpoints
from ..data.tokens import IGNORED, TokenSequence, pad_sequences
from ..distributed import lost_process_errors, on_first
from ..errors import (
    InvalidPlanError,
    MissingDependencyError,
    NonFiniteError,
    UnsupportedModelError,
)
from ..evaluation.likelihood import batch_nll
from ..evaluation.token_measures import Divergence
from ..model.forward import evaluating
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy, trainable_copy, with_trained
from ..progress import Progress, duration
from ..utils import logger
from .job import HealingJob, Pace
from .lora_settings import STEP_RUNS, default_rate, default_steps, full_rate

RATES = {"lora": default_rate, "full": full_rate}
TRAINED_FILE = "trained.safetensors"  # in a training checkpoint
KEPT = 2  # training checkpoints: the last and the best
CHECKS = 20  # times at most that a training measures the validation loss and writes a checkpoint


def heal_lora(job: HealingJob, pruned: Any) -> tuple[Any, dict[str, Any]]:
    """Train LoRA adapters on the pruned model to match the full model, then merge them.

    The loss is the Kullback-Leibler divergence of the student's next-token distribution from the
    full model's, averaged over all real tokens (nats); see `LoraSettings` for others. The teacher
    is the original model itself, whose kept weights the student shares: there is no second copy.
    Adapters (peft) sit on every linear map of the layers. The state with the lowest validation
    loss is merged, and training stops early when that loss stops falling.

    Several processes each train on their portion of the batches and return the same model.

    Returns:
        The healed model, and ``steps`` done and ``best_step``.

    Raises:
        MissingDependencyError: peft is not installed.
        NonFiniteError: the loss became NaN or infinite.
        InvalidPlanError: the model is on a device that the trainer does not use.
        UnsupportedModelError: peft cannot adapt the architecture.
        OutputError: the folder for training checkpoints holds something else, or its disk has too
            little room.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "heal='lora' needs peft: pip install 'llm_pruner[heal]'."
        ) from error
    return _train(job, pruned, "lora", _with_adapters, _merged)


def heal_full(job: HealingJob, pruned: Any) -> tuple[Any, dict[str, Any]]:
    """Train all weights of the pruned model's layers to match the full model.

    As `heal_lora`, without adapters: the student has weights of its own, in float32, and a step
    changes all of them. It learns faster, and takes more memory: besides the layers in float32 as
    much again for their gradients and twice as much for the optimiser. Embeddings and head stay as
    they are.

    Returns:
        The healed model, its weights of the types they had, and ``steps`` done and ``best_step``.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        InvalidPlanError: the model is on a device that the trainer does not use.
        UnsupportedModelError: the weights are quantised.
        OutputError: the folder for training checkpoints holds something else, or its disk has too
            little room.
    """
    return _train(job, pruned, "full", _with_own_weights, partial(with_trained, pruned))


def _train(
    job: HealingJob,
    pruned: Any,
    method: str,
    student_of: Callable[[HealingJob, Any], Any],
    result_of: Callable[[Any], Any],
) -> tuple[Any, dict[str, Any]]:
    """Make a student of `pruned`, train what it has to train, and make a plain model of it."""
    from accelerate.utils import broadcast_object_list

    settings = job.lora
    timed = job.deadline < math.inf
    steps = settings.steps or default_steps(len(job.train), settings.batch_size, timed)
    trainable = [parameter.requires_grad for parameter in pruned.parameters()]
    keep = settings.checkpoints is not None
    output = nullcontext(str(settings.checkpoints)) if keep else tempfile.TemporaryDirectory()
    with _trainer_contained(settings.seed), output as folder:
        try:
            student = student_of(job, pruned)
            arguments = _arguments(student, steps, job, folder, method)
            arguments.output_dir = str(broadcast_object_list([folder])[0])  # the first process's
            with arguments.main_process_first():
                key = f"{job.key}:{method}:{settings.identity()}"
                trained = sum(one.nbytes for one in student.parameters() if one.requires_grad)
                need = (KEPT + 1) * 3 * trained  # with the optimiser's two states
                resumed = claim_checkpoints(Path(arguments.output_dir), key, need)
            trainer = DistillationTrainer(job, student, arguments, method)
            with lost_process_errors(), closing(trainer.progress):
                trainer.train(resume_from_checkpoint=resumed)
                trainer.accelerator.wait_for_everyone()  # the best state is in the folder
            healed = result_of(student)
        finally:  # those that are not trained were frozen
            for parameter, flag in zip(pruned.parameters(), trainable, strict=True):
                parameter.requires_grad_(flag)
    for parameter, flag in zip(healed.parameters(), trainable, strict=True):
        parameter.requires_grad_(flag)
    if hasattr(pruned.config, "use_cache"):  # which the trainer switches off
        healed.config.use_cache = pruned.config.use_cache
    state = trainer.state
    return healed.eval(), {"steps": state.global_step, "best_step": state.best_global_step}


def _with_adapters(job: HealingJob, pruned: Any) -> Any:
    """A student that shares all weights with `pruned`, frozen, and has adapters."""
    import peft

    config = peft.LoraConfig(
        r=job.lora.rank,
        lora_alpha=2 * job.lora.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in pruned.modules()),
    )
    try:
        student = peft.get_peft_model(share_copy(pruned), config)
    except ValueError as error:  # peft refuses Mamba, for one
        raise UnsupportedModelError(
            f"heal='lora' is not for {type(pruned).__name__}: {error} Use heal='linear' or 'full'."
        ) from error
    student.peft_config["default"].base_model_name_or_path = None  # not to be looked up
    return student


def _with_own_weights(job: HealingJob, pruned: Any) -> Any:
    weights = list(pruned.parameters())
    if kinds := {str(weight.dtype) for weight in weights if not weight.is_floating_point()}:
        raise UnsupportedModelError(
            f"heal='full' trains all weights, and these are quantised ({', '.join(kinds)}): use "
            "heal='lora', or the checkpoint that they were made from."
        )
    return trainable_copy(pruned, job.layers_of(pruned))


class DistillationTrainer(Trainer):
    """Trains on the distance from the full model; evaluates the validation loss."""

    def __init__(
        self, job: HealingJob, student: Any, arguments: TrainingArguments, method: str
    ) -> None:
        data: dict[str, Any] = {"train_dataset": job.train, "eval_dataset": job.validation}
        self._pace = Pace(job, arguments.max_steps)
        self.progress = _Progress(self._pace, method)
        callbacks = [EarlyStoppingCallback(job.lora.patience), self.progress, _Deadline(job)]
        super().__init__(student, arguments, self._collate, callbacks=callbacks, **data)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # our loss is a mean already
        self._job, self._first, self._start = job, 0, math.inf
        # For each kept layer, the full model's layer whose output it should reproduce.
        self._teachers = [index - 1 for index in [*job.kept[1:], len(job.stack)]]

    def _collate(self, rows: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
        (batch,) = pad_sequences(self._job.tokenizer, rows, len(rows))
        return {**batch.inputs(), "labels": batch.labels}

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Mean over real (or scored) tokens, in nats, plus the weighted hidden-state distance."""
        teacher, settings = self._job.stack, self._job.lora
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        weight = settings.hidden_weight
        own = self.accelerator.unwrap_model(model)
        own = own.get_base_model() if hasattr(own, "get_base_model") else own
        logits, states = _forward(model, given, self._job.layers_of(own) if weight else None)
        if settings.target == "text":
            labels = inputs["labels"][:, 1:]
            scored = labels != IGNORED
            loss = cross_entropy(logits[:, :-1][scored].float(), labels[scored])
        else:
            with evaluating(teacher.model):
                wanted, targets = _forward(teacher.model, given, teacher if weight else None)
            real = given["attention_mask"].bool()
            compared = logits, wanted.to(logits.device), real
            loss = Divergence.apply(*compared)  # type: ignore[no-untyped-call]
            if weight:
                pairs = [(states[index], targets[end]) for index, end in enumerate(self._teachers)]
                distances = [_distance(*pair, real).to(loss.device) for pair in pairs]
                loss = loss + weight * torch.stack(distances).mean()
        if not torch.isfinite(loss):
            raise self._not_finite(f"loss became {loss.item()}")
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A training that has a time limit learns as one planned for that time, see `Pace`."""
        own: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(own, self._pace.rate)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One pass forwards and backwards; notes when the first one began, and at which step."""
        if self._start == math.inf:
            self._first, self._start = self.state.global_step, time.monotonic()
        return super().training_step(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained, and nothing else."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: weight.detach() for name, weight in self._trained()}
        save_file(tensors, folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / TRAINED_FILE)
        with torch.no_grad():
            for name, weight in self._trained():
                weight.copy_(tensors[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        own = self.accelerator.unwrap_model(self.model)
        return ((name, one) for name, one in own.named_parameters() if one.requires_grad)

    def _not_finite(self, what: str) -> NonFiniteError:
        return NonFiniteError(
            f"Healing: {what} at step {self.state.global_step}. Lower the learning rate (it is "
            f"{self.args.learning_rate:.2g}), or load the model in float32."
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss in nats per scored token; the same in every process."""
        model: Any = self.model
        try:
            loss = batch_nll(model, self._job.validation)
        except NonFiniteError as error:
            raise self._not_finite("validation loss is not finite") from error
        state, metrics = self.state, {"eval_loss": loss}
        done, rest = state.global_step - self._first, state.max_steps - state.global_step
        left = (time.monotonic() - self._start) / max(1, done) * rest
        left = min(left, self._job.seconds_left)
        note = f"; {duration(left)} left" if done > 0 and rest else ""
        where = f"Step {state.global_step} of {state.max_steps}"
        logger.info("%s: validation loss %.4f%s", where, loss, note)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, state, self.control, metrics)
        return metrics


def _forward(
    model: Any, given: dict[str, torch.Tensor], observed: LayerStack | None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits, and by layer the hidden state after each of the observed layers."""
    states: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        if observed is not None:
            hooks.enter_context(observed.observe(lambda i, _, after: states.update({i: after})))
        return model(**given, use_cache=False).logits, states


def _distance(state: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Squared distance relative to the wanted state's size, averaged over real tokens."""
    real = real.to(state.device)
    target = wanted.to(state.device)[real].float()
    gap = state[real].float() - target
    return (gap.square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)).mean()


class _Progress(TrainerCallback):
    """Our progress bar instead of the trainer's."""

    def __init__(self, pace: Pace, method: str) -> None:
        self._pace, self._method, self._open = pace, method, ExitStack()

    def close(self) -> None:
        """End the bar, whatever has become of the training."""
        self._open.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._done = self._pace.share(state.global_step)
        bar = Progress(f"Healing ({self._method})", 1 - self._done, counts=False)
        self._bar = self._open.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before, self._done = self._done, self._pace.share(state.global_step)
        self._bar.advance(self._done - before)


class _Deadline(TrainerCallback):
    """Ends a training that has a time limit, with a last check and checkpoint, before it is up."""

    def __init__(self, job: HealingJob) -> None:
        self._job, self._checking = job, 0.0  # seconds that the last check took

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._before = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        step, self._before = now - self._before, now
        if self._job.deadline < math.inf and on_first(
            lambda: self._job.seconds_left < step + self._checking
        ):
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._checking, self._before = time.monotonic() - self._before, time.monotonic()


def _between_checks(job: HealingJob, steps: int) -> int:
    """Steps from one check to the next: a check may take about a fifth of the time, no more.

    A token costs a step four to five times what it costs a check, see `STEP_RUNS`.
    """
    check = sum(int(batch.attention_mask.sum()) for batch in job.validation)
    length = sum(len(row.ids) for row in job.train) / len(job.train)
    step = length * job.lora.batch_size * job.lora.accumulate
    return max(1, steps // CHECKS, min(steps, round(check / step)))


def _likely_steps(job: HealingJob, pruned: Any) -> int:
    """Steps that the time suffices for, judged by a pass over one batch; one at least."""
    batch_size = job.lora.batch_size
    (batch,) = pad_sequences(job.tokenizer, job.train[:batch_size], batch_size)
    with evaluating(pruned):
        start = time.monotonic()
        pruned(**batch.to(job.stack.device).inputs(), use_cache=False)
        step = STEP_RUNS * (time.monotonic() - start) * job.lora.accumulate
    return max(1, int(job.seconds_left / step))


def _arguments(
    student: Any, steps: int, job: HealingJob, folder: str, method: str
) -> TrainingArguments:
    settings, likely = job.lora, steps
    if job.deadline < math.inf:
        likely = min(steps, on_first(lambda: _likely_steps(job, student)))
    every = _between_checks(job, likely)
    weight = next(student.parameters())
    precision = settings.precision
    if precision == "auto":
        half = next(job.stack.model.parameters()).dtype in (torch.float16, torch.bfloat16)
        old_gpu = weight.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        mixed = half or (weight.device.type == "cpu" and _mixes_on_cpu(student))
        precision = ("fp16" if old_gpu else "bf16") if mixed else "no"
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate or RATES[method](student.config, likely),
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=KEPT,
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
        restore_callback_states_from_checkpoint=True,  # the count of checks without improvement
        bf16=precision == "bf16",
        fp16=precision == "fp16",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one device a process; never nn.DataParallel
    spread = getattr(student, "hf_device_map", None)
    if not spread and weight.device.type == "cuda" and weight.device != arguments.device:
        raise InvalidPlanError(
            f"heal={method!r} trains on {arguments.device}, but the model is on {weight.device}: "
            f"make that the first device, CUDA_VISIBLE_DEVICES={weight.device.index}."
        )
    return arguments


def _mixes_on_cpu(model: Any) -> bool:
    """Whether this CPU computes in bfloat16 itself, and the model runs with it mixed in."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    ids = torch.tensor([[0, 1]])
    try:
        with evaluating(model), torch.autocast("cpu", torch.bfloat16):
            return bool(model(input_ids=ids, use_cache=False).logits.isfinite().all())
    except RuntimeError:  # some models put float32 and what they have computed together
        return False


def _merged(student: Any) -> Any:
    """The student with its adapters merged into copies of the weights, which others share."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in student.modules():
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()  # a linear map, or experts in one tensor
            for name, weight in base.named_parameters(recurse=False):
                setattr(base, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return student.merge_and_unload(safe_merge=True)


@contextmanager
def _trainer_contained(seed: int) -> Iterator[None]:
    """Seed torch, silence the trainer, and restore the random states and the log level."""
    states = random.getstate(), np.random.get_state()
    verbosity = transformers_logging.get_verbosity()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names the trainer itself uses
        transformers_logging.set_verbosity(logging.ERROR)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            transformers_logging.set_verbosity(verbosity)
