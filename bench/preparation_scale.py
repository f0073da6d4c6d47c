"""Preparation by several processes against one: the same bytes, how much sooner, and what each process takes.

    python bench/preparation_scale.py [--rows 2000000] [--row-bytes 1300] [--rounds 3] [--processes 1 2]

Writes two corpora to a temporary directory, JSON lines of which half the files are compressed, and one large Parquet
file with half as many rows, and prepares a run of each in processes of its own: in one go, and in tasks by so many
processes, in turn, several times. Writes bench/results/preparation_scale.json: medians of the seconds, rows per CPU
second, the peak memory of any process, and whether all shards and summaries are equal.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from preparation_memory import WORDS

from fastcompat.benchmark.machine import machine

RESULT = Path(__file__).parent / "results" / "preparation_scale.json"
SAMPLE_SECONDS = 0.2
N_FILES = 16
# A prompt is answered once by each file, so that equal prompts come from all of them.
PARQUET_GROUP_ROWS = 20_000

# What is measured: argument 1 is the run, 2 the corpus, 3 the processes; 0 is all of it in one go.
_PREPARE = """
import hashlib, json, resource, sys, time
from pathlib import Path
from fastcompat.store import preparing
directory, corpus, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
preparing._SMALL_BYTES = 0 if processes else 1 << 62
begin = time.perf_counter()
seen = {}
def note(progress):
    seen.setdefault(progress.phase, time.perf_counter())
run, summary = preparing.prepare_run(
    directory, [corpus], preparing.CorpusSettings(), processes=processes, on_progress=note
)
end = time.perf_counter()
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
digest = hashlib.sha256(json.dumps(summary.to_json()).encode())
for shard in summary.shards:
    digest.update((directory / "corpus" / shard.name).read_bytes())
print(json.dumps({"seconds": end - begin, "reading_seconds": seen["writing"] - begin,
                  "cpu_seconds": sum(each.ru_utime + each.ru_stime for each in used), "rows": summary.n_rows,
                  "shards": len(summary.shards), "sha256": digest.hexdigest()}))
"""


def rows(n: int, file: int, n_bytes: int) -> Iterator[dict[str, str]]:
    """Rows of about so many bytes as JSON."""
    draw = random.Random(file)
    words = max(1, (n_bytes - 90) // 6)
    endings = [" ".join(draw.choices(WORDS, k=draw.randint(words // 2, words * 3 // 2))) for _ in range(997)]
    for k in range(n):
        text = f"Answer {file} to {k}: {endings[(k * 31 + file * 7) % 997]}."
        yield {"prompt": f"Question {k}: what is it?", "response": text}


def write_lines(directory: Path, n_rows: int, row_bytes: int) -> None:
    """Files of JSON lines, every second one compressed."""
    for file in range(N_FILES):
        packed = file % 2 == 0
        path = directory / f"generator-{file:02d}.jsonl{'.gz' if packed else ''}"
        with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as output:
            for row in rows(n_rows // N_FILES, file, row_bytes):
                output.write(json.dumps(row).encode() + b"\n")


def write_parquet(directory: Path, n_rows: int, row_bytes: int) -> None:
    """One file, whose generators are a column."""
    names = ("prompt", "response", "generator")
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetWriter(directory / "all.parquet", schema, compression="zstd") as writer:
        for file in range(N_FILES):
            held: list[dict[str, str]] = []
            for row in rows(n_rows // N_FILES, file, row_bytes):
                held.append({**row, "generator": f"generator-{file:02d}"})
                if len(held) == PARQUET_GROUP_ROWS:
                    writer.write_table(pa.Table.from_pylist(held, schema=schema))
                    held = []
            if held:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in below for each in family(int(child)))]


def memory(pid: int) -> dict[str, float]:
    """MiB: the most that a process has had resident, files that are mapped included, and what it owns now."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {"peak_rss": int(fields["VmHWM"].split()[0]) / 1024, "owned": int(fields["RssAnon"].split()[0]) / 1024}
    except (OSError, KeyError, ValueError):  # it ended between the two looks
        return {"peak_rss": 0.0, "owned": 0.0}


