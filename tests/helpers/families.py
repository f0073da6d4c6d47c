"""Small models of every supported family: real architectures, random weights, peaked distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 320

_LLAMA_SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**(_LLAMA_SHAPE | changes)))


def _qwen2(**changes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**(_LLAMA_SHAPE | changes)))


def _qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**(_LLAMA_SHAPE | {"head_dim": 16} | changes)))


def _gemma2(**changes: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 20, "num_hidden_layers": 4}
    return Gemma2ForCausalLM(Gemma2Config(**(_LLAMA_SHAPE | shape | changes)))


def _gemma3(**changes: Any) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 20, "num_hidden_layers": 7}
    return Gemma3ForCausalLM(Gemma3TextConfig(**(_LLAMA_SHAPE | shape | changes)))


def _gemma4(**changes: Any) -> Any:
    """Full layers have wider heads and fewer of keys, whose unnormalised selves are the values."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    shape = {
        "head_dim": 16,
        "global_head_dim": 40,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 24,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    }
    return Gemma4ForCausalLM(Gemma4TextConfig(**(_LLAMA_SHAPE | shape | changes)))


def _gemma4_edge(**changes: Any) -> Any:
    """As E2B and E4B: inputs for every layer; the upper layers have keys and values of those below, and wider MLPs."""
    shape = {
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": changes.get("vocab_size", VOCABULARY),
    }
    return _gemma4(**(shape | changes))


def _mistral(**changes: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**(_LLAMA_SHAPE | {"sliding_window": 24} | changes)))


def _phi3(**changes: Any) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**(_LLAMA_SHAPE | {"sliding_window": 40} | changes)))


def _phi3_longrope(**changes: Any) -> Any:
    quarter = 48 // 4 // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * k for k in range(quarter)],
        "long_factor": [2.0 + 0.5 * k for k in range(quarter)],
        "original_max_position_embeddings": 64,
    }
    return _phi3(rope_parameters=rope, original_max_position_embeddings=64, **changes)


def _olmo2(**changes: Any) -> Any:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(Olmo2Config(**(_LLAMA_SHAPE | changes)))


def _gpt_neox(**changes: Any) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {key: value for key, value in _LLAMA_SHAPE.items() if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(shape | {"rotary_pct": 0.5} | changes)))


def _gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(**(shape | changes)))


def _mixtral(**changes: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**(_LLAMA_SHAPE | {"num_local_experts": 4} | changes)))


def _qwen3_moe(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(_LLAMA_SHAPE | shape | changes)))


def _cohere(**changes: Any) -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**(_LLAMA_SHAPE | {"logit_scale": 0.8} | changes)))


def _granite(**changes: Any) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    shape = {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 4.0,
    }
    return GraniteForCausalLM(GraniteConfig(**(_LLAMA_SHAPE | shape | changes)))


def _gpt_oss(**changes: Any) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "num_hidden_layers": 4,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return GptOssForCausalLM(GptOssConfig(**(_LLAMA_SHAPE | shape | {"rope_parameters": rope} | changes)))


def _starcoder2(**changes: Any) -> Any:
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    return Starcoder2ForCausalLM(
        Starcoder2Config(**(_LLAMA_SHAPE | {"sliding_window": 24, "use_bias": True} | changes))
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "Llama": _llama,
    "Llama-3.1-Minitron (free head width)": lambda **c: _llama(head_dim=20, **c),
    "Llama-3 rope": lambda **c: _llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        **c,
    ),
    "SmolLM2 (tied head)": lambda **c: _llama(tie_word_embeddings=True, **c),
    "Qwen2": _qwen2,
    "Qwen2 (sliding window in upper layers)": lambda **c: _qwen2(
        use_sliding_window=True, sliding_window=24, max_window_layers=1, **c
    ),
    "Qwen3": _qwen3,
    "Gemma-2": _gemma2,
    "Gemma-3": _gemma3,
    "Gemma-4 (a head width per layer)": _gemma4,
    "Gemma-4 (shared keys, inputs per layer)": _gemma4_edge,
    "Mistral": _mistral,
    "Phi-3": _phi3,
    "Phi-3 (LongRoPE)": _phi3_longrope,
    "OLMo-2": _olmo2,
    "GPT-NeoX": _gpt_neox,
    "GPT-2": _gpt2,
    "Mixtral": _mixtral,
    "Qwen3-MoE": _qwen3_moe,
    "Cohere (logit scale)": _cohere,
    "Granite (logit scale)": _granite,
    "gpt-oss (sinks)": _gpt_oss,
    "StarCoder2": _starcoder2,
}


def small_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family whose next-token distributions are peaked (losses far above log V occur)."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter.shape[-1]
                parameter.normal_(0.0, 1.3 * fan_in**-0.5)
            elif "norm" in name or "ln_" in name or "layernorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.1)
        # A wide head (or embedding, where tied) makes peaked rows.
        model.get_output_embeddings().weight.normal_(0.0, 4.0 * model.get_output_embeddings().weight.shape[1] ** -0.5)
    return model.to(dtype).eval()
