"""Two models compared: every number a second time by a slower, independent road."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from itertools import product

import pytest
import torch
from test_evaluation import (
    QUESTIONS,
    Vectors,
    build,
    choice_items,
    slow_choice_losses,
    slow_loss,
    tokenizer,
)
from tokenizers import processors

from llm_pruner.data.tokens import encode_pair
from llm_pruner.errors import InvalidDataError, NonFiniteError
from llm_pruner.evaluation.likelihood import perplexity
from llm_pruner.evaluation.quality_comparison import compare_quality, repeated_share
from llm_pruner.evaluation.tasks import HolisticEvaluator
from llm_pruner.model.layer_stack import LayerStack

__all__ = ["tokenizer"]
TEXTS = ["A cat sat on a mat and looked at the moon.", "Once more.", "abc def " * 40]


class Lengths:
    """An embedder that sees the length of a text and its first letter."""

    def encode(self, sentences, show_progress_bar):
        rows = [[1.0, len(text) % 7, ord(text[0]) % 5] for text in sentences]
        return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(scope="module")
def models():
    full = build("llama")
    return full, LayerStack(full).remove([1])


def compared(models, tokenizer, items, **options):
    options = {"embedder": Lengths(), "max_new_tokens": 8, **options}
    rows, before, after = compare_quality(*models, tokenizer, items, **options)
    return {row.name: row for row in rows}, before, after


def test_a_model_and_itself_do_not_differ(models, tokenizer):
    same = models[0], copy.deepcopy(models[0])
    items = [*QUESTIONS, *choice_items(), *TEXTS[:2]]
    rows, before, after = compared(same, tokenizer, items, batch_size=4)
    assert (rows["KL divergence"].before, rows["KL divergence"].after) == (0.0, 0.0)
    assert rows["top-1 agreement"].after == 1.0
    assert before == after
    assert {row.change for row in rows.values()} == {0.0}
    for row in rows.values():  # a single item has no spread
        assert (row.low, row.high) == ((0.0, 0.0) if row.count > 1 else (None, None))
    assert {row.group for row in rows.values()} == {"text", "tasks", "answers"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_read_as_one_by_one(models, tokenizer, batch_size):
    items = [*QUESTIONS, *TEXTS[:2]]
    rows, _, _ = compared(models, tokenizer, items, batch_size=batch_size)
    means = []
    for model in models:
        sums, counts = zip(*(slow_loss(model, tokenizer, item) for item in items), strict=True)
        means.append(sum(sums) / sum(counts))
    nll, ppl = rows["NLL"], rows["perplexity"]
    assert (nll.before, nll.after) == pytest.approx(means, rel=1e-5)
    assert (ppl.before, ppl.after) == pytest.approx([math.exp(m) for m in means], rel=1e-5)
    assert ppl.after == pytest.approx(perplexity(models[1], tokenizer, items), rel=1e-6)
    divergence, agreed, tokens = 0.0, 0, 0
    for item in items:
        if isinstance(item, str):
            ids, start = tokenizer(item)["input_ids"], 1
        else:
            ids, start = encode_pair(tokenizer, item["prompt"], item["reference"])
        with torch.no_grad():
            full, cut = (model(torch.tensor([ids])).logits[0].double() for model in models)
        for place in range(start - 1, len(ids) - 1):
            p, q = full[place].softmax(0), cut[place].softmax(0)
            divergence += float((p * (p / q).log()).sum())
            agreed += int(full[place].argmax() == cut[place].argmax())
            tokens += 1
    assert rows["KL divergence"].after == pytest.approx(divergence / tokens, rel=1e-5)
    assert rows["top-1 agreement"].after == pytest.approx(agreed / tokens)
    assert f"{tokens} tokens" in ppl.note
    assert ppl.count == len(items)
    assert ppl.low < ppl.change < ppl.high
    assert nll.unit == rows["KL divergence"].unit == "nats/token"


def sliding(model, tokenizer, text, window, stride):
    """Sum and number of losses, window after window, by indexing and log-softmax alone."""
    ids = tokenizer(text)["input_ids"]
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    body, size = ids[len(bos) :], window - len(bos)
    total, count, scored = 0.0, 0, 0
    for start in range(0, len(body), stride):
        end = min(start + size, len(body))
        part = bos + body[start:end]
        with torch.no_grad():
            logs = model(torch.tensor([part])).logits[0].log_softmax(-1)
        for place in range(max(scored, start), end):
            at = len(bos) + place - start
            if at:
                total -= float(logs[at - 1, part[at]])
                count += 1
        scored = end
        if end == len(body):
            break
    return total, count


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("window", "stride"), [(100, None), (100, 40), (64, 63), (512, 80)])
def test_a_long_text_is_read_in_sliding_windows(models, tokenizer, window, stride, bos):
    """The text, 320 tokens, is longer than the models' 160 positions."""
    if not bos:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    rows, before, after = compared(models, tokenizer, TEXTS, window=window, stride=stride)
    real = min(window, 160)
    step = min(stride or real, real)
    if stride is None:
        step = real - bos
    for model, found in zip(models, (rows["NLL"].before, rows["NLL"].after), strict=True):
        parts = [sliding(model, tokenizer, text, real, step) for text in TEXTS]
        sums, counts = zip(*parts, strict=True)
        assert found == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    note = rows["perplexity"].note
    assert f"windows of {real} tokens, stride {step}, {'BOS' if bos else 'no BOS'} in front" in note
    assert (before, after) == ([], [])
    assert set(rows) == {"perplexity", "NLL", "KL divergence", "top-1 agreement"}


