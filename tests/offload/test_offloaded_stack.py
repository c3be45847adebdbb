"""Offloaded scores equal those of the model in memory to the last bit, and so do refusals."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from conftest import WORDS, items, tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file

from llm_pruner.errors import InvalidPlanError, LoadError, OutputError, UnsupportedModelError
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.model.loading import load_model
from llm_pruner.offload import offloaded_stack
from llm_pruner.offload.activation_store import ActivationStore
from llm_pruner.offload.offloaded_stack import OffloadedStack, layers_of, load_streamed, load_within
from llm_pruner.pruners.avss import AVSSPruner
from llm_pruner.pruners.measured import AblationPruner, SmartPruner
from llm_pruner.pruners.similarity import BlockInfluencePruner, PruneMePruner
from llm_pruner.search.removal_quality import RemovalQuality
from llm_pruner.utils import format_bytes, parse_bytes
from llm_pruner.workflow import carry_out

STRATEGIES = [PruneMePruner, BlockInfluencePruner, AVSSPruner, AblationPruner]
# What each stands for; `benchmarks/streaming.py --suite all` has the rest.
ARCHITECTURES = {
    "llama": "plain",
    "gpt2": "tied embeddings, positions outside the layers",
    "opt": "projections around the layers",
    "gpt_neox": "head under another name",
    "bloom": "position bias made outside",
    "ctrl": "embedded tokens changed in place",
    "blt": "encoder and decoder around the layers",
    "llama4_text": "a look at the embedding before it runs",
    "gemma3_text": "two kinds of attention masks",
    "gemma3n_text": "per-layer embeddings",
    "gemma4_text-shared-kv": "keys and values shared between layers",
    "gemma4_text-experts": "experts beside a dense part",
    "qwen3_moe": "fused experts",
    "lfm2_moe": "fused experts that look at alignment",
    "mixtral": "experts",
    "deepseek_v3": "dense, then experts",
    "jamba": "state-space layers and experts",
    "falcon_mamba": "state-space layers",
    "zamba2": "a block shared between layers",
    "recurrent_gemma": "recurrent layers",
    "zaya": "router state handed on",
    "glm_moe_dsa": "indices handed on",
    "inkling2_text": "residuals of blocks",
    "openai-gpt": "layers that return lists",
    "reformer": "layers that return named tuples",
    "xlnet": "two residual streams",
}
WRAPPERS = {
    "gemma3": "text and image tokens in one mask",
    "idefics3": "a look at the device of a tower",
    "llava": "layers inside a language model inside a model",
}
REFUSED = {
    "xlm": "several lists",
    "hrm_text": "several lists",
    "rwkv": "changes its own weights",
}


def texts(n: int = 5) -> list[str]:
    return [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 4]) for i in range(n)]


def built(name: str) -> torch.nn.Module:
    if name in WRAPPERS:
        return zoo.build_wrapper(name)
    if name in zoo.VARIANTS:
        return zoo.build(zoo.VARIANTS[name].model_type, **zoo.VARIANTS[name].overrides)
    return zoo.build(name)


def saved(model: torch.nn.Module, folder: Path, shards: str = "60KB") -> str:
    model.save_pretrained(folder, max_shard_size=shards)
    word_tokenizer().save_pretrained(folder)
    assert shards != "60KB" or len(list(folder.glob("*.safetensors"))) > 1
    return str(folder)


def stored_bytes(folder: str) -> int:
    files = map(load_file, Path(folder).glob("*.safetensors"))
    return sum(tensor.nbytes for file in files for tensor in file.values())


@pytest.fixture
def folder(tmp_path) -> str:
    """A tiny Llama of 8 layers in several files."""
    return saved(tiny_llama(), tmp_path / "model")


def pair(folder: str) -> tuple[torch.nn.Module, torch.nn.Module, object]:
    """The model in memory, the offloaded one, the tokenizer."""
    whole, tokenizer = load_model(folder, device="cpu")
    return whole, load_streamed(folder, device="cpu")[0], tokenizer


def scored(cls: type, model: torch.nn.Module, tokenizer: object) -> dict[int, float] | str:
    pruner = cls(model, tokenizer, protect=(0, 0), batch_size=2)
    try:
        return dict(pruner.compute_layer_scores(texts()))
    except UnsupportedModelError as error:  # which both have to raise
        return f"{type(error).__name__} {str(error).split(':')[0]}"


def assert_equal(folder: str) -> None:
    whole, offloaded, tokenizer = pair(folder)
    for cls in STRATEGIES:
        assert scored(cls, offloaded, tokenizer) == scored(cls, whole, tokenizer), cls.__name__
    if isinstance(scored(PruneMePruner, whole, tokenizer), str):  # refused: not states by token
        return
    found, wanted = (
        list(PruneMePruner(model, tokenizer, batch_size=2).hidden_states(texts()))
        for model in (offloaded, whole)
    )
    assert len(found) == len(wanted) == 3
    for (states, real), (others, mask) in zip(found, wanted, strict=True):
        assert torch.equal(real, mask)
        assert all(torch.equal(*both) for both in zip(states, others, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES | WRAPPERS)
def test_scores_are_those_in_memory(name, tmp_path):
    assert_equal(saved(built(name), tmp_path))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_offloaded_is_refused(name, tmp_path):
    offloaded, tokenizer = load_streamed(saved(built(name), tmp_path), device="cpu")
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        PruneMePruner(offloaded, tokenizer).compute_layer_scores(texts())


def test_converted_weights_that_lie_elsewhere_round_alike(tmp_path):
    """Transformers maps these experts from the checkpoint; here they are read from a copy."""
    whole, offloaded, tokenizer = pair(saved(zoo.build_wrapper("qwen3_vl_moe"), tmp_path))
    for cls in STRATEGIES:
        assert scored(cls, offloaded, tokenizer) == pytest.approx(
            scored(cls, whole, tokenizer), rel=1e-5, abs=1e-6
        )


def test_the_last_layers_of_gemma4_see_all_tokens(tmp_path):
    """Those that share keys and values run for the positions of the wanted logits alone."""
    model, tokenizer = load_model(saved(built("gemma4_text-shared-kv"), tmp_path), device="cpu")
    for states, real in PruneMePruner(model, tokenizer).hidden_states(texts()):
        assert {state.shape[:2] for state in states} == {real.shape}


def test_other_dtypes_than_stored(tmp_path):
    folder = saved(tiny_llama().to(torch.bfloat16), tmp_path, shards="30KB")
    for dtype in ("float32", "auto"):
        whole, tokenizer = load_model(folder, device="cpu", dtype=dtype)
        offloaded, _ = load_streamed(folder, device="cpu", dtype=dtype)
        for cls in STRATEGIES:
            assert scored(cls, offloaded, tokenizer) == scored(cls, whole, tokenizer)
        stack = layers_of(offloaded)
        assert stack.bytes_read <= 5 * stored_bytes(folder)  # two of them for ablation


@pytest.mark.parametrize(
    "objective", ["kl", "agreement", "accuracy", "nll=0.5,kl=0.2,accuracy=0.3"]
)
def test_every_objective_in_one_reading(objective, folder):
    *models, tokenizer = pair(folder)
    data = [
        {**item, "choices": [item["reference"], item["reference"] + " cat" if i % 3 else "the"]}
        for i, item in enumerate(items(20))
    ]
    qualities = [
        RemovalQuality(layers_of(model), tokenizer, data, objective=objective, batch_size=4)
        for model in models
    ]
    stack = qualities[1].stack
    stack.prepare()
    before = stack.bytes_read
    removals = [(2,), (2, 5), (3,), (2, 6)]
    for quality in qualities:
        quality.measure(removals)
    assert stack.bytes_read - before <= 1.05 * stored_bytes(folder)
    for removed in removals:
        assert qualities[0].change(removed) == qualities[1].change(removed)
        assert qualities[0].interval(removed) == qualities[1].interval(removed)


def test_a_search_finds_the_same(folder, tmp_path):
    whole, offloaded, tokenizer = pair(folder)
    plans = [
        SmartPruner(model, tokenizer, batch_size=4, journal=tmp_path / f"{number}.jsonl").plan(
            items(24), n_layers=2, held_out=texts()
        )
        for number, model in enumerate((whole, offloaded))
    ]
    assert plans[0].remove == plans[1].remove
    assert plans[0].held_out == plans[1].held_out
    again = SmartPruner(offloaded, tokenizer, batch_size=4, journal=tmp_path / "1.jsonl")
    assert again.optimize_selection(None, items(24), n_layers=2) == list(plans[1].remove)
    assert again.quality(items(24)).measured == 0


def test_layers_run_and_bytes_are_read_once(folder):
    offloaded, tokenizer = load_streamed(folder, device="cpu")
    total, depth, batches = stored_bytes(folder), 8, 3
    ran: list[int] = []
    for index, layer in enumerate(LayerStack(offloaded)):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    pruner = PruneMePruner(offloaded, tokenizer, batch_size=2)
    pruner.compute_layer_scores(texts())
    assert ran == [index for index in range(depth) for _ in range(batches)]
    assert 0.9 * total < pruner.layers.bytes_read <= total  # the head is not needed
    ablation = AblationPruner(offloaded, tokenizer, batch_size=2)
    ran.clear()
    ablation.layers.prepare()
    assert len(ran) == depth + depth // 2 + 1
    before = ablation.layers.bytes_read
    ran.clear()
    ablation.compute_layer_scores(texts())
    assert ablation.layers.bytes_read - before == total
    assert len(ran) == batches * (depth + depth * (depth - 1) // 2)
    assert len(ran) <= 0.55 * batches * depth * (depth + 1)


def test_states_that_do_not_fit_wait_in_files(folder, monkeypatch, tmp_path):
    whole, offloaded, tokenizer = pair(folder)
    wanted = {cls: scored(cls, whole, tokenizer) for cls in STRATEGIES}
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spill))
    monkeypatch.setattr("llm_pruner.offload.activation_store.SMALL", 0)
    stores: list[ActivationStore] = []

    def watched(budget):
        stores.append(ActivationStore(budget))
        return stores[-1]

    monkeypatch.setattr("llm_pruner.offload.scheduler.ActivationStore", watched)
    for cls in STRATEGIES:
        pruner = cls(offloaded, tokenizer, protect=(0, 0), batch_size=2)
        pruner.layers.budget = 0
        assert dict(pruner.compute_layer_scores(texts())) == wanted[cls]
    assert all(store.bytes_written for store in stores)
    assert not os.listdir(spill)


def test_a_store_counts_what_it_holds(monkeypatch):
    monkeypatch.setattr("llm_pruner.offload.activation_store.SMALL", 0)
    store = ActivationStore(1000)
    first, second = torch.rand(100), torch.rand(200)
    copy = second.clone()
    store.keep({"a": [first, (second,)]})
    store.keep(first)
    assert store.bytes_written == 800
    assert torch.equal(second, copy)
    second.add_(1)
    assert torch.equal(second, copy + 1)
    del first
    third = torch.rand(250)
    store.keep(third)
    assert store.bytes_written == 800
    whole = torch.rand(2, 300)
    part = whole[0]
    store.keep(part)  # somebody else has its memory too
    part.zero_()
    assert store.bytes_written == 800
    assert whole[0].sum() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    def full(prefix):
        path = tmp_path / prefix
        path.touch()
        return os.open("/dev/full", os.O_WRONLY), str(path)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(OutputError, match=r"No space left on device.*TMPDIR"):
        ActivationStore(0).keep(torch.rand(10**5))
    assert not list(tmp_path.iterdir())


def assert_clean(stack: OffloadedStack) -> None:
    assert "llm_pruner pass" not in {thread.name for thread in threading.enumerate()}
    assert all(type(layer).__name__ == "LlamaDecoderLayer" for layer in stack)
    assert all(parameter.is_meta for parameter in stack.model.parameters())
    assert "forward" not in vars(stack.model.lm_head)


def test_the_error_of_a_call_is_raised(folder):
    offloaded, tokenizer = load_streamed(folder, device="cpu")
    pruner = PruneMePruner(offloaded, tokenizer, batch_size=2)
    seen: list[int] = []

    def call(fails: bool) -> None:
        def look(index, entering, leaving):
            seen.append(index)
            if fails and index == 3:
                raise ZeroDivisionError("here")

        with torch.no_grad(), pruner.layers.observe(look):
            offloaded(input_ids=torch.tensor([[3, 4, 5]]))

    calls = [partial(call, fails) for fails in (False, True, False)]
    with pytest.raises(ZeroDivisionError, match="here"):
        list(pruner.layers.run_all(calls))
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert_clean(pruner.layers)
    assert len(list(pruner.hidden_states(texts()))) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interruption_ends_all_calls(folder, error):
    offloaded, tokenizer = load_streamed(folder, device="cpu")
    pruner = AblationPruner(offloaded, tokenizer, batch_size=2)

    def interrupt(*_: object) -> None:
        raise error("stop")

    handle = pruner.layers[4].register_forward_hook(interrupt)
    with pytest.raises(error, match="stop"):
        pruner.compute_layer_scores(texts())
    assert_clean(pruner.layers)
    handle.remove()
    assert len(pruner.compute_layer_scores(texts())) == 8


def test_a_state_changed_before_another_pass_has_it_is_computed_anew(folder):
    """As it is in memory, where every pass has its own."""
    whole, offloaded, _ = pair(folder)
    ids = torch.tensor([[3, 4, 5, 6]])
    results = []
    for model in (whole, offloaded):
        stack = layers_of(model)
        stack.prepare()

        def meddle(index, before, after):
            if index == 2:
                after.add_(1)

        def run(removed, stack=stack, model=model, meddle=meddle):
            with torch.no_grad(), stack.bypass(removed), stack.observe(meddle):
                return model(input_ids=ids).logits

        calls = [partial(run, removed) for removed in [(), (3,), (5,), (2, 3)]]
        results.append(list(stack.run_all(calls, alike=True)))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][1])


def test_a_shared_state_that_is_changed_later_is_refused(folder):
    stack = layers_of(load_streamed(folder, device="cpu")[0])

    def run() -> torch.Tensor:
        kept = {}

        def meddle(index, before, after):
            kept[index] = after
            if index == 4:
                kept[1].add_(1)

        with torch.no_grad(), stack.observe(meddle):
            return stack.model(input_ids=torch.tensor([[3, 4]]), use_cache=False).logits

    with pytest.raises(UnsupportedModelError, match="changes states of earlier layers"):
        list(stack.run_all([run, run], alike=True))
    assert_clean(stack)


def test_a_call_may_run_several_passes(folder):
    """Each reads the weights anew, in step with those of the other calls."""
    whole, offloaded, _ = pair(folder)
    stack = layers_of(offloaded)

    def run(model: torch.nn.Module, times: int) -> torch.Tensor:
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            for _ in range(times):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids

    found = list(stack.run_all([lambda n=n: run(offloaded, n) for n in (1, 3)]))
    assert [x.tolist() for x in found] == [run(whole, n).tolist() for n in (1, 3)]
    assert stack.bytes_read <= 3 * stored_bytes(folder)


def test_what_needs_the_weights_is_refused(folder, tmp_path):
    offloaded, tokenizer = load_streamed(folder, device="cpu")
    pruner = AblationPruner(offloaded, tokenizer, objective="similarity")
    plan = PruneMePruner(offloaded, tokenizer).plan(texts(), n_layers=1)
    for action in (
        lambda: pruner.compute_layer_scores(items()),
        lambda: pruner.prune_and_save([3], tmp_path / "out", "tiny"),
        lambda: carry_out(pruner, plan, tmp_path / "out", items()),
        lambda: offloaded(input_ids=torch.tensor([[3]])),
        lambda: offloaded.generate(torch.tensor([[3]]), max_new_tokens=1),
    ):
        with pytest.raises(UnsupportedModelError, match="remove them on disk"):
            action()
    assert not (tmp_path / "out").exists()
    stack = pruner.layers
    for block in (stack.bypass([1]), stack.observe(print)):
        with pytest.raises(UnsupportedModelError, match=r"stack.run_all\(\[...\]\)"), block:
            pass
    for block in (stack.observe_inputs([1], print), stack.replay(2, torch.zeros(1))):
        with pytest.raises(UnsupportedModelError, match="are offloaded, so a pass cannot"), block:
            pass


def test_the_pruned_skeleton_says_what_can_go(tmp_path):
    """A search asks the architecture, which needs no weights."""
    stack = layers_of(load_streamed(saved(zoo.build("minimax"), tmp_path), device="cpu")[0])
    assert len(LayerStack(stack.remove([0, 1]))) == zoo.N_LAYERS - 2
    with pytest.raises(UnsupportedModelError, match="must be full attention"):
        stack.remove([0])


def test_a_damaged_checkpoint_is_refused(folder):
    first = sorted(Path(folder).glob("*.safetensors"))[0]
    tensors = load_file(first)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, first, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="not in the checkpoint"):
        load_streamed(folder, device="cpu")


def test_a_file_that_disappears_is_reported(folder):
    offloaded, tokenizer = load_streamed(folder, device="cpu")
    pruner = PruneMePruner(offloaded, tokenizer)
    for path in Path(folder).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(LoadError, match="Cannot read"):
        pruner.compute_layer_scores(texts())
    assert_clean(pruner.layers)


def test_converted_weights_go_with_the_model(tmp_path, monkeypatch):
    """Fused experts are written once, beside the checkpoint, and not left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    offloaded, _ = load_streamed(saved(zoo.build("qwen3_moe"), tmp_path / "model"), device="cpu")
    (written,) = tmp_path.glob("llm-pruner-*")
    assert list(written.glob("*.safetensors"))
    del offloaded
    gc.collect()
    assert not written.exists()


