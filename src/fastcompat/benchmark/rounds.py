"""Loops in turn: a batch size for each that fits into memory, seconds round by round, and errors.

Dimension key: N sequences.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastcompat.benchmark.flops import product_rate
from fastcompat.benchmark.loops import Loop, Losses, Sequences
from fastcompat.scoring import MEMORY_SHARE, free_memory, out_of_memory


@dataclass(kw_only=True)
class LoopResult:
    """What one loop took, round by round, and how far its figures [N] are from float32, in their unit."""

    size: int
    unit: str
    all_seconds: list[float] = field(default_factory=list)
    largest_error: float = 0.0
    mean_error: float = 0.0

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.all_seconds)


@dataclass(kw_only=True)
class Rounds:
    """Every loop's result by name, or why it has none, and the product's rate in each round, FLOP/s."""

    results: dict[str, LoopResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    product_rates: list[float] = field(default_factory=list)


def run_in_turn(
    loops: Sequence[Loop],
    sequences: Sequences,
    exact: Losses,
    weight: Tensor,
    *,
    n_rounds: int,
    progress: Callable[[int, int, str], None],
) -> Rounds:
    """Every loop once a round, after the product with `weight`; `exact` [N] are the losses, or rewards, in float32."""
    rounds = Rounds()
    ready: dict[str, Loop] = {}
    n_runs, n_done = n_rounds * len(loops), 0
    for loop in loops:
        progress(0, n_runs, f"preparing {loop.title.format('...')}")
        try:
            size = choose_size(loop, sequences, weight.device)
        except MemoryError as error:
            rounds.failed[loop.title.format(min(loop.sizes))] = str(error)
        else:
            name = loop.title.format(size)
            ready[name], rounds.results[name] = loop, LoopResult(size=size, unit=loop.unit)
    for _ in range(n_rounds):
        rounds.product_rates.append(product_rate(weight))
        for name, loop in list(ready.items()):
            progress(n_done, n_runs, name)
            n_done += 1
            result = rounds.results[name]
            try:
                losses, seconds = timed(loop, sequences, result.size, weight.device)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                problem = "out of memory"
            else:
                errors = np.abs(losses - exact)
                n_missing = int((~np.isfinite(errors)).sum())
                problem = f"no finite figure for {n_missing} of {len(errors)} responses" if n_missing else ""
            if problem:
                rounds.failed[name] = problem
                del ready[name], rounds.results[name]
                continue
            result.all_seconds.append(seconds)
            result.largest_error = max(result.largest_error, float(errors.max()))
            result.mean_error = max(result.mean_error, float(errors.mean()))
    return rounds


def choose_size(loop: Loop, sequences: Sequences, device: torch.device) -> int:
    """The size of the loop's batches: of those that fit, the usual one on a CPU and the fastest on a GPU.

    Whatever a loop sets up in its first call is set up afterwards. Raises MemoryError where nothing fits.
    """
    fitting = fitting_sizes(loop, sequences, free_memory(device))
    if device.type != "cuda":
        shortest = min(sequences, key=lambda sequence: len(sequence.input_ids))
        loop.run([shortest], fitting[0])
        return fitting[0]
    return fastest_size(fitting, lambda size: timed(loop, sequences, size, device)[1])


def fastest_size(sizes: Sequence[int], seconds_of: Callable[[int], float]) -> int:
    """The fastest of ascending sizes that do not run out of memory; where all do, the half, quarter ... of the least.

    Raises MemoryError where even 1 does.
    """
    left = list(sizes)
    seconds: dict[int, float] = {}
    while left:
        size = left.pop(0)
        try:
            if not seconds:
                seconds_of(size)  # warms up
            seconds[size] = seconds_of(size) if left or seconds else 0.0  # nothing to compare with, no need to measure
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            # What is larger does not fit either.
            left = [size // 2] if size > 1 and not seconds else []
    if not seconds:
        raise MemoryError("out of memory even with batches of 1")
    return min(seconds, key=lambda size: seconds[size])


def fitting_sizes(loop: Loop, sequences: Sequences, free_bytes: int) -> list[int]:
    """Those of the loop's sizes that need at most `MEMORY_SHARE` of `free_bytes`, the usual one first.

    Where none does: the largest of its half, quarter ... that does. Raises MemoryError where not even 1 does.
    """

    def fits(size: int) -> bool:
        return loop.peak_bytes(sequences, size) <= MEMORY_SHARE * free_bytes

    fitting = [size for size in loop.sizes if fits(size)]
    size = min(loop.sizes)
    while not fitting and size > 1:
        size //= 2
        fitting = [size] if fits(size) else []
    if not fitting:
        raise MemoryError(
            f"needs {loop.peak_bytes(sequences, 1) / 2**30:.1f} GiB even with batches of 1 "
            f"({free_bytes / 2**30:.1f} GiB are free)"
        )
    return fitting


def timed(loop: Loop, sequences: Sequences, size: int, device: torch.device) -> tuple[Losses, float]:
    """What the loop computes [N], and the seconds until it was there."""
    synchronize(device)
    began = time.perf_counter()
    losses = loop.run(sequences, size)
    synchronize(device)
    return losses, time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
