"""How good a model is: similarity of its answers, task scores, generation speed.

Likelihood and perplexity of texts come from `likelihood.py`, embeddings from `similarity.py`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch

from .batching import EvalItem, check_items, encode_batches, pad_left
from .data import safe_sample
from .errors import InvalidDataError, LoadError, NonFiniteError
from .likelihood import (
    HINT,
    at_least_one,
    check_ids,
    evaluating,
    input_device,
    mean_nll,
    perplexity,
    position_limit,
    sequence_nll,
)
from .similarity import embed, load_embedder, similarity_floor
from .utils import clean_output, progress, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BENCHMARK = "gsm8k hellaswag arc_easy arc_challenge sciq truthfulqa openbookqa triviaqa"
# Explicit, because generate() takes from the checkpoint's own settings whatever is not given.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "use_cache": True, "return_dict_in_generate": False,
}  # fmt: skip
__all__ = [
    "HolisticEvaluator",
    "ModelEvaluator",
    "final_number",
    "mean_nll",
    "perplexity",
    "similarity_floor",
]
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


class ModelEvaluator:
    """Generates answers greedily and compares them with references.

    Args:
        model: a causal language model of transformers; its generation settings play no part.
        tokenizer: its tokenizer; it is not changed.
        device: where to move the model; it stays where it is if None.
        batch_size: prompts generated from together.
        max_new_tokens: longest answer.
        embedder: see `embed`; all-MiniLM-L6-v2, loaded when first needed, if None.

    Raises:
        InvalidDataError: `batch_size` or `max_new_tokens` below 1, or no position left for a
            prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 64,
        *,
        embedder: Any = None,
    ) -> None:
        at_least_one(batch_size=batch_size, max_new_tokens=max_new_tokens)
        if max_new_tokens >= position_limit(model):
            raise InvalidDataError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model has "
                f"{position_limit(model)} positions. Ask for fewer tokens."
            )
        self.model = model if device is None else model.to(device)
        self.tokenizer, self.embedder = tokenizer, embedder
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """The model's answer to each raw prompt: new text only, up to its end, cleaned.

        Prompts are rendered by `utils.render_prompt`; one that is too long for the model loses
        its beginning.

        Raises:
            InvalidDataError: `prompts` is one string.
            NonFiniteError: the model's logits are NaN.
        """
        if isinstance(prompts, str):
            raise InvalidDataError(f"prompts is one string, {prompts!r:.60}: pass a list of them.")
        encoded = [self._encode(prompt) for prompt in prompts]
        longest_first = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
        answers = [""] * len(encoded)
        ends = _end_ids(self.model, self.tokenizer)
        for start in progress(range(0, len(encoded), self.batch_size), "generate"):
            rows = longest_first[start : start + self.batch_size]
            prompt_ids = [encoded[row] for row in rows]
            new = greedy(self.model, prompt_ids, self.max_new_tokens, eos_token_id=ends)
            for row, tokens in zip(rows, new.tolist(), strict=True):
                stop = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
                text = self.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
                answers[row] = clean_output(str(text))
        return answers

    def _encode(self, prompt: str) -> list[int]:
        text = render_prompt(self.tokenizer, prompt)
        special = not getattr(self.tokenizer, "chat_template", None)
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers close every text; the model would have nothing to say
        return ids[-(position_limit(self.model) - self.max_new_tokens) :]

    def evaluate(
        self, eval_data: Sequence[EvalItem], answers: Sequence[str] | None = None
    ) -> float:
        """Mean cosine similarity of generated answers to references, in [-1, 1].

        An empty answer scores 0. Plain strings have no reference and are left out. What
        unrelated texts score is `similarity_floor`.

        Args:
            eval_data: items with `prompt` and `reference`.
            answers: what `generate` gave for the prompts of these items; generated if None.

        Raises:
            InvalidDataError: the items cannot be used, or none has a reference.
            NonFiniteError: the model's logits or the embedder's vectors are not finite.
        """
        scores = self.evaluate_items(_questions(eval_data), answers)
        return math.fsum(scores) / len(scores)

    def evaluate_items(
        self, items: Sequence[Mapping[str, Any]], answers: Sequence[str] | None = None
    ) -> list[float]:
        """What `evaluate` is the mean of: one cosine per item with a reference."""
        given = self._answers(items) if answers is None else answers
        return self._similarities([{**item, "aliases": ()} for item in items], given)

    def _answers(self, items: Sequence[Mapping[str, Any]]) -> list[str]:
        return self.generate([item["prompt"] for item in items])

    def _similarities(
        self, items: Sequence[Mapping[str, Any]], answers: Sequence[str]
    ) -> list[float]:
        """The greatest similarity of each answer to its reference or one of its aliases."""
        known = [[item["reference"], *filter(None, item.get("aliases") or ())] for item in items]
        texts = sorted({*chain(*known), *filter(None, answers)})
        vectors = dict(zip(texts, embed(texts, self.embedder or load_embedder()), strict=True))

        def best(answer: str, accepted: Sequence[str]) -> float:
            dots = [float(vectors[answer] @ vectors[text]) for text in accepted]
            return min(1.0, max(dots))  # rounding may exceed 1

        pairs = zip(answers, known, strict=True)
        return [best(answer, accepted) if answer else 0.0 for answer, accepted in pairs]


