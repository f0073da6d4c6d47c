"""Influences, intervals and bootstrap weights against plain loops, published tables and formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fastcompat.decisions.ranking import clustered_means
from fastcompat.decisions.ranking.clustered_means import BYTES_OF_WEIGHT, ClusteredMeans, Responses, poisson_weights
from fastcompat.decisions.ranking.intervals import (
    FALSE_DIFFERENCES,
    LONGEST_SIDE,
    Differences,
    Estimate,
    interval,
    skewness_corrected,
    student_t_quantile,
)

# Two-sided 95%, from any printed table of Student's t.
T_TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 5: 2.57058, 9: 2.26216, 29: 2.04523, 120: 1.97993}


def problem(n_prompts: int = 60, n_groups: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Unequal counts, prompts that a group lacks, in no order: (prompt, group, reward, loss, tokens)."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, 4, size=(n_prompts, n_groups))
    prompt, group = (np.repeat(codes.ravel(), counts.ravel()) for codes in np.indices(counts.shape))
    order = draw.permutation(len(prompt))
    prompt, group = prompt[order].astype(np.int64), group[order].astype(np.int64)
    effect = draw.normal(size=n_prompts)[prompt]
    reward = 3 + effect + draw.standard_t(3, size=len(prompt))
    return prompt, group, reward, draw.lognormal(0, 0.6, size=len(prompt)), draw.integers(1, 99, len(prompt)) * 1.0


def means_of(
    prompt: np.ndarray, group: np.ndarray, n_groups: int, figures: list[tuple[np.ndarray, np.ndarray]]
) -> ClusteredMeans:
    return ClusteredMeans([Responses.of(prompt, group, figures)], n_groups)


@pytest.fixture
def small_blocks(monkeypatch):
    """So that even a small problem is cut into several blocks."""
    monkeypatch.setattr(clustered_means, "BLOCK_PROMPTS", 64)


def test_estimates_and_moments_against_loops(small_blocks):
    prompt, group, reward, loss, tokens = problem(n_prompts=150)
    ones = np.ones(len(prompt))
    means = means_of(prompt, group, 3, [(reward, ones), (loss * tokens, tokens)])
    moments = means.moments()

    influence = np.zeros((2, 150, 3))
    for g in range(3):
        for k, (values, weights) in enumerate([(reward, ones), (loss * tokens, tokens)]):
            total = math.fsum(weights[group == g])
            estimate = math.fsum(values[group == g]) / total
            assert means.estimates[k][g] == pytest.approx(estimate, rel=1e-13)
            squares = 0.0
            for p in range(150):
                rows = (prompt == p) & (group == g)
                weight = math.fsum(weights[rows])
                squares += weight**2
                residual = math.fsum(values[rows]) - estimate * weight
                influence[k, p, g] = residual / total / (1 - weight / total)
            assert means.freedom[k][g] == pytest.approx(total**2 / squares - 1, rel=1e-12)
        assert means.n_prompts[g] == len(set(prompt[group == g]))
    for d in (np.array([[2.0] * 3, [0.0] * 3]), np.array([[0.0, 1.0, 2.0], [-1.0] * 3])):
        both = d[0] * influence[0] + d[1] * influence[1]
        deviation, acceleration = moments.of(d)
        np.testing.assert_allclose(deviation, np.sqrt((both**2).sum(0)), rtol=1e-10)
        np.testing.assert_allclose(acceleration, (both**3).sum(0) / (6 * (both**2).sum(0) ** 1.5), rtol=1e-9)
    of_pair = np.array([[0.0, 3.0, 1.0], [3.0, 0.0, 0.5], [1.0, 0.5, 0.0]])
    for d in (np.array([0.5, -3.0])[:, None, None], np.stack([np.ones((3, 3)), -of_pair])):
        deviation, acceleration = moments.of_differences(d)
        assert (deviation.diagonal() == 0).all()
        for g, h in ((0, 1), (1, 0), (2, 0), (1, 2)):
            first, second = np.broadcast_to(d, (2, 3, 3))[:, g, h]
            difference = first * (influence[0, :, g] - influence[0, :, h])
            difference += second * (influence[1, :, g] - influence[1, :, h])
            squares = (difference**2).sum()
            assert deviation[g, h] == pytest.approx(np.sqrt(squares), rel=1e-9)
            assert acceleration[g, h] == pytest.approx((difference**3).sum() / (6 * squares**1.5), rel=1e-8)


def test_one_response_a_prompt_gives_the_textbook_interval():
    """Without skewness it is the mean +- t s / sqrt(n - 1): with the jackknife's n - 1 for n."""
    half = np.random.default_rng(0).normal(size=15)
    values = np.concatenate([5 + half, 5 - half])
    means = means_of(np.arange(30), np.zeros(30, np.int64), 1, [(values, np.ones(30))])
    low, high = interval(means.estimates[0], *means.moments().of(np.ones((1, 1))), means.freedom[0])
    margin = T_TABLE[29] * values.std(ddof=1) / math.sqrt(29)
    assert (low[0], high[0]) == (pytest.approx(5 - margin, rel=1e-5), pytest.approx(5 + margin, rel=1e-5))


