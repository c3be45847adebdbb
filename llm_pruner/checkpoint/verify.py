"""Checks that a pruned model computes what it should, in memory and reloaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config.config_file import stored_quantization
from ..config.layer_names import LayerNames
from ..errors import VerificationError
from ..model.architecture_rules import LOOSE, auto_class
from ..model.forward import computed, evaluating, input_device, keeping_state
from ..model.layer_stack import LayerStack
from ..model.loading import empty_model, model_class, quantization_method, stored_tensors
from ..model.probe import probe_inputs
from ..model.stored_names import alike_name, loading_keys, one_of_each
from ..results import PruningPlan
from ..storage.safetensors_files import Checkpoint
from ..storage.sources import LocalFolder
from ..utils import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Largest difference of logits, relative to the largest logit, that rounding explains.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
HALF_TOLERANCE = 3e-2
CACHE_TEXTS = 8
USUAL = 10  # times the original's own difference between passes with and without cache
CANNOT_HERE = (ImportError, RuntimeError)  # a library or a device that quantised weights need


def verify_removal(stack: LayerStack, removed: Sequence[int], pruned: PreTrainedModel) -> None:
    """Check in memory that `pruned` computes what the bypassed original computes.

    Passes with and without cache are compared too, unless those of the original itself differ.

    Raises:
        VerificationError: it does not.
    """
    original: Any = stack.model
    probes = probe_inputs(original)
    with evaluating(original), evaluating(pruned):
        for kind, inputs in probes.items():
            with stack.bypass(removed):
                want = _run(original, inputs)
            what = f"The pruned model and the bypassed original, given {kind},"
            _require_equal(pruned, _run(pruned, inputs), want, what)
        if getattr(original, "can_generate", lambda: True)():
            _verify_cache(original, pruned, probes["text"]["input_ids"])


def _verify_cache(original: Any, pruned: Any, ids: torch.Tensor) -> None:
    """Compare passes with and without cache, unless those of the original itself differ.

    In half precision a choice between experts, or of the tokens to attend to, may turn over in a
    single text: a cache that is wrong is so in all of them.
    """
    what, worst = "The pruned model with and without cache", None
    for shift in range(1 if original.dtype in TOLERANCE else CACHE_TEXTS):
        text = {"input_ids": ids.roll(shift, 1)}
        whole, want = _run(original, text)[:, -1], _run(pruned, text)[:, -1]
        try:
            cached = _cached_logits(original, text["input_ids"])
        except Exception as error:  # the pruned model need not do what the original cannot
            logger.info("No cache check: %s: %s", type(error).__name__, error)
            return
        if cached is None:
            return
        usual = _difference(cached, whole)
        if usual > _tolerance(original, whole):
            continue
        got = _cached_logits(pruned, text["input_ids"])
        if got is None:
            raise VerificationError("The pruned model returns no cache, though the original does.")
        allowed = max(USUAL * usual, _tolerance(original, whole))
        if _difference(got, want) <= allowed:
            return
        worst = got, want, allowed
    if worst is not None:
        _require_equal(pruned, *worst[:2], what, allowed=worst[2])


def _run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with keeping_state(model):
        return computed(model(**inputs, use_cache=False))


def verify_checkpoint(
    folder: str | Path, model: PreTrainedModel, *, unused: Collection[str] = ()
) -> None:
    """Reload a checkpoint with stock transformers and compare it with `model`.

    Args:
        folder: the checkpoint.
        model: what it should compute.
        unused: keys of tensors that transformers does not load.

    Raises:
        VerificationError: missing, unexpected or mismatched tensors, or other logits.
    """
    custom = type(model).__module__.startswith("transformers_modules")
    options: dict[str, Any] = {"dtype": model.dtype, "trust_remote_code": custom}
    stored = LocalFolder(folder).read_json("config.json")
    if quantization_method(model) and not stored_quantization(stored):  # quantised when loaded
        quantizer: Any = model
        options["quantization_config"] = quantizer.hf_quantizer.quantization_config
    reloaded = load_cleanly(folder, auto_class(model), unused, **options)
    reloaded.to(input_device(model))
    with evaluating(model), evaluating(reloaded):
        for kind, inputs in probe_inputs(model).items():
            what = f"The reloaded checkpoint and the pruned model, given {kind},"
            _require_equal(model, _run(reloaded, inputs), _run(model, inputs), what)


def verify_loading(
    folder: Path,
    checkpoint: Checkpoint,
    names: LayerNames,
    plan: PruningPlan,
    *,
    trust_remote_code: bool,
) -> None:
    """Check that a checkpoint pruned on disk loads as cleanly as its original, and runs.

    Args:
        folder: the pruned checkpoint.
        checkpoint: the original.
        names: its layers.
        plan: which of them were removed.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        VerificationError: see `load_cleanly`.
    """
    source = checkpoint.source
    name = str(source.folder or source.name)
    revision = None if source.folder else source.revision
    original = empty_model(name, trust_remote_code=trust_remote_code, revision=revision)
    there = stored_tensors(original)
    keys = loading_keys(original, one_of_each(checkpoint.tensors))
    renamed = (names.rename(key, plan.keep) for key in keys.values() if key not in there)
    unused = {name for name in renamed if name is not None}
    _, auto, _ = model_class(str(folder), trust_remote_code=trust_remote_code)
    try:
        _run_probes(load_cleanly(folder, auto, unused, trust_remote_code=trust_remote_code))
    except VerificationError as error:
        cause = error.__cause__
        if not stored_quantization(checkpoint.config) or not isinstance(cause, CANNOT_HERE):
            raise
        logger.warning(
            "The quantised output could not be reloaded on this machine, and is kept: %s",
            error.__cause__,
        )


def _run_probes(model: Any) -> None:
    """Check that a model computes finite numbers from text and what else it takes."""
    with evaluating(model):
        for kind, inputs in probe_inputs(model).items():
            try:
                finite = bool(_run(model, inputs).isfinite().all())
            except (RuntimeError, ValueError, ImportError) as error:
                raise VerificationError(
                    f"The written checkpoint does not run, given {kind}: {error} Nothing was left "
                    "behind."
                ) from error
            if not finite:
                raise VerificationError(
                    f"The written checkpoint computes NaN or infinity, given {kind}. Nothing was "
                    "left behind. If the original does not, please report this architecture."
                )


def load_cleanly(
    folder: str | Path, auto: Any, unused: Collection[str] = (), **options: Any
) -> Any:
    """The model of a written checkpoint, loaded by an Auto class of transformers.

    Keys in `unused` need not be loaded, nor those that differ only in an expert's number.

    Raises:
        VerificationError: it does not load, or tensors are missing, unexpected or mismatched.
    """
    try:
        loaded: Any = auto.from_pretrained(folder, output_loading_info=True, **options)
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        raise VerificationError(
            f"The written checkpoint does not load: {type(error).__name__}: {error} Nothing was "
            "left behind."
        ) from error
    model, info = loaded
    alike = {alike_name(key) for key in unused}
    info["unexpected_keys"] = {k for k in info["unexpected_keys"] if alike_name(k) not in alike}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise VerificationError(
                f"The written checkpoint does not reload cleanly: {len(info[kind])} {kind}, "
                f"such as {sorted(map(str, info[kind]))[0]}. Nothing was left behind."
            )
    return model


def _cached_logits(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of the last token, if the second half of `ids` is fed token by token with a cache.

    None for a model without a key-value cache.
    """
    half = ids.shape[1] // 2
    output = model(input_ids=ids[:, :half], use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        return None
    for token in ids[:, half:].unbind(1):
        cache = output.past_key_values
        output = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; infinite if shapes or masks differ.

    Some models give tokens that may not be generated the lowest number there is.
    """
    if got.shape != want.shape:
        return math.inf
    masked = want <= torch.finfo(want.dtype).min / 2
    if not torch.equal(masked, got <= torch.finfo(got.dtype).min / 2):
        return math.inf
    got, want = got.double()[~masked], want.double()[~masked]
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()


def _tolerance(model: Any, logits: torch.Tensor) -> float:
    least = LOOSE.get(model.config.model_type, 0.0)
    if quantization_method(model) is not None:  # kernels differ with the number of tokens
        least = max(least, HALF_TOLERANCE)
    return max(least, TOLERANCE.get(logits.dtype, HALF_TOLERANCE))


def _require_equal(
    model: Any, got: torch.Tensor, want: torch.Tensor, what: str, *, allowed: float = 0.0
) -> None:
    difference, allowed = _difference(got, want), max(allowed, _tolerance(model, want))
    if not difference <= allowed:  # written so that NaN fails
        raise VerificationError(
            f"{what} compute something else (relative difference {difference:.2g}, allowed "
            f"{allowed:.2g}). Nothing was written. If the weights are finite, please "
            "report this architecture."
        )
