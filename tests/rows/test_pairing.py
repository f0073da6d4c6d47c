"""Base models' and reward models' rows side by side: by position, by key, from frames of any kind."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcompat.errors import UsageError
from fastcompat.rows.columns import SCORES_SCHEMA
from fastcompat.rows.frames import as_table
from fastcompat.rows.pairing import by_pair, carrying, only, pair, paired


def row(key: str, **values: object) -> dict[str, object]:
    """One row of a run's table: of the base model "b" unless `reward_model` is given."""
    figure = values.get("reward") if "reward_model" in values else values.get("loss")
    default = {
        "row_key": key,
        "source": "f.jsonl",
        "row_index": 0,
        "prompt_id": f"p{key}",
        "generator": "g",
        "base_model": None if "reward_model" in values else "b",
        "status": "empty" if figure is None else "ok",
        "detail": "nothing there" if figure is None else "",
    }
    return {name: (default | values).get(name) for name in SCORES_SCHEMA.names}


def table(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SCORES_SCHEMA)


def test_rows_of_one_order_are_joined_by_position():
    losses = [row("1", loss=1.0, n_tokens=3, nll_sum=3.0), row("2", loss=2.0), row("3")]
    rewards = [row(key, reward_model="r", reward=value) for key, value in [("1", 10.0), ("2", 20.0), ("3", 30.0)]]
    result = paired(table(*losses, *rewards))
    assert result.schema == SCORES_SCHEMA
    assert result.select(["row_key", "loss", "reward", "status"]).to_pylist() == [
        {"row_key": "1", "loss": 1.0, "reward": 10.0, "status": "ok"},
        {"row_key": "2", "loss": 2.0, "reward": 20.0, "status": "ok"},
        {"row_key": "3", "loss": None, "reward": 30.0, "status": "empty"},
    ]
    first = result.to_pylist()[0]
    assert (first["base_model"], first["reward_model"], first["n_tokens"], first["nll_sum"]) == ("b", "r", 3, 3.0)


def test_one_pair_is_what_it_is_among_all():
    """By key, by position where there is none, and of one kind alone."""
    losses = [row("1", loss=1.0, n_tokens=3), row("2", loss=math.nan), row("3"), row("4", loss=2.0)]
    rewards = [row(key, reward_model="r", reward=float(key), n_tokens=9) for key in ("4", "2", "5", "1")]
    base, reward = (table(*rows).drop_columns(["base_model", "reward_model"]) for rows in (losses, rewards))
    base, reward = base.drop_columns(["reward"]), reward.drop_columns(["loss", "nll_sum"])
    assert pair(base, reward, "b", "r").equals(paired(table(*losses, *rewards)))
    assert pair(base, None, "b", None).drop_columns("nll_sum").equals(paired(table(*losses)).drop_columns("nll_sum"))
    assert pair(None, reward, None, "r").equals(paired(table(*rewards)))
    alike = pair(base.drop_columns("row_key"), reward.select(["reward", "status"]), "b", "r")
    assert alike["reward"].to_pylist() == [4.0, 2.0, 5.0, 1.0]
    assert alike["status"].to_pylist() == ["ok", "nonfinite", "empty", "ok"]
    assert alike["prompt_id"].to_pylist() == ["p1", "p2", "p3", "p4"]
    assert alike["n_tokens"].to_pylist() == [3, None, None, None]


