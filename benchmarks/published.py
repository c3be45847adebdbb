"""Published configs: is the pruned checkpoint the published one minus layers?

    python benchmarks/published.py                       # configs written in the published layouts
    python benchmarks/published.py FOLDER                # its *.config.json and *hf_quant* files
    python benchmarks/published.py FOLDER --only Qwen3-8B --roads disk
    python benchmarks/published.py --reader OTHER_PYTHON --mlx-reader PYTHON_WITH_MLX

Every config becomes a small checkpoint laid out as publishers do it (`published_layout.py`), is
pruned on disk and in memory, and is judged by code that shares none with the package: tensors byte
for byte under names renumbered here, config.json field by field, side files byte for byte, layer
names in quantisation settings by what they match, and logits against the original whose layers
return what they are given. A reader is another environment that has to compute the same from the
same folders. A line per config and road says RIGHT, REFUSED, WRONG, or NOT BUILT where
transformers does not know the type: then all but the logits is judged, or the refusal.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Config = dict[str, Any]

ROADS = ("disk", "memory")
OUTCOMES = ("RIGHT", "REFUSED", "NOT BUILT", "WRONG")
TOLERANCE = 2e-5  # of logits, relative to the largest
READER_TOLERANCE = 2e-3
NOTE = "note: "  # what is said without being a fault
TOKENS = 24
SECONDS = 240
MEMORY = 6 << 30
MUST_REFUSE = {"nemotron-nas"}  # blocks of other shapes, which only the model's own code knows
WRITTEN = {
    "pruning_plan.json",
    "pruning_manifest.json",
    "pruning_report.json",
    "report.html",
    "README.md",
}
# What other readers know: transformers 4.57, and MLX-LM as far as it is tried.
READER_TYPES = set(
    "llama mistral qwen2 qwen3 qwen3_moe olmo2 granite gemma2 gemma3_text gemma3 deepseek_v3 "
    "glm4_moe gpt_oss phi3 gpt2 gpt_neox".split()
)
MLX_TYPES = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "qwen3_moe", "granite", "olmo2"}

# Fields of a config that removing layers changes.
FIRST_LAYERS = {"first_k_dense_replace", "num_hash_layers"}  # counts of the first layers
INDICES = {
    "mlp_only_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "moe_layers",
    "no_split_layers",
    "hybrid_layer_ids",
    "cross_attention_layers",
    "full_attn_layers",
    "kda_layers",
}
RULES = {
    "full_attention_interval",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "sliding_window_pattern",
    "layer_switch",
    "no_rope_layer_interval",
    "index_topk_freq",
    "index_skip_topk_offset",
    "index_topk_pattern",
    "attn_layer_period",
    "attn_layer_offset",
    "expert_layer_period",
    "expert_layer_offset",
    "moe_layer_interval",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "max_window_layers",
}
COUNTED_FROM_1 = {"linear_attn_config"}


@dataclass(frozen=True)
class Verdict:
    """What came of one set of layers on one road."""

    config: str
    road: str
    removed: tuple[int, ...]
    outcome: str
    detail: str = ""
    seconds: float = 0.0


def layer_set(depth: int) -> tuple[int, ...]:
    """The layers to remove: one at the start, two in the middle, one later."""
    return tuple(sorted({1, depth // 2, depth // 2 + 1, 3 * depth // 4} & set(range(depth))))


class Renumbering:
    """Old and new layer numbers; blocks past the last layer follow it."""

    def __init__(self, depth: int, removed: Sequence[int]) -> None:
        self.depth, self.removed = depth, set(removed)
        self.kept = [index for index in range(depth) if index not in self.removed]
        self.new_depth = len(self.kept)

    def new(self, index: int) -> int | None:
        """The new number; None for a removed layer."""
        if index >= self.depth:
            return index - len(self.removed)
        return None if index in self.removed else self.kept.index(index)

    def name(self, name: str, prefix: str) -> str | None:
        """The new name of what belongs to a layer; other names stay."""
        match = re.match(re.escape(prefix) + r"(\d+)(?=\.|$)", name)
        if not match:
            return name
        index = self.new(int(match[1]))
        return None if index is None else f"{prefix}{index}{name[match.end() :]}"

    def layers_of(self, values: Sequence[Any]) -> list[Any]:
        """What is left of a list with a value per layer (and per block past the last)."""
        return [values[index] for index in self.kept] + list(values[self.depth :])


# Tensors


def stored(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """All tensors of a folder, and what is wrong with its index."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                found[name] = tensors.get_tensor(name)
                files[name] = path.name
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads(index.read_text())["weight_map"] != files:
        return found, ["the index differs from the files"]
    return found, []


