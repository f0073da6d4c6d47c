"""The models of the engine's steps: shapes of real ones whose random weights are made on the GPU, and tiny ones.

`Llama-3.1-8B` and the mixture of experts stand here because nobody benchmarks them on a CPU.
"""

from __future__ import annotations

from typing import Any

from fastcompat.benchmark.subjects import SHAPES


def tiny() -> Any:
    """For a dry run."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def tiny_experts() -> Any:
    """For a dry run."""
    return _experts(vocab_size=300, hidden_size=32, moe_intermediate_size=16, num_experts=4, num_hidden_layers=2)


def llama_3_1_8b() -> Any:
    """Llama-3.1-8B's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def qwen3_30b_a3b_12_layers() -> Any:
    """A quarter of Qwen3-30B-A3B's layers: 8 of 128 experts a token."""
    return _experts(vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_experts=128)


def _experts(*, num_hidden_layers: int = 12, **shape: int) -> Any:
    from transformers import Qwen3MoeConfig

    real = shape["hidden_size"] > 32
    return Qwen3MoeConfig(
        intermediate_size=3 * shape["hidden_size"],
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=32 if real else 2,
        num_key_value_heads=4 if real else 1,
        head_dim=128 if real else 16,
        num_experts_per_tok=8 if real else 2,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        **shape,
    )


def register() -> None:
    """Make them known beside the benchmark's own."""
    SHAPES.update(
        {
            "tiny": tiny,
            "tiny, experts": tiny_experts,
            "Llama-3.1-8B": llama_3_1_8b,
            "Qwen3-30B-A3B, 12 layers": qwen3_30b_a3b_12_layers,
        }
    )
