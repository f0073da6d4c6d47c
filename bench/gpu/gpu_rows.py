"""The row kernel and the segment sum beside their peers, and the row kernel under other tiles.

Dimension key: S scored tokens, V vocabulary, N sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.nn.functional as F
from gpu_timing import COPY, Calls, Finding, in_turn, off_by, peak_mib, with_bandwidth
from torch import Tensor

from fastcompat.kernels.packed_nll import TILES, packed_nll
from fastcompat.kernels.segment_sum import segment_sum

CHECKED = 64  # tokens compared with float64


def upcast_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, reduction="none")


@torch.no_grad()
def packed_nll_beside_its_peers(device: str) -> Iterator[Finding]:
    shapes = [(2048, 151_936), (8192, 128_256), (4096, 50_257)]
    for n_tokens, vocabulary in [(4, 700)] if device == "cpu" else shapes:
        torch.manual_seed(0)
        logits = torch.randn(n_tokens, vocabulary, dtype=torch.bfloat16, device=device).mul_(6)
        target = torch.randint(vocabulary, (n_tokens,), device=device)
        copied = torch.empty_like(logits)
        rows = partial(packed_nll, logits, target)
        calls: Calls = {
            COPY: partial(copied.copy_, logits),
            "packed_nll": rows,
            "packed_nll, all five": partial(rows, all_statistics=True),
            "F.cross_entropy(logits.float())": partial(upcast_cross_entropy, logits, target),
            "F.cross_entropy(logits)": partial(F.cross_entropy, logits, target, reduction="none"),
        }
        timings = in_turn(calls, device)
        with_bandwidth(timings, logits)
        some = slice(0, CHECKED)
        yield {
            "case": f"packed_nll {n_tokens} x {vocabulary}, bf16",
            "timings": timings,
            "peak_mib": peak_mib(partial(rows, all_statistics=True), device),
            "errors": {
                "packed_nll, all five": off_by(rows(all_statistics=True)[:, some], logits[some].double(), target[some])
            },
        }


@torch.no_grad()
def tile_sweep(device: str) -> Iterator[Finding]:
    """Other tiles than the kernel's own, each beside a copy."""
    n_tokens, vocabulary = (4, 700) if device == "cpu" else (2048, 151_936)
    logits = torch.randn(n_tokens, vocabulary, dtype=torch.bfloat16, device=device)
    target = torch.randint(vocabulary, (n_tokens,), device=device)
    copied = torch.empty_like(logits)
    sizes = itertools.product((128, 256), (2, 4), (16384, 32768, 65536))
    for lanes, loads, split_columns in [(128, 2, 4096)] if device == "cpu" else sizes:
        tiles = replace(TILES, lanes=lanes, loads=loads, split_columns=split_columns)
        rows = partial(packed_nll, logits, target, tiles=tiles)
        calls: Calls = {
            COPY: partial(copied.copy_, logits),
            "packed_nll": rows,
            "packed_nll, all five": partial(rows, all_statistics=True),
        }
        timings = in_turn(calls, device, rounds=5)
        with_bandwidth(timings, logits)
        sweep, variant = f"packed_nll {n_tokens} x {vocabulary}", f"{lanes} x {loads} of {split_columns}"
        found = {"case": f"{sweep}: {variant}", "sweep": sweep, "variant": variant}
        yield found | {"tiles": asdict(tiles), "timings": timings}


@torch.no_grad()
def segment_sum_beside_its_peers(device: str) -> Iterator[Finding]:
    n_segments = 7 if device == "cpu" else 20_000
    torch.manual_seed(0)
    lengths = torch.empty(n_segments).log_normal_(5.3, 0.6).clamp_(8, 900).long().to(device)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    values = torch.rand(5, int(lengths.sum()), device=device)
    segment = torch.arange(n_segments, device=device).repeat_interleave(lengths)
    copied = torch.empty_like(values)
    calls: Calls = {
        COPY: partial(copied.copy_, values),
        "segment_sum": partial(segment_sum, values, cu_seqlens),
        "index_add_ in float64": lambda: values.new_zeros(5, n_segments, dtype=torch.float64).index_add_(
            1, segment, values.double()
        ),
    }
    timings = in_turn(calls, device)
    want = torch.stack([part.double().sum(1) for part in values.split(lengths.tolist(), dim=1)], dim=1)
    yield {
        "case": f"segment_sum 5 x {values.shape[1]}, {n_segments} segments",
        "timings": timings,
        "errors": {"segment_sum": {"relatively": float(((segment_sum(values, cu_seqlens) - want) / want).abs().max())}},
    }
