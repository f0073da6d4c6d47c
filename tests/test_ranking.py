"""The ranking: means by hand, intervals that cover, shared ranks, rows that carry no loss."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

import fastcompat as fc
from fastcompat import metrics
from fastcompat.errors import UsageError
from fastcompat.metrics import clustered_bootstrap_means


def scores(rows: list[tuple[str, str, float | None, int]], base_model: str = "m") -> pa.Table:
    """(generator, prompt, loss, tokens) as a score table."""
    return pa.table(
        {
            "generator": [row[0] for row in rows],
            "base_model": [base_model] * len(rows),
            "prompt_id": [row[1] for row in rows],
            "loss": pa.array([row[2] for row in rows], pa.float64()),
            "nll_sum": pa.array([None if row[2] is None else row[2] * row[3] for row in rows], pa.float64()),
            "n_tokens": pa.array([row[3] for row in rows], pa.int32()),
            "status": ["empty" if row[2] is None else "ok" for row in rows],
        }
    )


def test_means_by_hand():
    table = scores([("a", "p", 1.0, 10), ("a", "q", 2.0, 30), ("b", "p", 3.0, 5), ("b", "q", None, 0)])
    a, b = fc.rank(table).to_pylist()
    assert (a["generator"], a["n"], a["n_left_out"], a["loss"], a["mean_tokens"]) == ("a", 2, 0, 1.5, 20.0)
    assert (b["generator"], b["n"], b["n_left_out"], b["loss"]) == ("b", 1, 1, 3.0)
    by_token = fc.rank(table, average="token").to_pylist()
    assert by_token[0]["loss"] == pytest.approx((10 + 60) / 40)


def test_a_generator_without_any_loss_is_last_and_says_so():
    table = scores([("none", "p", None, 0), ("a", "p", 1.0, 10)])
    rows = fc.rank(table).to_pylist()
    assert [row["generator"] for row in rows] == ["a", "none"]
    assert rows[1]["loss"] is rows[1]["rank"] is None
    assert rows[1]["n_left_out"] == 1


def test_equal_generators_share_a_rank_and_distant_ones_do_not():
    draw = np.random.default_rng(0)
    rows = []
    for k in range(200):
        difficulty = draw.normal(0, 4)  # shared by all generators: only a paired comparison sees through it
        rows += [("far", f"p{k}", 3.0 + difficulty + draw.normal(0, 0.1), 10)]
        rows += [(name, f"p{k}", 2.5 + difficulty + draw.normal(0, 0.1), 10) for name in ("x", "y")]
    ranking = {row["generator"]: row for row in fc.rank(scores(rows)).to_pylist()}
    assert {ranking["x"]["rank"], ranking["y"]["rank"]} == {1}
    assert ranking["far"]["rank"] == 3
    assert ranking["far"]["loss_low"] < ranking["x"]["loss_high"], "the plain intervals overlap"


def test_equal_generators_are_seldom_told_apart():
    """Six generators of one distribution: any separation in a ranking is false; 5% of rankings may have one."""
    draw = np.random.default_rng(2)
    separated = 0
    for seed in range(100):
        loss = draw.exponential(1, size=100)[:, None] + draw.exponential(0.5, size=(100, 6))
        rows = [(f"g{g}", f"p{p}", loss[p, g], 10) for p in range(100) for g in range(6)]
        ranking = fc.rank(scores(rows), draws=300, seed=seed)
        separated += len(set(ranking["rank"].to_pylist())) > 1
    assert separated <= 10


def test_a_handful_of_prompts_gives_no_interval_and_separates_nobody():
    rows = fc.rank(scores([("a", "p", 1.0, 10), ("b", "p", 1.1, 10)])).to_pylist()
    assert [row["rank"] for row in rows] == [1, 1]
    assert [row["loss_low"] for row in rows] == [None, None]


def test_the_interval_covers_the_mean_it_estimates():
    draw = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        # Heavy tails, three responses to a prompt that resemble each other.
        prompt = draw.lognormal(0, 0.7, size=150)
        loss = prompt[:, None] + draw.exponential(0.3, size=(150, 3))
        means = clustered_bootstrap_means(loss.sum(1)[:, None], np.full((150, 1), 3.0), draws=400, seed=seed)
        low, high = np.percentile(means, [2.5, 97.5])
        covered += low <= np.exp(0.7**2 / 2) + 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_replicates_do_not_depend_on_how_they_are_chunked(monkeypatch):
    draw = np.random.default_rng(0)
    numerator, denominator = draw.random((500, 3)), np.ones((500, 3))
    means = clustered_bootstrap_means(numerator, denominator, draws=64, seed=3)
    monkeypatch.setattr(metrics, "WEIGHTS_PER_STEP", 1500)
    again = clustered_bootstrap_means(numerator, denominator, draws=64, seed=3)
    np.testing.assert_allclose(means, again, rtol=1e-12)
    assert means.std(axis=0) == pytest.approx(numerator.std(axis=0) / 500**0.5, rel=0.4)


def test_several_base_models_are_ranked_apart():
    table = pa.concat_tables([scores([("a", "p", 1.0, 3)], "one"), scores([("a", "p", 2.0, 3)], "two")])
    rows = fc.rank(table).to_pylist()
    assert [(row["base_model"], row["loss"], row["rank"]) for row in rows] == [("one", 1.0, 1), ("two", 2.0, 1)]


def test_unknown_columns_and_averages_are_refused():
    table = scores([("a", "p", 1.0, 3)])
    with pytest.raises(UsageError, match="not a column of groups"):
        fc.rank(table, by="teacher")
    with pytest.raises(UsageError, match="median"):
        fc.rank(table, average="median")
