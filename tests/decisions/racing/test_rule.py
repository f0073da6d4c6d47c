"""The rule of a race: what a look claims, who leaves, when it is over; in constructed cases and against `rank`."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fastcompat as fc
from fastcompat.decisions.racing.rule import History, Look, RaceSettings, take_look
from fastcompat.decisions.ranking.looks import planned_looks
from fastcompat.errors import UsageError

BETA = 3.0


def table(figures: dict[str, tuple[float, float]], n_prompts: int, seed: int = 0, noise: float = 1.0) -> pa.Table:
    """generator -> (mean reward, mean loss): one response a prompt, rewards and losses around them, n_tokens."""
    draw = np.random.default_rng(seed)
    easy, kind = draw.normal(size=n_prompts), draw.lognormal(-0.02, 0.2, size=n_prompts)
    parts = []
    for name, (reward, loss) in figures.items():
        n_tokens = draw.integers(5, 200, n_prompts)
        own = loss * kind * draw.lognormal(-(0.3**2) / 2, 0.3 * noise, size=n_prompts)
        parts.append(
            pa.table(
                {
                    "prompt_id": [f"p{k:05}" for k in range(n_prompts)],
                    "generator": [name] * n_prompts,
                    "reward": reward + noise * (easy + draw.normal(size=n_prompts)),
                    "loss": own,
                    "nll_sum": own * n_tokens,
                    "n_tokens": pa.array(n_tokens.astype(np.int32)),
                    "base_model": ["m"] * n_prompts,
                    "reward_model": ["r"] * n_prompts,
                    "status": ["ok"] * n_prompts,
                }
            )
        )
    return pa.concat_tables(parts)


def settings(**options: Any) -> RaceSettings:
    return RaceSettings(**{"figure": "car", "beta": BETA, "margin": 0.0, **options})


def one_look(rows: pa.Table, asked: RaceSettings, n_prompts: int, *, corpus: int = 100_000) -> Look:
    names = tuple(sorted(set(rows["generator"].to_pylist())))
    return take_look(rows, asked, History(names), planned_looks(corpus), n_prompts=n_prompts)


def the_end(rows: pa.Table, asked: RaceSettings, n_prompts: int) -> Look:
    """As if the corpus were so small that it is looked at once, at its end."""
    names = tuple(sorted(set(rows["generator"].to_pylist())))
    return take_look(rows, asked, History(names), [1.0], n_prompts=n_prompts)


SPREAD = {"a": (7.0, 1.5), "b": (6.95, 1.5), "c": (5.0, 1.5), "d": (4.0, 1.6)}


def test_a_look_is_a_function_of_its_rows_in_any_order():
    rows = table(SPREAD, 300)
    looks = [one_look(rows, settings(), 300)]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(rows.num_rows)
        looks.append(one_look(rows.take(pa.array(order)), settings(), 300))
    assert all(json.dumps(look.to_json()) == json.dumps(looks[0].to_json()) for look in looks)


def test_who_is_clearly_below_leaves_and_the_rest_goes_on():
    look = one_look(table(SPREAD, 300), settings(), 300)
    assert set(look.out) == {"c", "d"}
    assert look.out["c"].startswith("out of the race after 300 prompts: below ")
    assert {("a", "c"), ("b", "c"), ("a", "d"), ("b", "d")} <= set(look.claims)
    assert not {("a", "b"), ("b", "a")} & set(look.claims)
    assert look.over == ""
    assert (look.number, look.n_looks, look.n_responses) == (1, len(planned_looks(100_000)), 1200)
    assert {standing.generator for standing in look.standings} == set(SPREAD)
    assert look.leader in ("a", "b")


def test_the_last_one_is_the_winner():
    look = one_look(table({name: SPREAD[name] for name in "acd"}, 300), settings(), 300)
    assert (look.over, look.leader, set(look.out)) == ("winner", "a", {"c", "d"})


def test_a_race_goes_on_from_what_was_decided():
    shares, rows = planned_looks(2000), table(SPREAD, 2000)
    history = History(tuple("abcd"))
    looks = []
    for share in shares:
        n = round(share * 2000)
        seen = rows.filter(pa.array(np.tile(np.arange(2000), 4) < n))
        looks.append(take_look(seen, settings(), history, shares, n_prompts=n))
        history = History(history.names, tuple(looks))
        if history.over:
            break
    assert [look.number for look in looks] == list(range(1, len(looks) + 1))
    assert not set(looks[0].out) & {name for look in looks[1:] for name in look.out}
    for before, after in pairwise(looks):
        still = {standing.generator for standing in before.standings} - set(before.out)
        assert {standing.generator for standing in after.standings} == still
    # Rows of those that have left count for nothing.
    again = take_look(
        seen.filter(pa.array(np.isin(seen["generator"].to_numpy(zero_copy_only=False), ["a", "b"]))),
        settings(),
        History(history.names, tuple(looks[:-1])),
        shares,
        n_prompts=n,
    )
    assert again == looks[-1]


def test_within_the_margin_a_leader_is_enough():
    figures = {"a": (6.0, 1.5), "b": (6.0, 1.5), "c": (4.0, 1.5)}
    rows = table(figures, 4000, noise=0.2)
    look = one_look(rows, settings(margin=0.01), 4000)
    assert look.over == "margin"
    assert set(look.out) == {"c"}
    assert look.equal in ((("a", "b"),), (("b", "a"),))
    assert look.equal[0][0] == look.leader
    assert one_look(rows, settings(margin=0.0), 4000).over == "", "who insists gets no such end"
    assert one_look(table(figures, 4000), settings(margin=0.001), 4000).over == "", "nor does a margin below the noise"


def test_a_ranking_settles_every_pair():
    figures = {"a": (7.0, 1.5), "b": (6.0, 1.5), "c": (5.0, 1.5)}
    look = one_look(table(figures, 1000), settings(until="ranking"), 1000)
    assert look.over == "ranking"
    assert set(look.claims) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert set(look.out) == set("abc")


def test_in_a_ranking_only_settled_places_leave():
    look = one_look(table(SPREAD, 300), settings(until="ranking"), 300)
    assert set(look.out) == {"c", "d"}, "the place of a is not known, nor that of b"
    assert "its place among 4 is settled" in look.out["c"]
    assert look.over == ""
    history = History(tuple("abcd"), (look,))
    assert history.still_in == ["a", "b"]
    assert ("d", "a") in history.settled
    # Far more rows tell these two apart; pairs of those that left are not asked again.
    second = take_look(
        table(SPREAD, 60_000), settings(until="ranking"), history, planned_looks(100_000), n_prompts=60_000
    )
    assert (second.over, second.claims) == ("ranking", (("a", "b"),))


def test_in_a_ranking_equals_within_the_margin_are_settled():
    figures = {"a": (6.0, 1.5), "b": (6.0, 1.5), "c": (4.0, 1.5)}
    look = one_look(table(figures, 4000, noise=0.2), settings(until="ranking", margin=0.01), 4000)
    assert (look.over, look.equal) == ("ranking", (("a", "b"),))


def test_precision_lets_go_of_what_is_known_well_enough():
    rows = pa.concat_tables([table({"calm": (6.0, 1.5)}, 500, noise=0.1), table({"wild": (6.0, 1.5)}, 500, noise=2.0)])
    look = one_look(rows, settings(until="precision", precision=0.03), 500)
    assert set(look.out) == {"calm"}
    assert "known to within 0.03 of its figure" in look.out["calm"]
    assert look.claims == ()
    assert one_look(rows, settings(until="precision", precision=0.5), 500).over == "precision"
    assert one_look(rows, settings(until="precision", precision=0.001), 500).out == {}


@pytest.mark.parametrize("figure", ["car", "loss", "reward"])
@pytest.mark.parametrize("average", ["response", "token"])
def test_the_last_look_is_the_ordinary_ranking(figure, average):
    figures = {f"g{k}": (6.0 - 0.07 * k, 1.5 + 0.03 * (k % 4)) for k in range(8)}
    told = 0
    for seed in range(4):
        rows = table(figures, 400, seed)
        ranked = fc.rank(rows, beta=BETA, sort_by=figure, average=average, draws=1).to_pylist()
        asked = settings(figure=figure, average=average, until="ranking")
        look = the_end(rows, asked, 400)
        worse = [loser for _, loser in look.claims]
        assert {row["generator"]: row["rank"] for row in ranked} == {name: 1 + worse.count(name) for name in figures}
        assert [standing.generator for standing in look.standings] == [row["generator"] for row in ranked]
        for standing, row in zip(look.standings, ranked, strict=True):
            ends = [row[figure + end] for end in ("", "_low", "_high")]
            assert [standing.value, standing.low, standing.high] == pytest.approx(ends, rel=1e-5)
        told += len(worse)
        # Who is after the winner alone leaves pairs of losers undecided, and spends nothing on them.
        winner = the_end(rows, settings(figure=figure, average=average), 400)
        assert {row["generator"] for row in ranked if row["rank"] > 1} <= set(winner.out)
    assert 0 < told < 4 * 28, "some are told apart, and not all"


def test_equal_generators_reach_the_end_of_the_corpus():
    look = the_end(table(dict.fromkeys("abc", (6.0, 1.5)), 200), settings(), 200)
    assert (look.over, look.out, look.claims) == ("end", {}, ())


def test_on_the_way_it_takes_more_than_at_the_end():
    """Many a table tells more apart at a single look than at one of many."""
    more = 0
    for seed in range(10):
        rows = table({"a": (6.3, 1.5), "b": (6.0, 1.5)}, 400, seed)
        on_the_way, at_the_end = one_look(rows, settings(), 400), the_end(rows, settings(), 400)
        assert set(on_the_way.claims) <= set(at_the_end.claims)
        more += at_the_end.claims > on_the_way.claims
        wide, plain = on_the_way.standings[0], at_the_end.standings[0]
        assert wide.value == plain.value
        assert wide.low < plain.low < plain.high < wide.high
    assert more


def test_leads_are_relative_to_the_leader_and_say_what_is_claimed():
    look = one_look(table({"a": (6.0, 1.5), "b": (3.0, 1.5)}, 400), settings(), 400)
    first, second = look.standings
    assert (first.lead, first.lead_low, first.lead_high) == (0.0, 0.0, 0.0)
    assert second.lead == pytest.approx(second.value / first.value - 1, abs=1e-5)
    assert second.lead_low < second.lead < second.lead_high < 0
    losses = one_look(table({"a": (6.0, 1.5), "b": (6.0, 3.0)}, 400), settings(figure="loss"), 400)
    assert losses.leader == "a"
    assert losses.standings[1].lead == pytest.approx(-1, abs=0.1), "twice the loss is worse by the whole of it"


def test_a_negative_mean_reward_by_chance_is_not_known_yet():
    rows = table({"a": (6.0, 1.5), "b": (-0.001, 1.5), "c": (5.9, 1.5)}, 200, seed=1)
    mean = np.mean([row["reward"] for row in rows.to_pylist() if row["generator"] == "b"])
    assert mean < 0
    look = one_look(rows, settings(), 200)
    assert "b" not in look.out
    assert look.standings[-1].generator == "b"
    assert look.standings[-1].value is look.standings[-1].lead is None
    assert look.over == ""
    assert one_look(rows, settings(reward_shift=3.0), 200).out.keys() == {"b"}


def test_a_mean_reward_that_is_surely_negative_has_no_car():
    rows = table({"a": (6.0, 1.5), "b": (-2.0, 1.5)}, 200)
    with pytest.raises(UsageError, match=r"the mean reward of b.*negative"):
        one_look(rows, settings(), 200)
    assert one_look(rows, settings(figure="reward"), 200).over == "winner"


def test_what_is_surely_negative_at_one_look_may_be_chance_at_one_of_many():
    """2.9 standard errors below zero: at a single look of two generators 2.58 are enough, at one of 46 they are not."""
    rows = table({"a": (6.0, 1.5), "b": (0.0, 1.5)}, 200)
    of_b = np.array(rows["generator"].to_pylist()) == "b"
    reward = rows["reward"].to_numpy().copy()
    x = np.sort(np.abs(reward[of_b][:100]))
    reward[of_b] = np.concatenate([x, -x]) / np.concatenate([x, -x]).std(ddof=1) - 2.9 / np.sqrt(199)
    rows = rows.set_column(rows.column_names.index("reward"), "reward", pa.array(reward))
    look = one_look(rows, settings(), 200)
    assert (look.over, look.standings[-1].value) == ("", None)
    with pytest.raises(UsageError, match=r"the mean reward of b.*negative"):
        the_end(rows, settings(), 200)


def test_generators_without_rows_or_with_a_handful_stay_in():
    rows = table({"a": (7.0, 1.5), "b": (4.0, 1.5)}, 200)
    few = table({"c": (1.0, 9.0)}, 9)
    shares = planned_looks(100_000)
    for until in ("winner", "ranking"):
        look = take_look(
            pa.concat_tables([rows, few]), settings(until=until), History(tuple("abcd")), shares, n_prompts=200
        )
        assert look.over == "", until
        assert set(look.out) == ({"b"} if until == "winner" else set())
        assert [(s.generator, s.n_prompts, s.value is None) for s in look.standings[-2:]] == [
            ("c", 9, True),
            ("d", 0, True),
        ]
    margin = take_look(
        pa.concat_tables([rows, few]), settings(margin=0.9), History(tuple("abcd")), shares, n_prompts=200
    )
    assert margin.over == "", "nobody knows that c and d are within any margin"
    nothing = take_look(rows.slice(0, 0), settings(), History(tuple("ab")), shares, n_prompts=200)
    assert (nothing.over, nothing.out, nothing.leader) == ("", {}, None)


@pytest.mark.parametrize(("figure", "best"), [("loss", "low"), ("reward", "high"), ("car", "both")])
def test_it_goes_by_the_figure_that_was_asked_for(figure, best):
    figures = {"low": (5.0, 0.5), "high": (9.0, 2.0), "both": (7.0, 0.6)}
    look = one_look(table(figures, 500), settings(figure=figure), 500)
    assert (look.over, look.leader) == ("winner", best)


def test_losses_averaged_over_tokens():
    """One has a low loss where it says much, the other where it says little."""
    n = 300
    draw = np.random.default_rng(0)
    rows = []
    for name, short, long in (("a", 1.0, 3.0), ("b", 2.0, 2.2)):
        for k in range(n):
            n_tokens, loss = ((10, short), (100, long))[k % 2]
            loss *= draw.lognormal(0, 0.05)
            rows.append(
                {
                    "prompt_id": f"p{k}",
                    "generator": name,
                    "loss": loss,
                    "nll_sum": loss * n_tokens,
                    "n_tokens": n_tokens,
                }
            )
    both = pa.Table.from_pylist(rows)
    by_token = one_look(both, settings(figure="loss", average="token"), n)
    by_response = one_look(both, settings(figure="loss"), n)
    assert (by_token.over, by_token.leader) == ("winner", "b")
    assert (by_response.leader, by_response.standings[0].value) == ("a", pytest.approx(2.0, rel=0.02))
    without = both.set_column(both.column_names.index("n_tokens"), "n_tokens", pa.nulls(2 * n, pa.int64()))
    with pytest.raises(UsageError, match="n_tokens"):
        one_look(without, settings(figure="loss", average="token"), n)


@pytest.mark.parametrize("until", ["winner", "ranking"])
def test_looks_go_through_json(until):
    for rows in (table(SPREAD, 300), table({"a": (6.0, 1.5), "b": (6.0, 1.5)}, 4000, noise=0.2)):
        look = one_look(rows, settings(until=until, margin=0.01), 300)
        text = json.dumps(look.to_json())
        assert Look.from_json(json.loads(text)) == look
        assert json.dumps(Look.from_json(json.loads(text)).to_json()) == text
    with pytest.raises((KeyError, TypeError)):
        Look.from_json({"number": 1})
    with pytest.raises((KeyError, TypeError)):
        Look.from_json(look.to_json() | {"what": 1})


def test_who_was_out_before_is_not_raced():
    history = History(tuple("abcd"), before={"a": "out before"})
    look = take_look(table(SPREAD, 300), settings(), history, planned_looks(100_000), n_prompts=300)
    assert (look.over, look.leader) == ("winner", "b")
    assert history.still_in == ["b", "c", "d"]
    assert look.n_responses == 900


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": "best"}, "until must be"),
        ({"until": "precision"}, "precision goes with"),
        ({"precision": 0.01}, "precision goes with"),
        ({"until": "precision", "precision": 0.0}, "precision must lie"),
        ({"until": "precision", "precision": float("nan")}, "precision"),
        ({"margin": -0.1}, "margin must be"),
        ({"margin": 1.0}, "margin must be"),
        ({"beta": -1.0}, "beta"),
        ({"average": "median"}, "average must be"),
        ({"figure": "p_best"}, "sort_by must be"),
        ({"reward_shift": float("inf")}, "reward_shift"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        RaceSettings(**options)
