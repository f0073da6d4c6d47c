"""The fused head against its peers on a CPU, in turn in one run; every one's error against float64 besides.

    python bench/fused_head.py [--tokens 512 2048] [--rounds 5]

Prints tables and writes bench/results/fused_head-cpu.json. Ratios are taken round by round, between calls a second
apart, and their median is what counts: the machine's speed drifts, and both feel it. `bench/test_fused_head.py` times
the same calls under pytest-benchmark.

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc
from fastcompat.benchmark.machine import machine

RESULTS = Path(__file__).parent / "results"
STATISTICS = ("nll", "entropy", "varentropy", "rank", "collision")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An LM head: width D, vocabulary V, a soft cap."""

    model: str
    width: int
    vocabulary: int
    softcap: float | None = None


SHAPES = [
    Shape(model="SmolLM2-135M", width=576, vocabulary=49_152),
    Shape(model="Qwen2.5-0.5B", width=896, vocabulary=151_936),
    Shape(model="Llama-3.2-1B", width=2048, vocabulary=128_256),
    Shape(model="Gemma-2-2B", width=2304, vocabulary=256_000, softcap=30.0),
]


@dataclass(frozen=True, eq=False)
class Problem:
    """One call's tensors: hidden [S, D], weight [V, D], target [S]; logits spread as a trained model's."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    target: Tensor

    @classmethod
    def draw(cls, shape: Shape, n_tokens: int, dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(n_tokens, shape.width, generator=generator)
        weight = torch.randn(shape.vocabulary, shape.width, generator=generator) * 5 * shape.width**-0.5
        target = torch.randint(shape.vocabulary, (n_tokens,), generator=generator)
        return cls(shape, hidden.to(dtype), weight.to(dtype), target)


def product(p: Problem) -> Tensor:
    """The matrix product alone: a floor for everybody who keeps logits."""
    return F.linear(p.hidden, p.weight)


def product_and_cross_entropy(p: Problem) -> Tensor:
    """What everybody writes."""
    z = F.linear(p.hidden, p.weight)
    if p.shape.softcap:
        z = z.div_(p.shape.softcap).tanh_().mul_(p.shape.softcap)
    return F.cross_entropy(z, p.target, reduction="none")


def linear_cross_entropy(p: Problem) -> Tensor:
    """torch's own, its reference path; it has no soft cap."""
    return F.linear_cross_entropy(p.hidden, p.weight, p.target, reduction="none")


def linear_cross_entropy_chunked(p: Problem) -> Tensor:
    """torch's own, in the chunks that it chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(p.hidden, p.weight, p.target, reduction="none", options=options)


def fastcompat(p: Problem) -> Tensor:
    """linear_nll."""
    return fc.linear_nll(p.hidden, p.weight, p.target, softcap=p.shape.softcap)


def fastcompat_five(p: Problem) -> Tensor:
    """linear_nll with all five statistics."""
    return fc.linear_nll(p.hidden, p.weight, p.target, softcap=p.shape.softcap, statistics=STATISTICS)[0]


HEADS: dict[str, Callable[[Problem], Tensor]] = {
    "F.linear alone": product,
    "F.linear + F.cross_entropy": product_and_cross_entropy,
    "F.linear_cross_entropy": linear_cross_entropy,
    "F.linear_cross_entropy, chunked": linear_cross_entropy_chunked,
    "fc.linear_nll": fastcompat,
    "fc.linear_nll, five statistics": fastcompat_five,
}


def measure(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            value = measure(call)
            if round_:
                seconds[name].append(value)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Median over rounds of name's time over to's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def error(p: Problem, got: Tensor, n_rows: int = 64) -> float:
    """Largest error of the first rows' NLL against float64, in nats."""
    hidden, target = p.hidden[:n_rows].double(), p.target[:n_rows]
    z = torch.cat([hidden @ part.double().T for part in p.weight.split(16_384)], dim=1)
    if p.shape.softcap:
        z = p.shape.softcap * torch.tanh(z / p.shape.softcap)
    want = torch.logsumexp(z, dim=1) - z.gather(1, target[:, None])[:, 0]
    return float((got[:n_rows].double() - want).abs().max())


