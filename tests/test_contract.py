"""The contract: every registered strategy against every check, in two families of models.

A new strategy is tested by being registered. What the numbers must be is in test_strategies.py.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import N_LAYERS, items, make_identity, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_pruner.errors import InvalidDataError, InvalidPlanError, NonFiniteError
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.pruners.base import BasePruner
from llm_pruner.pruners.measured import SmartPruner
from llm_pruner.pruners.registry import get_strategy, strategy_names
from llm_pruner.results import LayerScores, PruningPlan
from llm_pruner.stats import RunningMean


class UpdateSize(BasePruner):
    """A strategy as an outsider writes it: the mean size of what a layer adds."""

    def description(self):
        return "Removes the layers that add least."

    def compute_layer_scores(self, eval_data):
        means = [RunningMean() for _ in self.layers]
        for states, real in self.hidden_states(eval_data):
            for index, mean in enumerate(means):
                mean.update((states[index + 1] - states[index])[real].norm(dim=-1))
        return {index: mean.mean for index, mean in enumerate(means)}


STRATEGIES = {**{name: get_strategy(name) for name in strategy_names()}, "custom": UpdateSize}
# Options under which a strategy ranks single layers, where its default does not.
SINGLE_LAYERS = {"pruneme": {"contiguous": False}}
UNPROTECTED = [2, 3, 4, 5]  # of eight layers, by default
AMOUNT = {"ratio": 0.25}


@pytest.fixture(params=sorted(STRATEGIES))
def strategy(request):
    return STRATEGIES[request.param]


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that scoring has to leave as it was."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            for name, tensor in model.state_dict().items()
        },
        "modules": {name: id(module) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [kind for kind in kinds if getattr(module, kind)]
            for name, module in model.named_modules()
        },
        "slots": {name: vars(m).get("layer_idx") for name, m in model.named_modules()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "config": model.config.to_dict(),
    }


def tokenizer_state(tokenizer) -> tuple[object, ...]:
    """Everything about a tokenizer that a user may have set."""
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.pad_token,
        tokenizer.eos_token,
        tokenizer.model_max_length,
        tokenizer.chat_template,
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 19).reshape(1, 16), use_cache=False).logits


def generated(model: nn.Module, use_cache: bool) -> list[int]:
    ids = torch.arange(3, 15).reshape(1, 12)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)[0].tolist()


def assert_same_scores(got, want):
    assert list(got) == list(want)
    assert list(got.values()) == pytest.approx(list(want.values()), rel=1e-4, abs=1e-6)


def test_constructor_defaults(strategy, model, tokenizer):
    pruner = strategy(model, tokenizer)
    assert pruner.model is model
    assert pruner.tokenizer is tokenizer
    assert pruner.num_layers == len(pruner.layers) == N_LAYERS
    assert pruner.protect == (2, 2)
    assert list(pruner.candidates) == UNPROTECTED
    assert pruner.batch_size == 8
    assert pruner.removes in ("lowest", "highest")
    assert pruner.description().endswith(".")
    positional = list(inspect.signature(strategy).parameters.values())[:2]
    assert [p.name for p in positional] in (["model", "tokenizer"], ["args", "kwargs"])


@pytest.mark.parametrize("training", [False, True])
def test_plan_leaves_everything_as_it_was(strategy, model, tokenizer, eval_data, training):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    model.train(training)
    model.get_input_embeddings().requires_grad_(False)
    data, before = copy.deepcopy(eval_data), (snapshot(model), tokenizer_state(tokenizer))
    strategy(model, tokenizer).plan(eval_data, **AMOUNT)
    assert (snapshot(model), tokenizer_state(tokenizer)) == before
    assert eval_data == data


@pytest.mark.parametrize("training", [False, True])
def test_modes_set_by_hand_are_left(strategy, model, tokenizer, eval_data, training):
    """Somebody who trains a part of a model has modules in both modes."""
    model.train(training)
    LayerStack(model)[3].train(not training)
    before = snapshot(model)["modes"]
    strategy(model, tokenizer).plan(eval_data, **AMOUNT)
    assert snapshot(model)["modes"] == before


def test_plan_draws_no_random_numbers(strategy, model, tokenizer, eval_data):
    """Also in training mode, where a careless forward pass would draw dropout masks."""
    before = torch.random.get_rng_state()
    strategy(model.train(), tokenizer).plan(eval_data, **AMOUNT)
    assert torch.equal(torch.random.get_rng_state(), before)


class Counted:
    """Counts the calls of a layer's forward and fails in one of them."""

    def __init__(self, layer: nn.Module, fail_at: int = 0) -> None:
        self.forward, self.fail_at, self.calls = layer.forward, fail_at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("in the middle")
        return self.forward(*args, **kwargs)


