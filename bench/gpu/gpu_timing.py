"""Times by the GPU's own clock, errors against float64, peak memory, and the machine's two ceilings.

A finding is a dictionary for JSON. Its `timings` are by name: the median `ms` over rounds in which every call runs
once, and rates. On the device "cpu" every call runs once, only to be tried.

Dimension key: S scored tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fastcompat.ops import reference

Finding = dict[str, Any]
Calls = dict[str, Callable[[], Any]]

ROUNDS = 15
LARGER_THAN_L2 = 256 * 2**20
STATISTICS = ("nll", "entropy", "varentropy", "rank", "collision")
COPY = "device copy"
TOP = 14  # kernels of a table


@cache
def _flushed(device: str) -> Tensor:
    return torch.empty(LARGER_THAN_L2, dtype=torch.uint8, device=device)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """One call, from a cold cache.

    The GPU is kept busy while the call's kernels are queued, so that the time to launch them is not counted.
    """
    if device == "cpu":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flushed(device).zero_()
    torch.cuda._sleep(2_000_000)  # about a millisecond
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


@torch.no_grad()
def in_turn(calls: Calls, device: str, *, rounds: int = ROUNDS) -> dict[str, Finding]:
    """Median milliseconds of each call; one that raises says so and leaves the others alone."""
    rounds = 1 if device == "cpu" else rounds
    timings: dict[str, Finding] = {}
    for name, call in calls.items():
        try:
            for _ in range(1 if device == "cpu" else 3):
                milliseconds(call, device)
            timings[name] = {"rounds": []}
        except Exception as error:  # a peer of another version, or no memory for it
            timings[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    ready = [name for name in calls if "rounds" in timings[name]]
    for _, name in itertools.product(range(rounds), ready):
        timings[name]["rounds"].append(milliseconds(calls[name], device))
    for name in ready:
        timings[name] = {"ms": statistics.median(timings[name]["rounds"]), **timings[name]}
    return timings


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """Memory that a call takes beyond its arguments."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def off_by(got: Tensor, logits: Tensor, target: Tensor) -> dict[str, float]:
    """got [1 or 5, S] against float64 logits [S, V]: largest error of each statistic, root mean square of the nll's."""
    want = reference.token_statistics(logits, target)
    errors = {
        name: float((row.double() - want[name].double()).abs().max())
        for name, row in zip(STATISTICS, got, strict=False)
    }
    return errors | {"nll_rms": float((got[0].double() - want["nll"]).square().mean().sqrt())}


def with_bandwidth(timings: dict[str, Finding], logits: Tensor) -> None:
    """Add TB/s over one read of the logits (a copy's read and write), and the share of the copy's."""
    terabytes = 1e-12 * logits.numel() * logits.element_size()
    copy = timings[COPY]
    for name, timing in timings.items():
        if "ms" in timing:
            timing["TB/s"] = (2 if name == COPY else 1) * terabytes / (1e-3 * timing["ms"])
            if "TB/s" in copy:
                timing["of the copy's bandwidth"] = timing["TB/s"] / copy["TB/s"]


def hardware(device: str) -> Iterator[Finding]:
    """The machine as the CPU benchmarks record it, the GPU, and the two ceilings that every figure is held against."""
    try:
        from fastcompat.benchmark.machine import machine

        yield {"machine": machine()}
    except Exception as error:  # a package without metadata, a system without /proc: the timings stand without it
        yield {"machine": None, "reason": f"{type(error).__name__}: {error}"}
    yield {"gpu": gpu(device)}
    yield ceilings(device)


def gpu(device: str) -> Finding:
    """What the CPU benchmarks do not record."""
    versions: dict[str, str | None] = dict.fromkeys(("triton", "liger_kernel", "flash_attn", "pytest", "pyarrow"))
    for name in versions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: Finding = {"cuda": torch.version.cuda, "hip": torch.version.hip, "versions": versions}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    if device != "cpu" and shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return found


@torch.no_grad()
def ceilings(device: str) -> Finding:
    """A large bf16 product and a large copy, as this machine does them."""
    size, n_bytes = (64, 4096) if device == "cpu" else (8192, 2**31)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randint(255, (n_bytes,), dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    timings = in_turn({"product": lambda: a @ b, COPY: partial(copied.copy_, source)}, device)
    timings["product"]["TFLOP/s"] = 2e-12 * size**3 / (1e-3 * timings["product"]["ms"])
    with_bandwidth({COPY: timings[COPY]}, source)
    return {"case": f"ceilings: {size}^3 in bf16, {n_bytes} bytes", "timings": timings}


def busy(events: list[tuple[str, float, float]]) -> dict[str, float]:
    """Of kernels (name, begin, end): the share of the time from first to last in which none runs, and who runs."""
    if not events:
        return {}
    begin, end = min(event[1] for event in events), max(event[2] for event in events)
    covered, reached = 0.0, begin
    for _, start, stop in sorted(events, key=lambda event: event[1]):
        covered += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    total = max(end - begin, 1e-9)
    shares = {"no kernel runs": 1 - covered / total}
    for kernel in ("_range_kernel", "_attention_kernel", "_gated_kernel", "_rms_norm_kernel"):
        spent = sum(stop - start for name, start, stop in events if kernel in name)
        shares[f"share of {kernel}"] = spent / total
    return shares


def kernel_table(events: list[tuple[str, float, float]]) -> list[str]:
    """A line a kernel: share, milliseconds, calls, name."""
    spent, calls = Counter[str](), Counter[str]()
    for name, start, stop in events:
        spent[name] += stop - start
        calls[name] += 1
    total = max(sum(spent.values()), 1e-9)
    return [
        f"{us / total:6.1%} {us / 1e3:9.3f} ms {calls[name]:5d} x {name[:90]}" for name, us in spent.most_common(TOP)
    ]
