"""Does llama.cpp compute a cut GGUF as transformers computes the cut original?

    python benchmarks/cut_gguf.py --llama-cpp PYTHON --converter DIR
    python benchmarks/cut_gguf.py --llama-cpp PYTHON --converter DIR --only gemma3 olmo3

PYTHON is an interpreter that has xllamacpp and what the converter needs, DIR holds llama.cpp's
`convert_hf_to_gguf.py`. Tiny random originals are converted, and their GGUF files cut on their own
bytes (and the sets that a refusal names). Each line holds the largest difference of
log-probabilities and the share of positions with the same most likely token, as against
transformers on the cut folder, or against a file that has to give the same numbers exactly. For
comparison: cut files as `llama-quantize --prune-layers` makes them, and converted pruned folders
before and after `fix_gguf`. The exit status is 1 if a file that was promised right is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import (
    CASES,
    KEPT,
    LATENT,
    READ,
    READERS,
    SCATTERED,
    SIGMOID,
    TOKENS,
    WINDOW,
    Case,
    Cell,
    build,
    case,
    compared,
    measured,
    reference,
)
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from safetensors.torch import load_file, save_file

from llm_pruner.checkpoint.gguf import fix_gguf
from llm_pruner.checkpoint.on_disk import prune_checkpoint
from llm_pruner.config.layer_names import LayerNames
from llm_pruner.errors import LLMPrunerError
from llm_pruner.storage.gguf_models import find_gguf, read_gguf_checkpoint

SETS = {
    "scattered": SCATTERED,
    "first": (0, 1, 3),
    "last": (10, 11),
    "odd": (1, 3, 5, 7, 9, 11),
    "even": (0, 2, 4, 6, 8, 10),
    "three of four": (0, 1, 2, 4, 5, 6, 8, 9, 10),
}
SWA = {"sliding_window": WINDOW}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2}
MORE = {
    "granitemoehybrid": case(
        "granitemoehybrid",
        **MAMBA,
        layer_types=(["mamba"] * 3 + ["attention"]) * 3,
        shared_intermediate_size=64,
        position_embedding_type="rope",
    ),
    "bamba": case("bamba", **MAMBA, attn_layer_indices=[2, 6, 9], rope_parameters=ROPE),
    "nemotron_h": case(
        "nemotron_h", **NEMOTRON, layers_block_type=["mamba", "moe", "attention", "moe"] * 3
    ),
    "lfm2_moe": case(
        "lfm2_moe", layer_types=["conv", "conv", "full_attention"] * 4, num_dense_layers=3
    ),
    "jamba": case("jamba", attn_layer_period=4, attn_layer_offset=2, mamba_dt_rank=8),
    "apertus": case("apertus"),
    "falcon_h1": case("falcon_h1", **MAMBA, mamba_d_ssm=256, head_dim=32),
    "cohere2_moe": case("cohere2_moe", **SWA),
    "exaone_moe": case("exaone_moe", **SWA, num_experts=4, scoring_func="sigmoid"),
    "ernie4_5_moe": case(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=3,
        intermediate_size=256,
    ),
    "afmoe": case("afmoe", **SWA, num_dense_layers=3, mup_enabled=True, route_norm=True),
    "dots1": case(
        "dots1",
        first_k_dense_replace=3,
        n_shared_experts=1,
        n_routed_experts=4,
        num_key_value_heads=4,
        scoring_func="sigmoid",
        norm_topk_prob=True,
    ),
    "mamba": case("mamba", state_size=16, time_step_rank=8, intermediate_size=256),
    "mamba2": case("mamba2", num_heads=8, head_dim=32, state_size=16, n_groups=1),
    "deepseek_v3-mtp": case("deepseek_v3", **LATENT, **SIGMOID, num_nextn_predict_layers=1),
    "glm4_moe-mtp": case("glm4_moe", head_dim=32, num_nextn_predict_layers=1),
    "olmoe": case("olmoe", num_key_value_heads=4),
    "qwen2_moe": case("qwen2_moe"),
    "bloom": case("bloom"),
    "deci": case("llama"),
    "llama-quantised": case("llama", hidden_size=256),
}
ALL = CASES | MORE
NO_ATTENTION, NO_NETWORK = (1, 4, 9), (4, 9)  # layers of the model that is laid out as DeciLM
QUANTISED = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0)
NAIVE = ("gemma3", "olmo3", "lfm2")
FIXED = ("gemma2", "gemma3", "cohere2", "gpt_oss", "deepseek_v2-lite", "smollm3")


@dataclass
class Row:
    """A line of the table.

    Attributes:
        name: of the case.
        what: which layers went, and how.
        file: the GGUF file; None if there is none.
        wanted: the folder for transformers, or a file that gives exactly the same numbers.
        told: the keys that changed, or why there is no file.
        promised: whether the file has to be right.
    """

    name: str
    what: str
    file: Path | None = None
    wanted: Path | None = None
    told: str = ""
    promised: bool = True


# Files


def author(
    source: Path,
    target: Path,
    rename: Callable[[str], str | None] = lambda name: name,
    changes: Mapping[str, Any] | None = None,
    *,
    kind: str = "",
    quantised: bool = False,
    split: int = 0,
) -> Path:
    """Write a GGUF file again with the format's own package, with some things changed."""
    reader, changed = GGUFReader(source), dict(changes or {})
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    old = fields.pop("general.architecture").contents()
    writer = GGUFWriter(target, kind or old, split_max_tensors=split)
    for key, field in fields.items():
        value, types = changed.get(key, field.contents()), field.types
        if isinstance(value, list) and len(types) == 1:
            types = [GGUFValueType.ARRAY, GGUFValueType.INT32]
        if kind:
            key = key.replace(f"{old}.", f"{kind}.")
        writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    for number, tensor in enumerate(reader.tensors):
        name, data, type = rename(tensor.name), tensor.data, tensor.tensor_type
        if quantised and data.ndim == 2:
            type = QUANTISED[number % 2]
            data = quants.quantize(data, type)
        if name is not None:
            writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def renamed(source: Path, target: Path, removed: Sequence[int], depth: int) -> Path:
    """The file of the kept tensors, in which only their number follows: `--prune-layers`."""
    kept = [index for index in range(depth) if index not in removed]
    names = LayerNames(("blk.",), depth)
    count = f"{GGUFReader(source).fields['general.architecture'].contents()}.block_count"
    return author(source, target, lambda name: names.rename(name, kept), {count: len(kept)})