def test_nothing_is_left_after_an_error_in_the_middle(
    strategy, model, tokenizer, eval_data, monkeypatch
):
    """The model fails in its first, middle and last pass."""
    layer = LayerStack(model)[4]
    model.train()
    before = snapshot(model)

    def plan(fail_at: int) -> int:
        counted = Counted(layer, fail_at)
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", counted)
            strategy(model, tokenizer, batch_size=2).plan(eval_data, **AMOUNT)
        return counted.calls

    calls = plan(fail_at=0)
    assert calls >= 3, "one pass per batch at least"
    for fail_at in (1, calls // 2 + 1, calls):
        with pytest.raises(RuntimeError, match="in the middle"):
            plan(fail_at)
        assert snapshot(model) == before


def test_same_input_same_plan(strategy, model, tokenizer, eval_data):
    plans = [strategy(model, tokenizer).plan(eval_data, **AMOUNT).to_json() for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_pruner_can_be_used_again(strategy, model, tokenizer, eval_data):
    pruner = strategy(model, tokenizer)
    first = pruner.plan(eval_data, **AMOUNT)
    other = pruner.plan(items(3), ratio=0.5)
    assert other.data != first.data
    assert len(other.remove) == 4
    assert pruner.plan(eval_data, **AMOUNT).to_json() == first.to_json()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_is_irrelevant(strategy, model, tokenizer, eval_data, batch_size):
    want = strategy(model, tokenizer).compute_layer_scores(eval_data)
    got = strategy(model, tokenizer, batch_size=batch_size).compute_layer_scores(eval_data)
    assert_same_scores(got, want)


@pytest.mark.parametrize(("side", "pad"), [("left", "<pad>"), ("right", "<eos>"), ("left", None)])
def test_padding_is_irrelevant(strategy, model, tokenizer, eval_data, side, pad):
    want = strategy(model, tokenizer).compute_layer_scores(eval_data)
    other = copy.deepcopy(tokenizer)
    other.padding_side, other.pad_token = side, pad
    got = strategy(model, other, batch_size=4).compute_layer_scores(eval_data)
    assert_same_scores(got, want)


def test_order_of_the_items_is_irrelevant(strategy, model, tokenizer, eval_data):
    want = strategy(model, tokenizer, batch_size=4).compute_layer_scores(eval_data)
    shuffled = random.Random(1).sample(eval_data, len(eval_data))
    assert shuffled != eval_data
    got = strategy(model, tokenizer, batch_size=4).compute_layer_scores(shuffled)
    assert_same_scores(got, want)


def test_running_text_is_data_too(strategy, model, tokenizer, eval_data):
    data = [*eval_data, "the old bird sat on our house", "one red cat"]
    scores = strategy(model, tokenizer).compute_layer_scores(data)
    assert list(scores) == list(range(N_LAYERS))
    other = strategy(model, tokenizer, batch_size=3).compute_layer_scores(data[::-1])
    assert_same_scores(other, scores)


@pytest.mark.parametrize("amount", [{"ratio": 0.4}, {"n_layers": 3}])
def test_plan_is_well_formed(strategy, model, tokenizer, eval_data, amount, tmp_path):
    pruner = strategy(model, tokenizer)
    plan = pruner.plan(eval_data, model_id="a/b", **amount)
    assert plan.model_id == "a/b"
    assert plan.num_layers == N_LAYERS
    assert plan.strategy == strategy.name
    assert len(plan.remove) == 3
    assert list(plan.remove) == sorted(set(plan.remove) & set(UNPROTECTED)), "ends protected"
    assert sorted(plan.remove + plan.keep) == list(range(N_LAYERS))
    assert plan.options.items() >= {**amount, "protect": [2, 2]}.items()
    scores = pruner.compute_layer_scores(eval_data)
    assert list(scores) == list(range(N_LAYERS))
    if strategy.name == "smart":  # searches for a number of layers without scores
        assert plan.scores is None
        plan = replace(plan, scores=scores)
    assert dict(plan.scores) == dict(scores)
    assert plan.scores.removes == strategy.removes
    assert plan.data["items"] == len(eval_data)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.scores.to_dict() == plan.scores.to_dict()
    assert again.scores.blocks == plan.scores.blocks
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").to_json() == plan.to_json()
    assert json.loads(plan.to_json())["format"] == "llm_pruner.plan/2"


@pytest.mark.parametrize("n_layers", [1, 4])
def test_an_exact_number_of_layers(strategy, model, tokenizer, eval_data, n_layers):
    remove = strategy(model, tokenizer).plan(eval_data, n_layers=n_layers).remove
    assert len(remove) == n_layers
    assert set(remove) <= set(UNPROTECTED)


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0 must lie between 0 and 1"),
        ({"ratio": 1.0}, "ratio=1.0 must lie between 0 and 1"),
        ({"ratio": -0.5}, "ratio=-0.5 must lie between 0 and 1"),
        ({"ratio": float("nan")}, "ratio=nan must lie between 0 and 1"),
        ({"ratio": 0.1}, r"ratio=0.1 means 0 layers: the model has 8 layers.* 1 to 4 can go"),
        ({"ratio": 0.7}, r"ratio=0.7 means 5 layers: the model has 8 layers.* 1 to 4 can go"),
        ({"n_layers": 0}, "n_layers=0 |ratio=0.0 "),
        ({"n_layers": -1}, "n_layers=-1 |ratio=-0.125 "),
        ({"n_layers": 5}, "n_layers=5 must be from 1 to 4|ratio=0.625 means 5 layers"),
        ({"n_layers": 9}, "n_layers=9 |ratio=1.125 "),
        ({"threshold": "far"}, r"No layer can go at this .*: layer [2-5], the cheapest, scores"),
    ],
    ids=str,
)
def test_impossible_amounts_are_refused(strategy, llama, tokenizer, eval_data, amount, message):
    if "threshold" in amount:
        amount = {"threshold": 1e9 if strategy.removes == "highest" else -1e9}
    with pytest.raises(InvalidPlanError, match=message):
        strategy(llama, tokenizer).plan(eval_data, **amount)


