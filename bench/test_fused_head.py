"""The kernels under pytest-benchmark: `make bench-kernels`, for looking at one implementation's spread.

What README claims comes from bench/fused_head.py, whose rounds are interleaved.
"""

from __future__ import annotations

import pytest
import torch
from fused_head import HEADS, SHAPES, Problem


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: shape.model)
@torch.no_grad()
def test_head(benchmark, shape, name):
    p = Problem.draw(shape, 512, torch.bfloat16)
    benchmark.group = f"{shape.model}, 512 tokens, bf16"
    benchmark.pedantic(HEADS[name], args=(p,), rounds=7, warmup_rounds=1)
