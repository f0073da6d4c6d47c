"""The ranking: figures by hand, edge cases of CAR, shared ranks, who is best, for which beta the winner changes."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcompat as fc
from fastcompat.errors import UsageError
from fastcompat.ranking import rank, sensitivity


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


def own(rows: list[tuple[str, str, float | None, float | None]]) -> pa.Table:
    """(generator, prompt, reward, loss) as somebody's own table."""
    names = ("generator", "prompt_id", "reward", "loss")
    types = (pa.string(), pa.string(), pa.float64(), pa.float64())
    return pa.table({name: pa.array([r[k] for r in rows], types[k]) for k, name in enumerate(names)})


def random_rows(n_prompts: int = 40, seed: int = 0) -> list[tuple[str, str, float | None, float | None]]:
    """Three generators, unequal counts, prompts missing, figures missing."""
    draw = np.random.default_rng(seed)
    rows: list[tuple[str, str, float | None, float | None]] = []
    for p in range(n_prompts):
        for name in "abc":
            for _ in range(draw.integers(0, 4)):
                reward, loss = draw.normal(4, 1), draw.lognormal(0, 0.5)
                rows.append(
                    (name, f"p{p}", None if draw.random() < 0.1 else reward, None if draw.random() < 0.1 else loss)
                )
    return rows


