"""The whole scorer on a GPU beside the loops that everybody writes, in one process and in turn.

As `end_to_end.py` does on a CPU, but for what costs too many seconds here: losses are held against float32 for the
first prompts only, batches are padded in one size, and a loop warms up on a few responses.

Dimension key: N sequences.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from gpu_models import register
from gpu_timing import Finding

from fastcompat.benchmark.flops import product_rate, up_projection, useful_flops
from fastcompat.benchmark.loops import Loop, Losses, Sequences, fastcompat_loop, length_sorted, packed_loop, padded
from fastcompat.benchmark.measurement import Problem, check_losses, plain_losses, release
from fastcompat.benchmark.rounds import timed
from fastcompat.benchmark.subjects import Subject, shape_subject
from fastcompat.benchmark.table import MARKED_NATS
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
    case = f"{shape}, {problem.described()}, {packed_tokens} packed, budget {budget}"
    measured = _Measured(n_tokens=problem.n_tokens, packed_tokens=packed_tokens, useful_flops=needed)
    for number in range(-1, rounds):  # the first only warms up
        measured.product_rates.append(product_rate(weight))
        for name, loop in loops.items():
            if name in measured.failed:
                continue
            try:
                losses, spent = _run(loop, problem.sequences, subject.device, warm_up=number < 0)
            except (RuntimeError, MemoryError) as error:  # out of memory, mostly: the others go on
                measured.failed[name] = f"{type(error).__name__}: {error}"[:300]
                release()
                continue
            if number >= 0:
                measured.seconds.setdefault(name, []).append(spent)
                measured.off[name] = float(np.abs(losses[:n_checked] - exact).max())
        if number >= 0:
            yield {"case": case} | measured.finding()


@dataclass(kw_only=True)
class _Measured:
    """What there is after some rounds, by loop."""

    n_tokens: int
    packed_tokens: int
    useful_flops: float
    product_rates: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)  # nats from float32 at most

    def finding(self) -> Finding:
        product = statistics.median(self.product_rates)
        timings: dict[str, Finding] = {name: {"failed": why} for name, why in self.failed.items()}
        figures: dict[str, Finding] = {"product": {"TFLOP/s": product / 1e12}}
        for name, all_seconds in self.seconds.items():
            if name in self.failed:
                continue
            usual = statistics.median(all_seconds)
            rate = self.useful_flops / usual
            timings[name] = {"ms": 1e3 * usual, "rounds": all_seconds, "TFLOP/s": rate / 1e12}
            timings[name]["of the product's rate"] = rate / product
            figures[name] = {"MFU": rate / PEAK_FLOPS, "tokens/s": self.n_tokens / usual}
            figures[name]["nats off float32 at most"] = self.off[name]
        found: Finding = {"timings": timings, "figures": figures, "useful_tflop": self.useful_flops / 1e12}
        found["product_tflop_per_s"] = [rate / 1e12 for rate in self.product_rates]
        if "fastcompat" in figures:
            ms = timings["fastcompat"]["ms"]
            figures["fastcompat"]["packed tokens/s"] = self.packed_tokens / (1e-3 * ms)
            for name in ("padded", "length-sorted"):
                if "ms" in timings.get(name, {}):
                    figures["fastcompat"][f"times {name}"] = timings[name]["ms"] / ms
            if self.off["fastcompat"] > MARKED_NATS:
                found["problem"] = f"losses are {self.off['fastcompat']:.2g} nats off float32"
        return found


def _run(loop: Loop, sequences: Sequences, device: torch.device, *, warm_up: bool) -> tuple[Losses, float]:
    return timed(loop, sequences[:WARM_UP] if warm_up else sequences, loop.sizes[0], device)


def _float32_losses(subject: Subject[CausalLM], sequences: Sequences) -> tuple[Losses, float]:
    """[N] of fastcompat in float32, and how far the plain model's are apart. Raises WrongLossError where it is far."""
    model = subject.float32()
    plain = plain_losses(model, sequences)
    ours: CausalLM = wrap(subject.name, model)
    losses = packed_loop(ours, sequences, 1 << 14)
    return losses, check_losses(subject.name, losses, plain)
