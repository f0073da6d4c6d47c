"""Claims on units that only take time: how much dealing them out costs, and how near the ideal it comes.

    python bench/claims.py

The real `Claims` and `ClaimedUnits` on a disk, under workers that sleep in place of a forward pass and commit empty
parts. Dealing: a worker on a machine of its own, so the makespans are of threads that sleep, except where a worker is
killed. Writes bench/results/claims.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcompat.benchmark.machine import machine
from fastcompat.scoring.claimed_units import ClaimedUnits
from fastcompat.scoring.pipeline import Stopwatch, prefetch
from fastcompat.store import Claims, Unit
from fastcompat.store.places import Disk

RESULT = Path(__file__).parent / "results" / "claims.json"


class Shared:
    """Units, how long each takes, and a folder of parts, as a worker sees them."""

    def __init__(self, directory: Path, seconds: Sequence[float]) -> None:
        self.place = Disk(directory)
        self.place.make()
        self.units = [Unit(shard=k // 100, group=k % 100, n_rows=1) for k in range(len(seconds))]
        self.seconds = dict(zip(self.units, seconds, strict=True))
        self.computed: Counter[str] = Counter()
        self.lock = threading.Lock()

    def pending(self, asked: Sequence[Unit]) -> set[Unit]:
        if len(asked) == 1:
            return set() if self.place.has(part(asked[0])) else set(asked)
        names = self.place.names()
        return {unit for unit in asked if part(unit) not in names}

    def work(self, *, speed: float = 1.0, waited: Stopwatch | None = None) -> None:
        """What a worker does, with one unit ahead as the loop has it."""
        by_name = {unit.name: unit for unit in self.units}
        with Claims(self.place / "claims", is_done=lambda name: not self.pending([by_name[name]])) as claims:
            source = ClaimedUnits(
                units=self.units, claims=claims, pending=self.pending, seen=lambda units: None, stop=lambda: False
            )
            for unit in prefetch(lambda unit: unit, source, ahead=1, waited=waited or Stopwatch()):
                if unit is None or self.place.has(part(unit)):
                    continue
                time.sleep(self.seconds[unit] / speed)
                self.place.put_new(part(unit), b"", lasting=False)
                with self.lock:
                    self.computed[unit.name] += 1


def part(unit: Unit) -> str:
    return f"part-{unit.name}"


def in_threads(workers: Sequence[Callable[[], None]]) -> float:
    """Seconds until all of them have ended."""
    threads = [threading.Thread(target=worker) for worker in workers]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - began


def lognormal(n: int, mean: float, draw: random.Random) -> list[float]:
    """Seconds of units that differ as real ones do: sigma 0.5 of the logarithm."""
    return [mean * draw.lognormvariate(-0.125, 0.5) for _ in range(n)]


def overhead(directory: Path, n_units: int) -> dict[str, Any]:
    """Of one worker whose units take no time: all that it does is to deal."""
    shared = Shared(directory, [0.0] * n_units)
    began, processor = time.monotonic(), time.process_time()
    shared.work()
    return {
        "units": n_units,
        "ms_a_unit": round(1e3 * (time.monotonic() - began) / n_units, 3),
        "processor_ms_a_unit": round(1e3 * (time.process_time() - processor) / n_units, 3),
    }


def waiting(directory: Path, n_units: int, seconds: float) -> dict[str, Any]:
    """How much of its time one worker waits for units that take so many seconds each."""
    shared, waited = Shared(directory, [seconds] * n_units), Stopwatch()
    shared.work(waited=waited)
    return {"units": n_units, "seconds_a_unit": seconds, "waited_ms_a_unit": round(1e3 * waited.seconds / n_units, 3)}


def makespan(
    directory: Path, n_workers: int, units_each: int, mean: float, draw: random.Random, *, slow: int = 0
) -> dict[str, Any]:
    """Against the ideal, in which all of them end together, and against fixed shares. slow: of the workers, at half
    speed."""
    seconds = lognormal(n_workers * units_each, mean, draw)
    speeds = [0.5] * slow + [1.0] * (n_workers - slow)
    shared = Shared(directory, seconds)
    took = in_threads([lambda speed=speed: shared.work(speed=speed) for speed in speeds])  # type: ignore[misc]
    ideal = sum(seconds) / sum(speeds)
    fixed = max(sum(seconds[k::n_workers]) / speeds[k] for k in range(n_workers))
    return {
        "workers": n_workers,
        "of_them_at_half_speed": slow,
        "units": len(seconds),
        "mean_seconds_a_unit": mean,
        "claims_over_ideal": round(took / ideal, 3),
        "fixed_shares_over_ideal": round(fixed / ideal, 3),
        "units_computed_twice": sum(n - 1 for n in shared.computed.values()),
    }


def one_dies(directory: Path, n_workers: int, units_each: int, mean: float, draw: random.Random) -> dict[str, Any]:
    """One of the workers is killed when a fifth of the work is done, and not replaced."""
    seconds = lognormal(n_workers * units_each, mean, draw)
    shared = Shared(directory, seconds)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=shared.work) for _ in range(n_workers)]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    while len(shared.place.names()) < len(seconds) / 5:
        time.sleep(0.02)
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    before = time.monotonic() - began
    for worker in workers:
        worker.join()
    took = time.monotonic() - began
    ideal = before + (sum(seconds) - n_workers * before) / (n_workers - 1)
    return {
        "workers": n_workers,
        "units": len(seconds),
        "mean_seconds_a_unit": mean,
        "claims_over_ideal": round(took / ideal, 3),
        "units_done": len(shared.place.names()),
    }


def small_runs(directory: Path, n_runs: int, draw: random.Random) -> dict[str, Any]:
    """Many runs with few units: does any of them hang, and how long does each take for its work?"""
    ratios = []
    for k in range(n_runs):
        n_workers = draw.randint(2, 8)
        seconds = lognormal(draw.randint(1, 4 * n_workers), 0.2, draw)
        shared = Shared(directory / str(k), seconds)
        took = in_threads([shared.work] * n_workers)
        # The longest unit is the least that any dealing takes, and the worker that has it may hold one more.
        ratios.append(took / max(sum(seconds) / n_workers, max(seconds)))
        assert len(shared.place.names()) == len(seconds)
    return {"runs": n_runs, "median_over_ideal": round(statistics.median(ratios), 2), "worst": round(max(ratios), 2)}


def main() -> None:
    """Measure all of it, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        result = {
            "overhead": overhead(directory / "overhead", 2000),
            "waiting": waiting(directory / "waiting", 10, 1.0),
            "makespan": [
                makespan(directory / "even", 8, 125, 0.2, draw),
                makespan(directory / "slow", 8, 100, 0.2, draw, slow=1),
                makespan(directory / "64", 64, 50, 2.0, draw),
                makespan(directory / "64 slow", 64, 50, 2.0, draw, slow=6),
                makespan(directory / "256", 256, 20, 8.0, draw),
            ],
            "one_dies": one_dies(directory / "dies", 8, 100, 0.2, draw),
            "small_runs": small_runs(directory / "small", 100, draw),
        }
    options.out.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
