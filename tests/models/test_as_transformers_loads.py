"""What the segments hold is what ``AutoModelForCausalLM.from_pretrained`` would hold, or it is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplit.errors import InputError
from hsplit.models.checkpoint_reader import model_fingerprint, weight_files
from hsplit.models.families import FAMILIES, LlamaFamily
from hsplit.models.lookup import find_model
from hsplit.models.spec import ModelSpec
from tests.unsplit import differences

# Of a length that windows and rotary limits of the variants lie below, within and above.
TEXTS = ([7, 3, 11, 5], [2, 9, 4, 8, 1, 6, 30, 12, 17, 3, 21, 40], [5, 22, 13, 44, 2, 35, 16, 27, 8])
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "model_type": "gpt2"}


def rope(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0} | changes,
    }


LONG = {"original_max_position_embeddings": 6, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 6}
SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama wide heads": {"head_dim": 16, "num_key_value_heads": 4},
    "llama stray window": {"sliding_window": 3},
    "llama stray kinds": {"sliding_window": 3, "layer_types": SLIDING},
    "llama stray keys": {"attn_logit_softcapping": 5.0, "use_sinks": True, "quantization_config": None},
    "llama linear": rope("linear"),
    "llama dynamic": rope("dynamic"),
    "llama yarn": rope("yarn", original_max_position_embeddings=6),
    "llama longrope": rope("longrope", **LONG),
    "llama 3": rope("llama3", **LLAMA_3),
    "llama old rope": {"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral window": {"model_type": "mistral", "sliding_window": 3},
    "mistral dynamic": {"model_type": "mistral", "sliding_window": 3} | rope("dynamic"),
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 stray window": {"model_type": "qwen2", "sliding_window": 3},
    "qwen2 window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "qwen3 kinds": {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": SLIDING[::-1],
    },
    "qwen3 longrope": {"model_type": "qwen3", "head_dim": 8} | rope("longrope", **LONG),
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"tie_word_embeddings": False},
    "gpt2 scaled": GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gpt2 unscaled": GPT2 | {"scale_attn_weights": False, "n_inner": 24, "activation_function": "relu"},
    "gpt2 stray window": GPT2 | {"sliding_window": 3},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sees later tokens": ({"is_causal": False}, r"is_causal: must be true"),
    "gpt2 sees later tokens": (GPT2 | {"is_causal": False}, r"is_causal: must be true"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config: .*\('fp8'\)"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config: .*\('gptq'\)"),
    "codes of no method": ({"quantization_config": {"load_in_4bit": True}}, r"quantization_config: "),
    "other files": ({"transformers_weights": "mine.safetensors"}, r"transformers_weights: "),
    "fused": ({"fusion_config": {"qkv": True}}, r"fusion_config: "),
    "no window": ({"model_type": "mistral", "sliding_window": 0}, r"sliding_window: must be at least 1"),
    "kinds without a window": (
        {"model_type": "qwen3", "head_dim": 8, "layer_types": SLIDING},
        r"sliding_window: must be at least 1",
    ),
    "unknown kinds": (
        {"model_type": "qwen2", "layer_types": ["full_attention"] * 2 + ["chunked_attention"]},
        r"layer_types",
    ),
    "encoder": (GPT2 | {"add_cross_attention": True}, r"add_cross_attention: must be false"),
    "heads that do not divide": ({"num_attention_heads": 5}, r"not a multiple of the number of attention heads"),
    "unknown rope": (rope("spiral"), r"config\.json"),
    "sizes by layer": ({"per_layer_config": {"1": {"intermediate_size": 24}}}, r"per_layer_config: "),
    "norms by layer": ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, r"per_layer_config: "),
    "windows by layer": (
        {"model_type": "mistral", "sliding_window": None, "per_layer_config": {"1": {"sliding_window": 3}}},
        r"per_layer_config: ",
    ),
    "layers left out": ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, r"per_layer_config: "),
}


Tensors = dict[str, Tensor]


def _others(tensors: Tensors) -> Tensors:
    """Other values under the same names."""
    return {name: torch.randn_like(value) for name, value in tensors.items()}


def _head_of(tensors: Tensors) -> tuple[str, str]:
    return "lm_head.weight", next(n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight")))


def _save(tensors: Tensors, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})


def _plain(tensors: Tensors, to: Path) -> None:
    _save(tensors, to / "model.safetensors")


def _half(tensors: Tensors, to: Path) -> None:
    _plain({name: value.bfloat16() for name, value in tensors.items()}, to)


def _index(tensors: Tensors, to: Path) -> None:
    names = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for part in set(names.values()):
        _save({name: tensors[name] for name, place in names.items() if place == part}, to / part)
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _index_with_others_beside(tensors: Tensors, to: Path) -> None:
    _index(tensors, to)
    _save(_others(tensors), to / "part-9.safetensors")


def _stale_index(tensors: Tensors, to: Path) -> None:
    _index(_others(tensors), to)
    _plain(tensors, to)


def _others_beside(tensors: Tensors, to: Path) -> None:
    _plain(tensors, to)
    for name in ("a.safetensors", "model.fp16.safetensors", "z.safetensors"):
        _save(_others(tensors), to / name)


def _bare(tensors: Tensors, to: Path) -> None:
    # A tensor that the head's name without its first part would find.
    stray = {"weight": torch.randn(48, 32)}
    _plain({name.removeprefix("model.").removeprefix("transformer."): v for name, v in tensors.items()} | stray, to)


def _prefixed_head(tensors: Tensors, to: Path) -> None:
    head, embedding = _head_of(tensors)
    prefix = embedding.partition(".")[0]
    _plain({f"{prefix}.{head}" if name == head else name: value for name, value in tensors.items()}, to)


def _own_head(tensors: Tensors, to: Path) -> None:
    head, embedding = _head_of(tensors)
    _plain(tensors | {head: torch.randn_like(tensors[embedding])}, to)


def _equal_head(tensors: Tensors, to: Path) -> None:
    head, embedding = _head_of(tensors)
    _plain(tensors | {head: tensors[embedding].clone()}, to)


def _head_alone(tensors: Tensors, to: Path) -> None:
    head, embedding = _head_of(tensors)
    _plain({head: tensors[embedding]} | {n: v for n, v in tensors.items() if n not in (head, embedding)}, to)


def _no_head(tensors: Tensors, to: Path) -> None:
    _plain({name: value for name, value in tensors.items() if name != _head_of(tensors)[0]}, to)


def _too_much(tensors: Tensors, to: Path) -> None:
    bias = next(n for n in tensors if n.endswith(("down_proj.weight", "mlp.c_proj.weight"))).replace("weight", "extra")
    _plain(tensors | {bias: torch.randn(32)}, to)


FILES: tuple[Callable[[Tensors, Path], None], ...] = (
    *(_plain, _half, _index, _index_with_others_beside, _stale_index, _others_beside, _bare, _prefixed_head),
    *(_own_head, _equal_head, _head_alone, _no_head, _too_much),
)


def tensors_of(config: Any) -> Tensors:
    """A random model's weights, a tied head left out."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tied = config.tie_word_embeddings
    state = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    return {
        name: value * 4 if value.dim() > 1 else value + torch.randn_like(value) / 4 for name, value in state.items()
    }


