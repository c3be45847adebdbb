"""What an interpreter's own transformers or MLX-LM computes from checkpoints, as JSON lines.

    python benchmarks/read_logits.py FOLDER ... [--engine mlx]

A line per folder: the ids of a sentence and the logits at every position of a fixed sequence, or
why the folder could not be read. It runs in any environment that has the engine.
"""

import argparse
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SENTENCE = "The river bends twice, then runs straight to the sea."
TOKENS = [*range(5, 29), *range(40, 56)]


def with_transformers(folder: str) -> dict:
    """By the class that ``architectures`` names."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    model = kind.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {"ids": tokenizer(SENTENCE)["input_ids"], "logits": logits.tolist()}


def with_mlx(folder: str) -> dict:
    """By MLX-LM, in float32."""
    import mlx.core as mx
    from mlx_lm.utils import load

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    logits = model(mx.array([TOKENS]))[0].astype(mx.float32)
    return {"ids": tokenizer.encode(SENTENCE), "logits": logits.tolist()}


def main() -> None:
    """Read every folder; a failure is told in its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--engine", choices=("transformers", "mlx"), default="transformers")
    args = parser.parse_args()
    read = with_mlx if args.engine == "mlx" else with_transformers
    for folder in args.folders:
        try:
            found = read(folder)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps({"folder": folder, **found}), flush=True)


if __name__ == "__main__":
    main()