def test_multiple_choice_by_sum_and_by_character(models, tokenizer):
    """Choices of very different length, so that the two metrics part."""
    items = choice_items()
    for number, item in enumerate(items):
        wrong = next(c for c in item["choices"] if c != item["reference"])
        item["choices"][item["choices"].index(wrong)] = f"{wrong} " * (2 + number % 3) + "tree"
    rows, _, _ = compared(models, tokenizer, items)
    right = defaultdict(list)  # (metric, task, model) -> one per item
    for item, (side, model) in product(items, enumerate(models)):
        losses = slow_choice_losses(model, tokenizer, item)
        rates = [loss / len(c) for loss, c in zip(losses, item["choices"], strict=True)]
        for name, values in (("acc", losses), ("acc_norm", rates)):
            picked = item["choices"][values.index(min(values))]
            right[name, item["task"], side].append(picked == item["reference"])
    for name, task in product(("acc", "acc_norm"), ("trees", "woods")):
        row = rows[f"{task} ({name})"]
        means = [sum(right[name, task, side]) / 6 for side in (0, 1)]
        assert (row.before, row.after) == pytest.approx(means)
        assert (row.count, row.floor, row.group) == (6, 0.25, "tasks")
    assert any(right["acc", *key] != right["acc_norm", *key] for _, *key in right)


