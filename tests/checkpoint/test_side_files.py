"""What comes along with pruned weights: file names as repositories on the hub have them."""

from __future__ import annotations

import json

import pytest

from llm_pruner.checkpoint.side_files import LARGE, WRITTEN_ANEW, side_files
from llm_pruner.errors import LoadError
from llm_pruner.storage.sources import LocalFolder

WEIGHTS = ("model.safetensors",)
CARRIED = """
tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
tokenizer.model tokenizer.model.v3 spiece.model tekken.json qwen.tiktoken sentencepiece.bpe.model
vocab.txt vocab.bpe dict.vocab chat_template.jinja additional_chat_templates/tool_use.jinja
chat_template.json generation_config.json preprocessor_config.json processor_config.json
video_preprocessor_config.json hf_quant_config.json quantize_config.json quantization_config.json
quant_config.json recipe.yaml modeling_x.py configuration_x.py ops/kernel.cu ops/__init__.py
inference/model.py inference/configs/config_671B.json inference/requirements.txt
LICENSE LICENSE.txt LICENSE-MODEL LICENCE NOTICE Notice USE_POLICY.md THIRD_PARTY_NOTICES
README_zh.md paper.pdf figures/benchmark.png figures/logo.svg assets/demo.mp4 report_card.html
config_sentence_transformers.json sentence_bert_config.json 1_Pooling/config.json
mergekit_config.yml .gitattributes
""".split()
LEFT = """
consolidated.safetensors consolidated.safetensors.index.json params.json
pytorch_model.bin pytorch_model.bin.index.json pytorch_model-00001-of-00002.bin model.fp16.pt
tf_model.h5 flax_model.msgpack rust_model.ot 64.tflite model.gguf model.GGUF imatrix.dat
model.llamafile weights.npz weights.00.npz model.nemo model.pte model.tar.gz model.zip model.mnn
model.mnn.weight llm.rkllm model.litertlm params_shard_0.bin ndarray-cache.json mlc-chat-config.json
model.tensors model.safetensors.fp8 model.exl3 model.some-future-format genai_config.json
openvino_model.bin openvino_model.xml openvino_config.json openvino_tokenizer.xml Modelfile
onnx/config.json onnx/model.onnx onnx/model.onnx_data onnx/tokenizer.json
original/consolidated.00.pth original/params.json original/tokenizer.model
metal/model.bin alone/model_q4.onnx.data alone/README.md alone/genai_config.json
Llama.mlpackage/Data/com.apple.CoreML/weights/weight.bin Llama.mlpackage/Manifest.json
tensorrt/rank0.engine tensorrt/config.json ckpt.dcp/__0_0.distcp ckpt.dcp/meta.json
checkpoint-500/model.safetensors checkpoint-500/config.json checkpoint-500/trainer_state.json
checkpoint-600/config.json global_step100/mp_rank_00_model_states.pt latest zero_to_fp32.py
trainer_state.json training_args.bin optimizer.bin scheduler.pt rng_state_0.pth
events.out.tfevents.1700000000.host.1 runs/Jan01/hparams.yaml data.parquet
vision-lora/adapter_config.json vision-lora/adapter_model.safetensors vision-lora/notes.md
adapter_model.safetensors text_encoder/model.safetensors text_encoder/config.json
""".split()


def folder_with(tmp_path, *files: str) -> LocalFolder:
    for file in ("model.safetensors", "config.json", *files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    return LocalFolder(tmp_path)


def test_every_file_is_carried_or_named(tmp_path):
    source = folder_with(tmp_path, *CARRIED, *LEFT, *WRITTEN_ANEW[1:], ".gitignore", ".git/HEAD")
    carried, left = side_files(source, WEIGHTS)
    assert carried == sorted(CARRIED)
    assert left == sorted(LEFT)


def test_the_shards_that_are_pruned_are_in_neither_list(tmp_path):
    source = folder_with(tmp_path, "a-1.safetensors", "a-2.safetensors", "b.safetensors", "x.txt")
    shards = ["a-1.safetensors", "a-2.safetensors"]
    assert side_files(source, shards) == (["x.txt"], ["b.safetensors", "model.safetensors"])


def test_without_safetensors_nothing_is_pruned_on_disk_and_the_lists_stand(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "vocab.txt").write_bytes(b"")
    assert side_files(LocalFolder(tmp_path), ()) == (["vocab.txt"], ["pytorch_model.bin"])


def test_modules_of_sentence_transformers_keep_their_weights(tmp_path):
    modules = ["2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"]
    modules += ["1_Pooling/config.json", "parts/3_Norm/any.thing"]
    other = ["0_Transformer/model.safetensors", "4_Dense/model.safetensors", "20_Dense/model.bin"]
    source = folder_with(tmp_path, *modules, *other)
    kinds = "sentence_transformers.models."
    entries = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kinds}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kinds}Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense/", "type": f"{kinds}Dense"},
        {"idx": 3, "name": "3", "path": "parts/3_Norm", "type": f"{kinds}Normalize"},
        {"idx": 4, "name": "4", "path": "0_Transformer", "type": f"{kinds}Transformer"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    assert side_files(source, WEIGHTS) == (sorted([*modules, "modules.json"]), sorted(other))


def test_modules_that_cannot_be_read_are_an_error(tmp_path):
    source = folder_with(tmp_path, "modules.json")
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(LoadError, match=r"'modules.json' of checkpoint .* cannot be used"):
        side_files(source, WEIGHTS)


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", '"abc"', "3", "null"])
def test_another_file_of_that_name_names_no_modules(tmp_path, text):
    source = folder_with(tmp_path, "modules.json", "2_Dense/model.safetensors")
    (tmp_path / "modules.json").write_text(text)
    assert side_files(source, WEIGHTS) == (["modules.json"], ["2_Dense/model.safetensors"])


def test_a_folder_with_a_large_file_of_no_known_kind_stays_behind(tmp_path):
    source = folder_with(tmp_path, "new/model.xyz", "new/config.json", "old/a.xyz", "old/b.json")
    with (tmp_path / "new/model.xyz").open("wb") as file:
        file.truncate(LARGE + 1)
    assert side_files(source, WEIGHTS) == (
        ["old/b.json"],
        ["new/config.json", "new/model.xyz", "old/a.xyz"],
    )
