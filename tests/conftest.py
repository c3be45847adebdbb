"""Tiny random models and a tokenizer, made here: no network, no downloads."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where transformers copies custom code
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
from functools import partial

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging

from llm_pruner import workflow
from llm_pruner.evaluation.cost_comparison import compare_cost
from llm_pruner.utils import logger

torch.set_num_threads(1)
settings.register_profile("loaded", deadline=None)  # a busy machine is no failure
settings.load_profile("loaded")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

WORDS = "the cat sat on a mat and saw one red bird in this old tree by our warm house".split()
N_LAYERS = 8


def items(n: int = 6) -> list[dict[str, str]]:
    """Question items over the words of the test tokenizer, of different lengths."""
    return [
        {
            "task": "words" if i % 2 else "more",
            "prompt": " ".join(WORDS[i % 5 : i % 5 + 3 + i % 4]),
            "reference": " ".join(WORDS[i % 7 + 4 : i % 7 + 6 + i % 3]),
        }
        for i in range(n)
    ]


@pytest.fixture(autouse=True)
def _log_level():
    """The command sets what the log says; a test leaves it as it was."""
    level = logger.level
    yield
    logger.setLevel(level)


def time_shortly(patch: pytest.MonkeyPatch) -> None:
    """Let reports time four tokens; tests/evaluation/test_cost_comparison.py times more."""
    short = partial(compare_cost, prompt_tokens=4, new_tokens=4)
    patch.setattr(workflow, "compare_cost", short)


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    time_shortly(monkeypatch)


@pytest.fixture
def eval_data() -> list[dict[str, str]]:
    return items()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with its own end and padding tokens and no chat template."""
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "<eos>"])
    inner.train_from_iterator([" ".join(WORDS), "Question: Answer:"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def tiny_llama(n_layers: int = N_LAYERS, **options: object) -> torch.nn.Module:
    """A random Llama whose layers differ clearly in what they add."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=2,
        **options,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_gpt2(n_layers: int = N_LAYERS) -> torch.nn.Module:
    """A random GPT-2."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=n_layers,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}
_models: dict[str, torch.nn.Module] = {}


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """One tiny model per family, fresh for every test."""
    if request.param not in _models:
        _models[request.param] = FAMILIES[request.param]()
    return copy.deepcopy(_models[request.param])


@pytest.fixture
def llama() -> torch.nn.Module:
    return tiny_llama()


def make_identity(model: torch.nn.Module, index: int) -> None:
    """Turn a layer of a tiny Llama into the identity: nothing it computes is added."""
    layer = model.model.layers[index]
    torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
