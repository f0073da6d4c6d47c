"""Rank correlation, permutation p and bootstrap against independent loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcompat.correlation import average_ranks, bootstrap_interval, permutation_p, spearman


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


@pytest.mark.parametrize("n", [4, 9])
def test_bootstrap_against_a_loop_over_the_same_draws(n):
    draw = np.random.default_rng(n)
    x, y = draw.integers(0, 6, (2, n)).astype(float)
    counts = np.random.default_rng(5).multinomial(n, np.full(n, 1 / n), size=300)
    resampled = [(np.repeat(x, row).tolist(), np.repeat(y, row).tolist()) for row in counts]
    rhos = [rho for own in resampled if not math.isnan(rho := loop_rho(*own))]
    low, high = bootstrap_interval([x, y, np.ones(n)], y, draws=300, seed=5)
    np.testing.assert_allclose([low[0], high[0]], np.percentile(rhos, [2.5, 97.5]), atol=1e-12)
    assert low[1] == pytest.approx(1) == high[1]
    assert np.isnan([low[2], high[2]]).all()