def greedy(
    model: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    watch: Sequence[Any] = (),
    **options: Any,
) -> torch.Tensor:
    """The tokens a model adds to prompts: (sequences, new tokens), on the CPU.

    Args:
        model: a causal language model.
        prompts: token ids.
        max_new_tokens: how many at most.
        watch: called at every step with all ids and the logits of the next one, which they return.
        options: fields of a ``GenerationConfig``.

    Raises:
        InvalidDataError: token ids that the model does not have.
        NonFiniteError: logits are NaN.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ids, mask = pad_left(prompts, 0)
    check_ids(model, ids)
    settings = {**GREEDY, "max_new_tokens": max_new_tokens, "pad_token_id": 0, **options}
    with evaluating(model):
        output = model.generate(
            input_ids=ids.to(input_device(model)),
            attention_mask=mask.to(input_device(model)),
            generation_config=GenerationConfig(**settings),  # type: ignore[no-untyped-call]
            logits_processor=LogitsProcessorList([_refuse_nan, *watch]),
        )
    new: torch.Tensor = output[:, ids.shape[1] :].cpu()
    return new


def _refuse_nan(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if bool(logits.isnan().any()):
        raise NonFiniteError(
            f"The model's logits are NaN after {ids.shape[1]} tokens: its weights or {HINT}"
        )
    return logits


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, by the tokenizer and by the checkpoint."""
    ends: set[int] = set()
    for owner in (tokenizer, getattr(model, "generation_config", None)):
        value = getattr(owner, "eos_token_id", None)
        ends.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return sorted(ends)


def _questions(eval_data: Sequence[EvalItem]) -> list[dict[str, Any]]:
    """The items that have a prompt and a reference."""
    items = [item for item in check_items(eval_data) if isinstance(item, dict)]
    if not items:
        raise InvalidDataError(
            f"None of the {len(eval_data)} items has a reference: answers can only be compared for "
            "dicts with 'prompt' and 'reference'. For running text use perplexity()."
        )
    return items


