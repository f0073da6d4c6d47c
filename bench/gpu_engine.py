"""The whole scorer on a GPU beside the loops that everybody writes, as `end_to_end.py` does on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from end_to_end import length_sorted_loop, packed, padded_loop, useful_flops
from gpu_timing import Finding, milliseconds
from workloads import SHAPES, WORKLOADS, random_model

from fastcompat.engine import CPU_TOKEN_BUDGET, CUDA_TOKEN_BUDGET
from fastcompat.model import CausalLM, wrap

# Prompts of the `generators` workload, 16 responses each: seconds for the slowest scorer.
PROMPTS = {"SmolLM2-135M": 64, "Qwen2.5-0.5B": 24}
ROUNDS = 3
PADDED_TOKENS = 16384  # of a batch of the length-sorted loop


def tiny() -> object:
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


@torch.no_grad()
def engine_beside_hugging_face(device: str) -> Iterator[Finding]:
    """Seconds, tokens a second and efficiency (ARCHITECTURE.md) of each scorer, interleaved; losses against float32."""
    SHAPES["tiny"] = tiny
    for shape, n_prompts in ({"tiny": 1} if device == "cpu" else PROMPTS).items():
        yield measure(shape, n_prompts, device)


def measure(shape: str, n_prompts: int, device: str) -> Finding:
    # Drawn on the GPU: half a billion normal numbers take a CPU many seconds.
    with torch.device(device):
        hugging_face, ours, float32 = random_model(shape), random_model(shape), random_model(shape).float()
    hugging_face.set_attn_implementation("sdpa")
    ours = wrap(shape, ours)
    sequences = WORKLOADS["generators"].sequences(ours.vocabulary, n_prompts=n_prompts)
    budget = CPU_TOKEN_BUDGET if device == "cpu" else CUDA_TOKEN_BUDGET
    scorers: dict[str, Callable[[], np.ndarray]] = {
        "Hugging Face, padded batches of 8, full logits": lambda: padded_loop(hugging_face, sequences),
        "Hugging Face, length-sorted, response logits only": lambda: length_sorted_loop(
            hugging_face, sequences, token_budget=PADDED_TOKENS
        ),
        "fastcompat": lambda: packed(ours, sequences, token_budget=budget),
    }
    exact = packed(wrap(shape, float32), sequences, token_budget=budget)
    losses = {name: scorer() for name, scorer in scorers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    rates = []
    for _ in range(1 if device == "cpu" else ROUNDS):
        rates.append(product_rate(ours, device))
        for name, scorer in scorers.items():
            began = time.perf_counter()
            scorer()  # ends with its losses on the CPU
            seconds[name].append(time.perf_counter() - began)
    n_tokens = sum(len(sequence.input_ids) for sequence in sequences)
    flops, rate = useful_flops(ours, sequences), statistics.median(rates)
    timings = {
        name: {
            "ms": 1e3 * statistics.median(values),
            "rounds": [1e3 * value for value in values],
            "tokens/s": n_tokens / statistics.median(values),
            "of the product's rate": flops / statistics.median(values) / rate,
        }
        for name, values in seconds.items()
    }
    return {
        "case": f"{shape} shape, bf16, {len(sequences)} responses of {n_prompts} prompts, {n_tokens} tokens",
        "timings": timings,
        "product_tflop_per_s": rate / 1e12,
        "useful_tflop": flops / 1e12,
        "errors": {name: {"loss": float(np.abs(values - exact).max())} for name, values in losses.items()},
    }


def product_rate(model: CausalLM, device: str) -> float:
    """FLOP/s of `F.linear` with 2,048 tokens through the model's own MLP up-projection."""
    weight = model.body.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    x = torch.randn(2048, weight.shape[1], device=device).to(weight)
    repeats = 1 if device == "cpu" else 20

    def products() -> None:
        for _ in range(repeats):
            F.linear(x, weight)

    milliseconds(products, device)
    return 2.0 * 2048 * weight.numel() * repeats / (1e-3 * milliseconds(products, device))
