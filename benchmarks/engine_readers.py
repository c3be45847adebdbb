"""What a serving engine computes from checkpoints, as JSON lines.

    python engine_readers.py llama.cpp|gguf|mlx|vllm TOKENS CONVERTER FOLDER ...

A line per folder: the logarithms of the probabilities after every token, or why the engine could
not read the folder. It runs in any interpreter that has the engine, and uses nothing else of the
project. TOKENS are the ids, joined by commas. llama.cpp is called through the C library inside the
package ``xllamacpp``; CONVERTER is the folder of its `convert_hf_to_gguf.py`. ``gguf`` is llama.cpp
too: a converted file stays beside its folder, with blocks for multi-token prediction if there are
any, and GGUF files are read as well.
"""

from __future__ import annotations

import argparse
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

# Of llama.h; where nothing is set, fields are run together. The ends leave room for more.
DECLARATIONS = """
struct model_params { char all[512]; };
struct context_params {
    uint32_t n_ctx, n_batch, n_ubatch, counts[10];
    int32_t flash_attn_type;
    float rope[8];
    void *evaluated[2];
    int32_t type_k, type_v;
    void *aborted[2];
    bool flags[4], swa_full;
    char rest[256];
};
struct batch {
    int32_t n_tokens, *token;
    float *embd;
    int32_t *pos, *n_seq_id, **seq_id;
    int8_t *logits;
};
void llama_log_set(void (*)(int, const char *, void *), void *);
void llama_backend_init(void);
struct model_params llama_model_default_params(void);
struct context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *, struct model_params);
void *llama_init_from_model(void *, struct context_params);
void *llama_model_get_vocab(void *);
int32_t llama_vocab_n_tokens(void *);
struct batch llama_batch_init(int32_t, int32_t, int32_t);
int32_t llama_decode(void *, struct batch);
float *llama_get_logits(void *);
void llama_batch_free(struct batch);
void llama_free(void *);
void llama_model_free(void *);
"""
LOG: list[str] = []


@cache
def llama_library() -> tuple[Any, Any, Any]:
    """What calls C, llama.cpp's library, and what it calls back, which has to live on."""
    import xllamacpp
    from cffi import FFI

    c = FFI()
    c.cdef(DECLARATIONS)
    llama = c.dlopen(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))

    @c.callback("void(int, const char *, void *)")
    def log(level: int, text: Any, data: Any) -> None:
        LOG.append(c.string(text).decode(errors="replace").strip())

    llama.llama_log_set(log, c.NULL)
    llama.llama_backend_init()
    found = llama.llama_context_default_params()
    if (found.n_ctx, found.n_batch, found.type_k, found.type_v) != (512, 2048, 1, 1):
        raise RuntimeError("the structures of this llama.cpp are laid out otherwise")
    return c, llama, log


def llama_logits(gguf: Path, tokens: list[int]) -> np.ndarray:
    """By llama.cpp in one batch, with keys and values in float32."""
    c, llama, _ = llama_library()
    LOG.clear()
    model = llama.llama_model_load_from_file(str(gguf).encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError("; ".join(line for line in LOG if "error" in line) or "not loaded")
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.flash_attn_type = params.type_k = params.type_v = 0
    params.swa_full = True
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.logits[position] = 1, 1
        batch.seq_id[position][0] = 0
    if not context or llama.llama_decode(context, batch):
        raise RuntimeError("; ".join(LOG[-3:]))
    shape = len(tokens), llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    memory = c.buffer(llama.llama_get_logits(context), 4 * shape[0] * shape[1])
    logits = np.frombuffer(memory, np.float32).reshape(shape).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return logits


def convert(folder: str, gguf: Path, converter: str, *, mtp: bool = False) -> None:
    """Write a folder as GGUF in float32; only token ids matter, so every tokenizer is GPT-2's."""
    sys.path.insert(0, converter)
    import convert_hf_to_gguf as script
    from conversion.base import TextModel

    find = script.get_model_class

    def patched(*args: Any, **options: Any) -> Any:
        kind = find(*args, **options)
        kind.no_mtp = not mtp
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


def with_gguf(converter: str) -> Reader:
    """Read a GGUF file, or convert a folder into one beside it."""

    def read(path: str, tokens: list[int]) -> np.ndarray:
        gguf = Path(path)
        if gguf.is_dir():
            config = json.loads((gguf / "config.json").read_text(encoding="utf-8"))
            gguf = Path(f"{path}.gguf")
            convert(path, gguf, converter, mtp=bool(config.get("num_nextn_predict_layers")))
        return llama_logits(gguf, tokens)

    return read


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
    parser.add_argument("engine", choices=("llama.cpp", "gguf", "mlx", "vllm"))
    parser.add_argument("tokens")
    parser.add_argument("converter")
    parser.add_argument("folders", nargs="+")
    args = parser.parse_args()
    tokens = [int(token) for token in args.tokens.split(",")]
    readers = {
        "llama.cpp": with_llama_cpp(args.converter),
        "gguf": with_gguf(args.converter),
        "mlx": with_mlx,
        "vllm": with_vllm,
    }
    read = readers[args.engine]
    for folder in args.folders:
        try:
            logits = read(folder, tokens).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            found = {"log_probabilities": logits.round(7).tolist()}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        print("\n" + json.dumps({"folder": folder, **found}), flush=True)


if __name__ == "__main__":
    main()
