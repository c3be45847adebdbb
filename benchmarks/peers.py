"""The library's choice of layers and its healing against published baselines, on the same data.

    python benchmarks/peers.py --model M --calibrate passages.jsonl --n-tokens 8192 --k 2 4 \\
        --select smart sleb shortgpt --repair none linear replaceme \\
        --judge wiki=valid.txt books=books.jsonl --tasks arc_easy=arc_easy.jsonl \\
        --out results.json

Prints a Markdown table. Every method chooses on the same calibration texts, all with the same
layers protected (`last-k` is a rule of its own), and every repair gets the same texts. They are
passages of the calibration files, drawn in turn, until they hold `--n-tokens` tokens, and short
enough to be divided, as the library's healing does. What judges, and how, is in
`peer_judge.py`.

`sleb` measures the same sets, and gets the same losses, whether it runs whole passes (`--naive`) or
shares prefixes as the library does (otherwise, to save time). Only with `--naive` are its seconds
and counts those of the method; otherwise its counts are computed, and its seconds left out.

Counts are of forward passes, padding included. The last columns are means over texts and tasks,
with 95 % intervals of 1.96 standard errors. `--out` is also what a run resumes from: what it
holds for the same model, data and settings is not computed again. Delete it after a change of the
code.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import Work, naive_losses, worked
from peer_judge import (
    BATCH_SIZE,
    WINDOW,
    Judge,
    asked_judge,
    changes,
    compared,
    hashed,
    judge_options,
    read_texts,
)
from peer_repairs import REPAIRS, Cut

from llm_pruner import LayerStack, LLMPrunerError, get_strategy, load_model
from llm_pruner.atomic_output import write_atomically
from llm_pruner.data.items import Text, fingerprint
from llm_pruner.data.tokens import Batch, encode_sequences, pad_sequences
from llm_pruner.search.removal_quality import RemovalQuality
from llm_pruner.utils import tokenizer_fingerprint

PROTECT = (2, 2)
PASSAGE, PASSAGES = 96, 24  # words of a calibration text, at most; texts, at least
FORMAT = 1  # of the results file


def main() -> None:
    """Choose, repair, judge, print."""
    args = _options().parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    calibration = args.calibrate.split(",")
    judging = {**dict(args.judge), **dict(args.tasks)}
    if shared := set(map(_real, calibration)) & set(map(_real, judging.values())):
        sys.exit(f"{', '.join(sorted(shared))} would calibrate and judge: use different files.")
    texts = calibration_texts(tokenizer, calibration, args.n_tokens, args.seed)
    judge = asked_judge(tokenizer, args)
    how = args.naive, args.minutes, args.batch_size
    task = Comparison(model, tokenizer, texts, judge, Results(args.out), *how)
    rows = list(task.rows(args.select, args.repair, args.k))
    print("\n".join(table(rows)))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    many: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibrate", required=True, metavar="FILE,FILE", help=".txt or .jsonl")
    parser.add_argument("--n-tokens", type=int, default=8192, help="to choose and repair on")
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="how many layers go")
    parser.add_argument("--select", type=_selection, default=list(SELECTIONS), **many,
                        help=f"{', '.join(SELECTIONS)}; or layers, as 3,4,6")  # fmt: skip
    parser.add_argument("--repair", choices=REPAIRS, default=["none"], **many)
    judge_options(parser)
    parser.add_argument("--minutes", type=float, default=1.0, help="for lora and full, in all")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step of those")
    parser.add_argument("--naive", action="store_true", help="sleb by whole passes")
    parser.add_argument("--out", type=Path, default=None, help="results, to be resumed from")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration texts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def _selection(name: str) -> str:
    if name not in SELECTIONS and not re.fullmatch(r"\d+(,\d+)*", name):
        raise argparse.ArgumentTypeError(f"{name!r} must be layers, or {', '.join(SELECTIONS)}.")
    return name


def _real(path: str) -> str:
    return str(Path(path).resolve())


# Data


def calibration_texts(tokenizer: Any, paths: Sequence[str], n_tokens: int, seed: int) -> list[str]:
    """Passages from the files in turn, `n_tokens` tokens in all; the last is cut to fit.

    They have `PASSAGE` words at most, and are halved until there are `PASSAGES` of them. Each file
    is a kind of text, as for the library.
    """
    files = [[re.findall(r"\S+\s*", text) for text in read_texts(path)] for path in paths]
    size, texts = 2 * PASSAGE, list[str]()
    while len(texts) < PASSAGES and size > 1:
        size //= 2
        pools = [
            [
                "".join(text[n : n + size]).strip()
                for text in file
                for n in range(0, len(text), size)
            ]
            for file in files
        ]
        texts = _drawn(tokenizer, pools, paths, n_tokens, seed)
    return texts


def _drawn(
    tokenizer: Any, pools: list[list[str]], kinds: Sequence[str], n_tokens: int, seed: int
) -> list[str]:
    for pool in pools:
        random.Random(seed).shuffle(pool)
    texts: list[str] = []
    left = n_tokens
    while left > 1 and any(pools):
        for pool, kind in zip(pools, kinds, strict=True):
            text = pool.pop() if pool and left > 1 else ""
            ids = tokenizer(text)["input_ids"]
            if len(ids) > 1:
                if len(ids) > left:
                    text = tokenizer.decode(ids[:left], skip_special_tokens=True)
                left -= len(ids)
                if text.strip():  # a cut text may have none left
                    texts.append(Text(text, Path(kind).stem) if len(kinds) > 1 else text)
    return texts


# Choices of layers


@dataclass(frozen=True)
class Choice:
    """What a way of choosing layers works from, besides how many go."""

    model: Any
    tokenizer: Any
    texts: list[str]
    naive: bool = False

    @cached_property
    def quality(self) -> RemovalQuality:
        """What shares prefixes; it remembers what it has measured, for the next k."""
        stack = LayerStack(self.model)
        return RemovalQuality(stack, self.tokenizer, self.texts, batch_size=BATCH_SIZE)


def _strategy(name: str, choice: Choice, k: int, **options: Any) -> tuple[int, ...]:
    pruner = get_strategy(name)(choice.model, choice.tokenizer, protect=PROTECT, **options)
    return tuple(pruner.plan(choice.texts, n_layers=k).remove)


def last_k(choice: Choice, k: int) -> tuple[int, ...]:
    """The k layers before the last one, which stays (arXiv:2411.15558); nothing is measured.

    Departure: none, but that it is not held to the layers the others have to keep.
    """
    depth = len(LayerStack(choice.model))
    if not 0 < k < depth:
        raise ValueError(f"k={k} must be from 1 to {depth - 1}.")
    return tuple(range(depth - 1 - k, depth - 1))


def sleb(choice: Choice, k: int) -> tuple[int, ...]:
    """SLEB (Song et al., arXiv:2402.09025): the layer whose loss costs least, again and again.

    In every round each remaining candidate is measured by a pass of the whole model without it and
    without those already gone, on all tokens, the head included. The measure is the mean loss,
    which orders sets as perplexity does.

    Departures: (2, 2) layers are protected, where the paper measures all. Without `Choice.naive`
    prefixes are shared, which gives the same losses.
    """
    stack = LayerStack(choice.model)
    if choice.naive:
        batches = _batches(choice)
        losses = partial(naive_losses, stack, batches)
    else:

        def losses(sets: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
            choice.quality.measure(sets)
            return {removed: -choice.quality.change(removed) for removed in sets}

    removed: tuple[int, ...] = ()
    for _ in range(k):
        left = [layer for layer in _candidates(stack) if layer not in removed]
        found = losses([tuple(sorted((*removed, layer))) for layer in left])
        removed = min(found, key=found.__getitem__)
    return removed


def naive_work(choice: Choice, k: int) -> Work:
    """What naive `sleb` takes, computed; without the seconds."""
    stack = LayerStack(choice.model)
    candidates, depth = len(_candidates(stack)), len(stack)
    tokens = sum(batch.input_ids[:, 1:].numel() for batch in _batches(choice))
    layers = sum((candidates - gone) * (depth - gone - 1) for gone in range(k))
    passes = sum(candidates - gone for gone in range(k))
    size = sum(weight.numel() for layer in stack for weight in layer.parameters()) / depth
    head = choice.model.get_output_embeddings().weight.numel()
    flops = 2 * (layers * size + passes * head) * tokens
    return Work(0.0, layers * tokens, passes * tokens, round(flops))


def _candidates(stack: LayerStack) -> range:
    return range(PROTECT[0], len(stack) - PROTECT[1])


def _batches(choice: Choice) -> list[Batch]:
    sequences = encode_sequences(choice.tokenizer, choice.texts, max_length=WINDOW)
    return pad_sequences(choice.tokenizer, sequences, BATCH_SIZE)


# Name -> what chooses k layers. Sources and departures of a strategy are in its class.
SELECTIONS: dict[str, Callable[[Choice, int], tuple[int, ...]]] = {
    "smart": partial(_strategy, "smart"),
    "smart-nll": partial(_strategy, "smart", objective="nll"),
    "sleb": sleb,
    "shortgpt": partial(_strategy, "bi"),
    "pruneme": partial(_strategy, "pruneme"),
    "ablation": partial(_strategy, "ablation"),
    "last-k": last_k,
    "avss": partial(_strategy, "avss"),
}


# A run


class Results:
    """What has been computed, by all it depends on; in a file that is replaced as it grows."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("format") != FORMAT:
                sys.exit(f"{path} holds no results of this benchmark: name another file.")
            self._known = found["computed"]

    def get(self, parts: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value for `parts`, made if it is not there."""
        key = hashed([FORMAT, parts])
        if key not in self._known:
            self._known[key] = {**parts, "value": make()}
            self.write()
        value: dict[str, Any] = self._known[key]["value"]
        return value

    def write(self) -> None:
        """Replace the file, if there is one."""
        if self._path is not None:
            content = {"format": FORMAT, "rows": self.rows, "computed": self._known}
            write_atomically(self._path, json.dumps(content, indent=1))


@dataclass
class Comparison:
    """One model, one set of calibration texts, one judge."""

    model: Any
    tokenizer: Any
    texts: list[str]
    judge: Judge
    results: Results
    naive: bool = False
    minutes: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        self.stack = LayerStack(self.model)
        self.choice = Choice(self.model, self.tokenizer, self.texts, self.naive)
        prints = self.stack.fingerprint, tokenizer_fingerprint(self.tokenizer)
        dtype = str(next(self.model.parameters()).dtype)
        self.model_key = {"model": ":".join((*prints, dtype))}
        self._data = {**self.model_key, "calibration": fingerprint(self.texts)}

    def rows(
        self, selections: Sequence[str], repairs: Sequence[str], counts: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """One per number of layers, selection and repair, after the full model's own."""
        full = self.judged((), "none")
        yield self._kept({"k": 0, "select": "full model", "repair": ""}, full, full)
        for k in counts:
            for name in selections:
                row: dict[str, Any] = {"k": k, "select": name}
                try:
                    chosen = self._chosen(name, k)
                except (LLMPrunerError, ValueError) as error:
                    yield self._kept({**row, "repair": "", "note": str(error)}, full)
                    continue
                row |= {"layers": chosen["layers"], "choosing": chosen["work"]}
                row["k"] = len(chosen["layers"])
                row["note"] = chosen.get("note", "")
                for repair in repairs:
                    one = {**row, "repair": repair}
                    try:
                        found = self.judged(tuple(chosen["layers"]), repair)
                    except (LLMPrunerError, ValueError) as error:
                        yield self._kept({**one, "note": str(error)}, full)
                        continue
                    yield self._kept(one, full, found)

    def _kept(
        self, row: dict[str, Any], full: dict[str, Any], found: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """`row` with its figures, noted among the results and on stderr."""
        if found is not None:
            row["repairing"] = found["work"]
            before, after = full["judged"], found["judged"]
            row["judged"] = {name: compared(before[name], after[name]) for name in after}
            texts, tasks = changes(before, after)
            row["means"] = [texts["all kinds"], tasks]
        self.results.rows.append(row)
        self.results.write()
        print(" ".join(f"{key}={row.get(key)}" for key in ("k", "select", "repair", "layers")),
              file=sys.stderr, flush=True)  # fmt: skip
        return row

    def _chosen(self, name: str, k: int) -> dict[str, Any]:
        if name not in SELECTIONS:
            return {"layers": [int(layer) for layer in name.split(",")], "work": None}
        naive = {"naive": self.naive} if name == "sleb" else {}
        parts = {**self._data, "select": name, "k": k, "protect": PROTECT, **naive}

        def make() -> dict[str, Any]:
            with worked(self.stack) as work:
                layers = SELECTIONS[name](self.choice, k)
            if not naive or self.naive:
                return {"layers": list(layers), "work": asdict(work)}
            counted = asdict(naive_work(self.choice, k)) | {"seconds": None}
            note = f"prefixes shared: {work.seconds:.1f} s, {work.flops / 1e12:.2f} TFLOP"
            return {"layers": list(layers), "work": counted, "note": note}

        return self.results.get(parts, make)

    def judged(self, removed: tuple[int, ...], repair: str) -> dict[str, Any]:
        parts = {**self.model_key, "judge": self.judge.key, "removed": removed, "repair": repair}
        if repair != "none":
            parts |= {"calibration": self._data["calibration"]}
        if repair in ("lora", "full"):
            parts |= {"minutes": self.minutes, "batch_size": self.batch_size}
        how = self.minutes, self.batch_size
        cut = Cut(self.stack, removed, self.tokenizer, self.texts, *how)

        def make() -> dict[str, Any]:
            with worked(self.stack) as work:
                model = REPAIRS[repair](cut) if removed else self.model
            return {"work": asdict(work), "judged": self.judge.of_model(model)}

        return self.results.get(parts, make)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown."""
    names = list(rows[0].get("judged", ()))
    kinds = {name: "perplexity" in rows[0]["judged"][name] for name in names}
    head = ["layers that go", "choice", "repair", "removed (0-based)"]
    head += ["choosing: seconds", "layers x tokens", "head x tokens", "TFLOP"]
    head += ["repair: seconds", "TFLOP"]
    for name in names:
        head += [f"{name}: perplexity", "loss"] if kinds[name] else [f"{name}: accuracy", "change"]
    head += ["all texts: loss", "all tasks: accuracy", "note"]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        cells = [str(row["k"]), row["select"], row["repair"]]
        cells += [", ".join(map(str, row.get("layers", ())))]
        choosing, repairing = row.get("choosing"), row.get("repairing")
        cells += _cost(choosing, ("layer_tokens", "head_tokens"))
        cells += _cost(repairing if row["repair"] not in ("", "none") else None, ())
        for name in names:
            figures = row.get("judged", {}).get(name)
            if figures is None:
                cells += ["", ""]
            elif kinds[name]:
                cells += [f"{figures['perplexity']:.3f}", _change(figures, "+.4f")]
            else:
                cells += [f"{figures['acc']['mean']:.3f}", _change(figures["acc"], "+.3f")]
        for mean, half in row.get("means", []):
            cells.append("" if math.isnan(mean) else f"{mean:+.3f} ± {half:.3f}")
        cells += [""] * (len(head) - 1 - len(cells))
        cells.append(" ".join(row.get("note", "").split()))
        yield f"| {' | '.join(cells)} |"


def _cost(work: dict[str, Any] | None, counts: Sequence[str]) -> list[str]:
    if work is None:
        return [""] * (2 + len(counts))
    seconds = "" if work["seconds"] is None else f"{work['seconds']:.1f}"
    return [seconds, *(f"{work[name]:,}" for name in counts), f"{work['flops'] / 1e12:.3f}"]


def _change(figures: dict[str, Any], form: str) -> str:
    if figures["low"] is None:
        return f"{figures['change']:{form}}"
    return f"{figures['change']:{form}} ({figures['low']:{form}} to {figures['high']:{form}})"


if __name__ == "__main__":
    main()
