"""What pruning gains: size, time and memory of both models, measured in turns."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidDataError
from ..model.forward import evaluating, input_device, position_limit
from ..model.layer_stack import LayerStack
from ..results import Comparison
from ..utils import at_least_one, count_bytes, count_parameters
from .generation import greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ENOUGH = 6  # paired runs whose range holds the median difference with at least 95 %
PREFILLS = 24  # as long as ENOUGH runs that generate
CACHE_TOKENS = 16
TIMED_TOKENS = 32  # of a prompt, and of its continuation


def compare_cost(
    original: Any,
    pruned: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 8,
    prompt_tokens: int = TIMED_TOKENS,
    new_tokens: int = TIMED_TOKENS,
    repeats: int = ENOUGH,
    layers_path: str | None = None,
    stored: tuple[int, int] | None = None,
    timed: bool = True,
) -> list[Comparison]:
    """Compare two models by size, and by the time and memory that generation takes.

    Group ``size``: layers, parameters, bytes of the weights, bytes that every token adds to the
    cache. Group ``speed``, at batch 1 and at `batch`: prompt tokens (prefill) and new tokens
    (decode) per second; time to the first token at batch 1; peak memory on CUDA. The models take
    turns, after one warm-up run each. Values are medians of the runs. The interval is the range of
    the paired differences; for six runs it holds their median with a probability of 97 %,
    1 - 2^(1 - repeats), and for fewer there is none.

    Args:
        original, pruned: causal language models.
        tokenizer: their tokenizer.
        batch: sequences generated together, in the larger batch.
        prompt_tokens, new_tokens: per sequence, lowered to what the models have positions for.
        repeats: timed runs of each model.
        layers_path: dotted name of the layer list, where it is not found.
        stored: bytes of the weights of both in their files, if they are to be compared instead of
            those in memory.
        timed: whether speed and cache are measured, which say nothing where the models in memory
            only stand in for what is run elsewhere (GGUF).

    Raises:
        InvalidDataError: a count below 1, or fewer than 2 new tokens.
        NonFiniteError: a model's logits are NaN.
    """
    at_least_one(batch=batch, prompt_tokens=prompt_tokens, repeats=repeats)
    models = [original, pruned]
    prompt_tokens, new_tokens = _that_fit(models, prompt_tokens, new_tokens)
    prompt = _prompt(tokenizer, prompt_tokens)
    comparisons = _sizes(models, layers_path, stored)
    if not timed:
        return comparisons
    before, after = (cache_bytes(model, prompt[0]) for model in models)
    if before and after:  # of some architectures it does not grow
        comparisons.append(Comparison("cache per token", "size", "bytes", before, after, False))
    for size in dict.fromkeys((1, batch)):
        runs = _runs(models, [prompt] * size, new_tokens, repeats)
        note = f"batch {size}, {prompt_tokens} prompt and {new_tokens} new tokens"
        comparisons += _timed(runs, size, note)
    return comparisons


def speedup(
    original: Any, pruned: Any, tokenizer: PreTrainedTokenizerBase, batch: int, what: str
) -> float:
    """How many times as fast the pruned model is: the median of paired runs, as in `compare_cost`.

    Args:
        original, pruned: causal language models.
        tokenizer: their tokenizer.
        batch: sequences generated together.
        what: ``decode`` or ``prefill``, which is short and therefore timed more often.

    Raises:
        InvalidDataError: a model has fewer than four positions.
    """
    models, prefill = [original, pruned], what == "prefill"
    prompt_tokens, new_tokens = _that_fit(models, TIMED_TOKENS, 2 if prefill else TIMED_TOKENS)
    prompts = [_prompt(tokenizer, prompt_tokens)] * batch
    before, after = _runs(models, prompts, new_tokens, PREFILLS if prefill else ENOUGH)
    return statistics.median(new[what] / old[what] for old, new in zip(before, after, strict=True))


def seconds_to_compare(model: Any, tokenizer: PreTrainedTokenizerBase, batch: int = 8) -> float:
    """What timing it and a pruned model will take in `compare_cost`, from one run of each batch.

    Raises:
        InvalidDataError: the model has fewer than four positions.
    """
    prompt_tokens, new_tokens = _that_fit([model], TIMED_TOKENS, TIMED_TOKENS)
    prompt, begin = _prompt(tokenizer, prompt_tokens), time.perf_counter()
    for size in dict.fromkeys((1, batch)):
        _run(model, [prompt] * size, new_tokens)
    return 2 * (ENOUGH + 1) * (time.perf_counter() - begin)


def _that_fit(models: Sequence[Any], prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
    """Prompt and new tokens, lowered to what the models have positions for."""
    room = min(map(position_limit, models))
    prompt_tokens = min(prompt_tokens, room // 2)
    new_tokens = min(new_tokens, room - prompt_tokens)
    if new_tokens < 2:
        raise InvalidDataError(
            f"new_tokens={new_tokens} (the models have {room} positions) must be at least 2: the "
            "time between new tokens is measured."
        )
    return prompt_tokens, new_tokens


def _prompt(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> list[int]:
    text = "Once upon a time there was a small town."
    return (list(tokenizer(text)["input_ids"]) * n_tokens)[:n_tokens]


def _runs(
    models: Sequence[Any], prompts: Sequence[list[int]], new_tokens: int, repeats: int
) -> list[list[dict[str, float]]]:
    """Timed generations of each model, in turns, after one that is not counted."""
    runs: list[list[dict[str, float]]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, of_model in zip(models, runs, strict=True):
            of_model.append(_run(model, prompts, new_tokens))
    return [of_model[1:] for of_model in runs]


def _sizes(
    models: Sequence[Any], layers_path: str | None, stored: tuple[int, int] | None
) -> list[Comparison]:
    values: list[tuple[str, str, list[float], bool | None]] = [
        ("layers", "", [len(LayerStack(model, layers_path)) for model in models], None),
        ("parameters", "", [count_parameters(model) for model in models], False),
        ("weights", "MB", [size / 1e6 for size in stored or map(count_bytes, models)], False),
    ]
    return [
        Comparison(name, "size", unit, before, after, better)
        for name, unit, (before, after), better in values
    ]


def cache_bytes(model: Any, token: int = 0) -> float:
    """Bytes that a token adds to the cache; 0 for an architecture whose cache does not grow.

    From the caches of two sequences of the token `token`, one longer than the other.
    """
    sizes = []
    for length in (CACHE_TOKENS, 2 * CACHE_TOKENS):
        ids = torch.full((1, length), token, device=input_device(model))
        with evaluating(model):
            output = model(input_ids=ids, use_cache=True)
        tensors = {id(one): one for one in _tensors(output.get("past_key_values"))}
        sizes.append(sum(one.numel() * one.element_size() for one in tensors.values()))
    return (sizes[1] - sizes[0]) / CACHE_TOKENS


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a cache: an object of transformers, or nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
    elif type(value).__module__.startswith("transformers."):
        yield from _tensors(list(vars(value).values()))


def _run(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, float]:
    """Rates, time to the first token and peak memory of one generation.

    The clock is read whenever the logits of a next token have reached the CPU.
    """
    times: list[float] = []
    size, length = len(prompts), len(prompts[0])

    def stamp(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        times.append(time.perf_counter())  # after the check for NaN, which waits for the device
        return logits

    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    held = sum(torch.cuda.memory_allocated(device) for device in devices)
    start = time.perf_counter()
    greedy(model, prompts, new_tokens, watch=[stamp], min_length=length + new_tokens)
    first = times[0] - start
    found = {
        "prefill": size * length / first,
        "decode": size * (len(times) - 1) / (times[-1] - times[0]),
        "first": 1e3 * first,
    }
    if devices:
        peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        found["peak"] = (count_bytes(model) + peak - held) / 1e6
    return found


def _timed(runs: Sequence[Sequence[dict[str, float]]], size: int, note: str) -> list[Comparison]:
    """Medians of the runs of both models, and the range of their paired differences."""
    batch = f", batch {size}"
    rows = [
        ("prefill", f"prefill{batch}", "tokens/s", True, note),
        ("decode", f"decode{batch}", "tokens/s", True, note),
        ("first", "time to first token", "ms", False, note),
        ("peak", f"peak memory{batch}", "MB", False,
         f"{note}; a model's own weights and what it allocates on top"),
    ]  # fmt: skip
    timed = []
    for key, name, unit, better, note in rows:
        if key not in runs[0][0] or (key == "first" and size > 1):
            continue
        before, after = ([run[key] for run in of_model] for of_model in runs)
        changes = [new - old for old, new in zip(before, after, strict=True)]
        low, high = (min(changes), max(changes)) if len(changes) >= ENOUGH else (None, None)
        values = statistics.median(before), statistics.median(after)
        timed.append(
            Comparison(name, "speed", unit, *values, better, len(changes), low, high, note=note)
        )
    return timed


def machine(model: torch.nn.Module) -> dict[str, Any]:
    """What a model runs on: ``cpu``, ``cores``, ``threads``, ``device``, ``dtype``, ``gpu``."""
    parameter = next(model.parameters())
    devices = sorted({str(p.device) for p in model.parameters()})
    known: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": ", ".join(devices),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    if torch.cuda.is_available():
        known["gpu"] = torch.cuda.get_device_name()
    return known


def _cpu_name() -> str:
    """The name of the CPU as the system gives it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