def prepare(directory: Path, corpus: Path, processes: int) -> dict[str, Any]:
    """One preparation, with the peak memory of any of its processes."""
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "-c", _PREPARE, str(directory), str(corpus), str(processes)]
    peak = {"peak_rss": 0.0, "owned": 0.0}
    n_processes = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            pids = family(process.pid)
            n_processes = max(n_processes, len(pids))
            for pid in pids:
                peak = {name: max(peak[name], value) for name, value in memory(pid).items()}
            time.sleep(SAMPLE_SECONDS)
        output = process.communicate()[0]
    if process.returncode != 0:
        sys.exit("the preparation failed; its own message is above")
    shutil.rmtree(directory)
    result: dict[str, Any] = json.loads(output)
    return {**result, "peak_mib": peak["peak_rss"], "owned_mib": peak["owned"], "processes_seen": n_processes}


def summed_up(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of several preparations of one kind, and the peaks."""
    medians = {
        name: round(statistics.median(each[name] for each in found), 2)
        for name in ("seconds", "reading_seconds", "cpu_seconds")
    }
    return {
        **medians,
        "seconds_each": [round(each["seconds"], 2) for each in found],
        "rows_per_second": round(found[0]["rows"] / medians["seconds"]),
        "rows_per_cpu_second": round(found[0]["rows"] / medians["cpu_seconds"]),
        "peak_mib_of_a_process": round(max(each["peak_mib"] for each in found), 1),
        "owned_mib_of_a_process": round(max(each["owned_mib"] for each in found), 1),
        "processes_seen": max(each["processes_seen"] for each in found),
    }


def measure(corpus: Path, run: Path, processes: list[int], rounds: int) -> dict[str, Any]:
    """All kinds of preparation of one corpus, in turn."""
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in (0, *processes)}
    for _ in range(rounds):
        for n, each in found.items():
            each.append(prepare(run, corpus, n))
    every = [each for kind in found.values() for each in kind]
    kinds = {f"in tasks, {n} processes" if n else "in one go": summed_up(each) for n, each in found.items()}
    first, last = found[processes[0]], found[processes[-1]]
    ratio = statistics.median(e["seconds"] for e in first) / statistics.median(e["seconds"] for e in last)
    return {
        "rows": every[0]["rows"],
        "bytes_on_disk": sum(path.stat().st_size for path in corpus.iterdir()),
        "shards": every[0]["shards"],
        "same_bytes": len({each["sha256"] for each in every}) == 1,
        "sha256": every[0]["sha256"],
        f"speed_of_{processes[-1]}_against_{processes[0]}": round(ratio, 2),
        "kinds": kinds,
    }


def main() -> None:
    """Measure, write the result and print its summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--row-bytes", type=int, default=1300, help="of a row as JSON, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=["lines", "parquet"])
    parser.add_argument("--directory", type=Path, help="where corpora and runs lie meanwhile")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "load_before": round(os.getloadavg()[0], 2)}
    result |= {"row_bytes": options.row_bytes, "rounds": options.rounds, "corpora": {}}
    for name, write, share in (("lines", write_lines, 1), ("parquet", write_parquet, 2)):
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
            corpus = Path(temporary) / "corpus"
            corpus.mkdir()
            write(corpus, options.rows // share, options.row_bytes)
            found = measure(corpus, Path(temporary) / "run", options.processes, options.rounds)
        result["corpora"][name] = found
        print(f"{name}: {found['rows']:,} rows, {found['bytes_on_disk'] / 2**20:,.0f} MiB, {found['shards']} shards")
        for kind, each in found["kinds"].items():
            print(
                f"  {kind}: {each['seconds']:.1f} s, {each['rows_per_cpu_second']:,} rows per CPU second, "
                f"{each['peak_mib_of_a_process']:.0f} MiB a process ({each['owned_mib_of_a_process']:.0f} owned)"
            )
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(found["same_bytes"] for found in result["corpora"].values()):
        sys.exit("the shards or the summaries differ")


if __name__ == "__main__":
    main()