def test_answers_are_generated_once_and_scored_by_kind(models, tokenizer, monkeypatch):
    calls = []
    said = {
        id(models[0]): ["18", "Paris", "Rome", "one two three four five", ""],
        id(models[1]): ["it is 17", "Rome", "", "a b c d a b c d a b c d", ""],
    }

    def generate(evaluator, prompts):
        calls.append(len(prompts))
        return said[id(evaluator.model)]

    monkeypatch.setattr(HolisticEvaluator, "generate", generate)
    items = [
        {"task": "gsm8k", "prompt": "1", "reference": "so #### 18"},
        {"task": "facts", "prompt": "2", "reference": "Paris"},
        {"task": "facts", "prompt": "3", "reference": "Rome"},
        {"task": "facts", "prompt": "4", "reference": "Paris"},
        {"task": "facts", "prompt": "5", "reference": "1969"},
    ]
    said_all = {text for side in said.values() for text in side if text}
    table = {text: [0.0, 0.0, 1.0] for text in said_all | {"so #### 18", "1969"}}
    table |= {"Paris": [1.0, 0.0, 0.0], "Rome": [0.6, 0.8, 0.0]}
    rows, before, after = compared(models, tokenizer, items, embedder=Vectors(table))
    assert calls == [5, 5]
    assert (before, after) == (said[id(models[0])], said[id(models[1])])

    def pair(name):
        return rows[name].before, rows[name].after

    assert pair("gsm8k (exact match)") == (1.0, 0.0)
    assert rows["gsm8k (exact match)"].low is None  # one item has no spread
    assert pair("facts (exact match)") == (0.0, 0.0)
    assert pair("facts (similarity)") == pytest.approx((2 / 3, 0.2))
    assert rows["facts (similarity)"].floor == pytest.approx(0.6)
    assert pair("task mean") == pytest.approx(((1 + 2 / 4) / 2, (0 + 0.6 / 4) / 2))
    assert rows["task mean"].count == 5
    assert pair("answer similarity") == pytest.approx((3 / 5, 1.6 / 5))
    floor = (0.6 + 0 + 0 + 0 + 0 + 1) / 6  # of the four different references
    assert rows["answer similarity"].floor == pytest.approx(floor)
    assert pair("answer length") == pytest.approx(((1 + 1 + 1 + 5) / 5, (3 + 1 + 0 + 12) / 5))
    assert pair("repeated 4-grams") == pytest.approx((0.0, (5 / 9) / 5))


def test_the_task_mean_is_that_of_the_evaluator(models, tokenizer):
    items = [{**item, "task": "mixed"} for item in QUESTIONS] + choice_items()
    rows, before, after = compared(models, tokenizer, items)
    for model, found, answers in (
        (models[0], rows["task mean"].before, before),
        (models[1], rows["task mean"].after, after),
    ):
        evaluator = HolisticEvaluator(model, tokenizer, max_new_tokens=8, embedder=Lengths())
        assert found == pytest.approx(evaluator.run_benchmark(items)["mean"])
        assert answers == evaluator.generate([item["prompt"] for item in items])
    assert rows["task mean"].low <= rows["task mean"].change <= rows["task mean"].high


def test_the_seed_decides_the_interval_alone(models, tokenizer):
    found = [compared(models, tokenizer, TEXTS, seed=seed)[0]["NLL"] for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0].after == found[2].after
    assert (found[0].low, found[0].high) != (found[2].low, found[2].high)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("a a a", 0.0),
        ("a a a a a a", 2 / 3),
        ("one two three four five", 0.0),
        ("a b c d a b c d", 1 / 5),
    ],
)
def test_repetition(text, share):
    assert repeated_share(text) == pytest.approx(share)


def test_what_cannot_be_compared_is_refused(models, tokenizer):
    def untouched(*args, **kwargs):
        raise AssertionError("the model has run")

    silent = copy.deepcopy(models[0])
    silent.forward = untouched
    bad = {"prompt": "x", "reference": "a", "choices": ["a"]}
    with pytest.raises(InvalidDataError, match="two or more"):
        compared((silent, silent), tokenizer, [*QUESTIONS, bad])
    with pytest.raises(InvalidDataError, match="stride=0 must be at least 1"):
        compared(models, tokenizer, TEXTS, stride=0)
    broken = copy.deepcopy(models[1])
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(NonFiniteError, match=r"3 of 3 items is NaN.*items \[0, 1, 2\]"):
        compared((models[0], broken), tokenizer, TEXTS)
    mad = copy.deepcopy(models[1])
    mad.lm_head.weight.data *= 1e6
    with pytest.raises(NonFiniteError, match="nats has no perplexity"):
        compared((models[0], mad), tokenizer, TEXTS)