def test_memory_decides(folder, monkeypatch):
    size = stored_bytes(folder)
    monkeypatch.setattr(offloaded_stack, "ROOM", 1000)
    model, _ = load_within(size + 1000, folder, device="cpu")
    assert not isinstance(layers_of(model), OffloadedStack)
    model, tokenizer = load_within(size + 999, folder, device="cpu")
    stack = layers_of(model)
    assert isinstance(stack, OffloadedStack)
    layer = sum(p.nbytes for p in stack[0].parameters())
    least = layer + sum(p.nbytes for p in model.model.norm.parameters()) + 1000
    assert stack.budget == size + 999 - least
    model, _ = load_within(least - 1, folder, device="cpu")
    with pytest.raises(InvalidPlanError, match=f"one layer at a time takes {format_bytes(least)}"):
        PruneMePruner(model, tokenizer)
    model, _ = load_within(least, folder, device="cpu")
    assert layers_of(model).budget == 0


def test_sizes_are_parsed_and_anything_else_refused():
    sizes = {"4GiB": 2**32, "500 MB": 5 * 10**8, "1.5kib": 1536, "123": 123, "2B": 2}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "4 pies", "-1GiB", "0", "GiB", "1e9"):
        with pytest.raises(InvalidPlanError, match=r"must be a size of memory, e\.g\. 4GiB"):
            parse_bytes(text)
