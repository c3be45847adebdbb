"""Every architecture that transformers knows: is a removal exact, refused, or wrong?

    python benchmarks/architectures.py                                # inner layers, all types
    python benchmarks/architectures.py --suite all --jobs 2
    python benchmarks/architectures.py --types llama,gpt2 --suite ends

Tiny random models, each layer set judged against an independent reference: the original model
with these layers turned into the identity. A case passes if the bypassed, the removed and the
reloaded model compute the reference, caching changes nothing (as far as it changes nothing in the
original), and the original is untouched. Where an architecture cannot express the removal at all,
it must be refused. Prints a Markdown table of the cases that do not pass, and totals.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import zoo

from llm_pruner.checkpoint.save import write_model
from llm_pruner.checkpoint.verify import verify_checkpoint, verify_removal
from llm_pruner.errors import UnsupportedModelError
from llm_pruner.model.layer_stack import LayerStack

INNER = ((2, 3), (1, 4))
ENDS = ((0,), (5,))
SUITES = ("causal", "ends", "variants", "wrappers")
# The largest difference of logits, relative to the largest logit, that rounding explains.
TOLERANCE = 2e-5
CACHE_TOLERANCE = 1e-3
TOLERANCES = {"rwkv": 5e-4}  # it divides weights and stream by powers of two around its norms
# What a model calls its cache, in its output and its arguments.
CACHES = ("past_key_values", "cache_params", "state", "past_buckets_states")
# From harmless to harmful: a case is as bad as its worst check.
OUTCOMES = ("PASS", "MUST REFUSE", "REFUSED", "CRASH", "WRONG", "VACUOUS", "NO MODEL")


@dataclass(frozen=True)
class Case:
    """One set of layers of one model and what came of it."""

    suite: str
    name: str
    removed: tuple[int, ...]
    outcome: str
    detail: str = ""


def run_model(suite: str, name: str) -> list[Case]:
    """Build one model and judge every layer set of a suite on it."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sets: Iterable[tuple[int, ...]] = ENDS if suite == "ends" else INNER
    try:
        if suite == "variants":
            variant = zoo.VARIANTS[name]
            model = zoo.build(variant.model_type, **variant.overrides)
            sets = variant.sets or INNER
        elif suite == "wrappers":
            model = zoo.build_wrapper(name)
        else:
            model = zoo.build(name)
        before = zoo.logits(model)
    except Exception as error:
        return [Case(suite, name, (), "NO MODEL", _line(error))]
    probe = _cache_probe(model)
    return [_judge(suite, name, model, tuple(removed), before, probe) for removed in sets]


def _judge(
    suite: str,
    name: str,
    model: Any,
    removed: tuple[int, ...],
    before: torch.Tensor,
    cache_error: Callable[[Any], str] | None,
) -> Case:
    illegal = zoo.INEXPRESSIBLE.get((name, removed))
    tolerance = TOLERANCES.get(model.config.model_type, TOLERANCE)
    found: list[tuple[str, str]] = []

    def check(step: str, action: Callable[[], str]) -> None:
        """Record a message of `action` as wrong, an exception as refusal or crash."""
        try:
            message = action()
        except UnsupportedModelError as error:
            must = illegal and step == "remove"
            found.append(("MUST REFUSE" if must else "REFUSED", f"{step}: {_line(error)}"))
        except Exception as error:
            found.append(("CRASH", f"{step}: {_line(error)}"))
        else:
            if message:
                found.append(("WRONG", f"{step}: {message}"))

    def differs(got: torch.Tensor) -> str:
        return "" if truth is None else _differs(got, truth, tolerance)

    truth: torch.Tensor | None = None
    try:
        truth = zoo.reference_logits(model, removed)
    except Exception as error:
        if not illegal:
            return Case(suite, name, removed, "NO MODEL", f"reference: {_line(error)}")
    if truth is not None and not _differs(truth, before, 1e-3):
        return Case(suite, name, removed, "VACUOUS", "the layers do not matter")
    config = model.config.to_dict()
    pruned: list[Any] = []

    def bypass() -> str:
        with LayerStack(model).bypass(removed):
            return differs(zoo.logits(model))

    def remove() -> str:
        result = LayerStack(model).remove(removed)
        pruned.append(result)
        if illegal:
            return f"not refused, although {illegal}"
        return differs(zoo.logits(result))

    def untouched() -> str:
        if model.config.to_dict() != config:
            return "the original's config changed"
        return "" if torch.equal(zoo.logits(model), before) else "the original's logits changed"

    if not illegal:
        check("bypass", bypass)
    check("remove", remove)
    if pruned:
        check("reload", lambda: _reload_error(pruned[0], differs))
        check("verify", lambda: _verify(model, removed, pruned[0]))
        if cache_error:
            check("cache", lambda: cache_error(pruned[0]))
    check("original", untouched)
    if not found:
        return Case(suite, name, removed, "PASS")
    worst = max((outcome for outcome, _ in found), key=OUTCOMES.index)
    details = list(dict.fromkeys(detail for _, detail in found))
    if len({detail.partition(": ")[2] for detail in details}) == 1:
        details = details[:1]
    return Case(suite, name, removed, worst, "; ".join(details))


