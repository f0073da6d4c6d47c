"""Whether a row of a product has the same bits whatever rows stand beside it, and which switch makes it so.

Dimension key: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Finding
from torch import Tensor

# Outputs and inputs: queries, keys and values joined; gate and up joined; down.
SHAPES = {
    "Qwen2.5-0.5B": ((1152, 896), (9728, 896), (896, 4864)),
    "Llama-3.1-8B": ((6144, 4096), (28672, 4096), (4096, 14336)),
}
ROWS = (1, 2, 8, 16, 17, 64, 128, 200, 256, 500, 1000, 1024, 2048, 4096, 5000, 8192, 16384)
KEPT = 16  # rows that are compared
# What torch lets cuBLAS do with partial sums: as it comes; added in float32; no split of K at all.
MODES: dict[str, Any] = {"default": None, "no bf16 partial sums": False, "no split of K": (False, False)}


@contextmanager
def partial_sums(allowed: Any) -> Iterator[None]:
    """None: as torch has it."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    if allowed is not None:
        settings.allow_bf16_reduced_precision_reduction = allowed
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


@torch.no_grad()
def invariance(device: str) -> Iterator[Finding]:
    """Bits of the first rows by number of rows, beside those of the most rows; which numbers give others."""
    shapes, rows = (SHAPES, ROWS) if device != "cpu" else ({"tiny": ((24, 16),)}, (1, 2, 17))
    for model, products in shapes.items():
        for n, k in products:
            torch.manual_seed(0)
            x = torch.randn(rows[-1], k, device=device).bfloat16()
            weight = torch.randn(n, k, device=device).mul_(k**-0.5).bfloat16()
            figures = {}
            for mode, allowed in MODES.items():
                try:
                    with partial_sums(allowed):
                        others = differing(x, weight, rows)
                except Exception as error:  # an older torch has one switch where a newer has two
                    figures[mode] = {"failed": f"{type(error).__name__}: {error}"[:100]}
                else:
                    figures[mode] = {"other bits with": ", ".join(map(str, others)) or "no number of rows"}
            yield {"case": f"F.linear {k} -> {n}, bf16 ({model}), beside {rows[-1]} rows", "figures": figures}


def differing(x: Tensor, weight: Tensor, rows: tuple[int, ...]) -> list[int]:
    """The numbers of rows of x [M, K] with which the first KEPT rows' products have other bits than with all."""
    whole = F.linear(x, weight)
    return [m for m in rows if not torch.equal(F.linear(x[:m].contiguous(), weight)[:KEPT], whole[: min(m, KEPT)])]
