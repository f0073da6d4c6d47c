"""How well metrics predict a study's outcomes under several base models, and how well anything could. NumPy only.

The generators are the same under every base model, so base models are no further sample: an interval of a mean over
base models is as wide as Bonett and Wright's of one (`correlation.rho_interval`), which is exact where all base models
agree, and wide where they do not. A jackknife over generators would be narrower, and covers too little where rho is
high or generators are few (0.70 of 95% with six at 0.96).

Dimension key: B base models, K metrics, G generators, S training seeds, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastcompat.decisions.validation.correlation import spearman
from fastcompat.rows import FloatArray

# Quantiles of the normal distribution: 97.5%, and 80% for the power.
NORMAL_975 = 1.959963984540054
NORMAL_80 = 0.8416212335729143
# Fewer have no interval: of five, one that is left out leaves four.
MIN_GENERATORS = 5


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The mean over base models, by Fisher's z. rho, low, high: [..., K], the 95% interval. without: [G, ..., K], the
    mean z without each generator in turn."""

    rho: FloatArray
    low: FloatArray
    high: FloatArray
    without: FloatArray

    def range_without_one(self) -> tuple[FloatArray, FloatArray]:
        """([..., K], [..., K]) the lowest and highest rho with one generator left out."""
        return np.tanh(self.without.min(axis=0)), np.tanh(self.without.max(axis=0))

    def difference(self, k: int, other: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """[...] rho of metric k less that of another one, and its 95% interval, paired.

        From both intervals and the correlation of both rhos over generators left out (Zou 2007, "Toward using
        confidence intervals to compare correlations"). A jackknife of the difference covers 0.90 where rho is high.
        """
        one, two = (self.without[..., i] - self.without[..., i].mean(axis=0) for i in (k, other))
        norm = np.sqrt((one * one).sum(axis=0) * (two * two).sum(axis=0))
        with np.errstate(invalid="ignore", divide="ignore"):
            together = np.where(norm > 0, (one * two).sum(axis=0) / norm, (one == two).all(axis=0))
        down, up = self.rho - self.low, self.high - self.rho

        def reach(own: FloatArray, others: FloatArray) -> FloatArray:
            far: FloatArray = np.sqrt(np.maximum(own**2 + others**2 - 2 * together * own * others, 0.0))
            return far

        d = self.rho[..., k] - self.rho[..., other]
        low = d - reach(down[..., k], up[..., other])
        high = d + reach(up[..., k], down[..., other])
        return d, np.maximum(low, -2.0), np.minimum(high, 2.0)

    def smallest_difference(self, k: int, other: int) -> FloatArray:
        """[...] the difference that would have been found with 80% power, by the interval's width."""
        _, low, high = self.difference(k, other)
        return (high - low) / 2 * (1 + NORMAL_80 / NORMAL_975)


def pooled(metrics: FloatArray, outcomes: FloatArray) -> Pooled:
    """rho of every metric with the outcome over all base models.

    metrics: [..., B, K, G], outcomes: [..., B, G], all finite, the same generators in the same order, at least
    `MIN_GENERATORS`; metrics[b] are the figures that belong to base model b; whatever stands in front are other grids.
    A rho of 1 counts as 1 - 1 / G^2, because Fisher's z would be infinite: so it has an interval, which holds it.
    """
    x, y = np.asarray(metrics, np.float64), np.asarray(outcomes, np.float64)[..., None, :]
    n = y.shape[-1]
    before_x, before_y = _before(x), _before(y)
    rho = _correlation(before_x.sum(axis=-1), before_y.sum(axis=-1))
    z = _fisher(rho, n).mean(axis=-2)
    error = np.sqrt((1 + np.tanh(z) ** 2 / 2) / (n - 3))
    rho = rho[..., 0, :] if x.shape[-3] == 1 else np.tanh(z)
    without = []
    for g in range(n):
        own, outcome = (np.delete(np.delete(b, g, axis=-1), g, axis=-2).sum(axis=-1) for b in (before_x, before_y))
        without.append(_fisher(_correlation(own, outcome), n - 1).mean(axis=-2))
    return Pooled(
        rho=rho,
        low=np.minimum(np.tanh(z - NORMAL_975 * error), rho),
        high=np.maximum(np.tanh(z + NORMAL_975 * error), rho),
        without=np.stack(without),
    )


def partial(metrics: FloatArray, outcomes: FloatArray, given: FloatArray) -> FloatArray:
    """[K] the partial rank correlation of metrics with the outcome given another figure, mean over base models.

    metrics: [B, K, G], outcomes, given: [B, G]. NaN for the metric that is given, or is its order.
    """
    n = outcomes.shape[1]
    found = []
    for own, outcome, third in zip(metrics, outcomes, given, strict=True):
        xy, xz = spearman(own, outcome), spearman(own, third)
        yz = float(spearman(outcome, third)[0])
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
        rho = np.where((1 - xz**2 > 1e-9) & (1 - yz**2 > 1e-9), rho, np.nan)
        found.append(_fisher(np.clip(rho, -1, 1), n))
    mean: FloatArray = np.tanh(np.mean(found, axis=0))
    return mean


def reliability(values: FloatArray) -> float:
    """How much of the differences between the generators' means over seeds would come again with other seeds, 0 to 1.

    ICC(1, k) of a one-way analysis of variance (Shrout and Fleiss 1979): (between - within) / between for k seeds;
    where cells are missing, with the variances that the unequal counts give. values: [G, S], NaN where there is none.
    Its square root is the highest correlation that any metric can be expected to have with the means. NaN where no
    generator has two seeds.
    """
    known = np.isfinite(values)
    counts = known.sum(axis=1)
    values, known, counts = values[counts > 0], known[counts > 0], counts[counts > 0]
    n_groups, total = len(counts), int(counts.sum())
    if n_groups < 2 or total == n_groups:
        return float("nan")
    means = np.nansum(values, axis=1) / counts
    grand = float((means * counts).sum() / total)
    between = float((counts * (means - grand) ** 2).sum() / (n_groups - 1))
    within = float(np.nansum((values - means[:, None]) ** 2) / (total - n_groups))
    size = (total - float((counts**2).sum()) / total) / (n_groups - 1)
    of_generators = max((between - within) / size, 0.0)
    of_means = within * float((1 / counts).mean())
    everything = of_generators + of_means
    return of_generators / everything if everything > 0 else float("nan")


def best_of(metrics: FloatArray, outcomes: FloatArray, *, draws: int = 500, seed: int = 0) -> tuple[int, FloatArray]:
    """(which metric has the highest mean z, [K] how often each has it over generators drawn with replacement).

    Of several that are best alike each gets its part. metrics: [B, K, G], outcomes: [B, G].
    """
    n = outcomes.shape[1]
    chance = np.random.default_rng(seed)
    shares = np.zeros(metrics.shape[1])
    for drawn in chance.integers(0, n, (draws, n)):
        if len(np.unique(drawn)) < 3:
            continue
        z = _mean_z(metrics[:, :, drawn], outcomes[:, drawn])
        if np.isfinite(z).any():
            best = z >= np.nanmax(z) - 1e-12
            shares += best / best.sum()
    return int(np.nanargmax(_mean_z(metrics, outcomes))), shares / max(shares.sum(), 1)


def smallest_rho(n: int) -> float:
    """The rho that differs from 0 (two-sided, 5%) in four of five studies of so many generators; NaN below 4."""
    if n < 4:
        return float("nan")
    # The error depends on rho itself: a few rounds settle it.
    rho = 0.5
    for _ in range(50):
        rho = float(np.tanh((NORMAL_975 + NORMAL_80) * np.sqrt((1 + rho**2 / 2) / (n - 3))))
    return rho


def _mean_z(metrics: FloatArray, outcomes: FloatArray) -> FloatArray:
    """[..., K] the mean of Fisher's z over base models."""
    rho = _correlation(_before(metrics).sum(axis=-1), _before(outcomes[..., None, :]).sum(axis=-1))
    return _mean(_fisher(rho, outcomes.shape[-1]))


def _mean(z: FloatArray) -> FloatArray:
    mean: FloatArray = z.mean(axis=-2)
    return mean


def _before(values: FloatArray) -> FloatArray:
    """[..., G, G] whether the second comes before the first; half where they are equal. Sums are average ranks."""
    one, two = values[..., :, None], values[..., None, :]
    before: FloatArray = (two < one) + 0.5 * (two == one)
    return before


def _correlation(x: FloatArray, y: FloatArray) -> FloatArray:
    """[...] Pearson's of the last axis; NaN where one is constant."""
    x, y = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: FloatArray = (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return rho


def _fisher(rho: FloatArray, n: int) -> FloatArray:
    most = 1 - 1 / n**2
    z: FloatArray = np.arctanh(np.clip(rho, -most, most))
    return z
