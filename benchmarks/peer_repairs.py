"""Published repairs of a model without some layers, in closed form, beside the library's own.

Each is written from its paper's formulas. A *run* is a stretch of neighbouring removed layers; the
repairs of several runs follow one another from the bottom up. With x the stream that enters a run
and t the stream that leaves it in the full model, a repair makes what stays do the run's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llm_pruner import Healing, LayerStack, heal_model
from llm_pruner.data.tokens import Batch, encode_sequences, pad_sequences
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.healing.lora_settings import LoraSettings
from llm_pruner.healing.residual_writers import Writer, find_writers, hooked
from llm_pruner.model.bypass import hidden_out, with_hidden
from llm_pruner.model.forward import evaluating, forward_options

# Ridges of ReplaceMe to choose from, in units of the mean of the Gram matrix's diagonal.
RIDGES = (1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
VALIDATION = 1 / 5  # of the calibration batches, to choose a ridge on
AGREEMENT = 1e-2  # of fused and scaled logits, relative to their spread


@dataclass(frozen=True)
class Cut:
    """What a repair works from.

    Attributes:
        stack: the full model's layers.
        removed: those that go, 0-based, ascending.
        texts: the calibration texts.
        minutes: how long to train, for what trains.
        batch_size: sequences per step of a training.
    """

    stack: LayerStack
    removed: tuple[int, ...]
    tokenizer: Any
    texts: list[str]
    minutes: float = 1.0
    batch_size: int = 8

    @property
    def batches(self) -> list[Batch]:
        """All calibration tokens, one text a row."""
        return pad_sequences(self.tokenizer, encode_sequences(self.tokenizer, self.texts), 8)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """First and last layer of every run, from the bottom up."""
        return runs_of(self.removed)

    def pruned(self) -> Any:
        """A copy without the layers, which shares all weights with the full model."""
        return self.stack.remove(self.removed)

    def layers_of(self, pruned: Any) -> LayerStack:
        """The layers of a pruned copy."""
        return LayerStack(pruned, self.stack.paths[0])

    def above(self, run: tuple[int, int]) -> int:
        """The index, in the pruned model, of the layer that follows a run.

        Raises:
            ValueError: none does.
        """
        index = run[0] - sum(layer < run[0] for layer in self.removed)
        if index == len(self.stack) - len(self.removed):
            raise ValueError(
                f"Layers {run} are the last: no layer is left to read a patched stream."
            )
        return index


def runs_of(removed: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of every stretch of neighbours among ascending numbers."""
    firsts = [layer for layer in removed if layer - 1 not in removed]
    lasts = [layer for layer in removed if layer + 1 not in removed]
    return list(zip(firsts, lasts, strict=True))


def none(cut: Cut) -> Any:
    """Nothing: the layers are removed, and that is all."""
    return cut.pruned()


def linear(cut: Cut) -> Any:
    """The library's `linear`, which divides the texts into three parts of its own and judges."""
    return heal_model(*_healing(cut), "linear", cut.texts)[0]


def lora(cut: Cut) -> Any:
    """The library's `lora` on top of its `linear`, for `Cut.minutes` in all."""
    return _trained(cut, "lora")


def full(cut: Cut) -> Any:
    """The library's `full` on top of its `linear`, for `Cut.minutes` in all."""
    return _trained(cut, "full")


def _trained(cut: Cut, method: Any) -> Any:
    how, settings = Healing(method, minutes=cut.minutes), LoraSettings(batch_size=cut.batch_size)
    return heal_model(*_healing(cut), how, cut.texts, lora=settings)[0]


def _healing(cut: Cut) -> tuple[Any, ...]:
    return cut.stack, cut.removed, cut.pruned(), cut.tokenizer


