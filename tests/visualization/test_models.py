"""Figures that need the model, read back and computed another way."""

import pytest
import torch
from conftest import tiny_llama
from drawn import legend_texts, line_of
from matplotlib.colors import to_hex
from test_figures import MODEL, PRUNED, TOKENIZER, Letters, broken

from llm_pruner.errors import (
    InvalidDataError,
    InvalidPlanError,
    MissingDependencyError,
    NonFiniteError,
)
from llm_pruner.evaluation import generation, similarity
from llm_pruner.visualization import models as model_figures
from llm_pruner.visualization.models import plot_activation_comparison, plot_semantic_comparison
from llm_pruner.visualization.style import BLUE, GREEN, ORANGE

PROMPT = "the cat sat on a mat"


def naive_streams(removed):
    """State before each kept layer and after the last, by calling the layers one by one."""
    text = "Question: " + PROMPT + "\nAnswer:"
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    hidden = MODEL.model.embed_tokens(ids)
    rotary = MODEL.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    states = {}
    for index, layer in enumerate(MODEL.model.layers):
        if index not in removed:
            states[index] = hidden[0]
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    states[len(MODEL.model.layers)] = hidden[0]
    return states


@torch.no_grad()
def test_activation_comparison_equals_a_layer_by_layer_computation():
    removed = [2, 5]
    figure = plot_activation_comparison(MODEL, TOKENIZER, PROMPT, removed)
    left, right = figure.axes
    full, pruned = (naive_streams(layers) for layers in ([], removed))
    for colour, states in ((BLUE, full), (ORANGE, pruned)):
        depths, values = line_of(left, colour).get_data()
        wanted = [states[d].square().mean(-1).sqrt().quantile(0.5).item() for d in depths]
        assert list(depths) == sorted(states)
        assert values == pytest.approx(wanted, rel=1e-4)
    depths, values = line_of(right, GREEN).get_data()
    cosine = torch.nn.functional.cosine_similarity
    wanted = [cosine(full[d], pruned[d], dim=-1).quantile(0.5).item() for d in depths]
    assert list(depths) == [0, 1, 3, 4, 6, 7, 8]
    assert values == pytest.approx(wanted, rel=1e-4)
    assert list(values[:2]) == [1.0, 1.0]
    assert values[-1] < 0.999
    assert right.get_title() == f"at the output: {wanted[-1]:.3f}"


def test_removed_layers_are_shaded_from_input_to_output():
    figure = plot_activation_comparison(MODEL, TOKENIZER, PROMPT, [2, 3])
    for axes in figure.axes:
        spans = [(patch.get_x(), patch.get_width()) for patch in axes.patches]
        assert spans == [(2, 1), (3, 1)]
        assert [label.get_text() for label in axes.get_xticklabels()] == [*"01234567", "out"]
    assert legend_texts(figure) == ["full model", "pruned model", "removed layers"]
    assert figure.get_suptitle() == "Residual stream with 2 of 8 layers removed"


def test_equal_states_have_similarity_one_even_where_they_are_zero():
    model = tiny_llama(3)
    torch.nn.init.zeros_(model.model.embed_tokens.weight)
    _, right = plot_activation_comparison(model, TOKENIZER, PROMPT, [1]).axes
    assert line_of(right, GREEN).get_ydata()[0] == 1.0


def test_activation_comparison_leaves_the_model_as_it_was():
    model = tiny_llama(3).train()
    layers = list(model.model.layers)
    plot_activation_comparison(model, TOKENIZER, PROMPT, [1])
    assert all(module.training for module in model.modules())
    assert list(model.model.layers) == layers
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model", "prompt", "layers", "error", "message"),
    [
        (MODEL, PROMPT, [8], InvalidPlanError, "Layer 8 is out of range"),
        (MODEL, "  ", [1], InvalidDataError, "The prompt '  ' is no text"),
        (MODEL, [PROMPT], [1], InvalidDataError, "a list, not one text"),
        (broken(), PROMPT, [1], NonFiniteError, "at layer 3 is NaN"),
    ],
)
def test_activation_comparison_refuses(model, prompt, layers, error, message):
    with pytest.raises(error, match=message):
        plot_activation_comparison(model, TOKENIZER, prompt, layers)