def test_which_status_a_pair_has():
    losses = [row("1", loss=1.0, status="truncated"), row("2", loss=1.0), row("3"), row("4", loss=1.0), row("5")]
    rewards = [
        row("1", reward_model="r", reward=1.0),
        row("2", reward_model="r", status="too_long", detail="5,000 tokens"),
        row("3", reward_model="r", status="oom", detail="large"),
        row("6", reward_model="r", reward=2.0),
        row("7", reward_model="r", status="oom", detail="large"),
    ]
    result = {r["row_key"]: (r["status"], r["detail"]) for r in paired(table(*losses, *rewards)).to_pylist()}
    assert result == {
        "1": ("truncated", ""),
        "2": ("too_long", "5,000 tokens"),
        "3": ("empty", "nothing there"),
        "4": ("missing", "no row of reward model r"),
        "5": ("empty", "nothing there"),
        "6": ("missing", "no row of base model b"),
        "7": ("oom", "large"),
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True), st.randoms())
def test_any_order_and_any_gaps_against_a_dictionary(base, reward, random):
    base, reward = [*base, 31], [*reward, 32]  # one of each kind, so that there is something to pair
    rows = [row(str(key), loss=key + 0.5, generator=f"g{key}") for key in base]
    rows += [row(str(key), reward_model="r", reward=key * 2.0, generator=f"g{key}") for key in reward]
    random.shuffle(rows)
    order = [r["row_key"] for r in rows if r["base_model"]]
    result = paired(table(*rows)).to_pylist()
    assert [r["row_key"] for r in result][: len(base)] == order
    assert {r["row_key"]: (r["generator"], r["loss"], r["reward"]) for r in result} == {
        str(key): (f"g{key}", key + 0.5 if key in base else None, key * 2.0 if key in reward else None)
        for key in {*base, *reward}
    }
    assert len(result) == len({*base, *reward})


def test_every_base_model_meets_every_reward_model():
    rows = [row("1", loss=1.0, base_model="b1"), row("1", loss=2.0, base_model="b2")]
    rows += [row("1", reward_model=name, reward=value) for name, value in [("r1", 10.0), ("column stars", 5.0)]]
    result = paired(table(*rows)).select(["base_model", "reward_model", "loss", "reward"]).to_pylist()
    assert [tuple(r.values()) for r in result] == [
        ("b1", "r1", 1.0, 10.0),
        ("b1", "column stars", 1.0, 5.0),
        ("b2", "r1", 2.0, 10.0),
        ("b2", "column stars", 2.0, 5.0),
    ]


def test_rows_of_one_kind_pass_and_pairs_pass_again():
    losses = table(row("1", loss=1.0, n_tokens=2, nll_sum=2.0), row("2"))
    assert paired(losses) == losses
    rewards = table(row("1", reward_model="r", reward=1.0))
    assert paired(rewards) == rewards
    pairs = paired(pa.concat_tables([losses, rewards]))
    assert paired(pairs) == pairs
    assert paired(SCORES_SCHEMA.empty_table()).num_rows == 0


def test_further_columns_of_the_base_model_stay():
    rows = table(row("1", loss=1.0), row("2", reward_model="r", reward=1.0))
    rows = rows.append_column("entropy_sum", pa.array([7.0, None]))
    assert paired(rows)["entropy_sum"].to_pylist() == [7.0, None]


def test_scores_of_ones_own_are_completed():
    own = pa.table({"generator": ["a", "b"], "loss": [1.0, 2.0], "reward": [3, 4], "n_tokens": [5, 6]})
    first, second = paired(own).to_pylist()
    assert first["reward"] == 3.0
    assert (first["status"], first["nll_sum"], first["base_model"]) == ("ok", 5.0, None)
    assert first["prompt_id"] != second["prompt_id"]


def test_figures_that_are_none_are_named():
    own = pa.table({"generator": list("abcd"), "loss": [1.0, math.nan, 1.0, 1.0], "reward": [1.0, 1.0, None, math.inf]})
    result = paired(own).to_pylist()
    assert [r["status"] for r in result] == ["ok", "nonfinite", "missing", "nonfinite"]
    assert [r["detail"] for r in result][1:] == ["the loss is not a finite number", "no reward", result[3]["detail"]]
    assert result[1]["loss"] is result[3]["reward"] is None


def test_a_key_twice_is_refused():
    twice = [row("1", loss=1.0), row("1", loss=1.0)]
    with pytest.raises(UsageError, match=r"'1'.*base model b"):
        paired(table(*twice, row("1", reward_model="r", reward=1.0)))
    with pytest.raises(UsageError, match=r"'1'.*reward model r"):
        paired(table(row("1", loss=1.0), *(row("1", reward_model="r", reward=1.0) for _ in range(2))))


