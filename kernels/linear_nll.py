"""NLL, entropy, varentropy, rank and collision of tokens under an LM head, with no [S, V] logits anywhere.

Dimension key: S scored tokens, D hidden size, V vocabulary.

    z = (hidden.float() @ weight.float().T + bias) * logit_scale        # [S, V], float32
    z = softcap * tanh(z / softcap)                                     # where softcap is given
    log_p = log_softmax(z, dim=-1)
    nll = -log_p[arange(S), target]                                     # nats
    entropy = -(exp(log_p) * log_p).sum(-1)
    varentropy = (exp(log_p) * (log_p + entropy[:, None]) ** 2).sum(-1)
    rank = (z > z[arange(S), target][:, None]).sum(-1)
    collision = exp(2 * log_p).sum(-1)

Three kernels: the targets' logits; sums over every (tile of tokens, range of the vocabulary); the merge of the ranges.
A program of the second multiplies one tile of weights after the other, and while a tile of logits is in registers folds
it into LANES running (peak, sums below it) a token. The cuts of V depend on V alone and every merge has one order: no
atomics, equal bits from run to run, and a token's bits depend neither on S nor on its neighbours.

A NaN or +inf logit makes a token's nll non-finite. A -inf logit is a word of probability 0: it adds nothing anywhere,
and as a target its nll is +inf.

Roofline (computed, not measured): an H100, bf16, S 8192, D 4096, V 128,256. 2 S D V = 8.6 Tflop, 10.8 ms at a plain
product's 800 Tflop/s. 64 x 501 tiles of 128 x 256; 63 ranges x 64 token tiles: 4,032 programs, 30.5 waves of 132. HBM:
all weights for every 16 token tiles, 4.2 GB, and hidden, 0.07 GB: 1.3 ms at 3.35 TB/s. L2 to shared memory: 3.1 MB a
tile, 101 GB, 9.3 TB/s at that rate: the limit to watch. Epilogue a tile: at least 2,048 cycles of exp2 for 65,536 of
tensor cores, not overlapped; about twice that for all five. Partial sums: 8 bytes a token and range, all five 24.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .final_logits import _logits, scaling
from .linear_pieces import linear_nll_in_pieces
from .linear_tiles import MAX_RANGES, Pieces, Tiles, serving, why_not

# The interpreter multiplies bfloat16 wrongly: there, operands become float32 first.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Token tiles that walk the same weights at one time: with 132 programs 16 x 8 ranges, the least to hold in L2.
_GROUP = tl.constexpr(16)
_LOG2_E = tl.constexpr(1.4426950408889634)
# The peak of nothing. Finite, because the difference of two infinities would be NaN.
_LOWEST = tl.constexpr(-1e38)
# exp2 of it is 0; it stands for -inf where 0 times -inf would be NaN.
_NO_MASS = tl.constexpr(-1e4)
# Below every mass but 0.
_TINY = tl.constexpr(1e-30)
_MERGE_CONSTANTS = {"TOKENS": 16, "RANGES": MAX_RANGES}
_MERGE_OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["S", "V", "range_tiles"])
def _range_kernel(
    hidden, weight, bias, logit_scale, softcap, slope, target_logit, partials, S, V, D, range_tiles,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, LANES: tl.constexpr, SLICES: tl.constexpr,
    FLATTEN: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr
):  # fmt: skip
    """partials [2 or 6, ranges, S] float32: the state (see `_fold`) of BLOCK_S tokens over one range of the vocabulary.

    hidden and weight are pointers, or tensor descriptors with blocks [BLOCK_S, BLOCK_D] and [BLOCK_V, BLOCK_D]. bias,
    logit_scale, softcap with its slope may be None. target_logit None: nll only.
    """
    tl.assume(D > 0)
    n_token_tiles = tl.cdiv(S, BLOCK_S)
    n_ranges = tl.cdiv(tl.cdiv(V, BLOCK_V), range_tiles)
    group = tl.program_id(0) // (_GROUP * n_ranges)
    within = tl.program_id(0) % (_GROUP * n_ranges)
    group_tiles = tl.minimum(n_token_tiles - group * _GROUP, _GROUP)
    s0 = (group * _GROUP + within % group_tiles) * BLOCK_S
    part = within // group_tiles

    token = tl.arange(0, BLOCK_S)
    inside = token < S - s0
    # Rows past the end repeat the last one: no load needs a mask.
    hidden_row = tl.minimum(token, S - 1 - s0) * D
    hidden_tile = hidden
    if not DESCRIPTORS:
        hidden_tile = hidden + s0.to(tl.int64) * D
    zero = tl.zeros((BLOCK_S, LANES), tl.float32)
    state = (zero + _LOWEST, zero)
    z_target = None
    if target_logit is not None:
        state += (zero, zero, zero, zero)
        z_target = tl.load(target_logit + s0 + token, mask=inside, other=0.0)

    full_tiles = V // BLOCK_V
    first = part * range_tiles
    for tile in tl.range(first, tl.minimum(first + range_tiles, full_tiles), flatten=FLATTEN):
        state = _add_tile(
            state, tile, hidden_tile, hidden_row, weight, bias, logit_scale, softcap, slope, z_target, s0, V, D,
            BLOCK_V, BLOCK_D, LANES, SLICES, EVEN_D, DESCRIPTORS, False
        )  # fmt: skip
    # The last, partial tile apart: a mask in the loop costs registers, and a branch there makes ptxas serialise wgmma.
    if not EVEN_V and part == n_ranges - 1:
        state = _add_tile(
            state, full_tiles, hidden_tile, hidden_row, weight, bias, logit_scale, softcap, slope, z_target, s0, V, D,
            BLOCK_V, BLOCK_D, LANES, SLICES, EVEN_D, DESCRIPTORS, True
        )  # fmt: skip

    out = partials + part.to(tl.int64) * S + s0 + token
    field = n_ranges.to(tl.int64) * S
    merged = _merge(state)
    for f in tl.static_range(len(merged)):
        tl.store(out + f * field, merged[f], mask=inside)


@triton.jit
def _add_tile(
    state, tile, hidden, hidden_row, weight, bias, logit_scale, softcap, slope, z_target, s0, V, D,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, LANES: tl.constexpr, SLICES: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """State with the words of one tile of the vocabulary added; in the TAIL, rows past the end repeat the last one."""
    v0 = tile * BLOCK_V
    row = tl.arange(0, BLOCK_V)
    if TAIL:
        row = tl.minimum(row, V - 1 - v0)
    if not DESCRIPTORS:
        weight += v0.to(tl.int64) * D
    product = _product(hidden, hidden_row, weight, row * D, s0, v0, D, BLOCK_D, EVEN_D, DESCRIPTORS)
    return _fold(state, product, bias, logit_scale, softcap, slope, z_target, v0, V, LANES, SLICES, TAIL)


@triton.jit
def _product(
    hidden, hidden_row, weight, weight_row, s0, v0, D,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """[BLOCK_S, BLOCK_V] float32: rows at hidden + hidden_row [BLOCK_S] times rows at weight + weight_row [BLOCK_V]."""
    column = tl.arange(0, BLOCK_D)
    product = tl.zeros((hidden_row.shape[0], weight_row.shape[0]), dtype=tl.float32)
    for d0 in range(0, D, BLOCK_D):
        if DESCRIPTORS:
            h = hidden.load([s0, d0])
            w = weight.load([v0, d0])
        elif EVEN_D:
            h = tl.load(hidden + d0 + (hidden_row[:, None] + column[None, :]))
            w = tl.load(weight + d0 + (weight_row[:, None] + column[None, :]))
        else:
            inside = (column < D - d0)[None, :]
            h = tl.load(hidden + d0 + (hidden_row[:, None] + column[None, :]), mask=inside, other=0.0)
            w = tl.load(weight + d0 + (weight_row[:, None] + column[None, :]), mask=inside, other=0.0)
        if _INTERPRETED:
            h, w = h.to(tl.float32), w.to(tl.float32)
        product = tl.dot(h, tl.trans(w), product, input_precision="ieee")
    return product


@triton.jit
def _fold(
    state, product, bias, logit_scale, softcap, slope, z_target, v0, V,
    LANES: tl.constexpr, SLICES: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """State with one more tile, [BLOCK_S, columns from v0 on], added in SLICES slices to bound what is live at once.

    With y = z log2(e), state is per token and lane [BLOCK_S, LANES]: peak = max y; mass = sum of e = 2^(y - peak); and
    for all five: moment = sum of e (y - peak); spread = sum of e (y - mean)^2, which unlike a sum of squares below the
    peak cancels nowhere; square = sum of e^2; above = number of z above the target's.
    """
    if SLICES > 1:
        half: tl.constexpr = product.shape[1] // 2
        low, high = tl.split(tl.permute(tl.reshape(product, (product.shape[0], 2, half)), (0, 2, 1)))
        state = _fold(state, low, bias, logit_scale, softcap, slope, z_target, v0, V, LANES, SLICES // 2, TAIL)
        state = _fold(state, high, bias, logit_scale, softcap, slope, z_target, v0 + half, V, LANES, SLICES // 2, TAIL)
    else:
        word = tl.arange(0, product.shape[1])
        if bias is not None:
            bias = tl.load(bias + v0 + word, mask=(word < V - v0) if TAIL else None).to(tl.float32)[None, :]
        z = _logits(product, bias, logit_scale, softcap, slope)
        if TAIL:
            z = tl.where((word < V - v0)[None, :], z, float("-inf"))
        # Column pairs are dealt to lanes as tensor cores deal them to threads: sums stay within a thread.
        z = tl.reshape(z, (z.shape[0], z.shape[1] // (2 * LANES), LANES, 2))
        peak = tl.maximum(state[0], tl.max(tl.max(z, axis=1), axis=2) * _LOG2_E)
        shift = state[0] - peak
        shrink = tl.exp2(shift)
        y = tl.fma(z, _LOG2_E, -peak[:, None, :, None])
        e = tl.exp2(y)
        new_mass = _sum(e)
        mass = tl.fma(state[1], shrink, new_mass)
        if z_target is None:
            state = (peak, mass)
        else:
            y = tl.maximum(y, _NO_MASS)
            new_moment = _sum(e * y)
            new_mean = new_moment / tl.maximum(new_mass, _TINY)
            x = y - new_mean[:, None, :, None]
            old_mass = state[1] * shrink
            old_moment = shrink * tl.fma(state[1], shift, state[2])
            apart = new_mean - old_moment / tl.maximum(old_mass, _TINY)
            between = apart * apart * (old_mass * new_mass / tl.maximum(mass, _TINY))
            state = (
                peak,
                mass,
                old_moment + new_moment,
                tl.fma(state[3], shrink, between + _sum(e * x * x)),
                tl.fma(state[4], shrink * shrink, _sum(e * e)),
                state[5] + _sum((z > z_target[:, None, None, None]).to(tl.float32)),
            )
    return state


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, axis=1), axis=2)


@triton.jit
def _merge(state):
    """State [rows, parts] -> state [rows], in the state's own precision."""
    peak = tl.max(state[0], axis=1)
    shift = state[0] - peak[:, None]
    shrink = tl.exp2(shift)
    part_mass = state[1] * shrink
    mass = tl.sum(part_mass, axis=1)
    merged = (peak, mass)
    if len(state) > 2:
        part_mean = tl.maximum(shift + state[2] / tl.maximum(state[1], _TINY), _NO_MASS)
        moment = tl.sum(part_mass * part_mean, axis=1)
        apart = part_mean - (moment / tl.maximum(mass, _TINY))[:, None]
        spread = tl.sum(shrink * state[3] + part_mass * apart * apart, axis=1)
        square = tl.sum(shrink * shrink * state[4], axis=1)
        merged = (peak, mass, moment, spread, square, tl.sum(state[5], axis=1))
    return merged


