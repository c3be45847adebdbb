"""Pruned checkpoints: written, verified by reloading, published; and MergeKit recipes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from .architectures import LOOSE, as_stored, auto_class, loadable_config
from .card import CARD_FILE, card_text, original_card
from .configs import COUNT_FIELDS, text_config
from .errors import InvalidPlanError, VerificationError
from .layers import LayerStack
from .likelihood import evaluating, input_device, position_limit
from .output import PLAN_FILE, staged_output, write_atomically
from .results import PruningPlan, check_layers
from .utils import count_bytes, logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_TOKENS = 16
SIDE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Largest difference of logits, relative to the largest logit, that rounding explains.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
HALF_TOLERANCE = 3e-2


def save_checkpoint(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write a complete plain checkpoint with its plan, reload it, and only then publish it.

    Raises:
        OutputError: it cannot be written.
        VerificationError: it does not load cleanly, or computes something else than `pruned`.
    """
    need = count_bytes(pruned)
    with staged_output(output_dir, overwrite=overwrite, need=need) as stage:
        write_model(pruned, stage)
        tokenizer.save_pretrained(stage)
        _carry_along(pruned, stage)
        plan.save(stage / PLAN_FILE)
        card = card_text(plan, original_card(plan.model_id))
        (stage / CARD_FILE).write_text(card, encoding="utf-8")
        verify_checkpoint(stage, pruned)