class HolisticEvaluator(ModelEvaluator):
    """Scores a model task by task, each item by its kind.

    With ``choices``: 1 if the reference is the choice the model finds most likely. With a
    number as reference, or of task ``gsm8k``: 1 if the number of the generated answer equals it
    (`final_number`), or the answer is one of the ``aliases``, word for word. Otherwise: the
    greatest cosine similarity of the generated answer to the reference or one of the
    ``aliases``, not below 0.

    Args:
        model, tokenizer, device, batch_size, max_new_tokens, embedder: as in `ModelEvaluator`.
        tasks: the datasets `load_diverse_data` draws from; the eight of `BENCHMARK` if None.

    Attributes:
        item_scores: after `run_benchmark`, the scores of each task's items in the data's order.
    """

    def __init__(self, *args: Any, tasks: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tasks = BENCHMARK.split() if tasks is None else list(tasks)
        self.item_scores: dict[str, list[float]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Number of items behind each task's score in the last `run_benchmark`."""
        return {task: len(scores) for task, scores in self.item_scores.items()}

    def load_diverse_data(
        self, n_per_task: int = 30, source: str | None = None
    ) -> list[dict[str, Any]]:
        """Items of many tasks, up to `n_per_task` of each.

        Args:
            n_per_task: items per task; a task that has fewer gives all it has.
            source: None for the hub datasets `tasks`; otherwise ``demo-eval``, a file, a folder
                or a hub id, whose items are taken by their ``task``.

        Raises:
            LoadError: nothing could be loaded. One source that fails is logged and left out.
        """
        at_least_one(n_per_task=n_per_task)
        names = self.tasks if source is None else [source]
        share = n_per_task if source is None else sys.maxsize
        taken: dict[str, list[dict[str, Any]]] = {}
        for name in progress(names, "datasets"):
            for item in safe_sample(name, None, None, share):
                if isinstance(item, dict):
                    taken.setdefault(_task(item), []).append(item)
        if not taken:
            raise LoadError(
                f"No benchmark items from {', '.join(names) or 'an empty list of tasks'}: the log "
                "says why. Without a network use source='demo-eval' or a local file of items."
            )
        return [item for items in taken.values() for item in items[:n_per_task]]

    def run_benchmark(
        self, data: Sequence[EvalItem], answers: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Mean score of each task's items, in [0, 1], and ``mean``, the mean over tasks.

        Every item is checked before the model is run. An item without ``task`` counts as ``other``.

        Args:
            data: items with `prompt` and `reference`.
            answers: what `generate` gave for their prompts; generated where needed if None.

        Raises:
            InvalidDataError: an item that cannot be scored: running text, fewer than two
                choices or none that is the reference, a gsm8k reference without a number.
            NonFiniteError: the model's logits are not finite.
        """
        kinds = item_kinds(data)
        items = _questions(data)
        scores: dict[int, float] = {}
        for kind in sorted(set(kinds)):
            rows = [index for index, other in enumerate(kinds) if other == kind]
            some = [items[row] for row in rows]
            if kind == "choice":
                found = self._choices(some)
            else:
                given = self._answers(some) if answers is None else [answers[row] for row in rows]
                score = self._numbers if kind == "number" else self._similarities
                found = [max(0.0, value) for value in score(some, given)]
            scores.update(zip(rows, found, strict=True))
        self.item_scores = {}
        for index, item in enumerate(items):
            self.item_scores.setdefault(_task(item), []).append(scores[index])
        means = {task: math.fsum(each) / len(each) for task, each in self.item_scores.items()}
        return {**means, "mean": math.fsum(means.values()) / len(means)}

    def _choices(self, items: Sequence[Mapping[str, Any]]) -> list[float]:
        """1 where the reference has the greatest summed log-likelihood; the first of equals."""
        losses = choice_losses(self.model, self.tokenizer, items, self.batch_size)
        return [choice_score(item, own) for item, own in zip(items, losses, strict=True)]

    def _numbers(self, items: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[float]:
        """1 where the answer's number is the reference's, or the answer is one of the aliases."""
        scores = []
        for answer, item in zip(answers, items, strict=True):
            same = final_number(answer) == final_number(item["reference"])
            aliases = {alias.casefold() for alias in item.get("aliases") or ()}
            scores.append(float(same or answer.rstrip(".").casefold() in aliases))
        return scores


def choice_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Mapping[str, Any]],
    batch_size: int = 8,
) -> list[list[float]]:
    """Summed negative log-likelihood of every choice of every item, in nats."""
    pairs: list[EvalItem] = [
        {"prompt": item["prompt"], "reference": choice}
        for item in items
        for choice in item["choices"]
    ]
    limit = position_limit(model)
    batches = encode_batches(
        tokenizer, pairs, batch_size=batch_size, max_length=limit, closed=False
    )
    total, _ = sequence_nll(model, progress(batches, "choices"))
    rows = [row for batch in batches for row in batch.rows]
    if sorted(rows) != list(range(len(pairs))):
        raise InvalidDataError("The tokenizer makes nothing of some choices: remove them.")
    losses = iter([loss for _, loss in sorted(zip(rows, total.tolist(), strict=True))])
    return [list(islice(losses, len(item["choices"]))) for item in items]


def item_kinds(items: Sequence[EvalItem]) -> list[str]:
    """How each item is scored: ``choice``, ``number`` or ``open``.

    Raises:
        InvalidDataError: an item that cannot be scored.
    """
    return [_kind(index, item) for index, item in enumerate(check_items(items))]


def choice_score(item: Mapping[str, Any], losses: Sequence[float]) -> float:
    """1 if the choice with the least loss (the first of equals) is the reference, else 0."""
    return float(item["choices"][losses.index(min(losses))] == item["reference"])


def _task(item: Any) -> str:
    return str(item.get("task") or "other")


def _kind(index: int, item: EvalItem) -> str:
    """How an item is scored: ``choice``, ``number`` or ``open``."""
    if isinstance(item, str) or _task(item) == "mean":
        raise InvalidDataError(
            f"data[{index}] cannot be scored: a benchmark takes dicts with 'prompt' and "
            f"'reference', whose task is not called 'mean'; got {item!r:.80}."
        )
    reference = item["reference"]
    if item.get("choices") is not None:
        check_choices(index, item)
        return "choice"
    if _task(item) == "gsm8k" and final_number(reference) is None:
        raise InvalidDataError(f"data[{index}] has no number in its reference {reference!r:.60}.")
    return "number" if _task(item) == "gsm8k" or NUMBER.fullmatch(reference.strip(" $")) else "open"


def check_choices(index: int, item: Mapping[str, Any]) -> None:
    """Raise InvalidDataError if an item's choices are not several texts with the reference."""
    choices, reference = item["choices"], item["reference"]
    listed = isinstance(choices, Sequence) and not isinstance(choices, str)
    texts = [text for text in choices if isinstance(text, str) and text.strip()] if listed else []
    if not listed or len(texts) < max(2, len(choices)) or reference not in texts:
        raise InvalidDataError(
            f"data[{index}] has reference {reference!r:.60} and choices {choices!r:.200}: give "
            "two or more non-empty choices, the reference among them."
        )


def final_number(text: str) -> Decimal | None:
    """The number an answer ends in, or the first one after ``####``; None if there is none.

    ``1,234``, ``1234`` and ``1234.0`` are the same number.
    """
    _, marked, tail = text.partition("####")
    found = NUMBER.findall(tail if marked else text)
    return Decimal(found[0 if marked else -1].replace(",", "")) if found else None