@pytest.mark.parametrize("n_layers", [0, 9, 2.5])
def test_a_refused_number_of_layers_is_named(llama, tokenizer, eval_data, n_layers):
    for strategy in STRATEGIES.values():
        with pytest.raises(InvalidPlanError, match=f"n_layers={n_layers}"):
            strategy(llama, tokenizer).plan(eval_data, n_layers=n_layers)


@pytest.mark.parametrize("amount", [{"ratoi": 0.5}, {"n_layers": 2, "speed": 1}], ids=str)
def test_an_unknown_amount_is_refused(strategy, llama, tokenizer, eval_data, amount):
    with pytest.raises((TypeError, InvalidPlanError), match=list(amount)[-1]):
        strategy(llama, tokenizer).plan(eval_data, **amount)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_impossible_batch_size_is_named(llama, tokenizer, eval_data, batch_size):
    for strategy in STRATEGIES.values():
        with pytest.raises(InvalidPlanError, match=f"batch_size={batch_size}"):
            strategy(llama, tokenizer, batch_size=batch_size).plan(eval_data, **AMOUNT)


def hand_made(strategy) -> dict[int, float]:
    """Scores whose most removable layers are protected, and 3 and 5 are next, equal."""
    sign = 1.0 if strategy.removes == "lowest" else -1.0
    return {layer: sign * score for layer, score in enumerate([-9, -8, 3, 1, 2, 1, -9, -8])}


@pytest.mark.parametrize(
    ("ratio", "want"), [(1 / 8, [5]), (2 / 8, [3, 5]), (3 / 8, [3, 4, 5]), (0.5, UNPROTECTED)]
)
def test_the_end_of_the_scale_is_selected(strategy, llama, tokenizer, ratio, want):
    """Of equals the deeper layer; for a mapping in any order and with its meaning attached."""
    pruner = strategy(llama, tokenizer, **SINGLE_LAYERS.get(strategy.name, {}))
    scores = hand_made(strategy)
    assert pruner.select_layers(scores, ratio=ratio) == want
    assert pruner.select_layers(dict(reversed(scores.items())), ratio=ratio) == want
    assert pruner.select_layers(LayerScores(scores, removes=strategy.removes), ratio=ratio) == want


