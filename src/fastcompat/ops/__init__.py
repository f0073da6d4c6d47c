"""Tensors -> tensors, on whatever the device has: attention, NLL, element-wise. Knows nothing of models.

nll, attention, elementwise    the three doors to the kernels; arguments are checked here, once
nll_torch, attention_torch     in plain torch
exact_products                 what a GPU's products may not do
one_copy                       what goes to a device, or comes from it, by one copy
backends                       who serves what: C++ (csrc/), Triton (kernels/), plain torch
reference                      the definitions, a line each, for tests
"""

from fastcompat.ops.attention import AttentionPlan, forest_attention, reads_summaries
from fastcompat.ops.elementwise import add_rms_norm, gated, rms_norm, rotate_
from fastcompat.ops.exact_products import exact_products
from fastcompat.ops.nll import Statistic, linear_nll, packed_nll
from fastcompat.ops.nll_torch import tile_shape
from fastcompat.ops.one_copy import Arrays, OneCopy

__all__ = [
    "Arrays",
    "AttentionPlan",
    "OneCopy",
    "Statistic",
    "add_rms_norm",
    "exact_products",
    "forest_attention",
    "gated",
    "linear_nll",
    "packed_nll",
    "reads_summaries",
    "rms_norm",
    "rotate_",
    "tile_shape",
]
