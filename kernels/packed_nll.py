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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .final_logits import _logits, scaling

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


@triton.jit(do_not_specialize=["first_column", "vocabulary", "splits", "n_splits"])
def _split_kernel(
    logits,
    target,
    target_product,
    partials,
    bias,
    logit_scale,
    softcap,
    slope,
    first_column,
    n_columns,
    vocabulary,
    row_stride,
    splits,
    n_splits,
    SPLIT_COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    LOADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALL: tl.constexpr,
    FOUND: tl.constexpr,
):
    """partials [S, n_splits, FIELDS] float64: what one of this piece's splits of one row adds up to.

    The rows are columns [first_column, first_column + n_columns) of the vocabulary; partials begins at their splits,
    bias at their words. bias, logit_scale, softcap with its slope may be None. target_product [S] is what the row holds
    at the target, before all of these: FOUND beforehand, else written by the split that it lies in.
    """
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    program = tl.program_id(0).to(tl.int64)
    row_index = program // splits
    row = logits + row_index * row_stride
    begin = (program % splits).to(tl.int32) * SPLIT_COLUMNS
    end = tl.minimum(begin + SPLIT_COLUMNS, n_columns)
    full_end = begin + (end - begin) // TILE * TILE

    word = tl.load(target + row_index)
    column = word - first_column
    here = (column >= begin) & (column < end)
    # NaN for a target that is no word, so that its nll is NaN too.
    product = tl.load(row + column, mask=(column >= 0) & (column < n_columns), other=float("nan")).to(tl.float32)
    own = product
    if FOUND:
        product = tl.load(target_product + row_index)
    else:
        tl.store(target_product + row_index, product, mask=here | (word < 0) | (word >= vocabulary))
    own_bias = None
    if bias is not None:
        own_bias = tl.load(bias + column, mask=(word >= 0) & (word < vocabulary), other=0.0).to(tl.float32)
    target_logit = _logits(product, own_bias, logit_scale, softcap, slope)

    maximum = tl.full([LANES], _LOWEST, tl.float32)
    weight = tl.zeros([LANES], tl.float32)
    first = tl.zeros([LANES], tl.float32)
    second = tl.zeros([LANES], tl.float32)
    collision = tl.zeros([LANES], tl.float32)
    rank = tl.zeros([LANES], tl.int32)
    for at in range(begin, full_end, TILE):
        full = _load_tile(row, bias, logit_scale, softcap, slope, at, end, LANES, LOADS, VECTOR, MASKED=False)
        maximum, weight, first, second, collision, rank = _add_tile(
            full, target_logit, maximum, weight, first, second, collision, rank, LOADS, ALL
        )
    if full_end < end:
        tail = _load_tile(row, bias, logit_scale, softcap, slope, full_end, end, LANES, LOADS, VECTOR, MASKED=True)
        maximum, weight, first, second, collision, rank = _add_tile(
            tail, target_logit, maximum, weight, first, second, collision, rank, LOADS, ALL
        )

    weight = weight.to(tl.float64)
    mean = first.to(tl.float64) / _divisor(weight)
    spread = tl.maximum(second.to(tl.float64) - first.to(tl.float64) * mean, 0.0)
    largest, weight, mean, spread, collision = _merge(maximum, weight, mean, spread, collision.to(tl.float64), ALL)
    out = partials + (row_index * n_splits + program % splits) * _FIELDS
    tl.store(out, largest.to(tl.float64))
    tl.store(out + 1, weight)
    if ALL:
        above = tl.sum(rank, axis=0)
        if FOUND:
            # Found by another product, it may differ from itself in its last bit; it is not above itself all the same.
            own = _logits(own, own_bias, logit_scale, softcap, slope)
            above -= (here & (own > target_logit)).to(tl.int32)
        tl.store(out + 2, mean)
        tl.store(out + 3, spread)
        tl.store(out + 4, collision)
        tl.store(out + 5, above.to(tl.float64))


