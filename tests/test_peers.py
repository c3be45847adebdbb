"""The published baselines of `benchmarks/peers.py`, against slow twins that share no code."""

from __future__ import annotations

import json
import math
import sys

import common
import peer_judge
import peer_repairs
import peers
import pytest
import torch
from peer_repairs import Cut, best_map, fuse_map, hadamard, runs_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm_pruner import LayerStack

DEPTH, REMOVED = 8, (3, 4, 6)  # two runs


@pytest.fixture(scope="module")
def planted():
    return common.planted(DEPTH, n_texts=40, length=24)


@pytest.fixture
def cut(planted):
    return Cut(LayerStack(planted.model), REMOVED, planted.tokenizer, planted.choosing)


def streams(model, batches, layer, skip=0):
    """What enters a layer, as transformers reports it, text by text and unpadded: (n, hidden)."""
    found = []
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            with torch.no_grad():
                states = model(ids[None, : mask.sum()], output_hidden_states=True).hidden_states
            found.append(states[layer][0, skip:].double())
    return torch.cat(found)


def patches(layer):
    """The patches that a repair has put before a layer."""
    return [hook.args[0] for hook in layer._forward_pre_hooks.values()]


def logits(model, text, tokenizer):
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 64, 72, 576])
def test_a_hadamard_matrix_is_orthogonal_with_entries_of_one_size(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size).double(), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize("size", [3, 6, 92])
def test_a_size_without_a_known_hadamard_matrix_is_refused(size):
    with pytest.raises(ValueError, match=f"No Hadamard matrix of size {size}"):
        hadamard(size)


def test_last_k_keeps_the_last_layer(planted):
    choice = peers.Choice(planted.model, planted.tokenizer, planted.choosing)
    assert peers.last_k(choice, 3) == (4, 5, 6)
    with pytest.raises(ValueError, match="k=8 must be from 1 to 7"):
        peers.last_k(choice, 8)


def test_runs_are_stretches_of_neighbours():
    assert runs_of((1, 2, 3, 5, 7, 8)) == [(1, 3), (5, 5), (7, 8)]


@pytest.mark.parametrize("repair", [name for name in peer_repairs.REPAIRS if name != "lora"])
def test_a_repair_leaves_the_model_as_it_was(planted, cut, repair):
    before = {name: tensor.clone() for name, tensor in planted.model.state_dict().items()}
    repaired = peer_repairs.REPAIRS[repair](cut)
    assert len(LayerStack(repaired)) == DEPTH - len(REMOVED)
    assert all(torch.equal(before[n], t) for n, t in planted.model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in LayerStack(planted.model))


def test_prune_comp_scales_the_stream_and_fused_computes_the_same(planted, cut):
    model, batches = planted.model, cut.batches
    scaled, fused = (peer_repairs.prune_comp(cut, fuse=fuse) for fuse in (False, True))
    factors = []
    for first, last in [(3, 4), (6, 6)]:
        low, high = streams(model, batches, first), streams(model, batches, last + 1)
        pairs = zip(high, low, strict=True)
        factors.append(sum(float(t.norm() / x.norm()) for t, x in pairs) / len(low))
    layers = LayerStack(scaled)
    found = [patch for index in (3, 4) for patch in patches(layers[index])]  # were 5 and 7
    assert torch.stack(found).tolist() == pytest.approx(factors, rel=1e-5)
    assert not any(layer._forward_pre_hooks for layer in LayerStack(fused))
    for new, old, factor in [(2, 2, 1.0), (3, 5, factors[0]), (4, 7, math.prod(factors))]:
        new, old = LayerStack(fused)[new].mlp.down_proj.weight, LayerStack(model)[old].mlp.down_proj
        assert torch.allclose(new * factor, old.weight, atol=1e-6)
    text = planted.held_out[0]
    wanted = logits(scaled, text, planted.tokenizer)
    assert torch.allclose(logits(fused, text, planted.tokenizer), wanted, atol=1e-3)
    plain = logits(cut.pruned(), text, planted.tokenizer)
    assert (plain - wanted).abs().max() > 0.05


