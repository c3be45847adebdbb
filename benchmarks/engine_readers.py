"""What a serving engine computes from checkpoints, as JSON lines.

    python engine_readers.py llama.cpp|mlx|vllm TOKENS CONVERTER FOLDER ...

A line per folder: the logarithms of the probabilities after every token, or why the engine could
not read the folder. It runs in any interpreter that has the engine, and uses nothing else of the
project. TOKENS are the ids, joined by commas. llama.cpp is called through the C library inside the
package ``xllamacpp``; CONVERTER is the folder of its `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

Reader = Callable[[str, list[int]], np.ndarray]


# llama.cpp


class ModelParams(ctypes.Structure):
    """`llama_model_params`, as far as it is set here."""

    _fields_ = [
        ("pointers", ctypes.c_void_p * 2),
        ("n_gpu_layers", ctypes.c_int32),
        ("rest", ctypes.c_int32 * 63),
    ]


class ContextParams(ctypes.Structure):
    """`llama_context_params`, as far as it is set here; room is left for fields to come."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("counts", ctypes.c_int32 * 10),
        ("flash_attn_type", ctypes.c_int32),
        ("rope", ctypes.c_float * 8),
        ("callback", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("abort", ctypes.c_void_p * 2),
        ("flags", ctypes.c_bool * 4),
        ("swa_full", ctypes.c_bool),
        ("rest", ctypes.c_int64 * 16),
    ]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG: list[str] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log(level: int, text: bytes, data: Any) -> None:
    LOG.append(text.decode(errors="replace").strip())


@cache
def llama_library() -> Any:
    """The C library of llama.cpp."""
    import xllamacpp

    folder = Path(xllamacpp.__file__).parent
    library = ctypes.CDLL(str(next(folder.glob("*.so"))))
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", ModelParams, ()),
        ("llama_context_default_params", ContextParams, ()),
        ("llama_model_load_from_file", pointer, (ctypes.c_char_p, ModelParams)),
        ("llama_init_from_model", pointer, (pointer, ContextParams)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", ctypes.c_int32, (pointer,)),
        ("llama_batch_init", Batch, (ctypes.c_int32,) * 3),
        ("llama_decode", ctypes.c_int32, (pointer, Batch)),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (pointer,)),
        ("llama_batch_free", None, (Batch,)),
        ("llama_free", None, (pointer,)),
        ("llama_model_free", None, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_log, None)
    library.llama_backend_init()
    defaults = library.llama_context_default_params()
    if (defaults.n_ctx, defaults.n_batch, defaults.type_k, defaults.type_v) != (512, 2048, 1, 1):
        raise RuntimeError("the structures of this llama.cpp are laid out otherwise")
    return library


def llama_logits(gguf: Path, tokens: list[int]) -> np.ndarray:
    """By llama.cpp on the CPU, in one batch, with keys and values in float32."""
    library = llama_library()
    LOG.clear()
    model = library.llama_model_load_from_file(
        str(gguf).encode(), library.llama_model_default_params()
    )
    if not model:
        raise RuntimeError("; ".join(line for line in LOG if "error" in line) or "not loaded")
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.flash_attn_type = params.type_k = params.type_v = 0
    params.swa_full = True
    context = library.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("; ".join(LOG[-3:]))
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.logits[position] = 1, 1
        batch.seq_id[position][0] = 0
    if library.llama_decode(context, batch):
        raise RuntimeError("; ".join(LOG[-3:]))
    shape = len(tokens), library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(library.llama_get_logits(context), shape).copy()
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    return logits


def convert(folder: str, gguf: Path, converter: str) -> None:
    """Write a folder as GGUF in float32; only token ids matter, so every tokenizer is GPT-2's."""
    sys.path.insert(0, converter)
    import convert_hf_to_gguf as script
    from conversion.base import TextModel

    find = script.get_model_class

    def patched(*args: Any, **options: Any) -> Any:
        kind = find(*args, **options)
        kind.no_mtp = True
        kind.set_vocab = TextModel._set_vocab_gpt2
        kind.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        return kind

    script.get_model_class = patched
    sys.argv = ["convert", folder, "--outfile", str(gguf), "--outtype", "f32"]
    try:
        script.main()
    finally:
        script.get_model_class = find


def with_llama_cpp(converter: str) -> Reader:
    """Convert, load, compute."""

    def read(folder: str, tokens: list[int]) -> np.ndarray:
        with tempfile.TemporaryDirectory() as place:
            gguf = Path(place) / "model.gguf"
            convert(folder, gguf, converter)
            return llama_logits(gguf, tokens)

    return read


# The others


def with_mlx(folder: str, tokens: list[int]) -> np.ndarray:
    """By MLX-LM on the CPU, in float32."""
    import mlx.core as mx
    from mlx_lm.utils import load

    mx.set_default_device(mx.cpu)
    model, _ = load(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


def with_vllm(folder: str, tokens: list[int]) -> np.ndarray:
    """By vLLM in float32: it tells probabilities of the tokens of a prompt, the first excepted."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_logprobs=-1,
        block_size=32,
        enable_prefix_caching=False,
    )
    prompt = {"prompt_token_ids": [*tokens, tokens[-1]]}
    wanted = SamplingParams(prompt_logprobs=-1, max_tokens=1)
    found = engine.generate([prompt], wanted)[0].prompt_logprobs[1:]
    size = len(found[0])
    return np.array([[each[token].logprob for token in range(size)] for each in found])


def main() -> None:
    """Read every folder; a failure is told in its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=("llama.cpp", "mlx", "vllm"))
    parser.add_argument("tokens")
    parser.add_argument("converter")
    parser.add_argument("folders", nargs="+")
    args = parser.parse_args()
    tokens = [int(token) for token in args.tokens.split(",")]
    read = {"mlx": with_mlx, "vllm": with_vllm}.get(args.engine) or with_llama_cpp(args.converter)
    for folder in args.folders:
        try:
            logits = read(folder, tokens).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            found = {"log_probabilities": logits.round(7).tolist()}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print("\n" + json.dumps({"folder": folder, **found}), flush=True)


if __name__ == "__main__":
    main()
