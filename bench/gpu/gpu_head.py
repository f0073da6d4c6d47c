"""The fused head beside its peers, and under other tiles.

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Calls, Finding, in_turn, off_by, peak_mib
from gpu_variants import head_variants, is_of_cublas
from torch import Tensor

from fastcompat.kernels.linear_nll import linear_nll
from fastcompat.kernels.packed_nll import packed_nll

CHUNK = 1024  # tokens whose logits the chunked peers hold
CHECKED = 64  # tokens compared with float64
VARIANTS_APART = 2e-3  # nats: tensor cores cut off, each product of a variant in its own order
COMPILE_SECONDS = 30.0
PRODUCT = "cuBLAS product alone"


@dataclass(frozen=True, kw_only=True)
class Head:
    """An LM head: hidden size D, vocabulary V, and its model's soft cap."""

    model: str
    width: int
    vocabulary: int
    softcap: float | None = None
    n_tokens: int = 8192

    def __str__(self) -> str:
        softcap = f", soft cap {self.softcap:g}" if self.softcap else ""
        return f"{self.n_tokens} x {self.width} -> {self.vocabulary}, bf16{softcap} ({self.model})"


def heads(device: str) -> list[Head]:
    if device == "cpu":
        return [Head(model="tiny", width=48, vocabulary=300, softcap=30.0, n_tokens=20)]
    return [
        Head(model="Qwen2.5-1.5B", width=1536, vocabulary=151_936),
        Head(model="Gemma-2-2B", width=2304, vocabulary=256_000, softcap=30.0),
        Head(model="Llama-3.1-8B", width=4096, vocabulary=128_256),
    ]


