"""`status` and `verify`: how far a run is, and whether every file is what it should be. Reads, never writes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.errors import RunError
from fastcompat.rows import FIGURES, Status, is_scored
from fastcompat.store.beginnings import left_out_in
from fastcompat.store.parts import ScorerStore, Unit, beginning_name, part_name
from fastcompat.store.places import Place
from fastcompat.store.races import races_of
from fastcompat.store.run import Run, shard_name

# Of a shard, read at once.
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class ScorerProgress:
    """How far one scorer is: rows scored, their statuses, and for each status but `ok` one row with its reason.

    Rows that were left out are among the statuses only.
    n_begun_rows: those of n_rows that belong to the n_begun_units units which are not finished.
    n_parts: finished units; statuses are counted in n_parts_read of them, and in all begun ones.
    """

    name: str
    n_rows: int
    n_begun_rows: int
    n_begun_units: int
    n_parts: int
    n_parts_read: int
    statuses: dict[str, int]
    examples: dict[str, str]


def scorer_progress(run: Run, scorer: ScorerStore, *, most_parts: int | None = None) -> ScorerProgress:
    """How far `scorer` is. Raises RunError where a part is damaged.

    most_parts: in how many parts statuses are counted at most, spread evenly (None: in all). Rows are counted in all:
    where some may be left out by the parts' footers, else without opening any.
    """
    begun, finished = scorer.begun(), scorer.finished()  # in this order: what is finished in between has its part
    parts = [unit for unit in run.units if unit.name in finished]
    begun -= finished
    others = [unit for unit in run.units if unit.name in begun] if begun else []
    step = 1 if most_parts is None else max(1, -(-len(parts) // most_parts))
    looked_at = parts[::step]
    statuses: Counter[str] = Counter()
    examples: dict[str, str] = {}
    n_rows = n_begun_rows = 0
    with ThreadPoolExecutor(scorer.place.n_readers) as pool:
        for unit, rows in zip(looked_at, pool.map(lambda unit: scorer.read(unit, ["status"]), looked_at), strict=True):
            n_rows += rows.num_rows - _n_left_out(rows)
            if not _count(rows, statuses) <= examples.keys():
                _exemplify(scorer.read(unit, _WITH_REASONS), examples)
        if step > 1:
            passed_over = [unit for k, unit in enumerate(parts) if k % step]
            n_rows += sum(unit.n_rows for unit in passed_over)
            if scorer.leaves_out:
                n_rows -= sum(pool.map(partial(_left_out_of, scorer), passed_over))
    for unit in others:
        rows = scorer.rows(unit, _WITH_REASONS)
        n_begun_rows += rows.num_rows - _n_left_out(rows)
        _count(rows, statuses)
        _exemplify(rows, examples)
    return ScorerProgress(
        name=scorer.name,
        n_rows=n_rows + n_begun_rows,
        n_begun_rows=n_begun_rows,
        n_begun_units=len(others),
        n_parts=len(parts),
        n_parts_read=len(looked_at),
        statuses=dict(statuses),
        examples=examples,
    )


_WITH_REASONS = ["row_key", "status", "detail"]


def _count(rows: pa.Table, statuses: Counter[str]) -> set[str]:
    """Count rows by status; returns the statuses of which somebody may want an example."""
    counts = {count["values"]: count["counts"] for count in pc.value_counts(rows["status"]).to_pylist()}
    statuses.update(counts)
    return set(counts) - {Status.OK}


def _exemplify(rows: pa.Table, examples: dict[str, str]) -> None:
    """Add an example of every status but `ok` that has none yet."""
    for status in rows["status"].unique().to_pylist():
        if status != Status.OK and status not in examples:
            row = rows.slice(pc.index(rows["status"], status).as_py(), 1).to_pylist()[0]
            examples[status] = f"{row['row_key']}: {row['detail']}"


def _left_out_of(scorer: ScorerStore, unit: Unit) -> int:
    """Rows that a part leaves out."""
    return _n_left_out(scorer.read(unit, ["status"])) if scorer.left_out(unit) else 0


def _n_left_out(rows: pa.Table) -> int:
    return int(pc.sum(pc.equal(rows["status"], str(Status.LEFT_OUT)), min_count=0).as_py())


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What one scorer has not scored yet: so many rows, and of so many prompts some responses but not all.

    A row that was left out is not scored, but does not make a prompt one of those.
    """

    n_rows: int
    n_split_prompts: int