@pytest.mark.parametrize(("limit", "want"), [(1, []), (1.5, [3, 5]), (2, [3, 5]), (2.5, [3, 4, 5])])
def test_every_layer_beyond_the_threshold_is_selected(strategy, llama, tokenizer, limit, want):
    pruner = strategy(llama, tokenizer, **SINGLE_LAYERS.get(strategy.name, {}))
    threshold = limit if strategy.removes == "lowest" else -limit
    assert pruner.select_layers(hand_made(strategy), threshold=threshold) == want


def test_nan_weights_are_named(strategy, model, tokenizer, eval_data):
    with torch.no_grad():
        next(LayerStack(model)[3].parameters())[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"(layers|items) \[\d.*NaN|NaN.*items \[\d"):
        strategy(model, tokenizer).plan(eval_data, **AMOUNT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "eval_data is empty: at least one item is needed"),
        (
            [{"prompt": "a", "reference": "b"}, {"reference": "b"}],
            r"eval_data\[1\] has no 'prompt'",
        ),
        ([{"prompt": "a"}], r"eval_data\[0\] has no 'reference' \(its fields: \['prompt'\]\)"),
        ([{"prompt": " ", "reference": "b"}], r"eval_data\[0\]\['prompt'\] is empty"),
        (["the cat", 7], r"eval_data\[1\] is a int"),
        ("the cat sat", "must be a list of items, got str"),
        (["cat"], "None of the 1 items leaves a token to score"),
    ],
)
def test_unusable_data_is_refused(strategy, llama, tokenizer, data, message):
    with pytest.raises(InvalidDataError, match=message):
        strategy(llama, tokenizer).plan(data, **AMOUNT)


def test_a_text_longer_than_the_model_is_data_too(strategy, model, tokenizer, eval_data):
    """Longer than the 128 positions of the test models."""
    long = " ".join([item["prompt"] for item in eval_data] * 8)
    assert len(tokenizer(long)["input_ids"]) > model.config.max_position_embeddings
    assert len(strategy(model, tokenizer).plan([long], **AMOUNT).remove) == 2


def test_pruned_equals_bypassed_and_reloaded(strategy, model, tokenizer, eval_data, tmp_path):
    pruner = strategy(model, tokenizer)
    plan = pruner.plan(eval_data, model_id="a/b", **AMOUNT)
    before, whole = snapshot(model), logits(model)
    with pruner.layers.bypass(plan.remove):
        bypassed = logits(model)
    out = tmp_path / "out"
    pruned, same = pruner.prune_and_save(plan.remove, out, "a/b", plan=plan)
    assert same is tokenizer
    assert snapshot(model) == before
    assert torch.equal(logits(model), whole)
    assert not torch.allclose(bypassed, whole, atol=1e-4), "the layers must matter in this test"
    torch.testing.assert_close(logits(pruned), bypassed)
    reloaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(LayerStack(reloaded)) == N_LAYERS - 2
    torch.testing.assert_close(logits(reloaded), bypassed)
    text = eval_data[0]["prompt"]
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == tokenizer(text)["input_ids"]
    answers = [generated(m, use_cache) for m in (pruned, reloaded) for use_cache in (True, False)]
    assert answers.count(answers[0]) == len(answers)
    saved = PruningPlan.load(out / "pruning_plan.json")
    assert (saved.remove, saved.strategy) == (plan.remove, strategy.name)


@pytest.mark.parametrize("training", [False, True])
def test_modes_set_by_hand_are_left_by_saving(llama, tokenizer, tmp_path, training):
    llama.train(training)
    LayerStack(llama)[3].train(not training)
    before = snapshot(llama)["modes"]
    UpdateSize(llama, tokenizer).prune_and_save([4], tmp_path / "out", "a/b")
    assert snapshot(llama)["modes"] == before


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"layers=\[\] must be at least one layer"),
        ([8], "Layer 8 is out of range: indices are whole numbers from 0 to 7"),
        ([2, 2], r"Layers \[2\] are listed more than once"),
        (range(8), "All 8 layers would be removed"),
    ],
    ids=str,
)
def test_impossible_layers_are_not_pruned(llama, tokenizer, tmp_path, layers, message):
    with pytest.raises(InvalidPlanError, match=message):
        UpdateSize(llama, tokenizer).prune_and_save(layers, tmp_path / "out", "a/b")
    assert not list(tmp_path.iterdir())


def test_layers_other_than_the_plans_are_refused(llama, tokenizer, tmp_path):
    plan = PruningPlan("a/b", N_LAYERS, (2, 3))
    with pytest.raises(InvalidPlanError, match=r"layers=\[2, 4\] .* of the plan \(\[2, 3\]\)"):
        UpdateSize(llama, tokenizer).prune_and_save([2, 4], tmp_path / "out", "a/b", plan=plan)


