"""Scores of base models and of reward models, joined: one row per response and pair of models. No torch.

A run's table is long, one row per response under one scorer (`Run.scores()`); whatever compares loss with reward needs
both in one row. Scores that somebody else computed usually have both already and pass through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.errors import UsageError
from fastcompat.rows.columns import SCORES_SCHEMA
from fastcompat.rows.frames import as_table
from fastcompat.rows.status import is_scored

# The status of a row without a figure that other rows have: not a `Status`, because no scorer gives it.
MISSING = "missing"
# What both scorers say of a response; the rest of a reward model's row is its own.
_OF_THE_RESPONSE = ("row_key", "source", "row_index", "prompt_id", "generator")


def paired(frame: Any) -> pa.Table:
    """One row per response and pair of base model and reward model: `SCORES_SCHEMA`, then further columns.

    frame: any table that `as_table` takes. Either a long one (`Run.scores()`), whose rows are joined by `row_key`:
    every base model with every reward model, in the order in which they come; with one kind only, the other's columns
    are null. Or one with `loss` and `reward` in the same row (or only one of the two columns at all), which passes
    through: absent columns are null, but `row_key` is the row's number, `prompt_id` the row key (each row a prompt of
    its own), `nll_sum` is `loss * n_tokens`, `status` is "ok".

    `n_tokens`, `status` and `detail` are the base model's, but where its row is scored and the reward model's is not,
    status and detail are the latter's. A scored row without a figure that other rows have gets the status "missing",
    a figure that is NaN or infinite becomes null and its row "nonfinite". Nothing is left out; figures of one model
    stay where the other has none.

    Raises UsageError: neither loss nor reward, a row key twice under one scorer, a column of another type.
    """
    table = as_table(frame)
    names = set(table.column_names)
    if not names & {"loss", "reward"}:
        raise UsageError(f"no column loss or reward to compare; there are {', '.join(table.column_names) or 'none'}")
    of_base, of_reward = _valid(table, "base_model"), _valid(table, "reward_model")
    both = pc.or_(pc.and_(of_base, of_reward), pc.and_(_valid(table, "loss"), _valid(table, "reward")))
    if pc.any(both).as_py() or not (pc.any(of_base).as_py() and pc.any(of_reward).as_py()):
        return _settled(_completed(table))
    if "row_key" not in names:
        raise UsageError("no column row_key to join the rows of base models and reward models by")
    rewards = {model: _completed(rows) for model, rows in _by_model(table, "reward_model").items()}
    parts = []
    for base_model, rows in _by_model(table, "base_model").items():
        base = _completed(rows)
        _check_keys(base, f"base model {base_model}")
        parts += [_settled(_joined(base, rewards[model], base_model, model)) for model in rewards]
    return pa.concat_tables(parts)


def pair(base: pa.Table | None, reward: pa.Table | None, base_model: str | None, reward_model: str | None) -> pa.Table:
    """`paired` of the rows of one base model and one reward model, each without the other's columns.

    base, reward: None where there is no such model. Without `row_key` both have the same responses in the same order.
    """
    tables = [
        _completed(rows if "row_key" in rows.column_names else rows.append_column("row_key", _no_keys(rows)))
        for rows in (base, reward)
        if rows is not None
    ]
    if base is not None and reward is not None:
        return _settled(_joined(tables[0], tables[1], str(base_model), str(reward_model)))
    (alone,) = tables
    for kind, model in (("base_model", base_model), ("reward_model", reward_model)):
        names = pa.repeat(pa.scalar(model, pa.string()), alone.num_rows)
        alone = alone.set_column(alone.column_names.index(kind), kind, names)
    return _settled(alone)


def _no_keys(rows: pa.Table) -> pa.Array:
    return pa.nulls(rows.num_rows, pa.string())


def _valid(table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    if name not in table.column_names:
        return pa.repeat(pa.scalar(False), table.num_rows)
    return table[name].is_valid()


def _by_model(table: pa.Table, column: str) -> dict[str, pa.Table]:
    """Model -> its rows, in order of first appearance."""
    codes = table[column].cast(pa.string()).combine_chunks().dictionary_encode()
    parts = {}
    for code, model in enumerate(codes.dictionary.to_pylist()):
        own = pc.indices_nonzero(pc.fill_null(pc.equal(codes.indices, code), False))
        parts[model] = rows_at(table, own)
    return parts


def only(
    scores: pa.Table,
    *,
    base_model: str | None = None,
    reward_model: str | None = None,
    of_neither: bool | None = None,
) -> pa.Table:
    """Without the figures of other models of these kinds. UsageError for a model that there is not.

    of_neither: whether rows without this kind of model stay; None: where they are another kind's (`is_long`).
    """
    for kind, model in (("base_model", base_model), ("reward_model", reward_model)):
        if model is None:
            continue
        there = pc.unique(scores[kind].drop_null()).to_pylist() if kind in scores.column_names else []
        refuse_absent(kind, model, there)
        scores = scores.filter(
            pc.fill_null(pc.equal(scores[kind], model), is_long(scores, kind) if of_neither is None else of_neither)
        )
    return scores


def refuse_absent(kind: str, model: str | None, there: Sequence[str | None]) -> None:
    """UsageError for a model that is not among those of its kind that there are."""
    if model is not None and model not in there:
        option = f"--{kind.replace('_', '-')}"
        raise UsageError(f"{option} {model}: not in the scores; there are {', '.join(map(str, there)) or 'none'}")


def is_long(table: pa.Table, column: str) -> bool:
    """Whether rows without this kind of model are another kind's, and not a model's that nobody named."""
    other = "reward_model" if column == "base_model" else "base_model"
    if not {column, other} <= set(table.column_names):
        return False
    own, others = table[column].is_valid(), table[other].is_valid()
    alone = pc.and_not(others, own)
    return bool(pc.any(alone).as_py() and pc.any(own).as_py() and not pc.any(pc.and_(own, others)).as_py())


def by_pair(rows: pa.Table) -> Iterator[tuple[tuple[str | None, str | None], pa.Table]]:
    """(base model, reward model) and its rows, of each pair in `paired` rows, in order of first appearance."""
    codes = [rows[name].combine_chunks().dictionary_encode("encode") for name in ("base_model", "reward_model")]
    base, reward = (code.indices.to_numpy(zero_copy_only=False).astype(np.int64) for code in codes)
    pair = base * len(codes[1].dictionary) + reward
    found, first = np.unique(pair, return_index=True)
    for value in found[np.argsort(first)]:
        k, m = divmod(int(value), len(codes[1].dictionary))
        models = (codes[0].dictionary[k].as_py(), codes[1].dictionary[m].as_py())
        yield models, rows_at(rows, pa.array(np.flatnonzero(pair == value)))


def carrying(rows: pa.Table, figures: Sequence[str]) -> pa.ChunkedArray:
    """[N] bool: which rows are scored and have every one of these figures."""
    carries = is_scored(rows["status"])
    for name in figures:
        carries = pc.and_(carries, rows[name].is_valid())
    return carries


def rows_at(table: pa.Table, indices: pa.Array) -> pa.Table:
    """The rows at ascending indices, at least one; where they lie together they are a slice, without a copy."""
    first, last = indices[0].as_py(), indices[-1].as_py()
    return table.slice(first, len(indices)) if last - first + 1 == len(indices) else table.take(indices)


def _completed(table: pa.Table) -> pa.Table:
    """`SCORES_SCHEMA` and the further columns, with what is absent filled in."""
    n_rows = table.num_rows
    columns: dict[str, Any] = {}
    for field in SCORES_SCHEMA:
        if field.name in table.column_names:
            try:
                columns[field.name] = table[field.name].cast(field.type)
            except (pa.ArrowException, NotImplementedError) as error:
                raise UsageError(f"column {field.name} must be {field.type}: {error}") from error
        else:
            columns[field.name] = pa.nulls(n_rows, field.type)
    if "row_key" not in table.column_names:
        columns["row_key"] = pa.array(range(n_rows), pa.int64()).cast(pa.string())
    if "prompt_id" not in table.column_names:
        columns["prompt_id"] = columns["row_key"]
    if "nll_sum" not in table.column_names:
        columns["nll_sum"] = pc.multiply(columns["loss"], columns["n_tokens"].cast(pa.float64()))
    columns["status"] = pc.fill_null(columns["status"], "ok")
    further = {name: table[name] for name in table.column_names if name not in columns}
    return pa.table({name: columns.pop(name) for name in SCORES_SCHEMA.names} | further)


def _check_keys(rows: pa.Table, whose: str) -> None:
    if pc.count_distinct(rows["row_key"]).as_py() == rows.num_rows:
        return
    counts = rows["row_key"].value_counts()
    twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
    raise UsageError(f"row_key {twice!r} is there more than once for {whose}; rows are joined by it: make it unique")


def _joined(base: pa.Table, reward: pa.Table, base_model: str, reward_model: str) -> pa.Table:
    """The pair's rows: those of the base model in their order, then those that only the reward model has."""
    if base["row_key"].equals(reward["row_key"]):
        rewards = reward.select(["reward", "status", "detail"])
    else:
        # A hash look-up keeps the base model's order, which pyarrow's join does not.
        found = pc.index_in(base["row_key"], reward["row_key"])
        alone = np.ones(reward.num_rows, dtype=bool)
        alone[found.drop_null().to_numpy()] = False
        if alone.any():
            # A key's second row is never found either.
            _check_keys(reward, f"reward model {reward_model}")
        of_reward = reward.select(["reward", "status", "detail"])
        rewards = pa.concat_tables([of_reward.take(found), of_reward.filter(pa.array(alone))])
        base = pa.concat_tables(
            [base, reward.select(_OF_THE_RESPONSE).filter(pa.array(alone))], promote_options="default"
        )
    base_status, reward_status = base["status"], rewards["status"]  # null where that side has no row
    # The first that holds: a bad status that is there goes before an absent row.
    conditions = pc.make_struct(
        _unscored(base_status), _unscored(reward_status), base_status.is_null(), reward_status.is_null()
    )
    status = pc.case_when(conditions, base_status, reward_status, MISSING, MISSING, base_status)
    no_base, no_reward = f"no row of base model {base_model}", f"no row of reward model {reward_model}"
    detail = pc.case_when(conditions, base["detail"], rewards["detail"], no_base, no_reward, base["detail"])
    replaced = {
        "base_model": pa.repeat(pa.scalar(base_model), base.num_rows),
        "reward_model": pa.repeat(pa.scalar(reward_model), base.num_rows),
        "reward": rewards["reward"],
        "status": status,
        "detail": detail,
    }
    return pa.table({name: replaced.get(name, base[name]) for name in base.column_names})


