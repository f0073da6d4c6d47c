"""The element-wise work of a decoder layer, one pass over memory each: RMSNorm, rotary embedding, gated activation.

CPU tensors go to the C++ extension, CUDA tensors to Triton, everything else to plain torch (`reference.py`, where each
is defined). All compute in float32 and round once.

Dimension key: T packed tokens, D hidden size, H heads, C head width, R rotated channels, I intermediate size.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcompat.ops import reference
from fastcompat.ops.backends import NATIVE_DTYPES, choose, native, native_level


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * (offset + weight)` over the last axis of x [T, D] or [T, H, C].

    weight: [D] or [C], of x's dtype. out: where to write, x itself included; a new tensor where none is given.
    Rows may lie any distance apart; their elements adjoin.
    """
    backend = choose(backend, x)
    if out is None:
        out = torch.empty_like(x)
    if backend == "torch":
        normed = reference.rms_norm(x, weight, eps=eps, offset=offset)
        assert isinstance(normed, Tensor)
        return out.copy_(normed)
    if backend == "triton":
        _kernels().rms_norm(x, weight, eps=eps, offset=offset, out=out)
        return out
    heads = 1 if x.ndim == 2 else x.shape[1]
    native().rms_norm(
        x.data_ptr(),
        out.data_ptr(),
        0,
        0,
        weight.data_ptr(),
        [*_row_strides(x), *_row_strides(out)],
        x.shape[0],
        heads,
        x.shape[-1],
        NATIVE_DTYPES[x.dtype],
        eps,
        offset,
        native_level(backend),
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(s, rms_norm(s)) for s = x + residual, rounded to their dtype; x and residual [T, D], contiguous."""
    assert x.is_contiguous(), x.stride()
    assert residual.is_contiguous(), residual.stride()
    assert x.dtype == residual.dtype == weight.dtype, (x.dtype, residual.dtype, weight.dtype)
    backend = choose(backend, x)
    if backend == "torch":
        both = reference.rms_norm(x, weight, eps=eps, offset=offset, residual=residual)
        assert isinstance(both, tuple)
        return both
    if backend == "triton":
        pair: tuple[Tensor, Tensor] = _kernels().rms_norm(x, weight, eps=eps, offset=offset, residual=residual)
        return pair
    total, out = torch.empty_like(x), torch.empty_like(x)
    native().rms_norm(
        x.data_ptr(),
        out.data_ptr(),
        residual.data_ptr(),
        total.data_ptr(),
        weight.data_ptr(),
        [*_row_strides(x), *_row_strides(out)],
        x.shape[0],
        1,
        x.shape[1],
        NATIVE_DTYPES[x.dtype],
        eps,
        offset,
        native_level(backend),
        torch.get_num_threads(),
    )
    return total, out


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotary embedding of the first R channels of every head of x [T, H, C], in place; cos and sin [T, R].

    Halves against each other, as Hugging Face's `rotate_half`. Tokens and heads may lie any distance apart; cos and
    sin, of one dtype, may be more precise than x.
    """
    backend = choose(backend, x)
    if backend.startswith("native") and cos.shape[1] > native().max_rotated:
        backend = "torch"
    if backend == "torch":
        return x.copy_(reference.rotate(x, cos, sin))
    if backend == "triton":
        _kernels().rotate_(x, cos, sin)
        return x
    native().rotate(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        list(_row_strides(x)),
        x.shape[0],
        x.shape[1],
        cos.shape[1],
        NATIVE_DTYPES[x.dtype],
        NATIVE_DTYPES[cos.dtype],
        native_level(backend),
        torch.get_num_threads(),
    )
    return x


def gated(gate: Tensor, up: Tensor, activation: str, *, backend: str | None = None) -> Tensor:
    """`activation(gate) * up`, [T, I]; the activation is "silu" or "gelu_tanh".

    Both may be halves of one product: their rows lie equally far apart.
    """
    backend = choose(backend, gate)
    if backend == "torch":
        return reference.gated(gate, up, activation)
    if backend == "triton":
        result: Tensor = _kernels().gated(gate, up, activation)
        return result
    out = torch.empty(gate.shape, dtype=gate.dtype)
    native().gated(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        gate.shape[0],
        gate.stride(0),
        gate.shape[1],
        NATIVE_DTYPES[gate.dtype],
        activation,
        native_level(backend),
        torch.get_num_threads(),
    )
    return out


def _row_strides(x: Tensor) -> tuple[int, int]:
    """Elements between tokens and between heads."""
    return (x.stride(0), x.stride(1)) if x.ndim == 3 else (x.stride(0), 0)


@functools.cache
def _kernels() -> Any:
    module: ModuleType = import_module("fastcompat.kernels.elementwise")
    return module
