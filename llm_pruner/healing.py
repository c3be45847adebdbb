"""Repairing a pruned model: closed form or LoRA distillation, gated by held-out loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from .batching import Batch, EvalItem
from .data import split_items
from .errors import (
    InvalidDataError,
    InvalidPlanError,
    MissingDependencyError,
    NonFiniteError,
    UnsupportedModelError,
)
from .layers import LayerStack
from .likelihood import batch_nll, encode_for, evaluating
from .utils import logger, progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Heal = Literal["none", "linear", "lora"]
HELD_OUT = 0.4  # share of the healing data that is not trained on: half tunes, half judges
RIDGES = (1e-5, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in units of the mean eigenvalue of the Gram matrix
LORA_EPOCHS = 30
LORA_MAX_STEPS = 1000


@dataclass(frozen=True)
class _Data:
    train: list[Batch]
    tune: list[Batch]  # chooses the ridge, or the state of the adapters
    gate: list[Batch]  # judges the outcome


def heal_model(
    stack: LayerStack,
    removed: Sequence[int],
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heal: Heal,
    heal_data: Sequence[EvalItem] | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Repair `pruned` by the method `heal`, and keep the repair only if held-out loss falls.

    Two fifths of `heal_data` are held out from the repair: one chooses its strength, the other
    judges the outcome and has no other part in it. The original model and
    the weights `pruned` shares with it are never changed: repaired weights are copies.

    Args:
        stack: the layers of the original model, the teacher.
        removed: the 0-based layers that `pruned` lacks.
        pruned: the pruned model, from ``stack.remove(removed)``.
        tokenizer: the model's tokenizer.
        heal: ``none``, ``linear`` (`heal_linear`) or ``lora`` (`heal_lora`).
        heal_data: items to repair with.

    Returns:
        The healed model (`pruned` itself if nothing helped), and the record: ``method``,
        held-out losses ``full``, ``cut`` and ``healed`` (nats per token), ``accepted``.

    Raises:
        InvalidPlanError: unknown method.
        InvalidDataError: no data, or too little to hold some out.
        UnsupportedModelError: the architecture cannot be healed this way.
    """
    if heal not in get_args(Heal):
        raise InvalidPlanError(f"heal={heal!r} must be one of {', '.join(get_args(Heal))}.")
    if heal == "none":
        return pruned, {"method": "none"}
    if not heal_data:
        raise InvalidDataError(
            f"heal={heal!r} needs heal_data: pass items (prompt and reference, or text) other "
            "than those the layers were chosen on."
        )
    train, held_out = split_items(list(heal_data), 1 - HELD_OUT)
    tune, gate = split_items(held_out, 0.5)
    data = _Data(*(encode_for(stack.model, tokenizer, part) for part in (train, tune, gate)))
    method = heal_linear if heal == "linear" else heal_lora
    full, cut = batch_nll(stack.model, data.gate), batch_nll(pruned, data.gate)
    candidate = method(stack, removed, pruned, data.train, data.tune)
    healed = batch_nll(candidate, data.gate)
    accepted = healed < cut
    logger.info("Held-out loss: full %.4f, cut %.4f, healed %.4f", full, cut, healed)
    if not accepted:
        logger.warning("Healing did not lower the held-out loss and was rolled back.")
    record = {"method": heal, "full": full, "cut": cut, "healed": healed, "accepted": accepted}
    return (candidate if accepted else pruned), record


def heal_linear(
    stack: LayerStack,
    removed: Sequence[int],
    pruned: PreTrainedModel,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
) -> PreTrainedModel:
    """Stand a least-squares map in for every removed block, folded into existing weights.

    For each block, from the bottom up on the already repaired stream: M is what the last linear
    map of the layer before the cut adds, x the stream after it, t the stream the full model has
    after the block. D = (M'M + a I)^-1 M'(t - x) minimises |M D - (t - x)|^2 + a |D|^2, and the
    linear map W becomes W (I + D): no parameter is added. Sums are float64 over real tokens; the
    ridge a is the one of `RIDGES` with the lowest held-out loss, or no repair if none helps.

    Source: ReplaceMe (Shopkhoev et al., arXiv:2505.02819), section 3; departures: the ridge pulls
    towards the identity rather than zero, and is chosen on held-out text.

    Raises:
        UnsupportedModelError: no linear map whose output is added to the stream precedes a cut.
    """
    healed = _copy_model(pruned)
    kept = [index for index in range(len(stack)) if index not in set(removed)]
    for block in _blocks(removed):
        position = sum(index < block[0] for index in kept) - 1
        if position < 0:
            raise UnsupportedModelError(
                "heal='linear' needs a layer before the first cut; layer 0 was removed. Protect "
                "it, or use heal='lora'."
            )
        healed_stack = LayerStack(healed, stack.paths[0])
        linear = _adding_linear(healed_stack, position)
        gram, cross = _regression_sums(stack, healed_stack, position, block[-1], linear, train)
        _fold_best(healed, linear, gram, cross, held_out)
    return healed


