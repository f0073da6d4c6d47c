"""Any configuration class of transformers, made small: the same kind of model with some ten thousand parameters.

Lengths at which something changes (a window, a chunk, a number of keys that are looked at) become `WINDOW`: more tokens
than the probe has and fewer than a row, so that what only shows beyond them would show as a wrong figure.
"""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 960  # the small tokenizers' and some more
WINDOW = 24
LENGTH = 256

_BY_SIZE = {
    32: """
        hidden_size d_model n_embd dim_model emb_dim embedding_size embed_dim word_embed_proj_dim
        embedding_dim lru_width input_embedding_size output_embedding_size backbone_hidden_size
        hidden_size_global attention_hidden_size input_size ple_embed_dim pronunciation_vocab_size
        shape_vocab_size pronunciation_embed_dim shape_embed_dim
    """,
    48: """
        intermediate_size ffn_dim n_inner dim_ff dff feed_forward_size d_inner ffn_hidden_size
        decoder_ffn_dim encoder_ffn_dim dense_intermediate_size intermediate_size_mlp
    """,
    16: """
        moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_intermediate_size shared_experts_intermediate_size global_head_dim index_head_dim qk_head_dim
        kv_lora_rank q_lora_rank o_lora_rank gated_norm_rank hc_lowrank laurel_rank
    """,
    8: """
        head_dim d_kv dim_head attention_head_size d_head kv_channels swa_head_dim linear_head_dim
        qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim linear_key_head_dim linear_value_head_dim
        hidden_size_per_layer_input router_hidden_size d_rel mamba_n_heads mamba_num_heads n_mamba_heads
        mamba_d_head mamba_head_dim mamba_headdim mamba_d_state ssm_state_size state_size mamba_dt_rank
        time_step_rank split_ngram_parts make_ngram_vocab_size_divisible_by
    """,
    4: """
        num_hidden_layers n_layer n_layers num_layers num_blocks num_attention_heads n_head n_heads
        num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads
        index_block_size index_topk_blocks num_experts num_local_experts n_routed_experts moe_num_experts
        zero_expert_num prompt_length prompt_types segment_types
    """,
    2: """
        decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_layers_per_stack
        linear_num_key_heads linear_num_value_heads index_n_heads num_key_value_heads
        num_global_key_value_heads kv_n_heads swa_num_key_value_heads num_kv_heads num_experts_per_tok
        num_experts_per_token moe_topk moe_k top_k_experts moe_top_k max_window_layers num_dense_layers
        sliding_window_pattern layer_group_size
    """,
    1: """
        moe_num_shared_experts n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace
        moe_layer_start_index num_expert_group
    """,
    WINDOW: """
        sliding_window attention_chunk_size window_size floor_scale index_topk attention_window_size
        sliding_window_size local_attention keep_window_size local_attention_window_len rel_extent
        log_scaling_n_floor original_max_position_embeddings
    """,
    LENGTH: """
        max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions
        context_length
    """,
    VOCABULARY: """
        vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size
    """,
    512: """
        ngram_vocab_size_base encoder_hash_byte_group_vocab
    """,
}
_SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_TOKEN = re.compile(r"(token_id|token_index|_token_ids?)$")

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_EVERY_HEAD = {"num_key_value_heads": 4}
# What a type needs beside smaller numbers, because its default lacks it or because its parts must agree.
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"), _EVERY_HEAD),
    "bart": {"is_decoder": True, "is_encoder_decoder": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": _EVERY_HEAD | {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "layer_types": _ALTERNATING,
    },
    "dots3_note_text": _EVERY_HEAD | {"per_layer_config": {}, "use_dsa": True, "use_sliding_window": False},
    "esm": {"pad_token_id": 1, "vocab_size": VOCABULARY},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": _ALTERNATING,
        "intermediate_size": [32, 48, 64, 48],
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"layer_types": _ALTERNATING, "global_head_dim": 512},
    "gemma4_unified_text": {"layer_types": _ALTERNATING, "global_head_dim": 16},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "expand": 2, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "mistral4": _EVERY_HEAD | {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 24,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [16, 16],
    },
    "zamba": {
        "num_hidden_layers": 8,
        "layers_block_type": [*["linear_attention", "linear_attention", "hybrid"] * 2, "linear_attention", "hybrid"],
    },
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Parts that a default needs to exist at all.
_NEEDED_AT_ONCE = ("text_config", "attn_config")


def small_config(config_class: Any, **changes: Any) -> Any:
    """A small one of this class; `changes`: values that it must have. Raises what the class raises for its values."""
    own = _CHANGES.get(config_class.model_type, {}) | changes
    default = config_class(**{name: own[name] for name in _NEEDED_AT_ONCE if name in own})
    given = _small_values(default.to_dict())
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "original_max_position_embeddings" in rope and rope.get("rope_type") != "longrope":
        given["rope_parameters"] = rope | {"original_max_position_embeddings": WINDOW}
    parts = {
        name: small_config(type(part), **own.get(name, {}))
        for name in getattr(config_class, "sub_configs", None) or {}
        if hasattr(part := getattr(default, name, None), "to_dict")
    }
    return config_class(**(given | own | parts))


def _small_values(values: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration as a dictionary what must be smaller; what is 0 stays so."""
    found = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if name in _SIZES:
            found[name] = _SIZES[name] if value else 0
        elif _TOKEN.search(name) and value >= VOCABULARY:
            found[name] = 5
    return found
