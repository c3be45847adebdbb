"""Does `--tasks` report what the command of lm-eval finds on the folder that was written?

    python benchmarks/lm_eval_command.py --model smollm2 --rows arc_easy.jsonl --layers 4,5,6

The rows have `query`, `choices` and `gold`. The model is pruned by the command with a definition of
that task; `lm_eval --model hf` then runs the same definition on the output in a process of its own.
Its samples are compared with those of `run_tasks`, one by one, and their mean with the report's.
Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from llm_pruner import load_model
from llm_pruner.cli import main as llm_pruner
from llm_pruner.evaluation import run_tasks

METRICS = ("acc", "acc_norm")


def definition(rows: Path, folder: Path) -> Path:
    """A task of lm-eval over rows of a file, written into a folder."""
    task = {
        "task": f"{rows.stem}_rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS
        ],
    }
    path = folder / f"{task['task']}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def by_command(output: Path, task: Path, limit: int, dtype: str) -> dict[str, list[float]]:
    """Scores per item and metric that the command of lm-eval logs."""
    found = task.parent / "logged"
    words = f"--model hf --model_args pretrained={output},dtype={dtype} --tasks {task.stem} "
    words += f"--include_path {task.parent} --limit {limit} --batch_size 8 --device cpu "
    words += f"--log_samples --output_path {found}"
    command = [sys.executable, "-m", "lm_eval", *words.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    (samples,) = found.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: int(row["doc_id"]))
    return {metric: [float(row[metric]) for row in rows] for metric in METRICS}


def main() -> int:
    """Prune, run lm-eval on what was written, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--layers", default="4,5,6")
    parser.add_argument("--limit", type=int, default=100, help="items")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        task, output = definition(args.rows, Path(folder)), Path(folder) / "output"
        words = f"--model {args.model} --dtype {args.dtype} --layers {args.layers} --device cpu "
        words += f"--tasks {task} --eval-dataset {args.rows} --n-samples {args.limit} "
        words += f"--output {output} --quiet"
        if llm_pruner(words.split()):
            return 1
        report = json.loads((output / "pruning_report.json").read_text(encoding="utf-8"))
        reported = {row["name"]: row["after"] for row in report["comparisons"]}
        model, tokenizer = load_model(str(output), device="cpu", dtype=args.dtype)
        ours = run_tasks(model, tokenizer, [str(task)], limit=args.limit)[task.stem].scores
        theirs = by_command(output, task, args.limit, args.dtype)
        print(
            "\n| metric | items | report | `lm_eval` | items that differ |\n|---|---|---|---|---|"
        )
        wrong = 0
        for metric in METRICS:
            pairs = list(zip(ours[metric], theirs[metric], strict=True))
            different = sum(one != another for one, another in pairs)
            mean = sum(theirs[metric]) / len(pairs)
            mine = reported[f"{task.stem} ({metric}, lm-eval)"]
            wrong += different + (abs(mine - mean) > 1e-9)
            print(f"| {metric} | {len(pairs)} | {mine:.4f} | {mean:.4f} | {different} |")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