def replaceme(cut: Cut) -> Any:
    """ReplaceMe (Shopkhoev et al., arXiv:2505.02819): one linear map on one MLP's output.

    With M the output of the MLP of the layer before the run and Y the stream it is added to, the
    least-squares map T of min |M T + Y - t|^2 is multiplied into that MLP's last linear map: no
    parameter is added.

    Departures: sums are float64 over real tokens. The paper's map without a ridge needs far more
    tokens than channels; here a ridge is chosen on a fifth of the batches, and whether it pulls
    towards T = 0, as in the paper's regularised form, or T = 1, which changes nothing: whatever
    serves the map best. With several runs there is one map each, fitted from the bottom up: M and
    Y are those of the model as repaired below, t is the full model's.

    Raises:
        ValueError: there is no layer before the run, or its last part has no linear map.
    """
    pruned = cut.pruned()
    layers, batches = cut.layers_of(pruned), cut.batches
    targets = list(at_runs(cut.stack, cut.runs, batches))
    for number, run in enumerate(cut.runs):
        if run[0] == 0:
            raise ValueError("ReplaceMe puts its map into the layer before the cut: there is none.")
        index = run[0] - 1 - sum(layer < run[0] for layer in cut.removed)
        writer = (find_writers(layers, index) or [None])[-1]
        module: Any = writer and writer.tuned and layers[index].get_submodule(writer.tuned)
        if not (module and module.weight.dim() == 2):
            raise ValueError(f"The last part of layer {run[0] - 1} is no linear map.")
        held = max(1, round(VALIDATION * len(batches)))
        split = len(batches) - held if len(batches) > 1 else 0  # a single batch serves for both
        train, validation = _Moments(), _Moments()
        for position, batch in enumerate(batches):
            made, wanted = _last_part(layers, index, writer, batch), targets[position][number][1]
            part, stream = made
            for moments, use in ((train, position < split or not split),
                                 (validation, position >= split)):  # fmt: skip
                if use:
                    moments.add(part, wanted - stream)
        fuse_map(module, best_map(train, validation))
    return pruned


