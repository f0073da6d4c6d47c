"""`status` and `verify`: how far a run is, and whether every file is what it should be. Reads, never writes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.errors import RunError
from fastcompat.response import SCORED_STATUSES, Status
from fastcompat.schemas import FIGURES
from fastcompat.store import Run, ScorerStore, Unit


@dataclass(frozen=True, kw_only=True)
class ScorerProgress:
    """How far one scorer is: rows committed, their statuses, and for each status but `ok` one row with its reason."""

    name: str
    n_rows: int
    statuses: dict[str, int]
    examples: dict[str, str]


def scorer_progress(run: Run, scorer: ScorerStore) -> ScorerProgress:
    """How far `scorer` is. Raises RunError where a part is damaged."""
    finished = scorer.finished()
    units = [unit for unit in run.units if unit.name in finished]
    statuses: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for unit in units:
        part = scorer.read(unit, ["row_key", "status", "detail"])
        for count in pc.value_counts(part["status"]).to_pylist():
            status = count["values"]
            statuses[status] += count["counts"]
            if status != Status.OK and status not in examples:
                row = part.slice(pc.index(part["status"], status).as_py(), 1).to_pylist()[0]
                examples[status] = f"{row['row_key']}: {row['detail']}"
    n_rows = sum(unit.n_rows for unit in units)
    return ScorerProgress(name=scorer.name, n_rows=n_rows, statuses=dict(statuses), examples=examples)


def find_damage(run: Run) -> list[str]:
    """One line for everything in a run that is missing, damaged or does not belong; empty when all is whole."""
    shards = {
        run.directory / "corpus" / shard.name: shard.sha256
        for generation in run.generations
        for shard in generation.shards
    }
    damaged = {path: why for path, sha256 in shards.items() if (why := _shard_damage(path, sha256))}
    damage = [f"{path} {why}" for path, why in damaged.items()]
    # A part is checked against its unit's rows, which a damaged shard cannot tell.
    checkable = [unit for unit in run.units if run.shard_path(unit.shard) not in damaged]
    for scorer in run.scorers():
        damage.extend(_damaged_parts(run, scorer, checkable))
    for directory in sorted({path.parent for path in run.directory.glob("scores/*/part-*.parquet")}):
        if not (directory / "scorer.json").is_file():
            damage.append(f"{directory} has parts but no scorer.json, so nobody knows whose; move it away, score again")
    return damage


def _shard_damage(path: Path, sha256: str) -> str:
    if not path.is_file():
        return "is missing; prepare the corpus in a new run"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            return ""
    return "is not what was prepared (its SHA-256 differs); prepare the corpus in a new run"


def _damaged_parts(run: Run, scorer: ScorerStore, checkable: Sequence[Unit]) -> Iterator[str]:
    finished = scorer.finished()
    for name in sorted(finished - {unit.name for unit in run.units}):
        yield f"{scorer.directory / f'part-{name}.parquet'} belongs to no unit of this run"
    units = {unit.name: unit for unit in checkable}
    for name in sorted(finished & set(units)):
        try:
            yield from _damage(run, scorer, units[name])
        except RunError as error:
            yield str(error)


def _damage(run: Run, scorer: ScorerStore, unit: Unit) -> Iterator[str]:
    path = scorer.part(unit)
    part = scorer.read(unit)
    rows = run.unit_rows(unit)
    if not part["row_key"].equals(rows["row_key"]):
        yield f"{path} does not hold the rows of its unit; delete it and score again"
        return
    scored = pc.is_in(part["status"], value_set=_SCORED)
    figure = FIGURES[scorer.kind]
    if not pc.all(pc.equal(scored, pc.is_valid(part[figure]))).as_py():
        yield f"{path} has a status without its {figure}, or a {figure} without its status; delete it and score again"


_SCORED = pa.array([str(status) for status in SCORED_STATUSES])
