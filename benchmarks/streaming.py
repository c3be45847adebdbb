"""Scores of models larger than the memory.

    python benchmarks/streaming.py --suite all --jobs 2     # equal to in-memory scores, everywhere
    python benchmarks/streaming.py --gigabytes 2 --cap 3GiB --compare
    python benchmarks/streaming.py --gigabytes 8 --cap 3GiB

The first saves every tiny model of `tests/zoo.py` in shards and compares streamed with in-memory
scores. The others write a random Llama and score it in a process whose memory is capped: by a
memory cgroup (version 1) where one can be made, else by a limit on its data.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from llm_pruner.errors import LLMPrunerError, UnsupportedModelError
from llm_pruner.layers import LayerStack
from llm_pruner.pruners import (
    AblationPruner,
    AVSSPruner,
    BlockInfluencePruner,
    PruneMePruner,
)
from llm_pruner.streaming import load_streamed
from llm_pruner.utils import format_bytes, load_model, parse_bytes

CGROUP = Path("/sys/fs/cgroup/memory")
STRATEGIES = {
    "pruneme": PruneMePruner,
    "bi": BlockInfluencePruner,
    "avss": AVSSPruner,
    "ablation": AblationPruner,
}
WORDS = "the cat sat on a mat and saw one red bird in this old tree by our warm house".split()


def texts(n: int) -> list[str]:
    """Running texts of different lengths."""
    return [" ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(4 + i % 3 * 2)) for i in range(n)]


def compare(suite: str, name: str) -> tuple[str, str, str]:
    """(name, outcome, detail) of one tiny model of the zoo."""
    import zoo
    from conftest import word_tokenizer

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        if suite == "variants":
            variant = zoo.VARIANTS[name]
            model = zoo.build(variant.model_type, **variant.overrides)
        else:
            model = zoo.build_wrapper(name) if suite == "wrappers" else zoo.build(name)
    except Exception as error:
        return name, "NO MODEL", line(error)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, max_shard_size="100KB")
            word_tokenizer().save_pretrained(folder)
            whole, tokenizer = load_model(folder, device="cpu")
        except Exception as error:
            return name, "NO MODEL", line(error)
        return name, *judge(folder, whole, tokenizer)


def judge(folder: str, whole: Any, tokenizer: Any) -> tuple[str, str]:
    """Whether streamed scores are those of the model in memory."""
    data = texts(5)
    options: dict[str, Any] = {"protect": (0, 0), "batch_size": 2}
    try:
        streamed, _ = load_streamed(folder, device="cpu")
        found = {}
        for strategy, cls in STRATEGIES.items():
            pruner = cls(streamed, tokenizer, **options)
            found[strategy] = outcome(lambda pruner=pruner: pruner.compute_layer_scores(data))
    except UnsupportedModelError as error:
        return "REFUSED", line(error)
    except Exception as error:
        return "CRASH", line(error)
    worst, details = "EQUAL", []
    for strategy, cls in STRATEGIES.items():
        pruner = cls(whole, tokenizer, **options)
        want = outcome(lambda pruner=pruner: pruner.compute_layer_scores(data))
        got = found[strategy]
        if isinstance(want, dict) and isinstance(got, dict):
            gap = max(abs(want[k] - got[k]) for k in want)
            if gap:
                worst = "WRONG" if gap > 1e-6 or worst == "WRONG" else "CLOSE"
                details.append(f"{strategy} differs by {gap:.1e}")
        elif want != got:
            worst = "WRONG"
            details.append(f"{strategy}: {str(want)[:150]} / {str(got)[:150]}")
    return worst, "; ".join(details)


def outcome(action: Callable[[], Any]) -> Any:
    """What `action` returns, or what it refuses by."""
    try:
        return dict(action())
    except LLMPrunerError as error:
        if "are read" in str(error) or "cannot be streamed" in str(error) or "own weights" in str(error):
            raise
        return type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}"


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"


def run_suite(jobs: int, only: str | None) -> int:
    """Compare on the whole zoo; 1 if anything is wrong."""
    import zoo

    cases = [("causal", name) for name in zoo.CAUSAL]
    cases += [("variants", name) for name in zoo.VARIANTS]
    cases += [("wrappers", name) for name in zoo.WRAPPERS]
    if only:
        cases = [case for case in cases if only in case[1]]
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor(jobs) as pool:
        for (suite, _), (name, result, detail) in zip(
            cases, pool.map(compare, *zip(*cases, strict=True)), strict=True
        ):
            counts[result] += 1
            if result != "EQUAL":
                print(f"{result:10}{suite}/{name}: {detail}", flush=True)
    print(dict(counts))
    return int(any(counts[bad] for bad in ("WRONG", "CRASH")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--suite", choices=["all"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only")
    a = parser.parse_args()
    sys.exit(run_suite(a.jobs, a.only))
