"""Spearman's rank correlation of several metrics with one outcome, and how sure it is. NumPy only.

Dimension key: K metrics, G generators.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from fastcompat.errors import UsageError
from fastcompat.rows import FloatArray

# Up to this many generators every permutation is looked at: 8! = 40,320.
MAX_EXACT = 8
# Numbers in one block of permutations.
_BLOCK = 1 << 21
# The 97.5% quantile of the normal distribution.
_NORMAL_975 = 1.959963984540054


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
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (x @ y) / np.sqrt((x * x).sum(axis=1) * (y @ y))
    within: FloatArray = np.clip(rho, -1, 1)  # a last digit beyond 1 would be rounding
    return within


def permutation_p(metrics: ArrayLike, outcome: ArrayLike, *, permutations: int = 99_999, seed: int = 0) -> FloatArray:
    """[K] two-sided p of rho under exchangeability: how often a permuted outcome gives |rho| at least as large.

    Up to `MAX_EXACT` generators over all G! permutations; beyond, (b + 1) / (m + 1) for b of m random ones (Phipson and
    Smyth 2010, "Permutation p-values should never be zero"), the same for every metric. NaN where rho is. Sums are of
    whole numbers, so that ties with the observed rho are ties. metrics: [K, G], outcome: [G]. Raises UsageError for
    less than one permutation.
    """
    if permutations < 1:
        raise UsageError(f"permutations must be 1 or more, got {permutations}; p is at least 1 / (permutations + 1)")
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


def rho_interval(rho: ArrayLike, n: int) -> tuple[FloatArray, FloatArray]:
    """([K], [K]) 95% interval of rhos over n generators, 4 or more; NaN where rho is NaN, 1 or -1.

    tanh(atanh(rho) -+ 1.96 * sqrt((1 + rho^2 / 2) / (n - 3))), Bonett and Wright 2000, "Sample size requirements for
    estimating Pearson, Kendall and Spearman correlations". It says how rho would vary with other generators like
    these, not with other responses, and with few it is wide: 0.8 of 19 generators reaches from 0.49 to 0.93. At 1 and
    -1 the formula has no width, which would claim certainty, so there is none. Raises UsageError for fewer than 4.
    """
    if n < 4:
        raise UsageError(f"an interval of rho needs at least 4 generators, got {n}")
    known = np.asarray(rho, np.float64)
    known = np.where(np.abs(known) < 1, known, np.nan)
    z, error = np.arctanh(known), np.sqrt((1 + known**2 / 2) / (n - 3))
    return np.tanh(z - _NORMAL_975 * error), np.tanh(z + _NORMAL_975 * error)


def _deviations(values: ArrayLike) -> FloatArray:
    """[K, G] twice the average ranks, less their mean: whole numbers."""
    rows = np.atleast_2d(np.asarray(values, np.float64))
    return np.stack([2 * average_ranks(row) - (rows.shape[1] + 1) for row in rows])


def _all_permutations(values: FloatArray) -> Iterator[FloatArray]:
    yield values[np.array(list(itertools.permutations(range(len(values)))))]


def _random_permutations(values: FloatArray, count: int, generator: np.random.Generator) -> Iterator[FloatArray]:
    step = max(1, _BLOCK // len(values))
    for first in range(0, count, step):
        yield generator.permuted(np.tile(values, (min(step, count - first), 1)), axis=1)
