"""Full packs through a model whose weights are made on the card: where the time and the memory go.

Dimension key: T packed tokens.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import torch
from gpu_models import register
from gpu_timing import Finding, busy, kernel_table

from fastcompat.benchmark.measurement import release
from fastcompat.benchmark.rounds import synchronize
from fastcompat.benchmark.subjects import random_model
from fastcompat.benchmark.workloads import WORKLOADS
from fastcompat.models import CausalLM, wrap
from fastcompat.scoring import ResponseScores, choose_token_budget, free_memory, pack_sequences, score_sequences

ROUNDS = 3
N_PACKS = 3
FEW_TOKENS = 300
# Tokens of the workload's prompt with its 16 responses, roughly.
PROMPT_TOKENS = 3900


def qwen2_5_0_5b(device: str) -> Iterator[Finding]:
    yield from profile("Qwen2.5-0.5B", device)


def llama_3_1_8b(device: str) -> Iterator[Finding]:
    yield from profile("Llama-3.1-8B", device)


def profile(shape: str, device: str) -> Iterator[Finding]:
    """Seconds to load and fuse, what is not fused; a full pack and a small one; kernels, gaps, memory."""
    register()
    shape = shape if device != "cpu" else "tiny, experts" if "A3B" in shape else "tiny"
    place = torch.device(device)
    began = time.perf_counter()
    full = random_model(shape, device=place)
    synchronize(place)
    made = time.perf_counter()
    before = _memory(place)
    model = wrap(shape, full)
    synchronize(place)
    fused = time.perf_counter()
    after = _memory(place)
    yield {
        "case": f"{shape}: loaded and fused",
        "figures": {
            "weights made on the card": {"s": made - began, **before},
            "fused": {"s": fused - made, **after},
            **{
                fusion.part: {"fused": f"{fusion.n_fused} of {fusion.n_modules}"}
                | ({"kept as it is": fusion.why} if fusion.why else {})
                for fusion in model.fusions
            },
        },
    }
    release()
    # As many whole packs as are measured, one after the other as the engine queues them.
    budget = 2000 if device == "cpu" else choose_token_budget(place, full.config, model.dtype, free_memory(place))
    n_packs = 1 if device == "cpu" else N_PACKS
    drawn = WORKLOADS["generators"].sequences(
        model.vocabulary, n_prompts=1 + int((n_packs + 1.5) * budget / PROMPT_TOKENS)
    )
    packs = pack_sequences(model, ResponseScores(drawn), token_budget=budget)
    packs = sorted(packs, key=lambda pack: pack.n_tokens)[-n_packs:]
    chosen = [drawn[n] for pack in packs for n in pack.sequences]
    n_tokens = sum(pack.n_tokens for pack in packs)
    run = partial(score_sequences, model, chosen, token_budget=budget)
    _reset_peak(place)
    resident = _memory(place)
    first, *seconds = (_seconds(run, place) for _ in range(1 if device == "cpu" else 1 + ROUNDS))
    memory = _memory(place)
    peak = memory.get("peak GiB", 0.0) - resident.get("allocated GiB", 0.0)
    span, kernels = _kernels(run, place, n_packs)
    yield {
        "case": f"{shape}: {n_packs} packs of {n_tokens / n_packs:.0f} tokens each, budget {budget}",
        "figures": {
            "fastcompat": {"packed tokens/s": n_tokens / span},
            "with packing": {"s": statistics.median(seconds or [first]), "first s": first},
            "one pack": {"peak GiB beside the weights": peak, **memory},
        },
        "all_seconds": seconds,
    }
    yield {"case": f"{shape}: their kernels, from the first to the last {1e3 * span:.1f} ms", **kernels}
    few = _few(model, place)
    yield {"case": f"{shape}: a small pack", "figures": {f"{FEW_TOKENS} tokens": {"ms": 1e3 * few}}}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def _few(model: CausalLM, device: torch.device) -> float:
    """Seconds of a pass that only launches: median."""
    sequences = WORKLOADS["unshared"].sequences(model.vocabulary, n_prompts=1, context_length=FEW_TOKENS)
    run = partial(score_sequences, model, sequences, token_budget=1 << 20)
    run()
    return statistics.median(_seconds(run, device) for _ in range(1 if device.type == "cpu" else 10))


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    read = {
        "allocated GiB": torch.cuda.memory_allocated,
        "reserved GiB": torch.cuda.memory_reserved,
        "peak GiB": torch.cuda.max_memory_allocated,
    }
    return {name: function() / 2**30 for name, function in read.items()}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _kernels(run: Callable[[], object], device: torch.device, n_packs: int) -> tuple[float, Finding]:
    """Seconds from the first kernel to the last; who takes them, when none runs, and how often the host waits."""
    reads = _host_reads(run, device)
    on_gpu = device.type == "cuda"
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as profiler:
        run()
        synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted
    ]
    if not events:
        return float("nan"), {"problem": "the profiler saw no kernel"}
    span = 1e-6 * (max(end for _, _, end in events) - min(begin for _, begin, _ in events))
    figures = {"one pack": {**busy(events), "host reads": reads / n_packs}}
    return span, {"figures": figures, "kernels": kernel_table(events)}


def _host_reads(run: Callable[[], object], device: torch.device) -> int:
    """How often a pass waits for the GPU, as torch tells it."""
    if device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with suppress(RuntimeError):
        torch.cuda.synchronize()
    return sum("synchroniz" in str(warning.message) for warning in caught)
