"""Draw the pictures of docs/gallery.md anew, on the embedded demo model: about a minute.

python scripts/gallery.py
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from llm_pruner import (
    SmartPruner,
    carry_out,
    get_strategy,
    load_data,
    load_model,
    plot_activation_comparison,
    plot_block_distances,
    plot_depth_curve,
    plot_score_comparison,
    plot_semantic_comparison,
    plot_similarity_matrix,
)
from llm_pruner.report.figures import report_figures, save_figures

FOLDER = Path(__file__).parent.parent / "docs" / "gallery"
STRATEGIES = ("ablation", "pruneme", "bi", "avss")
N_LAYERS = 3


def main() -> None:
    """Score with every strategy, prune with the default one, draw what the gallery shows."""
    model, tokenizer = load_model("demo", device="cpu")
    data = load_data("demo", n_samples=160)
    pruners = [get_strategy(name)(model, tokenizer) for name in STRATEGIES]
    plans = [pruner.plan(data.scoring, model_id="demo", n_layers=N_LAYERS) for pruner in pruners]
    scores = [plan.scores for plan in plans if plan.scores is not None]
    plot_score_comparison(
        scores, removed=[plan.remove for plan in plans], save_path=FOLDER / "score_comparison.png"
    )
    blocks, removed = scores[STRATEGIES.index("pruneme")], plans[STRATEGIES.index("pruneme")].remove
    kept = [layer for layer in range(pruners[0].num_layers) if layer not in pruners[0].candidates]
    plot_block_distances(
        blocks, removed=removed, protected=kept, save_path=FOLDER / "block_distances.png"
    )
    plot_similarity_matrix(blocks, save_path=FOLDER / "similarity_matrix.png")
    smart = SmartPruner(model, tokenizer)
    curves = [
        pruner.sweep(data.scoring, 6, model_id="demo", held_out=data.held_out)
        for pruner in (smart, pruners[STRATEGIES.index("pruneme")])
    ]
    plot_depth_curve(curves, save_path=FOLDER / "depth_curve.png")
    plan = smart.plan(data.scoring, model_id="demo", n_layers=N_LAYERS, held_out=data.held_out)
    plan = replace(plan, scores=smart.compute_layer_scores(data.scoring))
    with tempfile.TemporaryDirectory() as folder:
        report, pruned = carry_out(smart, plan, Path(folder) / "pruned", data.held_out)
        prompt = report.samples[0]["prompt"]
        figures = report_figures(report, protected=kept, skip={"comparisons"}) | {
            "activation_comparison": plot_activation_comparison(
                model, tokenizer, prompt, plan.remove
            ),
            "semantic_comparison": plot_semantic_comparison(model, pruned, tokenizer, prompt),
        }
        save_figures(figures, FOLDER)
    for path in sorted(FOLDER.iterdir()):
        print(path)


if __name__ == "__main__":
    main()
