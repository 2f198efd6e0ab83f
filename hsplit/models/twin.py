"""A small twin of a model: its configuration with few and narrow layers, everything else as it is."""

from __future__ import annotations

import copy
from typing import Any

# Sizes of the twin by key. Everything else, such as scales, caps, activations and kinds of layers, stays.
_SIZES: dict[str, int] = {
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Widths.
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "dff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "block_ff_dim", "shared_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_latent_size"), 32),
    # Heads.
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("attention_head_dim", "swa_head_dim", "swa_v_head_dim", "rotary_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("kv_channels", "d_kv", "qk_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("index_n_heads", "index_num_heads"), 4),
    "index_topk": 4,
    # Recurrent layers.
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "mamba_d_ssm": 128,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    # Mixtures.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    # Embeddings of each layer.
    **dict.fromkeys(("vocab_size_per_layer_input", "ngram_vocab_size_base"), 101),
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 1,
    # Positions: texts of a proof are shorter; windows are not.
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 64),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window", "attention_chunk_size"), 4),
    **dict.fromkeys(("sliding_window_size", "attention_window_size", "local_attention"), 4),
    "original_max_position_embeddings": 32,
}
_KEY_VALUE_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads"),
    *("swa_num_key_value_heads", "num_global_key_value_heads"),
)
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "hidden_layers"),
    *("decoder_layers", "encoder_layers"),
)
LEAST_LAYERS, MOST_LAYERS = 3, 12
HEAD_WIDTH = 16


def small_twin(config: Any, least: int = LEAST_LAYERS) -> Any:
    """Make the configuration of the small twin of ``config``; transformers' own class, of the same model type.

    The first layers are kept, as many as show every kind of layer, at most ``MOST_LAYERS``.

    Args:
        config: the model's.
        least: number of layers that are kept in any case, if the model has as many.
    """
    values = copy.deepcopy(config.to_dict())
    made = type(config)(**_small(values, least))
    for name in ("dtype", "_experts_implementation"):
        if getattr(config, name, None) is not None and hasattr(made, name):
            setattr(made, name, getattr(config, name))
    return made


def _small(values: dict[str, Any], least: int) -> dict[str, Any]:
    layers = next((values[key] for key in _LAYERS if isinstance(values.get(key), int)), 0)
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == layers and layers > 1]
    kept = min(layers, max(least, _layers_to_show(lists)), MOST_LAYERS) if layers else 0
    heads = next((values[k] for k in ("num_attention_heads", "n_head", "n_heads", "num_heads") if values.get(k)), 0)
    small = {}
    for key, value in values.items():
        if key in ("transformers_version", "architectures", "torch_dtype", "dtype", "model_type"):
            continue
        if key in _LAYERS and isinstance(value, int):
            value = min(value, kept)
        elif key in _KEY_VALUE_HEADS and isinstance(value, int):
            value = 4 if value == heads else min(value, 2)
        elif isinstance(value, int) and not isinstance(value, bool) and key in _SIZES:
            value = min(value, _SIZES[key]) if value > 0 else value
        elif isinstance(value, list) and len(value) == layers and layers > 1:
            value = value[:kept]
        elif key == "per_layer_config" and isinstance(value, dict):
            value = {index: _small(own, least) for index, own in value.items() if int(index) < kept}
        elif isinstance(value, dict):
            value = _small(value, least) if "model_type" in value else _small_positions(value)
        small[key] = value
    _fit(small, values)
    return small


def _fit(small: dict[str, Any], values: dict[str, Any]) -> None:
    """Make sizes of ``small`` agree that agree in every configuration like ``values``."""
    if {"expand", "num_heads", "head_dim", "hidden_size"} <= values.keys():
        small["num_heads"] = int(small["expand"] * small["hidden_size"]) // small["head_dim"]
    if isinstance(small.get("mamba_d_ssm"), int) and isinstance(small.get("mamba_d_head"), int):
        small["mamba_n_heads"] = small["mamba_d_ssm"] // small["mamba_d_head"]
    if isinstance(small.get("d_head"), int) and "n_head" in small:
        small["d_head"] = small["d_model"] // small["n_head"]


def _layers_to_show(lists: list[list[Any]]) -> int:
    """Number of first layers among which every kind of layer is; a kind is what all lists by layer say of one."""
    kinds = [repr(kind) for kind in zip(*lists, strict=True)]
    return max((kinds.index(kind) + 1 for kind in kinds), default=0)


def _small_positions(values: dict[str, Any]) -> dict[str, Any]:
    """Fit the lists of rotary parameters to the twin's heads."""
    small: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _small_positions(value)
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            share = values.get("partial_rotary_factor", 1.0)
            value = value[: int(HEAD_WIDTH * share) // 2]
        elif key == "mrope_section" and isinstance(value, list):
            value = [4, 2, 2]
        elif key == "original_max_position_embeddings" and isinstance(value, int):
            value = min(value, _SIZES[key])
        small[key] = value
    return small
