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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import engines
import numpy as np
import torch
from engines import KEPT, READ, SCATTERED, Cell, case
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
SWA = {"sliding_window": engines.WINDOW}
MTP = "num_nextn_predict_layers"
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
STATES = {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2}
DENSE = {"first_k_dense_replace": 3, "n_shared_experts": 1, "n_routed_experts": 4}
SIGMOID = {"scoring_func": "sigmoid", "norm_topk_prob": True}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 3, "intermediate_size": 256}
HYBRID = {"layer_types": (["mamba"] * 3 + ["attention"]) * 3, "shared_intermediate_size": 64}
BLOCKS = ["mamba", "moe", "attention", "moe"] * 3
SHORT = ["conv", "conv", "full_attention"] * 4
CASES = engines.CASES | {
    "granitemoehybrid": case("granitemoehybrid", **MAMBA, **HYBRID),
    "bamba": case("bamba", **MAMBA, attn_layer_indices=[2, 6, 9], attn_rotary_emb=16),
    "nemotron_h": case("nemotron_h", **STATES, layers_block_type=BLOCKS),
    "lfm2_moe": case("lfm2_moe", layer_types=SHORT, num_dense_layers=3),
    "jamba": case("jamba", attn_layer_period=4, attn_layer_offset=2, mamba_dt_rank=8),
    "apertus": case("apertus"),
    "falcon_h1": case("falcon_h1", **MAMBA, mamba_d_ssm=256, head_dim=32),
    "cohere2_moe": case("cohere2_moe", **SWA),
    "exaone_moe": case("exaone_moe", **SWA, num_experts=4, scoring_func="sigmoid"),
    "ernie4_5_moe": case("ernie4_5_moe", **ERNIE),
    "afmoe": case("afmoe", **SWA, num_dense_layers=3, mup_enabled=True, route_norm=True),
    "dots1": case("dots1", **DENSE, **SIGMOID, num_key_value_heads=4),
    "mamba": case("mamba", state_size=16, time_step_rank=8, intermediate_size=256),
    "mamba2": case("mamba2", num_heads=8, head_dim=32, state_size=16, n_groups=1),
    "deepseek_v3-mtp": case("deepseek_v3", **engines.LATENT, **engines.SIGMOID, **{MTP: 1}),
    "glm4_moe-mtp": case("glm4_moe", head_dim=32, **{MTP: 1}),
    "olmoe": case("olmoe", num_key_value_heads=4),
    "qwen2_moe": case("qwen2_moe"),
    "bloom": case("bloom"),
    "deci": case("llama"),
    "llama-quantised": case("llama", hidden_size=256),
}
RENAMED = ("gemma3", "olmo3", "lfm2")
FIXED = ("gemma2", "gemma3", "cohere2", "gpt_oss", "deepseek_v2-lite", "smollm3")
NO_ATTENTION, NO_NETWORK = (1, 4, 9), (4, 9)  # layers of the model that is laid out as DeciLM
LACKING = {"attention.head_count": NO_ATTENTION, "attention.head_count_kv": NO_ATTENTION}
LACKING["feed_forward_length"] = NO_NETWORK
QUANTISED = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0)


class Row(NamedTuple):
    """A line of the table."""

    what: str  # which layers went, and how
    file: Path | None = None  # of GGUF, or a converted folder
    wanted: Path | None = None  # a folder for transformers, or a file that gives the same exactly
    told: str = ""  # the keys that changed, or why there is no file
    promised: bool = True  # to be right


# Files