@torch.no_grad()
def draw(head: Head, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights as wide as a trained head's (|z| up to 35), targets: half anywhere, half likely ones."""
    torch.manual_seed(0)
    hidden = torch.randn(head.n_tokens, head.width, device=device).bfloat16()
    weight = (torch.randn(head.vocabulary, head.width, device=device) * 7.5 * head.width**-0.5).bfloat16()
    target = torch.randint(head.vocabulary, (head.n_tokens,), device=device)
    likely = slice(0, head.n_tokens, 2)
    target[likely] = torch.cat([(part @ weight.T).argmax(1) for part in hidden[likely].split(CHUNK)])
    return hidden, weight, target


def in_chunks(hidden: Tensor, weight: Tensor, target: Tensor, row_kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[S] nll: cuBLAS products of CHUNK tokens into one buffer of bf16 logits, each read by a row kernel."""
    buffer = hidden.new_empty(CHUNK, len(weight))
    parts = []
    for h, t in zip(hidden.split(CHUNK), target.split(CHUNK), strict=True):
        logits = torch.mm(h, weight.T, out=buffer[: len(h)])
        parts.append(row_kernel(logits, t))
    return torch.cat(parts)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="none")


def peers(head: Head, hidden: Tensor, weight: Tensor, target: Tensor) -> Calls:
    """What else computes [S] nll from the same tensors. Only Liger's has a soft cap; the others are spared theirs."""
    calls: Calls = {
        "cuBLAS in chunks + packed_nll": lambda: in_chunks(hidden, weight, target, lambda z, t: packed_nll(z, t)[0]),
        "cuBLAS in chunks + F.cross_entropy, float32": lambda: in_chunks(hidden, weight, target, cross_entropy),
    }
    # One may come without the other.
    if hasattr(F, "linear_cross_entropy"):
        fused = partial(F.linear_cross_entropy, hidden, weight, target, reduction="none")
        calls["F.linear_cross_entropy"] = fused
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            chunked = partial(fused, options=torch.nn.LinearCrossEntropyOptions())
            calls["F.linear_cross_entropy, chunked"] = chunked
    try:
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=head.softcap)
        calls["Liger, Triton"] = lambda: loss(weight, hidden, target)
    except ImportError:
        pass
    try:
        module = importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
        scaled = module.LigerFusedScaledCrossEntropySM90Function
        calls["Liger, CuTe DSL for sm_90"] = lambda: scaled.apply(hidden, weight, target, 1.0, -100, 1)
    except ImportError:
        pass
    return calls


@torch.no_grad()
def linear_nll_beside_its_peers(device: str) -> Iterator[Finding]:
    compile_ahead([(head, None) for head in heads(device)], device)
    for head in heads(device):
        hidden, weight, target = draw(head, device)
        fused = partial(linear_nll, hidden, weight, target, softcap=head.softcap)
        logits = hidden.new_empty(head.n_tokens, head.vocabulary)
        ours: Calls = {"linear_nll": fused, "linear_nll, all five": partial(fused, all_statistics=True)}
        for name, tiles in head_variants(hidden.dtype, hidden.device, head.width).items():
            if is_of_cublas(tiles):
                call = partial(fused, tiles=tiles)
                ours |= {name: call, f"{name}, all five": partial(call, all_statistics=True)}
        others = peers(head, hidden, weight, target)
        product = {PRODUCT: lambda h=hidden, w=weight, z=logits: torch.mm(h, w.T, out=z)}
        timings = in_turn({**product, **ours, **others}, device, rounds=9)
        with_rates(timings, head)
        yield {"case": f"linear_nll {head}", "head": asdict(head), "timings": timings}
        del logits
        measured = {name: call for name, call in {**ours, **others}.items() if "ms" in timings[name]}
        peaks = {name: {"peak MiB": peak_mib(call, device)} for name, call in measured.items()}
        yield {
            "case": f"linear_nll {head}: memory beside the arguments",
            "figures": peaks,
            **head_errors(head, hidden, weight, target, others),
        }


def with_rates(timings: dict[str, Finding], head: Head) -> None:
    """Add TFLOP/s, and the share of the plain product's rate in the same rounds."""
    tflop = 2e-12 * head.n_tokens * head.width * head.vocabulary
    product = timings[PRODUCT]
    for timing in timings.values():
        if "ms" in timing:
            timing["TFLOP/s"] = tflop / (1e-3 * timing["ms"])
            if "ms" in product:
                timing["of the product's rate"] = product["ms"] / timing["ms"]


def head_errors(head: Head, hidden: Tensor, weight: Tensor, target: Tensor, others: Calls) -> Finding:
    """Of CHECKED tokens, likely targets and others. The peers that leave the soft cap out are held against that."""
    chosen = torch.linspace(0, head.n_tokens - 1, min(CHECKED, head.n_tokens), device=hidden.device).long()
    h, t = hidden[chosen], target[chosen]
    plain = h.double() @ weight.double().T
    capped = head.softcap * torch.tanh(plain / head.softcap) if head.softcap else plain
    alone = linear_nll(h, weight, t, softcap=head.softcap)
    among_all = linear_nll(hidden, weight, target, softcap=head.softcap)[:, chosen]
    every = linear_nll(hidden, weight, target, softcap=head.softcap, all_statistics=True)[:, chosen]
    errors: Finding = {"linear_nll": off_by(among_all, capped, t), "linear_nll, all five": off_by(every, capped, t)}
    for name, call in others.items():
        try:
            nll = call()
        except Exception as error:  # the timings say so too
            errors[name] = {"failed": type(error).__name__}
        else:
            errors[name] = off_by(nll[chosen][None], capped if name == "Liger, Triton" else plain, t)
    return {"errors": errors, "same_bits_in_another_batch": torch.equal(alone, among_all)}


@torch.no_grad()
def tile_sweep(device: str) -> Iterator[Finding]:
    """Every variant of the head beside the plain product, on the smallest and the largest D; what does not compile or
    fit says so, and what is compiled too late is left out."""
    chosen = heads(device)[:: 1 if device == "cpu" else 2]
    place = torch.device(device)
    jobs: list[tuple[Head, str, Any]] = []
    for head in chosen:
        variants = list(head_variants(torch.bfloat16, place, head.width).items())
        jobs += [(head, name, tiles) for name, tiles in (variants[:2] if device == "cpu" else variants)]
    outcomes = compile_ahead([(head, tiles) for head, _, tiles in jobs], device)
    drawn: Head | None = None
    for (head, name, tiles), outcome in zip(jobs, outcomes, strict=True):
        if head != drawn:
            drawn = head
            hidden, weight, target = draw(head, device)
            usual = linear_nll(hidden, weight, target, softcap=head.softcap)
            product = partial(torch.mm, hidden, weight.T, out=hidden.new_empty(head.n_tokens, head.vocabulary))
        finding: Finding = {"case": f"linear_nll {head}: {name}", "sweep": str(head), "variant": name}
        finding |= {"tiles": asdict(tiles), **outcome}
        if "timings" not in outcome:
            fused = partial(linear_nll, hidden, weight, target, softcap=head.softcap, tiles=tiles)
            every = partial(fused, all_statistics=True)
            calls: Calls = {PRODUCT: product, "linear_nll": fused, "linear_nll, all five": every}
            finding["timings"] = in_turn(calls, device, rounds=5)
            with_rates(finding["timings"], head)
            if "ms" in finding["timings"]["linear_nll"]:
                off = float((fused() - usual).abs().max())
                finding["errors"] = {"from what serves": off}
                if not off < VARIANTS_APART:
                    finding["problem"] = f"nll off by {off:.2g} from what serves"
        yield finding


def compile_ahead(jobs: list[tuple[Head, Any]], device: str) -> list[Finding]:
    """Fill Triton's cache in parallel processes; seconds for each, or why there are none."""
    n_processes = 1 if device == "cpu" else max(1, min(8, len(jobs), (os.cpu_count() or 2) // 2))
    deadline = time.monotonic() + (600.0 if device == "cpu" else COMPILE_SECONDS)
    outcomes: list[Finding] = []
    with get_context("spawn").Pool(n_processes) as pool:
        for result in [pool.apply_async(_compile, (head, tiles, device)) for head, tiles in jobs]:
            try:
                outcomes.append({"compile_seconds": result.get(max(0.1, deadline - time.monotonic()))})
            except Exception as error:  # what a compiler or a launch raises, or the deadline
                failed = f"not compiled: {type(error).__name__}: {error}"[:500]
                outcomes.append({"timings": {"linear_nll": {"failed": failed}}})
    return outcomes


def _compile(head: Head, tiles: Any, device: str) -> float:
    """Start every kernel that a head needs once, on few tokens; seconds."""
    began = time.monotonic()
    n_tokens = 16 if device == "cpu" else 512
    hidden = torch.zeros(n_tokens, head.width, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(head.vocabulary, head.width, dtype=torch.bfloat16, device=device)
    target = torch.zeros(n_tokens, dtype=torch.int64, device=device)
    for every in (False, True):
        linear_nll(hidden, weight, target, softcap=head.softcap, tiles=tiles, all_statistics=every)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.monotonic() - began
