"""The row of a corpus: one response, with the conversation that it answers.

Everything upstream (`corpus`) produces `Response` rows; everything downstream (`tokens`, `scoring`)
consumes them. A row is never dropped: one that cannot be scored keeps its place with a `Status` and a `detail`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from fastcompat.rows.message import Message, prompt_id
from fastcompat.rows.status import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response: the last message of `messages` is the assistant's turn that is to be scored.

    `row_index` is the record's index in `source`, from 0; `response_index` tells apart several responses of one
    record, from 0. A row whose status is not `ok` may have any messages, none included. `rewards` are the rewards
    that came with it, as (name, finite value) pairs, no name twice. `tools` is a JSON array of the tools that the
    conversation could call, "" where it names none.
    """

    messages: tuple[Message, ...]
    generator: str
    source: str
    row_index: int
    response_index: int = 0
    status: Status = Status.OK
    detail: str = ""
    rewards: tuple[tuple[str, float], ...] = ()
    tools: str = ""

    @property
    def row_key(self) -> str:
        """Unique in a corpus and readable: `source#row_index`, with `/response_index` where it is not 0."""
        suffix = f"/{self.response_index}" if self.response_index else ""
        return f"{self.source}#{self.row_index}{suffix}"

    @property
    def prompt_id(self) -> str:
        """32 hexadecimal digits of BLAKE2b over the messages before the last one, and over the tools: equal prompts,
        equal ids."""
        return prompt_id(self.messages[:-1], self.tools)


# `extra` is never null: "" where a turn has no other keys.
MESSAGE_TYPE = pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())])
REWARDS_TYPE = pa.map_(pa.string(), pa.float64())

# The normalised row as it lies in corpus/shard-*.parquet.
ROW_SCHEMA = pa.schema(
    [
        ("row_key", pa.string()),
        ("source", pa.string()),
        ("row_index", pa.int64()),
        ("response_index", pa.int32()),
        ("prompt_id", pa.string()),
        ("generator", pa.string()),
        ("messages", pa.list_(MESSAGE_TYPE)),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("rewards", REWARDS_TYPE),  # never null: empty where the corpus brings none
        ("tools", pa.string()),  # never null: "" where the conversation names none
    ]
)


def to_table(rows: Sequence[Response]) -> pa.Table:
    """Rows as a table with `ROW_SCHEMA`, in the order given."""
    columns: dict[str, list[object]] = {
        "row_key": [row.row_key for row in rows],
        "source": [row.source for row in rows],
        "row_index": [row.row_index for row in rows],
        "response_index": [row.response_index for row in rows],
        "prompt_id": [row.prompt_id for row in rows],
        "generator": [row.generator for row in rows],
        "messages": [[message._asdict() for message in row.messages] for row in rows],
        "status": [str(row.status) for row in rows],
        "detail": [row.detail for row in rows],
        "rewards": [row.rewards for row in rows],
        "tools": [row.tools for row in rows],
    }
    return pa.table(columns, schema=ROW_SCHEMA)


def from_table(table: pa.Table) -> list[Response]:
    """The inverse of `to_table`."""
    return [
        Response(
            messages=tuple(Message(turn["role"], turn["content"], turn["extra"]) for turn in row["messages"]),
            generator=row["generator"],
            source=row["source"],
            row_index=row["row_index"],
            response_index=row["response_index"],
            status=Status(row["status"]),
            detail=row["detail"],
            rewards=tuple(row["rewards"]),
            tools=row["tools"],
        )
        for row in table.to_pylist()
    ]


def with_later_columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows of a shard in the columns `names`; what shards did not have from the first on is empty where it lacks."""
    for name in names:
        there = name in table.column_names
        if name == "tools" and not there:
            table = table.append_column(name, pa.array([""] * table.num_rows, pa.string()))
        elif name == "messages" and there and table["messages"].type == _FORMER_MESSAGES_TYPE:
            table = table.set_column(table.column_names.index(name), name, _with_extra(table[name].combine_chunks()))
    return table.select(names)


_FORMER_MESSAGES_TYPE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _with_extra(messages: pa.ListArray) -> pa.ListArray:
    turns = messages.values
    columns = [*turns.flatten(), pa.array([""] * len(turns), pa.string())]
    return pa.ListArray.from_arrays(
        messages.offsets, pa.StructArray.from_arrays(columns, fields=list(MESSAGE_TYPE)), type=pa.list_(MESSAGE_TYPE)
    )
