"""Spearman's rank correlation of several metrics with one outcome, and how sure it is. NumPy only.

Dimension key: K metrics, G generators, M permutations, B bootstrap draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

# Up to this many generators every permutation is looked at: 8! = 40,320.
MAX_EXACT = 8
# Numbers in one block of permutations or draws.
_BLOCK = 1 << 21


def average_ranks(values: ArrayLike) -> FloatArray:
    """[G] ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def spearman(metrics: ArrayLike, outcome: ArrayLike) -> FloatArray:
    """[K] rho: Pearson's correlation of average ranks, -1 to 1; NaN where a metric or the outcome is constant.

    metrics: [K, G], outcome: [G], all finite.
    """
    x, y = _deviations(metrics), _deviations(outcome)[0]
    return _correlation(x @ y, (x * x).sum(axis=1), y @ y)


def permutation_p(metrics: ArrayLike, outcome: ArrayLike, *, permutations: int = 99_999, seed: int = 0) -> FloatArray:
    """[K] two-sided p of rho under exchangeability: how often a permuted outcome gives |rho| at least as large.

    Up to `MAX_EXACT` generators over all G! permutations; beyond, (b + 1) / (m + 1) for b of m random ones (Phipson and
    Smyth 2010, "Permutation p-values should never be zero"), the same for every metric. NaN where rho is. Sums are of
    whole numbers, so that ties with the observed rho are ties. metrics: [K, G], outcome: [G].
    """
    x, y = _deviations(metrics), _deviations(outcome)[0]
    observed = np.abs(x @ y)
    exact = len(y) <= MAX_EXACT
    blocks = _all_permutations(y) if exact else _random_permutations(y, permutations, np.random.default_rng(seed))
    beyond, total = np.zeros(len(x)), 0
    for block in blocks:
        beyond += (np.abs(block @ x.T) >= observed).sum(axis=0)
        total += len(block)
    p = beyond / total if exact else (beyond + 1) / (total + 1)
    return np.where(np.isnan(spearman(metrics, outcome)), np.nan, p)


def bootstrap_interval(
    metrics: ArrayLike, outcome: ArrayLike, *, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """([K], [K]) percentile interval of rho over generators drawn with replacement, the same draws for every metric.

    It says how rho would vary with other generators like these, not with other responses. With few it is wide: rho 0.8
    of 19 generators reaches from about 0.5 to 0.94. Draws in which the metric or the outcome is constant have no rho
    and do not count; NaN where none has. metrics: [K, G], outcome: [G].
    """
    x, y = np.atleast_2d(np.asarray(metrics, np.float64)), np.asarray(outcome, np.float64)
    n = len(y)
    below = [_below(values) for values in (*x, y)]
    generator = np.random.default_rng(seed)
    replicates = []
    for first in range(0, draws, step := max(1, _BLOCK // n)):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=min(step, draws - first)).astype(np.float64)  # [B, G]
        # The rank of a generator that is drawn, less the mean rank; drawn twice is a tie.
        *own, of_outcome = (counts @ matrix - n / 2 for matrix in below)
        outcome_square = (counts * of_outcome**2).sum(axis=1)
        replicates.append(
            np.stack(
                [
                    _correlation((counts * ranks * of_outcome).sum(1), (counts * ranks**2).sum(1), outcome_square)
                    for ranks in own
                ]
            )
        )
    low, high = np.full((2, len(x)), np.nan)
    for k, values in enumerate(np.concatenate(replicates, axis=1)):
        known = values[~np.isnan(values)]
        if len(known):
            low[k], high[k] = np.percentile(known, [50 * (1 - level), 50 * (1 + level)])
    return low, high


def _deviations(values: ArrayLike) -> FloatArray:
    """[K, G] twice the average ranks, less their mean: whole numbers."""
    rows = np.atleast_2d(np.asarray(values, np.float64))
    return np.stack([2 * average_ranks(row) - (rows.shape[1] + 1) for row in rows])


def _correlation(product: FloatArray, square: FloatArray, other_square: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = product / np.sqrt(square * other_square)
    within: FloatArray = np.clip(rho, -1, 1)  # a last digit beyond 1 would be rounding
    return within


def _below(values: FloatArray) -> FloatArray:
    """[G, G] what drawing j adds to the rank of i: 1 where it is below, a half where it is equal."""
    column = values[:, None]
    below: FloatArray = (column < values) + (column == values) / 2
    return below


def _all_permutations(values: FloatArray) -> Iterator[FloatArray]:
    yield values[np.array(list(itertools.permutations(range(len(values)))))]


def _random_permutations(values: FloatArray, count: int, generator: np.random.Generator) -> Iterator[FloatArray]:
    step = max(1, _BLOCK // len(values))
    for first in range(0, count, step):
        yield generator.permuted(np.tile(values, (min(step, count - first), 1)), axis=1)
