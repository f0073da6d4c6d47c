"""What a base model can tell of a response beside its loss, in the same pass: one table of columns.

A column is asked for by the metrics that need it (`fastcompat score --for`), computed in registers beside the NLL
(`linear_nll`'s statistics), and stored as a sum over scored tokens, or, on request, token by token.

Dimension key: S scored tokens, N responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastcompat.errors import UsageError
from fastcompat.metrics import METRICS

if TYPE_CHECKING:
    from fastcompat.nll import Statistic  # loads torch

TokenValues: TypeAlias = NDArray[np.float32]

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


_FLOATS = pa.list_(pa.float32())

# In the order in which they lie in a part; their meanings: `metrics.COLUMNS`.
EXTRAS: Mapping[str, Extra] = {
    "n_bytes": Extra(type=pa.int32()),
    "entropy_sum": Extra(type=pa.float64(), statistic="entropy"),
    "greedy_matches": Extra(type=pa.int32(), statistic="rank", value=_is_greedy),
    "clipped_rank_sum": Extra(type=pa.float64(), statistic="rank", value=_clipped),
    "unconditioned_nll_sum": Extra(type=pa.float64(), statistic="nll", alone=True),
    "unconditioned_n_tokens": Extra(type=pa.int32(), alone=True),
    "token_nll": Extra(type=_FLOATS, statistic="nll"),
    "token_entropy": Extra(type=_FLOATS, statistic="entropy"),
    "token_varentropy": Extra(type=_FLOATS, statistic="varentropy"),
    "unconditioned_token_nll": Extra(type=_FLOATS, statistic="nll", alone=True),
    "token_text": Extra(type=pa.list_(pa.string())),
}


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

    @classmethod
    def needed_by(cls, metrics: Iterable[str], *, keep_tokens: bool = False) -> Extras:
        """What these metrics read that is not in every part. UsageError where they need tokens that are not kept.

        keep_tokens: every token's NLL and text are kept, whatever the metrics need.
        """
        names = list(metrics)
        wanted = {column for name in names for column in METRICS[name].needs if column in EXTRAS}
        lists = [name for name in names if any(EXTRAS[c].per_token for c in METRICS[name].needs if c in EXTRAS)]
        if lists and not keep_tokens:
            raise UsageError(
                f"{', '.join(lists)} read every token's figures, which are kept only with --keep-tokens (4 bytes a "
                "token and figure, before compression)"
            )
        return cls.of(wanted | ({"token_nll", "token_text"} if keep_tokens else set()))

    @cached_property
    def fields(self) -> list[pa.Field]:
        return [pa.field(name, EXTRAS[name].type) for name in self.columns]

    @cached_property
    def statistics(self) -> tuple[Statistic, ...]:
        """Of `linear_nll`, the NLL first."""
        wanted = {EXTRAS[name].statistic for name in self.columns}
        others: tuple[Statistic, ...] = ("entropy", "varentropy", "rank")
        return ("nll", *(statistic for statistic in others if statistic in wanted))

    @property
    def needs_alone(self) -> bool:
        """Whether responses are read without their prompts too."""
        return any(EXTRAS[name].alone for name in self.columns)
