"""Rewards known of every prompt: the same estimate in the end, on the way a sharper one, and as sharp as it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fastcompat.decisions.racing.known_rewards import KnownRewards, contest_with
from fastcompat.decisions.racing.rule import History, RaceSettings, take_look
from fastcompat.decisions.ranking.clustered_means import ClusteredMeans, Responses
from fastcompat.decisions.ranking.counted import coded
from fastcompat.decisions.ranking.estimates import estimates_of, values_of
from fastcompat.decisions.ranking.looks import planned_looks

BETA = 3.0
SETTINGS = RaceSettings(figure="car", beta=BETA, margin=0.0)
NAMES = ("a", "b", "c")
REWARDS, LOSSES = np.array([6.0, 5.9, 5.5]), np.array([1.5, 1.5, 1.6])


def corpus(n_prompts: int, seed: int, *, noise: float = 1.0, tied: float = 0.0, own: float = 0.2) -> pa.Table:
    """One response a prompt and generator. noise: of the rewards; tied: by how much a loss falls as its reward rises;
    own: deviation of what the rewards do not know of losses."""
    draw = np.random.default_rng(seed)
    shape = (n_prompts, len(NAMES))
    apart = noise * (draw.normal(size=(n_prompts, 1)) + draw.normal(size=shape))
    loss = LOSSES - tied * apart + own * draw.normal(size=shape)
    return pa.table(
        {
            "prompt_id": np.repeat([f"p{k:05}" for k in range(n_prompts)], len(NAMES)),
            "generator": np.tile(NAMES, n_prompts),
            "reward": (REWARDS + apart).ravel(),
            "loss": np.maximum(loss, 0.01).ravel(),
        }
    )


def with_rewards(rows: pa.Table, n_scored: int, names: tuple[str, ...] = NAMES) -> dict[Any, Any]:
    scored = rows.slice(0, n_scored * len(NAMES))
    scored = scored.filter(pa.array(np.isin(scored["generator"].to_numpy(zero_copy_only=False), names)))
    prompt, group = coded(scored["prompt_id"])[1], coded(scored["generator"])[1]
    _, estimates = contest_with(KnownRewards.of(rows, NAMES), scored, prompt, group, names, SETTINGS.ranking)
    return dict(estimates)


def plain(rows: pa.Table, n_scored: int) -> dict[Any, Any]:
    scored = rows.slice(0, n_scored * len(NAMES))
    values, units = values_of(scored, ["reward", "loss"], "response")
    prompt, group = (coded(scored[name])[1] for name in ("prompt_id", "generator"))
    means = ClusteredMeans([Responses.of(prompt, group, values)], len(NAMES))
    return dict(estimates_of(means, means.moments(), units, SETTINGS.ranking))


def test_when_every_prompt_is_scored_it_is_the_plain_estimate():
    rows = corpus(300, 0, tied=0.3)
    found, wanted = with_rewards(rows, 300), plain(rows, 300)
    assert found.keys() == wanted.keys()
    for key, own in found.items():
        other = wanted[key]
        scale = own.unit / other.unit
        np.testing.assert_allclose(own.value * scale, other.value, rtol=1e-9)
        np.testing.assert_allclose(own.deviation * scale, other.deviation, rtol=1e-9)
        np.testing.assert_allclose(own.acceleration, other.acceleration, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(own.freedom, other.freedom)
        np.testing.assert_allclose(own.differences.value * scale, other.differences.value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(own.differences.deviation * scale, other.differences.deviation, rtol=1e-9)


def test_rewards_are_those_of_the_whole_corpus():
    rows = corpus(300, 0)
    reward = rows["reward"].to_numpy().reshape(-1, len(NAMES))
    found = with_rewards(rows, 40)["reward"]
    np.testing.assert_allclose(found.value * found.unit, reward.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.deviation * found.unit, reward.std(axis=0, ddof=1) / np.sqrt(299), rtol=1e-9)


@pytest.mark.parametrize("tied", [0.0, 0.3])
def test_it_is_unbiased_and_as_sure_as_it_says(tied):
    """200 corpora of 500 prompts, 100 of them scored: figures and differences scatter by the deviations stated."""
    truth = REWARDS / (1 + BETA * LOSSES)
    values, deviations, leads, lead_deviations = [], [], [], []
    for seed in range(200):
        found = with_rewards(corpus(500, seed, tied=tied), 100)[BETA]
        values.append(found.value * found.unit)
        deviations.append(found.deviation * found.unit)
        leads.append((found.differences.value / found.differences.scale)[0] * found.unit)
        lead_deviations.append((found.differences.deviation / found.differences.scale)[0] * found.unit)
    spread = np.std(values, axis=0, ddof=1)
    assert (np.abs(np.mean(values, axis=0) - truth) < 4 * spread / 200**0.5).all()
    np.testing.assert_allclose(np.mean(deviations, axis=0), spread, rtol=0.2)  # four Monte Carlo errors
    spread = np.std(leads, axis=0, ddof=1)[1:]
    assert (np.abs(np.mean(leads, axis=0)[1:] - (truth[0] - truth[1:])) < 4 * spread / 200**0.5).all()
    np.testing.assert_allclose(np.mean(lead_deviations, axis=0)[1:], spread, rtol=0.2)


def width(rows: pa.Table, known: bool) -> np.ndarray:
    """Deviations of the pairs' differences, from 200 scored prompts."""
    own = (with_rewards if known else plain)(rows, 200)[BETA]
    return own.differences.deviation[np.triu_indices(len(NAMES), 1)] * own.unit


