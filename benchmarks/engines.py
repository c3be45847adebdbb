"""Does a serving engine compute a pruned checkpoint as transformers does, and is it foreseen?

    python benchmarks/engines.py --llama-cpp PYTHON --converter DIR --mlx PYTHON --vllm PYTHON
    python benchmarks/engines.py --mlx PYTHON --only gemma3 cohere2

PYTHON are interpreters that have xllamacpp and what the converter needs, mlx_lm, or vllm; DIR holds
llama.cpp's `convert_hf_to_gguf.py`. An engine is measured if its interpreter is given; nothing is
installed.

Tiny random models of real depth patterns, longer input than their windows, in four variants: the
original; A, without the layers of `SCATTERED`; P, without layers after whose removal the engine's
own pattern of layers still holds; S, without those that Block Influence chooses with
``serve_with=("llama.cpp",)``, where there are such sets. A cell says the largest difference of
log-probabilities and the share of positions with the same most likely token, as against
transformers on the same folder, and what the rules foresee. The exit status is 1 if something was
foreseen right and is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from llm_pruner.checkpoint.on_disk import prune_checkpoint
from llm_pruner.engines.verdict import judge
from llm_pruner.errors import InvalidPlanError
from llm_pruner.pruners.similarity import BlockInfluencePruner

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
transformers.logging.disable_progress_bar()

READERS = Path(__file__).with_name("engine_readers.py")
WINDOW = 24
TOKENS = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(1)).tolist()
TEXTS = [" ".join(f"<{(7 * i + j * j) % 40 + 275}>" for j in range(60)) for i in range(8)]
READ = 0.98  # of the positions: an engine that agrees less on the original tells nothing
TIE = 0.02  # log-probabilities so near count as equal: engines approximate GELU and the like
KEPT = 0.99  # of what agreed on the original: so much agrees where a pruned checkpoint is right
FALSE_PROMISE = "foreseen right, is wrong"

SCATTERED = (2, 5, 7, 8)
PAIR = (2, 3)
FOUR = (4, 5, 6, 7)
SIX = (4, 5, 6, 7, 8, 9)

# Of every model, by value; a field that its config does not have is left out.
WIDTHS = {
    512: "max_position_embeddings kv_lora_rank",
    320: "vocab_size",
    192: "intermediate_size intermediate_size_mlp",
    128: "hidden_size",
    64: "moe_intermediate_size shared_expert_intermediate_size qk_rope_head_dim",
    32: "head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim v_head_dim",
    4: "num_attention_heads linear_num_value_heads num_experts num_local_experts n_routed_experts",
    2: "num_key_value_heads linear_num_key_heads num_experts_per_tok eos_token_id",
    1: "bos_token_id n_group topk_group",
    0: "pad_token_id num_nextn_predict_layers",
}
FIELDS = {name: value for value, names in WIDTHS.items() for name in names.split()}
SCALED = {"query_pre_attn_scalar": 32, "sliding_window": WINDOW}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,  # llama.cpp does, whatever a config says
    "original_max_position_embeddings": 128,
}
LATENT = {
    "head_dim": 64,
    "num_key_value_heads": 4,
    "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
SIGMOID = {"q_lora_rank": 48, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


class Case(NamedTuple):
    """A model type, the layers of the third variant, the depth, and fields of the config."""

    kind: str
    periodic: tuple[int, ...]
    depth: int
    fields: dict[str, Any]


def case(kind: str, periodic: tuple[int, ...] = FOUR, depth: int = 12, **fields: Any) -> Case:
    """A `Case`, in one line."""
    return Case(kind, periodic, depth, fields)


CASES = {
    "gemma2": case("gemma2", PAIR, **SCALED),
    "gemma2-46": case("gemma2", PAIR, 46, **SCALED, head_dim=128),
    "gemma3": case("gemma3_text", SIX, **SCALED),
    "gemma3-62": case("gemma3_text", SIX, 62, **SCALED, head_dim=128),
    "cohere2": case("cohere2", sliding_window=WINDOW, rotary_pct=1.0, logit_scale=1.0),
    # vLLM's window is one wider; beyond the input, full layers still differ: they have no rope.
    "cohere2-long": case("cohere2", sliding_window=512, rotary_pct=1.0, logit_scale=1.0),
    "gpt_oss": case("gpt_oss", PAIR, sliding_window=WINDOW, rope_parameters=YARN),
    "smollm3": case("smollm3"),
    "llama4-1": case("llama4_text", interleave_moe_layer_step=1, num_experts_per_tok=1),
    "llama4-2": case("llama4_text", interleave_moe_layer_step=2, num_experts_per_tok=1),
    "exaone4-64": case(
        "exaone4",
        FOUR,
        64,
        sliding_window=WINDOW,
        sliding_window_pattern="LLLG",
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 16,
        head_dim=32,
    ),
    "deepseek_v2-lite": case(
        "deepseek_v2",
        (5,),
        27,
        **LATENT,
        q_lora_rank=None,
        first_k_dense_replace=1,
    ),
    "qwen3_next": case("qwen3_next", num_experts=4),
    "mistral": case("mistral", sliding_window=None),
    "qwen3_moe": case("qwen3_moe", num_experts=4, head_dim=32, norm_topk_prob=True),
    "olmo3": case("olmo3", sliding_window=WINDOW),
    "cohere": case("cohere", logit_scale=1.0),
    "glm4_moe": case("glm4_moe", head_dim=32),
    "deepseek_v3": case("deepseek_v3", **LATENT, **SIGMOID),
    "lfm2": case(
        "lfm2", layer_types=["conv", "conv", "full_attention"] * 4, block_dim=128, conv_dim=128
    ),
}
AS_THEY_ARE = (
    "llama qwen2 qwen3 mixtral gemma phi3 olmo2 granite granitemoe glm4 stablelm starcoder2 "
    "hunyuan_v1_dense seed_oss nemotron ernie4_5 arcee"
)
CASES |= {kind: case(kind) for kind in AS_THEY_ARE.split()}


# Checkpoints


def build(case: Case, folder: Path) -> None:
    """Write a random model in which every layer matters, and a tokenizer."""
    kind = CONFIG_MAPPING[case.kind]
    known = kind().to_dict()
    fields = {name: value for name, value in FIELDS.items() if name in known} | case.fields
    config = kind(**fields, num_hidden_layers=case.depth)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=drawn)
            is_norm = weight.ndim == 1 and "norm" in name and weight.mean() > 0.5
            weight.copy_(1 + 0.2 * noise if is_norm else 0.1 * noise)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    values = published(json.loads(file.read_text(encoding="utf-8")) | case.fields)
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")


def published(config: dict[str, Any]) -> dict[str, Any]:
    """The config with rope settings as they are published, which is what engines read."""
    rope = dict(config.pop("rope_parameters", None) or {})
    if not rope:
        return config
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of as many words as the models have; llama.cpp wants merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(first, second) for first in "aeiou" for second in "nrst"]
    words = ["<pad>", "<s>", "</s>", "<unk>", "<|endoftext|>", *letters, *map("".join, merges)]
    words += [f"<{number}>" for number in range(len(words), FIELDS["vocab_size"])]
    bpe = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def checkpoints(name: str, work: Path) -> dict[str, Path]:
    """Write the variants of a case."""
    case = CASES[name]
    folders = {variant: work / f"{name}-{variant}" for variant in ("original", "A", "P")}
    build(case, folders["original"])
    prune_checkpoint(folders["original"], SCATTERED, folders["A"], overwrite=True)
    prune_checkpoint(folders["original"], case.periodic, folders["P"], overwrite=True)
    if served := chosen(folders["original"], len(case.periodic)):
        folders["S"] = work / f"{name}-S"
        prune_checkpoint(folders["original"], served, folders["S"], overwrite=True)
    return folders


def chosen(folder: Path, n_layers: int) -> tuple[int, ...]:
    """Layers that a strategy removes so that llama.cpp stays right; none where it cannot."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)
    try:
        pruner = BlockInfluencePruner(model, words, serve_with=("llama.cpp",))
        return pruner.plan(TEXTS, n_layers=n_layers).remove
    except InvalidPlanError as error:
        print(f"{folder.name}: {error}")
        return ()