def tensor_faults(source: Any, out: Path, numbers: Renumbering) -> Iterator[str]:
    """Kept tensors under their new names, byte for byte, and no others."""
    import torch

    got, faults = stored(out)
    yield from faults
    want = {
        new: tensor
        for name, tensor in source.tensors.items()
        if (new := numbers.name(name, source.prefix)) is not None
    }
    mtp = {numbers.name(name, source.prefix) for name in source.mtp}
    lost = sorted(set(want) - set(got))
    if lost_mtp := [name for name in lost if name in mtp]:
        yield f"{len(lost_mtp)} tensors of the MTP blocks lost, such as {lost_mtp[0]}"
    if others := [name for name in lost if name not in mtp]:
        yield f"{len(others)} tensors lost, such as {others[0]}"
    if more := sorted(set(got) - set(want)):
        yield f"{len(more)} tensors too many, such as {more[0]}"
    changed = []
    for name in want.keys() & got.keys():
        new, old = got[name], want[name].contiguous()
        same = new.dtype == old.dtype and new.shape == old.shape
        if not same or not torch.equal(_bytes(new), _bytes(old)):
            changed.append(f"{name} ({old.dtype} to {new.dtype})")
    if changed:
        yield f"{len(changed)} tensors changed, such as {min(changed)}"


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.reshape(-1).view(torch.uint8)


# config.json


def config_faults(old: Config, new: Config, numbers: Renumbering) -> Iterator[str]:
    """Fields that changed without need, did not change where they had to, came or went."""
    from published_layout import COUNTS, QUANTISATION, TOWERS, depths_in

    def walk(old: Config, new: Config, path: str, first: int) -> Iterator[str]:
        for key in sorted(old.keys() | new.keys()):
            name = f"{path}{key}"
            if key in QUANTISATION:
                if (key in old) != (key in new):
                    yield f"{name} {'lost' if key in old else 'added'}"
            elif key not in new:
                yield f"{name} lost"
            elif key not in old:
                left_to_class = key in COUNTS and "model_type" in old and not depths_in(old)
                right_count = left_to_class and new[key] == numbers.new_depth
                if not right_count and not _per_layer(key, new[key], numbers):
                    yield f"{name} added: {_short(new[key])}"
            elif key in TOWERS:
                if old[key] != new[key]:
                    yield f"{name} changed"
            elif isinstance(old[key], dict) and isinstance(new[key], dict):
                if key.startswith("rope_"):
                    if old[key] != new[key]:
                        yield f"{name}: {_short(old[key])} became {_short(new[key])}"
                else:
                    yield from walk(old[key], new[key], f"{name}.", int(key in COUNTED_FROM_1))
            elif key not in RULES and not any(
                new[key] == value and type(new[key]) is type(value)
                for value in _allowed(key, old[key], numbers, first)
            ):
                yield f"{name}: {_short(old[key])} became {_short(new[key])}"

    yield from walk(old, new, "", 0)


def _allowed(key: str, value: Any, numbers: Renumbering, first: int) -> list[Any]:
    """What a field may be after the removal."""
    from published_layout import COUNTS

    if key in COUNTS and value == numbers.depth:
        return [numbers.new_depth]
    if key in FIRST_LAYERS and isinstance(value, int):
        return [sum(index < value for index in numbers.kept)]
    if key in INDICES and isinstance(value, list):
        moved = [numbers.new(index - first) for index in value]
        return [[index + first for index in moved if index is not None]]
    if isinstance(value, str) and len(value) == numbers.depth and key.endswith("pattern"):
        return ["".join(numbers.layers_of(value))]
    if isinstance(value, list) and len(value) in (numbers.depth, numbers.depth + 1):
        return [numbers.layers_of(value)]
    return [value]