def as_deci(source: Path, target: Path, depth: int) -> Path:
    """Lay a Llama out as DeciLM, in which layers lack attention or the network after it."""
    lost = {f"blk.{i}.attn_" for i in NO_ATTENTION} | {f"blk.{i}.ffn_" for i in NO_NETWORK}
    values = read_gguf_checkpoint([source]).values
    changes = {
        f"llama.{key}": [0 if i in without else values[f"llama.{key}"] for i in range(depth)]
        for key, without in (
            ("attention.head_count", NO_ATTENTION),
            ("attention.head_count_kv", NO_ATTENTION),
            ("feed_forward_length", NO_NETWORK),
        )
    }
    return author(
        source, target, lambda n: None if n.startswith(tuple(lost)) else n, changes, kind="deci"
    )


def add_block(folder: Path, depth: int) -> None:
    """Add a block for multi-token prediction to a folder: the last layer again, and its own."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last, new = f"model.layers.{depth - 1}.", f"model.layers.{depth}."
    tensors |= {
        new + n.removeprefix(last): t.clone() for n, t in tensors.items() if n.startswith(last)
    }
    width = tensors["model.norm.weight"].shape[0]
    tensors |= {f"{new}{name}.weight": torch.ones(width) for name in ("enorm", "hnorm")}
    tensors[f"{new}shared_head.norm.weight"] = torch.ones(width)
    tensors[f"{new}eh_proj.weight"] = torch.zeros(width, 2 * width)
    save_file(tensors, file, {"format": "pt"})


def silence(folder: Path) -> None:
    """Make layers of a Llama add nothing where those of DeciLM have nothing."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for part, layers in (("self_attn.o_proj", NO_ATTENTION), ("mlp.down_proj", NO_NETWORK)):
        for layer in layers:
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})