def heal_lora(
    stack: LayerStack,
    removed: Sequence[int],
    pruned: PreTrainedModel,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
) -> PreTrainedModel:
    """Train LoRA adapters on the pruned model to match the full model, then merge them.

    The loss is the Kullback-Leibler divergence from the full model's next-token distribution,
    averaged over all real tokens (nats). The teacher is the original model itself, whose kept
    weights the student shares: there is no second copy. Adapters sit on every linear map of the
    layers (peft, rank 16); the state with the lowest held-out loss is the one merged.

    Raises:
        MissingDependencyError: peft is not installed.
        NonFiniteError: the loss became NaN.
    """
    del removed  # the cut is already made
    peft = _require_peft()
    flags = [(parameter, parameter.requires_grad) for parameter in stack.model.parameters()]
    torch.manual_seed(0)
    try:
        student = peft.get_peft_model(
            _copy_model(pruned),
            peft.LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        best = _distil(stack.model, student, train, held_out)
        peft.set_peft_model_state_dict(student, best)
        _own_adapted_weights(student)
        merged = student.merge_and_unload()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    merged.eval()
    for parameter, twin in zip(merged.parameters(), pruned.parameters(), strict=True):
        parameter.requires_grad_(twin.requires_grad)
    assert isinstance(merged, nn.Module)
    return merged  # type: ignore[return-value]


def _require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "heal='lora' needs peft: pip install 'llm_pruner[heal]'."
        ) from error
    return peft


def _distil(
    teacher: nn.Module, student: Any, train: Sequence[Batch], held_out: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """Train the student's adapters; return the adapter state with the lowest held-out loss."""
    from peft import get_peft_model_state_dict
    from transformers import get_cosine_schedule_with_warmup

    device = next(teacher.parameters()).device
    steps = min(LORA_MAX_STEPS, LORA_EPOCHS * len(train))
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    order = torch.Generator().manual_seed(0)
    best, state = math.inf, get_peft_model_state_dict(student)
    for step in progress(range(steps), "Healing (LoRA)", total=steps):
        pick = int(torch.randint(len(train), (), generator=order))
        loss = _divergence(teacher, student, train[pick].to(device))
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The healing loss became {loss.item()} at step {step}: load the model in float32."
            )
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 10) == 0:
            held = batch_nll(student, held_out)
            if held < best:
                best, state = held, copy.deepcopy(get_peft_model_state_dict(student))
            student.train()
    adapters: dict[str, torch.Tensor] = state
    return adapters


def _divergence(teacher: Any, student: Any, batch: Batch) -> torch.Tensor:
    """KL(teacher || student) per real token, in nats."""
    with torch.no_grad():
        target = teacher(**batch.inputs(), use_cache=False).logits.float().log_softmax(-1)
    output = student(**batch.inputs(), use_cache=False).logits.float().log_softmax(-1)
    per_token = (target.exp() * (target - output)).sum(-1)
    real = batch.attention_mask.bool()
    mean: torch.Tensor = per_token[real].mean()
    return mean