@torch.no_grad()
def head(shape: Shape, n_tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times and errors of every implementation at one shape."""
    p = Problem.draw(shape, n_tokens, dtype)
    # torch's chunks are made for a backward pass: 4 to 30 times slower, so timed where that is bearable.
    names = [
        name
        for name in HEADS
        if not (shape.softcap and "linear_cross_entropy" in name)
        and not ("chunked" in name and shape.vocabulary > 100_000)
    ]
    seconds = interleaved({name: (lambda call=HEADS[name]: call(p)) for name in names}, rounds)
    gflop = 2 * n_tokens * shape.width * shape.vocabulary / 1e9
    return {
        **asdict(shape),
        "n_tokens": n_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "gflop_per_s": {name: gflop / statistics.median(values) for name, values in seconds.items()},
        "ours_over": {name: ratio(seconds, "fc.linear_nll", name) for name in names if name != "fc.linear_nll"},
        "five_over_nll": ratio(seconds, "fc.linear_nll, five statistics", "fc.linear_nll"),
        "largest_error_nats": {name: error(p, HEADS[name](p)) for name in names if name != "F.linear alone"},
    }


@torch.no_grad()
def held_logits(n_tokens: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    """packed_nll against the cross-entropy of upcast logits."""
    logits = torch.randn(n_tokens, vocabulary).mul_(4).bfloat16()
    target = torch.randint(vocabulary, (n_tokens,))
    calls: dict[str, Callable[[], Any]] = {
        "F.cross_entropy(logits.float())": lambda: F.cross_entropy(logits.float(), target, reduction="none"),
        "F.cross_entropy(logits)": lambda: F.cross_entropy(logits, target, reduction="none"),
        "logits.clone()": lambda: logits.clone(),
        "fc.packed_nll": lambda: fc.packed_nll(logits, target),
        "fc.packed_nll, five statistics": lambda: fc.packed_nll(logits, target, statistics=STATISTICS),
    }
    seconds = interleaved(calls, rounds)
    z = logits[:64].double()
    want = torch.logsumexp(z, 1) - z.gather(1, target[:64, None])[:, 0]
    return {
        "n_tokens": n_tokens,
        "vocabulary": vocabulary,
        "dtype": "bfloat16",
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "faster_than": {name: ratio(seconds, name, "fc.packed_nll") for name in calls if not name.startswith("fc.")},
        "largest_error_nats": float((fc.packed_nll(logits[:64], target[:64]).double() - want).abs().max()),
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def show(results: list[dict[str, Any]]) -> None:
    for entry in results:
        shape = f"{entry['model']} ({entry['width']} x {entry['vocabulary']:,})"
        print(f"{entry['dtype']}, {entry['n_tokens']} tokens, {shape}")
        for name, value in entry["seconds"].items():
            off = entry["largest_error_nats"].get(name)
            print(
                f"  {value:8.3f} s  {entry['gflop_per_s'][name]:5.0f} GFLOP/s  ours takes "
                f"{entry['ours_over'].get(name, 1.0):.2f} of it  "
                f"{'' if off is None else f'{off:.1e} nats off'}  {name}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    heads = []
    for shape in SHAPES:
        for n_tokens in arguments.tokens:
            heads.append(head(shape, n_tokens, torch.bfloat16, arguments.rounds))
            show(heads[-1:])
    for shape in SHAPES[:2]:
        heads.append(head(shape, 1024, torch.float32, arguments.rounds))
        show(heads[-1:])
    packed = held_logits(2048, 151_936, arguments.rounds)
    print(json.dumps(packed, indent=2))
    summary = {
        dtype: {
            name: geometric_mean(
                [entry["ours_over"][name] for entry in heads if entry["dtype"] == dtype and name in entry["ours_over"]]
            )
            for name in HEADS
            if name != "fc.linear_nll" and any(e["dtype"] == dtype and name in e["ours_over"] for e in heads)
        }
        for dtype in ("bfloat16", "float32")
    }
    print("ours over theirs, geometric means:", json.dumps(summary, indent=2))
    path = RESULTS / "fused_head-cpu.json"
    result = {"machine": machine(), "geometric_mean_of_ours_over": summary, "heads": heads, "packed_nll": packed}
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
