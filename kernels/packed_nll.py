"""NLL, entropy, varentropy, rank and collision of rows of logits, in one read of them.

Dimension key: S scored tokens, V vocabulary.

    z = logits.float()                                    # [S, V]
    log_p = log_softmax(z, dim=-1)
    nll = -log_p[arange(S), target]                       # nats
    entropy = -(exp(log_p) * log_p).sum(-1)
    varentropy = (exp(log_p) * (log_p + entropy[:, None]) ** 2).sum(-1)
    rank = (z > z[arange(S), target][:, None]).sum(-1)
    collision = exp(2 * log_p).sum(-1)

A row is cut into splits of some ten thousand columns, one program each. A program keeps a running maximum and the sums
below it in each of its lanes: 16 bytes a load, several loads in flight, reductions over a tile inside a thread. Only at
its end are the lanes merged, in float64 and as (weight, mean, spread), which cancels nowhere. A second kernel merges a
row's splits. Cuts and order depend on V, the dtype and whether rows are aligned, on nothing else: no atomics, equal
bits from run to run, and a row's bits depend neither on S nor on its neighbours.

A NaN or +inf logit makes the row's nll NaN. A -inf logit is a word of probability 0: it adds nothing anywhere, and as a
target its nll is +inf.

Roofline (computed, not measured): every logit is read once and nothing else of that size moves. 2,048 x 151,936 bf16
are 622 MB: 0.186 ms at an H100's 3.35 TB/s. In that time its 132 x 4 schedulers at 1.755 GHz issue 18 instructions an
element; the compiled loop takes 7 an element for the nll and 15 for all five.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import AotCase

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# exp of it is 0 in float32; it stands for -inf where 0 times -inf would be NaN.
_NO_PROBABILITY = tl.constexpr(-200.0)
# What a split hands to the merge, float64: maximum, weight, mean, spread, collision, rank.
_FIELDS = tl.constexpr(6)
# Pinned, because the default changes between Triton's versions.
_COMPILER = {"enable_fp_fusion": True}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a row is read. A tile is loads x lanes x 16 bytes; a split should be whole tiles."""

    lanes: int = 128  # one thread each
    loads: int = 4  # of 16 bytes, in flight in every thread
    split_columns: int = 32768  # so many that the merge of the lanes does not count


TILES = Tiles()


