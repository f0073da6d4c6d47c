"""Planned looks, and the boundary that holds at all of them: against simulated paths and an integral of scipy's."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from fastcompat.decisions.ranking.looks import (
    FIRST_LOOK,
    MOST_LOOKS,
    RATIO,
    crossing,
    planned_looks,
    repeated_tail,
)

NORMAL = NormalDist()


@pytest.mark.parametrize("n_prompts", [1000, 2000, 20_000, 100_000, 200_000])
def test_looks_begin_at_the_first_and_are_a_ratio_apart(n_prompts):
    shares = planned_looks(n_prompts)
    assert shares[0] * n_prompts == pytest.approx(FIRST_LOOK)
    np.testing.assert_allclose(np.divide(shares[1:-1], shares[:-2]), RATIO, rtol=1e-9)
    assert shares[-2] < 0.999
    assert shares[-1] == 1.0
    assert 1.0 / shares[-2] < RATIO * 1.002


@pytest.mark.parametrize("n_prompts", [10**6, 10**7, 10**9])
def test_of_large_corpora_looks_are_further_apart_and_not_more(n_prompts):
    shares = planned_looks(n_prompts)
    assert MOST_LOOKS - 1 <= len(shares) <= MOST_LOOKS + 1
    assert shares[1] / shares[0] > RATIO
    assert np.diff(shares).min() > 0
    assert shares[-1] == 1.0


def test_how_many_looks_there_are():
    assert [len(planned_looks(n)) for n in (2000, 20_000, 100_000)] == [18, 34, 46]
    assert len(planned_looks(100_000, ratio=1.5)) == 17


def test_small_corpora_are_looked_at_once_and_never_next_to_the_end():
    for n_prompts in (1, 10, FIRST_LOOK):
        assert planned_looks(n_prompts) == [1.0]
    assert planned_looks(FIRST_LOOK + 1) == [FIRST_LOOK / (FIRST_LOOK + 1), 1.0]
    for n_prompts in range(FIRST_LOOK + 1, 1000):
        shares = planned_looks(n_prompts)
        prompts = [round(share * n_prompts) for share in shares]
        assert sorted(set(prompts)) == prompts
        assert (prompts[0], prompts[-1]) == (FIRST_LOOK, n_prompts)


@pytest.mark.parametrize("tail", [0.02, 0.005])
def test_the_boundary_against_simulated_paths(tail):
    """A million paths of 30 looks: what crosses is `tail`, within four Monte Carlo errors, and 5% of it."""
    n_looks, n_paths = 30, 10**6
    shares = [RATIO**-k for k in range(n_looks, -1, -1)]
    z = -NORMAL.inv_cdf(repeated_tail(tail, shares))
    draw = np.random.default_rng(3)
    correlation = np.float32(math.sqrt(1 / RATIO))
    deviation = np.float32(math.sqrt(1 - 1 / RATIO))
    score = draw.standard_normal(n_paths, np.float32)
    crossed = score > z
    for _ in range(n_looks - 1):
        score = correlation * score + deviation * draw.standard_normal(n_paths, np.float32)
        crossed |= score > z
    assert crossed.mean() == pytest.approx(tail, abs=4 * math.sqrt(tail / n_paths))
    assert crossed.mean() == pytest.approx(tail, rel=0.05)
    # The test can fail: the plain quantile is crossed many times as often, and what is wanted is no wild bound.
    assert crossing(-NORMAL.inv_cdf(tail), n_looks, RATIO) > 5 * tail
    assert crossing(z - 0.05, n_looks, RATIO) > 1.05 * tail


@pytest.mark.parametrize("n_looks", [2, 3])
@pytest.mark.parametrize("ratio", [1.05, RATIO, 2.0])
def test_the_recursion_against_the_multivariate_normal(n_looks, ratio):
    stats = pytest.importorskip("scipy.stats")
    at = ratio ** np.arange(n_looks)
    correlations = np.sqrt(np.minimum.outer(at, at) / np.maximum.outer(at, at))
    for z in (1.0, 2.0, 3.5):
        below = stats.multivariate_normal.cdf(np.full(n_looks, z), cov=correlations, abseps=1e-7, releps=1e-7)
        assert crossing(z, n_looks, ratio) == pytest.approx(1 - below, abs=1e-6)


def test_the_recursion_of_one_look_is_a_plain_tail():
    for z in (0.0, 1.0, 4.7):
        assert crossing(z, 1, RATIO) == pytest.approx(1 - NORMAL.cdf(z), rel=1e-12)


def test_more_looks_cross_more_often_and_higher_bounds_are_crossed_less():
    by_looks = [crossing(2.5, n, RATIO) for n in (1, 2, 5, 20, 50)]
    assert sorted(by_looks) == by_looks
    assert by_looks[-1] < 50 * by_looks[0], "never more than looks without memory"
    by_height = [crossing(z, 20, RATIO) for z in np.linspace(0, 6.2, 30)]
    assert (np.diff(by_height) < 0).all()
    assert 0 < by_height[-1] < by_height[0] < 1


def test_tails_of_repeated_intervals():
    shares = planned_looks(100_000)
    for tail in (0.025, 0.005, 0.005 / 190):
        own = repeated_tail(tail, shares)
        assert tail / len(shares) < own < tail
        assert crossing(-NORMAL.inv_cdf(own), len(shares) - 1, RATIO) == pytest.approx(tail, rel=1e-6)
    # A corpus that is looked at once on the way, or not at all, has nothing to pay for.
    assert repeated_tail(0.025, [1.0]) == repeated_tail(0.025, [0.5, 1.0]) == 0.025
    assert repeated_tail(1e-12, shares) > 0, "further out no quantile is found, and none is asked for"
    assert repeated_tail(0.025, planned_looks(2000)) > repeated_tail(0.025, shares)


def test_the_paths_end_before_the_whole_corpus():
    """The last look has its own share of the error: two looks on the way and the end are two looks."""
    z = -NORMAL.inv_cdf(repeated_tail(0.01, [1 / 1.44, 1 / 1.2, 1.0]))
    assert crossing(z, 2, 1.2) == pytest.approx(0.01, rel=1e-6)
