"""AVSS by hand, and against single sequences."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from conftest import make_identity, tiny_gpt2, tiny_llama
from oracles import BOTH, DEPTH, MIXED, close, random_llama, slow_streams

from llm_pruner.errors import InvalidPlanError, NonFiniteError
from llm_pruner.pruners.avss import AVSSPruner

# Two sequences of 2 and 1 real tokens, hidden size 3; the padding (99s and a 0) must not count.
ENTERING = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], [[2.0, 4.0, 0.0], [99, 99, 0.0]]])
LEAVING = torch.tensor([[[2.0, 2.0, 0.0], [4.0, 0.0, 2.0]], [[2.0, 8.0, 5e-6], [99, 0.0, 99]]])
REAL = torch.tensor([[True, True], [True, False]])


REPAIRED = {"variant": "repaired"}
PUBLISHED = {"variant": "published", "pool": "sequence"}
LITERAL = {"variant": "published", "pool": "none"}


def avss_on(monkeypatch, tokenizer, batches, **options) -> float:
    """The score of a model of one layer that is made to have these hidden states."""
    pruner = AVSSPruner(tiny_llama(1), tokenizer, **options)
    monkeypatch.setattr(pruner, "hidden_states", lambda data, shared: iter(batches))
    return pruner.compute_layer_scores(["unused"])[0]


def test_published_avss_by_hand(monkeypatch, tokenizer):
    """Means over the sequence (3, 1, 1) and (2, 8, 5e-6); 3 of 9 elements are below 1e-5."""
    assert statistics.variance([3, 1, 1]) == pytest.approx(4 / 3)
    assert statistics.variance([2, 8, 0]) == pytest.approx(52 / 3)
    variance = (4 / 3 + 52 / 3) / 2
    batches = [([ENTERING, LEAVING], REAL)]
    got = avss_on(monkeypatch, tokenizer, batches, **PUBLISHED)
    assert got == pytest.approx(variance / (3 / 9), rel=1e-5)
    got = avss_on(monkeypatch, tokenizer, batches, **PUBLISHED, epsilon=3)
    assert got == pytest.approx(variance / (7 / 9), rel=1e-5)
    got = avss_on(monkeypatch, tokenizer, [([LEAVING, LEAVING + 1], REAL)], **PUBLISHED)
    assert got == pytest.approx(variance / (0.5 / 9), rel=1e-5), "no sparse element"


def test_the_formula_of_avss_to_the_letter_by_hand(monkeypatch, tokenizer):
    """Nine activations, of which three are below 1e-5 and seven below 3."""
    variance = statistics.pvariance([2, 2, 0, 4, 0, 2, 2, 8, 5e-6])
    batches = [([ENTERING, LEAVING], REAL)]
    got = avss_on(monkeypatch, tokenizer, batches, **LITERAL)
    assert got == pytest.approx(variance / (3 / 9), rel=1e-5)
    got = avss_on(monkeypatch, tokenizer, batches, **LITERAL, epsilon=3)
    assert got == pytest.approx(variance / (7 / 9), rel=1e-5)


def test_repaired_avss_by_hand(monkeypatch, tokenizer):
    """Additions (1, 0, -3), (1, -2, 1) and (0, 4, 5e-6); 3 of 9 are small beside their token's."""
    added = [1, 0, -3, 1, -2, 1, 0, 4, 5e-6]
    entering = [1, 2, 3, 3, 2, 1, 2, 4, 0]
    want = (statistics.pvariance(added) / statistics.pvariance(entering)) / (3 / 9)
    got = avss_on(monkeypatch, tokenizer, [([ENTERING, LEAVING], REAL)], **REPAIRED)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("variant", [REPAIRED, PUBLISHED, LITERAL], ids=str)
def test_avss_of_two_batches_is_that_of_one(monkeypatch, tokenizer, variant):
    one = [([ENTERING, LEAVING], REAL)]
    split = [([ENTERING[[i]], LEAVING[[i]]], REAL[[i]]) for i in (1, 0)]
    want = avss_on(monkeypatch, tokenizer, one, **variant)
    assert avss_on(monkeypatch, tokenizer, split, **variant) == pytest.approx(want)


@pytest.mark.parametrize("variant", [REPAIRED, PUBLISHED, LITERAL], ids=str)
def test_avss_never_reads_the_padding(monkeypatch, tokenizer, variant):
    """Under the padding may stand anything, also what overflowed there."""
    want = avss_on(monkeypatch, tokenizer, [([ENTERING, LEAVING], REAL)], **variant)
    batch = [state.masked_fill(~REAL.unsqueeze(-1), math.nan) for state in (ENTERING, LEAVING)]
    assert avss_on(monkeypatch, tokenizer, [(batch, REAL)], **variant) == pytest.approx(want)


def slow_published(streams: list[torch.Tensor], layer: int) -> float:
    variances, small, count = [], 0, 0
    for stream in streams:
        output = stream[layer + 1].tolist()
        means = [sum(column) / len(output) for column in zip(*output, strict=True)]
        variances.append(statistics.variance(means))
        small += sum(abs(value) < 1e-5 for token in output for value in token)
        count += sum(map(len, output))
    return statistics.mean(variances) / (max(small, 0.5) / count)


