"""What a choice is made on and by, and whether it holds on other text: objectives x calibration.

    python benchmarks/choices.py --model smollm2 --k 4 6 8 --objective nll kl agreement \\
        --calibrate encyclopaedia=wiki.jsonl books=books.jsonl mixture=wiki.jsonl,books.jsonl \\
        --own-words prompts.jsonl --questions questions.jsonl --judge wiki=valid.txt \\
        --tasks arc_easy=arc_easy.jsonl --out results.json

`smart` chooses on each calibration by each objective, from `--n-tokens` tokens, of several files in
equal parts. `--own-words`: the full model's own answers to the prompts of a file. `--questions`:
items with choices, on which ``accuracy=0.5,nll=0.5`` chooses too. What the choices cost is measured
on other text and tasks (`peer_judge.py`).

Prints a Markdown table: the change of the mean loss, of each kind of text and of all kinds, with
95 % intervals of the difference from the full model; and that of the mean accuracy of the tasks.
`--out` is also what a run resumes from.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import NAMED_FILES
from peer_judge import asked_judge, changes, judge_options
from peers import PROTECT, Comparison, Results, calibration_texts

from llm_pruner import SmartPruner, load_eval_dataset, load_model
from llm_pruner.data.items import EvalItem, fingerprint
from llm_pruner.data.sampling import DataSplit
from llm_pruner.healing.own_words import self_generated

OWN_ITEMS = 64  # answers the model writes
QUESTIONS = "accuracy=0.5,nll=0.5"


def main() -> None:
    """Choose, judge, print."""
    args = _options().parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    results = Results(args.out)

    def within(items: list[EvalItem]) -> list[EvalItem]:
        return DataSplit(items, [], []).within(tokenizer, args.n_tokens).scoring

    judge = asked_judge(tokenizer, args)
    work = Comparison(model, tokenizer, [], judge, results)
    calibrations: dict[str, Sequence[EvalItem]] = {
        name: calibration_texts(tokenizer, files.split(","), args.n_tokens, 0)
        for name, files in args.calibrate
    }
    if args.own_words:
        prompts = load_eval_dataset(OWN_ITEMS, args.own_words, up_to=True)
        parts = {**work.model_key, "own words of": fingerprint(prompts)}
        written = results.get(parts, lambda: {"items": _own_words(model, tokenizer, prompts)})
        calibrations["own words"] = within(written["items"])
    if args.questions:
        asked = load_eval_dataset(10_000, args.questions, up_to=True)
        calibrations["questions"] = within(asked)
    rows = list(_rows(work, calibrations, args.objective, args.k))
    print("\n".join(table(rows)))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    many: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibrate", **{**NAMED_FILES, "required": True}, help="NAME=FILE,FILE")
    parser.add_argument("--own-words", default=None, metavar="FILE", help="of prompts")
    parser.add_argument("--questions", default=None, metavar="FILE", help="items with choices")
    parser.add_argument("--objective", default=["nll", "kl", "agreement"], **many)
    parser.add_argument("--n-tokens", type=int, default=2048, help="to choose on")
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="how many layers go")
    judge_options(parser)
    parser.add_argument("--out", type=Path, default=None, help="results, to be resumed from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def _own_words(model: Any, tokenizer: Any, prompts: Sequence[EvalItem]) -> list[EvalItem]:
    return self_generated(model, tokenizer, len(prompts), prompts=prompts, max_new_tokens=96)


def _rows(
    work: Comparison,
    calibrations: dict[str, Sequence[EvalItem]],
    objectives: Sequence[str],
    counts: Sequence[int],
) -> Iterator[dict[str, Any]]:
    full = work.judged((), "none")["judged"]
    for k in counts:
        for name, items in calibrations.items():
            for objective in [*objectives, *[QUESTIONS][: name == "questions"]]:
                removed = chosen(work, items, objective, k)
                judged = work.judged(removed, "none")["judged"]
                row = {"k": k, "calibration": name, "objective": objective, "layers": removed}
                row["texts"], row["tasks"] = changes(full, judged)
                print(*row.values(), file=sys.stderr, flush=True)
                yield row


def chosen(work: Comparison, items: Sequence[EvalItem], objective: str, k: int) -> tuple[int, ...]:
    """The layers that `smart` removes."""
    parts = {**work.model_key, "calibration": fingerprint(items), "objective": objective, "k": k}

    def make() -> dict[str, Any]:
        pruner = SmartPruner(work.model, work.tokenizer, objective=objective, protect=PROTECT)
        return {"layers": list(pruner.plan(items, n_layers=k).remove)}

    return tuple(work.results.get(parts | {"protect": PROTECT}, make)["layers"])


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown."""
    kinds = list(rows[0]["texts"])
    head = ["layers that go", "chosen on", "by", "removed (0-based)", *kinds]
    if asked := not math.isnan(rows[0]["tasks"][0]):
        head.append("task accuracy")
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        cells = [str(row["k"]), row["calibration"], row["objective"]]
        cells += [", ".join(map(str, row["layers"]))]
        cells += [f"{mean:+.3f} ± {half:.3f}" for mean, half in row["texts"].values()]
        if asked:
            cells += [f"{row['tasks'][0]:+.3f} ± {row['tasks'][1]:.3f}"]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
