"""The judges of `faults.py`: what was lost or left, and whether an output or a plan is right.

None of them uses a reader of llm_pruner: stock transformers says what a model is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import torch
from fault_rooms import BESIDE, LAYERS, Case, Ended
from transformers import AutoConfig, AutoModelForCausalLM

Listing = dict[str, tuple[Any, ...]]


def listing(place: Path) -> Listing:
    """Everything in the room, the home and the temporary folder."""
    found: Listing = {}
    pending = [place / name for name in ("room", "home", "tmp") if (place / name).is_dir()]
    while pending:
        for entry in os.scandir(pending.pop()):
            name = os.path.relpath(entry.path, place)
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                found[name] = ("link", os.readlink(entry.path))
            elif stat.S_ISDIR(mode):
                found[name] = ("folder",)
                pending.append(Path(entry.path))
            elif stat.S_ISREG(mode):
                raw = Path(entry.path).read_bytes()
                found[name] = ("file", len(raw), hashlib.sha256(raw).hexdigest())
            else:
                found[name] = ("special", stat.S_IFMT(mode))
    return found


def resolved(name: str, place: Path) -> str:
    """Where a path given in the room is, relative to the place; a link at its end is itself."""
    home = str(place / "home")
    path = home + name[1:] if name == "~" or name.startswith("~/") else name
    parent, last = os.path.split(os.path.join(place / "room", path.rstrip("/") or path))
    if last in ("", ".", ".."):
        return os.path.relpath(os.path.realpath(os.path.join(parent, last)), place)
    return os.path.relpath(os.path.join(os.path.realpath(parent), last), place)


def strayed(case: Case, place: Path, before: Listing, after: Listing, ended: Ended) -> str | None:
    """What was lost, changed, or left where it should not be."""
    output = resolved(case.output, place)
    beside = tuple(f"{output}.{ending}" for ending in BESIDE)
    free = tuple(resolved(name, place) for name in case.may_change)
    replaces = "--overwrite" in case.words and ended.code == 0 and case.removed is not None

    def within(name: str, roots: tuple[str, ...]) -> bool:
        return any(name == root or name.startswith(f"{root}/") for root in roots)

    written = {f"{output}/{name}" for name in OLD_OUTPUT}
    for name, entry in before.items():
        if after.get(name) != entry and not within(name, free):
            if replaces and name in written:
                continue
            return f"{name} is {'gone' if name not in after else 'changed'}"
    asked = (output,) if ended.code == 0 and case.removed is not None else ()
    for name in after.keys() - before.keys():
        above = any(path.startswith(f"{name}/") for path in asked)
        caches = within(name, ("home/.cache", "home/.config"))
        if not (within(name, asked) or above or within(name, (*beside, *free)) or caches):
            return f"{name} is left"
    return None


OLD_OUTPUT: set[str] = set()  # what llm_pruner wrote into the base's output


def tensors_of(folder: Path) -> dict[str, str]:
    """Hash of every tensor as the files say, by name; an independent reader."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                tag = f"{entry['dtype']}{entry['shape']}".encode()
                assert name not in found, f"{name} is there twice"
                found[name] = hashlib.sha256(tag + raw[start:end]).hexdigest()
    return found


def without(tensors: dict[str, Any], removed: list[int], count: int) -> dict[str, Any]:
    """The tensors that must be left, under their new names."""
    new = {old: n for n, old in enumerate(i for i in range(count) if i not in removed)}
    found = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name, re.DOTALL)
        if match is None:
            found[name] = value
        elif int(match[2]) in new:
            found[f"{match[1]}{new[int(match[2])]}{match[3]}"] = value
    return found


def compare_bytes(source: Path, out: Path, removed: list[int]) -> str | None:
    """What is wrong with an output of an intact source, by its bytes."""
    try:
        found = tensors_of(out)
        config = json.loads((out / "config.json").read_bytes())
        wanted = json.loads((source / "config.json").read_bytes())
    except Exception as error:
        return f"the output cannot be read: {type(error).__name__}: {error}"
    if found != without(tensors_of(source), removed, LAYERS):
        return "other tensors than the source's kept ones"
    wanted["num_hidden_layers"] = LAYERS - len(removed)
    if config != wanted:
        differing = {name for name in config | wanted if config.get(name) != wanted.get(name)}
        return f"the config has other values of {sorted(differing)}"
    return None


def _stock(folder: Path) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """A model as stock transformers reads it: config, tensors, and names that it did not use."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    lacking = [*info["missing_keys"], *info["mismatched_keys"], *info.get("error_msgs", ())]
    if lacking:
        raise ValueError(f"{lacking[0]} is missing or has another shape")
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    state = {
        name: f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }
    return config, state, set(info["unexpected_keys"])


def compare_models(source: Path, out: Path, removed: list[int]) -> dict[str, str | None]:
    """What stock transformers says of the source, and of the output as the source's remainder."""
    said: dict[str, str | None] = {"source": None, "output": None}
    try:
        config, state, unused = _stock(source)
    except Exception as error:
        said["source"] = f"{type(error).__name__}: {error}"[:200]
    try:
        new_config, new_state, new_unused = _stock(out)
    except Exception as error:
        said["output"] = f"{type(error).__name__}: {error}"[:200]
        return said
    if said["source"] is not None:
        return said
    count = config["num_hidden_layers"]
    if new_config["num_hidden_layers"] != count - len(removed):
        said["output"] = f"{new_config['num_hidden_layers']} layers of {count}"
    elif new_state != without(state, removed, count):
        said["output"] = "other weights than the source's kept ones"
    elif new_unused - unused - {re.sub(r"\d+", "0", name) for name in unused} and not unused:
        said["output"] = f"tensors that no model reads: {min(new_unused)}"
    else:
        differing = [
            name
            for name in config.keys() | new_config.keys()
            if name not in ("num_hidden_layers", "layer_types")
            and _shown(config.get(name)) != _shown(new_config.get(name))
            and config.get(name) != count
        ]
        said["output"] = f"config: {sorted(differing)}" if differing else None
    return said


def _shown(value: Any) -> str:
    """A value of a config, to be compared; empty ones are alike."""
    return json.dumps(value or None, default=str, sort_keys=True)


def normalise(source: Path, target: Path) -> None:
    """The model as stock transformers reads it, written anew."""
    AutoConfig.from_pretrained(source)
    _stock(source)
    model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
    model.save_pretrained(target)


def plan_of(text: str) -> dict[str, Any]:
    """The plan that a dry run printed."""
    return json.loads(text[text.index("{") :])


def differing(plan: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """In what a plan differs from another beyond rounding."""
    if plan["remove"] != wanted["remove"]:
        return f"chose {plan['remove']} where a clean run chooses {wanted['remove']}"
    for part in ("scores", "steps", "held_out"):
        left, right = _numbers(plan.get(part)), _numbers(wanted.get(part))
        far = [a for a, b in zip(left, right, strict=False) if not abs(a - b) <= 1e-4]
        if len(left) != len(right) or far:
            return f"{part} differ from those of a clean run"
    return None


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [one for name in sorted(value) for one in _numbers(value[name])]
    if isinstance(value, list):
        return [one for entry in value for one in _numbers(entry)]
    return [float(value)] if isinstance(value, int | float) else []


def a_plan(room: Path, ended: Ended) -> str | None:
    """A plan must have been printed that can be."""
    try:
        removed = plan_of(ended.out)["remove"]
    except ValueError:
        return "no plan was printed"
    if not removed or not all(type(one) is int and 0 <= one < 8 for one in removed):
        return f"a plan that cannot be: {removed}"
    return None
