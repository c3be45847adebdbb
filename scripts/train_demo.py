"""Train the embedded demo model from generated text and put it into place.

Run ``python scripts/train_demo.py``. It makes the tokenizer, trains a small Llama from scratch on
the CPU, writes model and tokenizer to a staging folder and moves them into ``--output``; a
README.md that is already there stays. The items (``calibration.jsonl``, ``evaluation.jsonl``,
``healing.jsonl``) are written into ``--items``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import demo_corpus
import torch
from measure_demo import accuracy_report, load_items
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 1024
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\nAnswer:' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
BATCH_TOKENS = 1024
PEAK_LR = 1.5e-3
WARMUP = 150
PROMPT_WEIGHT = 0.1
SHALLOW_SHARE = 5 / 9  # of the steps; the rest is trained at full depth


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text; small numbers become single tokens, learnt like words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = itertools.islice(demo_corpus.training_samples(seed, running_text=0.5), 20_000)
    core.train_from_iterator((sample.text for sample in stream), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int) -> LlamaForCausalLM:
    """A Llama small enough for a package, at first with half of its layers."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers // 2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    scale_outputs(model, (2 * layers) ** -0.5)
    return model


def scale_outputs(model: LlamaForCausalLM, factor: float) -> None:
    """Make every layer add less to the residual stream."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)


def split_layers(model: LlamaForCausalLM) -> None:
    """Turn every layer into two: the first keeps the attention, the second the feed-forward part.

    The halves that are missing start at zero output, so the model computes exactly what it did,
    yet unlike copies of a layer none of the new layers can do the work of another.
    """
    halves = []
    for layer in model.model.layers:
        second = copy.deepcopy(layer)
        nn.init.zeros_(layer.mlp.down_proj.weight)
        nn.init.zeros_(second.self_attn.o_proj.weight)
        halves += [layer, second]
    for index, layer in enumerate(halves):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(halves)
    model.config.num_hidden_layers = len(halves)


def check_held_out(samples: list[demo_corpus.Sample], held_out: frozenset[str]) -> None:
    """Stop the training if a calibration or evaluation question turns up in it."""
    for sample in samples:
        asked = sample.text.removeprefix("Question: ").partition("\nAnswer:")[0]
        assert asked not in held_out, f"held-out question in the training text: {asked}"


@dataclass(frozen=True)
class Data:
    """What a training phase reads: its own seed, and the questions it must not contain."""

    tokenizer: PreTrainedTokenizerFast
    seed: int
    held_out: frozenset[str]


def batches(data: Data) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (token ids, loss weights), samples of similar length together to save padding."""
    tokenizer, rng = data.tokenizer, random.Random(data.seed)
    stream = demo_corpus.training_samples(data.seed)
    while True:
        samples = list(itertools.islice(stream, 4096))
        check_held_out(samples, data.held_out)
        encoded = tokenizer([s.text for s in samples], return_offsets_mapping=True)
        rows = []
        for ids, spans, sample in zip(
            encoded["input_ids"], encoded["offset_mapping"], samples, strict=True
        ):
            weights = [PROMPT_WEIGHT if end <= sample.prefix else 1.0 for _, end in spans]
            start = int(rng.random() < 0.1)  # some texts without bos: callers may leave it out
            rows.append(([*ids, tokenizer.eos_token_id][start:], [*weights, 1.0][start:]))
        rows.sort(key=lambda row: len(row[0]))
        groups, group = [], []
        for row in rows:
            if group and (len(group) + 1) * len(row[0]) > BATCH_TOKENS:
                groups.append(group)
                group = []
            group.append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = [r + [tokenizer.pad_token_id] * (width - len(r)) for r, _ in group]
            weights = [w + [0.0] * (width - len(w)) for _, w in group]
            yield torch.tensor(ids), torch.tensor(weights)


def step_loss(model: LlamaForCausalLM, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Weighted next-token loss of one batch."""
    ids, weights = batch
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(model: LlamaForCausalLM, data: Data, steps: int, floor: float) -> None:
    """AdamW with a short warm-up, then a cosine from the peak rate down to ``floor`` of it."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1.0, (s + 1) / WARMUP)
            * (floor + (1 - floor) * (1 + math.cos(math.pi * s / steps)) / 2)
        ),
    )
    stream = batches(data)
    mean = 0.0
    progress = tqdm(range(steps), file=sys.stderr, mininterval=10)
    for step in progress:
        loss = step_loss(model, next(stream))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        mean = 0.99 * mean + 0.01 * loss.item() if step else loss.item()
        progress.set_postfix(loss=f"{mean:.3f}", refresh=False)


def write_items(path: Path, items: list[dict[str, object]]) -> None:
    """Write one JSON object per line."""
    lines = (json.dumps(item, ensure_ascii=False) for item in items)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model and its tokenizer."""
    model.config._name_or_path = ""
    model.generation_config.max_new_tokens = 24
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # also known to transformers 4
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "llm_pruner" / "demo")
    parser.add_argument("--items", type=Path, default=ROOT / "llm_pruner" / "data" / "demo")
    parser.add_argument("--layers", type=int, default=12, help="an even number")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; changes rounding")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    held_out = frozenset(
        str(item["prompt"])
        for item in demo_corpus.calibration_items() + demo_corpus.evaluation_items()
    )
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.layers, args.hidden)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", file=sys.stderr)
    started = time.perf_counter()
    shallow_steps = round(args.steps * SHALLOW_SHARE)
    data = Data(tokenizer, args.seed + 1, held_out)
    train(model, data, shallow_steps, floor=0.5)
    split_layers(model)
    data = Data(tokenizer, args.seed + 2, held_out)
    train(model, data, args.steps - shallow_steps, floor=0.01)
    print(f"trained in {(time.perf_counter() - started) / 60:.1f} minutes", file=sys.stderr)

    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        save(staging, model, tokenizer)
        reloaded = LlamaForCausalLM.from_pretrained(staging).eval()
        args.items.mkdir(parents=True, exist_ok=True)
        write_items(args.items / "calibration.jsonl", demo_corpus.calibration_items())
        write_items(args.items / "evaluation.jsonl", demo_corpus.evaluation_items())
        write_items(args.items / "healing.jsonl", demo_corpus.healing_items())
        items = load_items(args.items / "evaluation.jsonl")
        print(accuracy_report(reloaded, AutoTokenizer.from_pretrained(staging), items))
        args.output.mkdir(parents=True, exist_ok=True)
        for file in staging.iterdir():
            shutil.move(file, args.output / file.name)


if __name__ == "__main__":
    main()
