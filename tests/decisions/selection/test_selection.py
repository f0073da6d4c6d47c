"""Selection: what a plain loop chooses, guards, duplicates, budget, mixtures, models, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from fastcompat.decisions.selection.selection import METADATA_KEY, select
from fastcompat.decisions.selection.settings import parse_by
from fastcompat.errors import UsageError
from fastcompat.metrics.catalogue import METRICS


def random_scores(seed: int, n_rows: int = 300) -> pa.Table:
    """Few different values, so that there are ties of every kind; some figures are null, NaN or not scored."""
    draw = np.random.default_rng(seed)
    loss: list[float | None] = draw.integers(1, 5, n_rows).astype(float).tolist()
    reward: list[float | None] = draw.integers(1, 4, n_rows).astype(float).tolist()
    status = ["ok"] * n_rows
    for k in draw.choice(n_rows, n_rows // 5, replace=False):
        match int(draw.integers(4)):
            case 0:
                loss[k], status[k] = None, "empty"
            case 1:
                reward[k] = math.nan
            case 2:
                reward[k] = None
            case 3:
                status[k] = "oom"  # figures that nobody should trust
    return pa.table(
        {
            "row_key": [f"file#{k}" for k in draw.permutation(n_rows)],
            "prompt_id": [f"p{p}" for p in draw.integers(0, n_rows // 8, n_rows)],
            "generator": [f"g{g}" for g in draw.integers(0, 3, n_rows)],
            "n_tokens": pa.array(draw.integers(1, 40, n_rows), pa.int32()),
            "loss": pa.array(loss, pa.float64()),
            "reward": pa.array(reward, pa.float64()),
            "response": [f"text {k}" for k in draw.integers(0, 6, n_rows)],
            "status": status,
        }
    )


def chosen_by_loop(
    table: pa.Table, value_of, *, top=1, threshold=None, budget=None, min_tokens=0, max_tokens=10**9, duplicates=True
) -> list[str]:
    """Row keys by the definition, one row after the other. `value_of(row)`: higher is better; None: no value."""
    prompts: dict[str, list[tuple]] = {}
    for row in table.to_pylist():
        value = value_of(row)
        if row["status"] != "ok" or value is None or not math.isfinite(value):
            continue
        if min_tokens <= row["n_tokens"] <= max_tokens:
            key = (-value, row["loss"], row["row_key"])
            prompts.setdefault(row["prompt_id"], []).append((key, row))
    left = []
    for rows in prompts.values():
        rows.sort(key=lambda entry: entry[0])
        seen, kept = set(), []
        for key, row in rows:
            if not duplicates or row["response"] not in seen:
                kept.append((key, row["row_key"]))
            seen.add(row["response"])
        if threshold is not None:
            kept = [entry for entry in kept if -entry[0][0] >= threshold]
        if kept:
            left.append(kept[:top])
    left.sort(key=lambda kept: kept[0][0])
    wanted = {row_key for kept in left[:budget] for _, row_key in kept}
    return [row_key for row_key in table["row_key"].to_pylist() if row_key in wanted]


def car_of(row: dict) -> float | None:
    return None if row["reward"] is None or row["loss"] is None else row["reward"] / (1 + 3 * row["loss"])


def loss_of(row: dict) -> float | None:
    return None if row["loss"] is None else -row["loss"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top": 3},
        {"top": 2, "budget": 7},
        {"threshold": 0.3},
        {"threshold": 0.2, "top": 2, "budget": 20},
        {"top": 1000},
        {"top": 2, "drop_duplicates": False},
        {"min_tokens": 10, "max_tokens": 20, "top": 2},
        {"budget": 1},
        {"budget": 100_000},
    ],
    ids=str,
)
def test_the_choice_is_that_of_a_plain_loop(seed, settings):
    table = random_scores(seed)
    expected = dict(settings)
    duplicates = expected.pop("drop_duplicates", True)
    if "threshold" in expected:
        expected.setdefault("top", None)
    wanted = chosen_by_loop(table, car_of, duplicates=duplicates, **expected)
    chosen = select(table, **settings)
    assert chosen["row_key"].to_pylist() == wanted
    record = json.loads(chosen.schema.metadata[METADATA_KEY])
    assert sum(record["left_out"].values()) + chosen.num_rows == table.num_rows == sum(record["available"].values())


@pytest.mark.parametrize("seed", range(3))
def test_a_lower_loss_is_better_and_its_threshold_is_an_upper_one(seed):
    table = random_scores(seed).drop_columns("reward")
    chosen = select(table, by="loss", threshold=2.0)
    assert chosen["row_key"].to_pylist() == chosen_by_loop(table, loss_of, top=None, threshold=-2.0)
    assert max(chosen["loss"].to_pylist()) == 2.0


def test_values_and_ranks_by_hand():
    table = pa.table(
        {
            "row_key": ["a", "b", "c", "d", "e"],
            "prompt_id": ["p", "p", "q", "p", "q"],
            "generator": ["g", "h", "g", "i", "h"],
            "loss": [1.0, 0.0, 2.0, 1.0, 0.5],
            "reward": [8.0, 1.0, 7.0, 4.0, 5.0],
            "label": [1, 2, 3, 4, 5],
        }
    )
    chosen = select(table, top=2, drop_duplicates=False).to_pylist()
    # b and d have the same CAR; b has the lower loss.
    assert [(row["row_key"], row["car"], row["rank"], row["label"]) for row in chosen] == [
        ("a", 2.0, 1, 1),
        ("b", 1.0, 2, 2),
        ("c", 1.0, 2, 3),
        ("e", 2.0, 1, 5),
    ]
    shifted = select(table, reward_shift=1.0, beta=1.0)
    assert dict(zip(shifted["row_key"].to_pylist(), shifted["car"].to_pylist(), strict=True)) == {"a": 4.5, "e": 4.0}


def test_equal_rows_are_ordered_by_their_key_as_text():
    keys = ["x#9", "x#10", "x#2"]
    table = pa.table({"row_key": keys, "prompt_id": ["p"] * 3, "loss": [1.0] * 3, "reward": [2.0] * 3})
    chosen = select(table, top=3, drop_duplicates=False)
    assert dict(zip(chosen["row_key"].to_pylist(), chosen["rank"].to_pylist(), strict=True)) == {
        "x#9": 3,
        "x#10": 1,
        "x#2": 2,
    }


def test_of_equal_rewards_one_without_a_loss_comes_last():
    loss = [None, 3.0, 2.0, None]
    table = pa.table({"row_key": list("abcd"), "prompt_id": ["p"] * 4, "loss": loss, "reward": [2.0] * 4})
    chosen = select(table, by="reward", top=4, drop_duplicates=False)
    assert dict(zip(chosen["row_key"].to_pylist(), chosen["rank"].to_pylist(), strict=True)) == {
        "a": 3,
        "b": 2,
        "c": 1,
        "d": 4,
    }


def test_every_row_that_is_left_out_is_counted_under_one_reason():
    rows = [  # key, prompt, loss, reward, tokens, response, status
        ("a", "p", 1.0, 8.0, 10, "one", "ok"),
        ("b", "p", 2.0, 8.0, 10, "one", "ok"),
        ("c", "p", 1.0, 2.0, 10, "two", "ok"),
        ("d", "p", 1.0, 1.0, 10, "three", "ok"),
        ("e", "q", 1.0, 1.9, 10, "one", "ok"),
        ("f", "q", 1.0, 8.0, 3, "one", "truncated"),
        ("g", "q", 1.0, 8.0, 99, "one", "ok"),
        ("h", "q", None, None, 0, "", "empty"),
        ("i", "q", 1.0, None, 10, "x", "ok"),
        ("j", "r", 1.0, 1.95, 10, "one", "ok"),
    ]
    names = ["row_key", "prompt_id", "loss", "reward", "n_tokens", "response", "status"]
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    chosen = select(table, top=2, threshold=0.45, min_tokens=5, max_tokens=50, budget=2)
    assert chosen["row_key"].to_pylist() == ["a", "c", "j"]
    assert json.loads(chosen.schema.metadata[METADATA_KEY])["left_out"] == {
        "not scored: empty": 1,
        "no car": 1,
        "fewer than 5 tokens": 1,
        "more than 50 tokens": 1,
        "equal to a better response to its prompt": 1,
        "car below the threshold": 1,
        "its prompt is beyond the budget": 1,
    }


def percentile_by_loop(values: list[float], value: float) -> float:
    return (sum(v < value for v in values) + sum(v == value for v in values) / 2) / len(values)


@pytest.mark.parametrize("seed", range(3))
def test_a_mixture_is_the_weighted_mean_of_percentiles(seed):
    table = random_scores(seed)
    rows = [row for row in table.to_pylist() if row["status"] == "ok" and math.isfinite(car_of(row) or math.nan)]
    rewards, losses = [row["reward"] for row in rows], [-row["loss"] for row in rows]

    def value_of(row: dict) -> float | None:
        if not math.isfinite(car_of(row) or math.nan):
            return None
        return 0.75 * percentile_by_loop(rewards, row["reward"]) + 0.25 * percentile_by_loop(losses, -row["loss"])

    chosen = select(table, by={"reward": 3, "loss": 1}, top=2)
    expected = [value_of(row) for row in chosen.to_pylist()]
    np.testing.assert_allclose(chosen["mixture"].to_numpy(), expected, rtol=1e-12)
    # With weights like these no two values differ by rounding only.
    wanted = chosen_by_loop(table, lambda row: None if value_of(row) is None else round(value_of(row), 9), top=2)
    assert chosen["row_key"].to_pylist() == wanted


def long_scores(losses: dict[str, list[float]], rewards: dict[str, list[float]]) -> pa.Table:
    """The long table of a run: (prompt, row) as it comes, per base model, then per reward model."""
    rows = []
    for column, figure, models in (("base_model", "loss", losses), ("reward_model", "reward", rewards)):
        for model, figures in models.items():
            for k, value in enumerate(figures):
                row = dict.fromkeys(("base_model", "reward_model", "loss", "reward"))
                row |= {"row_key": f"f#{k}", "prompt_id": f"p{k // 2}", "generator": f"g{k % 2}", "status": "ok"}
                rows.append(row | {column: model, figure: value})
    return pa.Table.from_pylist(rows)


def test_of_several_models_one_is_named():
    table = long_scores({"small": [1.0, 2.0, 1.0, 2.0], "large": [2.0, 1.0, 2.0, 1.0]}, {"judge": [1.0, 1.0, 1.0, 9.0]})
    with pytest.raises(UsageError, match=r"2 base models \(small, large\): choose one with --base-model"):
        select(table)
    with pytest.raises(UsageError, match="tiny: not in the scores; there are small, large"):
        select(table, base_model="tiny")
    assert select(table, base_model="small")["row_key"].to_pylist() == ["f#0", "f#3"]
    assert select(table, base_model="large")["row_key"].to_pylist() == ["f#1", "f#3"]
    chosen = select(table, by="loss", base_model="large", top=1)
    assert chosen["row_key"].to_pylist() == ["f#1", "f#3"]
    two = long_scores({"small": [1.0, 2.0]}, {"judge": [1.0, 2.0], "other": [2.0, 1.0]})
    assert select(two, by="loss")["row_key"].to_pylist() == ["f#0"], "a loss does not ask for a reward model"
    assert select(two, by="reward", reward_model="judge")["row_key"].to_pylist() == ["f#1"]


def test_a_row_that_the_reward_model_has_not_reached_has_a_loss_but_no_car():
    table = long_scores({"small": [1.0, 2.0, 1.0, 2.0]}, {"judge": [1.0, 9.0]})
    assert select(table)["row_key"].to_pylist() == ["f#1"]
    assert select(table, by="loss")["row_key"].to_pylist() == ["f#0", "f#2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "beauty"}, "'beauty' is no metric; these scores have car, reward, loss, .*grape"),
        ({"by": "ifd"}, "stands for ifd_loss and ifd_ppl"),
        ({"by": "ifd_ppl"}, r"fastcompat score \.\.\. --for ifd_ppl"),
        ({"by": {}}, "names no metric"),
        ({"by": ""}, "names no metric"),
        ({"by": None}, r"by must be a metric, or metrics with weights .*; got None"),
        ({"by": ["reward", "loss"]}, r"by must be .*'car': 1, 'loss': 1.*; got \['reward', 'loss'\]"),
        ({"by": {"reward": "a"}}, r"'reward': 'a' is no metric with a weight; write \{'car': 0.7"),
        ({"by": {1: 1.0}}, "1: 1.0 is no metric with a weight"),
        ({"by": {"car": 0.0}}, "weight of car is 0"),
        ({"by": {"car": 1.0, "loss": -1.0}}, "weight of loss is -1"),
        ({"top": 0}, "top must be 1 or more, got 0"),
        ({"budget": 0}, "budget must be 1 or more, got 0"),
        ({"beta": -1.0}, "beta must be 0 or more, got -1"),
        ({"threshold": math.nan}, "threshold must be a finite number"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens 9 is above max_tokens 3"),
        ({"threshold": 1e9}, "nothing is chosen of 300 rows: .* car below the threshold"),
        ({"reward_shift": -1.5}, r"negative.*--reward-shift"),
        ({"base_model": "m"}, "there are none"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_by_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        select(random_scores(0), **settings)


def test_duplicates_that_cannot_be_told_are_refused():
    table = random_scores(0).drop_columns("response")
    with pytest.raises(UsageError, match="drop_duplicates=False"):
        select(table, top=2)
    assert select(table).num_rows, "the best of a prompt has no equal beside it"
    with pytest.raises(UsageError, match="column prompt_id"):
        select(table.drop_columns("prompt_id"))
    with pytest.raises(UsageError, match="n_tokens"):
        select(table.drop_columns("n_tokens"), min_tokens=3)


def test_metrics_and_weights_are_read_from_text():
    assert parse_by("car") == "car"
    assert parse_by(" IFD-ppl") == "ifd_ppl"
    assert parse_by("car=0.7, IFD-ppl=.3") == {"car": 0.7, "ifd_ppl": 0.3}
    for text in ("car=0.7,loss", "loss,car=1", "car=a"):
        with pytest.raises(UsageError, match="METRIC=WEIGHT"):
            parse_by(text)
    with pytest.raises(UsageError, match="a mixture has weights; write car=1,ifd_ppl=1"):
        parse_by("car, IFD-ppl,")


# --- what its authors leave out


def ifd_scores() -> pa.Table:
    """Prompt p: IFD 0.5, 0.9, 1.1 and exactly 1; prompt q: one above 1."""
    alone = [2.0, 1.0, 1.0, 1.0, 1.0]
    loss = [1.0, 0.9, 1.1, 1.0, 3.0]
    return pa.table(
        {
            "row_key": list("abcde"),
            "prompt_id": ["p", "p", "p", "p", "q"],
            "generator": ["g", "h", "g", "h", "g"],
            "loss": loss,
            "reward": [1.0, 2.0, 3.0, 4.0, 5.0],
            "unconditioned_nll_sum": [10 * each for each in alone],
            "unconditioned_n_tokens": [10] * 5,
            "token_nll": [[each] for each in loss],
            "unconditioned_token_nll": [[each] for each in alone],
        }
    )


def test_what_must_not_be_too_high_is_ifd():
    limits = {name: metric.valid_at_most for name, metric in METRICS.items() if metric.valid_at_most is not None}
    assert limits == {"ifd_loss": 1.0, "ifd_ppl": 1.0, "s_ifd": 1.0}
    assert all(METRICS[name].why_at_most and not METRICS[name].lower_is_better for name in limits)


@pytest.mark.parametrize("name", ["ifd_loss", "ifd_ppl", "s_ifd"])
def test_an_ifd_above_1_is_left_out_with_its_reason(name):
    # s_ifd counts the upper half of the tokens by |difference|: those of a and e; the others are 1.
    chosen = select(ifd_scores(), by=name, top=9, drop_duplicates=False)
    record = json.loads(chosen.schema.metadata[METADATA_KEY])
    above = {"ifd_loss": 2, "ifd_ppl": 2, "s_ifd": 1}[name]
    assert record["left_out"] == {f"{name} above 1: the prompt makes the response harder": above}
    assert chosen["row_key"].to_pylist() == (["a", "b", "d"] if above == 2 else ["a", "b", "c", "d"])
    assert max(chosen[name].to_pylist()) == 1
    assert record["with_value"] == {"g": 3, "h": 2}, "they have a value; it is not chosen"
    best = select(ifd_scores(), by=name)
    assert best["row_key"].to_pylist() == ["b" if name == "s_ifd" else "d"], "1 itself is in; q has nothing left"


def test_an_ifd_above_1_is_in_no_mixture_and_no_percentile():
    chosen = select(ifd_scores(), by={"ifd_ppl": 1, "reward": 3}, top=9, drop_duplicates=False)
    assert json.loads(chosen.schema.metadata[METADATA_KEY])["left_out"] == {
        "ifd_ppl above 1: the prompt makes the response harder": 2
    }
    # Among a, b and d both metrics rise: percentiles 1/6, 3/6, 5/6.
    np.testing.assert_allclose(chosen["mixture"].to_numpy(), [1 / 6, 3 / 6, 5 / 6])
    assert chosen["row_key"].to_pylist() == ["a", "b", "d"]
    unlimited = select(ifd_scores(), by="reward")
    assert unlimited["row_key"].to_pylist() == ["d", "e"], "metrics without a limit have none"