def test_intervals_are_narrower_where_rewards_carry_the_noise():
    rows = corpus(5000, 0, noise=1.0)
    assert (width(rows, known=True) / width(rows, known=False)).max() < 0.7
    # What the losses share with the rewards is known, too.
    rows = corpus(5000, 0, noise=1.0, tied=0.3, own=0.05)
    assert (width(rows, known=True) / width(rows, known=False)).max() < 0.35
    # And where they tell nothing, nothing is lost.
    rows = corpus(5000, 0, noise=1e-3, own=0.3)
    assert (width(rows, known=True) / width(rows, known=False)).max() < 1.02


def test_rewards_of_those_that_are_left():
    """Who has left is not among the names of a look; the rewards know all."""
    rows = corpus(400, 0)
    found, wanted = with_rewards(rows, 400, ("a", "c"))[BETA], plain(rows, 400)[BETA]
    np.testing.assert_allclose(found.value * found.unit, wanted.value[[0, 2]] * wanted.unit, rtol=1e-9)
    np.testing.assert_allclose(
        found.differences.value * found.unit, wanted.differences.value[np.ix_([0, 2], [0, 2])] * wanted.unit, rtol=1e-9
    )


def test_a_look_claims_more_where_rewards_are_known():
    rows, shares = corpus(20_000, 0, noise=2.0, own=0.1), planned_looks(20_000)
    scored = rows.slice(0, 200 * len(NAMES))
    plain_look = take_look(scored, SETTINGS, History(NAMES), shares, n_prompts=200)
    known = KnownRewards.of(rows, NAMES)
    look = take_look(scored, SETTINGS, History(NAMES), shares, n_prompts=200, rewards=known)
    assert set(plain_look.claims) < set(look.claims) <= {("a", "b"), ("a", "c"), ("b", "c")}
    nobody = take_look(scored.slice(0, 0), SETTINGS, History(NAMES), shares, n_prompts=200, rewards=known)
    assert (nobody.over, nobody.claims) == ("", ())


def test_rewards_that_do_not_vary():
    rows = corpus(300, 0, noise=0.0)
    known, unknown = with_rewards(rows, 100)[BETA], plain(rows, 100)[BETA]
    np.testing.assert_allclose(known.value * known.unit, unknown.value * unknown.unit, rtol=1e-9)
    np.testing.assert_allclose(known.deviation * known.unit, unknown.deviation * unknown.unit, rtol=1e-9)