def _per_layer(key: str, value: Any, numbers: Renumbering) -> bool:
    """Whether an added field tells one fact per layer, or layers by index."""
    if key in INDICES and isinstance(value, list):
        return all(isinstance(index, int) and index <= numbers.new_depth for index in value)
    if isinstance(value, dict):
        return all(index.isdigit() and int(index) < numbers.new_depth for index in value)
    return isinstance(value, (list, str)) and len(value) == numbers.new_depth


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


# Side files


def side_file_faults(source: Path, out: Path) -> Iterator[str]:
    """Files beside the weights that are not as they were, and new ones."""
    from published_layout import QUANT_FILE

    own = ("config.json", "model.safetensors.index.json", "README.md", QUANT_FILE)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors" or path.name in own:
            continue
        if not (out / path.name).exists():
            yield f"{path.name} lost"
        elif (out / path.name).read_bytes() != path.read_bytes():
            yield f"{path.name} changed"
    had = {path.name for path in source.iterdir()}
    for path in sorted(out.iterdir()):
        if path.suffix == ".safetensors" or path.name in own:
            continue
        if path.name not in had | WRITTEN:
            yield f"{path.name} is new"
    card = out / "README.md"
    if not card.exists() or "license: apache-2.0" not in card.read_text(encoding="utf-8"):
        yield "the card's metadata lost"


# Layer names in quantisation settings


def quantisation_faults(source: Any, out: Path, numbers: Renumbering) -> Iterator[str]:
    """Settings whose names match other modules than before."""
    from published_layout import QUANT_FILE, QUANTISATION, TEXT_PARTS

    pairs: list[tuple[str, Any, Any]] = []
    new_config = json.loads((out / "config.json").read_text())
    for part in ("", *TEXT_PARTS):
        old = source.config.get(part) if part else source.config
        new = new_config.get(part) if part else new_config
        if isinstance(old, dict) and isinstance(new, dict):
            pairs += [
                (f"{part}.{key}".lstrip("."), old[key], new[key])
                for key in QUANTISATION
                if key in old and key in new
            ]
    if (source.folder / QUANT_FILE).exists():
        if not (out / QUANT_FILE).exists():
            yield f"{QUANT_FILE} lost"
        else:
            both = [json.loads((f / QUANT_FILE).read_text()) for f in (source.folder, out)]
            pairs.append((QUANT_FILE, *both))
    modules = {
        name.rsplit(".", cut)[0] for name in source.tensors for cut in range(1, name.count(".") + 1)
    }
    for path, old, new in pairs:
        yield from _settings_faults(path, old, new, modules, source.prefix, numbers)


def _settings_faults(
    path: str, old: Any, new: Any, modules: set[str], prefix: str, numbers: Renumbering
) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if any(_names_layer(key, prefix) for key in old):
            yield from _names_faults(path, list(old), list(new), modules, prefix, numbers)
            for key, value in old.items():
                renamed = _renamed_entry(key, prefix, numbers)
                if renamed in new and new[renamed] != value:
                    yield f"{path}: {renamed} has another value"
            return
        if old.keys() != new.keys():
            yield f"{path}: other keys: {sorted(old.keys() ^ new.keys())[:3]}"
        for key in old.keys() & new.keys():
            yield from _settings_faults(
                f"{path}.{key}", old[key], new[key], modules, prefix, numbers
            )
    elif (
        isinstance(old, list)
        and isinstance(new, list)
        and all(isinstance(entry, str) for entry in (*old, *new))
        and any(_names_layer(entry, prefix) for entry in old)
    ):
        yield from _names_faults(path, old, new, modules, prefix, numbers)
    elif old != new:
        yield f"{path}: {_short(old)} became {_short(new)}"


def _names_layer(entry: str, prefix: str) -> bool:
    """Whether an entry may single out layers: it holds a number that stands for one."""
    return bool(re.search(r"\d", entry)) and (
        entry.startswith("re:") or bool(re.search(r"(layers|blocks|h)\\?\.[\d\[(]", entry))
    )


