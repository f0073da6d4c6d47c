"""One model, its workloads and all loops: seconds, efficiency, and how far each one's losses are from float32.

Efficiency is useful FLOP/s over the rate of a plain matrix product of the model's own shape, measured in the same run
(`flops.py`). Losses in float32 are fastcompat's, held against the plain model's for a few sequences.

Dimension key: N sequences.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompat.benchmark.flops import data_sheet_rate, product_rate, up_projection, useful_flops
from fastcompat.benchmark.loops import PLAIN_LOOPS, Loop, Losses, Sequences, fastcompat_loop, logits_bytes, packed_loop
from fastcompat.benchmark.machine import machine
from fastcompat.benchmark.rounds import LoopResult, run_in_turn
from fastcompat.benchmark.subjects import Subject
from fastcompat.benchmark.workloads import GPU_PROMPTS, WORKLOADS
from fastcompat.errors import FastcompatError
from fastcompat.models import CausalLM, largest, model_lengths, wrap
from fastcompat.ops import exact_products
from fastcompat.scoring import ResponseScores, choose_token_budget, free_memory, pack_sequences
from fastcompat.tokens import PrefixForest
from fastcompat.wording import counted_noun

# Sequences whose float32 loss the plain model computes too, and how far apart, in nats, the two may be.
CHECKED_SEQUENCES = 4
CHECK_TOLERANCE = 1e-3

# For the estimate beforehand: likely shares of the product's rate, and what float32 costs over bf16.
LIKELY_EFFICIENCY, LIKELY_EFFICIENCY_OF_LOOPS = 0.8, 0.33
LIKELY_FLOAT32_COST = 5.0


class WrongLossError(FastcompatError):
    """fastcompat and the plain model disagree in float32: no figure of the run is worth anything."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A workload as token sequences [N] for one model."""

    workload: str
    n_prompts: int
    n_cut: int  # sequences that the model's context cut
    sequences: Sequences

    @classmethod
    def create(
        cls, subject: Subject[Any], workload: str, n_prompts: int | None, *, vocabulary: int | None = None
    ) -> Problem:
        """n_prompts None: the workload's own, more on a GPU. Ids are below `vocabulary`; None: the model's."""
        n_prompts = n_prompts or WORKLOADS[workload].n_prompts * (GPU_PROMPTS if subject.device.type == "cuda" else 1)
        vocabulary = vocabulary or largest(subject.config, "vocab_size")
        assert vocabulary is not None, "a model whose configuration names no vocabulary"
        context_length, _ = model_lengths(subject.config)
        draw = WORKLOADS[workload].sequences
        sequences = draw(vocabulary, n_prompts=n_prompts, context_length=context_length)
        whole = draw(vocabulary, n_prompts=n_prompts)
        n_cut = sum(len(a.input_ids) < len(b.input_ids) for a, b in zip(sequences, whole, strict=True))
        return cls(workload=workload, n_prompts=n_prompts, n_cut=n_cut, sequences=sequences)

    @property
    def n_tokens(self) -> int:
        """Of all sequences, shared beginnings counted in each."""
        return sum(len(sequence.input_ids) for sequence in self.sequences)

    def packs(self, model: CausalLM, token_budget: int) -> list[PrefixForest]:
        """As fastcompat lays them out."""
        return pack_sequences(model, ResponseScores(self.sequences), token_budget=token_budget)

    def described(self) -> str:
        """What is scored, in one line."""
        cut = f"; {self.n_cut} of them cut to the model's context" if self.n_cut else ""
        return (
            f"{self.workload}: {counted_noun(len(self.sequences), 'response')} to "
            f"{counted_noun(self.n_prompts, 'prompt')}, {self.n_tokens:,} tokens{cut}"
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model and workload, every loop."""

    subject: Subject[CausalLM]
    problem: Problem
    token_budget: int
    useful_flops: float
    product_rate: float  # FLOP/s
    packing_seconds: float  # of fastcompat's, before its first forward pass
    check_nats: float  # largest difference from the plain model in float32
    loops: Mapping[str, LoopResult]
    failed: Mapping[str, str]  # the loops without a figure, and why

    def efficiency(self, loop: LoopResult) -> float:
        """The loop's useful FLOP/s over the product's rate."""
        return self.useful_flops / loop.seconds / self.product_rate

    @property
    def data_sheet_rate(self) -> float | None:
        """FLOP/s that the device's data sheet promises, where it is known."""
        return data_sheet_rate(self.subject.device, self.subject.dtype)

    def tokens_per_second(self, loop: LoopResult) -> float:
        """Of the workload's tokens, shared beginnings counted in every sequence."""
        return self.problem.n_tokens / loop.seconds

    def speedup(self, loop: LoopResult) -> float | None:
        """How many times as long as fastcompat the loop takes; None where fastcompat has no figure."""
        ours = self.loops.get("fastcompat")
        return loop.seconds / ours.seconds if ours else None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "shape": self.subject.name,
            "weights": self.subject.weights,
            "workload": self.problem.workload,
            "dtype": str(self.subject.dtype).removeprefix("torch."),
            "token_budget": self.token_budget,
            "n_prompts": self.problem.n_prompts,
            "n_sequences": len(self.problem.sequences),
            "n_cut": self.problem.n_cut,
            "n_tokens": self.problem.n_tokens,
            "useful_gflop": self.useful_flops / 1e9,
            "product_gflop_per_s": self.product_rate / 1e9,
            "data_sheet_gflop_per_s": None if self.data_sheet_rate is None else self.data_sheet_rate / 1e9,
            "packing_seconds": self.packing_seconds,
            "float32_check_nats": self.check_nats,
            "scorers": {
                name: {
                    "seconds": loop.seconds,
                    "all_seconds": loop.all_seconds,
                    "tokens_per_second": self.tokens_per_second(loop),
                    "efficiency": self.efficiency(loop),
                    "fastcompat_speedup": self.speedup(loop),
                    "largest_error_nats": loop.largest_error,
                    "mean_error_nats": loop.mean_error,
                    "batch_size": loop.size,
                    "batch_unit": loop.unit,
                }
                for name, loop in self.loops.items()
            },
            "failed": dict(self.failed),
            "machine": machine(self.subject.device),
        }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how.

    loops: what makes those beside fastcompat's, from the transformers model. tell: takes what is about to be done, line
    by line. progress: takes runs done, runs in all, and what is at hand.
    """

    workloads: Sequence[str] = ("generators",)
    rounds: int = 3
    token_budget: int | None = None  # fastcompat's; None: as for `fastcompat score`
    n_prompts: int | None = None
    loops: Sequence[Callable[[Any], Loop]] = PLAIN_LOOPS
    tell: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int, str], None] = lambda done, total, name: None


@torch.no_grad()
def measure(subject: Subject[CausalLM], settings: Settings) -> Iterator[Measurement]:
    """Each workload in turn. Raises WrongLossError where fastcompat's float32 losses are not those of the plain model.

    Losses in float32 come first, for all workloads, so that this copy of the model is gone before the others come.
    """
    subject.refuse_too_large()
    if subject.weights != "random":
        subject.load_ours()  # refused here, in one sentence, and not where a loop breaks on it
        release()
    problems = [Problem.create(subject, workload, settings.n_prompts) for workload in settings.workloads]
    for problem in problems:
        settings.tell(problem.described())
    model = subject.float32()
    token_budget = settings.token_budget or choose_token_budget(
        subject.device, subject.config, subject.dtype, free_memory(subject.device)
    )
    weight = up_projection(model).to(subject.dtype, copy=True)
    references = _references(subject, problems, model, weight, token_budget, settings)
    del model
    release()
    full, ours = subject.plain(), subject.load_ours()
    loops = [*(make(full) for make in settings.loops), fastcompat_loop(ours, token_budget=token_budget)]
    for problem, reference in zip(problems, references, strict=True):
        rounds = run_in_turn(
            loops, problem.sequences, reference.losses, weight, n_rounds=settings.rounds, progress=settings.progress
        )
        began = time.perf_counter()
        problem.packs(ours, token_budget)
        yield Measurement(
            subject=subject,
            problem=problem,
            token_budget=token_budget,
            useful_flops=reference.useful_flops,
            product_rate=statistics.median(rounds.product_rates),
            packing_seconds=time.perf_counter() - began,
            check_nats=reference.check_nats,
            loops=rounds.results,
            failed=rounds.failed,
        )


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """What a problem's losses [N] are in float32, and what they need at least."""

    losses: Losses
    check_nats: float
    useful_flops: float


