"""One forward pass over a prepared batch, and the measures that are read from its logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..data.tokens import IGNORED, Batch
from ..model.forward import check_ids, forward_options, input_device

# Elements of float32 logits that are read at once: on a CPU few enough for its caches, and for
# memory that is used again; seven times as fast as many.
CPU_CHUNK, DEVICE_CHUNK = 2**19, 2**24


@dataclass(frozen=True)
class PreparedBatch:
    """A batch made ready for one model once, to be run any number of times.

    Attributes:
        inputs: keyword arguments of the model's forward, padded on the right, on its device.
        table: (3, tokens) int64: for each scored token its sequence, the position in the inputs
            that predicts it, and its id.
        owner: (tokens,) int64 on the CPU: the sequence of each scored token.
        items: the item each sequence comes from, see `Batch`.
    """

    inputs: dict[str, Any]
    table: torch.Tensor
    owner: torch.Tensor
    items: tuple[int, ...]

    @classmethod
    def of(cls, model: torch.nn.Module, batch: Batch) -> PreparedBatch:
        """Prepare a batch that is padded on either side.

        The last token of the longest sequence is scored but not read, so the model needs a
        position for every token but that one.

        Raises:
            InvalidDataError: token ids that the model does not have.
        """
        order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
        tensors = (batch.input_ids, batch.attention_mask, batch.labels)
        ids, mask, labels = (tensor.gather(1, order).cpu() for tensor in tensors)
        ids = ids.masked_fill(mask == 0, 0)  # an id that every model has
        check_ids(model, ids)
        owner, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        width = max(1, ids.shape[1] - 1)
        first = int(position.min()) if len(position) else width - 1
        device = input_device(model)
        inputs = {
            "input_ids": ids[:, :width].to(device),
            "attention_mask": mask[:, :width].to(device),
            **forward_options(model, width - first),
        }
        table = torch.stack([owner, position, labels[owner, position + 1]]).to(device)
        return cls(inputs, table, owner, batch.items)

    def run(self, model: torch.nn.Module) -> ScoredLogits:
        """One forward pass of the model it was prepared for, whichever layers are bypassed."""
        return ScoredLogits(self, model(**self.inputs).logits)


@dataclass(frozen=True)
class ScoredLogits:
    """What a model predicts for the scored tokens of a batch.

    Attributes:
        batch: the batch.
        logits: (sequences, positions, vocabulary), of the last positions or of all.
    """

    batch: PreparedBatch
    logits: torch.Tensor

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits (n, vocabulary), at least float32, and ids (n,) of a limited number of tokens."""
        exact = torch.promote_types(self.logits.dtype, torch.float32)
        skipped = self.batch.inputs["input_ids"].shape[1] - self.logits.shape[1]
        table = self.batch.table.to(self.logits.device)
        for part in torch.split(table, rows_at_once(self.logits), dim=1):
            sequence, position, label = part
            yield self.logits[sequence, position - skipped].to(exact), label


def rows_at_once(logits: torch.Tensor) -> int:
    """Of how many tokens logits, (..., vocabulary), are best read at once: one at least."""
    chunk = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    return max(1, chunk // logits.shape[-1])


def _nll(logits: torch.Tensor, label: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, label, reduction="none")


def _kl(logits: torch.Tensor, label: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    expected, actual = full.log_softmax(-1), logits.log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum(-1)


def _agreement(logits: torch.Tensor, label: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == full.argmax(-1)).float()


# (logits, labels, the full model's logits) -> a number per token. Shapes: (n, vocabulary), (n,).
TOKEN_MEASURES = {"nll": _nll, "kl": _kl, "agreement": _agreement}


def token_sums(
    names: Sequence[str], scored: ScoredLogits, full: ScoredLogits | None = None
) -> torch.Tensor:
    """Sums of token measures over the scored tokens of each sequence.

    Args:
        names: of `TOKEN_MEASURES`.
        scored: the model that is measured.
        full: the full model on the same batch, for measures that compare with it; `scored` if None.

    Returns:
        (names, sequences) float64 on the CPU.
    """
    parts = [torch.zeros(len(names), 0)]
    others = None if full is None else full.chunks()
    for logits, label in scored.chunks():
        other = logits if others is None else next(others)[0].to(logits.device)
        values = [TOKEN_MEASURES[name](logits, label, other) for name in names]
        parts.append(torch.stack(values).cpu().double())
    sums = torch.zeros(len(names), len(scored.batch.items), dtype=torch.float64)
    return sums.index_add_(1, scored.batch.owner, torch.cat(parts, dim=1).double())


class Divergence(torch.autograd.Function):
    """Mean Kullback-Leibler divergence of what tokens are predicted from what should be, in nats.

    Read in pieces, and the gradient with it, so that beside the logits nothing but the gradient is
    as large as they are. On a CPU that takes less than half the time of the plain formula.

    Shapes: logits, and those wanted, (sequences, tokens, vocabulary); real (sequences, tokens),
    true where a token counts. Arithmetic in float32, or float64 for float64 logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """The divergence; its gradient is kept."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        # float16 would lose small slopes before they are scaled.
        kind = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.zeros_like(logits, dtype=kind)
        flat, targets, slopes = (each.flatten(0, 1) for each in (logits, wanted, gradient))
        rows = real.to(logits.device).flatten().nonzero().squeeze(1)
        total = torch.zeros((), dtype=exact, device=logits.device)
        for part in torch.split(rows, rows_at_once(logits)):
            output, target = (one[part].to(exact).log_softmax(-1) for one in (flat, targets))
            shares = target.exp()
            total += (shares * (target - output)).sum()
            slopes[part] = ((output.exp() - shares) / len(rows)).to(kind)
        ctx.save_for_backward(gradient)
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, *slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient by the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * slope[0].to(gradient.dtype), None, None  # autograd casts float32 to half