@pytest.mark.parametrize("leave_out", ["response", "prompt"])
def test_figures_against_loops(leave_out):
    rows = random_rows()
    incomplete = {prompt for _, prompt, reward, loss in rows if reward is None or loss is None}
    ranking = rank(own(rows), beta=[0.0, 2.5], leave_out=leave_out, draws=50).to_pylist()
    assert [row["beta"] for row in ranking] == [0.0] * 3 + [2.5] * 3
    for row in ranking:
        mine = [r for r in rows if r[0] == row["generator"]]
        kept = [r for r in mine if None not in r[2:] and (leave_out == "response" or r[1] not in incomplete)]
        reward, loss = (math.fsum(r[k] for r in kept) / len(kept) for k in (2, 3))
        assert (row["n"], row["n_left_out"]) == (len(kept), len(mine) - len(kept))
        assert (row["reward"], row["loss"]) == (pytest.approx(reward, rel=1e-12), pytest.approx(loss, rel=1e-12))
        assert row["car"] == pytest.approx(reward / (1 + row["beta"] * loss), rel=1e-12)
        for name in ("reward", "loss", "car"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    assert sum(row["p_best"] for row in ranking[:3]) == pytest.approx(1)


def test_intervals_shrink_with_the_prompts_and_scale_with_the_figures():
    small, large = (rank(own(random_rows(n)), draws=1).to_pylist() for n in (50, 800))
    width = {n: {r["generator"]: r["car_high"] - r["car_low"] for r in t} for n, t in ((50, small), (800, large))}
    for name in "abc":
        assert 0.15 < width[800][name] / width[50][name] < 0.4
    scaled = rank(own([(g, p, r and 10 * r, x) for g, p, r, x in random_rows(50)]), draws=1).to_pylist()
    for row, ten in zip(small, scaled, strict=True):
        assert ten["car_high"] == pytest.approx(10 * row["car_high"])


def test_beta_of_zero_leaves_the_reward_with_its_interval():
    for row in rank(own(random_rows()), beta=0, draws=20).to_pylist():
        for end in ("", "_low", "_high"):
            assert row["car" + end] == pytest.approx(row["reward" + end], rel=1e-12)


def test_a_loss_of_zero_and_one_generator_and_one_prompt():
    (row,) = rank(own([("a", "p", 2.0, 0.0)])).to_pylist()
    assert (row["car"], row["rank"], row["n"], row["car_low"], row["p_best"]) == (2.0, 1, 1, None, None)
    (row,) = rank(own([("a", f"p{k}", 2.0 + k % 2, 0.0) for k in range(30)])).to_pylist()
    assert row["p_best"] == 1.0
    assert row["loss_low"] == row["loss"] == row["loss_high"] == 0.0


def test_a_mean_reward_that_is_not_positive_is_refused_by_name():
    rows = [("good", "p", 1.0, 1.0), ("bad", "p", -0.5, 1.0), ("worse", "p", -2.0, 1.0)]
    with pytest.raises(UsageError, match=r"mean reward of worse is -2.*more than 2 \(--reward-shift"):
        rank(own(rows))
    with pytest.raises(UsageError, match="bad is 0"):
        rank(own(rows[:2]), reward_shift=0.5)
    shifted = rank(own(rows), reward_shift=3.0).to_pylist()
    assert [(row["generator"], row["reward"], row["car"]) for row in shifted] == [
        ("good", 1.0, 1.0),
        ("bad", -0.5, 0.625),
        ("worse", -2.0, 0.25),
    ]
    by_reward = rank(own(rows), sort_by="reward").to_pylist()
    assert [row["car"] for row in by_reward] == [0.25, None, None]


def test_rewards_that_are_no_numbers_are_left_out():
    rows = [("a", "p", math.nan, 1.0), ("a", "q", 2.0, 3.0), ("b", "p", math.inf, 1.0), ("b", "q", 2.0, 4.0)]
    assert [(r["n"], r["n_left_out"], r["loss"]) for r in rank(own(rows)).to_pylist()] == [(1, 1, 3.0), (1, 1, 4.0)]


def test_generators_without_a_prompt_in_common_are_ranked_all_the_same():
    draw = np.random.default_rng(0)
    rows = [("a", f"a{k}", draw.normal(5, 1), 1.0) for k in range(100)]
    rows += [("b", f"b{k}", draw.normal(3, 1), 1.0) for k in range(100)]
    assert [(r["generator"], r["rank"]) for r in rank(own(rows)).to_pylist()] == [("a", 1), ("b", 2)]


def test_what_is_ranked_by_and_in_which_direction():
    rows = [("much", f"p{k}", 9.0 + k % 3, 5.0 + k % 2) for k in range(30)]
    rows += [("near", f"p{k}", 3.0 + k % 3, 0.1 + k % 2 / 10) for k in range(30)]
    assert [rank(own(rows), sort_by=by)["generator"][0].as_py() for by in ("car", "loss", "reward")] == [
        "near",
        "near",
        "much",
    ]
    for by in ("car", "loss", "reward"):
        assert rank(own(rows), sort_by=by)["p_best"].to_pylist() == [1.0, 0.0]
        assert rank(own(rows), sort_by=by)["rank"].to_pylist() == [1, 2]
    assert rank(own(rows).drop(["reward"]))["beta"].null_count == 2
    assert rank(own(rows).drop(["loss"]))["generator"][0].as_py() == "much"
    with pytest.raises(UsageError, match="only the loss"):
        rank(own(rows).drop(["reward"]), sort_by="car")


def test_equal_generators_share_the_draws_in_which_they_are_best():
    draw = np.random.default_rng(0)
    figures = [(draw.normal(5), draw.lognormal()) for _ in range(50)]
    rows = [(name, f"p{k}", *figures[k]) for k in range(50) for name in "xy"]
    rows += [("far", f"p{k}", figures[k][0] - 4, figures[k][1]) for k in range(50)]
    ranking = rank(own(rows), draws=200).to_pylist()
    assert [(r["generator"], r["rank"], r["p_best"]) for r in ranking] == [
        ("x", 1, 0.5),
        ("y", 1, 0.5),
        ("far", 3, 0.0),
    ]


def test_a_generator_of_few_prompts_does_not_hold_the_others_together():
    rows = [("few", f"p{k}", 9.0, 1.0) for k in range(3)]
    for name, reward in (("a", 6.0), ("b", 3.0)):
        rows += [(name, f"p{k}", reward + k % 2, 1.0) for k in range(40)]
    ranking = rank(own(rows)).to_pylist()
    assert [(r["generator"], r["rank"]) for r in ranking] == [("few", 1), ("a", 1), ("b", 3)]
    assert [r["p_best"] for r in ranking] == [None, 1.0, 0.0]


def test_one_huge_loss_makes_nobody_sure():
    """The slope of CAR is lower where the loss is higher, so the outlier hides from its own standard error."""
    rows = [
        (name, f"p{k}", 5.0 + (k + i) % 3, 1.0 + (k * (i + 1)) % 2) for k in range(30) for i, name in enumerate("ab")
    ]
    rows = [(g, p, r, 600.0 if (g, p) == ("b", "p4") else loss) for g, p, r, loss in rows]
    assert rank(own(rows))["rank"].to_pylist() == [1, 1]


def test_models_of_a_run_are_paired():
    rows = []
    for k in range(12):
        common = {"row_key": f"f#{k}", "prompt_id": f"p{k // 2}", "generator": "ab"[k % 2], "status": "ok"}
        rows += [common | {"base_model": model, "loss": 1.0 + k % 2, "n_tokens": 7} for model in ("m1", "m2")]
        rows += [common | {"reward_model": "r", "reward": 4.0, "n_tokens": 99}]
    fields = {"base_model": pa.string(), "reward_model": pa.string(), "loss": pa.float64(), "reward": pa.float64()}
    table = pa.table(
        {name: pa.array([r.get(name) for r in rows], fields.get(name)) for name in [*common, *fields, "n_tokens"]}
    )
    ranking = rank(table, beta=[1, 3]).to_pylist()
    keys = ("base_model", "reward_model", "beta", "generator", "car", "mean_tokens")
    assert [tuple(row[key] for key in keys) for row in ranking] == [
        (model, "r", beta, name, 4 / (1 + beta * loss), 7.0)
        for model in ("m1", "m2")
        for beta in (1.0, 3.0)
        for name, loss in (("a", 1.0), ("b", 2.0))
    ]
    assert list(sensitivity(rank(table))) == [("m1", "r"), ("m2", "r")]


def test_the_order_of_rows_changes_no_figure():
    rows = random_rows(100)
    shuffled = [rows[k] for k in np.random.default_rng(1).permutation(len(rows))]
    plain, other = ({r["generator"]: r for r in rank(own(t), draws=500).to_pylist()} for t in (rows, shuffled))
    for name, row in plain.items():
        for figure in ("reward_low", "loss_high", "car", "car_low"):
            assert other[name][figure] == pytest.approx(row[figure], rel=1e-9)
        assert other[name]["p_best"] == pytest.approx(row["p_best"], abs=0.1)


def test_options_out_of_range_are_refused():
    table = own([("a", "p", 1.0, 1.0)])
    for options, said in (
        ({"beta": -1}, "beta"),
        ({"beta": [math.inf]}, "beta"),
        ({"beta": []}, "beta"),
        ({"reward_shift": math.nan}, "reward_shift"),
        ({"leave_out": "all"}, "leave_out"),
        ({"sort_by": "ifd"}, "sort_by"),
        ({"draws": 0}, "draws"),
        ({"average": "token"}, "n_tokens"),
    ):
        with pytest.raises(UsageError, match=said):
            rank(table, **options)
    with pytest.raises(UsageError, match="every row's is null"):
        rank(own([(None, "p", 1.0, 1.0)]))
    with pytest.raises(UsageError, match="negative"):
        rank(own([("a", "p", 1.0, -1.0)]))


positive = st.floats(0.01, 100)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(positive, st.floats(0, 50)), min_size=1, max_size=8))
def test_sensitivity_against_a_grid(figures):
    rows = [(f"g{k}", "p", reward, loss) for k, (reward, loss) in enumerate(figures)]
    ((_, ranges),) = sensitivity(rank(own(rows), draws=1)).items()
    assert ranges[0].beta_from == 0.0
    assert ranges[-1].beta_to == math.inf
    assert [r.beta_to for r in ranges[:-1]] == [r.beta_from for r in ranges[1:]]
    assert len({r.generator for r in ranges}) == len(ranges)
    for beta in [0.0, *np.geomspace(1e-4, 1e6, 400)]:
        best = max(reward / (1 + beta * loss) for reward, loss in figures)
        (winner,) = (r.generator for r in ranges if r.beta_from <= beta < r.beta_to)
        reward, loss = figures[int(winner[1:])]
        assert reward / (1 + beta * loss) == pytest.approx(best, rel=1e-9)


def test_sensitivity_by_hand_and_its_refusal():
    ranking = rank(own([("strong", "p", 8.0, 3.0), ("near", "p", 4.0, 1.0), ("no", "p", 1.0, 1.0)]), draws=1)
    # 8 / (1 + 3 b) = 4 / (1 + b) at b = 1.
    assert sensitivity(ranking) == {(None, None): [(0.0, 1.0, "strong"), (1.0, math.inf, "near")]}
    with pytest.raises(UsageError, match="no is 0"):
        sensitivity(ranking, reward_shift=-1.0)
    assert sensitivity(rank(own([("a", "p", None, 1.0)]))) == {}