def pending_rows(run: Run, scorer: ScorerStore) -> Pending:
    """What is missing of `scorer`'s scores. Of the units that are finished, reads those that leave rows out. Raises
    RunError where such a part is damaged."""
    begun, finished = scorer.begun(), scorer.finished()
    n_rows = n_split_prompts = 0
    leaves_out = scorer.leaves_out
    for unit in run.units:
        if unit.name in finished:
            if leaves_out and scorer.left_out(unit):
                n_rows += _n_left_out(scorer.read(unit, ["status"]))
            continue
        n_rows += unit.n_rows
        try:
            beginning = scorer.read_beginning(unit, ["prompt_id", "status"]) if unit.name in begun else None
        except RunError:  # `Run.scores` has said so
            beginning = None
        if beginning is not None:
            n_rows -= beginning.n_rows - _n_left_out(beginning.table)
            missing = beginning.table.filter(pc.invert(beginning.done))["prompt_id"]
            there = beginning.rows["prompt_id"].unique()
            n_split_prompts += pc.sum(pc.is_in(there, value_set=missing.combine_chunks())).as_py() or 0
    return Pending(n_rows=n_rows, n_split_prompts=n_split_prompts)


def unscored_generators(run: Run) -> set[str]:
    """The generators of which some scorer in use has not scored every response yet."""
    found: set[str] = set()
    for scorer in run.current_scorers():
        finished = scorer.finished()
        for unit in run.units:
            if unit.name not in finished:
                found.update(run.unit_rows(unit, ["generator"])["generator"].unique().to_pylist())
            else:
                found |= scorer.left_out(unit)
    return found


def find_damage(run: Run) -> list[str]:
    """One line for everything in a run that is missing, damaged or does not belong; empty when all is whole."""
    shards = {shard.name: shard.sha256 for generation in run.generations for shard in generation.shards}
    damaged = {name: why for name, sha256 in shards.items() if (why := _shard_damage(run.shards, name, sha256))}
    damage = [f"{run.shards.path(name)} {why}" for name, why in damaged.items()]
    # A part is checked against its unit's rows, which a damaged shard cannot tell.
    checkable = [unit for unit in run.units if shard_name(unit.shard) not in damaged]
    for scorer in run.scorers():
        damage.extend(_damaged_units(run, scorer, checkable))
    try:
        for race in races_of(run):
            race.looks()
    except RunError as error:
        damage.append(str(error))
    scores = run.place / "scores"
    for place in [scores / name for name in scores.folders()]:
        names = place.names()
        if "scorer.json" not in names and any(name.startswith("part-") for name in names):
            damage.append(f"{place} has parts but no scorer.json, so nobody knows whose; move it away, score again")
    return damage


def _shard_damage(shards: Place, name: str, sha256: str) -> str:
    digest = hashlib.sha256()
    try:
        with shards.open(name, whole=False) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except FileNotFoundError:
        return "is missing; prepare the corpus in a new run"
    if digest.hexdigest() == sha256:
        return ""
    return "is not what was prepared (its SHA-256 differs); prepare the corpus in a new run"


def _damaged_units(run: Run, scorer: ScorerStore, checkable: Sequence[Unit]) -> Iterator[str]:
    finished = scorer.finished()
    begun = scorer.begun() - finished  # beside a part a beginning counts for nothing, and goes with the next session
    known = {unit.name for unit in run.units}
    for kind, names in (("part", finished), ("begun", begun)):
        for name in sorted(names - known):
            yield f"{scorer.place.path(f'{kind}-{name}.parquet')} belongs to no unit of this run"
    for unit in sorted(checkable):
        try:
            if unit.name in finished:
                part = scorer.read(unit)
                yield from _damage(run, scorer, unit, part_name(unit), part, part, scorer.left_out(unit))
            elif unit.name in begun and (beginning := scorer.read_beginning(unit)) is not None:
                name = beginning_name(unit)
                yield from _damage(run, scorer, unit, name, beginning.table, beginning.rows, beginning.left_out)
        except RunError as error:
            yield str(error)


def _damage(
    run: Run,
    scorer: ScorerStore,
    unit: Unit,
    name: str,
    table: pa.Table,
    rows: pa.Table,
    left_out: frozenset[str],
) -> Iterator[str]:
    """table: all rows of the file of this name; rows: those that are finished; left_out: as the file says it."""
    path = scorer.place.path(name)
    if not table["row_key"].equals(run.unit_rows(unit, ["row_key"])["row_key"]):
        yield f"{path} does not hold the rows of its unit; delete it and score again"
        return
    scored = is_scored(rows["status"])
    figure = FIGURES[scorer.kind]
    if not pc.all(pc.equal(scored, pc.is_valid(rows[figure])), min_count=0).as_py():
        yield f"{path} has a status without its {figure}, or a {figure} without its status; delete it and score again"
    if left_out_in(table) != left_out:
        yield f"{path} leaves out other rows than it says, so nobody would score them; delete it and score again"