def _carry_along(model: Any, stage: Path) -> None:
    """Copy what else the original checkpoint holds and a pruned one needs: processor settings."""
    from transformers.utils.hub import cached_file

    source = getattr(model.config, "_name_or_path", "")
    for name in SIDE_FILES if source else ():
        found = cached_file(
            source,
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if found and not (stage / name).exists():
            shutil.copyfile(found, stage / name)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, with a config and weights that load as the model that was saved."""
    with as_stored(model):
        model.save_pretrained(folder)
    config = loadable_config(model)
    if config is not model.config:
        config.save_pretrained(folder)
    _drop_missing_code(folder / "config.json")


def _drop_missing_code(path: Path) -> None:
    """Leave no reference to code that was not written: such a checkpoint would not load.

    That is code nobody trusted, so that the class of transformers was used instead, or code of
    classes for other tasks.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    code = config.get("auto_map") or {}
    there = {
        name: reference
        for name, reference in code.items()
        if not isinstance(reference, str)  # a tokenizer's, which is written by itself
        or "--" in reference  # in another repository
        or (path.parent / f"{reference.rpartition('.')[0]}.py").exists()
    }
    if there != code:
        config["auto_map"] = there
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify_removal(stack: LayerStack, removed: Sequence[int], pruned: PreTrainedModel) -> None:
    """Check in memory that `pruned` computes what the bypassed original computes.

    The cached forward is compared with the uncached one too, unless the original itself
    differs there.

    Raises:
        VerificationError: it does not; the message says by how much.
    """
    original: Any = stack.model
    ids = _probe(pruned)
    with evaluating(original), evaluating(pruned):
        with stack.bypass(removed):
            want = original(input_ids=ids, use_cache=False).logits
        got = pruned(input_ids=ids, use_cache=False).logits
        _demand_equal(pruned, got, want, "The pruned model and the bypassed original")
        whole = original(input_ids=ids, use_cache=False).logits[:, -1]
        try:
            cached = _cached_logits(original, ids)
        except Exception as error:  # whatever the original cannot do, the pruned one need not
            logger.info("No cache check: %s: %s", type(error).__name__, error)
            return
        if cached is None or _difference(cached, whole) > _tolerance(original, whole):
            return
        stepwise = _cached_logits(pruned, ids)
        if stepwise is None:
            raise VerificationError("The pruned model returns no cache, though the original does.")
        _demand_equal(pruned, stepwise, got[:, -1], "The pruned model with and without cache")


def verify_checkpoint(folder: str | Path, model: PreTrainedModel) -> None:
    """Reload a checkpoint with stock transformers and compare it with `model`.

    Raises:
        VerificationError: missing, unexpected or mismatched tensors, or other logits.
    """
    custom = type(model).__module__.startswith("transformers_modules")
    reloaded = load_cleanly(folder, auto_class(model), dtype=model.dtype, trust_remote_code=custom)
    ids = _probe(model)
    reloaded.to(input_device(model))
    with evaluating(model), evaluating(reloaded):
        want = model(input_ids=ids, use_cache=False).logits
        got = reloaded(input_ids=ids, use_cache=False).logits
    _demand_equal(model, got, want, "The reloaded checkpoint and the pruned model")


def load_cleanly(folder: str | Path, auto: Any, **options: Any) -> Any:
    """The model of a written checkpoint, loaded by an Auto class of transformers.

    Raises:
        VerificationError: it does not load, or tensors are missing, unexpected or mismatched.
    """
    try:
        loaded: Any = auto.from_pretrained(folder, output_loading_info=True, **options)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise VerificationError(
            f"The written checkpoint does not load: {type(error).__name__}: {error} Nothing was "
            "left behind."
        ) from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise VerificationError(
                f"The written checkpoint does not reload cleanly: {len(info[kind])} {kind}, "
                f"such as {sorted(map(str, info[kind]))[0]}. Nothing was left behind."
            )
    return model


def write_mergekit_yaml(
    stack: LayerStack, layers: Sequence[int], yaml_path: str | Path, model_id: str
) -> None:
    """Write a MergeKit passthrough recipe that keeps all layers of `model_id` but `layers`.

    ``layer_range`` is half open: [0, 3] keeps layers 0, 1, 2. The dtype is the model's own.

    Raises:
        InvalidPlanError: indices that do not fit the model, or none.
        OutputError: the file cannot be written.
    """
    removed = check_layers(layers, len(stack))
    if not removed:
        raise InvalidPlanError("layers=[]: a recipe that removes nothing is no recipe.")
    _warn_of_mergekit(stack, removed)
    edges = [-1, *removed, len(stack)]
    slices = [
        {"sources": [{"model": model_id, "layer_range": [left + 1, right]}]}
        for left, right in pairwise(edges)
        if right - left > 1
    ]
    dtype = str(next(stack.model.parameters()).dtype).removeprefix("torch.")
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    write_atomically(yaml_path, yaml.safe_dump(recipe, sort_keys=False))


def _warn_of_mergekit(stack: LayerStack, removed: Sequence[int]) -> None:
    """MergeKit sets the layer count in the config and nothing else: say so where it matters."""
    old, new = (
        text_config(model.config).to_dict() for model in (stack.model, stack.remove(removed))
    )
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    beyond = [name for name in changed if name not in COUNT_FIELDS]
    if beyond:
        logger.warning(
            "MergeKit will write a wrong config for this recipe, or stop before it writes one: it "
            "sets the layer count alone, and %s must change too. Use the config.json of the pruned "
            "checkpoint, and its tokenizer if MergeKit stopped.",
            ", ".join(beyond),
        )


def _probe(model: Any) -> torch.Tensor:
    """A fixed sequence of tokens within the model's vocabulary and length, (1, tokens)."""
    config = model.config.get_text_config(decoder=True)
    length = min(PROBE_TOKENS, position_limit(model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    return ids.to(input_device(model))


def _cached_logits(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of the last token, the last half of `ids` fed one by one through the cache.

    None for a model without a key-value cache.
    """
    half = ids.shape[1] // 2
    output = model(input_ids=ids[:, :half], use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        return None
    for position in range(half, ids.shape[1]):
        output = model(
            input_ids=ids[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()


def _tolerance(model: Any, logits: torch.Tensor) -> float:
    least = LOOSE.get(model.config.model_type, 0.0)
    return max(least, TOLERANCE.get(logits.dtype, HALF_TOLERANCE))


def _demand_equal(model: Any, got: torch.Tensor, want: torch.Tensor, who: str) -> None:
    difference, allowed = _difference(got, want), _tolerance(model, want)
    if not difference <= allowed:  # written so that NaN fails
        raise VerificationError(
            f"{who} compute different logits (relative difference {difference:.2g}, allowed "
            f"{allowed:.2g}). Nothing was written. If the weights are finite, please "
            "report this architecture."
        )