def original(name: str, case: Case, folder: Path) -> None:
    """Write the folder of a case."""
    build(case, folder)
    if name == "deci":
        silence(folder)
    if case.fields.get("num_nextn_predict_layers"):
        add_block(folder, case.depth)


# Cuts


def cut(source: Path, layers: Sequence[int], target: Path, **options: Any) -> Path | str:
    """Cut a file or a folder; where it is refused, why."""
    try:
        prune_checkpoint(source, layers, target, overwrite=True, **options)
    except LLMPrunerError as error:
        return f"refused: {error}"
    return find_gguf(target)[0] if source.suffix == ".gguf" else target


def changed(before: Path, after: Path) -> str:
    """The keys that a cut wrote or changed."""
    old, new = (read_gguf_checkpoint(find_gguf(path)).values for path in (before, after))
    return ", ".join(key for key, value in new.items() if old.get(key) != value)


def cut_row(
    name: str, what: str, folder: Path, file: Path, layers: Sequence[int], **options: Any
) -> Row:
    """Cut a GGUF file and the folder it was converted from."""
    place = f"{file.stem}-{'-'.join(map(str, layers))}{''.join(options)}"
    found = cut(file, layers, file.with_name(f"{place}-cut"), **options)
    what = f"{what}: {','.join(map(str, layers))}"
    if isinstance(found, str):
        return Row(name, what, told=found)
    wanted = cut(folder, layers, file.with_name(f"{place}-hf"), **options)
    if isinstance(wanted, str):
        return Row(name, what, found, told=f"folder {wanted}", promised=False)
    return Row(name, what, found, wanted, changed(file, found))


def rows(name: str, case: Case, folder: Path, file: Path) -> Iterator[Row]:
    """What is done with a case."""
    if name == "deci":
        file = as_deci(file, file.with_name("as-deci.gguf"), case.depth)
    for what, layers in {**SETS, "periodic": case.periodic}.items():
        row = cut_row(name, what, folder, file, layers)
        yield row
        named = re.search(r"would be: \[\[(.*?)\]", row.told)
        if named:
            near = [int(number) for number in named[1].split(",")]
            yield cut_row(name, f"near {what}", folder, file, near)
    if case.fields.get("num_nextn_predict_layers"):
        yield cut_row(name, "scattered, no MTP", folder, file, SCATTERED, drop_mtp=True)
    if name in NAIVE:
        path = renamed(file, file.with_name(f"{name}-renamed.gguf"), SCATTERED, case.depth)
        wanted = file.with_name(f"{name}-{'-'.join(map(str, SCATTERED))}-hf")
        yield Row(name, "--prune-layers", path, wanted, promised=False)
    if name == "llama":
        author(file, file.with_name("parts.gguf"), split=20)
        parts = min(file.parent.glob("parts-*.gguf"))
        found = cut(parts, SCATTERED, file.with_name("parts-cut"))
        whole = cut(file, SCATTERED, file.with_name("whole-cut"))
        count = len(find_gguf(found))
        yield Row(name, f"scattered, of {count} parts", found, whole, changed(parts, found))
    if name == "llama-quantised":
        small = author(file, file.with_name("quantised.gguf"), quantised=True)
        found = cut(small, SCATTERED, file.with_name("quantised-cut"))
        again = renamed(small, file.with_name("quantised-again.gguf"), SCATTERED, case.depth)
        yield Row(name, "scattered, of Q8_0 and Q4_0", found, again, changed(small, found))


