"""Tensors -> tensors, on whatever the device has: attention, NLL, element-wise. Knows nothing of models.

nll, attention, elementwise    the three doors to the kernels; arguments are checked here, once
nll_torch, attention_torch     in plain torch
backends                       who serves what: C++ (csrc/), Triton (kernels/), plain torch
reference                      the definitions, a line each, for tests
"""

from fastcompat.ops.attention import AttentionPlan, forest_attention
from fastcompat.ops.elementwise import add_rms_norm, gated, rms_norm, rotate_
from fastcompat.ops.nll import Statistic, linear_nll, packed_nll
from fastcompat.ops.nll_torch import tile_shape

__all__ = [
    "AttentionPlan",
    "Statistic",
    "add_rms_norm",
    "forest_attention",
    "gated",
    "linear_nll",
    "packed_nll",
    "rms_norm",
    "rotate_",
    "tile_shape",
]
