"""Everything that a run's scorers have told so far, as one table. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from fastcompat.rows import ROW_SCHEMA, SCORES_SCHEMA, as_scores, with_reward
from fastcompat.store.parts import Unit
from fastcompat.store.run import Run

# The index in `Run.units` of the unit that a row lies in.
UNIT = "_unit"


# Units that are read at once.
READERS = 4


def scores_with_units(run: Run) -> pa.Table:
    """`run.scores()` without list columns, in the order of the units, and with the column `UNIT`, int32."""
    stores = run.current_scorers()
    labels = run.labels(stores)
    index_of = {unit: index for index, unit in enumerate(run.units)}
    tables = [SCORES_SCHEMA.empty_table().append_column(UNIT, pa.array([], pa.int32()))]
    for store in stores:
        columns = [field.name for field in store.schema if not pa.types.is_list(field.type)]
        done = [(index_of[unit], unit) for unit in store.with_rows(run.units)]
        parts = _read(partial(store.rows, columns=columns), done)
        if parts:
            tables.append(as_scores(pa.concat_tables(parts), store.kind, labels[store.name]))
    if run.reward_columns:
        columns = [name for name in ROW_SCHEMA.names if name != "messages"]
        parts = _read(partial(run.unit_rows, columns=columns), list(enumerate(run.units)))
        rows = pa.concat_tables(parts)
        tables += [as_scores(with_reward(rows, name), "reward_model", f"column {name}") for name in run.reward_columns]
    return pa.concat_tables(tables, promote_options="default")


def _read(read_one: Callable[[Unit], pa.Table], units: Sequence[tuple[int, Unit]]) -> list[pa.Table]:
    """Every unit's rows with its index, several at a time."""

    def with_index(numbered: tuple[int, Unit]) -> pa.Table:
        index, unit = numbered
        rows = read_one(unit)
        return rows.append_column(UNIT, pa.array(np.full(rows.num_rows, index), pa.int32()))

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(with_index, units))
