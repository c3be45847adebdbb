"""Repair without training: least-squares updates of the weights that write to the stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..data.tokens import Batch
from ..errors import NonFiniteError, UnsupportedModelError
from ..evaluation.likelihood import batch_nll
from ..model.forward import HINT
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy
from ..utils import logger, progress
from .residual_writers import Writer, find_writers, gain_slope, hooked, run_layers

# Strengths of the ridge that are tried, in units of the mean of the Gram matrix's diagonal.
RIDGES = (1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
ENOUGH = 1e-12  # share of the stream's size below which a deviation is none
Record = dict[str, Any]


def heal_linear(
    stack: LayerStack,
    removed: Sequence[int],
    pruned: Any,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
) -> tuple[Any, list[Record]]:
    """Let the layers from the first cut on bring the stream back to where the full model has it.

    From the bottom up, every part w that a kept layer adds to the residual stream (`writers`) is
    fitted anew on the stream as it is after the repairs below. With h the input of the linear map
    that makes the part (a constant 1 appended if it has a bias), x the stream after the part, and
    t the full model's stream at the same place, D = (H'QH + a I)^-1 H'Q(T - X) minimises
    sum_i q_i |D'h_i - (t_i - x_i)|^2 + a |D|^2, and the map's weight becomes W + D': no parameter
    is added. The last part of a layer before a cut gets the stream after the removed block as its
    t, so that it stands in for the block; all others make good for what it could not do. Where a
    norm makes the part (sandwich norms), the same is done for its gain, channel by channel.

    Sums are float64 over real tokens, one layer's at a time. A token weighs q = 1 / |t|^2, since
    whatever reads the stream normalises it. The ridge a is the one of `RIDGES` with the least
    error on the held-out tokens; a layer whose repair does not lower the held-out loss is left as
    it was.

    Source: ReplaceMe (Shopkhoev et al., arXiv:2505.02819), section 3, which fits one map on the
    output of the feed-forward part before one cut. Departures: the map is fitted on the input of
    that part's last linear map, which can do more; every layer above is fitted too; tokens are
    weighted; the ridge pulls towards no change, and is chosen on held-out tokens.

    Args:
        stack: the layers of the full model.
        removed: the 0-based layers that `pruned` lacks.
        pruned: the pruned model; not changed.
        train: tokens to fit on. Of all of them, the states of two layers are kept at a time, one
            of either model, on the CPU.
        held_out: tokens to choose the ridge on.

    Returns:
        The repaired model, which shares all other weights with `pruned`, and a record per repaired
        layer: ``layer`` (0-based, of the full model), ``parts`` (part -> ridge), ``error`` (what is
        left of the squared deviation on held-out tokens), ``loss`` (held-out, nats per token),
        ``kept``.

    Raises:
        UnsupportedModelError: no layer from the cut on adds anything by a linear rule.
        NonFiniteError: the states are NaN or infinite.
    """
    healed = share_copy(pruned)
    own = LayerStack(healed, stack.paths[0])
    kept = [index for index in range(len(stack)) if index not in set(removed)]
    bottom = min(removed)
    first = kept.index(bottom - 1) if bottom else 0
    writers = {place: find_writers(own, place) for place in range(first, len(own))}
    if not any(writer.tuned for found in writers.values() for writer in found):
        raise UnsupportedModelError(
            f"heal='linear' is not for {type(stack.model).__name__}: no part of its layers from "
            f"{kept[first]} on is added to the stream by a linear map or a norm's gain (experts, "
            "or a norm after the sum). Use heal='lora'."
        )
    walks = [_Walk(stack, own, kept, batches) for batches in (train, held_out)]
    loss = batch_nll(healed, held_out)
    records: list[Record] = []
    for place in progress(range(first, len(own)), "Healing (linear)"):
        weights = _Weights(own[place])
        parts: dict[str, float] = {}
        error = math.nan
        for writer in writers[place]:
            # A part that is not the last of its layer is compared with the same part of the full
            # model, from which it does not differ in the layer below the first cut.
            same = kept[place] < bottom and writer.later
            if writer.tuned and not same:
                ridge, error = _refit(own[place], place, writer, walks)
                if ridge is not None:
                    parts[writer.part] = ridge
        if parts:
            after = batch_nll(healed, held_out)
            better = after < loss
            loss = after if better else loss
            if not better:
                weights.put_back()
            record = {"layer": kept[place], "parts": parts, "error": error}
            records.append({**record, "loss": after, "kept": better})
            logger.info(
                "Layer %d: held-out loss %.4f%s", kept[place], after, "" if better else ", undone"
            )
        for walk in walks:
            walk.advance(place)
    return healed, records


class _Weights:
    """The parameters that a layer's modules have, to be put back."""

    def __init__(self, layer: nn.Module) -> None:
        self._was = [(module, dict(module._parameters)) for module in layer.modules()]

    def put_back(self) -> None:
        for module, parameters in self._was:
            module._parameters.update(parameters)


