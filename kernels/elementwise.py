"""The steps between a decoder's products: RMS norm with a residual, rotary embedding, gated activation.

Dimension key: T packed tokens, D hidden size, H heads, C head width, R rotated channels, I inner width of an MLP.

    s = x + residual                                                         # [T, D], rounded to x's dtype
    rms_norm = s * rsqrt((s * s).mean(-1, keepdim=True) + eps) * (offset + weight)
    a, b = x[..., : R / 2], x[..., R / 2 : R]                                # of [T, H, C]; cos and sin [T, 1, R]
    rotate = cat([a * cos[..., : R / 2] - b * sin[..., : R / 2],
                  b * cos[..., R / 2 :] + a * sin[..., R / 2 :], x[..., R :]])
    gated = silu(gate) * up, or gelu_tanh(gate) * up                         # [T, I]

Everything is computed in float32 and rounded once. What is read is read once and what is written is written once, 16
bytes a load where rows begin at multiples of 16 elements, else one element. A program has one row of D, or as many
short ones as fill it; a few heads of a few tokens, whose angles it reads once; a piece of a row of I. A row's bits
depend on its length, its dtype and that alignment, neither on T nor on its neighbours.

Roofline (computed, not measured): nothing but bytes. 16,384 tokens of Qwen2.5-0.5B in bf16 at an H100's 3.35 TB/s:
rms_norm of D 896 with a residual, two read and two written, 117 MB in 35 microseconds; rotate_ of 14 + 2 heads of 64
channels in place with cos and sin, 71 MB in 21; gated with I 4,864, two read and one written, 478 MB in 143.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
# The interpreter cuts bfloat16 off, where a GPU rounds to the nearest.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Pinned, because the default changes between Triton's versions.
_COMPILER = {"enable_fp_fusion": True}
_WARP = 64 if torch.version.hip else 32
_THREADS = 128  # of a program, save for long rows of rms_norm
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384  # of a row of rms_norm, which stays in the registers of one program: 16 each of 1,024 threads
ACTIVATIONS = ("silu", "gelu_tanh")


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x float32 as dtype, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    sums,
    out,
    n_rows,
    eps,
    offset,
    x_stride,
    x_head_stride,
    residual_stride,
    out_stride,
    out_head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out and, where there is a residual, sums [T, WIDTH]: ROWS rows, of which HEADS are a token's."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = (row < n_rows) & (column < WIDTH)
    token = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    s = tl.load(x + token * x_stride + head * x_head_stride + column, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + token * residual_stride + column, mask=there, other=0.0).to(tl.float32)
        stored = _rounded(s, sums.dtype.element_ty)
        tl.store(sums + token * WIDTH + column, stored, mask=there)
        s = stored.to(tl.float32)
    scale = 1.0
    if weight is not None:
        # Of the rows' shape, so that every thread loads what it needs; as [1, BLOCK] it would take shared memory.
        weight += tl.broadcast_to(column, [ROWS, BLOCK])
        scale = offset + tl.load(weight, mask=column < WIDTH, other=0.0).to(tl.float32)
    y = s * tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / WIDTH + eps) * scale
    out += token * out_stride + head * out_head_stride + column
    tl.store(out, _rounded(y, out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["n_tokens"])
def _rotate_kernel(
    x,
    cos,
    sin,
    n_tokens,
    stride,
    head_stride,
    cos_stride,
    sin_stride,
    N_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """HEADS heads of TOKENS tokens, in place; HALF = R / 2 channels against the next HALF."""
    GROUPS: tl.constexpr = (N_HEADS + HEADS - 1) // HEADS
    program = tl.program_id(0)
    token = (program // GROUPS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    there = (token < n_tokens) & (channel < HALF)
    head = program % GROUPS * HEADS
    x += token * stride + head.to(tl.int64) * head_stride + channel
    # All of them are requested before the first is used.
    loaded = ()
    for h in tl.static_range(HEADS):
        mask = there & (head + h < N_HEADS)
        loaded += (tl.load(x + h * head_stride, mask=mask), tl.load(x + h * head_stride + HALF, mask=mask))
    cos += token * cos_stride + channel
    sin += token * sin_stride + channel
    cos_a = tl.load(cos, mask=there).to(tl.float32)
    sin_a = tl.load(sin, mask=there).to(tl.float32)
    cos_b = tl.load(cos + HALF, mask=there).to(tl.float32)
    sin_b = tl.load(sin + HALF, mask=there).to(tl.float32)
    for h in tl.static_range(HEADS):
        mask = there & (head + h < N_HEADS)
        a = loaded[2 * h].to(tl.float32)
        b = loaded[2 * h + 1].to(tl.float32)
        head_x = x + h * head_stride
        tl.store(head_x, _rounded(a * cos_a - b * sin_a, x.dtype.element_ty), mask=mask)
        tl.store(head_x + HALF, _rounded(b * cos_b + a * sin_b, x.dtype.element_ty), mask=mask)


@triton.jit
def _gated_kernel(gate, up, out, width, gate_stride, up_stride, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row of out [T, width]."""
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    g = tl.load(gate + row * gate_stride + column, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=there, other=0.0).to(tl.float32)
    # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), which does not cancel where tanh is nearly -1.
    z = g if SILU else (g + 0.044715 * g * g * g) * (2 * _SQRT_2_OVER_PI)
    # Infinite where g is very negative; the quotient then is 0, as it should be.
    acted = g / (1 + tl.exp2(z * -_LOG2_E))
    tl.store(out + row * width + column, _rounded(acted * u, out.dtype.element_ty), mask=there)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rows of x over their root mean square, times offset + weight; with a residual (x + residual, that sum's norm).

    x: [T, D] or, normalised head by head, [T, H, C]: float32, bfloat16 or float16, a row's elements side by side, rows
    and heads anywhere; D or C at most 16,384.
    weight: [D] or [C], of any of these dtypes; None scales nothing, whatever the offset.
    residual: [T, D] of x's dtype; x is [T, D] then. The sum is rounded to x's dtype before its norm is computed.
    out: of x's shape and dtype, x itself for a norm in place; by default a new tensor.
    Raises ValueError for other shapes, strides and dtypes.
    """
    if x.ndim not in (2, 3) or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x must be [T, D] or [T, H, C], rows of 1 to {MAX_WIDTH} elements, got {tuple(x.shape)}")
    n_heads, width = x.shape[1] if x.ndim == 3 else 1, x.shape[-1]
    _check("x", x, x.shape, x.device)
    if weight is not None:
        _check("weight", weight, (width,), x.device)
    if residual is not None:
        if x.ndim == 3:
            raise ValueError(f"x must be [T, D] where there is a residual, got {tuple(x.shape)}: add it beforehand")
        _check("residual", residual, x.shape, x.device, x.dtype)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        _check("out", out, x.shape, x.device, x.dtype, written=True)
    sums = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_rows = len(x) * n_heads
    if n_rows:
        tile, num_warps = _norm_tile(width)
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
                x,
                residual,
                weight,
                sums,
                out,
                n_rows,
                float(eps),
                float(offset),
                x.stride(0),
                x.stride(-2),
                residual.stride(0) if residual is not None else 0,
                out.stride(0),
                out.stride(-2),
                HEADS=n_heads,
                WIDTH=width,
                **tile,
                num_warps=num_warps,
                **_COMPILER,
            )
    return out if sums is None else (sums, out)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its first R <= C channels rotated, in place: channel i < R / 2 against channel i + R / 2. Returns x.

    x: [T, H, C] float32, bfloat16 or float16, a head's channels side by side, tokens and heads anywhere: queries and
    keys that lie one after the other in a joined product are one x of H + K heads.
    cos, sin: [T, R] of any of these dtypes, a row's elements side by side, R even.
    Raises ValueError for other shapes, strides and dtypes.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be [T, H, C], got {tuple(x.shape)}")
    _check("x", x, x.shape, x.device, written=True)
    n_tokens, n_heads, width = x.shape
    rotated = cos.shape[-1] if cos.ndim else 0
    if rotated % 2 or not 2 <= rotated <= width:
        raise ValueError(f"cos must be [T, R], R even and 2 to C = {width}, got {tuple(cos.shape)}")
    for name, angles in (("cos", cos), ("sin", sin)):
        _check(name, angles, (n_tokens, rotated), x.device)
    if n_tokens and n_heads:
        tile, num_warps = _rotation_tile(n_heads, rotated, x.element_size())
        programs = triton.cdiv(n_tokens, tile["TOKENS"]) * triton.cdiv(n_heads, tile["HEADS"])
        with torch.cuda.device_of(x):
            _rotate_kernel[(programs,)](
                x,
                cos,
                sin,
                n_tokens,
                x.stride(0),
                x.stride(1),
                cos.stride(0),
                sin.stride(0),
                N_HEADS=n_heads,
                **tile,
                num_warps=num_warps,
                **_COMPILER,
            )
    return x


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """[T, I] act(gate) * up, contiguous; the activation is "silu" or "gelu_tanh".

    gate, up: [T, I] of one dtype, float32, bfloat16 or float16, a row's elements side by side, rows anywhere: the
    halves of a joined [T, 2 I] product.
    Raises ValueError for other shapes, strides, dtypes and activations.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate.ndim != 2:
        raise ValueError(f"gate must be [T, I], got {tuple(gate.shape)}")
    _check("gate", gate, gate.shape, gate.device)
    _check("up", up, gate.shape, gate.device, gate.dtype)
    n_tokens, width = gate.shape
    out = torch.empty(n_tokens, width, dtype=gate.dtype, device=gate.device)
    if out.numel():
        tile, num_warps = _gated_tile()
        with torch.cuda.device_of(gate):
            _gated_kernel[(n_tokens * triton.cdiv(width, tile["BLOCK"]),)](
                gate,
                up,
                out,
                width,
                gate.stride(0),
                up.stride(0),
                SILU=activation == "silu",
                **tile,
                num_warps=num_warps,
                **_COMPILER,
            )
    return out


def _norm_tile(width: int) -> tuple[dict[str, int], int]:
    """A program's rows, and its warps: 16 elements a thread."""
    block = max(16, triton.next_power_of_2(width))
    elements = max(16 * _THREADS, block)
    return {"ROWS": elements // block, "BLOCK": block}, elements // (16 * _WARP)


def _rotation_tile(n_heads: int, rotated: int, element_size: int) -> tuple[dict[str, int], int]:
    """A program's heads and tokens, and its warps: two loads of 16 bytes a thread and head, for up to four heads."""
    half = rotated // 2
    block = max(8, triton.next_power_of_2(half))
    tokens = max(1, _THREADS * 16 // (element_size * block))
    heads = triton.cdiv(n_heads, triton.cdiv(n_heads, 4))
    return {"HALF": half, "TOKENS": tokens, "HEADS": heads, "BLOCK": block}, _THREADS // _WARP


def _gated_tile() -> tuple[dict[str, int], int]:
    """A program's columns, and its warps: 8 elements a thread."""
    return {"BLOCK": 8 * _THREADS}, _THREADS // _WARP


def _check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    written: bool = False,
) -> None:
    """The shape, on the device, of that dtype or of any that the kernels take, its last axis side by side."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in ((dtype,) if dtype else _DTYPES):
        dtypes = str(dtype) if dtype else "float32, bfloat16 or float16"
        raise ValueError(f"{name} must be {list(shape)} {dtypes}, got {list(tensor.shape)} {tensor.dtype}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}'s last axis must lie side by side, got strides {tensor.stride()}: call contiguous() first"
        )
    if written and any(size > 1 and stride == 0 for size, stride in zip(shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name} is written and must not be expanded, got strides {tensor.stride()}: call clone() first"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the others on {device}: move it with .to()")
