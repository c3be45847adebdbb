"""What pruning does to a model's quality: both models on the same items, with intervals.

Three groups of numbers: likelihood of texts, task scores, generated answers. Both models read
every item, so every difference has a paired bootstrap interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import MAX_LENGTH, EvalItem, check_items
from ..data.tokens import TokenSequence, encode_sequences, pad_sequences
from ..errors import NonFiniteError
from ..model.forward import evaluating, position_limit
from ..progress import progress
from ..results import Comparison
from ..stats import paired_draws, paired_interval, percentiles
from ..utils import at_least_one
from .likelihood import MAX_NLL, refuse_nonfinite
from .similarity import Remembering, load_embedder, similarity_floor
from .tasks import HolisticEvaluator, item_kinds, task_of
from .token_measures import PreparedBatch, token_sums

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DRAWS = 1000  # of the bootstrap
NGRAM = 4  # words
NATS = "nats/token"
Scores = dict[tuple[str, str], list[float]]  # (task, metric) -> one number per item
METRICS = {"choice": "acc", "number": "exact match", "open": "similarity"}


def compare_quality(
    original: Any,
    pruned: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[EvalItem],
    *,
    batch_size: int = 8,
    seed: int = 0,
    window: int = MAX_LENGTH,
    stride: int | None = None,
    max_new_tokens: int = 64,
    embedder: Any = None,
) -> tuple[list[Comparison], list[str], list[str]]:
    """Compare two models on the same items: likelihood of texts, task scores, generated answers.

    Group ``text``: NLL and perplexity of references and running texts; KL divergence of the pruned
    model's next-token distribution from the original's, exactly 0 between a model and itself; how
    often both find the same token most likely. Where items are questions: group ``tasks``, a row
    per task and metric and the mean over tasks, as `HolisticEvaluator` scores them, and for choices
    also ``acc_norm`` (log-likelihood per character of the choice); and group ``answers``. Each
    model generates once.

    Args:
        original, pruned: causal language models with one vocabulary.
        tokenizer: their tokenizer.
        items: dicts with `prompt` and `reference`, or strings (running text).
        batch_size: sequences per forward pass.
        seed: of the bootstrap.
        window: longest sequence in tokens, lowered to what the models have positions for.
        stride: tokens from the start of one window of running text to the next; `window` if None,
            so that no token is read twice. A smaller stride gives tokens more context and costs
            more passes.
        max_new_tokens: longest answer.
        embedder: see `similarity.embed`; all-MiniLM-L6-v2 if None.

    Returns:
        The comparisons, and the answers of either model to the items with a reference.

    Raises:
        InvalidDataError: items that cannot be scored, or a count below 1.
        NonFiniteError: a model's logits, or a perplexity, are not finite.
    """
    at_least_one(batch_size=batch_size, window=window, stride=window if stride is None else stride)
    questions = [item for item in check_items(items) if isinstance(item, dict)]
    kinds = item_kinds(questions) if questions else []
    window = min(window, position_limit(original), position_limit(pruned))
    sequences = encode_sequences(tokenizer, items, max_length=window, stride=stride)
    note = _protocol(tokenizer, items, window, stride)
    sums = _token_sums(original, pruned, tokenizer, sequences, batch_size)
    comparisons = _text(sums, note, seed)
    if not questions:
        return comparisons, [], []
    memory = Remembering(embedder or load_embedder())
    sides = [
        HolisticEvaluator(model, tokenizer, None, batch_size, max_new_tokens, embedder=memory)
        for model in (original, pruned)
    ]
    first, second = (side.generate([item["prompt"] for item in questions]) for side in sides)
    pairs = list(zip(sides, (first, second), strict=True))
    before, after = (_scores(side, questions, kinds, given) for side, given in pairs)
    comparisons += _tasks(before, after, _floors(questions, kinds, memory), seed)
    similar = [side.evaluate_items(questions, given) for side, given in pairs]
    floor = _similarity_floor(questions, memory)
    comparisons += _answers(similar, (first, second), floor, max_new_tokens, seed)
    return comparisons, first, second


def _compared(
    name: str,
    group: str,
    sides: Sequence[torch.Tensor],
    seed: int,
    *,
    better: bool | None = None,
    weights: torch.Tensor | None = None,
    exp: bool = False,
    unit: str = "",
    floor: float | None = None,
    note: str = "",
) -> Comparison:
    """A comparison of two weighted means, or of ``exp`` of them, with its interval."""
    total = len(sides[0]) if weights is None else float(weights.sum())
    means = [float(side.sum()) / total for side in sides]
    if exp and max(means) > MAX_NLL:
        raise NonFiniteError(
            f"A mean loss of {max(means):.0f} nats has no {name}: without these layers the model "
            "no longer models language. Remove fewer layers, or others."
        )
    before, after = map(math.exp, means) if exp else means
    options = {"transform": torch.exp if exp else None, "draws": DRAWS, "seed": seed}
    low, high = paired_interval(sides[0], sides[1], weights, **options)
    count = len(sides[0])
    return Comparison(name, group, unit, before, after, better, count, low, high, floor, note)


# --- text ----------------------------------------------------------------------------------------
def _token_sums(
    original: Any,
    pruned: Any,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[TokenSequence],
    batch_size: int,
) -> torch.Tensor:
    """Sums over the scored tokens of every sequence, by one pass of either model.

    (5, sequences) float64: NLL before and after, KL divergence, tokens agreed on, all tokens.
    """
    sums = torch.zeros(5, len(sequences), dtype=torch.float64)
    numbered = [one._replace(item=index) for index, one in enumerate(sequences)]
    for batch in progress(pad_sequences(tokenizer, numbered, batch_size), "text"):
        with evaluating(original), evaluating(pruned):
            full, cut = (PreparedBatch.of(one, batch).run(one) for one in (original, pruned))
            before = token_sums(["nll"], full)
            after = token_sums(["nll", "kl", "agreement"], cut, full)
        tokens = torch.bincount(full.batch.owner, minlength=len(batch.items))
        sums[:, list(batch.items)] = torch.cat([before, after, tokens[None]])
    refuse_nonfinite(sums, [one.item for one in sequences])
    return sums


def _text(sums: torch.Tensor, note: str, seed: int) -> list[Comparison]:
    before, after, divergence, agreed, tokens = sums
    note = f"{note}; {int(tokens.sum()):,} tokens"
    losses, apart = (before, after), (torch.zeros_like(divergence), divergence)
    same = "of the next-token distributions, from the original's"
    text = partial(_compared, group="text", seed=seed, weights=tokens)
    return [
        text("perplexity", sides=losses, exp=True, better=False, note=note),
        text("NLL", sides=losses, better=False, note=note, unit=NATS),
        text("KL divergence", sides=apart, better=False, note=same, unit=NATS),
        text("top-1 agreement", sides=(tokens, agreed), better=True, note=same),
    ]


def _protocol(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[EvalItem], window: int, stride: int | None
) -> str:
    """How texts are read, in a few words."""
    opened = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = "BOS" if opened else "no BOS"
    stride = min(stride or window, window - opened)
    parts = []
    if any(isinstance(item, dict) for item in items):
        parts.append(f"references after their prompts, at most {window} tokens")
    if any(isinstance(item, str) for item in items):
        parts.append(f"running text in windows of {window} tokens, stride {stride}")
    return f"{' and '.join(parts)}, {bos} in front"


# --- tasks ---------------------------------------------------------------------------------------
def _scores(
    evaluator: HolisticEvaluator,
    items: Sequence[dict[str, Any]],
    kinds: Sequence[str],
    answers: Sequence[str],
) -> Scores:
    """The scores of one model, in the order of the items."""
    scores: Scores = {}
    for kind, metric in METRICS.items():
        indices = [index for index, other in enumerate(kinds) if other == kind]
        if indices:
            evaluator.run_benchmark([items[i] for i in indices], [answers[i] for i in indices])
            found = {metric: evaluator.item_scores, "acc_norm": evaluator.norm_scores}
            scores |= {(task, key): found[key][task] for key in found for task in found[key]}
    order = list(dict.fromkeys(map(task_of, items)))
    return dict(sorted(scores.items(), key=lambda entry: order.index(entry[0][0])))


def _floors(
    items: Sequence[dict[str, Any]], kinds: Sequence[str], embedder: Any
) -> dict[tuple[str, str], float]:
    """(task, metric) -> what a guess, or an unrelated answer, scores; not for exact match."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item, kind in zip(items, kinds, strict=True):
        grouped.setdefault((task_of(item), kind), []).append(item)
    floors = {}
    for (task, kind), each in grouped.items():
        if kind == "choice":
            rights = [[*item["choices"]].count(item["reference"]) for item in each]
            chances = [n / len(item["choices"]) for n, item in zip(rights, each, strict=True)]
            floors[task, "acc"] = floors[task, "acc_norm"] = math.fsum(chances) / len(chances)
        elif kind == "open" and (floor := _similarity_floor(each, embedder)) is not None:
            floors[task, "similarity"] = max(0.0, floor)
    return floors