def _references(
    subject: Subject[CausalLM],
    problems: Sequence[Problem],
    model: Any,
    weight: Tensor,
    token_budget: int,
    settings: Settings,
) -> list[_Reference]:
    """In float32. model: the transformers model, whose own losses are computed before fastcompat takes it over."""
    plain = [plain_losses(model, problem.sequences) for problem in problems]
    ours = wrap(subject.name, model)
    forests = [problem.packs(ours, 1 << 40) for problem in problems]
    flops = [useful_flops(ours, distinct) for distinct in forests]
    repetitions = [
        problem.n_tokens / sum(forest.n_tokens for forest in distinct)
        for problem, distinct in zip(problems, forests, strict=True)
    ]
    likely = _likely_time(flops, repetitions, product_rate(weight), settings)
    settings.tell(f"losses in float32, then {settings.rounds} rounds of {len(settings.loops) + 1} scorers: {likely}")
    references = []
    for k, problem in enumerate(problems):
        losses = packed_loop(ours, problem.sequences, token_budget)
        check_nats = check_losses(subject.name, losses, plain[k])
        references.append(_Reference(losses=losses, check_nats=check_nats, useful_flops=flops[k]))
    return references


def plain_losses(model: Any, sequences: Sequences) -> dict[int, float]:
    """By index, the mean NLL of a few sequences, short to long, from a transformers model's own logits, each alone."""
    # An eighth of the memory: it is what this pass takes beside a model of which little else is known.
    room = free_memory(model.device) / 8
    order = sorted(range(len(sequences)), key=lambda n: len(sequences[n].input_ids))
    fitting = [n for n in order if logits_bytes(model, len(sequences[n].input_ids)) < room] or order[:1]
    step = max(1, (len(fitting) - 1) // (CHECKED_SEQUENCES - 1))
    losses = {}
    for n in fitting[::step][:CHECKED_SEQUENCES]:
        ids = torch.from_numpy(sequences[n].input_ids).to(model.device).long()
        with exact_products(model.device):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll = torch.logsumexp(logits, -1) - logits.gather(-1, ids[1:, None])[:, 0]
        losses[n] = float(nll[torch.from_numpy(sequences[n].scored[1:]).to(model.device)].double().mean())
    return losses


def check_losses(name: str, losses: Losses, plain: Mapping[int, float]) -> float:
    """Largest difference in nats of float32 losses [N] from `plain` ones by index. WrongLossError where it is large."""
    differences = {n: abs(float(losses[n]) - value) for n, value in plain.items()}
    for n, difference in differences.items():
        if not difference <= CHECK_TOLERANCE:  # NaN neither
            raise WrongLossError(
                f"{name}: in float32 fastcompat's loss of response {n} is {losses[n]:.6f} nats, the plain model's "
                f"{plain[n]:.6f}; they must agree to {CHECK_TOLERANCE} nats, so no figure is given. Please report it "
                "with the output of fastcompat doctor."
            )
    return max(differences.values())


def _likely_time(flops: Sequence[float], repetitions: Sequence[float], rate: float, settings: Settings) -> str:
    """How long it all takes, roughly, in words.

    flops: useful ones, workload by workload; repetitions: times that a loop without sharing computes a token; rate: the
    product's FLOP/s.
    """
    seconds = 0.0
    for useful, repetition in zip(flops, repetitions, strict=True):
        ours = (settings.rounds + LIKELY_FLOAT32_COST) / LIKELY_EFFICIENCY
        others = settings.rounds * len(settings.loops) * repetition / LIKELY_EFFICIENCY_OF_LOOPS
        seconds += useful / rate * (ours + others)
    return f"about {seconds / 60:.0f} minutes" if seconds > 90 else "about a minute" if seconds > 30 else "seconds"


def release() -> None:
    """Give back the memory of a model that is not referred to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