def saved(to: Path, keys: dict[str, Any], write: Callable[[Tensors, Path], None] = _plain) -> Path:
    """A model directory with ``keys`` in its ``config.json`` and weights as ``write`` leaves them."""
    from transformers import AutoConfig

    keys = keys if keys.get("model_type") == "gpt2" else {"model_type": "llama"} | SIZES | keys
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(keys))
    write(tensors_of(AutoConfig.from_pretrained(to)), to)
    return to


def checked(directory: Path) -> Path:
    """``directory``, unless a run with it would be refused before it starts."""
    source = find_model(str(directory))
    source.spec.targeted("all-linear")
    source.spec.check_weights()
    model_fingerprint(source.directory)
    return source.directory


@pytest.mark.parametrize("name", SERVED)
def test_every_layer_and_the_loss_are_those_of_the_unsplit_model(name: str, tmp_path: Path) -> None:
    directory = checked(saved(tmp_path / "model", SERVED[name]))
    errors = differences(directory, TEXTS, torch.float32, tmp_path / "scratch")
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("write", FILES, ids=lambda write: write.__name__.strip("_"))
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen3", "gpt2", "gpt2 untied"])
def test_whatever_the_files_the_loss_is_the_unsplit_model_s(name: str, write: Any, tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", SERVED[name], write)
    if write in (_no_head, _head_alone) and not ModelSpec.read(directory).config.tie_word_embeddings:
        with pytest.raises(InputError, match=r"^job\.model: .* the checkpoint has no tensor [\w.]+") as refused:
            checked(directory)
        assert "\n" not in str(refused.value)
        return
    errors = differences(checked(directory), TEXTS, torch.float32, tmp_path / "scratch")
    assert max(errors.values()) < 1e-5, errors


@given(name=st.sampled_from(sorted(SERVED)), write=st.sampled_from(FILES))
@settings(max_examples=30, deadline=None)
def test_configuration_and_files_together(name: str, write: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = saved(tmp_path_factory.mktemp("model"), SERVED[name], write)
    try:
        checked(directory)
    except InputError as error:
        assert str(error).startswith("job.model: ") and "\n" not in str(error)
        assert write in (_no_head, _head_alone), error
        return
    errors = differences(directory, TEXTS, torch.float32, tmp_path_factory.mktemp("scratch"))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_the_configuration_alone(name: str, tmp_path: Path) -> None:
    keys, said = REFUSED[name]
    keys = keys if keys.get("model_type") == "gpt2" else {"model_type": "llama"} | SIZES | keys
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(InputError, match=rf"^job\.model: .*{said}") as refused:
        ModelSpec.read(tmp_path).targeted("all-linear")
    assert "\n" not in str(refused.value)


def test_every_type_without_a_decoder_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    written = {kind for family in FAMILIES for kind in family.model_types}
    assert written < set(CONFIG_MAPPING)
    refused = 0
    for kind, config in CONFIG_MAPPING.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        try:
            ModelSpec.read(tmp_path)
        except InputError as error:
            assert str(error).startswith("job.model: ") and "\n" not in str(error)
            assert kind not in written
            refused += 1
        else:
            assert config in MODEL_FOR_CAUSAL_LM_MAPPING
    assert refused > 100


def test_a_wrong_layer_is_seen_at_its_place_and_in_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hsplit.models import segment

    directory = saved(tmp_path / "model", SERVED["llama"])
    monkeypatch.setattr(segment, "_window_mask", lambda window, length, device: torch.eye(length).bool()[None, None])
    errors = differences(directory, TEXTS, torch.float32, tmp_path / "scratch")
    assert errors["embedding"] == 0 and errors["layer 0"] > 1e-3 and errors["loss"] > 1e-3


def _removed(tensors: Tensors, to: Path) -> None:
    _plain({name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}, to)


def _reshaped(tensors: Tensors, to: Path) -> None:
    _plain({n: v[:-1] if "layers.1.mlp.up_proj" in n else v for n, v in tensors.items()}, to)


def _twice(tensors: Tensors, to: Path) -> None:
    _plain(tensors | {"layers.0.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"] * 2}, to)


def _no_shard(tensors: Tensors, to: Path) -> None:
    _index(tensors, to)
    (to / "part-1.safetensors").unlink()


def _distributed(tensors: Tensors, to: Path) -> None:
    _plain(tensors, to)
    _save(_others(tensors), to / "shard-00000-model-00001-of-00001.safetensors")


def _eight_bits(tensors: Tensors, to: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    scale = {name + "_scale": torch.tensor(0.01)}
    _plain(tensors | {name: (tensors[name] * 100).to(torch.float8_e4m3fn)} | scale, to)


def _codes(tensors: Tensors, to: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _plain(tensors | {name: (tensors[name] * 100).to(torch.int8)}, to)


def _adapter(tensors: Tensors, to: Path) -> None:
    _plain(tensors, to)
    (to / "adapter_config.json").write_text("{}")


def _other_name(tensors: Tensors, to: Path) -> None:
    _save(tensors, to / "llama.safetensors")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_removed, r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        (
            _reshaped,
            r"model\.layers\.1\.mlp\.up_proj\.weight has the shape \[39, 32\], by config\.json it is \[40, 32\]",
        ),
        (_twice, r"has one weight under two names: model\.layers\.0\.mlp\.up_proj\.weight and layers"),
        (_no_shard, r"there is no file .*part-1\.safetensors"),
        (_distributed, r"shard-00000-model-00001-of-00001\.safetensors is of a distributed checkpoint"),
        (_eight_bits, r"up_proj\.weight has the type F8_E4M3, and only F64, F32, F16, BF16 are read"),
        (_codes, r"up_proj\.weight has the type I8, and only F64, F32, F16, BF16 are read"),
        (_adapter, r"has an adapter beside its weights \(adapter_config\.json\)"),
        (_other_name, r"has no weights: neither .* weights under other names are not read: llama\.safetensors"),
    ],
)
def test_files_that_are_not_the_whole_model_are_refused(write: Any, said: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, {}, write)
    with pytest.raises(InputError, match=rf"^job\.model: .*{said}") as refused:
        checked(directory)
    assert "\n" not in str(refused.value)


def test_the_fingerprint_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    directory = saved(tmp_path, {}, _others_beside)
    before = model_fingerprint(directory)
    assert weight_files(directory) == [directory / "model.safetensors"]
    (directory / "a.safetensors").unlink()
    assert model_fingerprint(directory) == before


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}])
def test_attention_that_is_asked_for_what_it_does_not_know_refuses(asked: dict[str, Any]) -> None:
    from hsplit.models.packing import Packing, _packed_attention

    heads = torch.randn(1, 4, 6, 8)
    packing = Packing.of((4, 2))
    given: dict[str, Any] = {"packing": packing, "short_attention": True, "scaling": 0.5, "use_cache": False}
    _packed_attention(torch.nn.Identity(), heads, heads, heads, None, **given)
    for more, said in ((asked, next(iter(asked))), ({"is_causal": False}, "later tokens")):
        with pytest.raises(InputError, match=rf"^job\.model: Identity asks its attention for .*{said}"):
            _packed_attention(torch.nn.Identity(), heads, heads, heads, None, **given, **more)