def _unscored(status: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether a row is there and its status says that it has no figure."""
    return pc.and_(status.is_valid(), pc.invert(is_scored(status)))


def _settled(table: pa.Table) -> pa.Table:
    """Statuses that agree with the figures: no row is "ok" whose loss or reward is NaN, infinite or not there."""
    status, detail = table["status"], table["detail"]
    scored = pc.invert(_unscored(status))
    for name in ("loss", "reward"):
        figure = table[name]
        if figure.null_count == len(figure):
            continue
        finite = pc.is_finite(figure)
        if pc.all(pc.fill_null(finite, False)).as_py():
            continue
        broken = pc.and_(scored, pc.invert(pc.fill_null(finite, True)))
        absent = pc.and_(scored, figure.is_null())
        status = pc.if_else(broken, "nonfinite", pc.if_else(absent, MISSING, status))
        detail = pc.if_else(broken, f"the {name} is not a finite number", pc.if_else(absent, f"no {name}", detail))
        scored = pc.and_(scored, pc.invert(pc.or_(broken, absent)))
        table = table.set_column(
            table.column_names.index(name), name, pc.if_else(pc.fill_null(finite, False), figure, None)
        )
    for name, column in (("status", status), ("detail", detail)):
        table = table.set_column(table.column_names.index(name), name, column)
    return table