def _names_faults(
    path: str,
    old: list[str],
    new: list[str],
    modules: set[str],
    prefix: str,
    numbers: Renumbering,
) -> Iterator[str]:
    """Old entries on the old modules have to match what new entries match on the new ones."""
    named = {_concrete(entry) for entry in old} - {None}
    universe = modules | {name for name in named if name}
    before, after = _matcher(old), _matcher(new)
    missed, excess = [], []
    for name in sorted(universe):
        renamed = _renamed_entry(name, prefix, numbers)
        if renamed is None:
            continue
        if before(name) and not after(renamed):
            missed.append(renamed)
        elif after(renamed) and not before(name):
            excess.append(renamed)
    if missed:
        yield f"{path}: {len(missed)} modules no longer matched, such as {missed[0]}"
    if excess:
        yield f"{path}: {len(excess)} modules wrongly matched, such as {excess[0]}"
    top = numbers.new_depth + max(
        [int(found[1]) + 1 - numbers.depth for found in _numbered(universe, prefix)] + [0]
    )
    stale = [entry for entry in new if (found := _number(entry, prefix)) and int(found[1]) >= top]
    if stale:
        yield f"{path}: {len(stale)} entries name layers past the end, such as {stale[0]}"


def _concrete(entry: str) -> str | None:
    """The module that an entry names; None for a pattern."""
    bare = re.sub(r"(\.?\*)$", "", entry)
    return None if entry.startswith("re:") or re.search(r"[*?\[]", bare) else bare


def _number(name: str, prefix: str) -> re.Match[str] | None:
    """The layer number in a name, whatever stands before the decoder's own part of it."""
    tail = re.escape(prefix.split(".")[-2] if prefix.count(".") else prefix)
    match = re.search(rf"(?:^|\.){tail}\.(\d+)(?=\.|\*|$)", name)
    return None if re.search(r"vision|visual|audio|mtp", name) else match


def _numbered(names: set[str], prefix: str) -> list[re.Match[str]]:
    return [found for name in names if (found := _number(name, prefix))]


def _renamed_entry(name: str, prefix: str, numbers: Renumbering) -> str | None:
    found = _number(name, prefix)
    if not found:
        return name
    index = numbers.new(int(found[1]))
    return None if index is None else f"{name[: found.start(1)]}{index}{name[found.end(1) :]}"


def _matcher(entries: list[str]) -> Callable[[str], bool]:
    """Whether one of the entries matches a module: a regex, a glob, or a part of its path."""
    patterns = []
    plain = set()
    for entry in entries:
        if entry.startswith("re:"):
            patterns.append(entry[3:])
        elif re.search(r"[*?]", entry):
            patterns.append(fnmatch.translate(entry))
        else:
            plain.add(entry)
    compiled = [re.compile(pattern) for pattern in patterns]

    def matches(name: str) -> bool:
        parts = name.split(".")
        inner = {
            ".".join(parts[start:end])
            for start in range(len(parts))
            for end in range(start + 1, len(parts) + 1)
        }
        return not plain.isdisjoint(inner) or any(each.match(name) for each in compiled)

    return matches


# Logits


class Original:
    """The published checkpoint, loaded once: its logits with layers that do nothing."""

    def __init__(self, source: Any, work: Path) -> None:
        self.source = source
        self.model, self.info = load_plain(source.folder, source.config, work / "original")
        self.inputs = inputs_for(self.model)

    def bypassed(self, removed: Sequence[int], inputs: Config) -> Any:
        """Logits of the original in which the removed layers return what they are given."""
        import torch

        layers = self._layers()
        outputs: dict[int, Any] = {}
        carried: dict[int, str] = {}  # the argument that takes an output of the layer before
        hooks = []
        for index, layer in enumerate(layers):

            def told(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                before = outputs.get(index - 1)
                if isinstance(before, tuple):
                    for place, part in enumerate(before[1:], 1):
                        for name, value in kwargs.items():
                            if part is not None and value is part:
                                carried[place] = name
                outputs[index] = output

            hooks.append(layer.register_forward_hook(told, with_kwargs=True))
        run(self.model, inputs)
        for hook in hooks:
            hook.remove()
        whole = {index: layers[index].forward for index in removed}

        def skip(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                output = outputs[index]
                if isinstance(output, torch.Tensor):
                    return hidden
                others = [kwargs.get(carried.get(place, "")) for place in range(1, len(output))]
                return type(output)([hidden, *others])

            return forward

        for index in removed:
            layers[index].forward = skip(index)
        try:
            return run(self.model, inputs)
        finally:
            for index, forward in whole.items():
                layers[index].forward = forward

    def _layers(self) -> Any:
        from torch.nn import ModuleList

        fitting = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, ModuleList)
            and len(module) == self.source.depth
            and not re.search(r"vision|visual|audio", name)
        ]
        if len(fitting) != 1:
            raise ValueError(f"{len(fitting)} stacks of {self.source.depth} layers")
        return fitting[0]


