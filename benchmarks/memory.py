"""How much memory a search takes, and that it does not grow with the data.

    python benchmarks/memory.py

Prints a Markdown table. Every case is a process of its own, on a random Llama; memory is the most
that was resident (ru_maxrss) above that of a process that does nothing but load model and data.
For comparison: the weights, and the states of one batch, which are the input of every layer and
the output of the last.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

SEED = 0
VOCABULARY = 128


def main() -> None:
    """Run the cases, print. Imports nothing large: a process inherits the mark of its parent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--n-layers", type=int, default=2, help="how many layers go")
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(args, args.texts[0])))
        return

    print(f"Llama of {args.layers} layers, hidden size {args.hidden}; batches of ", end="")
    print(f"{args.batch_size} x {args.length} tokens. In MiB.\n")
    print("| texts | weights | states of a batch | loaded | + one pass | + `ablation` ", end="")
    print(f"| + `smart`, {args.n_layers} layers |")
    print("|---|---|---|---|---|---|---|")
    for count in args.texts:
        found = {name: child(name, count) for name in ("load", "pass", "ablation", "smart")}
        loaded = found["load"]["peak"]
        sizes = [found["load"]["weights"], found["load"]["states"], loaded]
        sizes += [found[name]["peak"] - loaded for name in ("pass", "ablation", "smart")]
        print(f"| {count} | {' | '.join(f'{size / 2**20:.1f}' for size in sizes)} |", flush=True)


def child(name: str, count: int) -> dict[str, int]:
    """What one case reports, run in a process of its own with the options given to this one."""
    command = [sys.executable, *sys.argv, "--case", name, "--texts", str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def case(args: Any, count: int) -> dict[str, int]:
    """Bytes of the weights, of the states of one batch, and at most resident."""
    import torch
    from common import numbered_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_pruner import AblationPruner, SmartPruner, perplexity
    from llm_pruner.utils import count_bytes

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=args.length,
    )
    model = LlamaForCausalLM(config).eval()
    tokenizer = numbered_tokenizer(VOCABULARY)
    ids = torch.randint(3, VOCABULARY, (count, args.length)).tolist()
    texts = [" ".join(f"t{token:03d}" for token in row) for row in ids]
    if args.case == "pass":
        perplexity(model, tokenizer, texts, batch_size=args.batch_size)
    elif args.case == "ablation":
        AblationPruner(model, tokenizer, batch_size=args.batch_size).compute_layer_scores(texts)
    elif args.case == "smart":
        SmartPruner(model, tokenizer, batch_size=args.batch_size).plan(
            texts, n_layers=args.n_layers
        )
    state = args.batch_size * args.length * args.hidden * 4
    return {
        "weights": count_bytes(model),
        "states": (args.layers + 1) * state,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
