"""Memory and speed of corpus preparation: 2 million short rows, resident memory sampled every half second.

    python bench/preparation_memory.py [--rows 2000000] [--generators 20]

Writes the corpus to a temporary directory (half of its files compressed), prepares it in a process of its own, and
writes bench/results/preparation_memory.json. `RssAnon` is memory that the process owns; `VmRSS` also counts pages of
the temporary files that the system keeps mapped for as long as nobody else needs the memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastcompat.benchmark.machine import machine

RESULTS = Path(__file__).parent / "results"
WORDS = (
    "the",
    "list",
    "of",
    "a",
    "file",
    "returns",
    "one",
    "new",
    "value",
    "object",
    "when",
    "string",
    "path",
    "given",
)
SAMPLE_SECONDS = 0.5
CURVE_POINTS = 60

_PREPARE = """
import json, sys, time
from fastcompat.corpus import prepare
begin = time.perf_counter()
wrote = []
def note(progress):
    if progress.phase == "writing" and not wrote:
        wrote.append(time.perf_counter())
summary = prepare(sys.argv[1], sys.argv[2], on_progress=note)
end = time.perf_counter()
units = sum(len(shard.units) for shard in summary.shards)
print(json.dumps({"rows": summary.n_rows, "statuses": summary.statuses, "shards": len(summary.shards), "units": units,
                  "read_seconds": wrote[0] - begin, "write_seconds": end - wrote[0]}))
"""


def write_corpus(directory: Path, *, n_rows: int, n_generators: int) -> int:
    """One file per generator, the same prompts in each; returns the corpus's bytes."""
    draw = random.Random(0)
    endings = [" ".join(draw.choices(WORDS, k=draw.randint(8, 40))) for _ in range(997)]
    for generator in range(n_generators):
        packed = generator % 2 == 0
        path = directory / f"generator-{generator:02d}.jsonl{'.gz' if packed else ''}"
        with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as file:
            for prompt in range(n_rows // n_generators):
                text = f"Answer {generator} to {prompt}: {endings[(prompt * 31 + generator * 7) % 997]}."
                file.write(json.dumps({"prompt": f"Question {prompt}: what is it?", "response": text}).encode() + b"\n")
    return sum(path.stat().st_size for path in directory.iterdir())


def memory(pid: int) -> tuple[float, float]:
    """(VmRSS, RssAnon) of a process, in MiB."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["RssAnon"].split()[0]) / 1024


def watch(process: subprocess.Popen[str]) -> list[tuple[float, float, float]]:
    """(seconds, VmRSS, RssAnon) of a process until it ends."""
    begin = time.perf_counter()
    samples = []
    while process.poll() is None:
        try:
            samples.append((time.perf_counter() - begin, *memory(process.pid)))
        except (OSError, KeyError):
            # It ended between the two looks.
            break
        time.sleep(SAMPLE_SECONDS)
    return samples


def thinned(samples: list[tuple[float, float, float]]) -> list[list[float]]:
    """At most CURVE_POINTS samples; each is the largest of those that it stands for."""
    step = -(-len(samples) // CURVE_POINTS)
    groups = [samples[i : i + step] for i in range(0, len(samples), step)]
    return [[round(g[0][0], 1), *(round(max(s[k] for s in g), 1) for k in (1, 2))] for g in groups]


def measure(*, n_rows: int, n_generators: int) -> dict[str, Any]:
    """Write the corpus, prepare it once, and say what that took."""
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        n_bytes = write_corpus(corpus, n_rows=n_rows, n_generators=n_generators)
        load = os.getloadavg()[0]
        command = [sys.executable, "-c", _PREPARE, str(corpus), str(Path(name) / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            samples = watch(process)
            output = process.communicate()[0]
        if process.returncode != 0:
            raise SystemExit("the preparation failed; its own message is above")
        result = json.loads(output)
        shard_bytes = sum(path.stat().st_size for path in (Path(name) / "out").iterdir())
    # The first second is the start of Python and its libraries.
    running = [sample for sample in samples if sample[0] >= 1]
    quarter = len(running) // 4
    return {
        "machine": machine(),
        "note": "single run; other work may have shared the machine (see load_before)",
        "load_before": round(load, 2),
        "corpus": {"rows": n_rows, "generators": n_generators, "bytes_on_disk": n_bytes},
        **result,
        "bytes_of_shards": shard_bytes,
        "rows_per_second": round(n_rows / (result["read_seconds"] + result["write_seconds"])),
        "rows_per_second_reading": round(n_rows / result["read_seconds"]),
        "peak_vm_rss_mib": round(max(s[1] for s in samples), 1),
        "peak_rss_anon_mib": round(max(s[2] for s in samples), 1),
        "peak_rss_anon_mib_by_quarter": [
            round(max(s[2] for s in running[i * quarter : (i + 1) * quarter or None]), 1) for i in range(4)
        ],
        "curve_columns": ["seconds", "vm_rss_mib", "rss_anon_mib"],
        "curve": thinned(samples),
    }


def main() -> None:
    """Measure, write the result and print its summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--generators", type=int, default=20)
    options = parser.parse_args()
    result = measure(n_rows=options.rows, n_generators=options.generators)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "preparation_memory.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    seconds = result["read_seconds"] + result["write_seconds"]
    speed = f"{result['rows_per_second']:,} rows/s"
    print(f"{result['rows']:,} rows in {seconds:.1f} s, {speed}, on {result['machine']['processor']}")
    print(f"{result['shards']} shards, {result['units']} units, {result['bytes_of_shards'] / 2**20:.0f} MiB")
    print(f"peak memory: {result['peak_rss_anon_mib']} MiB owned, {result['peak_vm_rss_mib']} MiB with mapped files")
    print(f"peak owned memory by quarter of the run: {result['peak_rss_anon_mib_by_quarter']}")


if __name__ == "__main__":
    main()
