"""What everything but the model costs: a corpus prepared, dealt out by claims to a model that computes nothing, ranked.

    python bench/null_model.py [--rows 100000 1000000 10000000] [--parts 100000] [--directory DIR]

Rows of some 0.2 KB, 20 generators, the same prompts of each. The null model is a base model and a reward model in one:
it gives every response figures that follow from a checksum of its text, once it was read, packed and claimed as for any
other model. Every stage runs in a process of its own, so that a peak of memory is that stage's. Then `status` of a run
of many parts, which are hard links to a few. Writes bench/results/null_model.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from preparation_memory import write_corpus

from fastcompat.benchmark.machine import machine
from fastcompat.cli.display import PARTS
from fastcompat.corpus.summary import CorpusSummary, ShardSummary
from fastcompat.decisions import rank
from fastcompat.rows import SCORED_STATUSES, Extras, Response, Status, part_schema
from fastcompat.store import Claims, Run, ScorerStore, Unit, open_run
from fastcompat.store.parts import part_name
from fastcompat.store.places import Disk
from fastcompat.store.preparing import CorpusSettings, prepare_run
from fastcompat.store.run import FORMAT
from fastcompat.store.verification import scorer_progress

RESULT = Path(__file__).parent / "results" / "null_model.json"
GENERATORS = 20
TOKEN_BUDGET = 16_384
KINDS = ("base_model", "reward_model")
# Of the run of many parts: rows of each, and units of a shard.
PART_ROWS, SHARD_UNITS = 8, 1000
# Of one file, in any file system.
MOST_LINKS = 10_000
# The stated limit.
MAX_STATUS_SECONDS = 2.0


class NullPlan:
    """Of a pack; it lies on every device."""

    def __init__(self, forest: Any) -> None:
        self.forest = forest

    def to(self, device: Any) -> NullPlan:
        return self


# All that the loop asks of a model.
NULL_MODEL: Any = SimpleNamespace(
    vocabulary=1 << 16,
    device=SimpleNamespace(type="cpu"),
    rope_boundary=None,
    plan=lambda forest, positions: NullPlan(forest),
    hidden=lambda plan: None,
)


class NullScores:
    """The figures of N responses, as `scoring.Scores` has them: of two tokens each, the first of which is the prompt's.

    It inherits nothing, so that torch is loaded where responses are scored, and nowhere else.
    """

    def __init__(self, rows: Sequence[Response]) -> None:
        checksums = np.array([zlib.crc32(row.messages[-1].content.encode()) for row in rows], np.int64)
        prompts = np.array([zlib.crc32(row.prompt_id.encode()) for row in rows], np.int64)
        self._ids = np.stack([prompts, checksums], axis=1) % NULL_MODEL.vocabulary
        place = np.array([zlib.crc32(row.generator.encode()) % 97 / 970 for row in rows])
        self._known = np.stack([0.5 + checksums % 1009 / 1009 + place, 4 + checksums % 2003 / 2003 - place], axis=1)
        self._figures = np.full(self._known.shape, np.nan)
        self._status = [row.status for row in rows]
        self._detail = [row.detail for row in rows]
        self.sequences = [SimpleNamespace(input_ids=ids) for ids in self._ids]
        self.n_rows = len(rows)

    def scorable(self) -> list[int]:
        return [n for n, status in enumerate(self._status) if status in SCORED_STATUSES]

    def to_pack(self, n: int, rope_boundary: int | None) -> tuple[Any, Any]:
        return self._ids[n], np.array([False, True])

    def positions(self, forest: Any) -> Any:
        return forest.predictors

    def compute(self, model: Any, plan: Any, hidden: None) -> tuple[Any]:
        import torch

        return (torch.from_numpy(self._known[plan.forest.sequences]),)

    def add(self, forest: Any, computed: tuple[Any]) -> list[int]:
        (self._figures[forest.sequences],) = computed
        return []

    def fail(self, n: int, status: Status, detail: str) -> None:
        self._status[n], self._detail[n] = status, detail

    def tables(self, rows: pa.Table) -> tuple[pa.Table, ...]:
        loss, reward = (pa.array(figure, pa.float64(), from_pandas=True) for figure in self._figures.T)
        ones = pa.array(np.ones(self.n_rows, np.int32))
        own = {"n_prompt_tokens": ones, "n_tokens": ones, "nll_sum": loss, "loss": loss, "reward": reward}
        own |= {"status": pa.array(map(str, self._status), pa.string()), "detail": pa.array(self._detail, pa.string())}
        schemas = [part_schema(kind, Extras()) for kind in KINDS]
        return tuple(
            pa.table([own[name] if name in own else rows[name] for name in schema.names], schema=schema)
            for schema in schemas
        )

    def restore(self, tables: Sequence[pa.Table]) -> None:
        columns = (tables[0]["loss"], tables[1]["reward"])
        self._figures = np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)


def null_store(run: Run, kind: str) -> ScorerStore:
    settings = {"model": "null", "token_budget": TOKEN_BUDGET}
    return run.scorer(f"null-{kind}", {"kind": kind, "model": "null"}, lambda: settings)


def prepare(directory: Path) -> int:
    """The corpus becomes a run."""
    run, _ = prepare_run(directory / "run", [str(directory / "corpus")], CorpusSettings())
    return run.n_rows


def score(directory: Path) -> int:
    """Every unit is claimed, scored and committed."""
    from fastcompat.scoring.claimed_units import ClaimedUnits
    from fastcompat.scoring.engine import Progress, score_run

    run = open_run(directory / "run")
    stores = [null_store(run, kind) for kind in KINDS]
    by_name = {unit.name: unit for unit in run.units}

    def pending(asked: Sequence[Unit]) -> set[Unit]:
        return {unit for store in stores for unit in run.pending(store, units=asked)}

    progress = Progress()
    with Claims(stores[0].claims, is_done=lambda name: not pending([by_name[name]])) as claims:
        units = ClaimedUnits(units=run.units, claims=claims, pending=pending, seen=len, stop=lambda: False)
        score_run(run, stores, NULL_MODEL, NullScores, token_budget=TOKEN_BUDGET, units=units, progress=progress)
    return progress.n_rows


def ranking(directory: Path) -> int:
    """Both figures of every response, ranked with 1,000 draws."""
    return sum(rank(open_run(directory / "run"))["n"].to_pylist())


def status(directory: Path) -> int:
    """What `status` reads of every scorer."""
    run = open_run(directory / "run")
    return sum(scorer_progress(run, store, most_parts=PARTS).n_rows for store in run.scorers())


STAGES: dict[str, Callable[[Path], int]] = {
    "prepare": prepare,
    "score": score,
    "rank": ranking,
    "status": status,
}


def many_parts(directory: Path, n_parts: int) -> None:
    """A run of one scorer with so many parts, hard links to one: what `status` looks at of a run, and no more."""
    shards = tuple(
        ShardSummary(
            name=f"shard-{k:05d}.parquet", sha256="", n_rows=SHARD_UNITS * PART_ROWS, units=(PART_ROWS,) * SHARD_UNITS
        )
        for k in range(-(-n_parts // SHARD_UNITS))
    )
    directory.mkdir()
    generation = CorpusSummary(files=(), shards=shards, generators={"a": n_parts * PART_ROWS})
    Disk(directory).put_json("manifest.json", {"format": FORMAT, "generations": [generation.to_json()]})
    run = open_run(directory)
    store = null_store(run, "base_model")
    keys = pa.array([f"corpus.jsonl#{k}" for k in range(PART_ROWS)])
    columns = {"row_key": keys, "status": pa.array(["ok"] * PART_ROWS), "detail": pa.array([""] * PART_ROWS)}
    schema = store.schema
    columns |= {field.name: pa.nulls(PART_ROWS, field.type) for field in schema if field.name not in columns}
    part = pa.table(columns).select(schema.names).cast(schema)
    units, parts = run.units[:n_parts], run.directory / "scores" / store.name
    for k, unit in enumerate(units):
        if k % MOST_LINKS:
            os.link(parts / part_name(units[k - k % MOST_LINKS]), parts / part_name(unit))
        else:
            store.commit(unit, part)


def measured(stage: str, directory: Path) -> dict[str, Any]:
    """A stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--directory", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_stage(stage: str, directory: Path) -> None:
    """Do it, and print what it took."""
    began, began_cpu = time.perf_counter(), time.process_time()
    n_rows = STAGES[stage](directory)
    seconds = time.perf_counter() - began
    # What `getrusage` tells may be the process's that started this one.
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(fields["VmHWM"].split()[0]) / 1024
    result = {"rows": n_rows, "seconds": round(seconds, 2), "cpu_seconds": round(time.process_time() - began_cpu, 2)}
    # The second is what to compare sizes by where others are at work on the machine.
    rates = {"rows_per_second": round(n_rows / seconds), "rows_per_cpu_second": round(n_rows / result["cpu_seconds"])}
    print(json.dumps(result | rates | {"peak_mib": round(peak)}))


