"""What figures are to the loop: a model that runs packs, and what is to be computed of them.

Dimension key: S scored tokens, N sequences, P positions whose hidden states are read, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fastcompat.rows import Status
from fastcompat.tokens import BoolArray, IntArray, PrefixForest


class Plan(Protocol):
    """What a forward pass reads of a pack, on the CPU."""

    def to(self, device: torch.device, /) -> Any:
        """The same on the model's device."""


class Model(Protocol):
    """What the loop asks of a model; what is made of its hidden states is between it and its `Scores`."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def rope_boundary(self) -> int | None: ...

    def plan(self, forest: PrefixForest, positions: NDArray[np.integer[Any]], /) -> Plan:
        """Of a pack whose hidden states are read at `positions` [P]. Called by any thread."""

    def hidden(self, plan: Any, /) -> Any:
        """[P, D] hidden states of a plan that is on the model's device. Waits for nothing."""

    @property
    def tokens_at_once(self) -> int:
        """Tokens of the packs that go through the layers together, because these come and go; 0: all layers stay."""

    def march(self, plans: Sequence[Any], given_up: Callable[[], bool], /) -> Iterator[Any]:
        """`hidden` of such packs, in their order. Raises GivenUp once `given_up()` is true between layers."""

    def ran_out(self) -> None:
        """Memory ran out on a march: fewer tokens at once from here on."""


class Scores(ABC):
    """The figures of N sequences as they come in, in the caller's order.

    ends_given: whether a last token that is only predicted is given to models whose rotary frequencies depend on the
    length, as a trainer gives it.
    """

    ends_given = True

    @property
    @abstractmethod
    def sequences(self) -> Sequence[Any]:
        """[N] what is packed; each has `input_ids` [n]."""

    @property
    def n_rows(self) -> int:
        """Rows of a corpus that these figures are of; of several sequences of a row, the first is below it."""
        return len(self.sequences)

    @abstractmethod
    def scorable(self) -> list[int]:
        """Indices of the sequences that have something to score."""

    @abstractmethod
    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[IntArray, BoolArray]:
        """Ids and scored mask of sequence n, without what follows the last token that counts."""

    @abstractmethod
    def positions(self, forest: PrefixForest) -> NDArray[np.integer[Any]]:
        """[P] packed tokens whose hidden states `compute` reads, in any order, any of them several times."""

    @abstractmethod
    def compute(self, model: Any, plan: Any, hidden: Any) -> tuple[torch.Tensor, ...]:
        """What `add` takes, of one pack, on the model's device: from the states [P, D] at its `positions`.

        Nothing is asked of the device, so that the next pack can be queued behind it.
        """

    @abstractmethod
    def add(self, forest: PrefixForest, computed: tuple[NDArray[Any], ...]) -> list[int]:
        """Take what was computed of a pack; the sequences whose figure is not finite are returned and not taken."""

    @abstractmethod
    def fail(self, n: int, status: Status, detail: str) -> None:
        """Sequence n has no figure."""

    @abstractmethod
    def tables(self, rows: pa.Table) -> tuple[pa.Table, ...]:
        """The corpus rows with their figures, one table for each scorer, as it lies in that scorer's parts."""

    @abstractmethod
    def restore(self, tables: Sequence[pa.Table]) -> None:
        """Take what an interrupted session kept, in the form of `tables`."""


class OneFigure(Scores):
    """One figure for each sequence, which is a row's; a subclass says which."""

    schema: pa.Schema  # of its table
    figure: str  # the figure's column in it

    def __init__(self, sequences: Sequence[Any]) -> None:
        self._sequences = sequences
        self.values: NDArray[np.float64] = np.full(len(sequences), np.nan)  # [N] NaN until scored
        self.status: list[Status] = [sequence.status for sequence in sequences]
        self.detail: list[str] = [sequence.detail for sequence in sequences]

    @property
    def sequences(self) -> Sequence[Any]:
        """[N]."""
        return self._sequences

    @property
    def n_rows(self) -> int:
        return len(self._sequences)

    def take(self, sequences: NDArray[np.int64], values: NDArray[np.float64]) -> list[int]:
        """Take the values of these sequences; those whose value is not finite are returned and not taken."""
        finite = np.isfinite(values)
        self.values[sequences[finite]] = values[finite]
        return [int(n) for n in sequences[~finite]]

    def fail(self, n: int, status: Status, detail: str) -> None:
        self.status[n], self.detail[n] = status, detail

    def columns(self) -> dict[str, pa.Array]:
        """What scoring fills of the table; a figure that is not there is null."""
        return {
            "n_tokens": pa.array([sequence.n_tokens for sequence in self._sequences], pa.int32()),
            self.figure: pa.array(self.values, pa.float64(), mask=np.isnan(self.values)),
            "status": pa.array([str(status) for status in self.status], pa.string()),
            "detail": pa.array(self.detail, pa.string()),
        }

    def tables(self, rows: pa.Table) -> tuple[pa.Table, ...]:
        own = self.columns()
        columns = {name: own[name] if name in own else rows[name] for name in self.schema.names}
        return (pa.table(columns, schema=self.schema),)

    def restore(self, tables: Sequence[pa.Table]) -> None:
        (table,) = tables
        self.values[:] = table[self.figure].to_numpy(zero_copy_only=False)  # null is NaN
        self.status[:] = [Status(status) for status in table["status"].to_pylist()]
        self.detail[:] = table["detail"].to_pylist()
