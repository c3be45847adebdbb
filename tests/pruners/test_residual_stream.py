"""States that are not (sequences, tokens, hidden): brought into that shape, or refused."""

from __future__ import annotations

import pytest
import torch
import zoo
from conftest import items
from torch.nn.functional import cosine_similarity

from llm_pruner import get_strategy
from llm_pruner.errors import UnsupportedModelError
from llm_pruner.model.layer_stack import LayerStack

REFUSED = {
    "blt": "cannot be told apart by token",
    "cpmant": "cannot be told apart by token",
    "prophetnet": "cannot be told apart by token",
    "xlnet": "cannot be told apart by token",
    "mllama": r"Layers \[\d+, \d+\] do not run on text alone",
}


@pytest.mark.parametrize(
    ("name", "streams"), [("gemma3n_text", 0), ("deepseek_v4", 2), ("hy_v4", 2)]
)
def test_several_streams_of_a_token_count_as_one_vector(name, streams, tokenizer):
    """Items one by one, so that there is no padding, and hooks around every layer."""
    model, data = zoo.build(name), items(5)
    sums = torch.zeros(len(LayerStack(model)), dtype=torch.float64)
    count = 0
    for item in data:
        pruner = get_strategy("bi")(model, tokenizer)
        ((_, real),) = pruner.hidden_states([item])
        states: list[tuple[torch.Tensor, torch.Tensor]] = []
        with LayerStack(model).observe(lambda _, *pair: states.append(pair)):  # noqa: B023
            list(pruner.hidden_states([item]))
        for layer, pair in enumerate(states):
            one, two = (x.double().movedim(streams, -2).flatten(-2)[0] for x in pair)
            assert one.shape[0] == real.sum()
            sums[layer] += cosine_similarity(one, two, dim=-1).sum()
        count += int(real.sum())
    scores = get_strategy("bi")(model, tokenizer).compute_layer_scores(data)
    assert list(scores.values()) == pytest.approx((1 - sums / count).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("strategy", ["bi", "pruneme", "avss"])
def test_states_of_other_tokens_are_refused(name, strategy, tokenizer):
    with pytest.raises(UnsupportedModelError, match=f"{REFUSED[name]}.*use ablation or smart"):
        get_strategy(strategy)(zoo.build(name), tokenizer).compute_layer_scores(items())


@pytest.mark.parametrize("name", [*REFUSED, "gemma3n_text", "deepseek_v4"])
def test_the_search_does_without_them(name, tokenizer):
    plan = get_strategy("smart")(zoo.build(name), tokenizer).plan(items(16), n_layers=2)
    assert len(plan.remove) == 2
