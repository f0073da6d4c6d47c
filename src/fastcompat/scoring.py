"""Token sequences -> packs -> one figure per response, in smaller packs where memory runs out.

`Scores` says what a figure is: a sum of losses (`ResponseScores`), a reward (`RewardScores`), or both of one pass
(`JointScores`). The loop is the same.

Dimension key: S scored tokens, N sequences.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fastcompat.budget import PackLimit, out_of_memory
from fastcompat.forest import BoolArray, IntArray, PrefixForest, pack_forest
from fastcompat.response import Status


class Model(Protocol):
    """What the loop asks of a model; what it computes is between it and its `Scores`."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def rope_boundary(self) -> int | None: ...


class Scores(ABC):
    """The figures of N sequences as they come in, in the caller's order."""

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
    def compute(self, model: Any, forest: PrefixForest) -> Any:
        """What `add` takes, of one pack."""

    @abstractmethod
    def add(self, forest: PrefixForest, computed: Any) -> list[int]:
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


def score_all(model: Model, scores: Scores, *, token_budget: int) -> None:
    """Fill in the scores of sequences that are in memory."""
    limit = PackLimit(token_budget)
    for forest in pack_sequences(model, scores, token_budget=token_budget):
        score_pack(model, forest, scores, limit)


def pack_sequences(model: Model, scores: Scores, *, token_budget: int) -> list[PrefixForest]:
    """The scorable sequences as packs; what does not fit the model's vocabulary fails here, row by row."""
    chosen = []
    for n in scores.scorable():
        largest = int(scores.sequences[n].input_ids.max())
        if largest >= model.vocabulary:
            scores.fail(
                n,
                Status.INVALID,
                f"token id {largest} is outside the model's vocabulary of {model.vocabulary}: "
                "tokenizer and model do not belong together",
            )
        else:
            chosen.append(n)
    return _pack(model, scores, chosen, token_budget)


def score_pack(model: Model, forest: PrefixForest, scores: Scores, limit: PackLimit) -> None:
    """Score one pack; what is above `limit`, or does not fit into memory, is packed again in smaller ones.

    A sequence that does not fit alone fails. It leaves the limit as it is: of packs of several it says nothing, since
    it may be longer than any of them.
    """
    todo = [forest]
    while todo:
        pack = todo.pop()
        members = pack.sequences.tolist()
        if len(members) > 1 and pack.n_tokens > limit.n_tokens:
            todo += reversed(_pack(model, scores, members, limit.n_tokens))
            continue
        values = _values(model, pack, scores)
        if values is not None:
            limit.fitted()
            bad = scores.add(pack, values)
            if len(members) == 1:
                for n in bad:
                    scores.fail(n, Status.NONFINITE, "the model gave NaN or infinity for this response")
                continue
            # In attention a key that a query does not see has probability 0, and 0 times NaN is NaN: what one sequence
            # does must not spoil its neighbours.
            for n in bad:
                todo += _pack(model, scores, [n], limit.n_tokens)
        elif len(members) > 1:
            limit.ran_out(pack.n_tokens)
            todo.append(pack)
        else:
            n_tokens = len(scores.sequences[members[0]].input_ids)
            scores.fail(members[0], Status.OOM, f"{n_tokens} tokens do not fit into memory even alone")


def _values(model: Model, forest: PrefixForest, scores: Scores) -> Any | None:
    """What `scores` computes of a pack, None where memory runs out.

    A sequence alone, which cannot be split, is tried a second time, with all caches empty: its row would be lost.
    """
    for _ in range(1 if len(forest.sequences) > 1 else 2):
        try:
            return scores.compute(model, forest)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Out of the handler, whose traceback keeps the activations alive. Young cycles only: all of them take long.
        gc.collect(1)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def _pack(model: Model, scores: Scores, chosen: Sequence[int], token_budget: int) -> list[PrefixForest]:
    pairs = [scores.to_pack(n, model.rope_boundary) for n in chosen]
    ids, scored = [ids for ids, _ in pairs], [mask for _, mask in pairs]
    return [
        forest.renumbered(chosen)
        for forest in pack_forest(ids, scored, token_budget=token_budget, alone_above=model.rope_boundary)
    ]