class _Moments:
    """M'M, M'D and |D|^2 of a linear map's inputs M and wanted outputs D, summed over tokens."""

    def __init__(self) -> None:
        self.gram = self.cross = torch.zeros(())
        self.square, self.tokens = 0.0, 0

    def add(self, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
        self.gram, self.cross = self.gram + inputs.T @ inputs, self.cross + inputs.T @ wanted
        self.square += float(wanted.square().sum())
        self.tokens += len(inputs)

    def error(self, matrix: torch.Tensor) -> float:
        """Squared deviation per token that a map leaves."""
        change = (matrix * (self.gram @ matrix - 2 * self.cross)).sum()
        return (self.square + float(change)) / self.tokens


def best_map(train: _Moments, validation: _Moments) -> torch.Tensor:
    """(d, d), to be multiplied from the right: the ridge regression that validates best."""
    eye = torch.eye(len(train.gram), dtype=torch.float64)
    best, least = eye, validation.error(eye)
    for ridge in RIDGES:
        strength = ridge * float(train.gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(train.gram + strength * eye)
        if failed:
            continue
        for pull in (0.0, 1.0):  # towards nothing, or towards no change
            matrix = torch.cholesky_solve(train.cross + pull * strength * eye, factor)
            if (error := validation.error(matrix)) < least:
                best, least = matrix, error
    return best


def fuse_map(module: Any, matrix: torch.Tensor) -> None:
    """Multiply a (d, d) map into the linear map `module`, whose outputs y become y @ matrix."""
    weight = module.weight
    flip = isinstance(module, nn.Linear)  # Conv1D keeps (inputs, outputs)
    found = weight.detach().cpu().double()
    new = matrix.T @ found if flip else found @ matrix
    module.weight = nn.Parameter(new.to(weight), requires_grad=weight.requires_grad)
    if module.bias is not None:
        bias = module.bias.detach().cpu().double() @ matrix
        module.bias = nn.Parameter(bias.to(weight), requires_grad=weight.requires_grad)


def linearpatch(cut: Cut) -> Any:
    """LinearPatch (Chen et al., arXiv:2505.24680): a rotated scaling of the stream at the cut.

    What leaves the layer before the run is multiplied by H D H', with H an orthogonal Hadamard
    matrix, which spreads the outliers of single channels, and D the diagonal of each rotated
    channel's mean absolute value after the run over that before it, in the full model.

    Departures: the patch is not trained. It is a hook of the layer after the cut, not a module of
    the checkpoint. The paper's sequences have 2,048 tokens, and the ratio is averaged over them;
    here the texts are short, so the means are over the tokens of all texts. In them the massive
    activations of first tokens can outweigh the rest, so the patch is also made without these, and
    the one with the smaller loss on the calibration texts is taken. With several runs there is one
    patch each, all from the full model's stream. Where the hidden size is no power of two, H is
    the Kronecker product of a Paley matrix and a power of two's.
    """
    candidates = []
    for skip in (0, 1):
        pruned = cut.pruned()
        layers = cut.layers_of(pruned)
        for run, patch in zip(cut.runs, rotated_scalings(cut, skip), strict=True):
            patched(layers[cut.above(run)], patch)
        candidates.append(pruned)
    return min(candidates, key=lambda model: batch_nll(model, cut.batches))


def rotated_scalings(cut: Cut, skip: int) -> list[torch.Tensor]:
    """The patch of every run; the first `skip` tokens of every text are left out."""
    rotation = hadamard(cut.stack.model.config.get_text_config().hidden_size)
    sums = torch.zeros(len(cut.runs), 2, len(rotation), dtype=torch.float64)
    for states in at_runs(cut.stack, cut.runs, cut.batches, skip=skip):
        for number, pair in enumerate(states):
            sums[number] += torch.stack([(side @ rotation).abs().sum(0) for side in pair])
    return [(rotation * (after / before)) @ rotation.T for before, after in sums]


def prune_comp(cut: Cut, *, fuse: bool = True) -> Any:
    """Prune&Comp (arXiv:2507.18212): the stream at the cut is scaled to the size that it had.

    The factor is the mean, over tokens, of |t| / |x|. What reads the stream normalises it, so that
    scaling the stream at the cut is the same, but for the norms' epsilon, as dividing by the factor
    all that the layers above add to it: their last linear maps.

    Departures: the authors' code averages, over channels, the ratios of the mean absolute values
    over a sequence of 2,048 tokens; on short texts the massive activations of first tokens would
    decide that, so the ratio is taken token by token. The paper multiplies what lies below the
    cut, embedding included, which breaks models whose head is tied to it; dividing what lies above
    computes the same. Layers are chosen beforehand, not in turns with the compensation. Where fused
    and scaled models disagree (layers whose parts no linear map makes, norms after the sum), the
    stream is scaled.
    """
    ratios = [[] for _ in cut.runs]
    batches = cut.batches
    for states in at_runs(cut.stack, cut.runs, batches):
        for number, (entering, leaving) in enumerate(states):
            ratios[number].append(leaving.norm(dim=1) / entering.norm(dim=1))
    factors = [float(torch.cat(each).mean()) for each in ratios]
    scaled = cut.pruned()
    for run, factor in zip(cut.runs, factors, strict=True):
        layers = cut.layers_of(scaled)
        patched(layers[cut.above(run)], torch.tensor(factor))
    fused = cut.pruned() if fuse else None
    if fused is None or not _divide_writes(cut, fused, factors):
        return scaled
    wanted, found = (last_logits(model, batches[0]) for model in (scaled, fused))
    spread = wanted.std()
    return fused if float((wanted - found).abs().max()) < AGREEMENT * spread else scaled


def _divide_writes(cut: Cut, pruned: Any, factors: Sequence[float]) -> bool:
    """Divide what the layers above the cuts add to the stream; False if it cannot be done so."""
    layers = cut.layers_of(pruned)
    starts = [cut.above(run) for run in cut.runs]
    for index in range(starts[0], len(layers)):
        writers = find_writers(layers, index)
        names = [writer.tuned for writer in writers if writer.tuned]
        modules: list[Any] = [layers[index].get_submodule(name) for name in names]
        maps = sum(module.weight.dim() == 2 for module in modules)
        if not maps or maps < len(writers):
            return False
        below = (f for start, f in zip(starts, factors, strict=True) if start <= index)
        scale = 1 / math.prod(below)
        for module in modules:
            for name, old in list(module.named_parameters(recurse=False)):
                new = nn.Parameter(old.detach() * scale, requires_grad=old.requires_grad)
                setattr(module, name, new)
    return True


def patched(layer: nn.Module, patch: torch.Tensor) -> None:
    """From now on what enters a layer is multiplied by `patch`, a (d, d) matrix or a number."""
    layer.register_forward_pre_hook(partial(_patch, patch), with_kwargs=True)


def _patch(patch: torch.Tensor, layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    stream = args[0] if args else kwargs["hidden_states"]
    exact = torch.promote_types(stream.dtype, torch.float32)
    factor = patch.to(stream.device, exact)
    product = stream.to(exact) @ factor if factor.dim() else stream.to(exact) * factor
    return with_hidden(args, kwargs, product.to(stream.dtype))


def hadamard(size: int) -> torch.Tensor:
    """(size, size) float64: an orthogonal matrix with entries +-1 / sqrt(size).

    Raises:
        ValueError: neither doubling (Sylvester) nor a prime (Paley, 1933) makes one of this size.
    """
    signs = _signs(size)
    if signs is None:
        raise ValueError(f"No Hadamard matrix of size {size} is known here.")
    return signs / math.sqrt(size)


def _signs(size: int) -> torch.Tensor | None:
    one, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    two = two.double()
    if size == 1:
        return one
    if size % 2:
        return None
    half = _signs(size // 2)
    if half is not None:
        return torch.kron(half, two)
    if (prime := size - 1) % 4 == 3 and _is_prime(prime):
        skew = torch.zeros(size, size, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _residues(prime)
        return skew + torch.eye(size, dtype=torch.float64)
    if size % 2 == 0 and (prime := size // 2 - 1) % 4 == 1 and _is_prime(prime):
        core = torch.zeros(size // 2, size // 2, dtype=torch.float64)
        core[0, 1:], core[1:, 0] = 1, 1
        core[1:, 1:] = _residues(prime)
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(core, two) + torch.kron(torch.eye(size // 2).double(), corner)
    return None


def _residues(prime: int) -> torch.Tensor:
    """Jacobsthal's matrix: whether i - j is a square (1) modulo the prime, or not (-1), or 0."""
    squares = {number * number % prime for number in range(1, prime)}
    kind = [0, *(1 if number in squares else -1 for number in range(1, prime))]
    rows = [[kind[(row - column) % prime] for column in range(prime)] for row in range(prime)]
    return torch.tensor(rows, dtype=torch.float64)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def at_runs(
    stack: LayerStack, runs: Sequence[tuple[int, int]], batches: Sequence[Batch], *, skip: int = 0
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per batch, for every run, the stream that enters and leaves it: (real tokens, hidden).

    The first `skip` tokens of every text are left out.
    """
    for batch in batches:
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        real = batch.attention_mask.bool()
        real[:, :skip] = False  # padded on the right
        edges = {layer for run in runs for layer in run}

        def keep(index: int, entering: torch.Tensor, leaving: torch.Tensor) -> None:
            if index in edges:  # noqa: B023 - the pass is over before the next batch
                states[index] = entering.cpu()[real].double(), leaving.cpu()[real].double()  # noqa: B023

        with stack.observe(keep):
            last_logits(stack.model, batch)
        yield [(states[first][0], states[last][1]) for first, last in runs]


def _last_part(
    layers: LayerStack, index: int, writer: Writer, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer adds last, and the stream it is added to: two (real tokens, hidden)."""
    real = batch.attention_mask.bool()
    parts: list[torch.Tensor] = []
    leaving: list[torch.Tensor] = []

    def keep(number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if number == index:
            leaving.append(after)

    def add(module: Any, args: Any, output: Any) -> None:
        parts.append(writer.scale * hidden_out(output))

    with hooked(layers[index].get_submodule(writer.part), add), layers.observe(keep):
        last_logits(layers.model, batch)
    part = parts[0].view_as(leaving[0]).cpu()[real].double()
    return part, leaving[0].cpu()[real].double() - part


def last_logits(model: Any, batch: Batch) -> torch.Tensor:
    """One pass over a batch; the logits of the last position, or of all."""
    device = next(model.parameters()).device
    with evaluating(model):
        output = model(**batch.to(device).inputs(), **forward_options(model, 1))
    return output.logits.float().cpu()


# Name -> what makes the repaired model; the original, and what it shares, stays as it is.
REPAIRS: dict[str, Callable[[Cut], Any]] = {
    "none": none,
    "linear": linear,
    "lora": lora,
    "full": full,
    "replaceme": replaceme,
    "linearpatch": linearpatch,
    "prune-comp": prune_comp,
}
