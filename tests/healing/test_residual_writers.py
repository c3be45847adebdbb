"""What layers add to the residual stream: found in many architectures, and adding up to it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch
import zoo
from conftest import items, tiny_gpt2, tiny_llama
from torch import nn

from llm_pruner.data.tokens import Batch, encode_batches
from llm_pruner.errors import UnsupportedModelError
from llm_pruner.healing.residual_writers import (
    find_writers,
    gain_slope,
    hooked,
    is_tunable,
    run_layers,
)
from llm_pruner.model.bypass import hidden_out
from llm_pruner.model.layer_stack import LayerStack

# Architecture: the modules whose weights set what is added, in order; None where none does.
KNOWN = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],  # side by side
    "phi": ["self_attn.dense", "mlp.fc2"],  # side by side
    "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],  # a subclass of nn.Linear
    "gemma3_text": ["post_attention_layernorm", "post_feedforward_layernorm"],  # sandwich norms
    "olmo2": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "mixtral": ["self_attn.o_proj", None],  # experts
    "minicpm3": ["self_attn.o_proj", "mlp.down_proj"],  # times a constant
    "mamba": ["mixer.out_proj"],
    "xmod": [],  # a norm after the sum
}


@pytest.fixture(scope="module", params=sorted(KNOWN))
def built(request):
    return request.param, LayerStack(zoo.build(request.param).eval())


def test_the_weights_behind_every_part_are_found(built):
    name, stack = built
    for index in (1, len(stack) - 1):
        assert [writer.tuned for writer in find_writers(stack, index)] == KNOWN[name]


def test_the_parts_add_up_to_what_the_layer_does(built):
    _, stack = built
    parts: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for writer in (writers := find_writers(stack, 2)):
            module = stack[2].get_submodule(writer.part)
            hook = partial(lambda by, m, a, out: parts.append(by * hidden_out(out)), writer.scale)
            hooks.enter_context(hooked(module, hook))
        entering, leaving = run_layers(stack, batch_of(5, 6, 7, 8, 9), 2, 2)
    total = entering + sum(part.view_as(leaving) for part in parts)
    if writers:
        torch.testing.assert_close(total, leaving, rtol=1e-5, atol=1e-5)


def batch_of(*ids: int) -> Batch:
    row = torch.tensor([ids])
    return Batch(row, torch.ones_like(row), row, (0,))


def test_scale_and_order():
    minicpm = LayerStack(zoo.build("minicpm3").eval())
    want = minicpm.model.config.scale_depth / minicpm.model.config.num_hidden_layers**0.5
    first, last = find_writers(minicpm, 0)
    assert first.scale == pytest.approx(want, rel=1e-4)
    assert (first.later, last.later) == ((last,), ())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_layers_run_alone_give_what_the_whole_pass_gives(make, tokenizer):
    model = make()
    stack = LayerStack(model)
    batch = encode_batches(tokenizer, items(5), batch_size=5)[0]
    with torch.no_grad():
        states = model(**batch.inputs(), output_hidden_states=True).hidden_states
    assert stack.can_replay
    entering, leaving = run_layers(stack, batch, 3, 5)
    torch.testing.assert_close(entering, states[3])
    torch.testing.assert_close(leaving, states[6])
    ran = []
    with stack.observe(lambda index, before, after: ran.append(index)):
        torch.testing.assert_close(run_layers(stack, batch, 3, 5, entering)[1], leaving)
    assert ran == [3, 4, 5], "no layer below, none above"


def test_a_layer_that_text_does_not_reach_is_refused():
    stack = LayerStack(zoo.build("mllama").eval())
    with pytest.raises(UnsupportedModelError, match=r"Layers 2 to 2 of Mllama.*on text alone"):
        run_layers(stack, batch_of(5, 6, 7), 2, 2)


def test_trials_leave_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_writers(LayerStack(model), 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Rounded(nn.Linear):
    """What a quantised map may look like."""

    def forward(self, input):
        return nn.functional.linear(input.round(decimals=1), self.weight)


def test_only_what_is_linear_in_its_weights_is_tunable():
    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return (1 + self.weight) * x / x.square().mean(-1, keepdim=True).sqrt()

    class Squared(OnePlus):
        def forward(self, x):
            return self.weight.square() * x

    assert is_tunable(nn.Linear(8, 4))
    assert is_tunable(nn.LayerNorm(8))
    assert is_tunable(nn.RMSNorm(8))
    assert is_tunable(OnePlus())
    assert not is_tunable(Squared())
    assert not is_tunable(Rounded(8, 4))
    assert not is_tunable(nn.Dropout())
    x = torch.randn(3, 8)
    torch.testing.assert_close(
        gain_slope(OnePlus(), x), x / x.square().mean(-1, keepdim=True).sqrt()
    )