def _similarity_floor(items: Sequence[dict[str, Any]], embedder: Any) -> float | None:
    """`similarity_floor` of the references; None where all are the same."""
    references = [item["reference"] for item in items]
    return similarity_floor(references, embedder=embedder) if len(set(references)) > 1 else None


NOTES = {
    "acc": "choice of greatest log-likelihood",
    "acc_norm": "choice of greatest log-likelihood per character",
    "exact match": "final number of the generated answer",
    "similarity": "generated answer and reference, cosine; floor: unrelated references",
}


def _tasks(
    before: Scores, after: Scores, floors: dict[tuple[str, str], float], seed: int
) -> list[Comparison]:
    rows = []
    by_task: dict[str, list[torch.Tensor]] = {}
    for (task, metric), values in before.items():
        pair = torch.tensor([values, after[task, metric]], dtype=torch.float64)
        row = partial(_compared, better=True, floor=floors.get((task, metric)), note=NOTES[metric])
        rows.append(row(f"{task} ({metric})", "tasks", list(pair), seed))
        if metric != "acc_norm":
            by_task.setdefault(task, []).append(pair)
    return [*rows, _task_mean([torch.cat(pairs, dim=1) for pairs in by_task.values()], seed)]


def _task_mean(tasks: Sequence[torch.Tensor], seed: int) -> Comparison:
    """The mean over tasks, each (2, items); items are drawn within their task."""
    before, after = torch.stack([task.mean(1) for task in tasks]).mean(0).tolist()
    pairs = enumerate(tasks)
    each = [paired_draws(old, new, draws=DRAWS, seed=seed + n) for n, (old, new) in pairs]
    count = sum(task.shape[1] for task in tasks)
    low, high = percentiles(torch.stack(each).mean(0)).tolist() if count > 1 else (None, None)
    note = "mean over tasks of the mean over items (acc, exact match, similarity)"
    return Comparison("task mean", "tasks", "", before, after, True, count, low, high, note=note)


