"""Healing without training: least-squares updates of what writes to the residual stream."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..data.tokens import Batch
from ..distributed import on_first
from ..errors import NonFiniteError, UnsupportedModelError
from ..evaluation.likelihood import batch_nll, refuse_nonfinite
from ..evaluation.token_measures import PreparedBatch, token_sums
from ..model.bypass import hidden_out
from ..model.forward import HINT, evaluating
from ..model.layer_stack import LayerStack
from ..model.removal import share_copy
from ..progress import duration, progress
from ..utils import logger
from .job import HealingJob
from .least_squares import START, Sums, Tokens, best_update
from .residual_writers import Writer, find_writers, gain_slope, hooked, run_layers

RUNS = 6  # what healing a layer costs, in runs of a layer: those of both models, and the sums
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

    Sums are over real tokens, one part's at a time; see `least_squares`. A token weighs
    q = 1 / |t|^2, since whatever reads the stream normalises it. The ridge a is the one of `RIDGES`
    with the smallest error on the validation tokens; a layer that does not lower the validation
    loss is restored. Both models go up once, side by side: of each layer, the full model's runs
    once, the pruned model's once for every part and once when it is healed.

    Source: ReplaceMe (Shopkhoev et al., arXiv:2505.02819), section 3, which fits one map on the
    output of the feed-forward part before one cut. Departures: the map is fitted on the input of
    that part's last linear map, which is more expressive; every layer above is fitted too; tokens
    are weighted; the ridge pulls towards no change, and is chosen on validation tokens.

    Args:
        job: fits on ``train`` and chooses the ridge on ``validation``. The states of all their
            tokens at one layer of either model are kept on the CPU. With a deadline, fewer
            batches are used from the layer on at which time becomes short.
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
            "(experts, or a norm after the sum). Use heal='lora' or 'full'."
        )
    validation = _Streams(job, layers, job.validation, first)
    train = _Streams(job, layers, _afforded(job, job.train_batches(), kept[first]), first)
    streams = train, validation
    loss = validation_loss(validation, first)
    start, todo = time.monotonic(), range(first, len(layers))

    def limit() -> float:
        return job.seconds_left

    records: list[dict[str, Any]] = []
    ridges: dict[str, float] = {}  # of each part the last one chosen, where the next search begins
    for done, index in enumerate(progress(todo, "Healing (linear)", limit=limit)):
        if done and job.deadline < math.inf:
            needed = (time.monotonic() - start) / done * (len(todo) - done)
            if not train.keep(on_first(partial(operator.truediv, job.seconds_left, needed))):
                logger.warning("Time is up: layers from %d on are left as they are.", kept[index])
                break
        before = [(module, dict(module._parameters)) for module in layers[index].modules()]
        # Below the cut only the layer's last part has a deviation: the removed block's work.
        below = kept[index] < cut
        fitted = [one for one in writers[index] if one.tuned and not (one.later and below)]
        for each in streams:
            each.aim(index, fitted)
        parts: dict[str, float] = {}
        error = math.nan
        for writer in fitted:
            last = ridges.get(writer.part, START)
            ridge, error = _refit(layers[index], index, writer, train, validation, last)
            if ridge is not None:
                parts[writer.part] = ridges[writer.part] = ridge
        if parts:
            after = validation_loss(validation, index)
            fit = {"layer": kept[index], "parts": parts, "error": error}
            records.append({**fit, "loss": after, "kept": after < loss})
            note = "" if after < loss else ", undone"
            rest = (time.monotonic() - start) / (done + 1) * (len(todo) - done - 1)
            rest = min(rest, job.seconds_left)
            left = f"; {duration(rest)} left" if done + 1 < len(todo) else ""
            logger.info("Layer %d: validation loss %.4f%s%s", kept[index], after, note, left)
            if after < loss:
                loss = after
            else:
                for module, parameters in before:
                    module._parameters.update(parameters)
        for each in streams:
            each.advance(index)
    return healed, {"layers": records}


class _Streams:
    """The residual streams of both models on the same batches, carried up layer by layer.

    At each layer of the pruned model the full one goes first (`aim`), through that layer and the
    block cut above it; the pruned one follows when the layer has been healed (`advance`). Layers
    below the first healed one are the same in both and run once.
    """

    def __init__(
        self, job: HealingJob, layers: LayerStack, batches: Sequence[Batch], first: int
    ) -> None:
        for stack in (job.stack, layers):
            _ = stack.can_replay  # tested by passes that no hook of ours may see
        self.full, self.cut, self.batches = job.stack, layers, batches
        self._spans = [(a, b - 1) for a, b in pairwise([*job.kept, len(job.stack)])]
        self._real = [batch.attention_mask.bool() for batch in batches]
        # What enters the layer, by batch; None where the whole model has to run.
        self._entering_full: list[torch.Tensor | None] = [None] * len(batches)
        self.entering: list[torch.Tensor | None] = [None] * len(batches)
        self._targets: dict[str, list[torch.Tensor]] = {}  # part -> real tokens, by batch
        if self.full.can_replay and (start := self._spans[first][0]):
            for number, batch in enumerate(batches):
                state = run_layers(self.full, batch, 0, start - 1)[1].cpu()
                self._entering_full[number] = state
                self.entering[number] = state if first else None

    def keep(self, share: float) -> bool:
        """Go on with a share of the batches, spread over all; whether any time is left for that."""
        if share >= 1:
            return True
        chosen = _spread(len(self.batches), share)
        self.batches = [self.batches[place] for place in chosen]
        self._real = [self._real[place] for place in chosen]
        self._entering_full = [self._entering_full[place] for place in chosen]
        self.entering = [self.entering[place] for place in chosen]
        return share > 0

    def aim(self, index: int, writers: Sequence[Writer]) -> None:
        """Advance the full model, and keep its stream after the parts of some writers."""
        self._targets = {writer.part: [] for writer in writers}
        for number, real in enumerate(self._real):
            state, span = self._entering_full[number], self._spans[index]
            streams, end = _after_parts(self.full, self.batches[number], span, state, writers)
            for part, stream in zip(self._targets, streams, strict=True):
                self._targets[part].append(stream[real.to(stream.device)].cpu())
            self._entering_full[number] = end.cpu()

    def advance(self, index: int) -> None:
        """Go on to what leaves the pruned model's layer, as that is now."""
        for number, batch in enumerate(self.batches):
            _, end = _after_parts(self.cut, batch, (index, index), self.entering[number], ())
            self.entering[number] = end.cpu()

    def tokens(self, index: int, writer: Writer, module: Any) -> Iterator[Tokens]:
        """What a part of the pruned model's layer is fitted on, by batch."""

        def features(entering: torch.Tensor) -> torch.Tensor:
            if module.weight.dim() == 1:
                return writer.scale * gain_slope(module, entering)
            if module.bias is not None:
                entering = torch.cat([entering, torch.ones_like(entering[..., :1])], dim=-1)
            return writer.scale * entering

        for number, (real, wanted) in enumerate(
            zip(self._real, self._targets[writer.part], strict=True)
        ):
            seen: list[torch.Tensor] = []
            with hooked(module, lambda _, args, output, seen=seen: seen.append(features(args[0]))):
                state, span = self.entering[number], (index, index)
                (stream,), _ = _after_parts(self.cut, self.batches[number], span, state, [writer])
            exact = torch.promote_types(stream.dtype, torch.float32)
            rows = seen[0].view(*real.shape, -1)  # some layers flatten
            entering, actual = (part[real.to(part.device)].to(exact) for part in (rows, stream))
            wanted = wanted.to(actual)
            deviation = wanted - actual
            if not deviation.isfinite().all():
                raise NonFiniteError(f"heal='linear': {HINT}")
            size = wanted.square().mean(-1, keepdim=True)
            weight = 1 / size.clamp(min=torch.finfo(torch.float32).tiny)
            yield Tokens(*(part.to(actual.device) for part in (entering, deviation, weight)))