def fixed(names: Sequence[str], work: Path, reader: Sequence[str]) -> Iterator[tuple[Row, Any]]:
    """Converted pruned folders before `fix_gguf`, and after; what is measured before, as well."""
    folders = {name: work / f"{name}-pruned" for name in FIXED if name in names}
    for name, folder in folders.items():
        prune_checkpoint(work / name, SCATTERED, folder, overwrite=True)
    before = measured(reader, list(folders.values()))
    for name, (folder, found) in zip(folders, before, strict=True):
        yield Row(name, "converted after pruning", folder, folder, promised=False), found
        file = Path(f"{folder}.gguf")
        try:
            told = ", ".join(fix_gguf(file, json.loads((folder / "config.json").read_text())))
            yield Row(name, "and fixed", file, folder, told), None
        except LLMPrunerError as error:
            yield Row(name, "and fixed", told=f"refused: {error}"), None


# Measuring


def verdict(row: Row, cell: Cell | None, floor: Cell) -> str:
    """Right or not; an original that llama.cpp does not read right tells nothing."""
    if floor.error or floor.agreement < READ:
        return "no verdict"
    if cell is None:
        return "refused" if row.told.startswith("refused") else "no reference"
    exact = row.wanted is not None and row.wanted.suffix == ".gguf"
    right = not cell.error and cell.agreement >= KEPT * floor.agreement
    if exact:
        right = cell.difference == 0
    return "right" if right else "WRONG" if row.promised else "wrong, as expected"


def report(names: Sequence[str], reader: Sequence[str], work: Path) -> int:
    """Build, convert, cut, measure, print; the number of broken promises."""
    for name in names:
        original(name, ALL[name], work / name)
    found: dict[Path, Any] = dict(measured(reader, [work / name for name in names]))
    wanted = {work / name: reference(work / name) for name in names}
    lines = []
    for name in names:
        if (work / f"{name}.gguf").exists():
            lines += rows(name, ALL[name], work / name, work / f"{name}.gguf")
    for row, numbers in fixed(names, work, reader):
        lines.append(row)
        if numbers is not None and row.file is not None:
            found[row.file] = numbers
    files = {row.file for row in lines if row.file} | {
        row.wanted for row in lines if row.wanted and row.wanted.suffix == ".gguf"
    }
    found |= dict(measured(reader, [file for file in files if file not in found]))
    for row in lines:
        if row.wanted is None or row.wanted in wanted:
            continue
        if row.wanted.suffix == ".gguf":
            wanted[row.wanted] = np.array(found[row.wanted]["log_probabilities"])
        else:
            wanted[row.wanted] = reference(row.wanted)
    count = Counter({"WRONG": 0})
    print("| model | without layers | difference / agreement | original | | |\n" + "|---" * 6 + "|")
    for name in names:
        floor = compared(found[work / name], wanted[work / name], "")
        own = [row for row in lines if row.name == name] or [Row(name, "")]
        for row in own:
            cell = (
                compared(found[row.file], wanted[row.wanted], "")
                if row.file and row.wanted
                else None
            )
            said = verdict(row, cell, floor)
            count[said] += 1
            print(f"| {name} | {row.what} | {cell or ''} | {floor} | {said} | {row.told[:300]} |")
    print("\n" + "; ".join(f"{said}: {number}" for said, number in sorted(count.items())))
    return count["WRONG"]


def main() -> int:
    """Measure the cases that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", metavar="PYTHON", required=True)
    parser.add_argument("--converter", metavar="DIR", required=True)
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), metavar="CASE")
    parser.add_argument("--work", type=Path, help="keep the files here")
    args = parser.parse_args()
    tokens = ",".join(map(str, TOKENS))
    reader = [args.llama_cpp, str(READERS), "gguf", tokens, args.converter]
    with tempfile.TemporaryDirectory() as place:
        return int(report(args.only, reader, args.work or Path(place)) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