def test_skewness_widens_the_side_of_the_tail():
    still = interval(np.zeros(1), np.ones(1), np.zeros(1), np.full(1, 29.0))
    right = interval(np.zeros(1), np.ones(1), np.full(1, 0.05), np.full(1, 29.0))
    left = interval(np.zeros(1), np.ones(1), np.full(1, -0.05), np.full(1, 29.0))
    assert right[1] > still[1] == -still[0] == -right[0]
    assert (left[0], left[1]) == (-right[1], -right[0])


def test_bounds_do_not_leap_when_a_value_moves_a_little():
    """Hall's correction turns to the cube root of a negative number where one value makes all of the skewness."""
    values = 1 + 0.15 * np.random.default_rng(0).normal(size=30)
    highs = []
    for outlier in np.arange(1.0, 10.0, 0.02):
        values[-1] = outlier
        means = means_of(np.arange(30), np.zeros(30, np.int64), 1, [(values, np.ones(30))])
        deviation, acceleration = means.moments().of(np.ones((1, 1)))
        low, high = interval(means.estimates[0], deviation, acceleration, means.freedom[0])
        margin = T_TABLE[29] * deviation[0]
        for side in (means.estimates[0] - low, high - means.estimates[0]):
            assert margin * 0.999 < side[0] < LONGEST_SIDE * margin * 1.001
        highs.append(high[0])
    # The mean moves by 0.02 / 30 at each step, and a deviation by hardly more.
    assert np.diff(highs).min() > 0
    assert np.diff(highs).max() < 0.02


def test_the_correction_inverts_halls_polynomial():
    for a in (-0.3, -0.01, 0.02, 0.2):
        for quantile in (-4.0, -1.96, 0.0, 1.96, 4.0):
            t = float(skewness_corrected(np.array(quantile), np.array(a)))
            assert t + 2 * a * t**2 + 4 / 3 * a**2 * t**3 + a == pytest.approx(quantile, abs=1e-9)
    assert skewness_corrected(np.array(1.96), np.array(0.0)) == pytest.approx(1.96, abs=1e-6)


def test_quantiles_against_printed_tables():
    freedom = np.array(list(T_TABLE), np.float64)
    np.testing.assert_allclose(student_t_quantile(0.975, freedom), list(T_TABLE.values()), rtol=3e-6)
    # Closed forms far in the tail: one degree is Cauchy, two are algebraic.
    p = 1 - 1e-6
    exact = [math.tan(math.pi * (p - 0.5)), (2 * p - 1) / math.sqrt(2 * p * (1 - p))]
    np.testing.assert_allclose(student_t_quantile(p, np.array([1.0, 2.0])), exact, rtol=1e-6)
    assert student_t_quantile(0.975, np.array([1e6])) == pytest.approx(1.959966, rel=1e-6)


def test_few_different_values_and_none_at_all():
    """One outlier among equals, where bootstrap-t has no variance in a third of its draws; and nothing that varies."""
    values = np.ones(30)
    values[7] = 0.0
    for figure, finite in ((values, True), (np.ones(30), False)):
        means = means_of(np.arange(30), np.zeros(30, np.int64), 1, [(figure, np.ones(30))])
        low, high = interval(means.estimates[0], *means.moments().of(np.ones((1, 1))), means.freedom[0])
        assert np.isfinite([low, high]).all()
        assert (low[0] < figure.mean() < high[0]) if finite else (low[0] == 1 == high[0])


