"""What is computed from scores, one function a metric. NumPy only.

Dimension key: P prompts, G generators, B bootstrap draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Bootstrap weights held at once: 128 MiB.
WEIGHTS_PER_STEP = 1 << 24


def clustered_bootstrap_means(
    numerator: FloatArray, denominator: FloatArray, *, draws: int = 1000, seed: int = 0
) -> FloatArray:
    """[B, G] bootstrap replicates of the ratios sum_p numerator / sum_p denominator, prompts drawn with replacement.

    numerator, denominator: [P, G], a generator's sums within each prompt, 0 where it did not answer. The same draw of
    prompts serves every generator, so that replicates can be compared pairwise. Prompts get independent Poisson(1)
    weights, which is the bootstrap's multinomial in the limit of many prompts (Chamandy et al. 2012, "Estimating
    Uncertainty for Massive Data Streams") and needs no resampled copy. NaN where a draw leaves a generator nothing.
    """
    generator = np.random.default_rng(seed)
    n_prompts, n_generators = numerator.shape
    replicates = np.empty((draws, n_generators))
    step = max(1, WEIGHTS_PER_STEP // max(n_prompts, 1))
    for begin in range(0, draws, step):
        rows = min(step, draws - begin)
        weights = generator.poisson(1.0, size=(rows, n_prompts)).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            replicates[begin : begin + rows] = (weights @ numerator) / (weights @ denominator)
    return replicates