def original(name: str, folder: Path) -> Path:
    """Write the folder of a case."""
    case = CASES[name]
    engines.build(case, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if name == "deci":
        for part, layers in (("self_attn.o_proj", NO_ATTENTION), ("mlp.down_proj", NO_NETWORK)):
            for layer in layers:
                tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    if case.fields.get(MTP):  # the last layer again, and what only such a block has
        last, new = (f"model.layers.{layer}." for layer in (case.depth - 1, case.depth))
        copied = [key for key in tensors if key.startswith(last)]
        tensors |= {new + key.removeprefix(last): tensors[key].clone() for key in copied}
        width = tensors["model.norm.weight"].shape[0]
        for own in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{new}{own}.weight"] = torch.ones(width)
        tensors[f"{new}eh_proj.weight"] = torch.zeros(width, 2 * width)
    save_file(tensors, file, {"format": "pt"})
    return folder


def author(
    source: Path,
    target: Path,
    rename: Callable[[str], str | None] = str,
    changes: Mapping[str, Any] | None = None,
    *,
    kind: str = "",
    quantised: bool = False,
    split: int = 0,
) -> Path:
    """Write a GGUF file again with the format's own package, with some things changed."""
    reader = GGUFReader(source)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    old = fields.pop("general.architecture").contents()
    writer = GGUFWriter(target, kind or old, split_max_tensors=split)
    for key, field in fields.items():
        name = key.replace(f"{old}.", "")
        value, types = (changes or {}).get(name, field.contents()), field.types
        if isinstance(value, list) and len(types) == 1:
            types = [GGUFValueType.ARRAY, GGUFValueType.INT32]
        key = key.replace(f"{old}.", f"{kind or old}.")
        writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    for number, tensor in enumerate(reader.tensors):
        name, data, dtype = rename(tensor.name), tensor.data, tensor.tensor_type
        if quantised and data.ndim == 2:
            dtype = QUANTISED[number % 2]
            data = quants.quantize(data, dtype)
        if name is not None:
            writer.add_tensor(name, data, raw_dtype=dtype)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def renamed(source: Path, target: Path, removed: Sequence[int], depth: int) -> Path:
    """The file of the kept tensors, in which only their number follows: `--prune-layers`."""
    kept = [index for index in range(depth) if index not in removed]
    rename = partial(LayerNames(("blk.",), depth).rename, kept=kept)
    return author(source, target, rename, {"block_count": len(kept)})


def as_deci(source: Path, target: Path, depth: int) -> Path:
    """Lay a Llama out as DeciLM, in which layers lack attention or the network after it."""
    lost = [f"blk.{i}.attn_" for i in NO_ATTENTION] + [f"blk.{i}.ffn_" for i in NO_NETWORK]
    values = read_gguf_checkpoint([source]).values
    changes = {
        key: [0 if index in without else values[f"llama.{key}"] for index in range(depth)]
        for key, without in LACKING.items()
    }

    def rename(name: str) -> str | None:
        return None if name.startswith(tuple(lost)) else name

    return author(source, target, rename, changes, kind="deci")


# Cuts


def cut(source: Path, layers: Sequence[int], target: Path, **options: Any) -> Path:
    """Cut a file or a folder; what comes of it."""
    prune_checkpoint(source, layers, target, overwrite=True, **options)
    return find_gguf(target)[0] if source.suffix == ".gguf" else target


def changed(before: Path, after: Path) -> str:
    """The keys that a cut wrote or changed."""
    old, new = (read_gguf_checkpoint(find_gguf(path)).values for path in (before, after))
    return ", ".join(key for key, value in new.items() if old.get(key) != value)


def compared(what: str, folder: Path, file: Path, layers: Sequence[int], **options: Any) -> Row:
    """Cut a GGUF file and the folder it was converted from."""
    place = f"{folder}-{'-'.join(map(str, layers))}{''.join(options)}"
    what = f"{what}: {','.join(map(str, layers))}"
    try:
        found = cut(file, layers, Path(f"{place}-cut"), **options)
    except LLMPrunerError as error:
        return Row(what, told=f"refused: {error}")
    try:
        wanted = cut(folder, layers, Path(f"{place}-hf"), **options)
    except LLMPrunerError as error:
        return Row(what, told=f"the folder is refused: {error}")
    return Row(what, found, wanted, changed(file, found))


def rows(name: str, folder: Path) -> Iterator[Row]:
    """What is done with a case."""
    case, file, work = CASES[name], Path(f"{folder}.gguf"), folder.parent
    if not file.exists():
        yield Row("", told="not converted")
        return
    if name == "deci":
        file = as_deci(file, work / "as-deci.gguf", case.depth)
    for what, layers in {**SETS, "periodic": case.periodic}.items():
        row = compared(what, folder, file, layers)
        yield row
        near = re.search(r"would be: \[\[(.*?)\]", row.told)
        if near:
            yield compared(f"near {what}", folder, file, [*map(int, near[1].split(","))])
    if case.fields.get(MTP):
        yield compared("scattered, no MTP", folder, file, SCATTERED, drop_mtp=True)
    pruned = Path(f"{folder}-pruned")
    if name in RENAMED:
        again = renamed(file, work / f"{name}-renamed.gguf", SCATTERED, case.depth)
        yield Row("--prune-layers", again, pruned, promised=False)
    if name in FIXED:
        config = json.loads((pruned / "config.json").read_text(encoding="utf-8"))
        yield Row("converted after pruning", pruned, pruned, promised=False)
        try:
            keys = fix_gguf(Path(f"{pruned}.gguf"), config)
            yield Row("and fixed", Path(f"{pruned}.gguf"), pruned, ", ".join(keys))
        except LLMPrunerError as error:
            yield Row("and fixed", told=f"refused: {error}")
    if name == "llama":
        author(file, work / "parts.gguf", split=20)
        parts = min(work.glob("parts-*.gguf"))
        found, whole = (cut(one, SCATTERED, work / f"{one.stem}-cut") for one in (parts, file))
        what = f"scattered, of {len(find_gguf(found))} parts"
        yield Row(what, found, whole, changed(parts, found))
    if name == "llama-quantised":
        small = author(file, work / "quantised.gguf", quantised=True)
        found = cut(small, SCATTERED, work / "quantised-cut")
        again = renamed(small, work / "quantised-again.gguf", SCATTERED, case.depth)
        yield Row("scattered, of Q8_0 and Q4_0", found, again, changed(small, found))


# Measuring


def measured(reader: Sequence[str], paths: Sequence[Path]) -> dict[Path, Any]:
    """What the reader tells of folders, which it converts, and of files."""
    return {
        path: {key: np.array(value) if key != "error" else value for key, value in told.items()}
        for path, told in engines.measured(reader, paths)
    }


def verdict(row: Row, cell: Cell | None, floor: Cell) -> str:
    """Right or not; an original that llama.cpp does not read right tells nothing."""
    if floor.error or floor.agreement < READ:
        return "no verdict"
    if cell is None or row.wanted is None:
        return "refused" if row.told.startswith("refused") else "no reference"
    right = not cell.error and cell.agreement >= KEPT * floor.agreement
    if row.wanted.suffix == ".gguf":
        right = cell.difference == 0
    return "right" if right else "WRONG" if row.promised else "wrong, as expected"


def report(names: Sequence[str], reader: Sequence[str], work: Path) -> int:
    """Build, convert, cut, measure, print; the number of broken promises."""
    folders = {name: original(name, work / name) for name in names}
    pruned = [
        cut(folder, SCATTERED, work / f"{name}-pruned")
        for name, folder in folders.items()
        if name in FIXED + RENAMED
    ]
    found = measured(reader, [*folders.values(), *pruned])
    lines = [(name, row) for name, folder in folders.items() for row in rows(name, folder)]
    paths = {path for _, row in lines for path in (row.file, row.wanted) if path}
    files = [path for path in paths if path.suffix == ".gguf"]
    found |= measured(reader, files)

    def measure(file: Path, wanted: Path) -> Cell:
        known = wanted.suffix == ".gguf"
        truth = found[wanted]["log_probabilities"] if known else engines.reference(wanted)
        return engines.compared(found[file], truth, "")

    floors = {name: measure(folder, folder) for name, folder in folders.items()}
    count = Counter({"WRONG": 0})
    print("| model | without layers | difference / agreement | original | | |\n" + "|---" * 6 + "|")
    for name, row in lines:
        cell = measure(row.file, row.wanted) if row.file and row.wanted else None
        said = verdict(row, cell, floors[name])
        count[said] += 1
        told = f"{floors[name]} | {said} | {row.told[:300]}"
        print(f"| {name} | {row.what} | {cell or ''} | {told} |", flush=True)
    print("\n" + "; ".join(f"{said}: {number}" for said, number in sorted(count.items())))
    return count["WRONG"]


def main() -> int:
    """Measure the cases that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", metavar="PYTHON", required=True)
    parser.add_argument("--converter", metavar="DIR", required=True)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--work", type=Path, help="keep the files here")
    args = parser.parse_args()
    tokens = ",".join(map(str, engines.TOKENS))
    reader = [args.llama_cpp, str(engines.READERS), "gguf", tokens, args.converter]
    with tempfile.TemporaryDirectory() as place:
        return int(report(args.only, reader, args.work or Path(place)) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
