"""Measures of a model on items: what they are measured on, and how they are read.

A measure gives every token sequence (an item, or a window of running text) a value and a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import EvalItem, kind_of
from ..data.tokens import IGNORED, TokenSequence, encode_sequences, pad_sequences
from ..errors import InvalidDataError, LLMPrunerError
from ..evaluation.generation import ModelEvaluator
from ..evaluation.tasks import by_item, check_choices, choice_batches, choice_score
from ..evaluation.token_measures import PreparedBatch, ScoredLogits, token_sums
from ..model.layer_stack import LayerStack
from .passes import LayerSet, replayed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A comparison begins on a block of the data: at least so many sequences, or scored tokens.
BLOCK = 16
# On an accelerator more of them: on an H100 a pass of SmolLM2 takes 26 ms, over 256 or over 960.
CPU_TOKENS, DEVICE_TOKENS = 256, 768
MOST_BLOCKS = 16
COMPARING = {"kl", "agreement"}  # measures that need the full model's logits
KEPT = 2**29  # bytes of them that are kept in memory
KEPT_MODELS = 64  # without layers
Readings = Iterator[tuple[LayerSet, torch.Tensor]]
OwnMeasure = Callable[[Any, Any, list[EvalItem]], Iterable[float]]


@dataclass(frozen=True)
class EncodedData:
    """What quality is measured on: token sequences, and the items they come from.

    Attributes:
        stack: the layers of the model.
        tokenizer: its tokenizer.
        sequences: what is measured.
        given: the item that each sequence is (the first) of; None for the others of that item.
        items: the same, without running text.
        batch_size: sequences per forward pass.
        chunks: indices of sequences that are run together.
        blocks: chunks that are compared together.
        block_tokens: scored tokens that suffice for a block.
    """

    stack: LayerStack
    tokenizer: PreTrainedTokenizerBase
    sequences: list[TokenSequence]
    given: list[EvalItem | None]
    items: list[dict[str, Any] | None]
    batch_size: int
    chunks: list[range]
    blocks: list[range]
    block_tokens: int

    @classmethod
    def of(
        cls,
        stack: LayerStack,
        tokenizer: PreTrainedTokenizerBase,
        eval_data: Sequence[EvalItem],
        batch_size: int,
        max_length: int,
        seed: int,
    ) -> EncodedData:
        """Encode items; sequences come in random order, all kinds of data spread evenly.

        Raises:
            InvalidDataError: the items cannot be used.
        """
        encoded = encode_sequences(tokenizer, eval_data, max_length=max_length)
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed))
        sequences = _spread_kinds([encoded[index] for index in order.tolist()], eval_data)
        chunks: list[range] = []
        blocks: list[range] = []
        scored = [sum(label != IGNORED for label in one.labels[1:]) for one in sequences]
        tokens = CPU_TOKENS if stack.device.type == "cpu" else DEVICE_TOKENS
        for block in _blocks(scored, batch_size, tokens):
            part = slice(block.start, block.stop)  # similar lengths together, for less padding
            sequences[part] = sorted(sequences[part], key=lambda one: len(one.ids))
            first = len(chunks)
            chunks += [block[n : n + batch_size] for n in range(0, len(block), batch_size)]
            blocks.append(range(first, len(chunks)))
        seen = set[int]()
        given: list[EvalItem | None] = []
        for one in sequences:
            given.append(None if one.item in seen else eval_data[one.item])
            seen.add(one.item)
        items = [item if isinstance(item, dict) else None for item in given]
        return cls(stack, tokenizer, sequences, given, items, batch_size, chunks, blocks, tokens)


def _spread_kinds(
    sequences: list[TokenSequence], eval_data: Sequence[EvalItem]
) -> list[TokenSequence]:
    """The sequences so ordered that every part of them has all kinds of data in proportion."""
    kinds = [kind_of(eval_data[one.item]) for one in sequences]
    sizes, seen = Counter(kinds), Counter[str]()
    places = []
    for kind in kinds:
        seen[kind] += 1
        places.append((seen[kind] - 0.5) / sizes[kind])
    order = sorted(range(len(sequences)), key=places.__getitem__)
    return [sequences[index] for index in order]


def _blocks(scored: Sequence[int], batch_size: int, least: int) -> list[range]:
    """Sequences with so many scored tokens in blocks; a remainder joins the last one.

    A block has at least `BLOCK` sequences, in whole batches, or `least` scored tokens, and there
    are not many more of them than `MOST_BLOCKS`.
    """
    most = max(-(-BLOCK // batch_size) * batch_size, len(scored) // MOST_BLOCKS)
    enough = max(least, sum(scored) // MOST_BLOCKS)
    blocks: list[range] = []
    begin = tokens = 0
    for index, count in enumerate(scored, start=1):
        tokens += count
        if tokens >= enough or index - begin >= most:
            blocks.append(range(begin, index))
            begin, tokens = index, 0
    if begin < len(scored):
        first = blocks.pop().start if blocks else 0
        blocks.append(range(first, len(scored)))
    return blocks


class Measure(ABC):
    """One or more measures that the same passes give.

    Args:
        data: what they are measured on.
        names: which of `OBJECTIVES`.

    Attributes:
        needs_pruned_model: whether bypassing layers will not do.
    """

    needs_pruned_model = False

    def __init__(self, data: EncodedData, names: Sequence[str]) -> None:
        self._data, self._names = data, names
        self._batches: dict[range, list[PreparedBatch]] = {}

    @abstractmethod
    def weights(self) -> torch.Tensor:
        """(names, sequences) float64, 0 where a sequence does not count."""

    @abstractmethod
    def read(self, chunk: range, layer_sets: Sequence[LayerSet]) -> Readings:
        """The values of a chunk of sequences without each set of layers.

        The model has to be in evaluation mode.

        Args:
            chunk: indices of sequences.
            layer_sets: in the order of `passes.in_tree_order`.

        Yields:
            Each set, in that order, with (names, len(chunk)) float64.
        """


class TokenMeasures(Measure):
    """Measures of the scored tokens: those of a reference, or of running text.

    ``nll``: negative log-likelihood of the token, in nats; its quality is exp(-mean), the
    likelihood per token, or 1 / perplexity. ``kl``: KL divergence of the next-token distribution
    without the layers from the full model's, in nats; its quality is exp(-mean). ``agreement``: 1
    where both models find the same token most likely; its quality is the mean.
    """

    def __init__(self, data: EncodedData, names: Sequence[str]) -> None:
        super().__init__(data, names)
        self._last: dict[range, torch.Tensor] = {}
        self._logits: dict[range, ScoredLogits] = {}

    def weights(self) -> torch.Tensor:
        """Numbers of scored tokens."""
        counts = [sum(label != IGNORED for label in one.labels[1:]) for one in self._data.sequences]
        return torch.tensor([counts] * len(self._names), dtype=torch.float64)

    def read(self, chunk: range, layer_sets: Sequence[LayerSet]) -> Readings:
        """Sums over the scored tokens of each sequence."""
        data = self._data
        if chunk not in self._batches:
            numbered = [data.sequences[n]._replace(item=n - chunk.start) for n in chunk]
            padded = pad_sequences(data.tokenizer, numbered, len(chunk))
            self._batches[chunk] = [PreparedBatch.of(data.stack.model, one) for one in padded]
        (batch,) = self._batches[chunk]
        compares = not COMPARING.isdisjoint(self._names) and data.stack.can_replay
        full = self._full(chunk, batch) if compares else None
        return _token_readings(data.stack, batch, self._names, layer_sets, full)

    @torch.no_grad()
    def _full(self, chunk: range, batch: PreparedBatch) -> ScoredLogits:
        """The full model's logits: kept, or from what enters its last layer, which is kept."""
        stack = self._data.stack
        last = len(stack) - 1
        if chunk in self._logits:
            return self._logits[chunk]
        if chunk in self._last:
            with stack.replay(last, self._last[chunk]) as model:
                return batch.run(model)
        with stack.observe_inputs([last], lambda _, hidden: self._last.update({chunk: hidden})):
            found = batch.run(stack.model)
        if found.logits.nbytes * len(self._data.sequences) <= KEPT * len(chunk):  # for all chunks
            self._logits[chunk] = found
        return found


