"""Tensors -> tensors, on whatever the device has: attention, NLL, element-wise. Knows nothing of models.

nll, attention, elementwise    the three doors to the kernels; arguments are checked here, once
nll_torch, attention_torch     in plain torch
flash_choice, attention_flash, flash_plan    whether flash-attn or torch's varlen serves, its calls, a forest as such
backends                       who serves what: C++ (csrc/), Triton (kernels/), plain torch
reference                      the definitions, a line each, for tests
"""

from fastcompat.ops.attention import AttentionPlan, forest_attention
from fastcompat.ops.elementwise import add_rms_norm, gated, rms_norm, rotate_
from fastcompat.ops.flash_choice import AttentionKind, library_versions, probe_libraries, used_libraries
from fastcompat.ops.nll import Statistic, linear_nll, packed_nll
from fastcompat.ops.nll_torch import tile_shape

__all__ = [
    "AttentionKind",
    "AttentionPlan",
    "Statistic",
    "add_rms_norm",
    "forest_attention",
    "gated",
    "library_versions",
    "linear_nll",
    "packed_nll",
    "probe_libraries",
    "rms_norm",
    "rotate_",
    "tile_shape",
    "used_libraries",
]
