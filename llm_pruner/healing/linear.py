"""Healing without training: least-squares updates of what writes to the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn

from ..data.tokens import Batch
from ..errors import NonFiniteError, UnsupportedModelError
from ..evaluation.likelihood import batch_nll
from ..model.bypass import hidden_out
from ..model.forward import HINT
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy
from ..progress import progress
from ..utils import logger
from .job import HealingJob
from .residual_writers import Writer, find_writers, gain_slope, hooked, run_layers

# Ridge strengths to choose from, in units of the mean of the Gram matrix's diagonal.
RIDGES = (1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
NEGLIGIBLE = 1e-12  # deviation, relative to the residual stream's size, that needs no update


def heal_linear(job: HealingJob, pruned: Any) -> tuple[Any, dict[str, Any]]:
    """Bring the residual stream back to the full model's, in every layer from the first cut on.

    From the bottom up, every part that a kept layer adds to the residual stream (see
    `residual_writers`) is refitted on the stream as the layers healed below leave it. With h the
    input of the linear map that makes the part (a constant 1 appended if it has a bias), x the
    stream after the part, and t the full model's stream there, D = (H'QH + a I)^-1 H'Q(T - X)
    minimises sum_i q_i |D'h_i - (t_i - x_i)|^2 + a |D|^2. The map's weight becomes W + D': no
    parameter is added. The last part of a layer before a cut gets the stream after the removed
    block as its t, so it learns to do the block's work; all others correct what is left of the
    deviation. Where a norm makes the part (sandwich norms), its gain is refitted per channel.

    Sums are float64 over real tokens, one layer's at a time. A token weighs q = 1 / |t|^2, since
    whatever reads the stream normalises it. The ridge a is the one of `RIDGES` with the smallest
    error on the validation tokens; a layer that does not lower the validation loss is restored.

    Source: ReplaceMe (Shopkhoev et al., arXiv:2505.02819), section 3, which fits one map on the
    output of the feed-forward part before one cut. Departures: the map is fitted on the input of
    that part's last linear map, which is more expressive; every layer above is fitted too; tokens
    are weighted; the ridge pulls towards no change, and is chosen on validation tokens.

    Args:
        job: fits on ``train`` and chooses the ridge on ``validation``. The states of all their
            tokens at one layer of either model are kept on the CPU.
        pruned: the pruned model; not changed.

    Returns:
        The healed model, which shares all other weights with `pruned`, and under ``layers`` a
        record per healed layer: ``layer`` (0-based, of the full model), ``parts`` (part -> ridge),
        ``error`` (what is left of the squared deviation on validation tokens), ``loss``
        (validation, nats per token), ``kept``.

    Raises:
        UnsupportedModelError: no layer from the cut on adds anything by a linear rule.
        NonFiniteError: the states are NaN or infinite.
    """
    healed = share_copy(pruned)
    layers, kept, cut = job.layers_of(healed), job.kept, min(job.removed)
    first = kept.index(cut - 1) if cut else 0
    writers = {index: find_writers(layers, index) for index in range(first, len(layers))}
    if not any(writer.tuned for parts in writers.values() for writer in parts):
        raise UnsupportedModelError(
            f"heal='linear' is not for {type(job.stack.model).__name__}: none of its layers from "
            f"{kept[first]} on adds to the residual stream by a linear map or a norm's gain "
            "(experts, or a norm after the sum). Use heal='lora'."
        )
    # For each layer of the pruned model: itself, and in the full model with the block cut above it.
    own = [(index, index) for index in range(len(layers))]
    with_block = [(a, b - 1) for a, b in pairwise([*kept, len(job.stack)])]
    pairs = [
        (_Run(job.stack, with_block, batches), _Run(layers, own, batches))
        for batches in (job.train_batches(), job.validation)
    ]
    loss = batch_nll(healed, job.validation)
    records: list[dict[str, Any]] = []
    for index in progress(range(first, len(layers)), "Healing (linear)"):
        before = [(module, dict(module._parameters)) for module in layers[index].modules()]
        parts: dict[str, float] = {}
        error = math.nan
        for writer in writers[index]:
            # Below the cut only the layer's last part has a deviation: the removed block's work.
            if writer.tuned and not (writer.later and kept[index] < cut):
                ridge, error = _refit(layers[index], index, writer, pairs)
                if ridge is not None:
                    parts[writer.part] = ridge
        if parts:
            after = batch_nll(healed, job.validation)
            fit = {"layer": kept[index], "parts": parts, "error": error}
            records.append({**fit, "loss": after, "kept": after < loss})
            note = "" if after < loss else ", undone"
            logger.info("Layer %d: validation loss %.4f%s", kept[index], after, note)
            if after < loss:
                loss = after
            else:
                for module, parameters in before:
                    module._parameters.update(parameters)
        for run in chain(*pairs):
            run.advance(index)
    return healed, {"layers": records}


class _Run:
    """A model on the same batches again and again, one layer of the pruned model after another.

    A layer of the pruned model spans one or more layers of `stack`, from a first to a last.
    """

    def __init__(
        self, stack: LayerStack, spans: Sequence[tuple[int, int]], batches: Sequence[Batch]
    ) -> None:
        _ = stack.can_replay  # tested by passes that no hook of ours may see
        self._stack, self._spans, self.batches = stack, spans, batches
        self._entering: list[torch.Tensor | None] = [None] * len(batches)

    def advance(self, index: int) -> None:
        """Keep what enters the layer after layer `index` of the pruned model."""
        for number in range(len(self.batches)):
            self._entering[number] = self._leaving(number, *self._spans[index]).cpu()

    def stream_after(self, writer: Writer, index: int, number: int) -> torch.Tensor:
        """The stream of a batch after one part of a layer; after its last part, of the span."""
        first, last = self._spans[index]
        later: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for other in writer.later:
                part = self._stack[first].get_submodule(other.part)
                collect = partial(
                    lambda by, m, a, out: later.append(by * hidden_out(out)), other.scale
                )
                hooks.enter_context(hooked(part, collect))
            stream = self._leaving(number, first, first if writer.later else last)
        for added in later:
            stream = stream - added.view_as(stream)
        return stream

    def _leaving(self, number: int, first: int, last: int) -> torch.Tensor:
        state = self._entering[number]
        state = state if state is None else state.to(self._stack.device)
        return run_layers(self._stack, self.batches[number], first, last, state)[1]


def _refit(
    layer: nn.Module, index: int, writer: Writer, pairs: Sequence[tuple[_Run, _Run]]
) -> tuple[float | None, float]:
    """Refit one part; the ridge and the fraction of the deviation left, or None and 1."""
    module: Any = layer.get_submodule(writer.tuned or "")
    is_map = module.weight.dim() == 2

    def features(entering: torch.Tensor) -> torch.Tensor:
        if not is_map:
            return writer.scale * gain_slope(module, entering)
        if module.bias is not None:
            entering = torch.cat([entering, torch.ones_like(entering[..., :1])], dim=-1)
        return writer.scale * entering

    def tokens(full: _Run, cut: _Run) -> Iterator[tuple[torch.Tensor, ...]]:
        for number, batch in enumerate(full.batches):
            seen: list[torch.Tensor] = []
            with hooked(module, lambda _, args, output, seen=seen: seen.append(features(args[0]))):
                stream = cut.stream_after(writer, index, number)
            target = full.stream_after(writer, index, number)
            real = batch.attention_mask.bool()
            home = "cpu" if stream.device.type == "mps" else stream.device  # where float64 exists
            entering, actual, wanted = (
                part[real.to(part.device)].to(home).double()
                for part in (seen[0].view(*real.shape, -1), stream, target)  # some layers flatten
            )
            deviation = wanted - actual
            if not deviation.isfinite().all():
                raise NonFiniteError(f"heal='linear': {HINT}")
            size = wanted.square().mean(-1, keepdim=True)
            yield entering, deviation, 1 / size.clamp(min=torch.finfo(torch.float32).tiny)

    train, validation = (_Sums(tokens(*pair), is_map) for pair in pairs)
    best: tuple[float | None, float] = None, 1.0
    if min(train.size, validation.size) < NEGLIGIBLE:
        return best
    for ridge in RIDGES:
        update = train.solve(ridge)
        if update is not None and (left := validation.error(update)) < best[1]:
            best, chosen = (ridge, left), update
    if best[0] is not None:
        _apply(module, chosen)
    return best


class _Sums:
    """H'QH, H'Q(T - X) and the weighted square of T - X, per token."""

    def __init__(self, tokens: Iterator[tuple[torch.Tensor, ...]], is_map: bool) -> None:
        """Take in H (tokens, features), T - X (tokens, hidden) and Q (tokens, 1), by batch.

        With `is_map` every feature acts on every channel; otherwise only on its own (a gain).
        """
        self._is_map, count = is_map, 0
        gram = cross = square = torch.zeros((), dtype=torch.float64)
        for features, deviation, weight in tokens:
            weighted = features * weight
            gram = gram + (weighted.T @ features if is_map else (weighted * features).sum(0))
            cross = cross + (weighted.T @ deviation if is_map else (weighted * deviation).sum(0))
            square = square + (weight * deviation.square()).sum()
            count += len(features)
        self._gram, self._cross = gram / count, cross / count
        self._square: float = (square / count).item()
        self.size = self._square / deviation.shape[1]  # relative to the stream's own

    def solve(self, ridge: float) -> torch.Tensor | None:
        """The update D; None if the matrix is singular to working precision."""
        if not self._is_map:
            return torch.as_tensor(self._cross / (self._gram + ridge * self._gram.mean()))
        diagonal = self._gram.diagonal().mean()
        if not diagonal > 0:
            return None
        eye = torch.eye(len(self._gram)).to(self._gram)
        factor, failed = torch.linalg.cholesky_ex(self._gram + ridge * diagonal * eye)
        return None if failed else torch.cholesky_solve(self._cross, factor)

    def error(self, update: torch.Tensor) -> float:
        """The fraction of the squared deviation that an update leaves; 1 if it changes nothing."""
        product = self._gram @ update if self._is_map else self._gram * update
        change: float = (update * (product - 2 * self._cross)).sum().item()
        return 1 + change / self._square


def _apply(module: Any, update: torch.Tensor) -> None:
    """Replace a module's parameters by copies plus `update`, (features, hidden) or (hidden,)."""

    def changed(parameter: nn.Parameter, difference: torch.Tensor) -> nn.Parameter:
        new = (parameter.detach().double() + difference.to(parameter.device)).to(parameter.dtype)
        return nn.Parameter(new, requires_grad=parameter.requires_grad)

    if update.dim() == 2 and module.bias is not None:
        module.bias = changed(module.bias, update[-1])
        update = update[:-1]
    module.weight = changed(module.weight, update.T if isinstance(module, nn.Linear) else update)