def test_a_plan_for_another_depth_is_refused(llama, tokenizer, tmp_path):
    plan = PruningPlan("a/b", 12, (2, 3))
    with pytest.raises(InvalidPlanError, match="for a model of 12 layers"):
        UpdateSize(llama, tokenizer).prune_and_save([2, 3], tmp_path / "out", "a/b", plan=plan)


def test_a_users_script_runs_unchanged(llama, tokenizer, eval_data, tmp_path, monkeypatch):
    """Line by line what scripts contain; layer 3 does nothing, so there is something to cut."""
    monkeypatch.chdir(tmp_path)
    make_identity(llama, 3)
    model, data, model_id = llama, eval_data, "some/model"

    pruner = SmartPruner(model, tokenizer)
    scores = pruner.compute_layer_scores(data)
    cand = pruner.select_layers(scores, threshold=-0.02)
    keep = pruner.optimize_selection(cand, data, tolerance=0.015)
    pruned, _ = pruner.prune_and_save(keep, "./out", model_id)

    assert isinstance(scores, dict)
    assert scores[3] == pytest.approx(0, abs=1e-6)
    assert cand == [layer for layer in UNPROTECTED if scores[layer] > -0.02]
    assert 3 in keep
    assert set(keep) <= set(cand)
    assert len(LayerStack(pruned)) == N_LAYERS - len(keep)
    reloaded = AutoModelForCausalLM.from_pretrained("./out")
    torch.testing.assert_close(logits(reloaded), logits(pruned))
    assert PruningPlan.load("out/pruning_plan.json").model_id == model_id


@pytest.mark.parametrize(
    ("depth", "want"),
    [(1, (0, 0)), (3, (0, 0)), (4, (1, 1)), (7, (1, 1)), (8, (2, 2)), (9, (2, 2))],
)
def test_default_protection_follows_the_depth(strategy, tokenizer, depth, want):
    assert strategy(tiny_llama(depth), tokenizer).protect == want


@pytest.mark.parametrize("protect", [(2, 2), (0, 0), (3, 1), (0, 4)])
def test_protection_that_is_given_is_taken_as_it_is(strategy, tokenizer, eval_data, protect):
    """And means the same everywhere: nothing protected is selected, all else may be."""
    pruner = strategy(tiny_llama(5), tokenizer, protect=protect)
    assert pruner.protect == protect
    free = list(range(protect[0], 5 - protect[1]))
    assert list(pruner.candidates) == free
    most = min(len(free), 4)
    remove = pruner.plan(eval_data, n_layers=most).remove
    assert set(remove) <= set(free)
    assert len(remove) == most


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ((4, 4), r"protect=\(4, 4\) protects all of the model's 8 layers"),
        ((-1, 2), r"protect=\(-1, 2\) must be two whole numbers from 0"),
        ((1, 2, 3), r"protect=\(1, 2, 3\) must be two whole numbers"),
        ((1.5, 2), r"protect=\(1.5, 2\) must be two whole numbers"),
    ],
)
def test_impossible_protection_is_refused(strategy, llama, tokenizer, protect, message):
    with pytest.raises(InvalidPlanError, match=message):
        strategy(llama, tokenizer, protect=protect)


def test_a_strategy_that_selects_protected_layers_is_refused(llama, tokenizer, eval_data):
    class Careless(UpdateSize):
        def select_layers(self, scores, ratio=0.2, threshold=None):
            return [0, 3, 7]

    with pytest.raises(InvalidPlanError, match=r"Layers \[0, 7\] are protected"):
        Careless(llama, tokenizer).plan(eval_data)


def test_the_whole_template_can_be_filled_by_two_methods(llama, tokenizer, eval_data):
    """Scores without a model pass; the base class does the rest, its defaults included."""

    class DeepestFirst(BasePruner):
        def description(self):
            return "Removes the deepest layers."

        def compute_layer_scores(self, eval_data):
            return {index: -float(index) for index in range(self.num_layers)}

    plan = DeepestFirst(llama, tokenizer).plan(eval_data, ratio=0.25)
    assert plan.remove == (4, 5)
    assert plan.strategy == "custom"
    with pytest.raises(TypeError, match="abstract"):
        BasePruner(llama, tokenizer)
