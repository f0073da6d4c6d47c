"""The benchmark workloads: token ids uniform over the vocabulary, log-normal lengths, all from one seed.

A speed does not depend on which tokens these are, but on lengths and on how much of a beginning is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastcompat.errors import UsageError
from fastcompat.rows import Status
from fastcompat.tokens import TokenSequence

# A GPU is busy for as long with this many times the prompts.
GPU_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Log-normal lengths in tokens: mean and deviation of the logarithm, then clipped."""

    mu: float
    sigma: float
    low: int
    high: int

    def draw(self, generator: np.random.Generator, size: int) -> list[int]:
        lengths = generator.lognormal(self.mu, self.sigma, size).round().astype(int)
        found: list[int] = np.clip(lengths, self.low, self.high).tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts, each with several responses."""

    n_prompts: int
    n_responses: int
    prompt: Lengths
    response: Lengths

    def sequences(
        self, vocabulary: int, *, seed: int = 0, n_prompts: int | None = None, context_length: int | None = None
    ) -> list[TokenSequence]:
        """Token sequences with ids uniform over the vocabulary; a prompt's responses follow one another.

        Under a `context_length` a prompt keeps at most three quarters of it, and a response what is left.
        """
        generator = np.random.default_rng(seed)
        found = []
        for length in self.prompt.draw(generator, n_prompts or self.n_prompts):
            prompt = generator.integers(vocabulary, size=length)
            if context_length is not None:
                prompt = prompt[: max(1, context_length * 3 // 4)]
            for n_tokens in self.response.draw(generator, self.n_responses):
                response = generator.integers(vocabulary, size=n_tokens)
                ids = np.concatenate([prompt, response]).astype(np.int32)[:context_length]
                found.append(TokenSequence(input_ids=ids, scored=np.arange(len(ids)) >= len(prompt), status=Status.OK))
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


def chosen_workloads(names: Sequence[str]) -> list[str]:
    """Names of workloads, "all" among them or not. Raises UsageError for one that there is not."""
    unknown = [name for name in names if name not in (*WORKLOADS, "all")]
    if unknown:
        raise UsageError(f"--workload {unknown[0]}: there are {', '.join(WORKLOADS)}, and all")
    return list(WORKLOADS) if "all" in names else list(dict.fromkeys(names))
