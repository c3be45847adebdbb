"""Do the exported recipe and MergeKit build the checkpoint that llm_pruner writes?

    python benchmarks/mergekit_parity.py --mergekit PATH/TO/mergekit-yaml

Tiny random models lose layers twice: by `prune_and_save`, and by MergeKit (0.1.5, in an
environment of its own) from the recipe of `export_mergekit_yaml`. Every tensor is compared by
name, dtype, shape and bits, and so are the logits. Exit status 1 if a Llama differs anywhere. The
Qwen3 is for the record: MergeKit does not shorten its `layer_types`, so the merged folder is also
tried with the config.json of llm_pruner.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from llm_pruner import SmartPruner

WORDS = ["<unk>", "<pad>", "<eos>", *(f"word{number}" for number in range(61))]
REMOVED = ([3, 4, 5], [1, 4, 6])
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.2},
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
CASES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: LlamaConfig(**SIZES),
    "Llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "Llama, bfloat16": lambda: LlamaConfig(**SIZES, dtype=torch.bfloat16),
    "Qwen3, mixed layers": lambda: Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=4, layer_types=MIXED
    ),
}


def _tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if wrong := [kind for kind in ("missing_keys", "unexpected_keys") if info[kind]]:
        raise ValueError(f"{wrong[0]}: {sorted(info[wrong[0]])[0]}")
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(3, 19)[None]).logits
    return logits


def compare(name: str, removed: list[int], mergekit: str, folder: Path) -> tuple[str, str, str]:
    """Prune one model in both ways: the cells tensors equal, loads, logits equal."""
    source, ours, theirs = (folder / part for part in ("source", "ours", "theirs"))
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(CASES[name]()).eval(), _tokenizer()
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    pruner = SmartPruner(model, tokenizer, protect=(0, 0))
    pruner.prune_and_save(removed, ours, str(source))
    pruner.export_mergekit_yaml(removed, folder / "recipe.yaml", str(source))
    command = [mergekit, str(folder / "recipe.yaml"), str(theirs), "--no-write-model-card"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    mine, other = _tensors(ours), _tensors(theirs)
    names = mine.keys() | other.keys()
    tensors = f"{sum(_same(mine.get(key), other.get(key)) for key in names)}/{len(names)}"
    want, loads = _logits(ours), "yes"
    if done.returncode:
        print(f"{name}: MergeKit: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    try:
        got = _logits(theirs)
    except Exception as error:  # whatever transformers makes of the merged folder
        print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        loads = "no"
        if other:
            shutil.copyfile(ours / "config.json", theirs / "config.json")
            got, loads = _logits(theirs), "only with the config.json of llm_pruner"
    return tensors, loads, "-" if loads == "no" else "yes" if torch.equal(got, want) else "no"


def main() -> int:
    """Compare every model, print a table; the exit status says whether the Llamas are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", required=True, help="the mergekit-yaml command")
    mergekit = parser.parse_args().mergekit
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| model | layers removed | tensors equal | loads | logits equal |\n" + "|---" * 5 + "|")
    good = True
    for name in CASES:
        for removed in REMOVED:
            with tempfile.TemporaryDirectory() as folder:
                cells = compare(name, removed, mergekit, Path(folder).resolve())
            print(
                "| " + " | ".join((name, ", ".join(map(str, removed)), *cells)) + " |", flush=True
            )
            same, total = cells[0].split("/")
            good &= not name.startswith("Llama") or (same == total and cells[1:] == ("yes", "yes"))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