def test_weights_have_poissons_moments_and_frequencies():
    k = np.arange(len(BYTES_OF_WEIGHT))
    counts = np.array(BYTES_OF_WEIGHT)
    assert counts.sum() == 256
    assert (counts * k).sum() == 256, "mean 1"
    assert (counts * k * (k - 1)).sum() == 256, "variance 1"
    assert (counts * k * (k - 1) * (k - 2)).sum() == pytest.approx(256, rel=0.02)
    poisson = np.exp(-1) / np.array([math.factorial(i) for i in k])
    assert np.abs(counts / 256 - poisson).sum() / 2 < 0.006
    drawn = poisson_weights(np.random.default_rng(0), 1000, 1000)
    found = np.bincount(drawn.ravel(), minlength=len(k)) / 1e6
    np.testing.assert_allclose(found, counts / 256, atol=0.003)


def test_replicates_are_those_of_the_weights_in_float64(small_blocks):
    prompt, group, reward, loss, tokens = problem(n_prompts=150)
    reward = reward + 1e6  # float32 sums of values would be off by whole units
    ones = np.ones(len(prompt))
    means = means_of(prompt, group, 3, [(reward, ones), (loss * tokens, tokens)])
    found = means.moments_and_replicates(draws=50, seed=3)[1]
    weights = poisson_weights(np.random.default_rng(3), 192, 50)[:150].astype(np.float64)
    for k, (values, by) in enumerate([(reward, ones), (loss * tokens, tokens)]):
        for g in range(3):
            drawn = weights[prompt[group == g]]
            expected = (drawn * values[group == g, None]).sum(0) / (drawn * by[group == g, None]).sum(0)
            np.testing.assert_allclose(found[k][:, g], expected, rtol=1e-6 if k else 1e-12)


def test_replicates_do_not_depend_on_the_blocks(monkeypatch):
    prompt, group, reward, _, _ = problem(n_prompts=500)
    means = means_of(prompt, group, 3, [(reward, np.ones(len(prompt)))])
    _, (whole,) = means.moments_and_replicates(draws=101, seed=1)
    monkeypatch.setattr(clustered_means, "BLOCK_PROMPTS", 64)
    _, (cut,) = means.moments_and_replicates(draws=101, seed=1)
    np.testing.assert_allclose(whole, cut, rtol=1e-6)
    assert (whole[0] != whole[1]).all()