def _spread(count: int, share: float) -> list[int]:
    """A share of `count` places, at least one, evenly spread."""
    number = min(count, max(1, int(count * share)))
    return [(2 * place + 1) * count // (2 * number) for place in range(number)]


def _afforded(job: HealingJob, batches: list[Batch], lowest: int) -> list[Batch]:
    """As many of the batches as the time is likely to suffice for, judged by running one of them.

    Args:
        lowest: the first layer of the full model that is healed.
    """
    if job.seconds_left == math.inf:
        return batches
    start, depth = time.monotonic(), len(job.stack)
    run_layers(job.stack, batches[len(batches) // 2], 0, depth - 1)
    one_layer = (time.monotonic() - start) / depth
    layer_runs = lowest + RUNS * (depth - lowest)
    share = job.seconds_left / max(1e-9, one_layer * layer_runs * len(batches))
    chosen = _spread(len(batches), on_first(lambda: share))
    if len(chosen) < len(batches):
        logger.info("Time suffices for about %d of %d batches.", len(chosen), len(batches))
    return [batches[place] for place in chosen]


def _after_parts(
    stack: LayerStack,
    batch: Batch,
    span: tuple[int, int],
    state: torch.Tensor | None,
    writers: Sequence[Writer],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The stream after some parts of the span's first layer, and what leaves the span.

    After the layer's last part, the stream is that after the span. For others, what the later
    parts add is taken off what leaves the layer: nothing is assumed of how the layer begins.

    Args:
        state: what enters the span; None to run the layers below too.
    """
    layer = stack[span[0]]
    added: dict[str, torch.Tensor] = {}
    leaving: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for later in {other.part: other for one in writers for other in one.later}.values():

            def collect(module: Any, args: Any, output: Any, by: Writer = later) -> None:
                added[by.part] = by.scale * hidden_out(output)

            hooks.enter_context(hooked(layer.get_submodule(later.part), collect))
        if added or any(one.later for one in writers):
            hooks.enter_context(hooked(layer, lambda m, a, out: leaving.append(hidden_out(out))))
        state = state if state is None else state.to(stack.device)
        end = run_layers(stack, batch, *span, state)[1]
    streams = []
    for writer in writers:
        stream = leaving[0] if writer.later else end
        for later in writer.later:
            stream = stream - added[later.part].view_as(stream)
        streams.append(stream)
    return streams, end


def validation_loss(streams: _Streams, index: int) -> float:
    """The pruned model's loss, nats per scored token, by a pass that begins at a layer."""
    layers = streams.cut
    if streams.entering[0] is None or not layers.can_replay:
        return batch_nll(layers.model, streams.batches)
    total, count = 0.0, 0
    with evaluating(layers.model):
        for batch, state in zip(streams.batches, streams.entering, strict=True):
            assert state is not None
            prepared = PreparedBatch.of(layers.model, batch)
            width = prepared.inputs["input_ids"].shape[1]
            with layers.replay(index, state[:, :width].to(layers.device)):
                sums = token_sums(["nll"], prepared.run(layers.model))[0]
            refuse_nonfinite(sums, batch.items)
            total, count = total + sums.sum().item(), count + len(prepared.owner)
    return total / count


def _refit(
    layer: nn.Module,
    index: int,
    writer: Writer,
    train: _Streams,
    validation: _Streams,
    start: float,
) -> tuple[float | None, float]:
    """Refit one part; the ridge and the fraction of the deviation left, or None and 1."""
    module: Any = layer.get_submodule(writer.tuned or "")
    sums = Sums(is_map=module.weight.dim() == 2)
    for block in train.tokens(index, writer, module):
        sums.add(block)
    judged = list(validation.tokens(index, writer, module))
    numbers = sum(block.deviation.numel() for block in judged)
    judged_size = sum(block.square for block in judged) / numbers
    if min(sums.square / (sums.count * judged[0].deviation.shape[1]), judged_size) < NEGLIGIBLE:
        return None, 1.0
    ridge, error, update = best_update(sums, judged, start)
    if update is not None:
        _apply(module, update)
    return ridge, error


def _apply(module: Any, update: torch.Tensor) -> None:
    """Replace a module's parameters by copies plus `update`, (features, hidden) or (hidden,)."""

    def changed(parameter: nn.Parameter, difference: torch.Tensor) -> nn.Parameter:
        new = (parameter.detach().double() + difference.to(parameter.device)).to(parameter.dtype)
        return nn.Parameter(new, requires_grad=parameter.requires_grad)

    if update.dim() == 2 and module.bias is not None:
        module.bias = changed(module.bias, update[-1])
        update = update[:-1]
    module.weight = changed(module.weight, update.T if isinstance(module, nn.Linear) else update)
