"""Rank correlation, permutation p and intervals against independent loops, scipy and simulated data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastcompat.decisions.validation.correlation import average_ranks, permutation_p, rho_interval, spearman
from fastcompat.errors import UsageError


def loop_rank(values: list[float], k: int) -> float:
    return 1 + sum(v < values[k] for v in values) + (sum(v == values[k] for v in values) - 1) / 2


def loop_rho(x: list[float], y: list[float]) -> float:
    """Pearson of ranks, in plain Python; NaN where one is constant."""
    rx, ry = ([loop_rank(list(values), k) for k in range(len(values))] for values in (x, y))
    mean = (len(x) + 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(rx, ry, strict=True))
    squares = [sum((a - mean) ** 2 for a in ranks) for ranks in (rx, ry)]
    return product / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else math.nan


# Few different values, so that ties are common.
VALUES = st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=12)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_and_rho_against_a_loop(data):
    x = data.draw(VALUES)
    y = data.draw(st.lists(st.integers(-9, 9).map(float), min_size=len(x), max_size=len(x)))
    assert average_ranks(x).tolist() == [loop_rank(x, k) for k in range(len(x))]
    np.testing.assert_allclose(spearman([x, y], y)[0], loop_rho(x, y), atol=1e-12)


def test_rho_worked_by_hand():
    # Ranks 1, 2, 3, 4, 5 and 2, 1, 4, 3, 5: squared differences 1 + 1 + 1 + 1 = 4, so 1 - 6 * 4 / (5 * 24) = 0.8.
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50])[0] == pytest.approx(0.8, abs=1e-15)
    assert spearman([[1, 2, 3, 4], [4, 3, 2, 1], [7, 7, 7, 7]], [0.1, 0.2, 0.3, 9]).tolist()[:2] == [1, -1]
    assert np.isnan(spearman([7, 7, 7, 7], [1, 2, 3, 4])[0])


@pytest.mark.parametrize("y", [[3.0, 1.0, 2.0, 5.0, 4.0, 7.0], [1.0, 1.0, 2.0, 2.0, 2.0, 3.0]])
def test_exact_p_against_every_permutation(y):
    x = [1.0, 2.0, 3.0, 4.0, 4.0, 6.0]
    own = abs(loop_rho(x, y))
    counted = [abs(loop_rho(x, list(order))) >= own - 1e-9 for order in itertools.permutations(y)]
    assert permutation_p([x, y], y).tolist()[0] == pytest.approx(sum(counted) / len(counted), abs=1e-15)
    assert np.isnan(permutation_p([2.0] * 6, y)[0])


def test_random_p_follows_its_rule_and_its_seed():
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((2, 19))
    permuted = np.random.default_rng(3).permuted(np.tile(average_ranks(y) * 2 - 20, (500, 1)), axis=1)
    beyond = sum(abs(loop_rho(list(x), list(row))) >= abs(loop_rho(list(x), list(y))) - 1e-9 for row in permuted)
    assert permutation_p(x, y, permutations=500, seed=3)[0] == (beyond + 1) / 501
    # The smallest that m permutations can give, and the same p for more of them within their error.
    assert permutation_p(y, y, permutations=999)[0] == 1 / 1000
    few, many = (permutation_p(x, y, permutations=m, seed=7)[0] for m in (20_000, 200_000))
    assert abs(few - many) < 4 * math.sqrt(many * (1 - many) / 20_000)


def test_p_is_uniform_without_a_relation():
    draw = np.random.default_rng(1)
    p = permutation_p(draw.standard_normal((2000, 10)), draw.standard_normal(10), permutations=2000)
    assert abs((p <= 0.05).mean() - 0.05) < 0.02
    assert abs(p.mean() - 0.5) < 0.03


def test_rho_and_p_are_scipys():
    draw = np.random.default_rng(2)
    for n in (5, 8, 19, 40):
        x, y = draw.integers(0, n, (2, n)).astype(float)  # with ties
        assert spearman(x, y)[0] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        np.testing.assert_array_equal(average_ranks(x), stats.rankdata(x))
    x, y = draw.integers(0, 5, (2, 7)).astype(float)

    def rho(permuted: np.ndarray) -> float:
        return stats.spearmanr(x, permuted).statistic

    exact = stats.permutation_test((y,), rho, permutation_type="pairings", n_resamples=np.inf)
    assert permutation_p(x, y)[0] == pytest.approx(exact.pvalue, abs=1e-12)
    # Many generators: both draw, and agree with the asymptotic t within their error.
    x, y = draw.standard_normal((2, 40))
    y += 0.3 * x
    p = permutation_p(x, y, permutations=50_000)[0]
    assert abs(p - stats.spearmanr(x, y).pvalue) < 0.01
    drawn = stats.permutation_test((y,), lambda permuted, axis: _rhos(x, permuted), permutation_type="pairings",
                                   vectorized=True, n_resamples=20_000, rng=np.random.default_rng(4))  # fmt: skip
    assert abs(p - drawn.pvalue) < 4 * math.sqrt(p * (1 - p) * (1 / 50_000 + 1 / 20_000))


def _rhos(x: np.ndarray, permuted: np.ndarray) -> np.ndarray:
    """Along the last axis of [..., G]."""
    ranks, own = stats.rankdata(permuted, axis=-1), stats.rankdata(x)
    ranks, own = ranks - ranks.mean(-1, keepdims=True), own - own.mean()
    return (ranks @ own) / np.sqrt((ranks**2).sum(-1) * (own @ own))


@pytest.mark.parametrize("permutations", [0, -1])
@pytest.mark.parametrize("n", [5, 12])
def test_a_p_without_permutations_is_refused(n, permutations):
    with pytest.raises(UsageError, match=f"permutations must be 1 or more, got {permutations}"):
        permutation_p(np.arange(n), np.arange(n), permutations=permutations)


def test_an_interval_by_hand_and_where_there_is_none():
    # atanh(0.5) = ln 3 / 2; (1 + 0.25 / 2) / (12 - 3) = 1 / 8.
    half = stats.norm.ppf(0.975) / math.sqrt(8)
    low, high = rho_interval([0.5, -0.5, 1.0, -1.0, math.nan], 12)
    assert (low[0], high[0]) == pytest.approx((math.tanh(math.log(3) / 2 - half), math.tanh(math.log(3) / 2 + half)))
    assert (low[1], high[1]) == pytest.approx((-high[0], -low[0]))
    assert np.isnan([low[2:], high[2:]]).all()
    with pytest.raises(UsageError, match="at least 4 generators, got 3"):
        rho_interval([0.5], 3)


@pytest.mark.parametrize("n", [5, 7, 10, 19])
@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_an_interval_covers_what_it_says(n, correlation):
    draw = np.random.default_rng(n)
    rho = []
    for _ in range(2000):
        x, noise = draw.standard_normal((2, n))
        rho.append(spearman(x, correlation * x + math.sqrt(1 - correlation**2) * noise)[0])
    low, high = rho_interval(rho, n)
    known = ~np.isnan(low)
    assert known.mean() > 0.6
    # Spearman's rho of a bivariate normal distribution.
    true = 6 / math.pi * math.asin(correlation / 2)
    covered = ((low <= true) & (true <= high))[known].mean()
    assert covered > 0.935, covered
    assert covered < 0.98 or n < 10, covered