def _copy_model(pruned: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree that shares every tensor."""
    tensors = [*pruned.parameters(), *pruned.buffers()]
    return copy.deepcopy(pruned, {id(tensor): tensor for tensor in tensors})


def _own_adapted_weights(student: nn.Module) -> None:
    """Copy the weights that adapters will be merged into: the full model uses them too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in student.modules():
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


def _blocks(removed: Sequence[int]) -> list[list[int]]:
    """Runs of consecutive indices, ascending."""
    runs: list[list[int]] = []
    for index in sorted(removed):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _adding_linear(stack: LayerStack, position: int) -> nn.Module:
    """The last linear map of a layer whose output is added to the stream unchanged.

    Found by trial: what is added to the map's output must reappear in the layer's output, and
    nothing else change.
    """
    from transformers.pytorch_utils import Conv1D

    layer = stack[position]
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]
    for linear in reversed(linears):
        if _is_added(stack, position, linear):
            return linear
    raise UnsupportedModelError(
        f"heal='linear' is not for {type(stack.model).__name__}: no linear map of layer "
        f"{position} is added to the hidden state directly (experts or a norm in between). "
        "Use heal='lora'."
    )


def _is_added(stack: LayerStack, position: int, linear: nn.Module) -> bool:
    outputs: list[torch.Tensor] = []
    shifts = iter((0.0, 1.0))

    def nudge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + next(shifts, math.nan)

    def keep(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        if index == position:
            outputs.append(leaving)

    ids = torch.tensor([[0, 1]], device=stack.device)
    handle = linear.register_forward_hook(nudge)
    try:
        with evaluating(stack.model), stack.observe(keep):
            for _ in range(2):
                stack.model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    change = outputs[1].float() - outputs[0].float()
    return bool((change - 1.0).abs().max() < 1e-2)


def _regression_sums(
    teacher: LayerStack,
    student: LayerStack,
    position: int,
    last_removed: int,
    linear: nn.Module,
    batches: Sequence[Batch],
) -> tuple[torch.Tensor, torch.Tensor]:
    """M'M and M'(t - x) over all real tokens, float64, each (hidden, hidden)."""
    gram: torch.Tensor | float = 0.0
    cross: torch.Tensor | float = 0.0
    seen: dict[str, torch.Tensor] = {}

    def keep_added(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen["added"] = output

    def keep_stream(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        if index == position:
            seen["stream"] = leaving

    def keep_target(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        if index == last_removed:
            seen["target"] = leaving

    with _hooked(linear, keep_added), evaluating(teacher.model), evaluating(student.model):
        for batch in progress(batches, "Healing (linear)"):
            batch = batch.to(teacher.device)
            with teacher.observe(keep_target):
                teacher.model(**batch.inputs(), use_cache=False)
            with student.observe(keep_stream):
                student.model(**batch.inputs(), use_cache=False)
            real = batch.attention_mask.bool()
            added, stream, target = (
                seen[name].to(real.device)[real].double() for name in ("added", "stream", "target")
            )
            gram = gram + added.T @ added
            cross = cross + added.T @ (target - stream)
    assert isinstance(gram, torch.Tensor)
    assert isinstance(cross, torch.Tensor)
    return gram, cross


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _fold_best(
    model: nn.Module,
    linear: Any,
    gram: torch.Tensor,
    cross: torch.Tensor,
    held_out: Sequence[Batch],
) -> None:
    """Fold the map with the best ridge into `linear`, or leave it if none lowers the loss."""
    weight, bias = linear.weight.data, linear.bias.data if linear.bias is not None else None
    linear.weight = nn.Parameter(weight, linear.weight.requires_grad)  # no longer the full model's
    if bias is not None:
        linear.bias = nn.Parameter(bias, linear.bias.requires_grad)
    best, chosen = batch_nll(model, held_out), (weight, bias)
    scale = gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for ridge in RIDGES:
        update = identity + torch.linalg.solve(gram + ridge * scale * identity, cross)
        linear.weight.data = _times(weight, update, isinstance(linear, nn.Linear))
        if bias is not None:
            linear.bias.data = (bias.double() @ update).to(bias.dtype)
        loss = batch_nll(model, held_out)
        if loss < best:
            best = loss
            chosen = (linear.weight.data, linear.bias.data if bias is not None else None)
    linear.weight.data = chosen[0]
    if bias is not None:
        linear.bias.data = chosen[1]


def _times(weight: torch.Tensor, update: torch.Tensor, rows_are_outputs: bool) -> torch.Tensor:
    """The weight of a linear map that is followed by x -> x @ update.

    A Linear's weight is (out, in), a Conv1D's (in, out).
    """
    wide = weight.double()
    product = update.T @ wide if rows_are_outputs else wide @ update
    return product.to(weight.dtype)