def label(value: object) -> str:
    """An id that every test process gives alike."""
    return getattr(value, "__name__", str(value))


def slow_literal(streams: list[torch.Tensor], layer: int) -> float:
    values = [value for stream in streams for value in stream[layer + 1].flatten().tolist()]
    small = sum(abs(value) < 1e-5 for value in values)
    return statistics.pvariance(values) / (max(small, 0.5) / len(values))


def slow_repaired(streams: list[torch.Tensor], layer: int) -> float:
    added, entering, small = [], [], 0
    for stream in streams:
        for x, y in zip(stream[layer].tolist(), stream[layer + 1].tolist(), strict=True):
            update = [after - before for before, after in zip(x, y, strict=True)]
            size = math.sqrt(sum(value**2 for value in update) / len(update))
            small += sum(abs(value) < 0.1 * size for value in update)
            added += update
            entering += x
    ratio = statistics.pvariance(added) / statistics.pvariance(entering)
    return ratio / (max(small, 0.5) / len(added))


@BOTH
@pytest.mark.parametrize(
    ("variant", "slow"),
    [
        (REPAIRED, slow_repaired),
        (PUBLISHED, slow_published),
        (LITERAL, slow_literal),
    ],
    ids=label,
)
def test_avss_is_that_of_single_sequences(build, tokenizer, variant, slow):
    model = build()
    pruner = AVSSPruner(model, tokenizer, batch_size=4, **variant)
    streams = slow_streams(model, tokenizer, MIXED)
    want = [slow(streams, layer) for layer in range(DEPTH)]
    assert list(pruner.compute_layer_scores(MIXED).values()) == close(want)


@pytest.mark.parametrize(
    ("variant", "slow"),
    [(PUBLISHED, slow_published), (LITERAL, slow_literal)],
    ids=label,
)
def test_published_avss_counts_zeros(tokenizer, variant, slow):
    """A model whose last layer leaves exact zeros: the sparsity is no longer half an element."""
    model = tiny_gpt2(DEPTH)
    with torch.no_grad():
        for linear in (model.transformer.h[5].attn.c_proj, model.transformer.h[5].mlp.c_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        for index in range(5):
            for linear in (
                model.transformer.h[index].attn.c_proj,
                model.transformer.h[index].mlp.c_proj,
            ):
                linear.weight[:, :4] = 0
                linear.bias[:4] = 0
        model.transformer.wte.weight[:, :4] = 0
        model.transformer.wpe.weight[:, :4] = 0
    streams = slow_streams(model, tokenizer, MIXED)
    assert (streams[0][-1][:, :4] == 0).all()
    pruner = AVSSPruner(model, tokenizer, **variant)
    want = [slow(streams, layer) for layer in range(DEPTH)]
    assert list(pruner.compute_layer_scores(MIXED).values()) == close(want)


def test_repaired_avss_of_an_identity_layer_is_0(tokenizer):
    model = random_llama()
    make_identity(model, 3)
    scores = AVSSPruner(model, tokenizer).compute_layer_scores(MIXED)
    assert scores[3] == 0
    assert min(score for layer, score in scores.items() if layer != 3) > 0
    assert AVSSPruner(model, tokenizer).plan(MIXED, n_layers=1).remove == (3,)


def test_avss_of_a_constant_stream_is_refused(tokenizer):
    model = tiny_gpt2(DEPTH)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    with pytest.raises(NonFiniteError, match=r"layers \[0"):
        AVSSPruner(model, tokenizer).compute_layer_scores(MIXED)


def test_avss_variant_is_checked_and_recorded(llama, tokenizer, eval_data):
    with pytest.raises(InvalidPlanError, match="variant='raw' must be 'repaired' or 'published'"):
        AVSSPruner(llama, tokenizer, variant="raw")
    plan = AVSSPruner(llama, tokenizer, variant="published", epsilon=0.1).plan(eval_data)
    recorded = {"variant": "published", "pool": "sequence", "epsilon": 0.1}
    assert plan.options.items() >= recorded.items()
    assert len(plan.remove) == 2, "a quarter by default"
    assert "pool" not in AVSSPruner(llama, tokenizer).plan(eval_data).options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "mean"}, "pool='mean' must be one of sequence, none"),
        ({"pool": None}, "pool=None must be one of sequence, none"),
        ({"epsilon": 0}, "epsilon=0 must be a number above 0"),
        ({"epsilon": -1e-5}, "epsilon=-1e-05 must be"),
        ({"epsilon": math.nan}, "epsilon=nan must be"),
        ({"epsilon": math.inf}, "epsilon=inf must be"),
        ({"epsilon": "1e-5"}, "epsilon='1e-5' must be"),
        ({"epsilon": True}, "epsilon=True must be"),
        ({"variant": "repaired", "pool": "none"}, r"have no meaning for variant='repaired': leave"),
        ({"variant": "repaired", "epsilon": 0.1}, r"use variant='published'"),
    ],
    ids=str,
)
def test_impossible_readings_of_avss_are_refused(llama, tokenizer, options, message):
    with pytest.raises(InvalidPlanError, match=message):
        AVSSPruner(llama, tokenizer, **{"variant": "published", **options})
