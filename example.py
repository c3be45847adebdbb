"""All of it on one model: every strategy, how deep to cut, repair, report and figures.

python example.py                                  # the embedded demo model, offline
python example.py --model my/model --ratio 0.25    # any hub id or local folder
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_pruner import (
    LLMPrunerError,
    carry_out,
    get_strategy,
    load_data,
    load_model,
    perplexity,
    plot_block_distances,
    plot_depth_curve,
    plot_score_comparison,
    plot_similarity_matrix,
)
from llm_pruner.pruners.registry import BUILTIN
from llm_pruner.report.console import report_text


def main() -> None:
    """Choose with every strategy, carry the best choice out with a repair, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, a hub id or a local folder")
    parser.add_argument("--eval-dataset", help="what to measure on (default: the demo's own)")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of layers to remove")
    parser.add_argument("--n-samples", type=int, default=40, help="items to choose on")
    parser.add_argument("--output", default="pruned_example", help="folder for model and figures")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    source = args.eval_dataset or ("demo" if args.model == "demo" else None)
    data = load_data(source, args.n_samples, healing=True)

    # Every strategy chooses; what each choice costs is measured on items it has not seen.
    plans, pruners, costs = {}, {}, {}
    print(f"{'strategy':12}{'removed (0-based)':24}{'perplexity':>12}")
    print(f"{'none':12}{'':24}{perplexity(model, tokenizer, data.held_out):12.3f}")
    for name in BUILTIN:
        pruner = pruners[name] = get_strategy(name)(model, tokenizer)
        plan = plans[name] = pruner.plan(data.scoring, model_id=args.model, ratio=args.ratio)
        cut = pruner.layers.remove(plan.remove)
        costs[name] = perplexity(cut, tokenizer, data.held_out)
        print(f"{name:12}{plan.remove!s:24}{costs[name]:12.3f}")

    # The best one is carried out, repaired without training, and compared with the original:
    # pruning_report.json, report.html and a model card stand beside the checkpoint.
    best = min(costs, key=lambda name: costs[name])
    report, _ = carry_out(
        pruners[best],
        plans[best],
        args.output,
        data.held_out,
        heal="linear",
        heal_data=data.healing,
        overwrite=True,
    )
    print(f"\n{report_text(report)}")

    # Figures from results alone.
    figures = Path(args.output) / "figures"
    scored = {name: plan for name, plan in plans.items() if plan.scores is not None}
    plot_score_comparison(
        [plan.scores for plan in scored.values()],
        removed=[plan.remove for plan in scored.values()],
        save_path=figures / "score_comparison.png",
    )
    blocks = plans["pruneme"]
    plot_block_distances(
        blocks.scores, removed=blocks.remove, save_path=figures / "block_distances.png"
    )
    plot_similarity_matrix(blocks.scores, save_path=figures / "similarity_matrix.png")
    deepest = len(blocks.remove) + 1
    curves = [
        pruners[name].sweep(data.scoring, deepest, held_out=data.held_out)
        for name in ("smart", "pruneme")
    ]
    plot_depth_curve(curves, save_path=figures / "depth_curve.png")
    print(f"look at {Path(args.output) / 'report.html'} and {figures}")


if __name__ == "__main__":
    try:
        main()
    except LLMPrunerError as error:
        raise SystemExit(f"error: {error}") from None