def _token_readings(
    stack: LayerStack,
    batch: PreparedBatch,
    names: Sequence[str],
    layer_sets: Sequence[LayerSet],
    full: ScoredLogits | None = None,
) -> Readings:
    """`token_sums` of one batch without each set of layers, in the order of `Batch.items`.

    Where the measures need the full model's logits, `full`, and they are not known, it runs too.
    """
    runs_full = full is None and not COMPARING.isdisjoint(names)

    @torch.no_grad()
    def run(model: torch.nn.Module) -> torch.Tensor:
        nonlocal full
        scored = batch.run(model)
        if runs_full and full is None:  # the full model's pass comes first
            full = scored
        return token_sums(names, scored, full)

    order = torch.tensor(batch.items).argsort()
    wanted = set(layer_sets)
    for removed, sums in replayed(stack, {*wanted, ()} if runs_full else wanted, run):
        if removed in wanted:
            yield removed, sums[:, order]


class ChoiceMeasure(Measure):
    """``accuracy``: 1 where the reference is the choice with the greatest summed log-likelihood.

    Items without ``choices`` do not count.
    """

    def __init__(self, data: EncodedData, names: Sequence[str]) -> None:
        super().__init__(data, names)
        self._asked = [item if item and item.get("choices") else None for item in data.items]
        for sequence, item in zip(data.sequences, self._asked, strict=True):
            if item:
                check_choices(sequence.item, item)
        if not any(self._asked):
            raise InvalidDataError(
                "Accuracy needs items with 'choices', and none has any: use another objective "
                "(nll, kl, agreement, similarity), or items of a multiple-choice task."
            )

    def weights(self) -> torch.Tensor:
        """1 for every item with choices."""
        return torch.tensor([[bool(item) for item in self._asked]], dtype=torch.float64)

    def read(self, chunk: range, layer_sets: Sequence[LayerSet]) -> Readings:
        """0 or 1 per item."""
        asked = {n: item for n, index in enumerate(chunk) if (item := self._asked[index])}
        items, stack = list(asked.values()), self._data.stack
        if chunk not in self._batches:
            given = stack.model, self._data.tokenizer, items, self._data.batch_size
            padded = choice_batches(*given) if items else []
            self._batches[chunk] = [PreparedBatch.of(stack.model, batch) for batch in padded]
        choices = sum(len(item["choices"]) for item in items)
        losses = {removed: torch.zeros(choices, dtype=torch.float64) for removed in layer_sets}
        batches = self._batches[chunk]
        passes = [_token_readings(stack, batch, ["nll"], layer_sets) for batch in batches]
        calls = [partial(list[tuple[LayerSet, torch.Tensor]], one) for one in passes]
        for batch, readings in zip(batches, stack.run_all(calls), strict=True):
            for removed, sums in readings:
                losses[removed][sorted(batch.items)] = sums[0]
        for removed in layer_sets:
            scores = map(choice_score, items, by_item(items, losses[removed]))
            yield removed, _spread(asked, scores, len(chunk))


