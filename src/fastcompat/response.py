"""The row of a corpus: one response, with the conversation that it answers, and the statuses a row can have.

Everything upstream (formats, corpus) produces `Response` rows; everything downstream (tokenization, engine)
consumes them. A row is never dropped: one that cannot be scored keeps its place with a `Status` and a `detail`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import pyarrow as pa


class Status(StrEnum):
    """Why a row has the figures that it has. Only `ok` and `truncated` rows carry a loss or a reward."""

    OK = "ok"
    TRUNCATED = "truncated"  # scored, but cut at the length limit: the figure is that of the kept tokens
    EMPTY = "empty"  # the response is null, missing or has no characters
    INVALID = "invalid"  # the record cannot be read as a response: broken JSON, wrong type, unpaired surrogate
    UNREADABLE = "unreadable"  # stands for the rest of a file that ends early or cannot be opened
    TEMPLATE = "template"  # the chat template refuses the conversation
    PROMPT_TOO_LONG = "prompt_too_long"  # the length limit leaves no token of the response
    NO_REWARD = "no_reward"  # the corpus has rewards of its own, but none for this response
    TOO_LONG = "too_long"  # no reward: the conversation is longer than the model's limit, and was not to be cut
    NONFINITE = "nonfinite"  # the model gave NaN or infinity
    OOM = "oom"  # too large for the device's memory even alone


SCORED_STATUSES = (Status.OK, Status.TRUNCATED)


class Message(NamedTuple):
    """One turn. `role` is "system", "user", "assistant" or whatever the corpus says; `content` is its text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response: the last message of `messages` is the assistant's turn that is to be scored.

    `row_index` is the record's index in `source`, from 0; `response_index` tells apart several responses of one
    record, from 0. A row whose status is not `ok` may have any messages, none included. `rewards` are the rewards
    that came with it, as (name, finite value) pairs, no name twice.
    """

    messages: tuple[Message, ...]
    generator: str
    source: str
    row_index: int
    response_index: int = 0
    status: Status = Status.OK
    detail: str = ""
    rewards: tuple[tuple[str, float], ...] = ()

    @property
    def row_key(self) -> str:
        """Unique in a corpus and readable: `source#row_index`, with `/response_index` where it is not 0."""
        suffix = f"/{self.response_index}" if self.response_index else ""
        return f"{self.source}#{self.row_index}{suffix}"

    @property
    def prompt_id(self) -> str:
        """32 hexadecimal digits of BLAKE2b over the messages before the last one: equal prompts, equal ids."""
        return prompt_id(self.messages[:-1])


def prompt_id(prompt: Sequence[Message]) -> str:
    """BLAKE2b-128 of the prompt's roles and texts, in hexadecimal; the same on every machine."""
    # The JSON of a list of [role, content] lists, put together by hand: json.dumps takes a quarter of the reading.
    payload = "[" + ",".join([f"[{_quoted(role)},{_quoted(content)}]" for role, content in prompt]) + "]"
    return hashlib.blake2b(payload.encode("ascii"), digest_size=16).hexdigest()


_quoted = json.encoder.encode_basestring_ascii

MESSAGE_TYPE = pa.struct([("role", pa.string()), ("content", pa.string())])
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
    }
    return pa.table(columns, schema=ROW_SCHEMA)


def from_table(table: pa.Table) -> list[Response]:
    """The inverse of `to_table`."""
    return [
        Response(
            messages=tuple(Message(message["role"], message["content"]) for message in row["messages"]),
            generator=row["generator"],
            source=row["source"],
            row_index=row["row_index"],
            response_index=row["response_index"],
            status=Status(row["status"]),
            detail=row["detail"],
            rewards=tuple(row["rewards"]),
        )
        for row in table.to_pylist()
    ]