@triton.jit(do_not_specialize=["S", "V"])
def _target_kernel(
    hidden, weight, bias, logit_scale, softcap, slope, target, target_logit, S, V, D,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr
):  # fmt: skip
    """target_logit [S] float32: bit for bit what the range kernel computes, so that no target is above itself.

    A tile of tokens times the gathered rows of their own targets; the diagonal is wanted. A target outside [0, V) gets
    NaN.
    """
    tl.assume(D > 0)
    TOKENS: tl.constexpr = min(BLOCK_S, BLOCK_V)
    s0 = tl.program_id(0) * TOKENS
    # The tile has the range kernel's shape, so what lies past TOKENS repeats.
    hidden_row = tl.minimum(tl.arange(0, BLOCK_S) % TOKENS, S - 1 - s0) * D
    word = tl.load(target + s0 + tl.minimum(tl.arange(0, BLOCK_V) % TOKENS, S - 1 - s0))
    weight_row = tl.minimum(tl.maximum(word, 0), V - 1) * D
    hidden += s0.to(tl.int64) * D
    product = _product(hidden, hidden_row, weight, weight_row, 0, 0, D, BLOCK_D, EVEN_D, False)
    diagonal = tl.arange(0, BLOCK_S)[:, None] == tl.arange(0, BLOCK_V)[None, :]
    own = tl.sum(tl.where(diagonal, product, 0.0), axis=1)

    token = tl.arange(0, BLOCK_S)
    inside = (token < TOKENS) & (token < S - s0)
    word = tl.load(target + s0 + token, mask=inside, other=0)
    known = (word >= 0) & (word < V)
    if bias is not None:
        bias = tl.load(bias + word, mask=known, other=0.0).to(tl.float32)
    z = _logits(own, bias, logit_scale, softcap, slope)
    tl.store(target_logit + s0 + token, tl.where(known, z, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["S", "n_ranges"])
def _merge_kernel(
    partials, target_logit, out, S, n_ranges, ALL: tl.constexpr, TOKENS: tl.constexpr, RANGES: tl.constexpr
):
    """out [1 or 5, S] float32: the states of at most RANGES ranges merged in float64, and what follows from them."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < S
    token = tl.minimum(token, S - 1)
    part = tl.arange(0, RANGES)
    at = partials + part.to(tl.int64)[None, :] * S + token[:, None]
    field = n_ranges.to(tl.int64) * S
    there = (part < n_ranges)[None, :]
    state = (tl.load(at, mask=there, other=_LOWEST).to(tl.float64),)
    for f in tl.static_range(1, 6 if ALL else 2):
        state += (tl.load(at + f * field, mask=there, other=0.0).to(tl.float64),)
    state = _merge(state)
    z_target = tl.load(target_logit + token).to(tl.float64)
    # y is z times float32(log2 e), so this and not log2 e turns it back.
    log2_e: tl.constexpr = 1.44269502162933349609375
    log2_mass = tl.log2(state[1])
    out += token
    tl.store(out, ((state[0] + log2_mass) / log2_e - z_target).to(tl.float32), mask=inside)
    if ALL:
        mass = state[1]
        tl.store(out + S, ((log2_mass - state[2] / mass) / log2_e).to(tl.float32), mask=inside)
        tl.store(out + 2 * S, (state[3] / mass / (log2_e * log2_e)).to(tl.float32), mask=inside)
        tl.store(out + 3 * S, state[5].to(tl.float32), mask=inside)
        tl.store(out + 4 * S, (state[4] / mass / mass).to(tl.float32), mask=inside)


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    all_statistics: bool = False,
    tiles: Tiles | Pieces | None = None,
) -> Tensor:
    """[1, S] float32 nll, or [5, S]: nll, entropy, varentropy, rank, collision (natural logarithms).

    hidden: [S, D]; weight: [V, D], same dtype (bfloat16, float16, float32); target: [S] int64, one outside [0, V) gets
    a NaN nll; bias: [V] of any float dtype, or None. All contiguous, on one device.
    tiles: other than what serves on this GPU, one of `linear_tiles.variants`; Pieces leave the product to cuBLAS.
    Raises ValueError for tensors that are apart or not contiguous, and for tiles that D does not suit;
    `fastcompat.linear_nll` checks all the rest.
    """
    tensors = [hidden, weight, target] if bias is None else [hidden, weight, target, bias]
    if len({tensor.device for tensor in tensors}) > 1 or not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(
            "hidden, weight, target, bias must be contiguous and on one device: .contiguous(), .to(device)"
        )
    (S, D), V = hidden.shape, len(weight)
    tiles = tiles or serving(hidden.dtype, hidden.device, D)
    problem = why_not(tiles, hidden.dtype, D)
    if problem:
        raise ValueError(f"{problem}: leave tiles out, or name others")
    empty = partial(torch.empty, dtype=torch.float32, device=hidden.device)
    out = empty(5 if all_statistics else 1, S)
    if S == 0:
        return out
    if isinstance(tiles, Pieces):
        return linear_nll_in_pieces(
            hidden,
            weight,
            target,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            all_statistics=all_statistics,
            pieces=tiles,
        )
    range_tiles, n_ranges = tiles.ranges(V)
    partials = empty(6 if all_statistics else 2, n_ranges, S)
    values = tiles.constants(D, V) | _MERGE_CONSTANTS | {"ALL": all_statistics}
    values |= dict(hidden=hidden, weight=weight, bias=bias, target=target)
    values |= dict(target_logit=empty(S), partials=partials, out=out)
    values |= dict(S=S, V=V, D=D, range_tiles=range_tiles, n_ranges=n_ranges)
    values |= scaling(softcap, logit_scale)
    range_values = values | tiles.operands(hidden, weight) | ({} if all_statistics else {"target_logit": None})
    with torch.cuda.device_of(hidden):
        _launch(_target_kernel, triton.cdiv(S, min(tiles.block_s, tiles.block_v)), values, tiles.options())
        _launch(_range_kernel, triton.cdiv(S, tiles.block_s) * n_ranges, range_values, tiles.options())
        _launch(_merge_kernel, triton.cdiv(S, _MERGE_CONSTANTS["TOKENS"]), values, _MERGE_OPTIONS)
    return out


def _launch(kernel: Any, programs: int, values: dict[str, Any], options: dict[str, Any]) -> None:
    kernel[(programs,)](**{name: values[name] for name in kernel.arg_names}, **options)
