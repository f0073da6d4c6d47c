"""Every column of scored rows: of a scorer's parts on disk, and of the one long table that users see.

What a base model can tell of a response beside its loss (`EXTRAS`) is asked for by the metrics that need it
(`fastcompat score --for`), computed in registers beside the NLL (`linear_nll`'s statistics), and stored as a sum over
scored tokens, or, on request, token by token.

Dimension key: S scored tokens, N responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastcompat.rows.response import ROW_SCHEMA
from fastcompat.rows.status import Status, is_scored

TokenValues: TypeAlias = NDArray[np.float32]
# What `ops.nll` computes of a token; written out again, since this room knows no torch.
Statistic: TypeAlias = Literal["nll", "entropy", "varentropy", "rank", "collision"]

# Ranks beyond it say nothing more: the default of the authors of RSR (arXiv 2601.14249).
RANK_CLIP = 100


@dataclass(frozen=True, kw_only=True)
class Extra:
    """How a column comes about.

    statistic: of `linear_nll`, per token; None: nothing of the model's. value: what of it is summed, or listed.
    alone: of the response without its prompt.
    """

    type: pa.DataType
    statistic: Statistic | None = None
    value: Callable[[TokenValues], TokenValues] = lambda values: values
    alone: bool = False

    @property
    def per_token(self) -> bool:
        """Whether it is a list, one value a scored token."""
        return bool(pa.types.is_list(self.type))


def _is_greedy(rank: TokenValues) -> TokenValues:
    greedy: TokenValues = (rank == 0).astype(np.float32)
    return greedy


def _clipped(rank: TokenValues) -> TokenValues:
    clipped: TokenValues = (1 + rank).clip(max=RANK_CLIP)
    return clipped


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a metric reads, and the option of `fastcompat score` that adds it; {name} stands for the metric.

    extra: how it is computed beside the loss; None: every part has it, or another scorer does.
    """

    meaning: str
    option: str
    extra: Extra | None = None


_FOR = "--for {name}"
_TOKENS = "--for {name} --keep-tokens"


def _summed(meaning: str, type: pa.DataType, statistic: Statistic | None = None, **how: Any) -> Column:
    return Column(meaning=meaning, option=_FOR, extra=Extra(type=type, statistic=statistic, **how))


def _listed(meaning: str, statistic: Statistic, *, alone: bool = False) -> Column:
    extra = Extra(type=pa.list_(pa.float32()), statistic=statistic, alone=alone)
    return Column(meaning=meaning, option=_TOKENS, extra=extra)


# Sums are float64 over a response's scored tokens; lists have one value a scored token, in order. Those that are
# computed beside the loss are in the order in which they lie in a part.
COLUMNS: Mapping[str, Column] = {
    "loss": Column(meaning="mean NLL, nats per token", option="--base-model MODEL"),
    "nll_sum": Column(meaning="sum of NLL, nats", option="--base-model MODEL"),
    "n_tokens": Column(meaning="scored tokens", option="--base-model MODEL"),
    "reward": Column(meaning="a reward model's judgement", option="--reward-model MODEL"),
    "n_bytes": _summed("UTF-8 bytes of the scored text", pa.int32()),
    "entropy_sum": _summed("sum of the predictions' entropies, nats", pa.float64(), "entropy"),
    "greedy_matches": _summed("tokens whose rank is 0", pa.int32(), "rank", value=_is_greedy),
    "clipped_rank_sum": _summed("sum of min(1 + rank, 100)", pa.float64(), "rank", value=_clipped),
    "unconditioned_nll_sum": _summed("sum of NLL without the prompt, nats", pa.float64(), "nll", alone=True),
    "unconditioned_n_tokens": _summed("tokens scored without the prompt", pa.int32(), alone=True),
    "token_nll": _listed("NLL of each token, nats", "nll"),
    "token_entropy": _listed("entropy of each prediction, nats", "entropy"),
    "token_varentropy": _listed("varentropy of each prediction, nats^2", "varentropy"),
    "unconditioned_token_nll": _listed("NLL of each token without the prompt, nats", "nll", alone=True),
    "token_text": Column(meaning="text of each token", option="--keep-tokens", extra=Extra(type=pa.list_(pa.string()))),
    "reference_loss": Column(
        meaning="loss under the reference model, nats per token (`with_reference`)",
        option="--base-model REFERENCE",
    ),
}
EXTRAS: Mapping[str, Extra] = {name: column.extra for name, column in COLUMNS.items() if column.extra is not None}


@dataclass(frozen=True)
class Extras:
    """The columns that one scorer computes beside the loss, in the order of `EXTRAS`."""

    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert list(self.columns) == [name for name in EXTRAS if name in self.columns], self.columns

    @classmethod
    def of(cls, names: Iterable[str]) -> Extras:
        """These columns, in any order."""
        wanted = set(names)
        return cls(tuple(name for name in EXTRAS if name in wanted))

    @cached_property
    def fields(self) -> list[pa.Field]:
        return [pa.field(name, EXTRAS[name].type) for name in self.columns]

    @cached_property
    def statistics(self) -> tuple[Statistic, ...]:
        """Of `linear_nll`, the NLL first."""
        wanted = {EXTRAS[name].statistic for name in self.columns}
        others: tuple[Statistic, ...] = ("entropy", "varentropy", "rank", "collision")
        return ("nll", *(statistic for statistic in others if statistic in wanted))

    @property
    def needs_alone(self) -> bool:
        """Whether responses are read without their prompts too."""
        return any(EXTRAS[name].alone for name in self.columns)


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
    scored = is_scored(rows["status"])
    lacks = pc.and_(scored, pc.is_null(reward))
    columns = {
        "reward": pc.if_else(scored, reward, None),
        "status": pc.if_else(lacks, str(Status.NO_REWARD), rows["status"]),
        "detail": pc.if_else(lacks, f"no number for {name}", rows["detail"]),
    }
    kept = {field: rows[field] for field in rows.column_names if field not in {*columns, "rewards"}}
    return pa.table(kept | columns)
