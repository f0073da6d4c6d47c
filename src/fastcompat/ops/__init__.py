"""Tensors -> tensors, on whatever the device has: attention, NLL, element-wise. Knows nothing of models.

nll, attention, elementwise    the three doors to the kernels; arguments are checked here, once
nll_torch, attention_torch     in plain torch
flash_choice, attention_flash, flash_plan    whether flash-attn or torch's varlen serves, its calls, a forest as such
exact_products                 what a GPU's products may not do
one_copy                       what goes to a device, or comes from it, by one copy
backends                       who serves what: C++ (csrc/), Triton (kernels/), plain torch
reference                      the definitions, a line each, for tests
"""

from fastcompat.ops.attention import AttentionPlan, forest_attention, reads_summaries
from fastcompat.ops.elementwise import add_rms_norm, gated, rms_norm, rotate_
from fastcompat.ops.exact_products import exact_products
from fastcompat.ops.flash_choice import (
    AttentionKind,
    library_versions,
    probe_libraries,
    reads_flash_plans,
    used_libraries,
)
from fastcompat.ops.nll import Statistic, linear_nll, packed_nll
from fastcompat.ops.nll_torch import tile_shape
from fastcompat.ops.one_copy import Arrays, OneCopy

__all__ = [
    "Arrays",
    "AttentionKind",
    "AttentionPlan",
    "OneCopy",
    "Statistic",
    "add_rms_norm",
    "exact_products",
    "forest_attention",
    "gated",
    "library_versions",
    "linear_nll",
    "packed_nll",
    "probe_libraries",
    "reads_flash_plans",
    "reads_summaries",
    "rms_norm",
    "rotate_",
    "tile_shape",
    "used_libraries",
]