@torch.no_grad()
def test_next_token_probabilities_are_those_of_the_models():
    figure = plot_semantic_comparison(
        MODEL, PRUNED, TOKENIZER, PROMPT, embedder=Letters(), top_k=3, max_new_tokens=8
    )
    axes = figure.axes[0]
    ids = TOKENIZER("Question: " + PROMPT + "\nAnswer:", return_tensors="pt")["input_ids"]
    one, two = (m(ids).logits[0, -1].softmax(-1) for m in (MODEL, PRUNED))
    best = {*one.topk(3).indices.tolist(), *two.topk(3).indices.tolist()}
    order = sorted(best, key=lambda token: -one[token])
    wanted = [*one[order].tolist(), *two[order].tolist()]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(wanted, rel=1e-4)
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert colours == [BLUE] * len(order) + [ORANGE] * len(order)
    labels = [label.get_text().lstrip("\u2423") for label in axes.get_yticklabels()]
    assert labels == [TOKENIZER.convert_ids_to_tokens(t) or f"<{t}>" for t in order]
    overlap = torch.minimum(one, two).sum().item()
    said = f"both give {overlap:.0%} of the probability to the same tokens"
    assert axes.get_title() == said


def test_tokens_that_neither_model_expects_have_no_bar(monkeypatch):
    monkeypatch.setattr(model_figures, "SMALLEST", 0.05)
    axes = plot_semantic_comparison(
        MODEL, PRUNED, TOKENIZER, PROMPT, embedder=Letters(), max_new_tokens=4, top_k=20
    ).axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    half = len(widths) // 2
    assert min(map(max, widths[:half], widths[half:])) >= 0.05
    assert half < 20


def test_the_same_answer_twice_is_said():
    figure = plot_semantic_comparison(
        MODEL, MODEL, TOKENIZER, PROMPT, embedder=Letters(), max_new_tokens=4
    )
    last = figure.axes[1].texts[-1].get_text()
    assert last == "semantic similarity: 1 (the same answer)"


def test_the_answers_and_their_similarity_are_printed():
    embedder = Letters()
    figure = plot_semantic_comparison(
        MODEL, PRUNED, TOKENIZER, PROMPT, embedder=embedder, max_new_tokens=8
    )
    answers = [
        generation.ModelEvaluator(m, TOKENIZER, max_new_tokens=8).generate([PROMPT])[0]
        for m in (MODEL, PRUNED)
    ]
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert texts[:2] == ["prompt", PROMPT]
    body = " ".join(texts[2:-1])
    assert body == f"original model {answers[0]} pruned model {answers[1]}"
    one, two = embedder.encode(answers)
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=0)
    assert texts[-1] == f"semantic similarity: {cosine:.3f} (hardly sees word order)"


def test_without_an_embedder_the_figure_says_so(monkeypatch):
    def none():
        raise MissingDependencyError("not here")

    monkeypatch.setattr(similarity, "load_embedder", none)
    figure = plot_semantic_comparison(MODEL, PRUNED, TOKENIZER, PROMPT, max_new_tokens=4)
    last = figure.axes[1].texts[-1].get_text()
    assert last == "semantic similarity: not computed (no sentence embedder)"


def test_special_characters_are_visible_and_long_texts_cut():
    prompts = ["$x^{2$ costs 5 \\frac{1}\nand \u4f60\tor \x07", "a long story about a cat " * 40]
    options = {"embedder": Letters(), "max_new_tokens": 4}
    figure = plot_semantic_comparison(MODEL, PRUNED, TOKENIZER, prompts, **options)
    shown = figure.axes[1].texts[1].get_text()
    assert shown == "$x^{2$ costs 5 \\frac{1}\u21b5and \\u4f60\\tor \\x07"
    assert any(text.get_text().endswith(" \u2026") for text in figure.axes[3].texts)


def other_vocabulary():
    model = tiny_llama(1)
    model.resize_token_embeddings(70)
    return model


@pytest.mark.parametrize(
    ("pruned", "prompt", "error", "message"),
    [
        (PRUNED, ["a"] * 7, InvalidDataError, "7 prompts given: .* 1 to 6"),
        (PRUNED, [], InvalidDataError, "0 prompts given"),
        (PRUNED, ["a", 3], InvalidDataError, "The prompt 3 is no text"),
        (other_vocabulary(), "a cat", InvalidDataError, "64 and 70 tokens in their vocabularies"),
        (broken(), "a cat", NonFiniteError, "NaN"),
    ],
)
def test_semantic_comparison_refuses(pruned, prompt, error, message):
    with pytest.raises(error, match=message):
        plot_semantic_comparison(MODEL, pruned, TOKENIZER, prompt, max_new_tokens=2)


def test_tokens_show_their_spaces_and_keep_to_a_width():
    class Pieces:
        pieces = ("x", " a cat", "\ufffd", "\n", "m" * 40, "")

        def decode(self, ids, **options):
            return "".join(self.pieces[i] for i in ids)

        def convert_ids_to_tokens(self, token):
            return {2: "<0xE4>"}.get(token)

    shown = [model_figures._token_text(Pieces(), 0, token) for token in range(1, 6)]
    assert shown == ["\u2423a\u2423cat", "<0xE4>", "\u21b5", "m" * 17 + "\u2026", "<5>"]