def plain_view(folder: Path, config: Config, target: Path) -> Path:
    """The same weights beside a config that transformers can follow: stand-ins, no quantisation."""
    from published_layout import computed_as

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != "config.json" and path.suffix != ".py":
            (target / path.name).symlink_to(path)
    (target / "config.json").write_text(json.dumps(computed_as(config)))
    return target


def load_plain(folder: Path, config: Config, target: Path) -> tuple[Any, Config]:
    """A model of `folder` in float32, and what its weights lacked or had too many of."""
    import torch
    from published_layout import computed_as, model_class

    view = plain_view(folder, config, target)
    kind = model_class(computed_as(config))
    model, info = kind.from_pretrained(view, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def inputs_for(model: Any) -> dict[str, Config]:
    """Fixed random text, and an image, video or audio where the model takes one."""
    import torch

    from llm_pruner.model.probe import probe_inputs  # what to feed; the judgement is ours

    ids = torch.randint(5, 250, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    return {**probe_inputs(model), "text": {"input_ids": ids}}


def run(model: Any, inputs: Config) -> Any:
    """Logits of the inputs."""
    import torch

    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits


def logit_faults(
    original: Original, out: Path, removed: Sequence[int], work: Path
) -> Iterator[str]:
    """The reloaded output has to compute what the bypassed original computes."""
    want = {kind: original.bypassed(removed, given) for kind, given in original.inputs.items()}
    for kind, given in original.inputs.items():
        if _difference(run(original.model, given), want[kind]) < 1e-3:
            yield f"the removed layers do not matter to {kind}: nothing is compared"
    try:
        config = json.loads((out / "config.json").read_text())
        model, info = load_plain(out, config, work / "reloaded")
    except Exception as error:
        yield f"does not load: {line(error)}"
        return
    for kind in ("missing_keys", "mismatched_keys"):
        if len(info[kind]) > len(original.info[kind]):
            yield f"{len(info[kind])} {kind}, such as {sorted(map(str, info[kind]))[0]}"
    if type(model) is not type(original.model):
        yield f"loads as {type(model).__name__}"
    for kind, given in original.inputs.items():
        if (difference := _difference(run(model, given), want[kind])) > TOLERANCE:
            yield f"logits differ by {difference:.1e}, given {kind}"


def _difference(got: Any, want: Any) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 400 else text[:397] + '...'}"


# Another environment as reader


def reader_faults(source: Any, out: Path, work: Path, reader: str, engine: str) -> Iterator[str]:
    """The other environment has to compute from the folders what this one computes."""
    config = json.loads((out / "config.json").read_text())
    folders = [
        plain_view(source.folder, source.config, work / "source-to-read"),
        plain_view(out, config, work / "output-to-read"),
    ]
    here = _read(sys.executable, folders, "transformers")
    there = _read(reader, folders, engine)
    for name, mine, other in zip(("the source", "the output"), here, there, strict=True):
        found = list(_reading_faults(mine, other))
        if found and name == "the source":  # what it cannot read says nothing of the output
            yield f"{NOTE}{engine} reader gives no verdict, its source: {found[0]}"
            return
        yield from (f"{engine} reader: {fault}" for fault in found)


def _reading_faults(mine: Config, other: Config) -> Iterator[str]:
    import torch

    if problem := mine.get("error") or other.get("error"):
        yield problem
        return
    got, want = torch.tensor(other["logits"]), torch.tensor(mine["logits"])
    if (difference := _difference(got, want)) > READER_TOLERANCE:
        same = (got.argmax(-1) == want.argmax(-1)).float().mean()
        yield f"logits differ by {difference:.1e}, top-1 {same:.2f}"
    if mine["ids"] != other["ids"]:
        yield "other token ids"


def _read(python: str, folders: list[Path], engine: str) -> list[Config]:
    script = Path(__file__).with_name("read_logits.py")
    command = [python, str(script), *map(str, folders), "--engine", engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    found = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    lost = {"error": " ".join(done.stderr.split())[-200:] or "no answer"}
    return (found + [lost] * len(folders))[: len(folders)]


# One config


def prune(source: Path, removed: Sequence[int], out: Path, road: str) -> None:
    """The package's part: everything else here judges it."""
    from llm_pruner import load_model, prune_checkpoint
    from llm_pruner.pruners import SmartPruner

    shutil.rmtree(out, ignore_errors=True)
    if road == "disk":
        prune_checkpoint(str(source), list(removed), str(out))
    else:
        model, tokenizer = load_model(str(source))
        SmartPruner(model, tokenizer).prune_and_save(list(removed), str(out), str(source))


def judge(
    config: Config,
    *,
    name: str,
    work: Path,
    quant_file: Config | None = None,
    roads: Sequence[str] = ROADS,
    small: bool = False,
    readers: Sequence[tuple[str, str]] = (),
) -> list[Verdict]:
    """Publish, prune and judge one config on all roads.

    Args:
        config: as it is published.
        name: what to call it.
        work: an empty folder.
        quant_file: what ``hf_quant_config.json`` says, if it is there.
        roads: some of `ROADS`.
        small: the config is narrow already.
        readers: pairs of an engine and the interpreter that has it.
    """
    from published_layout import published, stripped

    try:
        source = published(config, work / "source", quant_file=quant_file, small=small)
        original = Original(source, work) if source.computes else None
    except Exception as error:
        return [Verdict(name, road, (), "NOT BUILT", line(error)) for road in roads]
    verdicts = []
    for road in roads:
        pruned = source
        if road == "memory" and source.config != (plain := stripped(source.config)):
            # Its quantised twin cannot be loaded from plain weights.
            pruned = copy.copy(source)
            pruned.config, pruned.folder = plain, work / "plain"
            if not source.not_built:
                shutil.copytree(source.folder, pruned.folder, dirs_exist_ok=True)
                (pruned.folder / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
                for code in pruned.folder.glob("*.py"):
                    code.unlink()
            else:
                pruned = source
        removed: tuple[int, ...] | None = layer_set(source.depth)
        while removed:
            verdict, removed = _judge_set(pruned, original, removed, name, road, work, readers)
            verdicts.append(verdict)
    return verdicts


def _judge_set(
    source: Any,
    original: Original | None,
    removed: tuple[int, ...],
    name: str,
    road: str,
    work: Path,
    readers: Sequence[tuple[str, str]],
) -> tuple[Verdict, tuple[int, ...] | None]:
    """The verdict on one set of layers, and the set to try instead where it is refused."""
    out = work / f"out-{road}"
    started = time.perf_counter()
    outcome, detail, instead = "RIGHT", "", None
    refused = False
    try:
        prune(source.folder, removed, out, road)
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        refused = "UnsupportedModelError" in kinds or (
            bool(source.not_built) and "LLMPrunerError" in kinds
        )
        outcome, detail = ("REFUSED" if refused else "WRONG"), line(error)
        if named := re.search(r"can be removed: (\[\[[\d, \[\]]*\]\])", str(error)):
            first = tuple(json.loads(named[1])[0])
            instead = first if first != removed else None
    else:
        faults = list(_faults(source, original, out, removed, work, readers))
        if source.config.get("model_type") in MUST_REFUSE:
            faults.append("was not refused")
        wrong = [fault for fault in faults if not fault.startswith(NOTE)]
        outcome, detail = ("WRONG" if wrong else "RIGHT"), "; ".join(wrong or faults)
    if source.not_built and outcome != "WRONG":
        judged = f"refused: {detail}" if refused else "all but its own logits is right"
        outcome, detail = "NOT BUILT", f"{source.not_built}; {judged}"
    seconds = round(time.perf_counter() - started, 1)
    return Verdict(name, road, removed, outcome, detail, seconds), instead


def _faults(
    source: Any,
    original: Original | None,
    out: Path,
    removed: tuple[int, ...],
    work: Path,
    readers: Sequence[tuple[str, str]],
) -> Iterator[str]:
    numbers = Renumbering(source.depth, removed)
    yield from tensor_faults(source, out, numbers)
    yield from config_faults(source.config, json.loads((out / "config.json").read_text()), numbers)
    yield from side_file_faults(source.folder, out)
    yield from quantisation_faults(source, out, numbers)
    if original is not None:
        yield from logit_faults(original, out, removed, work)
    for engine, python in readers:
        known = MLX_TYPES if engine == "mlx" else READER_TYPES
        if source.config.get("model_type") in known:
            yield from reader_faults(source, out, work, python, engine)


# All configs


def configs_in(folder: Path) -> dict[str, tuple[Config, Config | None]]:
    """Name -> the config and its companion for quantisation, if there is one."""
    found: dict[str, tuple[Config, Config | None]] = {}
    for path in sorted(folder.glob("*.config.json")):
        if "hf_quant" not in path.name:
            name = path.name.removesuffix(".config.json")
            ends = ("_hf_quant.config.json", ".hf_quant_config.json", "_hf_quant_config.json")
            beside = [folder / f"{name}{end}" for end in ends if (folder / f"{name}{end}").exists()]
            quant = json.loads(beside[0].read_text()) if beside else None
            found[name] = (json.loads(path.read_text()), quant)
    return found


def own_configs() -> dict[str, tuple[Config, Config | None]]:
    """The configs that are written down beside this file."""
    from published_configs import CONFIGS, QUANT_FILES
    from published_wrappers import WRAPPERS

    configs = CONFIGS | WRAPPERS
    return {name: (config, QUANT_FILES.get(name)) for name, config in configs.items()}


def _in_subprocess(name: str, args: argparse.Namespace) -> list[Verdict]:
    """The verdicts on one config, from a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--roads", args.roads]
    command += [str(args.folder)] if args.folder else []
    for option in ("reader", "mlx_reader"):
        if value := getattr(args, option):
            command += [f"--{option.replace('_', '-')}", value]
    roads = args.roads.split(",")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return [Verdict(name, road, (), "WRONG", f"over {SECONDS} s") for road in roads]
    for text in done.stdout.splitlines():
        if text.startswith("[{"):
            found = [
                Verdict(**(each | {"removed": tuple(each["removed"])})) for each in json.loads(text)
            ]
            return found
    reason = " ".join(done.stderr.split())[-300:] or f"exit status {done.returncode}"
    return [Verdict(name, road, (), "WRONG", f"no answer: {reason}") for road in roads]


def _one(name: str, args: argparse.Namespace) -> None:
    """In the process of one config: judge it and print the verdicts as JSON."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    configs = configs_in(args.folder) if args.folder else own_configs()
    config, quant_file = configs[name]
    readers = [("transformers", args.reader), ("mlx", args.mlx_reader)]
    with tempfile.TemporaryDirectory() as work:
        verdicts = judge(
            config,
            name=name,
            work=Path(work),
            quant_file=quant_file,
            roads=args.roads.split(","),
            small=args.folder is None,
            readers=[(engine, python) for engine, python in readers if python],
        )
    print("\n" + json.dumps([asdict(verdict) for verdict in verdicts]))


def main() -> int:
    """Judge all configs; the exit status says whether one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of config files; default: our own")
    parser.add_argument("--only", nargs="+", help="configs whose names hold one of these")
    parser.add_argument("--roads", default=",".join(ROADS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--reader", help="an interpreter with another transformers")
    parser.add_argument("--mlx-reader", help="an interpreter with MLX-LM")
    parser.add_argument("--json", type=Path, help="write the verdicts here too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.roads.split(",")) - set(ROADS):
        parser.error(f"no such road: {', '.join(sorted(unknown))}")
    if args.one:
        _one(args.one, args)
        return 0
    names = list(configs_in(args.folder) if args.folder else own_configs())
    chosen = [n for n in names if not args.only or any(part in n for part in args.only)]
    if not chosen:
        parser.error("no config of such a name")
    started = time.perf_counter()
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(lambda name: _in_subprocess(name, args), chosen):
            for verdict in found:
                why = f" ({verdict.detail})" if verdict.detail else ""
                layers = list(verdict.removed)
                print(
                    f"{verdict.config} {verdict.road} {layers} {verdict.outcome}{why}", flush=True
                )
            verdicts += found
    count = Counter(verdict.outcome for verdict in verdicts)
    cells = ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES)
    print(f"\n{len(chosen)} configs in {time.perf_counter() - started:.0f} s: {cells}")
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in verdicts], indent=1))
    return int(count["WRONG"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