@pytest.mark.parametrize("skip", [0, 1])
def test_linearpatch_is_the_rotated_scaling_of_its_formula(planted, cut, skip):
    rotation, found = hadamard(64), peer_repairs.rotated_scalings(cut, skip)
    for (first, last), patch in zip([(3, 4), (6, 6)], found, strict=True):
        low, high = (streams(planted.model, cut.batches, n, skip) for n in (first, last + 1))
        scale = [
            sum(abs(float(row @ rotation[:, channel])) for row in high)
            / sum(abs(float(row @ rotation[:, channel])) for row in low)
            for channel in (0, 7, 63)
        ]
        diagonal = (rotation.T @ patch @ rotation).diagonal()[[0, 7, 63]]
        assert diagonal.tolist() == pytest.approx(scale, rel=1e-5)
        assert torch.allclose(patch, patch.T)


@pytest.mark.parametrize("better", [0, 1])
def test_linearpatch_takes_the_patch_that_serves_the_calibration_texts(cut, monkeypatch, better):
    eye = torch.eye(64, dtype=torch.float64)
    scalings = {better: [eye, eye], 1 - better: [eye, -eye]}
    monkeypatch.setattr(peer_repairs, "rotated_scalings", lambda cut, skip: scalings[skip])
    layers = LayerStack(peer_repairs.linearpatch(cut))
    assert [torch.equal(patch, eye) for n in (3, 4) for patch in patches(layers[n])] == [True, True]


def test_a_planted_map_is_recovered_and_fused():
    torch.manual_seed(0)
    planted_map = torch.randn(6, 6).double()
    sets = []
    for _ in range(2):
        moments, inputs = peer_repairs._Moments(), torch.randn(50, 6).double()
        moments.add(inputs, inputs @ planted_map)
        sets.append(moments)
    found = best_map(*sets)
    assert torch.allclose(found, planted_map, atol=1e-6)
    assert sets[1].error(found) == pytest.approx(0, abs=1e-9)
    for module in (nn.Linear(5, 6), Conv1D(6, 5), nn.Linear(5, 6, bias=False)):
        inputs = torch.randn(3, 5)
        wanted = module(inputs) @ planted_map.float()
        fuse_map(module, planted_map)
        assert torch.allclose(module(inputs), wanted, atol=1e-5)


def test_a_map_that_does_not_validate_is_left_out():
    torch.manual_seed(0)
    inputs = torch.randn(4, 6).double()  # fewer tokens than channels
    train, validation = peer_repairs._Moments(), peer_repairs._Moments()
    train.add(inputs, torch.randn(4, 6).double())
    other = torch.randn(40, 6).double()
    validation.add(other, other)
    assert torch.allclose(best_map(train, validation), torch.eye(6).double(), atol=0.1)


def test_replaceme_is_least_squares_on_the_mlp_before_the_cut(planted, monkeypatch):
    def plain(train, validation):
        return torch.linalg.solve(train.gram, train.cross)

    monkeypatch.setattr(peer_repairs, "best_map", plain)
    model = planted.model
    cut = Cut(LayerStack(model), (3, 4), planted.tokenizer, planted.choosing)
    split = cut.batches[: -round(len(cut.batches) / 5)]
    made = []
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *call: made.append(call[2][0]))
    wanted = streams(model, split, 5)
    handle.remove()
    part = torch.cat(made).double()
    added_to = streams(model, split, 3) - part
    found = torch.linalg.lstsq(part, wanted - added_to).solution
    old = model.model.layers[2].mlp.down_proj.weight.double()
    new = LayerStack(peer_repairs.replaceme(cut))[2].mlp.down_proj.weight.double()
    assert not torch.allclose(new, old, atol=1e-2)
    assert torch.allclose(new, found.T @ old, atol=1e-4)


def test_sleb_is_the_same_naively_and_its_work_is_the_formula(planted):
    choices = [
        peers.Choice(planted.model, planted.tokenizer, planted.choosing[:9], naive)
        for naive in (True, False)
    ]
    stack = LayerStack(planted.model)
    with common.worked(stack) as work:
        found = peers.sleb(choices[0], 2)
    assert found == peers.sleb(choices[1], 2)
    assert 2 <= found[0] < found[1] < DEPTH - 2
    with common.worked(stack) as probe:  # how a bypassed layer returns is learned from two tokens
        planted.model(torch.tensor([[0, 1]]))
    formula = peers.naive_work(choices[1], 2)
    for count in ("layer_tokens", "head_tokens", "flops"):
        assert getattr(work, count) - getattr(probe, count) == getattr(formula, count)
    weights = sum(p.numel() for p in planted.model.parameters())
    embedding, norm = planted.model.model.embed_tokens, planted.model.model.norm
    assert probe.flops == 4 * (weights - embedding.weight.numel() - norm.weight.numel())
    assert work.seconds > 0


