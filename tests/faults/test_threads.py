"""One model in two threads, and interrupts at any moment: right or refused, never left changed."""

from __future__ import annotations

import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import items, tiny_llama

from llm_pruner import AblationPruner, LayerStack, get_strategy
from llm_pruner.errors import ModelInUseError
from llm_pruner.model import forward
from llm_pruner.model.bypass import Bypass
from llm_pruner.model.forward import evaluating, using

STRATEGIES = ("ablation", "smart", "bi", "pruneme", "avss")


def state(model):
    """The modules of a model, their modes and hooks, and whether gradients are computed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    modules = [
        (name, id(module), module.training, *(len(getattr(module, hook)) for hook in hooks))
        for name, module in model.named_modules()
    ]
    return torch.is_grad_enabled(), modules


def scored(strategy, model, tokenizer, data):
    return dict(get_strategy(strategy)(model, tokenizer).compute_layer_scores(data))


@pytest.mark.parametrize("other", STRATEGIES)
def test_two_threads_that_score_one_model_get_what_one_gets(tokenizer, other):
    model, data = tiny_llama(), items()
    model.train()
    before = state(model)
    strategies = ("ablation", other)
    wanted = [scored(one, model, tokenizer, data) for one in strategies]
    assert state(model) == before
    for _ in range(4):
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(scored, one, model, tokenizer, data) for one in strategies]
            assert [job.result() for job in jobs] == wanted
        assert state(model) == before


def test_a_thread_that_waits_says_so(monkeypatch, caplog):
    monkeypatch.setattr(forward, "WAIT_SILENTLY", 0.05)
    model, order = tiny_llama(2), []

    def second():
        with evaluating(model):
            order.append("second")

    with using(model):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "Waiting for another thread" in caplog.text


def test_two_threads_never_wait_for_each_other():
    left, right = tiny_llama(2), tiny_llama(2)
    met = threading.Barrier(2)

    def use(first, then):
        with using(first):
            met.wait(10)
            with pytest.raises(ModelInUseError, match="let one end before the other"), using(then):
                pass
            met.wait(10)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(use, left, right), pool.submit(use, right, left)]
        assert [job.result(10) for job in jobs] == [None, None]
    with using(left), using(right), using(left):
        pass


def test_a_generator_that_is_left_frees_the_model(tokenizer):
    model = tiny_llama()
    states = get_strategy("bi")(model, tokenizer).hidden_states(items())
    next(iter(states))
    del states
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(scored, "bi", model, tokenizer, items()).result(20)) == 8


class Interrupted(BaseException):
    pass


def _interrupt(*_):
    raise Interrupted


@pytest.mark.parametrize("strategy", ["ablation", "smart", "bi"])
def test_an_interrupt_at_any_moment_leaves_the_model_as_it_was(tokenizer, strategy):
    model, data, draw = tiny_llama(), items(), random.Random(strategy)
    model.train()
    before = state(model)
    start = time.perf_counter()
    wanted = scored(strategy, model, tokenizer, data)
    whole = time.perf_counter() - start
    usual = signal.signal(signal.SIGALRM, _interrupt)
    interrupted = 0
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, whole))
                scored(strategy, model, tokenizer, data)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
            assert state(model) == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert interrupted > 10
    assert scored(strategy, model, tokenizer, data) == wanted


@pytest.mark.parametrize("index", range(0, 8, 3))
@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_layer_that_raises_leaves_the_model_as_it_was(tokenizer, index, fault):
    model = tiny_llama()
    stack, calls = LayerStack(model), []

    def fail(*_):
        calls.append(None)
        if len(calls) == 3:
            raise fault("here")

    handle = stack[index].register_forward_pre_hook(fail)
    before = state(model)
    with pytest.raises(fault, match="here"):
        AblationPruner(model, tokenizer).compute_layer_scores(items())
    assert state(model) == before
    assert not any(isinstance(layer, Bypass) for layer in stack)
    handle.remove()