# Measuring


def reference(folder: Path) -> np.ndarray:
    """The log-probabilities after every token, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1).numpy()


@dataclass(frozen=True)
class Cell:
    """What an engine computes from a folder, and what is foreseen."""

    foreseen: str
    difference: float = float("nan")
    agreement: float = 0.0
    error: str = ""

    def __str__(self) -> str:
        return self.error or f"{self.difference:.1g} / {self.agreement:.3f}"


def predicted(folder: Path, engine: str) -> str:
    """What the rules say of the engine and the folder's config."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return judge(config, engine).state


def measured(command: Sequence[str], folders: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    """What the readers tell of every folder, in their order; a crash costs its folder only."""
    left = list(folders)
    while left:
        process = subprocess.Popen(
            [*command, *map(str, left)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout
        for line in process.stdout:
            if line.startswith('{"folder"'):
                yield left.pop(0), json.loads(line)
        process.wait()
        if left:
            yield left.pop(0), {"error": f"crash, exit status {process.returncode}"}


def compared(found: Any, wanted: np.ndarray, foreseen: str) -> Cell:
    """A cell of the table."""
    if "error" in found:
        return Cell(foreseen, error=found["error"])
    got = np.array(found["log_probabilities"])
    chosen = np.take_along_axis(wanted, got.argmax(-1)[:, None], -1)
    agreement = float((chosen[:, 0] >= wanted.max(-1) - TIE).mean())
    return Cell(foreseen, float(np.abs(got - wanted).max()), agreement)


def outcome(cell: Cell, original: Cell) -> str:
    """Foreseen and measured; an engine that does not read the original right tells nothing."""
    if original.error or original.agreement < READ:
        return "no verdict"
    right = not cell.error and cell.agreement >= KEPT * original.agreement
    return f"foreseen {cell.foreseen}, is {'right' if right else 'wrong'}"


def report(names: Sequence[str], engines: dict[str, list[str]], work: Path) -> int:
    """Measure, print a line per case and variant, and count; the number of false promises."""
    folders = {
        (name, variant): folder
        for name in names
        for variant, folder in checkpoints(name, work).items()
    }
    wanted = {folder: reference(folder) for folder in folders.values()}
    cells: dict[str, dict[Path, Cell]] = {}
    for engine, command in engines.items():
        cells[engine] = {
            folder: compared(found, wanted[folder], predicted(folder, engine))
            for folder, found in measured(command, list(folders.values()))
        }
    print(f"| model | variant | {' | '.join(engines)} |")
    print("|---" * (2 + len(engines)) + "|")
    count = Counter({FALSE_PROMISE: 0})
    for (name, variant), folder in folders.items():
        shown = []
        for own in cells.values():
            found = outcome(own[folder], own[folders[name, "original"]])
            count[found] += 1
            shown.append(f"{own[folder]}; {found}")
        print(f"| {name} | {variant} | {' | '.join(shown)} |")
    print("\n" + "; ".join(f"{found}: {number}" for found, number in sorted(count.items())))
    return count[FALSE_PROMISE]


def main() -> int:
    """Measure the engines that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--converter", metavar="DIR", help="of convert_hf_to_gguf.py")
    parser.add_argument("--mlx", metavar="PYTHON")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--work", type=Path, help="keep the checkpoints here")
    args = parser.parse_args()
    if args.llama_cpp and not args.converter:
        parser.error("--llama-cpp needs --converter")
    pythons = {"llama.cpp": args.llama_cpp, "mlx": args.mlx, "vllm": args.vllm}
    tokens = ",".join(map(str, TOKENS))
    engines = {
        engine: [python, str(READERS), engine, tokens, args.converter or ""]
        for engine, python in pythons.items()
        if python
    }
    with tempfile.TemporaryDirectory() as place:
        return int(report(args.only, engines, args.work or Path(place)) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
