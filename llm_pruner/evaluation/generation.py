"""Greedy generation, and the similarity of generated answers to references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import EvalItem, Prompt, check_items, check_prompt
from ..data.tokens import encode_prompt, pad_left
from ..errors import InvalidDataError, NonFiniteError
from ..model.forward import HINT, check_ids, evaluating, input_device, position_limit
from ..progress import progress
from ..utils import at_least_one, clean_output, shown
from .similarity import embed, load_embedder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Explicit, because generate() takes from the checkpoint's own settings whatever is not given.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "use_cache": True, "return_dict_in_generate": False,
}  # fmt: skip


class ModelEvaluator:
    """Generates answers greedily and compares them with references.

    Args:
        model: a causal language model of transformers; its own generation settings are ignored.
        tokenizer: its tokenizer; it is not changed.
        device: where to move the model; it stays where it is if None.
        batch_size: prompts per generation.
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

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The model's answer to each raw prompt: new text only, up to its end, cleaned.

        Prompts, texts or conversations, are rendered by `utils.render_prompt`; one that is too
        long for the model loses its beginning.

        Raises:
            InvalidDataError: `prompts` is no list of prompts.
            NonFiniteError: the model's logits are NaN.
        """
        if isinstance(prompts, str):
            raise InvalidDataError(f"prompts is one string, {prompts!r:.60}: pass a list of them.")
        if not isinstance(prompts, Sequence):
            raise InvalidDataError(
                f"prompts is a {type(prompts).__name__}, not a list of strings: {shown(prompts)}"
            )
        for index, prompt in enumerate(prompts):
            check_prompt(f"prompts[{index}]", prompt)
        room = position_limit(self.model) - self.max_new_tokens
        encoded = [encode_prompt(self.tokenizer, prompt, room) for prompt in prompts]
        longest_first = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
        answers = [""] * len(encoded)
        ends = end_ids(self.model, self.tokenizer)
        for start in progress(range(0, len(encoded), self.batch_size), "generate"):
            indices = longest_first[start : start + self.batch_size]
            prompt_ids = [encoded[index] for index in indices]
            new = greedy(self.model, prompt_ids, self.max_new_tokens, eos_token_id=ends)
            for index, tokens in zip(indices, new.tolist(), strict=True):
                stop = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
                text = self.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
                answers[index] = clean_output(str(text))
        return answers

    def evaluate(
        self, eval_data: Sequence[EvalItem], answers: Sequence[str] | None = None
    ) -> float:
        """Mean cosine similarity of generated answers to references, in [-1, 1].

        An empty answer scores 0. Plain strings have no reference and are skipped. Unrelated
        texts score `similarity_floor`.

        Args:
            eval_data: items with `prompt` and `reference`.
            answers: output of `generate` for the prompts of these items; generated if None.

        Raises:
            InvalidDataError: the items cannot be used, or none has a reference.
            NonFiniteError: the model's logits or the embedder's vectors are not finite.
        """
        scores = self.evaluate_items(eval_data, answers)
        return math.fsum(scores) / len(scores)

    def evaluate_items(
        self, items: Sequence[EvalItem], answers: Sequence[str] | None = None
    ) -> list[float]:
        """The cosine of each item with a reference; `evaluate` returns their mean."""
        questions = question_items(items)
        given = self._answers(questions) if answers is None else answers
        check_answers(given, len(questions))
        return self._similarities([{**item, "aliases": ()} for item in questions], given)

    def _answers(self, items: Sequence[Mapping[str, Any]]) -> list[str]:
        return self.generate([item["prompt"] for item in items])

    def _similarities(
        self, items: Sequence[Mapping[str, Any]], answers: Sequence[str]
    ) -> list[float]:
        """The greatest similarity of each answer to its reference or one of its aliases."""
        known = [[item["reference"], *filter(None, item.get("aliases") or ())] for item in items]
        texts = sorted({*chain(*known), *filter(None, answers)})
        vectors = dict(zip(texts, embed(texts, self.embedder or load_embedder()), strict=True))
        scores = []
        for answer, accepted in zip(answers, known, strict=True):
            dots = [float(vectors[answer] @ vectors[text]) for text in accepted if answer]
            scores.append(min(1.0, max(dots, default=0.0)))  # rounding may exceed 1
        return scores


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
        watch: logits processors, called at every step with all ids and the next token's logits.
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


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, by the tokenizer and by the checkpoint."""
    owners = tokenizer, getattr(model, "generation_config", None)
    values = [getattr(owner, "eos_token_id", None) for owner in owners]
    listed = [value if isinstance(value, list | tuple) else [value] for value in values]
    return sorted({*chain(*listed)} - {None})


def check_answers(answers: Sequence[str], count: int) -> None:
    """Raise InvalidDataError unless `answers` are as many strings."""
    listed = isinstance(answers, Sequence) and not isinstance(answers, str)
    if not listed or len(answers) != count or not all(isinstance(one, str) for one in answers):
        raise InvalidDataError(
            f"answers must be {count} strings, one for each item with a reference, as generate "
            f"returns them: {shown(answers)}."
        )


def question_items(eval_data: Sequence[EvalItem]) -> list[dict[str, Any]]:
    """The items that have a prompt and a reference."""
    items = [item for item in check_items(eval_data) if isinstance(item, dict)]
    if not items:
        raise InvalidDataError(
            f"None of the {len(eval_data)} items has a reference: answers can only be compared for "
            "dicts with 'prompt' and 'reference'. For running text use perplexity()."
        )
    return items
