"""The shortest way through the library: choose layers, remove them, ask both models a question.

python quickstart.py                # the embedded demo model, offline
python quickstart.py my/model       # any hub id or local folder
"""

from __future__ import annotations

import sys

from llm_pruner import ModelEvaluator, SmartPruner, load_data, load_model, perplexity

OUTPUT = "pruned_quickstart"


def main(model_id: str = "demo") -> None:
    """Prune a quarter of the layers of `model_id` and show what it cost."""
    model, tokenizer = load_model(model_id)
    data = load_data("demo" if model_id == "demo" else None, n_samples=40)

    pruner = SmartPruner(model, tokenizer)
    layers = pruner.optimize_selection(None, data.scoring, n_layers=pruner.num_layers // 4)
    pruned, _ = pruner.prune_and_save(layers, OUTPUT, model_id, overwrite=True)

    print(f"removed layers {layers} of {pruner.num_layers} (0-based), saved in {OUTPUT}")
    question = data.held_out[0]["prompt"]
    for name, candidate in (("full", model), ("pruned", pruned)):
        print(f"{name}: perplexity {perplexity(candidate, tokenizer, data.held_out):.3f}")
        print(f"  {question} -> {ModelEvaluator(candidate, tokenizer).generate([question])[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