@triton.jit
def _exp(x):
    # exp2 compiles to one instruction; exp to four, for results below 1e-38.
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _split_kernel(
    logits,
    target,
    partials,
    n_columns,
    row_stride,
    SPLITS: tl.constexpr,
    SPLIT_COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    LOADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALL: tl.constexpr,
):
    """partials [S * SPLITS, FIELDS] float64: what one split of one row adds up to."""
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    program = tl.program_id(0).to(tl.int64)
    row = logits + (program // SPLITS) * row_stride
    target_logit = _target_logit(row, target + program // SPLITS, n_columns)
    begin = (program % SPLITS).to(tl.int32) * SPLIT_COLUMNS
    end = tl.minimum(begin + SPLIT_COLUMNS, n_columns)
    full_end = begin + (end - begin) // TILE * TILE

    maximum = tl.full([LANES], _LOWEST, tl.float32)
    weight = tl.zeros([LANES], tl.float32)
    first = tl.zeros([LANES], tl.float32)
    second = tl.zeros([LANES], tl.float32)
    collision = tl.zeros([LANES], tl.float32)
    rank = tl.zeros([LANES], tl.int32)
    for column in range(begin, full_end, TILE):
        full = _load_tile(row, column, end, LANES, LOADS, VECTOR, MASKED=False)
        maximum, weight, first, second, collision, rank = _add_tile(
            full, target_logit, maximum, weight, first, second, collision, rank, LOADS, ALL
        )
    if full_end < end:
        tail = _load_tile(row, full_end, end, LANES, LOADS, VECTOR, MASKED=True)
        maximum, weight, first, second, collision, rank = _add_tile(
            tail, target_logit, maximum, weight, first, second, collision, rank, LOADS, ALL
        )

    weight = weight.to(tl.float64)
    mean = first.to(tl.float64) / _divisor(weight)
    spread = tl.maximum(second.to(tl.float64) - first.to(tl.float64) * mean, 0.0)
    largest, weight, mean, spread, collision = _merge(maximum, weight, mean, spread, collision.to(tl.float64), ALL)
    out = partials + program * _FIELDS
    tl.store(out, largest.to(tl.float64))
    tl.store(out + 1, weight)
    if ALL:
        tl.store(out + 2, mean)
        tl.store(out + 3, spread)
        tl.store(out + 4, collision)
        tl.store(out + 5, tl.sum(rank, axis=0).to(tl.float64))


@triton.jit
def _load_tile(row, begin, end, LANES: tl.constexpr, LOADS: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr):
    """LOADS times [LANES, VECTOR] float32 logits, all of them requested before the first is used."""
    tile = ()
    for load in tl.static_range(LOADS):
        lane = tl.arange(0, LANES)[:, None]
        column = begin + load * LANES * VECTOR + lane * VECTOR + tl.arange(0, VECTOR)[None, :]
        z = tl.load(row + column, mask=column < end, other=float("-inf")) if MASKED else tl.load(row + column)
        tile += (z.to(tl.float32),)
    return tile


@triton.jit
def _add_tile(
    tile, target_logit, maximum, weight, first, second, collision, rank, LOADS: tl.constexpr, ALL: tl.constexpr
):
    """Add LOADS times z [LANES, VECTOR] to the lanes' sums of w, w (z - m), w (z - m)^2 and w^2; w is exp(z - m)."""
    new_maximum = maximum
    for load in tl.static_range(LOADS):
        new_maximum = tl.maximum(new_maximum, tl.max(tile[load], axis=1))
    # Clamped, for the first tile's difference overflows and is then multiplied by 0.
    change = tl.maximum(maximum - new_maximum, _NO_PROBABILITY)
    scale = _exp(change)
    if ALL:
        second = scale * (second + change * (2 * first + change * weight))
        first = scale * (first + change * weight)
        collision *= scale * scale
    weight *= scale
    for load in tl.static_range(LOADS):
        z = tile[load]
        below = z - new_maximum[:, None]
        w = _exp(below)
        weight += tl.sum(w, axis=1)
        if ALL:
            below = tl.maximum(below, _NO_PROBABILITY)
            w_below = w * below
            first += tl.sum(w_below, axis=1)
            second += tl.sum(w_below * below, axis=1)
            collision += tl.sum(w * w, axis=1)
            # The target is not above itself: both were read from the same place.
            rank += tl.sum((z > target_logit).to(tl.int32), axis=1)
    return new_maximum, weight, first, second, collision, rank


@triton.jit
def _divisor(weight):
    # What is nothing but -inf has no mean; any finite one will do.
    return tl.where(weight == 0, 1.0, weight)


@triton.jit
def _merge(maximum, weight, mean, spread, collision, ALL: tl.constexpr):
    """Parts along axis 0 -> one part.

    A part is its largest logit m (float32) and, in float64, of the weights w = exp(z - m): their sum, the weighted mean
    of z - m, the weighted sum of squares around that mean, and the sum of w^2.
    """
    largest = tl.max(maximum, axis=0)
    scale = _exp(maximum - largest).to(tl.float64)
    part_weight = weight * scale
    total = tl.sum(part_weight, axis=0)
    if ALL:
        part_mean = mean + (maximum.to(tl.float64) - largest.to(tl.float64))
        mean = tl.sum(part_weight * part_mean, axis=0) / _divisor(total)
        deviation = part_mean - mean
        spread = tl.sum(spread * scale + part_weight * deviation * deviation, axis=0)
        collision = tl.sum(collision * scale * scale, axis=0)
    return largest, total, mean, spread, collision


@triton.jit
def _target_logit(row, target, n_columns):
    """The target's logit, float32; NaN for a target that is no column, so that its nll is NaN too."""
    column = tl.load(target)
    inside = (column >= 0) & (column < n_columns)
    return tl.load(row + column, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _merge_kernel(
    logits,
    target,
    partials,
    out,
    n_columns,
    row_stride,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    ALL: tl.constexpr,
):
    """out [1 or 5, S] float32: the splits of one row, merged."""
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    target_logit = _target_logit(logits + row * row_stride, target + row, n_columns)
    split = tl.arange(0, PADDED_SPLITS)
    there = split < SPLITS
    part = partials + (row * SPLITS + split) * _FIELDS
    maximum = tl.load(part, mask=there, other=_LOWEST).to(tl.float32)
    weight = tl.load(part + 1, mask=there, other=0.0)
    mean, spread, collision = weight, weight, weight
    if ALL:
        mean = tl.load(part + 2, mask=there, other=0.0)
        spread = tl.load(part + 3, mask=there, other=0.0)
        collision = tl.load(part + 4, mask=there, other=0.0)
    largest, weight, mean, spread, collision = _merge(maximum, weight, mean, spread, collision, ALL)
    log_weight = tl.log(weight)
    nll = log_weight + (largest.to(tl.float64) - target_logit.to(tl.float64))
    out += row
    tl.store(out, nll.to(tl.float32))
    if ALL:
        rank = tl.sum(tl.load(part + 5, mask=there, other=0.0), axis=0)
        tl.store(out + n_rows, (log_weight - mean).to(tl.float32))
        tl.store(out + 2 * n_rows, (spread / weight).to(tl.float32))
        tl.store(out + 3 * n_rows, rank.to(tl.float32))
        tl.store(out + 4 * n_rows, (collision / (weight * weight)).to(tl.float32))


def packed_nll(logits: Tensor, target: Tensor, *, all_statistics: bool = False, tiles: Tiles = TILES) -> Tensor:
    """[1, S] float32 nll, or [5, S]: nll, entropy, varentropy, rank, collision (natural logarithms).

    logits: [S, V] float32, bfloat16 or float16; columns lie side by side, rows may lie further apart than V. Where they
    do not begin at multiples of 16 elements, every load is one element.
    target: [S] int64; one outside [0, V) gets a NaN nll.
    Raises ValueError for other shapes, strides and dtypes.
    """
    _validate(logits, target)
    n_rows, n_columns = logits.shape
    out = torch.empty(5 if all_statistics else 1, n_rows, dtype=torch.float32, device=logits.device)
    if n_rows == 0:
        return out
    target = target.contiguous()
    splits = triton.cdiv(n_columns, tiles.split_columns)
    partials = torch.empty(n_rows * splits, _FIELDS.value, dtype=torch.float64, device=logits.device)
    # As Triton sees it: only what is a multiple of 16 is known to be aligned.
    aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0
    vector, loads = _loads(tiles, logits.element_size(), aligned=aligned)
    with torch.cuda.device_of(logits):
        _split_kernel[(n_rows * splits,)](
            logits,
            target,
            partials,
            n_columns,
            logits.stride(0),
            SPLITS=splits,
            SPLIT_COLUMNS=tiles.split_columns,
            LANES=tiles.lanes,
            LOADS=loads,
            VECTOR=vector,
            ALL=all_statistics,
            num_warps=tiles.lanes // (64 if torch.version.hip else 32),
            **_COMPILER,
        )
        _merge_kernel[(n_rows,)](
            logits,
            target,
            partials,
            out,
            n_columns,
            logits.stride(0),
            SPLITS=splits,
            PADDED_SPLITS=triton.next_power_of_2(splits),
            ALL=all_statistics,
            num_warps=1,
            **_COMPILER,
        )
    return out


def _loads(tiles: Tiles, element_size: int, *, aligned: bool) -> tuple[int, int]:
    """Elements of a load, and loads of a thread in a tile. Neighbouring threads read neighbours either way."""
    per_load = 16 // element_size
    return (per_load, tiles.loads) if aligned else (1, tiles.loads * per_load)


def _validate(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [S, V] with V at least 1, got {tuple(logits.shape)}")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(
            f"a row's logits must lie side by side, got stride {logits.stride(1)}: call contiguous() first"
        )
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be [{len(logits)}] int64, got {tuple(target.shape)} {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, target on {target.device}")


def aot_cases(arch: int) -> list[AotCase]:
    """The kernels as the launcher starts them for V = 151,936, for the ahead-of-time report; the same on every arch."""
    splits = triton.cdiv(151936, TILES.split_columns)
    cases = []
    for dtype, element_size, aligned in (
        ("bf16", 2, True),
        ("fp16", 2, True),
        ("fp32", 4, True),
        ("bf16", 2, False),
        ("fp32", 4, False),
    ):
        vector, loads = _loads(TILES, element_size, aligned=aligned)
        types = {
            "logits": f"*{dtype}",
            "target": "*i64",
            "partials": "*fp64",
            "out": "*fp32",
            "n_columns": "i32",
            "row_stride": "i32",
        }
        for all_statistics in (False, True):
            values = {
                "SPLITS": splits,
                "PADDED_SPLITS": triton.next_power_of_2(splits),
                "SPLIT_COLUMNS": TILES.split_columns,
                "LANES": TILES.lanes,
                "LOADS": loads,
                "VECTOR": vector,
                "ALL": all_statistics,
            }
            for name, fn, num_warps in (("split", _split_kernel, TILES.lanes // 32), ("merge", _merge_kernel, 1)):
                cases.append(
                    AotCase(
                        name=f"packed_nll {name} {dtype}{' all' * all_statistics}{' unaligned' * (not aligned)}",
                        fn=fn,
                        signature={argument: types.get(argument, "constexpr") for argument in fn.arg_names},
                        constexprs={argument: values[argument] for argument in fn.arg_names if argument in values},
                        options={"num_warps": num_warps, **_COMPILER},
                        divisible=("n_columns", "row_stride") if aligned else (),
                    )
                )
    return cases