def _reload_error(pruned: Any, differs: Callable[[torch.Tensor], str]) -> str:
    """What is wrong with the written and reloaded model, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(pruned, Path(folder))
        loaded: Any = zoo.loader(pruned).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    reloaded, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            return f"{len(info[kind])} {kind}, such as {sorted(map(str, info[kind]))[0]}"
    return differs(zoo.logits(reloaded.eval()))


def _verify(model: Any, removed: tuple[int, ...], pruned: Any) -> str:
    """What the library's own verification says of a removal that is exact: nothing."""
    with tempfile.TemporaryDirectory() as folder:
        verify_removal(LayerStack(model), removed, pruned)
        write_model(pruned, Path(folder))
        verify_checkpoint(folder, pruned)
    return ""


def _cache_probe(model: Any) -> Callable[[Any], str] | None:
    """The way to compare cached with uncached logits that an unpruned model itself satisfies."""
    for probe in (_stepwise_error, _generate_error):
        try:
            if not probe(model):
                return probe
        except Exception:  # a few architectures cannot be used in this way, pruned or not
            continue
    return None


def _stepwise_error(model: Any) -> str:
    """How the last token's logits differ when half the tokens are fed one by one."""
    given = zoo.inputs(model)
    ids = given["input_ids"]
    half = ids.shape[1] // 2
    with torch.inference_mode():
        whole = model(**given, use_cache=False).logits[:, -1]
        output = model(input_ids=ids[:, :half], use_cache=True)
        name = next((key for key in CACHES if getattr(output, key, None) is not None), None)
        if name is None:
            return "no cache"
        for position in range(half, ids.shape[1]):
            output = model(
                input_ids=ids[:, position : position + 1],
                use_cache=True,
                **{name: getattr(output, name)},
            )
    return _differs(output.logits[:, -1], whole, CACHE_TOLERANCE)


def _generate_error(model: Any) -> str:
    """How the logits of generated tokens differ between cached and uncached."""
    given = zoo.inputs(model)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with redirect_stdout(StringIO()):  # some warn by printing
        both = [model.generate(**given, **options, use_cache=use).logits for use in (True, False)]
    cached, uncached = map(torch.stack, both)
    return _differs(cached, uncached, CACHE_TOLERANCE)


def _differs(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str:
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    difference = ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()
    return "" if difference <= tolerance else f"logits differ by {difference:.1e}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) < 300 else text[:297] + "..."
    return text if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {text}"


def _names(suite: str) -> list[str]:
    return {"variants": list(zoo.VARIANTS), "wrappers": zoo.WRAPPERS}.get(suite, zoo.CAUSAL)


def main() -> int:
    """Run the matrix, print what does not pass; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="causal", help=f"some of {','.join(SUITES)}, or all")
    parser.add_argument("--types", default=None, help="only these models, comma separated")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--markdown", type=Path, default=None, help="write the report here too")
    args = parser.parse_args()
    suites = SUITES if args.suite == "all" else tuple(args.suite.split(","))
    if unknown := set(suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    chosen = args.types.split(",") if args.types else None
    work = [(s, n) for s in suites for n in _names(s) if chosen is None or n in chosen]
    if not work:
        parser.error("nothing to run: no model of these suites has such a name")

    start = time.perf_counter()
    if args.jobs == 1:
        cases = [case for suite, name in work for case in run_model(suite, name)]
    else:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            done = pool.map(run_model, *zip(*work, strict=True), chunksize=4)
            cases = [case for results in done for case in results]
    report = _report(cases, time.perf_counter() - start)
    print(report)
    if args.markdown:
        args.markdown.write_text(report + "\n", encoding="utf-8")
    return int(any(case.outcome not in ("PASS", "MUST REFUSE") for case in cases))


def _report(cases: list[Case], seconds: float) -> str:
    lines = ["| suite | model | removed | outcome | reason |", "|---|---|---|---|---|"]
    for case in cases:
        if case.outcome != "PASS":
            layers = ", ".join(map(str, case.removed))
            detail = case.detail.replace("|", "\\|")
            lines.append(f"| {case.suite} | {case.name} | {layers} | {case.outcome} | {detail} |")
    lines.append("")
    shown = [outcome for outcome in OUTCOMES if any(c.outcome == outcome for c in cases)]
    lines.append("| suite | models | models that pass | cases | " + " | ".join(shown) + " |")
    lines.append("|---" * (4 + len(shown)) + "|")
    for suite in dict.fromkeys(case.suite for case in cases):
        own = [case for case in cases if case.suite == suite]
        count = Counter(case.outcome for case in own)
        names = {case.name for case in own}
        bad = {case.name for case in own if case.outcome not in ("PASS", "MUST REFUSE")}
        cells = [suite, len(names), len(names - bad), len(own), *(count[o] for o in shown)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append(f"\n{len(cases)} cases in {seconds:.0f} s.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
