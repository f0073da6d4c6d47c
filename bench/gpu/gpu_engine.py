"""The whole scorer on a GPU beside the loops that everybody writes, in one process and in turn.

As `end_to_end.py` does on a CPU, but for what costs too many seconds here: losses are held against float32 for the
first prompts only, batches are padded in one size, and a loop warms up on a few responses.

Dimension key: N sequences.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from gpu_models import register
from gpu_timing import Finding

from fastcompat.benchmark.flops import product_rate, up_projection, useful_flops
from fastcompat.benchmark.loops import Loop, Losses, Sequences, fastcompat_loop, length_sorted, packed_loop, padded
from fastcompat.benchmark.measurement import Problem, check_losses, plain_losses, release
from fastcompat.benchmark.rounds import timed
from fastcompat.benchmark.subjects import Subject, shape_subject
from fastcompat.errors import FastcompatError
from fastcompat.models import CausalLM, wrap
from fastcompat.scoring import choose_token_budget, free_memory

ROUNDS = 2
PADDED = 16
# Dense bf16 of an H100 and an H200, by their datasheet.
PEAK_FLOPS = 989e12
# Prompts whose losses are compared with float32, and sequences of a warm-up.
CHECKED_PROMPTS, WARM_UP = 2, 32


def qwen2_5_0_5b(device: str) -> Iterator[Finding]:
    yield from beside_hugging_face("Qwen2.5-0.5B", device, n_prompts=96)


def llama_3_1_8b(device: str) -> Iterator[Finding]:
    yield from beside_hugging_face("Llama-3.1-8B", device, n_prompts=16)


def llama_3_2_3b(device: str) -> Iterator[Finding]:
    yield from beside_hugging_face("Llama-3.2-3B", device, n_prompts=24)


@torch.no_grad()
def beside_hugging_face(
    shape: str, device: str, *, n_prompts: int, workload: str = "generators", rounds: int = ROUNDS
) -> Iterator[Finding]:
    """Seconds, tokens a second and shares of the card's rates; losses against float32."""
    register()
    if device == "cpu":
        shape, n_prompts, rounds = "tiny", 1, 1
    subject = shape_subject(shape, device=device, dtype="bfloat16")
    problem = Problem.create(subject, workload, n_prompts)
    n_checked = min(CHECKED_PROMPTS, n_prompts) * len(problem.sequences) // n_prompts
    case = f"{shape}: {n_checked} responses in float32 beside the plain model"
    exact = np.full(n_checked, np.nan)
    try:
        exact, check_nats = _float32_losses(subject, problem.sequences[:n_checked])
    except (FastcompatError, RuntimeError) as error:  # the speeds stand, with what is wrong beside them
        yield {"case": case, "problem": f"{type(error).__name__}: {error}"[:500]}
    else:
        yield {"case": case, "figures": {"fastcompat": {"nats apart at most": check_nats}}}
    release()
    full, ours = subject.plain(), subject.load_ours()
    budget = choose_token_budget(subject.device, subject.config, subject.dtype, free_memory(subject.device))
    loops = {
        "padded": replace(padded(full), sizes=(PADDED,)),
        "length-sorted": length_sorted(full),
        "fastcompat": fastcompat_loop(ours, token_budget=budget),
    }
    weight = up_projection(full)
    needed = useful_flops(ours, problem.packs(ours, 1 << 40))
    packed_tokens = sum(pack.n_tokens for pack in problem.packs(ours, budget))
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    off: dict[str, float] = {}
    rates = []
    for number in range(-1, rounds):  # the first only warms up
        rates.append(product_rate(weight))
        for name, loop in loops.items():
            if name in failed:
                continue
            try:
                losses, spent = _run(loop, problem.sequences, subject.device, warm_up=number < 0)
            except (RuntimeError, MemoryError) as error:  # out of memory, mostly: the others go on
                failed[name] = f"{type(error).__name__}: {error}"[:300]
                release()
                continue
            if number >= 0:
                seconds.setdefault(name, []).append(spent)
                off[name] = float(np.abs(losses[:n_checked] - exact).max())
    product = statistics.median(rates)
    timings: dict[str, Finding] = {name: {"failed": why} for name, why in failed.items()}
    figures: dict[str, Finding] = {}
    for name, all_seconds in seconds.items():
        if name in failed:
            continue
        usual = statistics.median(all_seconds)
        timings[name] = {"ms": 1e3 * usual, "rounds": all_seconds, "TFLOP/s": needed / usual / 1e12}
        timings[name]["of the product's rate"] = needed / usual / product
        figures[name] = {"MFU": needed / usual / PEAK_FLOPS, "tokens/s": problem.n_tokens / usual}
        figures[name]["nats off float32 at most"] = off[name]
    if "fastcompat" in figures:
        ms = timings["fastcompat"]["ms"]
        figures["fastcompat"]["packed tokens/s"] = packed_tokens / (1e-3 * ms)
        for name in ("padded", "length-sorted"):
            if "ms" in timings.get(name, {}):
                figures["fastcompat"][f"times {name}"] = timings[name]["ms"] / ms
    yield {
        "case": f"{shape}, {problem.described()}, {packed_tokens} packed, budget {budget}, product "
        f"{product / 1e12:.0f} TFLOP/s",
        "timings": timings,
        "figures": figures,
        "useful_tflop": needed / 1e12,
        "product_tflop_per_s": [rate / 1e12 for rate in rates],
    }


def _run(loop: Loop, sequences: Sequences, device: torch.device, *, warm_up: bool) -> tuple[Losses, float]:
    return timed(loop, sequences[:WARM_UP] if warm_up else sequences, loop.sizes[0], device)


def _float32_losses(subject: Subject[CausalLM], sequences: Sequences) -> tuple[Losses, float]:
    """[N] of fastcompat in float32, and how far the plain model's are apart. Raises WrongLossError where it is far."""
    model = subject.float32()
    plain = plain_losses(model, sequences)
    ours: CausalLM = wrap(subject.name, model)
    losses = packed_loop(ours, sequences, 1 << 14)
    return losses, check_losses(subject.name, losses, plain)
