"""What `make triton-report` compiles of the element-wise kernels and the sums: what their launchers ask for."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import AotCase, elementwise, segment_sum
from .ahead_of_time import Calls, asked

T = 4099  # packed tokens
# Hidden size, query heads, key heads, head width, inner width of the MLP.
MODELS = {
    "Qwen2.5-0.5B": (896, 14, 2, 64, 4864),
    "SmolLM2-135M": (576, 9, 3, 64, 1536),
    "Llama-3-8B": (4096, 32, 8, 128, 14_336),
    "Gemma-2-2B": (2304, 8, 4, 256, 9216),
    "narrow": (36, 3, 1, 12, 50),  # rows that are no multiples of 16 elements
}
KERNELS = {
    elementwise: ("_rms_norm_kernel", "_rotate_kernel", "_gated_kernel"),
    segment_sum: ("_segment_sum_kernel",),
}


def aot_cases(arch: int) -> list[AotCase]:
    """For one architecture: the same of real models on all of them."""
    return asked(arch, _calls(), KERNELS)


def _calls() -> Calls:
    for model in MODELS:
        yield from _layer(model, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        yield from _layer("Qwen2.5-0.5B", dtype)
    x = _empty(T, elementwise.MAX_WIDTH)
    yield "the widest norm, bf16", partial(elementwise.rms_norm, x, x[0], eps=1e-6, residual=x)
    values, ends = _empty(5, T, dtype=torch.float32), _empty(30, dtype=torch.int64)
    yield "sums", partial(segment_sum.segment_sum, values, ends)


def _layer(model: str, dtype: torch.dtype) -> Calls:
    """As fused modules call them: heads lie in a joined product, gate and up side by side."""
    D, heads, key_heads, C, width = MODELS[model]
    name = f"{model}, {({torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32'})[dtype]}"
    empty = partial(_empty, dtype=dtype)
    x, weight = empty(T, D), empty(D)
    norm, rotate = elementwise.rms_norm, elementwise.rotate_
    yield f"norm, {name}", partial(norm, x, weight, eps=1e-6, out=empty(T, D))
    yield f"sum and norm, {name}", partial(norm, x, weight, eps=1e-6, residual=x)
    joined = empty(T, (heads + 2 * key_heads) * C)
    query_key = joined[:, : (heads + key_heads) * C].view(T, -1, C)
    key = query_key[:, heads:]
    yield f"norm of heads, {name}", partial(norm, key, empty(C), eps=1e-6, out=key)
    angles = empty(T, C), empty(T, C)
    yield f"rotation, {name}", partial(rotate, query_key, *angles)
    yield (
        f"rotation of the keys, {name}",
        partial(rotate, empty(T, 2 * key_heads * C).view(T, -1, C)[:, :key_heads], *angles),
    )
    both = empty(T, 2 * width)
    for activation in elementwise.ACTIVATIONS:
        yield f"{activation}, {name}", partial(elementwise.gated, both[:, :width], both[:, width:], activation)


def _empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")
