"""Healing data that the model writes itself: sampled by a seed, from prompts, texts or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import items

from llm_pruner.data.tokens import encode_prompt
from llm_pruner.errors import InvalidDataError
from llm_pruner.evaluation.generation import greedy
from llm_pruner.healing import own_words, self_generated
from llm_pruner.healing.heal import heal_model
from llm_pruner.model.layer_stack import LayerStack


def answered(llama, tokenizer, seed=0, n=30, **options):
    return self_generated(llama, tokenizer, n, seed, prompts=items(40), max_new_tokens=6, **options)


def test_questions_get_the_models_answers_by_a_seed(llama, tokenizer):
    state = torch.random.get_rng_state()
    first = answered(llama, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == answered(llama, tokenizer)
    assert first != answered(llama, tokenizer, seed=1)
    assert 20 <= len(first) <= 30
    given = [item["prompt"] for item in items(40)]
    assert all(item["prompt"] in given and item["reference"].strip() for item in first)


def test_answers_come_from_the_whole_distribution(llama, tokenizer):
    """First tokens of many answers to one prompt, against the model's own probabilities."""
    ids = encode_prompt(tokenizer, "the", 99)
    with torch.no_grad():
        chances = llama(torch.tensor([ids])).logits[0, -1].softmax(-1)
    new = greedy(llama, [ids] * 2000, 1, **own_words.SAMPLED)
    shares = new.flatten().bincount(minlength=len(chances)) / 2000
    torch.testing.assert_close(shares, chances, rtol=0, atol=0.05)


def test_texts_are_continued_and_none_is_written_twice(llama, tokenizer):
    texts = ["the old mill is by the river and the sea"] * 3
    written = self_generated(llama, tokenizer, 5, prompts=texts, max_new_tokens=5)
    assert len(written) == len(set(written)) <= 5
    opening = tokenizer(texts[0])["input_ids"][: own_words.OPENING]
    start = tokenizer.decode(opening, skip_special_tokens=True)
    assert all(text.startswith(start) for text in written)


def test_without_prompts_texts_begin_from_nothing(llama, tokenizer):
    written = self_generated(llama, tokenizer, 4, max_new_tokens=5)
    assert written
    assert all(isinstance(text, str) and text.strip() for text in written)


def test_what_cannot_be_written_is_refused(llama, tokenizer, monkeypatch):
    with pytest.raises(InvalidDataError, match="no 'reference'"):
        self_generated(llama, tokenizer, 4, prompts=[{"prompt": "the"}])
    ended = torch.full((4, 3), tokenizer.eos_token_id)
    monkeypatch.setattr(own_words, "greedy", lambda *args, **options: ended)
    with pytest.raises(InvalidDataError, match="ended all 4 texts at once"):
        self_generated(llama, tokenizer, 4, max_new_tokens=3)
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = bare.bos_token = None
    with pytest.raises(InvalidDataError, match="pass prompts to go on from"):
        self_generated(llama, bare, 4, max_new_tokens=3)


def test_a_model_is_healed_with_its_own_words(llama, tokenizer):
    stack = LayerStack(llama)
    written = answered(llama, tokenizer, n=40)
    _, record = heal_model(stack, [3], stack.remove([3]), tokenizer, "linear", written)
    assert record["stages"][0]["layers"]


def test_time_ends_the_writing_once_there_is_enough_to_heal_with(llama, tokenizer):
    prompts = [{"prompt": f"w{n}" * (1 + n % 9), "reference": "w1"} for n in range(60)]
    options = {"prompts": prompts, "max_new_tokens": 4, "batch_size": 4}
    whole = self_generated(llama, tokenizer, 60, **options)
    some = self_generated(llama, tokenizer, 60, **options, minutes=1e-9)
    assert 20 <= len(some) <= 24 < len(whole)
    assert {item["prompt"] for item in some} <= {item["prompt"] for item in prompts}
    lengths = [len(item["prompt"]) for item in some]
    assert min(lengths) < max(lengths)
