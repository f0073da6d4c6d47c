"""The ranking: figures by hand, edge cases of CAR, shared ranks, who is best, for which beta the winner changes."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcompat as fc
from fastcompat.decisions.ranking.intervals import FALSE_DIFFERENCES, skewness_corrected, student_t_quantile
from fastcompat.decisions.ranking.ranking import group_column, rank, sensitivity
from fastcompat.decisions.ranking.reading import coverage_notes, readings, what_the_figures_are
from fastcompat.errors import UsageError


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
        rows += [("far", f"p{k}", 30.0 + difficulty + draw.normal(0, 0.1), 10)]
        rows += [(name, f"p{k}", 29.5 + difficulty + draw.normal(0, 0.1), 10) for name in ("x", "y")]
    ranking = {row["generator"]: row for row in fc.rank(scores(rows)).to_pylist()}
    assert {ranking["x"]["rank"], ranking["y"]["rank"]} == {1}
    assert ranking["far"]["rank"] == 3, "both are clearly better"
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
    rows = random_rows(300)
    incomplete = {prompt for _, prompt, reward, loss in rows if reward is None or loss is None}
    incomplete |= {prompt for _, prompt, _, _ in rows if {r[0] for r in rows if r[1] == prompt} != set("abc")}
    counted = {r[1] for r in rows if None not in r[2:] and (leave_out == "response" or r[1] not in incomplete)}
    assert len(counted) >= 10
    ranking = rank(own(rows), beta=[0.0, 2.5], leave_out=leave_out, draws=50).to_pylist()
    assert [row["beta"] for row in ranking] == [0.0] * 3 + [2.5] * 3
    for row in ranking:
        mine = [r for r in rows if r[0] == row["generator"]]
        kept = [r for r in mine if None not in r[2:] and (leave_out == "response" or r[1] not in incomplete)]
        reward, loss = (math.fsum(r[k] for r in kept) / len(kept) for k in (2, 3))
        assert (row["n"], row["n_left_out"]) == (len(kept), len(mine) - len(kept))
        assert (row["n_prompts"], row["n_prompts_total"]) == (len({r[1] for r in kept}), len(counted))
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


def test_a_negative_mean_reward_is_refused_by_name():
    rows = [("good", "p", 1.0, 1.0), ("bad", "p", -0.5, 1.0), ("worse", "p", -2.0, 1.0)]
    with pytest.raises(UsageError, match=r"mean reward of worse, -2 is negative: .*by 2 or more \(--reward-shift"):
        rank(own(rows))
    with pytest.raises(UsageError, match=r"bad, -0.5 \(with reward_shift 0.25\) is -0.25, negative.*by 0.5 or more \("):
        rank(own(rows[:2]), reward_shift=0.25)
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
    assert [(r["generator"], r["rank"]) for r in ranking] == [("few", 1), ("a", 1), ("b", 2)]
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


def test_the_order_of_rows_changes_nothing_but_the_rounding_of_sums():
    rows = random_rows(100)
    shuffled = [rows[k] for k in np.random.default_rng(1).permutation(len(rows))]
    plain, other = (rank(own(t), draws=500).to_pylist() for t in (rows, shuffled))
    assert len({row["p_best"] for row in plain}) > 1
    for one, two in zip(plain, other, strict=True):
        assert two == {name: pytest.approx(x, rel=1e-9) if isinstance(x, float) else x for name, x in one.items()}


def test_equal_generators_are_in_the_order_of_their_names():
    rows = [(name, f"p{k}", 5.0, 1.0) for k in range(12) for name in ("b", "c", "a")]
    assert rank(own(rows))["generator"].to_pylist() == ["a", "b", "c"]


def paired_rewards(sizes: dict[str, tuple[float, float]], n_prompts: int = 100) -> pa.Table:
    """Generator -> (mean reward, standard deviation around what all have in common); the loss is 0."""
    draw = np.random.default_rng(0)
    common, noise = draw.normal(0, 5, size=n_prompts), draw.permutation(np.linspace(-1.7, 1.7, n_prompts))
    rows = [
        (name, f"p{p}", mean + common[p] + deviation * np.roll(noise, 37 * k)[p], 0.0)
        for k, (name, (mean, deviation)) in enumerate(sizes.items())
        for p in range(n_prompts)
    ]
    return own(rows)


def test_the_rank_counts_all_that_are_clearly_better_whoever_leads():
    """A leader whose rewards vary wildly is told from nobody, which says nothing of the others."""
    table = paired_rewards({"noisy": (50.0, 200.0), "good": (40.0, 0.1), "fair": (39.0, 0.1), "poor": (38.0, 0.1)})
    ranking = rank(table, sort_by="reward").to_pylist()
    assert [(r["generator"], r["rank"]) for r in ranking] == [("noisy", 1), ("good", 1), ("fair", 2), ("poor", 3)]


def test_a_chain_of_neighbours_that_nobody_tells_apart():
    """b is not told from a, nor c from b, but c is from a: b and c differ in rank because of that alone."""
    table = paired_rewards({"a": (40.0, 1.0), "b": (39.6, 1.0), "c": (39.2, 1.0)}, n_prompts=60)
    ranking = rank(table, sort_by="reward").to_pylist()
    assert [(r["generator"], r["rank"]) for r in ranking] == [("a", 1), ("b", 1), ("c", 2)]


def test_ranks_of_many_generators_against_a_loop_over_pairs():
    draw = np.random.default_rng(3)
    means = draw.normal(10, 0.3, size=40)
    values = means + draw.normal(0, 3, size=(50, 1)) + draw.normal(0, 1, size=(50, 40))
    table = own([(f"g{g:02}", f"p{p}", values[p, g], 0.0) for p in range(50) for g in range(40)])
    quantile = student_t_quantile(1 - FALSE_DIFFERENCES / 2 / (40 * 39 / 2), np.array(49.0))
    ranks = dict.fromkeys(range(40), 1)
    for g, h in itertools.permutations(range(40), 2):
        difference = values[:, g] - values[:, h]
        influence = (difference - difference.mean()) / 49
        deviation = math.sqrt((influence**2).sum())
        skewness = (influence**3).sum() / deviation**3 * math.sqrt(50 * 49) / 48
        side = float(skewness_corrected(quantile, np.array(skewness / 6)))
        ranks[h] += difference.mean() > deviation * min(max(side, quantile), 2 * quantile)
    assert len(set(ranks.values())) > 5
    assert {row["generator"]: row["rank"] for row in rank(table, draws=1).to_pylist()} == {
        f"g{g:02}": n for g, n in ranks.items()
    }


def test_a_thousand_generators():
    draw = np.random.default_rng(0)
    n_groups, n_prompts = 1000, 20
    prompt, group = np.divmod(np.arange(n_groups * n_prompts), n_groups)
    table = pa.table(
        {
            "generator": pa.array(group),
            "prompt_id": pa.array(prompt),
            "reward": 5 + draw.normal(0, 0.1, size=len(group)) + np.where(group < 10, 20.0, 0.0),
            "loss": draw.lognormal(0, 0.1, size=len(group)),
        }
    )
    ranks = rank(table, draws=2)["rank"].to_pylist()
    assert ranks[:10] == [1] * 10
    assert min(ranks[10:]) == 11


def test_generators_that_answered_other_prompts_are_seen_and_can_be_compared():
    """`weak` answered only the easy half: its mean is the best, and it is the worst on every prompt."""
    rows = [("strong", f"p{k:03}", 5.0 + 4 * (k < 100) + k % 2, 1.0) for k in range(200)]
    rows += [("fair", f"p{k:03}", 4.5 + 4 * (k < 100) + k % 2, 1.0) for k in range(200)]
    rows += [("weak", f"p{k:03}", 4.0 + 4 * (k < 100) + k % 2, 1.0) for k in range(100)]
    ranking = rank(own(rows)).to_pylist()
    assert [(r["generator"], r["n_prompts"]) for r in ranking] == [("weak", 100), ("strong", 200), ("fair", 200)]
    assert {r["n_prompts_total"] for r in ranking} == {200}
    notes = coverage_notes(rank(own(rows)))
    assert notes == ["weak has figures for 100 of the 200 prompts: compare with --leave-out prompt."]
    whole = rank(own(rows), leave_out="prompt")
    assert [(r["generator"], r["rank"], r["n"], r["n_left_out"]) for r in whole.to_pylist()] == [
        ("strong", 1, 100, 100),
        ("fair", 2, 100, 100),
        ("weak", 3, 100, 0),
    ]
    assert coverage_notes(whole) == []
    rows = [("a", "p", 1.0, 1.0), ("a", "q", 1.0, 1.0), ("none", "p", None, 1.0)]
    assert coverage_notes(rank(own(rows))) == []
    rows += [("b", "p", 1.0, 1.0), ("c", "q", 1.0, 1.0), ("c", "r", 1.0, 1.0)]
    assert coverage_notes(rank(own(rows), beta=[0, 3])) == [
        "b has figures for 1 of the 3 prompts (2 more not for all either): compare with --leave-out prompt."
    ]


def test_prompts_that_no_generator_shares_are_refused_but_one_without_figures_is_not_asked_for():
    rows = [("a", "p", 1.0, 1.0), ("b", "q", 1.0, 1.0), ("b", "r", 1.0, 1.0)]
    with pytest.raises(UsageError, match="a answered the fewest, 1"):
        rank(own(rows), leave_out="prompt")
    rows = [("a", "p", 1.0, 1.0), ("b", "p", 1.0, 1.0), ("b", "q", 1.0, 1.0), ("none", "p", None, 1.0)]
    assert rank(own(rows), leave_out="prompt")["n"].to_pylist() == [1, 1, 0]


def test_rows_without_prompt_id_are_prompts_of_their_own_and_a_warning_says_so(caplog):
    table = own([(name, f"p{k}", 5.0 + k % 3, 1.0) for k in range(12) for name in "ab"])
    with caplog.at_level(logging.WARNING, logger="fastcompat"):
        rank(table)
        assert not caplog.records
        ranking = rank(table.drop(["prompt_id"])).to_pylist()
    assert ["no column prompt_id" in record.getMessage() for record in caplog.records] == [True]
    assert [(r["n_prompts"], r["n_prompts_total"]) for r in ranking] == [(12, 24), (12, 24)]


def test_a_row_whose_prompt_id_is_null_is_a_prompt_of_its_own():
    table = own([("a", p, 5.0, 1.0) for p in ("0", "1", None, None)])
    assert rank(table)["n_prompts"].to_pylist() == [4], "row keys 2 and 3, and prompts 0 and 1"


def test_negative_losses_are_refused_without_rewards_too():
    rows = [("a", "p", -1.5, 10), ("b", "p", -1.0, 10)]
    for average in ("response", "token"):
        with pytest.raises(UsageError, match=r"loss -1.5 is negative.*log-likelihood"):
            rank(scores(rows), average=average)
    assert rank(scores([("a", "p", -5e-5, 10)]))["loss"].to_pylist() == [-5e-5], "a certain token's NLL, rounded"


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_figures_of_extreme_size_rank_as_those_of_size_one(size):
    rows = random_rows(60)
    plain = rank(own(rows), sort_by="reward", draws=100).to_pylist()
    scaled = rank(own([(g, p, r and r * size, x) for g, p, r, x in rows]), sort_by="reward", draws=100).to_pylist()
    for one, two in zip(plain, scaled, strict=True):
        for name in ("generator", "rank", "p_best", "n"):
            assert two[name] == one[name]
        for name in ("reward", "reward_low", "reward_high", "car", "car_low"):
            assert two[name] == pytest.approx(one[name] * size, rel=1e-9)


def test_what_names_groups_and_what_does_not():
    table = own([(name, f"p{k}", 5.0 + k % 3, 1.0) for k in range(12) for name in "ab"])
    table = table.append_column("seed", pa.array([7, 11] * 12)).append_column("n_tokens", pa.array([5] * 24))
    table = table.append_column("status", pa.array(["ok"] * 24)).append_column("rank", pa.array([1] * 24))
    ranking = rank(table, by="seed")
    assert ranking["seed"].to_pylist() == ["11", "7"]
    assert group_column(ranking) == "seed"
    for name in ("status", "n_tokens", "rank", "reward", "prompt_id"):
        with pytest.raises(UsageError, match=f"--by {name}: not a column of groups; there are generator, seed$"):
            rank(table, by=name)


def test_the_shift_is_in_the_ranking_and_in_the_formula():
    table = own([("a", "p", 1.0, 1.0), ("b", "p", -2.0, 1.0)])
    ranking = rank(table, reward_shift=10.0, beta=[3, 3, 1])
    assert ranking["reward_shift"].to_pylist() == [10.0] * 4, "a beta that is given twice counts once"
    assert rank(table.drop(["loss"]), reward_shift=10.0)["reward_shift"].null_count == 2
    (line, *_) = what_the_figures_are(rank(table, reward_shift=10.0), "response", 1000)
    assert "CAR = (reward + 10) / (1 + 3 loss), beta 3. Another shift" in line
    (line, *_) = what_the_figures_are(rank(table.slice(0, 1), beta=[0, 3]), "response", 1000)
    assert line.endswith("CAR = reward / (1 + beta loss), beta 0, 3.")
    for beta in (3, [0, 3]):
        by_loss = rank(table.slice(1), sort_by="loss", beta=beta)
        assert "CAR" not in " ".join(what_the_figures_are(by_loss, "response", 1000))
        assert sensitivity(by_loss) == {}


def sentences(table: pa.Table, **options: Any) -> list[str]:
    ranking = rank(table, draws=20, **options)
    told = readings(ranking, sensitivity(ranking), options.get("sort_by"))
    return [f"{title}: {line}" for title, lines in told for line in lines]


def test_what_is_read_out_was_tested():
    table = paired_rewards({"good": (40.0, 0.1), "fair": (39.0, 0.1), "poor": (38.0, 0.1)})
    assert sentences(table) == [
        "beta 3: good has the best CAR; for every other generator there is one that is clearly better.",
        "beta 3: good has the best CAR whatever beta is.",
    ]
    assert sentences(paired_rewards({"noisy": (50.0, 200.0), "good": (40.0, 0.1), "poor": (38.0, 0.1)}))[0] == (
        "beta 3: No generator is clearly better than noisy and good; noisy has the best CAR."
    )
    few = own([("few", f"p{k}", 99.0, 0.0) for k in range(3)])
    assert sentences(pa.concat_tables([table, few]))[0] == (
        "beta 3: few has the best CAR, of too few prompts to say how surely."
    )
    few = own([("few", f"p{k}", 1.0, 0.0) for k in range(3)])
    assert sentences(pa.concat_tables([table, few]))[0].endswith("there is one that is clearly better.")
    assert sentences(few) == []


def test_for_which_beta_who_is_best_is_said_once_and_what_the_loss_says_too():
    rows = [(name, f"p{k}", r, x) for k in range(12) for name, r, x in (("a", 8.0, 3.0), ("b", 4.0, 1.0))]
    table = own(rows)
    assert sentences(table, beta=[0, 3]) == [
        "beta 0: a has the best CAR; for every other generator there is one that is clearly better.",
        "beta 0: a has the best CAR for beta below 1, b above 1.",
        "beta 3: b has the best CAR; for every other generator there is one that is clearly better.",
    ]
    (line,) = sentences(table, beta=[0, 3], sort_by="loss")
    assert line == ": b has the lowest loss; for every other generator there is one that is clearly better."
    three = own([*rows, *(("c", f"p{k}", 2.0, 0.2) for k in range(12))])
    # 4 / (1 + b) = 2 / (1 + 0.2 b) at b = 5 / 3.
    assert "a has the best CAR for beta below 1, b from 1 to 1.7, c above 1.7." in sentences(three)[1]


def test_options_out_of_range_are_refused():
    table = own([("a", "p", 1.0, 1.0)])
    for options, said in (
        ({"beta": -1}, "beta"),
        ({"beta": "x"}, "beta.*'x'"),
        ({"beta": "3"}, "beta"),
        ({"beta": None}, "beta"),
        ({"beta": [[1.0], [2.0, 3.0]]}, "beta"),
        ({"reward_shift": "much"}, "reward_shift.*'much'"),
        ({"seed": -1}, "seed.*-1"),
        ({"seed": 0.5}, "seed"),
        ({"draws": "many"}, "draws"),
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


def test_sensitivity_by_hand():
    ranking = rank(own([("strong", "p", 8.0, 3.0), ("near", "p", 4.0, 1.0), ("no", "p", 1.0, 1.0)]), draws=1)
    # 8 / (1 + 3 b) = 4 / (1 + b) at b = 1.
    assert sensitivity(ranking) == {(None, None): [(0.0, 1.0, "strong"), (1.0, math.inf, "near")]}
    # 9 / (1 + 3 b) = 5 / (1 + b) at b = 2 / 3; the ranking's own shift is known.
    assert sensitivity(ranking, reward_shift=1.0)[None, None][1] == (pytest.approx(2 / 3), math.inf, "near")
    rows = [("strong", "p", 8.0, 3.0), ("near", "p", 4.0, 1.0)]
    assert sensitivity(rank(own(rows), draws=1, reward_shift=1.0))[None, None][0].beta_to == pytest.approx(2 / 3)
    assert sensitivity(rank(own([("a", "p", None, 1.0)]))) == {}


def test_a_mean_reward_of_0_is_a_car_of_0():
    """Where a judge gives a generator nothing at all."""
    rows = [(name, f"p{k}", float(k % 2) * good, 1.0 + k % 3) for name, good in (("a", 1), ("b", 0)) for k in range(30)]
    ranking = rank(own(rows))
    good, none = ranking.to_pylist()
    assert (none["generator"], none["car"], none["car_low"], none["car_high"], none["rank"]) == ("b", 0, 0, 0, 2)
    assert (good["generator"], good["rank"], good["p_best"]) == ("a", 1, 1)
    assert [own.generator for own in sensitivity(ranking)[None, None]] == ["a"]
    nothing = rank(own([(name, prompt, 0.0, loss) for name, prompt, _, loss in rows]))
    assert [(row["car"], row["rank"]) for row in nothing.to_pylist()] == [(0, 1), (0, 1)]
    assert sensitivity(nothing) == {}
