"""Objectives: one contract for all, checked on pruned models by slow loops; then mixtures."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from conftest import WORDS, items, tiny_gpt2, tiny_llama, word_tokenizer

from llm_pruner.data.tokens import encode_pair
from llm_pruner.errors import (
    InvalidDataError,
    InvalidPlanError,
    UnknownNameError,
    UnsupportedModelError,
)
from llm_pruner.evaluation import generation
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.offload.offloaded_stack import layers_of, load_streamed
from llm_pruner.search.objectives import OBJECTIVES, parse_objective
from llm_pruner.search.removal_quality import RemovalQuality
from llm_pruner.utils import clean_output, render_prompt

LAYER_SETS = [(), (0,), (7,), (2, 5), (1, 3, 4, 6)]
POSITIONS = 128
NEW_TOKENS = 64
LONG = " ".join(random.Random(1).choices(WORDS, k=2 * POSITIONS + 40))  # three windows


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


TEXTS = ["the cat sat on the old red mat", LONG, "one bird by our house"]
# Of everything a bit, in no order; generation is slow, so it gets less.
DATA = {name: [*items(3), *choice_items(16), *TEXTS, *items(5)[3:]] for name in OBJECTIVES}
DATA["similarity"] = [*items(2), LONG, *choice_items(2)]


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


@pytest.fixture(autouse=True)
def embedder(monkeypatch):
    monkeypatch.setattr(generation, "load_embedder", WordVectors)


@pytest.fixture(params=["llama", "gpt2"])
def stack(request):
    return LayerStack({"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]())


@pytest.fixture
def llama_stack(llama):
    return LayerStack(llama)


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def scored(model, tokenizer, item) -> list[tuple[torch.Tensor, list[int]]]:
    """Log-probabilities at the scored tokens and the tokens, sequence by sequence."""
    if isinstance(item, str):
        ids = tokenizer(item)["input_ids"]
        parts = [(ids[at : at + POSITIONS], 1) for at in range(0, len(ids), POSITIONS)]
    else:
        parts = [encode_pair(tokenizer, item["prompt"], item["reference"])]
    return [(log_probabilities(model, ids)[n - 1 : -1], ids[n:]) for ids, n in parts]


def slow_tokens(pruned, full, tokenizer, item, name) -> list[float]:
    """A token measure at every scored token."""
    values = []
    pairs = zip(scored(pruned, tokenizer, item), scored(full, tokenizer, item), strict=True)
    for (log_q, ids), (log_p, _) in pairs:
        p, q = log_p.exp(), log_q.exp()
        measures = {
            "nll": -log_q[range(len(ids)), ids],
            "kl": (p * (p / q).log()).sum(-1),
            "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        }
        values += measures[name].tolist()
    return values


def slow_choice(pruned, tokenizer, item) -> float:
    losses = []
    for choice in item["choices"]:
        pair = {"prompt": item["prompt"], "reference": choice}
        losses.append(sum(slow_tokens(pruned, pruned, tokenizer, pair, "nll")))
    return float(item["choices"][losses.index(min(losses))] == item["reference"])


def slow_answer(pruned, tokenizer, item) -> float:
    """Argmax by argmax, without a cache; then the cosine."""
    ids = tokenizer(render_prompt(tokenizer, item["prompt"]))["input_ids"]
    end = len(ids) + NEW_TOKENS
    while len(ids) < end and (new := int(log_probabilities(pruned, ids)[-1].argmax())) != 2:
        ids.append(new)
    answer = tokenizer.decode(ids[end - NEW_TOKENS :], skip_special_tokens=True)
    texts = [clean_output(answer), item["reference"]]
    one, two = torch.nn.functional.normalize(WordVectors().encode(texts, False), dim=1)
    return float(one @ two) if texts[0] else 0.0


def slow(stack, tokenizer, removed, name) -> float:
    """The mean of a measure, from the pruned model itself, one unpadded sequence at a time."""
    pruned = stack.remove(removed) if removed else stack.model
    values: list[float] = []
    for item in DATA[name]:
        if name in ("nll", "kl", "agreement"):
            values += slow_tokens(pruned, stack.model, tokenizer, item, name)
        elif name == "accuracy" and isinstance(item, dict) and "choices" in item:
            values.append(slow_choice(pruned, tokenizer, item))
        elif name == "similarity" and isinstance(item, dict):
            values.append(slow_answer(pruned, tokenizer, item))
    return math.fsum(values) / len(values)


def measured(stack, tokenizer, name, **options) -> RemovalQuality:
    return RemovalQuality(stack, tokenizer, DATA[name], objective=name, **options)


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_quality_is_that_of_a_slow_loop_over_the_pruned_model(stack, tokenizer, name):
    quality = measured(stack, tokenizer, name, batch_size=3)
    found = []
    for removed in LAYER_SETS if name != "similarity" else LAYER_SETS[2:4]:
        mean = slow(stack, tokenizer, removed, name)
        expected = math.exp(-mean) if name in ("nll", "kl") else mean
        found.append(quality(removed))
        assert found[-1] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(set(found)) > 1, "the layers matter"


@pytest.mark.parametrize(
    ("name", "sequences", "counted"),
    [
        *((name, 26, 24) for name in ("nll", "kl", "agreement")),
        ("accuracy", 26, 16),
        ("similarity", 7, 4),
    ],
)
def test_every_item_that_fits_the_measure_counts(llama_stack, tokenizer, name, sequences, counted):
    quality = measured(llama_stack, tokenizer, name)
    assert quality.size() == sequences, "every window of a text is a sequence"
    assert quality.items == counted


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_size_order_and_padding_side_change_nothing(llama_stack, tokenizer, name):
    other_side = copy.deepcopy(tokenizer)
    other_side.padding_side = {"left": "right", "right": "left"}[tokenizer.padding_side]
    removed = [(), (2, 5), (0, 1)] if name != "similarity" else [(2, 5)]
    want = [measured(llama_stack, tokenizer, name, batch_size=3)(one) for one in removed]
    for size in (1, 7, 100):
        quality = measured(llama_stack, other_side, name, batch_size=size, seed=size)
        assert [quality(one) for one in removed] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_else_is_measured_changes_nothing(llama_stack, tokenizer, name):
    layer_sets = LAYER_SETS if name != "similarity" else LAYER_SETS[:2]
    together = measured(llama_stack, tokenizer, name)
    together.measure(layer_sets)
    for removed in layer_sets:
        assert measured(llama_stack, tokenizer, name)(removed) == together(removed)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("training", [True, False])
def test_model_modes_and_gradients_are_as_before(llama_stack, tokenizer, name, training):
    llama_stack.model.train(training)
    llama_stack.model.model.norm.train(not training)
    before = {key: module.training for key, module in llama_stack.model.named_modules()}
    layers = list(llama_stack)
    measured(llama_stack, tokenizer, name)((2, 5))
    assert {key: m.training for key, m in llama_stack.model.named_modules()} == before
    assert torch.is_grad_enabled()
    assert list(llama_stack) == layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_offloaded_model_has_the_same_quality(llama_stack, folder, name):
    model, tokenizer = load_streamed(folder, device="cpu")
    if OBJECTIVES[name].measured_by.needs_pruned_model:
        with pytest.raises(UnsupportedModelError, match="similarity of answers, which generates"):
            measured(layers_of(model), tokenizer, name)
        return
    qualities = [measured(one, tokenizer, name) for one in (llama_stack, layers_of(model))]
    for removed in LAYER_SETS:
        assert len({quality(removed) for quality in qualities}) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_slope_is_the_derivative_of_the_quality(name):
    objective, step = OBJECTIVES[name], 1e-6
    for mean in (0.1, 0.7, 2.0):
        rise = objective.quality(mean + step) - objective.quality(mean - step)
        assert objective.slope(mean) == pytest.approx(rise / (2 * step), rel=1e-5)
        better = objective.quality(mean + (-step if objective.is_loss else step))
        assert better > objective.quality(mean)


# --- what is peculiar to one ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "agreement"])
def test_the_full_model_is_as_good_as_itself(stack, tokenizer, name):
    quality = measured(stack, tokenizer, name, batch_size=2)
    assert quality(()) == 1.0
    assert quality.change(()) == 0.0
    assert quality((2, 5)) < 0.99
    assert quality.change((2, 5)) == pytest.approx(quality((2, 5)) - 1)


@pytest.mark.parametrize("objective", ["accuracy", "nll=1,accuracy=1"])
@pytest.mark.parametrize("data", [items(2), [LONG], [{**items(1)[0], "choices": []}]], ids=len)
def test_accuracy_without_choices_is_refused(llama_stack, tokenizer, objective, data):
    with pytest.raises(InvalidDataError, match=r"items with 'choices', and none has any"):
        RemovalQuality(llama_stack, tokenizer, data, objective=objective)


@pytest.mark.parametrize("choices", [["a cat", "a mat"], "red", ["red"]], ids=str)
def test_accuracy_refuses_choices_without_the_reference(llama_stack, tokenizer, choices):
    item = {"prompt": "the cat", "reference": "red", "choices": choices}
    with pytest.raises(InvalidDataError, match=r"data\[24\] has reference 'red' and choices"):
        RemovalQuality(
            llama_stack, tokenizer, [*choice_items(), item], objective="accuracy", batch_size=4
        )


def test_similarity_of_running_text_is_refused(llama_stack, tokenizer):
    with pytest.raises(InvalidDataError, match=r"all of these are running text. Use nll, kl"):
        RemovalQuality(llama_stack, tokenizer, [LONG, "the cat"], objective="similarity")


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        ("nll=0.7,kl=0.3", {"nll": 0.7, "kl": 0.3}),
        ({"nll": 3, "accuracy": 1}, {"nll": 0.75, "accuracy": 0.25}),
        ("kl, agreement=3 ,nll=4", {"kl": 0.125, "agreement": 0.375, "nll": 0.5}),
        ("accuracy=2,kl=5,nll=1", {"accuracy": 0.25, "kl": 0.625, "nll": 0.125}),
    ],
    ids=str,
)
def test_a_mixture_is_the_weighted_mean_of_relative_changes(
    llama_stack, tokenizer, objective, weights
):
    data = [*choice_items(10), *items(4)]
    assert parse_objective(objective) == weights
    quality = RemovalQuality(llama_stack, tokenizer, data, objective=objective, batch_size=4)
    assert quality(()) == 1.0
    alone = {name: RemovalQuality(llama_stack, tokenizer, data, objective=name) for name in weights}
    for removed in LAYER_SETS[1:]:
        each = {name: one(removed) / one(()) - 1 for name, one in alone.items()}
        expected = sum(weight * each[name] for name, weight in weights.items())
        assert quality.change(removed) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert quality(removed) == pytest.approx(1 + expected, rel=1e-5)
    terms = ", ".join(f"{weight:.2g} {name}" for name, weight in weights.items())
    assert quality.unit == f"weighted relative change ({terms})"


@pytest.mark.parametrize("objective", ["nll", "nll=7", {"nll": 0.1}, " nll "], ids=str)
def test_one_measure_has_all_of_the_weight(objective):
    assert parse_objective(objective) == {"nll": 1.0}
    mixture = parse_objective("nll,kl")
    assert parse_objective(mixture) == mixture == {"nll": 0.5, "kl": 0.5}


BAD = ["0", "-1", "nan", "inf", "much", "1=2", ""]


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        *((name, UnknownNameError, r"objective 'nl'.*'nll'.*Known: ")
          for name in ("nl", "nl=1", {"nl": 1}, "kl,nl")),
        *((f"nll=1,kl={weight}", InvalidPlanError, r"weight of 'kl' must be a positive number, as")
          for weight in BAD),
        *(({"kl": weight}, InvalidPlanError, r"weight of 'kl' must be a positive number, as in")
          for weight in (0, -1.0, math.nan, math.inf, "much", None)),
        *((names, InvalidPlanError, "must name each measure once")
          for names in ("nll,nll", "nll=1,kl=1,nll=2", {})),
        *((empty, UnknownNameError, "objective ''") for empty in ("", ",", "nll,")),
        *((thing, InvalidPlanError, "must be a name, as nll, or several with weights")
          for thing in (None, 5, ["nll"])),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_objective_is_refused(llama_stack, tokenizer, objective, error, message):
    with pytest.raises(error, match=message):
        parse_objective(objective)
    with pytest.raises(error, match=message):
        RemovalQuality(llama_stack, tokenizer, items(2), objective=objective)
