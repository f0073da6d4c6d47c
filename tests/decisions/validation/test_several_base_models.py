"""Intervals over several base models on simulated grids with a known rho, and how reliable outcomes are."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastcompat.decisions.validation.correlation import spearman
from fastcompat.decisions.validation.several_base_models import (
    best_of,
    partial,
    pooled,
    reliability,
    smallest_rho,
)

N_SIMULATIONS = 500
SEEDS = 3
NOISE = 0.4  # of a training seed, in standard deviations of the generators


def grids(chance, n, B, G, r, second):
    """[n, B, 2, G] two metrics that correlate by `second`, and [n, B, G] outcomes, means over seeds.

    Base models share four fifths of everything.
    """

    def drawn():
        return np.sqrt(0.8) * chance.normal(size=(n, 1, G)) + np.sqrt(0.2) * chance.normal(size=(n, B, G))

    metric = drawn()
    outcome = r * metric + np.sqrt(1 - r * r) * drawn()
    outcome = outcome + NOISE * chance.normal(size=(n, B, G, SEEDS)).mean(axis=-1)
    other = second * metric + np.sqrt(1 - second**2) * drawn()
    return np.stack([metric, other], axis=2), outcome


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("B", "G"), [(1, 8), (3, 8), (3, 12)])
def test_intervals_hold_what_they_promise(B, G, r):
    chance = np.random.default_rng([B, G, int(10 * r)])
    # The rho of the normal distribution that the grids come from: Spearman's of Pearson's.
    pearson = np.array([r, 0.9 * r]) / np.sqrt(1 + NOISE**2 / SEEDS)
    truth = 6 / np.pi * np.arcsin(pearson / 2)
    found = pooled(*grids(chance, N_SIMULATIONS, B, G, r, 0.9))
    assert ((found.low <= truth) & (truth <= found.high)).mean(axis=0).min() >= 0.93
    _, low, high = found.difference(1, 0)
    assert ((low <= truth[1] - truth[0]) & (truth[1] - truth[0] <= high)).mean() >= 0.93


def test_one_base_model_is_bonett_and_wrights_interval():
    from fastcompat.decisions.validation.correlation import rho_interval

    x, y = np.random.default_rng(0).normal(size=(2, 12))
    found = pooled(x[None, None], (x + y)[None])
    low, high = rho_interval(found.rho, 12)
    assert found.rho[0] == spearman(x, x + y)[0]
    np.testing.assert_allclose([found.low, found.high], [low, high])


def test_a_perfect_rho_has_an_interval_that_holds_it():
    found = pooled(np.arange(8.0)[None, None], np.arange(8.0)[None])
    assert found.rho[0] == found.high[0] == 1
    assert 0.5 < found.low[0] < 1
    same = pooled(np.stack([np.arange(8.0), np.arange(8.0)])[None], np.arange(8.0)[None])
    d, low, high = same.difference(0, 1)
    assert d == 0
    assert -0.2 < low <= 0 <= high < 0.2


def test_leaving_one_out_says_how_much_rests_on_one():
    x = np.array([1.0, 2, 3, 4, 5, 6])
    y = np.array([6.0, 2, 3, 4, 5, 7])
    low, high = pooled(x[None, None], y[None]).range_without_one()
    rhos = [spearman(np.delete(x, g), np.delete(y, g))[0] for g in range(6)]
    assert low[0] == pytest.approx(min(rhos))
    assert high[0] == pytest.approx(np.tanh(np.arctanh(1 - 1 / 25)))  # 1, taken back a little


def test_partial_correlation_is_that_of_residual_ranks():
    chance = np.random.default_rng(3)
    z = chance.normal(size=40)
    x, y = z + chance.normal(size=40), z + chance.normal(size=40)
    ranks = [stats.rankdata(v) for v in (x, y, z)]
    design = np.stack([np.ones(40), ranks[2]], axis=1)
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in ranks[:2]]
    found = partial(np.stack([x, z])[None], y[None], z[None])
    assert found[0] == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert np.isnan(found[1])


def test_reliability_against_the_analysis_of_variance():
    chance = np.random.default_rng(4)
    values = chance.normal(size=(10, 1)) + 0.7 * chance.normal(size=(10, 3))
    f = stats.f_oneway(*values).statistic
    assert reliability(values) == pytest.approx(1 - 1 / f)
    assert reliability(np.ones((5, 1))) != reliability(np.ones((5, 1)))  # NaN: one seed
    assert reliability(np.array([[1.0, 1], [2, 2]])) == 1
    assert reliability(np.array([[1.0, -1], [-1, 1]])) == 0


def test_reliability_of_simulated_grids_is_the_share_of_the_generators():
    chance = np.random.default_rng(5)
    truth = 1 / (1 + 0.5**2 / 3)
    values = chance.normal(size=(N_SIMULATIONS, 15, 1)) + 0.5 * chance.normal(size=(N_SIMULATIONS, 15, 3))
    whole = [reliability(own) for own in values]
    values[:, 0, 0] = values[:, 3, 1:] = np.nan  # failed cells
    lacking = [reliability(own) for own in values]
    assert np.median(whole) == pytest.approx(truth, abs=0.01)
    assert np.median(lacking) == pytest.approx(truth, abs=0.03)


def test_the_best_of_several_metrics_and_how_sure_that_is():
    chance = np.random.default_rng(6)
    outcome = chance.normal(size=(1, 15))
    metrics = np.stack([chance.normal(size=(1, 15)), outcome + 0.1 * chance.normal(size=(1, 15))], axis=1)
    best, shares = best_of(metrics, outcome, draws=200)
    assert best == 1
    assert shares[1] > 0.95
    assert shares.sum() == pytest.approx(1)


def test_power_is_reached_at_the_rho_that_it_names():
    chance = np.random.default_rng(7)
    G = 12
    rho = smallest_rho(G)
    r = 2 * np.sin(np.pi * rho / 6)  # Pearson's, of which this Spearman's comes
    x = chance.normal(size=(2000, G))
    y = r * x + np.sqrt(1 - r * r) * chance.normal(size=(2000, G))
    found = pooled(x[:, None, None], y[:, None])
    assert 0.7 <= (found.low > 0).mean() <= 0.9
    assert np.isnan(smallest_rho(3))