class AnswerMeasure(Measure):
    """``similarity``: cosine similarity of a generated answer to the reference.

    See `ModelEvaluator.evaluate`. Every pruned model generates anew, so sets of layers share no
    work: this is by far the most expensive measure.
    """

    needs_pruned_model = True

    def __init__(self, data: EncodedData, names: Sequence[str]) -> None:
        super().__init__(data, names)
        data.stack.require_weights("the similarity of answers, which generates")
        if not any(data.items):
            raise InvalidDataError(
                "Similarity of answers needs items with 'prompt' and 'reference'; all of these "
                "are running text. Use nll, kl or agreement."
            )

    def weights(self) -> torch.Tensor:
        """1 for every item with a reference."""
        return torch.tensor([[bool(item) for item in self._data.items]], dtype=torch.float64)

    def read(self, chunk: range, layer_sets: Sequence[LayerSet]) -> Readings:
        """A cosine per item."""
        data = self._data
        asked = {n: item for n, index in enumerate(chunk) if (item := data.items[index])}
        for removed in layer_sets:
            scores: list[float] = []
            if asked:
                model = data.stack.remove(removed) if removed else data.stack.model
                evaluator = ModelEvaluator(model, data.tokenizer, batch_size=data.batch_size)
                scores = evaluator.evaluate_items(list(asked.values()))
            yield removed, _spread(asked, scores, len(chunk))


class FunctionMeasure(Measure):
    """The numbers that a function of the user's gives items; see `register_objective`.

    Args:
        function: gets a model, its tokenizer and items, and returns one number for each.
        data, names: as in `Measure`.
    """

    needs_pruned_model = True

    def __init__(self, function: OwnMeasure, data: EncodedData, names: Sequence[str]) -> None:
        super().__init__(data, names)
        data.stack.require_weights("an objective of your own")
        self._function = function
        self._models: dict[LayerSet, Any] = {}

    def weights(self) -> torch.Tensor:
        """1 for every item."""
        return torch.tensor([[item is not None for item in self._data.given]], dtype=torch.float64)

    def read(self, chunk: range, layer_sets: Sequence[LayerSet]) -> Readings:
        """A number per item."""
        given = self._data.given
        asked = {n: item for n, index in enumerate(chunk) if (item := given[index]) is not None}
        for removed in layer_sets:
            yield removed, _spread(asked, self._numbers(removed, [*asked.values()]), len(chunk))

    def _numbers(self, removed: LayerSet, items: list[EvalItem]) -> list[float]:
        if not items:
            return []
        (name,) = self._names
        try:
            found = self._function(self._model(removed), self._data.tokenizer, items)
            numbers = [float(one) for one in found] if isinstance(found, Iterable) else []
        except LLMPrunerError:
            raise
        except Exception as error:
            raise InvalidDataError(
                f"Objective {name!r} failed on {len(items)} items: {type(error).__name__}: {error}"
            ) from error
        if len(numbers) != len(items):
            raise InvalidDataError(
                f"Objective {name!r} must return a list of one number per item: it returned "
                f"{found!r:.80} for {len(items)} items."
            )
        return numbers

    def _model(self, removed: LayerSet) -> Any:
        """The model without layers; those of the last sets are kept, which share all weights."""
        if not removed:
            return self._data.stack.model
        if removed not in self._models:
            while len(self._models) >= KEPT_MODELS:
                self._models.pop(next(iter(self._models)))
            self._models[removed] = self._data.stack.remove(removed)
        return self._models[removed]


def _spread(asked: Mapping[int, Any], scores: Iterable[float], size: int) -> torch.Tensor:
    """(1, size): the scores of the sequences that were asked, 0 for the others."""
    values = torch.zeros(1, size, dtype=torch.float64)
    values[0, list(asked)] = torch.tensor(list(scores), dtype=torch.float64)
    return values
