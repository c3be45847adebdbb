"""Objectives: every measure a second time, on pruned models, one unpadded sequence at a time."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from conftest import N_LAYERS, WORDS, items, tiny_gpt2, tiny_llama

from llm_pruner.data.tokens import encode_pair, encode_rows
from llm_pruner.errors import InvalidDataError, InvalidPlanError, UnknownNameError
from llm_pruner.evaluation import generation
from llm_pruner.evaluation.generation import ModelEvaluator
from llm_pruner.evaluation.likelihood import mean_nll
from llm_pruner.evaluation.tasks import HolisticEvaluator
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.search.objectives import OBJECTIVES, Samples, TokenMeasures, parse_objective
from llm_pruner.search.removal_quality import RemovalQuality

MASKS = [(), (0,), (7,), (2, 5), (1, 3, 4, 6)]
POSITIONS = 128
LONG = " ".join(random.Random(1).choices(WORDS, k=2 * POSITIONS + 40))  # three windows
MIXED = [*items(5), "the cat sat on the old red mat", LONG, "one bird by our house"]


def choice_items(number: int = 24) -> list[dict]:
    """Items of three choices of different lengths, one of them the reference."""
    draw = random.Random(2)
    made = []
    for _ in range(number):
        choices = [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(3)]
        prompt = " ".join(draw.sample(WORDS, draw.randint(2, 9)))
        item = {"task": "pick", "prompt": prompt, "reference": draw.choice(choices)}
        made.append({**item, "choices": choices})
    return made


class WordVectors:
    """An embedder: which words a text has."""

    def encode(self, sentences, show_progress_bar):
        vectors = torch.zeros(len(sentences), len(WORDS) + 1)
        vectors[:, -1] = 0.1
        for row, text in enumerate(sentences):
            for word in text.split():
                if word in WORDS:
                    vectors[row, WORDS.index(word)] += 1
        return vectors


@pytest.fixture
def embedder(monkeypatch):
    monkeypatch.setattr(generation, "load_embedder", WordVectors)
    return WordVectors()


@pytest.fixture(params=["llama", "gpt2"])
def stack(request):
    return LayerStack({"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]())


@pytest.fixture
def llama_stack(llama):
    return LayerStack(llama)


def without(stack: LayerStack, mask) -> torch.nn.Module:
    return stack.remove(mask) if mask else stack.model


def scored(model, tokenizer, item) -> list[tuple[torch.Tensor, list[int]]]:
    """Log-probabilities at the scored tokens and the tokens, sequence by sequence."""
    if isinstance(item, str):
        ids = tokenizer(item)["input_ids"]
        parts = [(ids[at : at + POSITIONS], 1) for at in range(0, len(ids), POSITIONS)]
    else:
        parts = [encode_pair(tokenizer, item["prompt"], item["reference"])]
    found = []
    for ids, n_prompt in parts:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
        found.append((logits.log_softmax(-1)[n_prompt - 1 : -1], ids[n_prompt:]))
    return found


def slow(stack, tokenizer, data, mask) -> dict[str, float]:
    """The means of the token measures."""
    sums, count = dict.fromkeys(("nll", "kl", "agreement"), 0.0), 0
    for item in data:
        pruned = scored(without(stack, mask), tokenizer, item)
        full = scored(stack.model, tokenizer, item)
        for (log_q, ids), (log_p, _) in zip(pruned, full, strict=True):
            for place, label in enumerate(ids):
                p, q = log_p[place].exp(), log_q[place].exp()
                sums["nll"] -= float(log_q[place, label])
                sums["kl"] += float((p * (p / q).log()).sum())
                sums["agreement"] += float(p.argmax() == q.argmax())
                count += 1
    return {name: total / count for name, total in sums.items()}


# --- each measure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_token_measures_are_those_of_the_pruned_model(stack, tokenizer, mask):
    for name, mean in slow(stack, tokenizer, MIXED, mask).items():
        quality = RemovalQuality(stack, tokenizer, MIXED, objective=name, batch_size=3)
        expected = mean if name == "agreement" else math.exp(-mean)
        assert quality(mask) == pytest.approx(expected, rel=1e-4)
        assert mask == () or expected < 0.98, "the layers matter"


def test_nll_is_the_mean_loss_of_the_pruned_model(stack, tokenizer):
    quality = RemovalQuality(stack, tokenizer, MIXED)
    for mask in MASKS:
        loss = mean_nll(without(stack, mask), tokenizer, MIXED, max_length=POSITIONS)
        assert quality(mask) == pytest.approx(math.exp(-loss), rel=1e-5)


@pytest.mark.parametrize("name", ["kl", "agreement"])
def test_the_full_model_is_as_good_as_itself(stack, tokenizer, name):
    quality = RemovalQuality(stack, tokenizer, MIXED, objective=name, batch_size=2)
    assert quality(()) == 1.0
    assert quality.change(()) == 0.0
    assert quality((2, 5)) < 0.99
    assert quality.change((2, 5)) == pytest.approx(quality((2, 5)) - 1)


def test_kl_is_not_that_of_the_other_direction(llama_stack, tokenizer):
    data, mask = items(4), (2, 5)
    backwards = 0.0
    for item in data:
        (log_q, ids), (log_p, _) = (
            scored(model, tokenizer, item)[0]
            for model in (llama_stack.remove(mask), llama_stack.model)
        )
        backwards += float((log_q.exp() * (log_q - log_p)).sum()) / len(ids)
    quality = RemovalQuality(llama_stack, tokenizer, data, objective="kl")
    forwards = slow(llama_stack, tokenizer, data, mask)["kl"]
    assert -math.log(quality(mask)) == pytest.approx(forwards, rel=1e-4)
    assert forwards != pytest.approx(backwards / len(data), rel=0.05)


def test_accuracy_is_the_score_of_the_benchmark(stack, tokenizer):
    data = choice_items()
    quality = RemovalQuality(stack, tokenizer, data, objective="accuracy", batch_size=5)
    found = []
    for mask in MASKS:
        evaluator = HolisticEvaluator(without(stack, mask), tokenizer)
        assert quality(mask) == pytest.approx(evaluator.run_benchmark(data)["pick"])
        found.append(quality(mask))
    assert len(set(found)) > 1, "the masks differ"


def test_accuracy_is_that_of_the_items_with_choices(llama_stack, tokenizer):
    data = choice_items(9)
    mixed = [*items(3), *data[:4], LONG, *data[4:]]
    quality = RemovalQuality(llama_stack, tokenizer, mixed, objective="accuracy", batch_size=4)
    assert (
        quality((2, 5))
        == HolisticEvaluator(llama_stack.remove((2, 5)), tokenizer).run_benchmark(data)["pick"]
    )


def test_similarity_is_that_of_the_pruned_models_answers(llama_stack, tokenizer, embedder):
    data = items(3)
    quality = RemovalQuality(llama_stack, tokenizer, [*data, LONG], objective="similarity")
    found = []
    for mask in ((), (2, 5)):
        evaluator = ModelEvaluator(without(llama_stack, mask), tokenizer, embedder=embedder)
        assert quality(mask) == pytest.approx(evaluator.evaluate(data))
        found.append(quality(mask))
    assert found[0] != found[1]


def test_similarity_is_measured_on_a_model_that_lacks_the_layers(
    llama_stack, tokenizer, eval_data, monkeypatch
):
    """Generation addresses the cache by layer number: a bypassed model will not do."""
    seen = []

    def evaluate_items(self, asked):
        layers = LayerStack(self.model)
        slots = [layer.self_attn.layer_idx for layer in layers]
        assert slots == list(range(len(layers)))
        assert self.model.config.num_hidden_layers == len(layers)
        assert self.batch_size == 3
        ids = torch.tensor([[5, 6, 7]])
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": ids * 0 + 1}
        cached, plain = (
            self.model.generate(ids, use_cache=use, **options) for use in (True, False)
        )
        assert torch.equal(cached, plain)
        seen.append((self.model, len(layers), [item["prompt"] for item in asked]))
        return [0.9 - 0.1 * (N_LAYERS - len(layers))] * len(asked)

    monkeypatch.setattr(ModelEvaluator, "evaluate_items", evaluate_items)
    layers = list(llama_stack)
    quality = RemovalQuality(
        llama_stack, tokenizer, eval_data, objective="similarity", batch_size=3
    )
    assert "similarity" in quality.unit
    assert quality.change([2, 5]) == pytest.approx(-0.2 / 0.9)
    for number in (N_LAYERS, N_LAYERS - 2):
        asked = [prompt for _, count, prompts in seen if count == number for prompt in prompts]
        assert sorted(asked) == sorted(item["prompt"] for item in eval_data)
    shared = {id(parameter) for parameter in llama_stack.model.parameters()}
    for model, number, _ in seen:
        assert (model is llama_stack.model) == (number == N_LAYERS)
        assert all(id(parameter) in shared for parameter in model.parameters())
    assert list(llama_stack) == layers


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "shares"),
    [
        ("nll=0.7,kl=0.3", {"nll": 0.7, "kl": 0.3}),
        ({"nll": 3, "accuracy": 1}, {"nll": 0.75, "accuracy": 0.25}),
        ("kl, agreement=3 ,nll=4", {"kl": 0.125, "agreement": 0.375, "nll": 0.5}),
    ],
    ids=str,
)
def test_a_mixture_is_the_weighted_mean_of_relative_changes(
    llama_stack, tokenizer, objective, shares
):
    data = [*choice_items(10), *items(4)]
    quality = RemovalQuality(llama_stack, tokenizer, data, objective=objective, batch_size=4)
    assert quality(()) == 1.0
    for mask in MASKS[1:]:
        alone = {
            name: RemovalQuality(llama_stack, tokenizer, data, objective=name) for name in shares
        }
        each = {name: one(mask) / one(()) - 1 for name, one in alone.items()}
        expected = sum(share * each[name] for name, share in shares.items())
        assert quality.change(mask) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert quality(mask) == pytest.approx(1 + expected, rel=1e-5)


def test_the_unit_names_what_is_mixed(llama_stack, tokenizer):
    quality = RemovalQuality(llama_stack, tokenizer, items(2), objective="nll=3,kl=1")
    assert quality.unit == "weighted relative change (0.75 nll, 0.25 kl)"


@pytest.mark.parametrize("objective", ["nll", "nll=7", {"nll": 0.1}, " nll "], ids=str)
def test_one_measure_has_all_of_the_weight(objective):
    assert parse_objective(objective) == {"nll": 1.0}


def test_weights_add_up_to_1():
    assert parse_objective("nll=2,kl=5,accuracy=1") == {"nll": 0.25, "kl": 0.625, "accuracy": 0.125}
    assert parse_objective("nll,kl") == {"nll": 0.5, "kl": 0.5}
    mixture = parse_objective({"nll": 0.7, "kl": 0.3})
    assert parse_objective(mixture) == mixture


@pytest.mark.parametrize("objective", ["nl", "nl=1", {"nl": 1}, "kl,nl"], ids=str)
def test_an_unknown_objective_is_refused(llama_stack, tokenizer, objective):
    with pytest.raises(UnknownNameError, match=r"objective 'nl'.*'nll'.*Known: "):
        RemovalQuality(llama_stack, tokenizer, items(2), objective=objective)


BAD = ["0", "-1", "nan", "inf", "much", "1=2", ""]


@pytest.mark.parametrize(
    "objective",
    [*(f"nll=1,kl={weight}" for weight in BAD)]
    + [{"kl": weight} for weight in (0, -1.0, math.nan, math.inf, "much", None)],
    ids=str,
)
def test_weights_that_are_no_positive_numbers_are_refused(objective):
    with pytest.raises(InvalidPlanError, match=r"weight of 'kl' must be a positive number, as in"):
        parse_objective(objective)


@pytest.mark.parametrize("objective", ["nll,nll", "nll=1,kl=1,nll=2", {}], ids=str)
def test_each_measure_is_named_once(objective):
    with pytest.raises(InvalidPlanError, match="must name each measure once"):
        parse_objective(objective)


@pytest.mark.parametrize("objective", ["", ",", "nll,"])
def test_an_empty_name_is_refused(objective):
    with pytest.raises(UnknownNameError, match="objective ''"):
        parse_objective(objective)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["accuracy", "nll=1,accuracy=1"])
@pytest.mark.parametrize("data", [items(2), [LONG], [{**items(1)[0], "choices": []}]], ids=len)
def test_accuracy_without_choices_is_refused(llama_stack, tokenizer, objective, data):
    with pytest.raises(InvalidDataError, match=r"items with 'choices', and none has any"):
        RemovalQuality(llama_stack, tokenizer, data, objective=objective)


def test_similarity_of_running_text_is_refused(llama_stack, tokenizer):
    with pytest.raises(InvalidDataError, match=r"all of these are running text. Use nll, kl"):
        RemovalQuality(llama_stack, tokenizer, [LONG, "the cat"], objective="similarity")


def test_every_window_of_a_text_is_a_sample(llama_stack, tokenizer):
    quality = RemovalQuality(llama_stack, tokenizer, [LONG, *items(2)])
    assert quality.samples() == 5
    tokens = 2 * (POSITIONS - 1) + 39
    answers = [encode_pair(tokenizer, i["prompt"], i["reference"]) for i in items(2)]
    assert float(quality._weights.sum()) == tokens + sum(len(ids) - n for ids, n in answers)


# --- what makes no difference ---------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["nll", "kl", "agreement", "accuracy"])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_batches_change_nothing(llama_stack, tokenizer, objective, batch_size):
    data = [*choice_items(12), *items(3), LONG]
    one, other = (
        RemovalQuality(
            llama_stack, tokenizer, data, objective=objective, batch_size=size, seed=size
        )
        for size in (3, batch_size)
    )
    for mask in ((), (2, 5), (0, 1)):
        assert other(mask) == pytest.approx(one(mask), rel=1e-5)


@pytest.mark.parametrize("objective", ["nll", "kl", "accuracy", "similarity"])
def test_the_side_of_the_padding_changes_nothing(llama_stack, tokenizer, embedder, objective):
    data = choice_items(4)
    left = copy.deepcopy(tokenizer)
    left.padding_side = {"left": "right", "right": "left"}[tokenizer.padding_side]
    one, other = (
        RemovalQuality(llama_stack, known, data, objective=objective) for known in (tokenizer, left)
    )
    assert other((2, 5)) == pytest.approx(one((2, 5)), rel=1e-5)


@pytest.mark.parametrize("name", ["nll", "kl", "agreement"])
def test_what_else_is_measured_changes_nothing(llama_stack, tokenizer, name):
    alone = RemovalQuality(llama_stack, tokenizer, items(), objective=name)
    together = RemovalQuality(llama_stack, tokenizer, items(), objective=name)
    together.measure(MASKS)
    for mask in MASKS:
        assert together(mask) == alone(mask)


@pytest.mark.parametrize("training", [True, False])
def test_between_readings_the_caller_has_model_and_gradients_as_they_were(
    llama_stack, tokenizer, training
):
    rows = encode_rows(tokenizer, items(3), max_length=POSITIONS)
    samples = Samples(llama_stack, tokenizer, rows, list(items(3)), 3)
    llama_stack.model.train(training)
    llama_stack.model.model.norm.train(not training)
    before = {name: module.training for name, module in llama_stack.model.named_modules()}
    for _ in TokenMeasures(samples, ["kl"]).read([0, 2], MASKS):
        assert torch.is_grad_enabled()
        assert {name: m.training for name, m in llama_stack.model.named_modules()} == before


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_slope_is_the_derivative_of_the_quality(name):
    objective, step = OBJECTIVES[name], 1e-6
    for mean in (0.1, 0.7, 2.0):
        rise = objective.quality(mean + step) - objective.quality(mean - step)
        assert objective.slope(mean) == pytest.approx(rise / (2 * step), rel=1e-5)
        better = objective.quality(mean + (-step if objective.is_loss else step))
        assert better > objective.quality(mean)


@pytest.mark.parametrize("objective", [None, 5, ["nll"]], ids=str)
def test_what_is_no_objective_is_refused(objective):
    with pytest.raises(InvalidPlanError, match="must be a name, as nll, or several with weights"):
        parse_objective(objective)


@pytest.mark.parametrize("choices", [["a cat", "a mat"], "red", ["red"]], ids=str)
def test_accuracy_refuses_choices_without_the_reference(llama_stack, tokenizer, choices):
    item = {"prompt": "the cat", "reference": "red", "choices": choices}
    with pytest.raises(InvalidDataError, match=r"data\[24\] has reference 'red' and choices"):
        RemovalQuality(
            llama_stack, tokenizer, [*choice_items(), item], objective="accuracy", batch_size=4
        )
