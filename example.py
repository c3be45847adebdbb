"""Compare all strategies on one model: what each removes, what that costs, with figures.

python example.py                                  # the embedded demo model, offline
python example.py --model my/model --ratio 0.25    # any hub id or local folder
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_pruner import (
    HolisticEvaluator,
    LLMPrunerError,
    get_strategy,
    load_model,
    perplexity,
    plot_activation_comparison,
    plot_holistic_benchmark,
    plot_layer_importance,
    plot_semantic_comparison,
)
from llm_pruner.registry import BUILTIN
from llm_pruner.workflow import load_data


def main() -> None:
    """Score with every strategy, measure each choice on other items, save the best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, a hub id or a local folder")
    parser.add_argument("--eval-dataset", help="what to measure on (default: the demo's own)")
    parser.add_argument("--ratio", type=float, default=0.25, help="share of layers to remove")
    parser.add_argument("--n-samples", type=int, default=40, help="items to choose on")
    parser.add_argument("--output", default="pruned_example", help="folder for model and figures")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    source = args.eval_dataset or ("demo" if args.model == "demo" else None)
    data = load_data(source, args.n_samples)
    figures = Path(args.output) / "figures"

    plans = {}
    print(f"{'strategy':12}{'removed (0-based)':24}{'perplexity':>12}")
    print(f"{'none':12}{'':24}{perplexity(model, tokenizer, data.judging):12.3f}")
    for name in BUILTIN:
        pruner = get_strategy(name)(model, tokenizer)
        plan = pruner.plan(data.scoring, model_id=args.model, ratio=args.ratio)
        cost = perplexity(pruner.layers.remove(plan.remove), tokenizer, data.judging)
        plans[cost] = (pruner, plan)
        print(f"{name:12}{plan.remove!s:24}{cost:12.3f}")

    pruner, plan = plans[min(plans)]
    pruned, _ = pruner.prune_and_save(plan.remove, args.output, args.model, overwrite=True)
    print(f"\nsaved the choice of {plan.strategy!r} in {args.output}")

    questions = [item for item in data.judging if isinstance(item, dict)]
    prompt = questions[0]["prompt"] if questions else data.judging[0]
    plot_layer_importance(
        plan.scores, removed=plan.remove, save_path=figures / "layer_importance.png"
    )
    plot_activation_comparison(
        model, tokenizer, prompt, plan.remove, save_path=figures / "activation_comparison.png"
    )
    plot_semantic_comparison(
        model, pruned, tokenizer, prompt, save_path=figures / "semantic_comparison.png"
    )
    if questions:
        evaluators = [HolisticEvaluator(candidate, tokenizer) for candidate in (model, pruned)]
        before, after = (evaluator.run_benchmark(questions) for evaluator in evaluators)
        plot_holistic_benchmark(
            before,
            after,
            evaluators[0].counts,
            save_path=figures / "holistic_benchmark.png",
        )
        print(f"task mean: {before['mean']:.3f} before, {after['mean']:.3f} after")
    print(f"figures in {figures}")


if __name__ == "__main__":
    try:
        main()
    except LLMPrunerError as error:
        raise SystemExit(f"error: {error}") from None