# --- answers -------------------------------------------------------------------------------------
def repeated_share(text: str, length: int = NGRAM) -> float:
    """Share of the n-grams of words in a text that have stood in it before; 0 for a short text."""
    words = text.split()
    grams = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _answers(
    similarities: Sequence[Sequence[float]],
    answers: Sequence[Sequence[str]],
    floor: float | None,
    max_new_tokens: int,
    seed: int,
) -> list[Comparison]:
    words = [[len(text.split()) for text in side] for side in answers]
    repeated = [[repeated_share(text) for text in side] for side in answers]

    def row(name: str, values: Sequence[Sequence[float]], **options: Any) -> Comparison:
        sides = list(torch.tensor(values, dtype=torch.float64))
        return _compared(name, "answers", sides, seed, **options)

    greedy = f"greedy, at most {max_new_tokens} new tokens"
    cosine = "cosine to the reference, an empty answer is 0; floor: unrelated references"
    before = "share of the word 4-grams of an answer that stood in it before"
    rows = [
        row("answer similarity", similarities, better=True, floor=floor, note=cosine),
        row("answer length", words, unit="words", note=greedy),
    ]
    if max(map(max, words)) > NGRAM:  # shorter answers cannot repeat themselves
        rows.append(row("repeated 4-grams", repeated, better=False, note=before))
    return rows