def _answer_losses(planted, pairs):
    """How much worse than the best each answer to its prompt is, one pass each."""
    losses = []
    for prompt, answer in pairs:
        ids = planted.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        start = len(planted.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            labels = torch.where(torch.arange(ids.shape[1]) < start, -100, ids)
            loss = planted.model(ids, labels=labels).loss.item()
        losses.append(loss * (ids.shape[1] - start))
    return [loss - min(losses) for loss in losses]


def test_a_run_is_judged_right_and_resumed(planted, tmp_path, monkeypatch, capsys):
    planted.model.save_pretrained(tmp_path / "model")
    planted.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "choose.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in planted.choosing)
    )
    text = " ".join(planted.held_out)
    (tmp_path / "judge.txt").write_text(text)
    choices = planted.held_out[:4]
    items = [{"prompt": text[:30], "choices": choices, "reference": choices[i % 4]}
             for i in range(8)]  # fmt: skip
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, items)))
    rows = [{"context_options": choices[i : i + 2], "continuation": text[:9], "gold": i % 2}
            for i in range(3)]  # fmt: skip
    (tmp_path / "pronouns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "results.json"
    options = f"--model {tmp_path / 'model'} --calibrate {tmp_path / 'choose.jsonl'} --n-tokens 600"
    options += f" --judge text={tmp_path / 'judge.txt'} --judge-tokens 1024 --out {out}"
    options += f" --tasks items={tmp_path / 'tasks.jsonl'} pronouns={tmp_path / 'pronouns.jsonl'}"
    options += " --select sleb last-k 3,4,6 --k 2"
    options += " --repair none replaceme linear --threads 1"
    monkeypatch.setattr(peer_judge, "WINDOW", 120)  # the model has 128 positions
    monkeypatch.setattr(sys, "argv", ["peers.py", *options.split()])
    peers.main()
    table = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["repair"] for row in rows] == ["", *3 * ["none", "replaceme", "linear"]]
    assert (rows[-1]["layers"], rows[-1]["k"]) == ([3, 4, 6], 3)
    assert all("judged" in row for row in rows)
    assert table.count("\n") == 2 + len(rows)
    assert "| 2 | last-k | none | 5, 6 |" in table

    ids = planted.tokenizer(text)["input_ids"]
    windows = [ids[start : start + 120] for start in range(0, len(ids) - 119, 120)]
    windows = [windows[number * len(windows) // 8] for number in range(min(8, len(windows)))]
    with torch.no_grad():
        losses = [planted.model(x := torch.tensor([one]), labels=x).loss.item() for one in windows]
    figures = rows[0]["judged"]["text"]
    assert figures["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert figures["change"] == 0
    assert rows[0]["judged"]["items"]["acc"]["items"] == 8
    right = [
        _answer_losses(planted, [(prompt, text[:9]) for prompt in choices[i : i + 2]])[i % 2] == 0
        for i in range(3)
    ]
    assert rows[0]["judged"]["pronouns"]["acc"]["mean"] == pytest.approx(sum(right) / 3)
    cut = rows[1]["judged"]["text"]
    assert 0 < cut["low"] < cut["change"] < cut["high"]

    def refused(*_):
        raise AssertionError("computed again")

    for made in (peers.SELECTIONS, peers.REPAIRS):
        for name in made:
            monkeypatch.setitem(made, name, refused)
    peers.main()
    assert capsys.readouterr().out == table


def test_calibration_texts_hold_so_many_tokens_of_every_file_in_turn(planted, tmp_path):
    words = [f"t{number:03d}" for number in range(3, 103)]
    (tmp_path / "a.txt").write_text(" ".join(words[:50] * 10))
    lines = [json.dumps({"text": " ".join(words[50:])})] * 10
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    texts = peers.calibration_texts(planted.tokenizer, paths, 301, 0)
    found = [text.split() for text in texts]
    assert len(texts) >= peers.PASSAGES
    assert sum(map(len, found)) in (300, 301)  # a single token is no text
    assert [text[0] in words[:50] for text in found] == [n % 2 == 0 for n in range(len(texts))]


def test_one_file_does_not_calibrate_and_judge(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    options = f"--calibrate {tmp_path / 'a.txt'} --judge same={tmp_path / 'a.txt'}"
    monkeypatch.setattr(sys, "argv", ["peers.py", *options.split()])
    with pytest.raises(SystemExit, match="would calibrate and judge"):
        peers.main()
