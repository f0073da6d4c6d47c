"""The columns of scored rows: of a scorer's parts on disk, and of the one long table that users see."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.extras import Extras
from fastcompat.response import ROW_SCHEMA, SCORED_STATUSES, Status

_WHERE = [
    ROW_SCHEMA.field(name) for name in ("row_key", "source", "row_index", "response_index", "prompt_id", "generator")
]
_WHY = [("status", pa.string()), ("detail", pa.string())]

# A row of a base model's part; `nll_sum` and `loss` are null unless the status is ok or truncated.
LOSS_SCHEMA = pa.schema(
    [
        *_WHERE,
        ("n_prompt_tokens", pa.int32()),
        ("n_tokens", pa.int32()),
        ("nll_sum", pa.float64()),
        ("loss", pa.float64()),
        *_WHY,
    ]
)
# Of a reward model's: `reward` likewise; `n_tokens` are those of the whole conversation.
REWARD_SCHEMA = pa.schema([*_WHERE, ("n_tokens", pa.int32()), ("reward", pa.float64()), *_WHY])

# The column that a scorer of each kind fills, and that says whether it could.
FIGURES: Mapping[str, str] = {"base_model": "nll_sum", "reward_model": "reward"}

# What `Run.scores()`, `Scorer.score()` and `RewardScorer.score()` return: one row per response and scorer, with whose
# figure it is, without what only keeps the order. What another kind of scorer tells is null.
SCORES_SCHEMA = pa.schema(
    [
        *(field for field in _WHERE if field.name != "response_index"),
        ("base_model", pa.string()),
        ("reward_model", pa.string()),
        ("n_prompt_tokens", pa.int32()),
        ("n_tokens", pa.int32()),
        ("nll_sum", pa.float64()),
        ("loss", pa.float64()),
        ("reward", pa.float64()),
        *_WHY,
    ]
)


def part_schema(kind: str, extras: Extras) -> pa.Schema:
    """Of a part of a scorer of this kind, with what it tells beside its figure. KeyError for an unknown kind."""
    schema = {"base_model": LOSS_SCHEMA, "reward_model": REWARD_SCHEMA}[kind]
    return pa.schema([*schema, *extras.fields])


def as_scores(table: pa.Table, kind: str, name: str) -> pa.Table:
    """Rows of one scorer in the columns of `SCORES_SCHEMA`, and then those that it has beside them.

    kind: the column that gets `name`.
    """
    columns = {kind: pa.repeat(pa.scalar(name, pa.string()), table.num_rows)}
    for field in SCORES_SCHEMA:
        if field.name not in columns:
            there = field.name in table.column_names
            columns[field.name] = table[field.name] if there else pa.nulls(table.num_rows, field.type)
    beside = [name for name in table.column_names if name not in columns and name != "response_index"]
    schema = pa.schema([*SCORES_SCHEMA, *(table.schema.field(name) for name in beside)])
    return pa.table(columns | {name: table[name] for name in beside}).select(schema.names).cast(schema)


def with_reward(rows: pa.Table, name: str) -> pa.Table:
    """Rows of a corpus (`ROW_SCHEMA`, without messages) with the reward that came with them under `name`."""
    reward = pc.map_lookup(rows["rewards"], pa.scalar(name), "first")
    scored = pc.is_in(rows["status"], pa.array([str(status) for status in SCORED_STATUSES]))
    lacks = pc.and_(scored, pc.is_null(reward))
    columns = {
        "reward": pc.if_else(scored, reward, None),
        "status": pc.if_else(lacks, str(Status.NO_REWARD), rows["status"]),
        "detail": pc.if_else(lacks, f"no number for {name}", rows["detail"]),
    }
    kept = {field: rows[field] for field in rows.column_names if field not in {*columns, "rewards"}}
    return pa.table(kept | columns)
