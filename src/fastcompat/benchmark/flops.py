"""Useful FLOPs of a forward pass, and the rate at which this machine multiplies matrices of the model's own shape.

Dimension key: T packed tokens, S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcompat.models import CausalLM, head_width, largest, layers, n_layers, windows
from fastcompat.scoring import ACTIVE_EXPERTS
from fastcompat.tokens import PrefixForest

PRODUCT_TOKENS = 2048
PRODUCT_REPEATS = 9
# A GPU has its full speed only with many tiles for each multiprocessor, and keeps it only as long as its power lasts.
GPU_PRODUCT_TOKENS = 16384
GPU_SECONDS = 0.5
# Products by which it is told how many that is.
GPU_PRODUCTS = 20
# TFLOP/s of dense products in half precision, adding up in float32, by NVIDIA's data sheets; the first name that is
# part of the device's counts.
DATA_SHEETS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.1,
    "L40": 181.0,
    "L4": 121.0,
}


def useful_flops(model: CausalLM, forests: Sequence[PrefixForest]) -> float:
    """What scoring needs at least, given packs [T] in which every common beginning is there once.

    2 x body parameters x T + 2 x head parameters x S + 4 x attended (query, key) pairs x query-head width x layers;
    a layer with a sliding window attends as many pairs as its window leaves.
    """
    n_tokens = sum(forest.n_tokens for forest in forests)
    n_scored = sum(len(forest.targets) for forest in forests)
    depths = np.concatenate([forest.position_ids for forest in forests]) + 1  # keys that a query sees, itself included
    config = model.full.config
    attention = 0
    for layer, window in zip(layers(config), windows(config), strict=True):
        pairs = int((depths if window is None else np.minimum(depths, window)).sum())
        attention += pairs * (largest(layer, "num_attention_heads") or 0) * (head_width(layer) or 0)
    return float(2 * body_parameters(model.full) * n_tokens + 2 * model.weight.numel() * n_scored + 4 * attention)


def body_parameters(model: Any) -> float:
    """Parameters that every token is multiplied with: no embeddings, no head, of experts those that it uses."""
    left_out = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    left_out |= {id(p) for p in model.get_output_embeddings().parameters()}
    n_experts = largest(model.config, "num_local_experts", "num_experts", "n_routed_experts") or 0
    n_active = largest(model.config, *ACTIVE_EXPERTS) or n_experts
    total = 0.0
    for parameter in model.parameters():
        if id(parameter) in left_out:
            continue
        of_experts = n_experts and parameter.ndim == 3 and len(parameter) == n_experts
        total += parameter.numel() * (n_active / n_experts if of_experts else 1.0)
    return total


def up_projection(model: Any) -> Tensor:
    """The weight [outputs, inputs] of a decoder layer's largest matrix, its MLP's first; or of one expert's."""
    depth = n_layers(model.config)
    first = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)[0]
    matrices = [p.detach() if p.ndim == 2 else p.detach()[0] for p in first.parameters() if p.ndim in (2, 3)]
    # Of two as large, the one with more outputs than inputs: up, not down.
    return max(matrices, key=lambda weight: (weight.numel(), len(weight)))


def product_tokens(device: torch.device) -> int:
    """Rows of the product that is measured on a device."""
    return GPU_PRODUCT_TOKENS if device.type == "cuda" else PRODUCT_TOKENS


def product_rate(weight: Tensor) -> float:
    """FLOP/s of `F.linear` with `product_tokens` through `weight` [outputs, inputs]: the machine's own speed.

    On a GPU sustained for half a second; else the median of some products.
    """
    x = torch.randn(product_tokens(weight.device), weight.shape[1], device=weight.device).to(weight.dtype)
    if weight.device.type == "cuda":
        n_products = math.ceil(GPU_SECONDS / _gpu_seconds(x, weight, GPU_PRODUCTS))
        seconds = _gpu_seconds(x, weight, max(n_products, GPU_PRODUCTS))
    else:
        seconds = statistics.median(_cpu_seconds(x, weight) for _ in range(PRODUCT_REPEATS))
    return 2.0 * x.numel() * len(weight) / seconds


def data_sheet_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the data sheet of a GPU promises in this dtype, where it is known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * rate for part, rate in DATA_SHEETS.items() if part in name), None)


def _cpu_seconds(x: Tensor, weight: Tensor) -> float:
    began = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - began


def _gpu_seconds(x: Tensor, weight: Tensor, n_products: int) -> float:
    """Of one product, in a row of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # The GPU is busy with these while the products are queued, so that the time to launch them is not counted.
    filler = torch.empty(8192, 8192, device=x.device, dtype=x.dtype).fill_(1)
    filler @ filler
    begin.record()
    for _ in range(n_products):
        F.linear(x, weight)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / n_products