@pytest.mark.parametrize("n_chunks", [2, 7, 90, 500])
def test_nothing_depends_on_how_prompts_are_cut_into_chunks(n_chunks):
    """Nor on chunks to which nobody responded; the k-th prompt has the same random weights."""
    prompt, group, reward, loss, tokens = problem(n_prompts=500)
    there = (prompt < 130) | (prompt > 170)
    prompt, group, reward, loss, tokens = (column[there] for column in (prompt, group, reward, loss, tokens))

    def chunk(first: int, end: int) -> Responses:
        rows = (prompt >= first) & (prompt < end)
        own = [(reward[rows], np.ones(rows.sum())), (loss[rows] * tokens[rows], tokens[rows])]
        return Responses.of(prompt[rows] - first, group[rows], own, end - first)

    cuts = np.sort(np.random.default_rng(n_chunks).integers(0, 501, size=n_chunks - 1)).tolist()
    whole = ClusteredMeans([chunk(0, 500)], 3)
    chunks = ClusteredMeans([chunk(*ends) for ends in itertools.pairwise([0, *cuts, 500])], 3)
    np.testing.assert_array_equal(chunks.n_prompts, whole.n_prompts)
    np.testing.assert_allclose(chunks.estimates, whole.estimates, rtol=1e-13)
    np.testing.assert_allclose(chunks.freedom, whole.freedom, rtol=1e-13)
    (moments, draws), (all_moments, all_draws) = (own.moments_and_replicates(101, 5) for own in (chunks, whole))
    np.testing.assert_allclose(moments.second, all_moments.second, rtol=1e-10, atol=1e-18)
    np.testing.assert_allclose(moments.third, all_moments.third, rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(draws, all_draws, rtol=1e-5)


def test_replicates_vary_as_much_as_the_variance_says():
    prompt, group, reward, _, _ = problem(n_prompts=800)
    means = means_of(prompt, group, 3, [(reward, np.ones(len(prompt)))])
    moments, (found,) = means.moments_and_replicates(draws=4000, seed=0)
    np.testing.assert_allclose(found.std(axis=0), moments.of(np.ones((1, 3)))[0], rtol=0.06)
    difference = (found[:, 0] - found[:, 1]).std()
    assert difference == pytest.approx(moments.of_differences(np.ones((1, 1, 1)))[0][0, 1], rel=0.06)


def test_a_draw_that_leaves_nothing_is_nan():
    means = means_of(np.zeros(1, np.int64), np.zeros(1, np.int64), 2, [(np.ones(1), np.ones(1))])
    _, (found,) = means.moments_and_replicates(draws=200, seed=0)
    assert np.isnan(found[:, 1]).all(), "no responses at all"
    assert 0.2 < np.isnan(found[:, 0]).mean() < 0.55
    assert np.nanmax(found[:, 0]) == np.nanmin(found[:, 0]) == 1.0


def _estimate(value: list[float], deviation: list[float], freedom: float) -> Estimate:
    """Figures that are independent of each other, without skewness."""
    figure, error = np.array(value), np.array(deviation)
    apart = Differences(
        value=figure[:, None] - figure,
        deviation=np.sqrt(np.add.outer(error**2, error**2)),
        acceleration=np.zeros((len(figure), len(figure))),
        scale=np.ones((len(figure), len(figure))),
    )
    return Estimate(
        value=figure,
        deviation=error,
        acceleration=np.zeros(len(figure)),
        freedom=np.full(len(figure), freedom),
        sign=1,
        unit=1.0,
        draw=lambda: np.empty((0, len(figure))),
        compare=lambda: apart,
    )


def _holm(value: list[float], deviation: list[float], freedom: float) -> set[tuple[int, int]]:
    """By Holm's definition: two-sided p-values in ascending order, the k-th of m against alpha / (m - k + 1)."""
    stats = pytest.importorskip("scipy.stats")
    pairs = list(itertools.combinations(range(len(value)), 2))
    t = [abs(value[i] - value[j]) / math.hypot(deviation[i], deviation[j]) for i, j in pairs]
    p = 2 * stats.t.sf(t, freedom)
    told = set()
    for k, at in enumerate(np.argsort(p)):
        if p[at] > FALSE_DIFFERENCES / (len(pairs) - k):
            break
        i, j = pairs[at]
        told.add((i, j) if value[i] > value[j] else (j, i))
    return told


def test_pairs_told_apart_are_those_of_holm():
    more = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        n = int(draw.integers(2, 9))
        value = (1 + draw.normal(scale=2.5, size=n)).tolist()
        deviation = draw.uniform(0.3, 1.5, size=n).tolist()
        freedom = float(draw.choice([12, 40, 1000]))
        estimate, known = _estimate(value, deviation, freedom), np.ones(n, bool)
        told = {(int(i), int(j)) for i, j in np.argwhere(estimate.clearly_better(known))}
        assert told == _holm(value, deviation, freedom)
        n_pairs = n * (n - 1) // 2
        at_once = estimate.differences.value > estimate.reach(FALSE_DIFFERENCES / 2 / n_pairs)
        bonferroni = {(int(i), int(j)) for i, j in np.argwhere(at_once)}
        assert bonferroni <= told
        assert bool(told) == bool(bonferroni), "without a first step there is no second"
        more += told > bonferroni
    assert more > 5, "a step further tells more apart"


def test_what_is_not_known_takes_no_share_and_is_not_told_apart():
    estimate = _estimate([4.0, 0.0, 90.0], [1.0, 1.0, 1.0], 1000)
    assert np.argwhere(estimate.clearly_better(np.array([True, True, False]))).tolist() == [[0, 1]]
    alone = _estimate([4.0, 0.0], [1.0, 1.0], 1000)
    assert np.argwhere(alone.clearly_better(np.ones(2, bool))).tolist() == [[0, 1]]
    # 2.83 standard errors: enough for one pair of two at 4%, not for one of three.
    three = _estimate([4.0, 0.0, 2.0], [1.0, 1.0, 1e6], 1000)
    one_of_three = _estimate([3.0, 0.0, 1.5], [1.0, 1.0, 1e6], 1000)
    assert np.argwhere(three.clearly_better(np.ones(3, bool))).tolist() == [[0, 1]]
    assert not one_of_three.clearly_better(np.ones(3, bool)).any()
    assert _estimate([3.0, 0.0], [1.0, 1.0], 1000).clearly_better(np.ones(2, bool)).any()


def test_another_tail_is_asked_of_so_many_pairs():
    asked = []

    def tail(n_pairs: int) -> float:
        asked.append(n_pairs)
        return FALSE_DIFFERENCES / 2 / n_pairs

    estimate = _estimate([9.0, 3.0, 0.2, 0.0], [0.3, 0.3, 0.3, 0.3], 1000)
    better = estimate.clearly_better(np.ones(4, bool), tail)
    assert asked == [6, 1], "five of six pairs go at the first step"
    assert np.argwhere(better).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
