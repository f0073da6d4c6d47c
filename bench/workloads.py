"""The benchmark workloads and model shapes: seeded token ids, log-normal lengths, real architectures, random weights.

A speed does not depend on the weights; the comparison of losses does, so weights are drawn wide enough that
distributions are peaked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastcompat.response import Status
from fastcompat.tokenization import TokenSequence


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Log-normal lengths: mean and deviation of the logarithm, then clipped."""

    mu: float
    sigma: float
    low: int
    high: int

    def draw(self, generator: np.random.Generator, size: int) -> list[int]:
        lengths = generator.lognormal(self.mu, self.sigma, size).round().astype(int)
        return np.clip(lengths, self.low, self.high).tolist()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts, each with several responses."""

    n_prompts: int
    n_responses: int
    prompt: Lengths
    response: Lengths

    def sequences(self, vocabulary: int, *, seed: int = 0, n_prompts: int | None = None) -> list[TokenSequence]:
        """Token sequences with ids uniform over the vocabulary; a prompt's responses follow one another."""
        generator = np.random.default_rng(seed)
        found = []
        for length in self.prompt.draw(generator, n_prompts or self.n_prompts):
            prompt = generator.integers(vocabulary, size=length)
            for n_tokens in self.response.draw(generator, self.n_responses):
                ids = np.concatenate([prompt, generator.integers(vocabulary, size=n_tokens)]).astype(np.int32)
                scored = np.arange(len(ids)) >= length
                found.append(TokenSequence(input_ids=ids, scored=scored, status=Status.OK))
        return found


_SHORT_PROMPT = Lengths(mu=3.6, sigma=0.6, low=8, high=400)
_ANSWER = Lengths(mu=5.3, sigma=0.6, low=8, high=900)

WORKLOADS = {
    "generators": Workload(n_prompts=3, n_responses=16, prompt=_SHORT_PROMPT, response=_ANSWER),
    "unshared": Workload(n_prompts=48, n_responses=1, prompt=_SHORT_PROMPT, response=_ANSWER),
    "context": Workload(
        n_prompts=4,
        n_responses=8,
        prompt=Lengths(mu=7.2, sigma=0.3, low=800, high=2500),
        response=Lengths(mu=4.8, sigma=0.5, low=16, high=400),
    ),
    "reasoning": Workload(
        n_prompts=2,
        n_responses=4,
        prompt=Lengths(mu=5, sigma=0.5, low=32, high=600),
        response=Lengths(mu=8, sigma=0.4, low=1000, high=8000),
    ),
}


def smollm2_135m() -> Any:
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def qwen2_5_0_5b() -> Any:
    """Qwen2.5-0.5B's shape."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


SHAPES = {"SmolLM2-135M": smollm2_135m, "Qwen2.5-0.5B": qwen2_5_0_5b}


def random_model(shape: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A model of a shape with random weights whose next-token distributions are peaked."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        model.get_input_embeddings().weight.normal_(0.0, 3.0 * model.config.hidden_size**-0.5)
    return model.eval()
