"""Names of layers' modules, before a removal and after it."""

from __future__ import annotations

import pytest

from llm_pruner.config.layer_names import LayerNames

NAMES = LayerNames(("model.layers.", "h."), 12)
KEPT = [0, 2, 10]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("model.layers.2", "model.layers.1"),
        ("h.10.attn.weight", "h.2.attn.weight"),
        ("model.layers.1.mlp", None),
        ("model.layers.12.eh_proj", "model.layers.3.eh_proj"),  # past the end, before and after
        ("model.layers.13.mlp", "model.layers.4.mlp"),
        ("model.norm", "model.norm"),
        ("model.layers.2x", "model.layers.2x"),
        ("vision.model.layers.1.mlp", "vision.model.layers.1.mlp"),
    ],
)
def test_names_follow_their_layers_there_and_back(old, new):
    assert NAMES.rename(old, KEPT) == new
    assert new is None or NAMES.original(new, KEPT) == old


def test_a_name_has_three_parts():
    assert NAMES.split("h.12.attn.weight") == ("h.", 12, ".attn.weight")
    assert NAMES.split("model.norm") is None
    assert (NAMES.index("h.3"), NAMES.index("lm_head")) == (3, None)