class _Walk:
    """Full and pruned model side by side on the same tokens, layer by layer.

    Args:
        full, cut: their layers.
        kept: for each layer of the pruned model its index in the full one.
        batches: the tokens.
    """

    def __init__(
        self, full: LayerStack, cut: LayerStack, kept: Sequence[int], batches: Sequence[Batch]
    ) -> None:
        _ = full.can_replay, cut.can_replay  # found out by passes that are not to be watched
        self._full, self._cut, self._kept, self._batches = full, cut, kept, batches
        nothing: list[torch.Tensor | None] = [None] * len(batches)
        self._entering = {full: nothing, cut: list(nothing)}

    def advance(self, place: int) -> None:
        """Go on to what enters the layer after `place` of the pruned model."""
        for number, batch in enumerate(self._batches):
            for stack in (self._full, self._cut):
                run = self._leaving(stack, place, number, batch)
                self._entering[stack][number] = run.cpu()

    def deviations(
        self, place: int, writer: Writer, features: Callable[[nn.Module, Any], torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of the real tokens of every batch: features, deviation from the full model, weight.

        Shapes: (tokens, features), (tokens, hidden), (tokens, 1); float64.
        """
        for number, batch in enumerate(self._batches):
            real = batch.attention_mask.bool()
            found: dict[str, torch.Tensor] = {}
            stream = self._after(self._cut, place, number, batch, writer, found, features)
            target = self._after(self._full, place, number, batch, writer, {}, None)
            found["features"] = found["features"].view(*real.shape, -1)  # some layers flatten
            home = "cpu" if stream.device.type == "mps" else stream.device  # where float64 exists
            wanted, is_there, seen = (
                part[real.to(part.device)].to(home).double()
                for part in (target, stream, found["features"])
            )
            deviation = wanted - is_there
            if not deviation.isfinite().all():
                raise NonFiniteError(f"heal='linear': {HINT}")
            size = wanted.square().mean(-1, keepdim=True)
            yield seen, deviation, 1 / size.clamp(min=torch.finfo(torch.float32).tiny)

    def _after(
        self,
        stack: LayerStack,
        place: int,
        number: int,
        batch: Batch,
        writer: Writer,
        found: dict[str, torch.Tensor],
        features: Callable[[nn.Module, Any], torch.Tensor] | None,
    ) -> torch.Tensor:
        """The stream after a part of a layer; of the full model, after the block that follows."""
        layer = stack[self._range(stack, place)[0]]
        sums: list[torch.Tensor] = []

        def add(scale: float) -> Callable[..., None]:
            def call(module: nn.Module, args: Any, output: Any) -> None:
                part = output if isinstance(output, torch.Tensor) else output[0]
                sums.append(scale * part)

            return call

        def enter(module: nn.Module, args: Any, output: Any) -> None:
            if features:
                found["features"] = features(module, args[0])

        with ExitStack() as hooks:
            for other in writer.later:
                hooks.enter_context(hooked(layer.get_submodule(other.part), add(other.scale)))
            if features:
                hooks.enter_context(hooked(layer.get_submodule(writer.tuned or ""), enter))
            alone = bool(writer.later)  # a cut is bridged by the last part alone
            leaving = self._leaving(stack, place, number, batch, alone=alone)
        for part in sums:
            leaving = leaving - part.view_as(leaving)
        return leaving

    def _range(self, stack: LayerStack, place: int) -> tuple[int, int]:
        """The first and last layer of a stack that belong to layer `place` of the pruned model."""
        if stack is self._cut:
            return place, place
        following = self._kept[place + 1] if place + 1 < len(self._kept) else len(self._full)
        return self._kept[place], following - 1

    def _leaving(
        self, stack: LayerStack, place: int, number: int, batch: Batch, *, alone: bool = False
    ) -> torch.Tensor:
        start, end = self._range(stack, place)
        state = self._entering[stack][number]
        if state is not None:
            state = state.to(stack.device)
        return run_layers(stack, batch, start, start if alone else end, state)[1]


def _refit(
    layer: nn.Module, place: int, writer: Writer, walks: Sequence[_Walk]
) -> tuple[float | None, float]:
    """Fit one part anew; the ridge and what is left of the deviation, or None and 1."""
    module: Any = layer.get_submodule(writer.tuned or "")
    is_map = module.weight.dim() == 2

    def features(module: Any, entering: torch.Tensor) -> torch.Tensor:
        if not is_map:
            return writer.scale * gain_slope(module, entering)
        if module.bias is not None:
            entering = torch.cat([entering, torch.ones_like(entering[..., :1])], dim=-1)
        return writer.scale * entering

    sums = [_Sums(walk.deviations(place, writer, features), is_map) for walk in walks]
    fit, test = sums
    if min(fit.size, test.size) < ENOUGH:
        return None, 1.0
    best: tuple[float, float, torch.Tensor] | None = None
    for ridge in RIDGES:
        update = fit.solve(ridge)
        if update is not None and (left := test.error(update)) < (best[1] if best else 1.0):
            best = ridge, left, update
    if best is None:
        return None, 1.0
    _apply(module, best[2])
    return best[0], best[1]


class _Sums:
    """H'QH, H'Q(T - X) and the weighted square of T - X, per token.

    Args:
        tokens: features H, deviations T - X and weights Q, batch by batch.
        full: whether every feature acts on every channel, or only on its own (a gain).
    """

    def __init__(
        self, tokens: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], full: bool
    ) -> None:
        self._full, count = full, 0
        gram: Any = 0.0
        cross: Any = 0.0
        square: Any = 0.0
        for features, deviation, weight in tokens:
            heavy = features * weight
            gram = gram + (heavy.T @ features if full else (heavy * features).sum(0))
            cross = cross + (heavy.T @ deviation if full else (heavy * deviation).sum(0))
            square = square + (weight * deviation.square()).sum()
            count += len(features)
        self._gram, self._cross = gram / count, cross / count
        self._square: float = (square / count).item()
        channels = deviation.shape[1]
        self.size = self._square / channels  # relative to the stream's own

    def solve(self, ridge: float) -> torch.Tensor | None:
        """The update D; None if the matrix is singular to working precision."""
        if not self._full:
            return torch.as_tensor(self._cross / (self._gram + ridge * self._gram.mean()))
        diagonal = self._gram.diagonal().mean()
        if not diagonal > 0:
            return None
        eye = torch.eye(len(self._gram), dtype=self._gram.dtype, device=self._gram.device)
        factor, failed = torch.linalg.cholesky_ex(self._gram + ridge * diagonal * eye)
        return None if failed else torch.cholesky_solve(self._cross, factor)

    def error(self, update: torch.Tensor) -> float:
        """What an update leaves of the squared deviation: a share, 1 if it changes nothing."""
        done = self._gram @ update if self._full else self._gram * update
        gained: float = (update * (done - 2 * self._cross)).sum().item()
        return 1 + gained / self._square


def _apply(module: Any, update: torch.Tensor) -> None:
    """Give a module weights of its own, changed by `update`: (features, hidden), or (hidden,)."""
    weight, bias = module.weight, getattr(module, "bias", None)
    rows = update
    if weight.dim() == 2 and bias is not None:
        rows = update[:-1]
        module.bias = _changed(bias, update[-1])
    if weight.dim() == 2 and isinstance(module, nn.Linear):
        rows = rows.T
    module.weight = _changed(weight, rows)


def _changed(parameter: nn.Parameter, update: torch.Tensor) -> nn.Parameter:
    new = (parameter.detach().double() + update.to(parameter.device)).to(parameter.dtype)
    return nn.Parameter(new, requires_grad=parameter.requires_grad)