GEMMA_2 = {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8}
GPT_OSS = {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(("keys", "asked"), [(GEMMA_2, "softcap"), (GPT_OSS, "s_aux")])
def test_a_layer_that_asks_its_attention_for_more_is_refused_by_its_plan(
    keys: dict[str, Any], asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hsplit.api import plan
    from hsplit.config import load_run_config

    monkeypatch.setattr(LlamaFamily, "model_types", LlamaFamily.model_types | {keys["model_type"]})
    (tmp_path / "config.json").write_text(json.dumps(SIZES | keys))
    overrides = [f"model={tmp_path}", "max_length=16", "base=fp32", "dtype=fp32"]
    assert load_run_config("hetero", None, overrides).job.model == str(tmp_path)
    with pytest.raises(InputError, match=rf"^job\.model: \w+ asks its attention for {asked}"):
        plan("hetero", None, overrides)


def test_weights_that_cannot_be_read_are_in_no_plan_s_way(tmp_path: Path) -> None:
    directory = saved(tmp_path, SERVED["llama tied"], _own_head)
    assert not ModelSpec.read(directory).config.tie_word_embeddings
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert ModelSpec.read(directory).config.tie_word_embeddings
    with pytest.raises(InputError, match=r"^job\.model: .*is no safetensors file"):
        ModelSpec.read(directory).check_weights()
