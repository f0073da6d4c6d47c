"""Which rows of a unit are computed now, and how they come to lie in its part beside those that are not.

A row is left out where its generator is, and comes later where somebody asks for it: the part is completed. Rows that
cannot be scored anyway say so at once. Dimension key: N rows of a unit, M of them computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastcompat.errors import RunError
from fastcompat.rows import Status
from fastcompat.store import ScorerStore, Unit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """What is computed of a unit.

    rows: [N] all of it, `response.ROW_SCHEMA`. at: [M] where those lie that are computed, ascending. reasons: [N] why
    a row is left out, null where it is not. n_left_out: rows that no store has after this either, because they are.
    completes: a part is there already, and gets what it lacks.
    """

    rows: pa.Table
    at: NDArray[np.int64]
    reasons: pa.Array
    n_left_out: int
    completes: bool

    @property
    def computed(self) -> pa.Table:
        """[M] the rows that are computed."""
        return self.rows if len(self.at) == self.rows.num_rows else self.rows.take(pa.array(self.at))

    @property
    def left_out(self) -> frozenset[str]:
        """The generators whose rows are left out."""
        return frozenset(self.rows["generator"].filter(self.reasons.is_valid()).unique().to_pylist())

    def whole(self, scores: pa.Table, part: pa.Table | None) -> pa.Table:
        """[N] the unit's part once it has the `scores` of the computed rows, [M]; `part`: as it is now, if it is there.

        What is scored in it stays. Raises RunError where it went away since its unit was read.
        """
        n_rows = self.rows.num_rows
        if part is None:
            if len(self.at) == n_rows:
                return scores
            part = self._left_out_in(scores.schema)
        # Others may have completed it in the meantime.
        lacks = _is_left_out(part)
        fills = np.flatnonzero(lacks[self.at])
        order = np.arange(n_rows)
        order[self.at[fills]] = n_rows + fills
        # Parquet gives the values of a list another name than they had, which the file's schema would tell.
        whole = pa.concat_tables([part.cast(scores.schema), scores]).take(pa.array(order)).combine_chunks()
        if whole["detail"].null_count:
            raise RunError("a part went away while it was completed; give the same command again")
        return whole

    def _left_out_in(self, schema: pa.Schema) -> pa.Table:
        """[N] all rows as they are where they are left out; the detail of those that are not is null."""
        n_rows = self.rows.num_rows
        own = {"status": pa.repeat(str(Status.LEFT_OUT), n_rows), "detail": self.reasons}
        where = {name: self.rows[name] for name in self.rows.column_names if name not in own}
        nulls = {field.name: pa.nulls(n_rows, field.type) for field in schema}
        return pa.table({name: (nulls | where | own)[name] for name in schema.names}, schema=schema)


def share_of(rows: pa.Table, stores: Sequence[ScorerStore | None], unit: Unit, leave_out: Mapping[str, str]) -> Share:
    """What of a unit's rows some store lacks, without those of these generators; None: a store without its part. Raises
    RunError for a damaged part."""
    names, why = pa.array(leave_out.keys(), pa.string()), pa.array(leave_out.values(), pa.string())
    named = why.take(pc.index_in(rows["generator"], value_set=names).combine_chunks())
    scorable = pc.equal(rows["status"], str(Status.OK)).combine_chunks()
    reasons = pc.if_else(scorable, named, pa.scalar(None, pa.string()))
    parts = [None if store is None else store.read(unit, ["status"]) for store in stores]
    lacking = np.zeros(rows.num_rows, np.bool_)
    for part in parts:
        lacking |= True if part is None else _is_left_out(part)
    wanted = reasons.is_null().to_numpy(zero_copy_only=False)
    return Share(
        rows=rows,
        at=np.flatnonzero(lacking & wanted),
        reasons=reasons,
        n_left_out=int((lacking & ~wanted).sum()),
        completes=any(part is not None for part in parts),
    )


def _is_left_out(part: pa.Table) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.equal(part["status"], str(Status.LEFT_OUT)).to_numpy()
    return found