def test_tables_without_figures_and_of_other_types_are_refused():
    with pytest.raises(UsageError, match="no column loss or reward"):
        paired(pa.table({"generator": ["a"]}))
    with pytest.raises(UsageError, match="column loss must be double"):
        paired(pa.table({"generator": ["a"], "loss": ["much"]}))
    for frame in ({"loss": [1.0]}, [1.0], np.ones(3), pa.chunked_array([[1.0]])):
        with pytest.raises(UsageError, match="no table of scores"):
            paired(frame)


class Exporter:
    """What polars and others are to us: something that exports an Arrow stream."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


class Interchange:
    """A frame of the older protocol only."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __dataframe__(self, *args: object, **kwargs: object) -> object:
        return self._table.__dataframe__(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Exporter, Interchange, lambda t: t.to_reader(), lambda t: t.to_batches()[0]])
def test_frames_that_export_arrow(wrap):
    plain = pa.table({"generator": ["a", "b"], "loss": [1.0, 2.0]})
    assert as_table(wrap(plain)) == plain


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.large_string())])
def test_strings_of_every_kind(kind):
    strings = pa.chunked_array([pa.array(["a", None], pa.string()), pa.array(["b"])])
    frame = Exporter(pa.table({"generator": strings.cast(kind), "loss": [1.0, 2.0, 3.0]}))
    assert as_table(frame)["generator"].type == pa.string()
    assert as_table(frame)["generator"].to_pylist() == ["a", None, "b"]


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"generator": ["a", "b"], "loss": [1.0, float("nan")]}, index=["x", "y"])
    assert as_table(frame).column_names == ["generator", "loss"]
    assert paired(frame)["loss"].to_pylist() == [1.0, None]


def test_polars():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"generator": ["a", "b"], "loss": [1.0, float("nan")]})
    assert paired(frame)["generator"].to_pylist() == ["a", "b"]
    assert paired(frame)["status"].to_pylist() == ["ok", "nonfinite"]


def test_only_keeps_one_models_figures():
    """In a long table the other kind's rows stay; in one with both in a row, a row of no model is nobody's."""
    long = pa.table({"base_model": ["A", "B", None], "reward_model": [None, None, "R"], "loss": [1.0, 2.0, None]})
    assert only(long, base_model="A")["loss"].to_pylist() == [1.0, None]
    assert only(long, base_model="B", reward_model="R").num_rows == 2
    wide = pa.table({"base_model": ["A", "B", None], "reward_model": ["R", "R", "R"], "loss": [1.0, 2.0, 3.0]})
    assert only(wide, base_model="A")["loss"].to_pylist() == [1.0]
    assert only(wide).equals(wide)
    with pytest.raises(UsageError, match="--base-model C: not in the scores; there are A, B"):
        only(wide, base_model="C")
    with pytest.raises(UsageError, match="--reward-model R: not in the scores; there are none"):
        only(pa.table({"loss": [1.0]}), reward_model="R")


def test_pairs_come_in_order_of_first_appearance():
    rows = pa.table({"base_model": ["B", None, "B", "A"], "reward_model": ["R", "R", None, "R"], "x": [0, 1, 2, 3]})
    assert [(models, part["x"].to_pylist()) for models, part in by_pair(rows)] == [
        (("B", "R"), [0]),
        ((None, "R"), [1]),
        (("B", None), [2]),
        (("A", "R"), [3]),
    ]


def test_what_carries_figures():
    statuses = ["ok", "truncated", "empty", None, "ok"]
    rows = pa.table({"status": statuses, "loss": [1.0, 2.0, 3.0, 4.0, None], "reward": [1.0] * 5})
    assert carrying(rows, ["loss", "reward"]).to_pylist() == [True, True, False, False, False]
    assert carrying(rows, []).to_pylist() == [True, True, False, False, True]