def measure(n_rows: int, directory: Path) -> dict[str, Any]:
    """All stages of a corpus of so many rows."""
    corpus = directory / "corpus"
    corpus.mkdir()
    n_bytes = write_corpus(corpus, n_rows=n_rows, n_generators=GENERATORS)
    stages = {stage: measured(stage, directory) for stage in STAGES}
    run = open_run(directory / "run")
    sizes = {"rows": n_rows, "corpus_bytes": n_bytes, "units": len(run.units)}
    print(f"{n_rows:>12,} rows, {len(run.units):,} units")
    for stage, own in stages.items():
        rates = f"{own['rows_per_second']:>10,} rows/s {own['rows_per_cpu_second']:>10,} rows/CPU s"
        print(f"  {stage:8} {own['seconds']:>8.1f} s {rates} {own['peak_mib']:>6,} MiB")
    return sizes | {"stages": stages}


def main() -> None:
    """Measure, write the result and print it; exit 1 where the limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--parts", type=int, default=100_000)
    parser.add_argument("--directory", type=Path, help="where the runs are made, and removed again")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, options.directory)
        return
    load = os.getloadavg()[0]
    results = []
    for n_rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.directory) as name:
            results.append(measure(n_rows, Path(name)))
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        many_parts(Path(name) / "run", options.parts)
        of_many = {"parts": options.parts} | measured("status", Path(name))
    print(f"status of {options.parts:,} parts: {of_many['seconds']:.2f} s")
    report = {"machine": machine(), "load_before": round(load, 2), "results": results, "status_of_many_parts": of_many}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if of_many["seconds"] > MAX_STATUS_SECONDS:
        raise SystemExit(f"status takes more than {MAX_STATUS_SECONDS:g} s")


if __name__ == "__main__":
    main()
