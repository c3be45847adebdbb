"""Scores of models larger than the memory.

    python benchmarks/streaming.py --suite all --jobs 2     # equal to in-memory scores, everywhere
    python benchmarks/streaming.py --gigabytes 2 --cap 3GiB --compare
    python benchmarks/streaming.py --gigabytes 8 --cap 3GiB

The first saves every tiny model of `tests/zoo.py` in shards and compares offloaded with in-memory
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import zoo
from conftest import WORDS, word_tokenizer
from safetensors.torch import save_file
from transformers import LlamaConfig

from llm_pruner.errors import LLMPrunerError, UnsupportedModelError
from llm_pruner.model.loading import load_model
from llm_pruner.offload.offloaded_stack import load_streamed
from llm_pruner.pruners.avss import AVSSPruner
from llm_pruner.pruners.measured import AblationPruner
from llm_pruner.pruners.similarity import BlockInfluencePruner, PruneMePruner
from llm_pruner.utils import format_bytes, parse_bytes

CGROUP = Path("/sys/fs/cgroup/memory")
STRATEGIES = {
    "pruneme": PruneMePruner,
    "bi": BlockInfluencePruner,
    "avss": AVSSPruner,
    "ablation": AblationPruner,
}


def texts(n: int) -> list[str]:
    """Running texts of different lengths."""
    return [
        " ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(4 + i % 3 * 2)) for i in range(n)
    ]


def compare(suite: str, name: str) -> tuple[str, str, str]:
    """(name, outcome, detail) of one tiny model of the zoo."""
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
    """Whether offloaded scores are those of the model in memory."""
    data = texts(5)
    options: dict[str, Any] = {"protect": (0, 0), "batch_size": 2}
    try:
        offloaded, _ = load_streamed(folder, device="cpu")
        found = {}
        for strategy, cls in STRATEGIES.items():
            pruner = cls(offloaded, tokenizer, **options)
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
        refusals = ("are read", "cannot be offloaded", "own weights")
        if any(refusal in str(error) for refusal in refusals):
            raise
        return type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}"


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:250]}"


def run_suite(jobs: int, only: str | None) -> int:
    """Compare on the whole zoo; 1 if anything is wrong."""
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


def write_llama(folder: Path, gigabytes: float) -> int:
    """A random bfloat16 Llama of about so many GB, a shard per layer; its bytes."""
    hidden, inner = (2048, 5632) if gigabytes < 4 else (3072, 8192)
    layer_bytes = 2 * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden)
    layers = round(gigabytes * 1e9 / layer_bytes)
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)

    index, total = {}, 0
    for number in range(layers + 1):
        prefix = f"model.layers.{number}."
        if number == layers:
            shard = {
                "model.embed_tokens.weight": weight(len(tokenizer), hidden),
                "lm_head.weight": weight(len(tokenizer), hidden),
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            }
        else:
            shard = {
                f"{prefix}self_attn.{name}_proj.weight": weight(hidden, hidden) for name in "qkvo"
            }
            shard |= {
                f"{prefix}mlp.{name}_proj.weight": weight(inner, hidden) for name in ("gate", "up")
            }
            shard[f"{prefix}mlp.down_proj.weight"] = weight(hidden, inner)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shard[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))
    return total


@contextmanager
def sampled_memory() -> Iterator[dict[str, int]]:
    """The largest anonymous memory of this process while the block runs, looked at every 20 ms."""
    peak = {"anonymous": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            found = next(x for x in status.splitlines() if x.startswith("RssAnon"))
            peak["anonymous"] = max(peak["anonymous"], int(found.split()[1]) * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def child(folder: str, max_memory: int | None, items: int, strategies: list[str]) -> None:
    """Score in this process; what came out as JSON."""
    report: dict[str, Any] = {}
    with sampled_memory() as peak:
        how: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
        if max_memory is None:
            model, tokenizer = load_model(folder, **how)
        else:
            model, tokenizer = load_streamed(folder, max_memory=max_memory, **how)
        for name in strategies:
            pruner: Any = STRATEGIES[name](model, tokenizer, protect=(0, 0), batch_size=4)
            ran = [0]

            def count(*_: object, ran: list[int] = ran) -> None:
                ran[0] += 1

            handles = [layer.register_forward_hook(count) for layer in pruner.layers]
            before, start = getattr(pruner.layers, "bytes_read", 0), time.monotonic()
            scores = pruner.compute_layer_scores(texts(items))
            report[name] = {
                "scores": list(scores.values()),
                "seconds": time.monotonic() - start,
                "bytes_read": getattr(pruner.layers, "bytes_read", 0) - before,
                "executions": ran[0],
                "layers": len(pruner.layers),
            }
            for handle in handles:
                handle.remove()
    print(json.dumps({"peak": peak["anonymous"], "strategies": report}))


def capped(command: list[str], cap: int) -> tuple[dict[str, Any], str]:
    """What a child process prints whose memory is capped, and how it was capped."""
    group = CGROUP / f"llm-pruner-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(cap))
    except OSError:

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))

        return run_child(command, limit), "RLIMIT_DATA"
    try:
        result = run_child(command, lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        most = int((group / "memory.max_usage_in_bytes").read_text())
        return result, f"memory cgroup, at most {format_bytes(most)} with page cache"
    finally:
        group.rmdir()


def run_child(command: list[str], before: Callable[[], Any] | None = None) -> dict[str, Any]:
    done = subprocess.run(command, preexec_fn=before, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_large(args: argparse.Namespace) -> int:
    """Score a large model under a cap; 1 if the scores are not those of the model in memory."""
    with tempfile.TemporaryDirectory() as name:
        total = write_llama(Path(name), args.gigabytes)
        base = [sys.executable, __file__, "--items", str(args.items), "--child", name]
        found, how = capped([*base, "--max-memory", str(args.max_memory or args.cap)], args.cap)
        print(f"checkpoint {format_bytes(total)}, cap {format_bytes(args.cap)} ({how})")
        print(f"peak anonymous memory {format_bytes(found['peak'])}")
        for strategy, got in found["strategies"].items():
            layers = got["layers"]
            chunks = -(-args.items // 4)
            naive = chunks * (layers * (layers + 1) if strategy == "ablation" else layers)
            print(
                f"{strategy:9} {got['seconds']:6.0f} s, {got['bytes_read'] / total:.3f} x the "
                f"checkpoint read, {got['executions']} layer executions, "
                f"{got['executions'] / naive:.3f} of naive"
            )
        if not args.compare:
            return 0
        want = run_child(base)
        print(f"in memory: peak anonymous memory {format_bytes(want['peak'])}")
        wrong = 0
        for strategy, got in found["strategies"].items():
            whole = want["strategies"][strategy]
            gap = max(abs(x - y) for x, y in zip(got["scores"], whole["scores"], strict=True))
            print(f"{strategy:9} {whole['seconds']:6.0f} s in memory, largest difference {gap:.1e}")
            wrong |= gap > 0
        return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--suite", choices=["all"], help="compare with scores in memory on the whole zoo")
    add("--only", help="of the zoo, models whose name holds this")
    add("--jobs", type=int, default=1, help="processes for the zoo")
    add("--gigabytes", type=float, help="size of the random Llama")
    add("--cap", type=parse_bytes, default=3 * 2**30, help="memory of the process that scores it")
    add("--max-memory", type=parse_bytes, help="what the library is told (default: the cap)")
    add("--items", type=int, default=8, help="short texts to score on")
    add("--compare", action="store_true", help="score it in memory too")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.max_memory, args.items, ["pruneme", "ablation"])
        return 0
    return run_suite(args.jobs, args.only) if args.suite else run_large(args)


if __name__ == "__main__":
    sys.exit(main())
