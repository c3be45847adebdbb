"""On a GPU everything is as on the CPU, up to rounding; skipped where there is none."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from conftest import WORDS, items, tiny_llama, word_tokenizer

from llm_pruner import get_strategy, load_model
from llm_pruner.cli import main
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.healing.job import HealingJob
from llm_pruner.healing.linear import heal_linear
from llm_pruner.healing.lora import heal_full, heal_lora
from llm_pruner.healing.lora_settings import LoraSettings
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.offload.offloaded_stack import load_streamed
from llm_pruner.search.removal_quality import RemovalQuality

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CLOSE = {"rel": 1e-3, "abs": 1e-4}
STRATEGIES = ["ablation", "avss", "bi", "pruneme", "smart"]


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model in several files, and texts."""
    home = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(home / "model", max_shard_size="60KB")
    word_tokenizer().save_pretrained(home / "model")
    rows = [{"text": " ".join(WORDS[i % 17 : i % 17 + 4 + i % 9])} for i in range(17 * 9)]
    (home / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "falcon_mamba"])
def test_scores_are_those_of_the_cpu(name, family, tokenizer):
    model = tiny_llama() if family == "llama" else zoo.build(family).eval()
    scores = [
        get_strategy(name)(copy.deepcopy(model).to(device), tokenizer).compute_layer_scores(items())
        for device in ("cpu", "cuda")
    ]
    assert scores[1] == {layer: pytest.approx(score, **CLOSE) for layer, score in scores[0].items()}


@pytest.mark.parametrize("objective", ["nll", "kl", "agreement", "accuracy", "nll=0.5,kl=0.5"])
def test_changes_are_those_of_the_cpu(objective, llama, tokenizer):
    data = [
        {**item, "choices": [item["reference"], "the" if i % 3 else item["reference"] + " cat"]}
        for i, item in enumerate(items(20))
    ]
    removals = [(2,), (2, 5), (3,), (2, 6), (3, 4, 5)]
    found = []
    for device in ("cpu", "cuda"):
        stack = LayerStack(copy.deepcopy(llama).to(device))
        quality = RemovalQuality(stack, tokenizer, data, objective=objective, batch_size=4)
        quality.measure(removals)
        found.append([quality.change(removed) for removed in removals])
    assert found[1] == pytest.approx(found[0], **CLOSE)


def test_a_search_chooses_what_it_chooses_on_the_cpu(llama, tokenizer):
    plans = [
        get_strategy("smart")(copy.deepcopy(llama).to(device), tokenizer).plan(items(), n_layers=3)
        for device in ("cpu", "cuda")
    ]
    assert plans[0].remove == plans[1].remove


def test_half_precision_finds_the_layers_that_matter(tokenizer):
    model = tiny_llama()
    exact = get_strategy("bi")(model, tokenizer).compute_layer_scores(items())
    half = copy.deepcopy(model).to("cuda", torch.bfloat16)
    assert get_strategy("bi")(half, tokenizer).compute_layer_scores(items()) == {
        layer: pytest.approx(score, rel=0.1, abs=0.02) for layer, score in exact.items()
    }


@pytest.mark.parametrize("method", ["linear", "lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_healing_lowers_the_loss(method, dtype, tokenizer):
    model = tiny_llama().to("cuda", dtype)
    job = HealingJob.of(
        LayerStack(model),
        [3, 4, 6],
        tokenizer,
        items(60),
        LoraSettings(steps=40, learning_rate=2e-3),
    )
    pruned = job.stack.remove([3, 4, 6])
    healers = {"linear": heal_linear, "lora": heal_lora, "full": heal_full}
    healed, _ = healers[method](job, pruned)
    assert {weight.device.type for weight in healed.parameters()} == {"cuda"}
    assert batch_nll(healed, job.validation) < batch_nll(pruned, job.validation)


def test_the_closed_form_is_that_of_the_cpu(tokenizer):
    losses = []
    for device in ("cpu", "cuda"):
        stack = LayerStack(tiny_llama().to(device))
        job = HealingJob.of(stack, [3, 4, 6], tokenizer, items(60), LoraSettings())
        healed, _ = heal_linear(job, stack.remove([3, 4, 6]))
        losses.append(batch_nll(healed, job.validation))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("name", ["ablation", "avss", "bi", "pruneme"])
def test_streamed_scores_are_those_in_memory(name, folder):
    whole, tokenizer = load_model(str(folder / "model"), device="cuda")
    streamed, _ = load_streamed(str(folder / "model"), device="cuda")
    scores = [
        get_strategy(name)(model, tokenizer, batch_size=2).compute_layer_scores(items())
        for model in (whole, streamed)
    ]
    assert scores[1] == {layer: pytest.approx(score, **CLOSE) for layer, score in scores[0].items()}


def test_a_streamed_model_is_never_whole_on_the_gpu(tmp_path):
    """Eight layers of 8 MB: at no time are more than a few of them there."""
    model = zoo.build("llama", hidden_size=512, intermediate_size=1024)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in model.parameters())
    streamed, tokenizer = load_streamed(str(tmp_path), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    get_strategy("bi")(streamed, tokenizer).compute_layer_scores(items())
    assert torch.cuda.max_memory_allocated() - before < size / 2


@pytest.mark.parametrize("heal", ["none", "linear", "lora", "full"])
def test_the_command_runs_on_the_gpu(heal, folder, tmp_path):
    words = ["--model", folder / "model", "--eval-dataset", folder / "texts.jsonl", "--n-layers", 2]
    words += ["--heal", heal, "--n-samples", 40, "--output", tmp_path / "out"]
    assert main([*map(str, words)]) == 0
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert torch.cuda.get_device_name() in json.dumps(report)
    load_model(str(tmp_path / "out"), device="cpu")


def test_a_gpu_that_is_not_there_is_refused(folder, tmp_path, capsys):
    words = ["--model", folder / "model", "--eval-dataset", folder / "texts.jsonl", "--n-layers", 2]
    words += ["--output", tmp_path / "out", "--device", "cuda:64"]
    assert main([*map(str, words)]) == 3
    assert "cuda:64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("processes", "more"), [(1, []), (2, ["--device", "cuda:0"])])
def test_processes_on_one_gpu_find_what_one_finds(processes, more, folder, tmp_path):
    """NCCL joins them where each has a GPU; on a shared one the measurements still add up."""
    base = ["--model", folder / "model", "--eval-dataset", folder / "texts.jsonl", "--n-layers", 2]
    found = []
    for start in (
        [],
        ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"],
    ):
        command = [sys.executable, "-m", *start, "llm_pruner.cli", *base, "--dry-run", "--json"]
        command += more if start else []
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["remove"])
    assert found[0] == found[1]


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="several GPUs")
def test_more_processes_than_gpus_are_refused(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command += ["-m", "llm_pruner.cli", "--model", folder / "model", "--dry-run"]
    command += ["--eval-dataset", folder / "texts.jsonl", "--n-layers", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "has no GPU, of which there are 1" in done.stderr
