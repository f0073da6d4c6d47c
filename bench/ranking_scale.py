"""Time and memory of a ranking: 100,000 prompts x 20 generators, loss and reward of each response, 1,000 draws.

    python bench/ranking_scale.py [--prompts 100000] [--generators 20] [--draws 1000] [--rounds 3]

Writes the long table of such a run (a row per response and scorer) to a temporary Parquet file, reads and ranks it in a
process of its own, several times, and writes bench/results/ranking_scale.json. The reward model's rows come once in the
base model's order, as in a run, and once in another, as from tables joined by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcompat.benchmark.machine import machine
from fastcompat.rows.columns import SCORES_SCHEMA

RESULTS = Path(__file__).parent / "results"
# The stated limits.
MAX_SECONDS, MAX_MIB = 15.0, 2048

_RANK = """
import json, resource, sys, time
import pyarrow.parquet as pq
from fastcompat.decisions.ranking.ranking import rank
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
begin = time.perf_counter()
table = pq.read_table(sys.argv[1])
read, read_peak = time.perf_counter(), peak()
ranking = rank(table, draws=int(sys.argv[2]))
end = time.perf_counter()
print(json.dumps({"read_seconds": read - begin, "rank_seconds": end - read, "table_mib": table.nbytes / 2**20,
                  "read_peak_mib": read_peak, "peak_mib": peak(), "generators_ranked": ranking.num_rows,
                  "responses_ranked": sum(ranking["n"].to_pylist())}))
"""


def write_scores(path: Path, *, n_prompts: int, n_generators: int, shuffled: bool) -> None:
    """The long table of a run with one base model and one reward model, 1% of the responses without a figure."""
    draw = np.random.default_rng(0)
    n_rows = n_prompts * n_generators
    prompt, group = np.divmod(np.arange(n_rows), n_generators)
    names = [f"generator-{k:02d}" for k in range(n_generators)]
    generator = pa.DictionaryArray.from_arrays(pa.array(group.astype(np.int32)), names).cast(pa.string())
    source = pa.DictionaryArray.from_arrays(pa.array(group.astype(np.int32)), [f"{n}.jsonl" for n in names])
    tokens = np.ceil(draw.lognormal(5.3, 0.6, size=n_rows)).astype(np.int32)
    scored = draw.random(n_rows) >= 0.01
    loss = draw.lognormal(0, 0.3, size=n_prompts)[prompt] * draw.lognormal(0, 0.3, size=n_rows) * (1 + group / 50)
    reward = 8 + draw.standard_t(3, size=n_prompts)[prompt] + draw.standard_t(3, size=n_rows) + group / 20
    common = {
        "row_key": pa.array([f"{names[g]}.jsonl#{p}" for p, g in zip(prompt, group, strict=True)]),
        "source": source.cast(pa.string()),
        "row_index": pa.array(prompt),
        "prompt_id": pa.array([f"{p * 0x9E3779B97F4A7C15 % 2**64:032x}" for p in range(n_prompts)]).take(prompt),
        "generator": generator,
        "n_tokens": pa.array(tokens),
        "status": pa.array(np.where(scored, "ok", "empty")),
        "detail": pa.repeat(pa.scalar(""), n_rows),
    }
    base = common | {
        "base_model": pa.repeat(pa.scalar("base"), n_rows),
        "n_prompt_tokens": pa.array(np.full(n_rows, 40, np.int32)),
        "nll_sum": pa.array(loss * tokens, mask=~scored),
        "loss": pa.array(loss, mask=~scored),
    }
    rewards = common | {
        "reward_model": pa.repeat(pa.scalar("reward"), n_rows),
        "reward": pa.array(reward, mask=~scored),
    }
    with pq.ParquetWriter(path, SCORES_SCHEMA) as writer:
        for columns in (base, rewards):
            filled = [columns.get(field.name, pa.nulls(n_rows, field.type)) for field in SCORES_SCHEMA]
            table = pa.table(filled, schema=SCORES_SCHEMA)
            writer.write_table(table.take(draw.permutation(n_rows)) if shuffled and columns is rewards else table)


def measure(*, n_prompts: int, n_generators: int, draws: int, n_rounds: int, shuffled: bool) -> dict[str, Any]:
    """Medians over processes of their own; peaks are the highest."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "scores.parquet"
        write_scores(path, n_prompts=n_prompts, n_generators=n_generators, shuffled=shuffled)
        rounds = []
        for _ in range(n_rounds):
            done = subprocess.run(
                [sys.executable, "-c", _RANK, str(path), str(draws)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"the ranking failed:\n{done.stderr}")
            rounds.append(json.loads(done.stdout))
    seconds = {key: [round(one[key], 2) for one in rounds] for key in ("read_seconds", "rank_seconds")}
    peaks = {key: round(max(one[key] for one in rounds)) for key in ("table_mib", "read_peak_mib", "peak_mib")}
    return {
        "order_of_rewards": "another" if shuffled else "the base model's",
        **{key: statistics.median(values) for key, values in seconds.items()},
        "rank_seconds_of_rounds": seconds["rank_seconds"],
        **peaks,
        "generators_ranked": rounds[0]["generators_ranked"],
        "responses_ranked": rounds[0]["responses_ranked"],
    }


def main() -> None:
    """Measure both orders, write the result and print it; exit 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--generators", type=int, default=20)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    sizes = {"n_prompts": options.prompts, "n_generators": options.generators, "draws": options.draws}
    results = [measure(**sizes, n_rounds=options.rounds, shuffled=shuffled) for shuffled in (False, True)]
    report = {"machine": machine(), "load_before": round(load, 2), **sizes, "results": results}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ranking_scale.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for result in results:
        print(
            f"{result['responses_ranked']:,} responses, rewards in {result['order_of_rewards']} order: "
            f"{result['rank_seconds']:.1f} s after {result['read_seconds']:.1f} s of reading, "
            f"peak {result['peak_mib']:,} MiB ({result['read_peak_mib']:,} MiB before)"
        )
    if any(result["rank_seconds"] > MAX_SECONDS or result["peak_mib"] > MAX_MIB for result in results):
        raise SystemExit(f"over the limit of {MAX_SECONDS:g} s and {MAX_MIB:,} MiB")


if __name__ == "__main__":
    main()
