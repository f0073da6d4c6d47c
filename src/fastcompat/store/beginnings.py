"""What is kept of a unit before it is finished: `begun-00012-0003.parquet`, beside the parts.

It has all rows of its unit, in the columns of a part; of rows whose turn has not come yet the figure is null although
their status does not say why. While its unit is computed a beginning is replaced again and again, by rename, and it
goes when the part is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.errors import RunError
from fastcompat.rows import Status, is_scored
from fastcompat.store.places import Place

# Of a file's metadata, and only where rows are left out: a JSON list of their generators.
LEFT_OUT = "left_out"


class Packing(NamedTuple):
    """How the unit's sequences were packed: other packs could not be taken up where these end.

    token_budget: tokens of a pack. n_stores: scorers that the packs serve. n_packs: the first so many are scored.
    """

    token_budget: int
    n_stores: int
    n_packs: int


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """A unit's rows, [N], and which of them are done: they have their figure, or a status that says why not.

    left_out: generators of rows that are done only because they were left out.
    """

    table: pa.Table
    done: pa.ChunkedArray
    packing: Packing
    left_out: frozenset[str]

    @property
    def rows(self) -> pa.Table:
        """Those that are done."""
        return self.table.filter(self.done)

    @property
    def n_rows(self) -> int:
        """How many are done."""
        return int(pc.sum(self.done).as_py() or 0)


def write_beginning(place: Place, name: str, table: pa.Table, *, scorer: str, packing: Packing) -> None:
    """Keep a unit's rows, whole or not at all."""
    metadata = whose(table, scorer) | {field: str(value) for field, value in packing._asdict().items()}
    place.put_table(name, table.replace_schema_metadata(metadata))


def whose(table: pa.Table, scorer: str) -> dict[str, str]:
    """What a file of these rows says of itself: whose they are, and which generators' rows are left out, if any."""
    names = left_out_in(table)
    return {"scorer": scorer} | ({LEFT_OUT: json.dumps(sorted(names))} if names else {})


def left_out_in(table: pa.Table) -> frozenset[str]:
    """The generators of which these rows leave something out."""
    names = table.filter(pc.equal(table["status"], str(Status.LEFT_OUT)))["generator"]
    return frozenset(names.unique().to_pylist())


def left_out_by(metadata: Mapping[bytes, bytes] | None) -> frozenset[str]:
    """The same as a file's metadata has it. Raises ValueError for what is no list."""
    names = json.loads((metadata or {}).get(LEFT_OUT.encode(), b"[]"))
    if not isinstance(names, list):
        raise ValueError(f"left_out is {names!r}")
    return frozenset(names)


def read_beginning(
    place: Place,
    name: str,
    *,
    scorer: str,
    schema: pa.Schema,
    figure: str,
    n_rows: int,
    columns: Sequence[str] | None = None,
) -> Beginning:
    """A beginning, or some columns of it. Raises FileNotFoundError, and RunError for what cannot be used.

    scorer, schema, n_rows: what the unit's part would say of itself; figure: the column that is null where a row's turn
    has not come.
    """
    wanted = schema.names if columns is None else list(columns)
    unusable = f"{place.path(name)}: what is kept of this unit is not used, its rows are scored again"
    try:
        # Opened once: whoever computes the unit may put another file in its place at any time.
        whole = place.read_table(name)
        metadata = whole.schema.metadata or {}
        packing = Packing(*(int(metadata[field.encode()]) for field in Packing._fields))
        its_scorer = metadata[b"scorer"].decode()
        left_out = left_out_by(metadata)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{unusable}: it is damaged ({error})") from error
    except (KeyError, ValueError) as error:
        # Packs were in another order before the scorer's name was there.
        raise RunError(f"{unusable}: another version of fastcompat wrote it") from error
    if not whole.schema.equals(schema) or whole.num_rows != n_rows:
        raise RunError(f"{unusable}: it has other rows or columns than its part will have")
    if its_scorer != scorer:
        raise RunError(f"{unusable}: it is another scorer's")
    unscored = pc.invert(is_scored(whole["status"]))
    done = pc.or_(pc.is_valid(whole[figure]), unscored)
    table = whole.select(wanted).replace_schema_metadata(None)
    return Beginning(table=table, done=done, packing=packing, left_out=left_out)