@triton.jit
def _load_tile(
    row,
    bias,
    logit_scale,
    softcap,
    slope,
    begin,
    end,
    LANES: tl.constexpr,
    LOADS: tl.constexpr,
    VECTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """LOADS times [LANES, VECTOR] float32 logits, all of them requested before the first is used."""
    tile = ()
    for load in tl.static_range(LOADS):
        lane = tl.arange(0, LANES)[:, None]
        column = begin + load * LANES * VECTOR + lane * VECTOR + tl.arange(0, VECTOR)[None, :]
        z = tl.load(row + column, mask=column < end, other=float("-inf")) if MASKED else tl.load(row + column)
        z = z.to(tl.float32)
        tile_bias = None
        if bias is not None:
            tile_bias = (tl.load(bias + column, mask=column < end, other=0.0) if MASKED else tl.load(bias + column)).to(
                tl.float32
            )
        z = _logits(z, tile_bias, logit_scale, softcap, slope)
        # A negative scale or a soft cap would make something of minus infinity.
        if MASKED and (logit_scale is not None or softcap is not None):
            z = tl.where(column < end, z, float("-inf"))
        tile += (z,)
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


@triton.jit(do_not_specialize=["vocabulary", "n_splits"])
def _merge_kernel(
    target,
    target_product,
    partials,
    bias,
    logit_scale,
    softcap,
    slope,
    out,
    vocabulary,
    n_splits,
    PADDED_SPLITS: tl.constexpr,
    ALL: tl.constexpr,
):
    """out [1 or 5, S] float32: the splits of one row, merged."""
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    product = tl.load(target_product + row)
    own_bias = None
    if bias is not None:
        word = tl.load(target + row)
        own_bias = tl.load(bias + word, mask=(word >= 0) & (word < vocabulary), other=0.0).to(tl.float32)
    target_logit = _logits(product, own_bias, logit_scale, softcap, slope)
    split = tl.arange(0, PADDED_SPLITS)
    there = split < n_splits
    part = partials + (row * n_splits + split) * _FIELDS
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
    rows = Rows.create(target.contiguous(), n_columns, [n_columns], all_statistics=all_statistics, tiles=tiles)
    with torch.cuda.device_of(logits):
        rows.add(logits, 0)
        rows.merge(out)
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What rows of logits add up to, read once and piece by piece: blocks of rows, each in pieces of the vocabulary."""

    target: Tensor  # [S] int64
    vocabulary: int
    begins: list[int]  # of the pieces, and where the last one ends: a multiple of 16 each but for that
    splits: list[int]  # begun before each piece, and all
    target_product: Tensor  # [S] float32: what the target's logit is made of
    found: bool  # target_product is known beforehand
    partials: Tensor  # [S, all splits, FIELDS] float64
    all_statistics: bool
    tiles: Tiles
    head: dict[str, Any]  # bias [V], and `final_logits.scaling`

    @classmethod
    def create(
        cls,
        target: Tensor,
        vocabulary: int,
        pieces: Sequence[int],
        *,
        all_statistics: bool,
        tiles: Tiles = TILES,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        target_product: Tensor | None = None,
    ) -> Rows:
        """pieces: columns of each, all the vocabulary together.

        target_product: None: it is taken from the rows, which all statistics can only do of a single piece.
        """
        begins = [0, *accumulate(pieces)]
        splits = [0, *accumulate(triton.cdiv(columns, tiles.split_columns) for columns in pieces)]
        device = target.device
        return cls(
            target=target,
            vocabulary=vocabulary,
            begins=begins,
            splits=splits,
            target_product=torch.empty(len(target), dtype=torch.float32, device=device)
            if target_product is None
            else target_product,
            found=target_product is not None,
            partials=torch.empty(len(target), splits[-1], _FIELDS.value, dtype=torch.float64, device=device),
            all_statistics=all_statistics,
            tiles=tiles,
            head=scaling(softcap, logit_scale) | {"bias": bias},
        )

    def add(self, logits: Tensor, begin: int, piece: int = 0) -> None:
        """logits [rows, columns] of rows [begin, begin + rows) in one piece, before bias, scale and soft cap."""
        n_rows, n_columns = logits.shape
        first, splits = self.begins[piece], self.splits[piece + 1] - self.splits[piece]
        # As Triton sees it: only what is a multiple of 16 is known to be aligned.
        aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0
        vector, loads = _loads(self.tiles, logits.element_size(), aligned=aligned)
        bias = self.head["bias"]
        _split_kernel[(n_rows * splits,)](
            logits,
            self.target[begin:],
            self.target_product[begin:],
            self.partials[begin:, self.splits[piece] :],
            None if bias is None else bias[first:],
            self.head["logit_scale"],
            self.head["softcap"],
            self.head["slope"],
            first,
            n_columns,
            self.vocabulary,
            logits.stride(0),
            splits,
            self.splits[-1],
            SPLIT_COLUMNS=self.tiles.split_columns,
            LANES=self.tiles.lanes,
            LOADS=loads,
            VECTOR=vector,
            ALL=self.all_statistics,
            FOUND=self.found,
            num_warps=self.tiles.lanes // (64 if torch.version.hip else 32),
            **_COMPILER,
        )

    def merge(self, out: Tensor) -> None:
        """out [1 or 5, S] float32, when all rows have been added in all their pieces."""
        _merge_kernel[(len(self.target),)](
            self.target,
            self.target_product,
            self.partials,
            self.head["bias"],
            self.head["logit_scale"],
            self.head["softcap"],
            self.head["slope"],
            out,
            self.vocabulary,
            self.splits[-1],
            PADDED_SPLITS=triton.next_power_of_2(self.splits[-1]),
            ALL=self.all_statistics,
            num_warps=1,
            **_COMPILER,
        )


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
