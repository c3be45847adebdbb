"""What benchmarks share: options, counted layer executions, a planted model, the naive twin.

The unit of work is one layer run on one token, padding included. A layer that is bypassed is not
run and not counted.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llm_pruner import LayerStack, load_data, load_model
from llm_pruner.data.sampling import DataSplit
from llm_pruner.data.tokens import Batch, pad_sequences
from llm_pruner.evaluation.likelihood import batch_nll
from llm_pruner.search.removal_quality import RemovalQuality

VOCABULARY = 128
REDUNDANT = 7 / 16  # share of the planted model's layers that add little


def model_options(doc: str, n_samples: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark that runs on a model and its items."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--eval-dataset", help="default: the demo's own")
    parser.add_argument("--n-samples", type=int, default=n_samples)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for tiny models")
    return parser


def _named(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not (name and found and path):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=FILE.")
    return name, path


# The options of an argument that takes files by name.
NAMED_FILES: dict[str, Any] = {
    "nargs": "+",
    "type": _named,
    "metavar": "NAME=FILE",
    "default": [],
}


def loaded(args: argparse.Namespace, *, healing: bool = False) -> tuple[Any, Any, DataSplit]:
    """The model, the tokenizer and the items that `model_options` name."""
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    source = args.eval_dataset or ("demo" if args.model == "demo" else None)
    return model, tokenizer, load_data(source, args.n_samples, healing=healing)


@contextmanager
def counted(
    layers: Iterable[torch.nn.Module], told: Callable[[int], None] | None = None
) -> Iterator[Counter[int]]:
    """Inside the block, the tokens that each layer is run on are counted.

    Args:
        layers: the layers, as a `LayerStack` gives them.
        told: called with the tokens of every execution.
    """
    executions: Counter[int] = Counter()

    def hook(index: int) -> Callable[..., None]:
        def call(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            tokens = hidden.shape[0] * hidden.shape[1]
            executions[index] += tokens
            if told:
                told(tokens)

        return call

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield executions
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Work:
    """What something took; filled in when the block of `worked` ends.

    Attributes:
        seconds: by the clock.
        layer_tokens: tokens that layers were run on, summed over the layers.
        head_tokens: tokens that the head was run on.
        flops: two per parameter and token, in layers and head; the products of attention between
            tokens, and backward passes, are not in it.
    """

    seconds: float = 0.0
    layer_tokens: int = 0
    head_tokens: int = 0
    flops: int = 0


@contextmanager
def worked(stack: LayerStack) -> Iterator[Work]:
    """Inside the block, time and forward work are counted, head and padding included.

    Copies of the model that are made inside the block count too: they inherit its hooks.
    """
    work, head = Work(), stack.model.get_output_embeddings()
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in stack]
    started = synchronised()
    with counted(stack) as layers, counted([head] if head is not None else []) as heads:
        try:
            yield work
        finally:
            work.seconds = synchronised() - started
            work.layer_tokens, work.head_tokens = layers.total(), heads.total()
            work.flops = 2 * sum(sizes[index] * tokens for index, tokens in layers.items())
            if head is not None:
                work.flops += 2 * head.weight.numel() * work.head_tokens


def timed(run: Callable[[], Any]) -> float:
    """Seconds that `run` takes, work queued on a GPU included."""
    started = synchronised()
    run()
    return synchronised() - started


def synchronised() -> float:
    """The clock, once the work queued on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def batches_of(quality: RemovalQuality) -> list[Batch]:
    """The batches that `quality` (of one token measure) runs a model on, padded as it pads them."""
    (measure,) = quality._measures
    data = measure._data
    chunks = [[data.sequences[index] for index in chunk] for chunk in quality._chunks]
    return [batch for chunk in chunks for batch in pad_sequences(data.tokenizer, chunk, len(chunk))]


def naive_losses(
    stack: LayerStack, batches: Sequence[Batch], layer_sets: Iterable[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """The naive twin: one whole pass of the bypassed model per set of layers; nats per token."""
    losses = {}
    for layer_set in layer_sets:
        with stack.bypass(layer_set) as model:
            losses[layer_set] = batch_nll(model, batches)
    return losses


class Planted(NamedTuple):
    """A model, its tokenizer, and texts that it wrote: to choose layers on, and others."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    choosing: list[str]
    held_out: list[str]


def planted(n_layers: int = 32, seed: int = 0, n_texts: int = 256, length: int = 32) -> Planted:
    """A random Llama in which some layers add little, each another amount.

    Args:
        n_layers: its depth; 7 layers of 16 are redundant, at places drawn by `seed`.
        seed: of the weights, the places and the texts.
        n_texts: texts to choose layers on, and as many others.
        length: their length in tokens.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.12,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    drawn = torch.Generator().manual_seed(seed + 1)
    order = torch.randperm(n_layers, generator=drawn).tolist()
    redundant = set(order[: round(n_layers * REDUNDANT)])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        for index, layer in enumerate(model.model.layers):
            share = 0.5 * float(torch.rand(1, generator=drawn)) if index in redundant else 1.0
            layer.self_attn.o_proj.weight.mul_(0.6 * share)
            layer.mlp.down_proj.weight.mul_(0.6 * share)
    first = torch.randint(3, VOCABULARY, (2 * n_texts, 1), generator=drawn)
    torch.manual_seed(seed + 2)
    written = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        top_k=0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
    )
    texts = [" ".join(f"t{token:03d}" for token in row) for row in written.tolist()]
    return Planted(model, numbered_tokenizer(VOCABULARY), texts[:n_texts], texts[n_texts:])


def numbered_tokenizer(words: int) -> PreTrainedTokenizerBase:
    """Words t000, t001, ... as tokens 0, 1, ..."""
    vocabulary = {f"t{number:03d}": number for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t003"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t003", pad_token="t001", eos_token="t002"
    )
