"""Loading a model and its tokenizer, and fingerprints that tell models apart."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.config_file import check_config, refuse_lacking_layers
from ..config.gguf_metadata import find_blocks
from ..distributed import launched_here
from ..errors import LoadError, UnsupportedModelError
from ..progress import no_foreign_bars
from ..storage.gguf_models import find_gguf, read_gguf_checkpoint, write_joined
from ..storage.safetensors_files import check_files
from ..storage.sources import INDEX_FILE, SINGLE_FILE, LocalFolder
from ..utils import (
    explain_load_failure,
    get_device,
    readable,
    regular_file,
    resolve_model_id,
    user_path,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_hashes: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, str]]
_hashes = weakref.WeakKeyDictionary()  # of a model: what shows that it changes, and its hash


def model_fingerprint(model: torch.nn.Module) -> str:
    """Short hash of a model's config and of every value of its tensors (SHA-256).

    It is computed once, and again when a tensor has been written to or replaced. Values that were
    changed behind the back of torch (``tensor.data``) are found by a sample of each tensor.
    """
    config = getattr(model, "config", None)
    text = config.to_json_string() if config is not None else ""
    marks: list[Any] = [text]
    for name, tensor in stored_tensors(model).items():
        version = object() if tensor.is_inference() else tensor._version
        marks.append((name, version, tensor.data_ptr() if not tensor.is_meta else 0))
        marks.append(_sample(tensor))
    known, found = _hashes.get(model, (None, ""))
    if known != marks:
        digest = hashlib.sha256(text.encode())
        for name, tensor in sorted(_tensors(model), key=itemgetter(0)):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_bytes_of(tensor))
        found = digest.hexdigest()[:16]
        _hashes[model] = marks, found
    return found


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if tensor.is_meta:
        return b""
    return flat[:: max(1, flat.numel() // 256)].float().cpu().numpy().tobytes()


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The values of a tensor, as something that has bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    try:
        return flat.view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError):  # packed, in a class of its own
        return flat.float().numpy()


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What ``model.state_dict()`` holds of a plain model, under the same names.

    That call itself changes models which bitsandbytes has quantised on a CPU.
    """
    found: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{path}.{leaf}".lstrip(".")] = buffer
    return found


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are stored; those that accelerate keeps on disk are read from there."""
    state = stored_tensors(model)
    yield from ((name, tensor) for name, tensor in state.items() if not tensor.is_meta)
    away = {name for name, tensor in state.items() if tensor.is_meta}
    for owner in sorted({name.rpartition(".")[0] for name in away}):
        from accelerate.utils import align_module_device

        module = model.get_submodule(owner)
        with align_module_device(module, "cpu"):
            for leaf in (*module._parameters, *module._buffers):
                name = f"{owner}.{leaf}".lstrip(".")
                if name in away:
                    yield name, getattr(module, leaf)


def load_model(
    model_id: str,
    *,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model or a wrapper around one, for evaluation, and its tokenizer.

    Args:
        model_id: ``demo``, a local folder, a GGUF file, or an id on the Hugging Face hub.
        device: where to put the model; the best device of the machine if None; ``auto`` spreads
            it over all devices with accelerate.
        dtype: ``auto`` (as stored), or ``float32``, ``bfloat16``, ``float16``.
        trust_remote_code: run code that comes with the checkpoint. Off unless asked for.

    Raises:
        LoadError: the model cannot be found or read.
    """
    spread = str(device) == "auto"
    if spread and launched_here() > 1:
        raise LoadError(
            f"device='auto' (--device auto) spreads a model over all devices of a machine, and "
            f"{launched_here()} processes are on this one: start one (--nproc_per_node 1)."
        )
    target: Any = device or get_device()
    if not spread:
        _check_device(target)
    model, tokenizer = read_model(
        model_id,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device_map="auto" if spread else None,
    )
    if not spread:
        model = model.to(target)
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def _check_device(device: Any) -> None:
    """Raise LoadError if this machine has no such device."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(
            f"Cannot put the model on device {str(device)!r}: {error} Use cpu, or a device that "
            "this machine has."
        ) from error


def read_model(
    model_id: str, *, dtype: str, trust_remote_code: bool, **placement: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; `placement` are further arguments of ``from_pretrained``.

    Raises:
        LoadError: the model cannot be found or read, or tensors of it are missing.
    """
    from transformers import AutoTokenizer

    if paths := find_gguf(model_id):
        return _read_gguf(paths, model_id, dtype=dtype, **placement)
    if readable(str(model_id)) != str(model_id):
        raise LoadError(
            f"The name of model {model_id!r} is not UTF-8, which tokenizers need: rename it, or if "
            "it is the locale that is not UTF-8, set PYTHONUTF8=1."
        )
    source, auto, _ = model_class(model_id, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        tokenizer("a b")  # what its settings make impossible is found here
        model, info = auto.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options, **placement
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes of it
        raise LoadError(explain_load_failure("model", model_id, error)) from error
    _refuse_missing(info, model_id)
    return model, tokenizer


def _refuse_missing(info: Mapping[str, Any], model_id: str) -> None:
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise LoadError(
            f"Cannot load model {model_id!r}: {len(missing)} of its tensors are not in the "
            f"checkpoint and would be random, such as {missing[0]}. It is damaged, or not the "
            "checkpoint of a causal language model."
        )


def _read_gguf(
    paths: Sequence[Path], model_id: str, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in GGUF, its weights dequantised by transformers, and its tokenizer."""
    import transformers

    checkpoint = read_gguf_checkpoint(paths, model_id)  # a damaged file is refused here
    find_blocks(checkpoint.values, checkpoint.tensors, model_id)
    quantization = getattr(transformers, "GgufConfig", None)
    if quantization is not None:
        options["quantization_config"] = quantization(dequantize=True)
    with tempfile.TemporaryDirectory() as folder:
        path = paths[0]
        if len(paths) > 1:  # transformers reads only one file
            path = Path(folder, "model.gguf")
            with path.open("wb") as target:
                write_joined(checkpoint, target)
        source, where = path.parent, {"gguf_file": path.name}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
            auto: Any = transformers.AutoModelForCausalLM
            with no_foreign_bars():
                model, info = auto.from_pretrained(
                    source, output_loading_info=True, **where, **options
                )
        except (OSError, ValueError, ImportError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise LoadError(
                f"transformers cannot read {model_id!r}, a GGUF of architecture "
                f"{checkpoint.architecture!r}, so it cannot be scored: {reason} Score the original "
                "model, or remove layers that you name (--layers), which needs no transformers."
            ) from error
    _refuse_missing(info, model_id)
    model.config._name_or_path = str(paths[0])
    return model, tokenizer


def quantization_method(model: Any) -> str | None:
    """How the weights in memory are quantised; None if they are not."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", None)
    return None if config is None else str(getattr(method, "value", method))


def model_class(model_id: str, **options: Any) -> tuple[str, Any, Any]:
    """Where a model is, the ``Auto`` class that builds it, and its config.

    The class is the one that knows the class named by ``architectures`` in the config: a wrapper
    keeps its vision part, a reward model its head. The `options` are ``trust_remote_code`` and
    ``revision``.

    Raises:
        LoadError: the config cannot be found or read.
        UnsupportedModelError: it is not the config of a decoder-only language model.
    """
    import transformers

    source = resolve_model_id(model_id)
    if find_gguf(source):
        raise LoadError(
            f"{model_id!r} is in GGUF, which has to be dequantised into memory as a whole: leave "
            "--max-memory out, or use the original model."
        )
    folder = user_path(source)
    if folder.is_dir():
        _check_folder(folder, model_id)
    try:
        if not folder.is_dir():
            values, _ = transformers.PretrainedConfig.get_config_dict(source, **options)
            check_config(values, model_id)
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except (LoadError, MemoryError):
        raise
    except Exception as error:  # whatever strange values make of it
        raise LoadError(explain_load_failure("model", model_id, error)) from error
    auto = _auto_class(config, bool(options.get("trust_remote_code")))
    if auto is None or getattr(config, "is_encoder_decoder", False):
        two = getattr(config, "is_encoder_decoder", False)
        kind = "an encoder-decoder model" if two else f"a {config.model_type} model"
        built = ", ".join(config.architectures or ()) or config.model_type
        raise UnsupportedModelError(
            f"Model {model_id!r} ({built}) is {kind}: only decoder-only language models, and "
            "image, audio or video models around one, are supported."
        )
    return source, auto, config


def _check_folder(folder: Path, model_id: str) -> None:
    """Refuse what transformers would wait for, believe, or fill up with random weights.

    Raises:
        LoadError: a file is none that can be read to its end, a header or config.json is damaged,
            or config.json counts more layers than there are.
    """
    for path in folder.iterdir():
        regular_file(path)
    source = LocalFolder(folder, model_id)
    values = check_config(source.read_json("config.json"), model_id)
    if any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        refuse_lacking_layers(check_files(source), values, model_id)


def _auto_class(config: Any, trusted: bool) -> Any:
    """The ``Auto`` class for what ``architectures`` names, or for any language model; or None."""
    import transformers

    code = getattr(config, "auto_map", None) or {}
    if trusted and code:
        names = [name for name in code if name.startswith("AutoModel")]
        names.sort(key=lambda name: name != "AutoModelForCausalLM")
        known = [getattr(transformers, name, None) for name in names]
        if any(known):
            return next(filter(None, known))
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        auto = cls and find_auto_class(type(config), cls)
        if auto is not None:
            return auto
    wrappers = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    autos = [getattr(transformers, name) for name in wrappers if hasattr(transformers, name)]
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)


def find_auto_class(config_class: type, cls: type) -> Any:
    """The ``Auto`` class of transformers that builds `cls` from its config; None without any."""
    import transformers

    first = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    names = sorted(name for name in dir(transformers) if name.startswith("AutoModelFor"))
    for name in dict.fromkeys((*first, *names, "AutoModel")):
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
        known = None if mapping is None else mapping.get(config_class, None)
        if known is not None and cls in (known if isinstance(known, tuple) else (known,)):
            return getattr(transformers, name)
    return None


def empty_model(
    model_id: str, *, trust_remote_code: bool, dtype: Any = None, revision: str | None = None
) -> Any:
    """A model built from its config alone, in its dtype or another one, without memory for weights.

    Raises:
        LoadError: the config cannot be found or read, or no model can be built from it.
    """
    import torch

    code = {"trust_remote_code": trust_remote_code}
    _, auto, config = model_class(model_id, revision=revision, **code)
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype or config.dtype, **code)
    except MemoryError:
        raise
    except Exception as error:  # whatever strange values make of it
        raise LoadError(explain_load_failure("model", model_id, error)) from error
