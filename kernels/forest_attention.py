"""Attention over a prefix forest.

Dimension key: T packed tokens (keys), Q queries, H query heads, K key heads, C head width, Cv width of values.

    z = query @ key.T * scaling                                      # [H, Q, T], heads of a group share a key head
    z = softcap * tanh(z / softcap)                                  # where softcap is given
    z = where((j <= i) & (i < subtree_end[j]) & (position_ids[i] - position_ids[j] < sliding_window), z, -inf)
    out = (softmax([z, sinks]) without the sink's column) @ value    # [Q, H, Cv]

A program has a tile of queries of one head, or of fewer queries of all heads of a group (Tiles.grouped), and walks the
blocks of keys that they see (`forest_plan.summarise`): first those seen in full, without a mask, then the others. The
softmax is online and in base 2: a running peak and the sum below it, float32; probabilities are rounded to the values'
dtype for their product, float32 stays float32. The longest lists start first. Lists and their order depend on the pack
alone and nothing is atomic: equal bits from run to run. A query's bits do depend on where its pack's blocks lie, by the
rounding of one online softmax.

A key that a query does not see has probability 0, but 0 times a value that is not finite is NaN: such a value spoils
the queries of the blocks that it lies in, not its own path only.

Roofline (computed, nothing here has run on a GPU): 2 (C + Cv) flop a pair and head. Of T^2, packs of about 32k tokens
of the benchmark's workloads attend 0.65% (`generators`) to 7.7% (`reasoning`), and their lists hold 1.4% to 8.4%, 15%
to 85% of it in full. Llama-3-8B's 32 heads of 128: 0.23 to 1.04 Tflop a layer for the lists, 0.3 to 1.3 ms at a plain
product's 800 Tflop/s on an H100; all of T^2 would be 17 and 12. A 128 x 64 tile of C 128: 1,024 cycles of tensor cores,
512 of exp2, which nothing but another program's products hides, and at 8 warps of 176 registers a multiprocessor has
one program. Keys and values from L2: 32 KiB a tile, 6.2 TB/s at that rate. Look first at these two, then at short
lists: on `generators` two pipelines are filled for one block without and six with a mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forest_plan import MAX_WIDTH, QUERY_BLOCK, Summary, Tiles, serving, summarise, variants

# The interpreter multiplies bfloat16 wrongly: there, operands become float32 first.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_LOG2_E = tl.constexpr(1.4426950408889634)
# The peak of nothing. Finite, because the difference of two infinities would be NaN.
_LOWEST = tl.constexpr(-1e38)
# Between tokens, in elements: offsets within a tile are 32 bits.
MAX_TOKEN_STRIDE = (1 << 31) // QUERY_BLOCK


@triton.jit(do_not_specialize=["T", "Q", "heads", "group"])
def _attention_kernel(
    query, key, value, out, sinks, key_first, key_end, key_position, query_position, order, begin, full_end, key_blocks,
    query_head, query_token, key_head, key_token, value_head, value_token, T, Q, heads, group, scale, slope, window,
    BLOCK_Q: tl.constexpr, HEADS: tl.constexpr, QUERY_PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
    KEY_PARTS: tl.constexpr, C: tl.constexpr, C_FIRST: tl.constexpr, C_REST: tl.constexpr, CV: tl.constexpr,
    CV_FIRST: tl.constexpr, CV_REST: tl.constexpr
):  # fmt: skip
    """out [Q, H, Cv]: BLOCK_Q rows a program, which are queries of HEADS heads of one group; what is left over is idle.

    None: sinks, key_first, slope (softcap), window.

    scale: of z to base 2; slope: what makes z, without scaling, the argument of the soft cap.
    """
    QUERIES: tl.constexpr = BLOCK_Q // HEADS
    head = tl.program_id(0) % (heads // HEADS) * HEADS
    part = tl.program_id(0) // (heads // HEADS)
    block = tl.load(order + part // QUERY_PARTS)
    q0 = (block * QUERY_PARTS + part % QUERY_PARTS) * QUERIES
    start = tl.load(begin + block)
    n_full = (tl.load(full_end + block) - start).to(tl.int32)
    n_blocks = (tl.load(begin + block + 1) - start).to(tl.int32)
    key_blocks += start

    # Queries past the end repeat the last one: no load needs a mask.
    line = tl.arange(0, BLOCK_Q)
    row = tl.minimum(line, Q - 1 - q0)
    if HEADS > 1:
        row = tl.minimum(line // HEADS, tl.minimum(Q - q0, QUERIES) - 1)
    slot = q0 + row
    query += head.to(tl.int64) * query_head + q0.to(tl.int64) * query_token
    q = _load_rows(query, row * query_token + line % HEADS * query_head, C, C_FIRST, C_REST)
    key += (head // group).to(tl.int64) * key_head
    value += (head // group).to(tl.int64) * value_head
    if window is not None:
        query_position = tl.load(query_position + slot)

    peak = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head + (line % HEADS if HEADS > 1 else 0)).to(tl.float32) * _LOG2_E
        if slope is not None:
            sink += 0.5 * scale
        peak = tl.maximum(peak, sink)
        mass += tl.exp2(sink - peak)
    state = (peak, mass, tl.zeros((BLOCK_Q, CV_FIRST), tl.float32))
    if CV_REST:
        state += (tl.zeros((BLOCK_Q, CV_REST), tl.float32),)

    # One block is read ahead: its number is there when the copies of its keys are started.
    ahead = tl.load(key_blocks)
    for n in tl.range(0, n_full * KEY_PARTS):
        k0 = (ahead * KEY_PARTS + n % KEY_PARTS) * BLOCK_K
        ahead = tl.load(key_blocks + (n + 1) // KEY_PARTS)
        state = _add_keys(
            state, q, key, value, k0, slot, key_first, key_end, key_position, query_position, key_token, value_token, T,
            scale, slope, window, BLOCK_K, C, C_FIRST, C_REST, CV, CV_FIRST, CV_REST, False
        )  # fmt: skip
    # Without this condition ptxas serialises wgmma: what both loops carry would meet while products are under way.
    if n_blocks > n_full:
        for n in tl.range(n_full * KEY_PARTS, n_blocks * KEY_PARTS):
            k0 = (ahead * KEY_PARTS + n % KEY_PARTS) * BLOCK_K
            ahead = tl.load(key_blocks + (n + 1) // KEY_PARTS)
            state = _add_keys(
                state, q, key, value, k0, slot, key_first, key_end, key_position, query_position, key_token,
                value_token, T, scale, slope, window, BLOCK_K, C, C_FIRST, C_REST, CV, CV_FIRST, CV_REST, True
            )  # fmt: skip

    out += (q0.to(tl.int64) * heads + head) * CV
    inverse = (1.0 / state[1])[:, None]
    row = line // HEADS
    inside = (row < tl.minimum(Q - q0, QUERIES))[:, None]
    for p in tl.static_range(2, len(state)):
        column = (p - 2) * CV_FIRST + tl.arange(0, state[p].shape[1])[None, :]
        at = out + (row[:, None] * (heads * CV) + (line % HEADS * CV)[:, None] + column)
        tl.store(at, (state[p] * inverse).to(out.dtype.element_ty), mask=inside & (column < CV))


@triton.jit
def _add_keys(
    state, q, key, value, k0, slot, key_first, key_end, key_position, query_position, key_token, value_token, T,
    scale, slope, window, BLOCK_K: tl.constexpr, C: tl.constexpr, C_FIRST: tl.constexpr, C_REST: tl.constexpr,
    CV: tl.constexpr, CV_FIRST: tl.constexpr, CV_REST: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """State with the keys [k0, k0 + BLOCK_K) added: (peak, mass, sums of values in one or two parts)."""
    row = tl.arange(0, BLOCK_K)
    if MASKED:
        token = k0 + row
        there = token < T
        first = token
        if key_first is not None:
            first = tl.load(key_first + token, mask=there, other=0)
        end = tl.load(key_end + token, mask=there, other=0)
        visible = (slot[:, None] >= first[None, :]) & (slot[:, None] < end[None, :])
        if window is not None:
            reach = tl.load(key_position + token, mask=there, other=0) + window
            visible &= query_position[:, None] < reach[None, :]
        # Keys past the end repeat the last one.
        row = tl.minimum(row, T - 1 - k0)
    k = _load_rows(key + k0.to(tl.int64) * key_token, row * key_token, C, C_FIRST, C_REST)
    v = _load_rows(value + k0.to(tl.int64) * value_token, row * value_token, CV, CV_FIRST, CV_REST)
    z = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if C_REST:
        z = tl.dot(q[1], tl.trans(k[1]), z, input_precision="ieee")
    if slope is not None:
        z = _sigmoid(z * slope, key.dtype.element_ty == tl.float32)
    if MASKED:
        z = tl.where(visible, z, float("-inf"))
    peak = tl.maximum(state[0], tl.max(z, axis=1) * scale)
    shrink = tl.exp2(state[0] - peak)
    p = tl.exp2(tl.fma(z, scale, -peak[:, None]))
    added = (peak, tl.fma(state[1], shrink, tl.sum(p, axis=1)))
    p = p.to(v[0].dtype)
    for n in tl.static_range(len(v)):
        added += (tl.dot(p, v[n], state[2 + n] * shrink[:, None], input_precision="ieee"),)
    return added


@triton.jit
def _sigmoid(u, EXACT: tl.constexpr):
    """1 / (1 + 2^u); of u = -2 log2(e) x it is (1 + tanh(x)) / 2, a soft cap but for a factor and a constant.

    The factor goes into `scale`; the softmax forgets the constant, and sinks get it added. A logit is off by some 1e-7
    of the cap, not of itself, which is what a softmax needs.
    """
    t = 1.0 + tl.exp2(u)
    if EXACT:
        return tl.div_rn(1.0, t)
    # Off by 3e-7 of itself: a division takes twice as many instructions to be no better.
    root = tl.rsqrt(t)
    return root * root


@triton.jit
def _load_rows(base, row, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """The rows at base + row [rows], WIDTH elements each, in parts of FIRST and REST columns; zeros past WIDTH."""
    parts = (_load_columns(base, row, WIDTH, 0, FIRST),)
    if REST:
        parts += (_load_columns(base, row, WIDTH, FIRST, REST),)
    return parts


@triton.jit
def _load_columns(base, row, WIDTH: tl.constexpr, BEGIN: tl.constexpr, SIZE: tl.constexpr):
    column = BEGIN + tl.arange(0, SIZE)[None, :]
    if BEGIN + SIZE > WIDTH:
        x = tl.load(base + (row[:, None] + column), mask=column < WIDTH, other=0.0)
    else:
        x = tl.load(base + (row[:, None] + column))
    return x.to(tl.float32) if _INTERPRETED else x


def forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    subtree_end: Tensor,
    summary: Summary | None = None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_index: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """[Q, H, Cv] attention in which query i sees key j exactly when `j <= i < subtree_end[j]`.

    With a sliding window of w tokens (the query's own counts) also `position_ids[i] - position_ids[j] < w`.

    query: [H, Q, C]; key: [K, T, C]; value: [K, T, Cv]; one dtype (bfloat16, float16, float32), at most 512 wide; K
    divides H. Heads and tokens may lie any distance apart, a head's elements adjoin; where the distances are no
    multiples of 16 elements, loads are narrow.
    position_ids, subtree_end: [T] int32. query_index: [Q] int64, ascending: the queries' tokens; None: Q = T, all.
    summary: what `summarise` made of these three and the window, for all layers, with the `query_block` that serves;
    None: made here.
    scaling: positive. softcap: positive, None or 0 for none. sinks: [H] of any float dtype, logits that take part in
    the softmax without a value. tiles: other than what serves on this GPU, one of `forest_plan.variants`.
    Raises ValueError for other shapes, dtypes, strides, devices and settings, and for tiles that do not fit the
    summary's lists.
    """
    _validate(query, key, value, sinks, scaling, softcap)
    (heads, n_queries, C), (n_key_heads, n_tokens, Cv) = query.shape, value.shape
    group = heads // n_key_heads
    if summary is None:
        summary = summarise(
            position_ids,
            subtree_end,
            sliding_window=sliding_window,
            query_index=query_index,
            query_block=query_block(query, key, value, tiles),
        )
    _validate_summary(summary, query, key, sliding_window)
    out = torch.empty(n_queries, heads, Cv, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    tiles = _fitting(tiles, summary, query, key, value)
    log2_scale = scaling * math.log2(math.e)
    windowed = sliding_window is not None
    values: dict[str, Any] = tiles.constants(C, Cv, group, summary.query_block)
    values |= dict(query=query, key=key, value=value, out=out, sinks=sinks)
    values |= dict(key_first=summary.key_first, key_end=summary.key_end, order=summary.order)
    values |= dict(begin=summary.begin, full_end=summary.full_end, key_blocks=summary.key_blocks)
    values["key_position"] = summary.position_ids if windowed else None
    values["query_position"] = summary.query_position if windowed else None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        values[f"{name}_head"], values[f"{name}_token"] = tensor.stride()[:2]
    values |= dict(T=n_tokens, Q=n_queries, heads=heads, group=group, window=sliding_window)
    values["scale"] = 2 * softcap * math.log2(math.e) if softcap else log2_scale
    values["slope"] = -2 * log2_scale / softcap if softcap else None
    programs = len(summary.order) * values["QUERY_PARTS"] * (heads // values["HEADS"])
    kernel = _attention_kernel
    with torch.cuda.device_of(query):
        kernel[(programs,)](**{name: values[name] for name in kernel.arg_names}, **tiles.options())
    return out


def query_block(query: Tensor, key: Tensor, value: Tensor, tiles: Tiles | None = None) -> int:
    """Queries of `summarise`'s lists for the tiles, or for those that serve; from dtype, widths and heads alone."""
    tiles = tiles or serving(query.dtype, query.device, max(query.shape[2], value.shape[2]))
    return tiles.query_block(query.shape[0] // key.shape[0])


def _fitting(tiles: Tiles | None, summary: Summary, query: Tensor, key: Tensor, value: Tensor) -> Tiles:
    """The tiles, or else those that serve, or else any variant, as the summary's lists allow."""
    width, group = max(query.shape[2], value.shape[2]), query.shape[0] // key.shape[0]
    every = (query.dtype, query.device, width)
    for candidate in (tiles,) if tiles else (serving(*every), *variants(*every).values()):
        # Offsets within a tile are 32 bits.
        near = (candidate.heads(group) - 1) * query.stride(0) < 1 << 30
        if near and summary.query_block % candidate.queries(group) == 0:
            return candidate
    raise ValueError(
        f"no tiles fit lists of {summary.query_block} queries where {group} heads share keys: summarise with the "
        "query_block of the tiles, and let heads lie less than 2^30 elements apart"
    )


def _validate(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scaling: float, softcap: float | None
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 3 or not 1 <= tensor.shape[2] <= MAX_WIDTH:
            raise ValueError(
                f"{name} must be [heads, tokens, width] with a width of 1 to {MAX_WIDTH}, got {tuple(tensor.shape)}: "
                "leave other widths to attention_torch"
            )
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise ValueError(f"{name}'s elements of a head must adjoin, got strides {tensor.stride()}: .contiguous()")
        if tensor.shape[1] > 1 and not 0 <= tensor.stride(1) < MAX_TOKEN_STRIDE:
            raise ValueError(
                f"{name}'s tokens must lie less than {MAX_TOKEN_STRIDE} elements apart, got strides {tensor.stride()}: "
                ".contiguous()"
            )
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query and key must have one width, got {query.shape[2]} and {key.shape[2]}")
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"key is {tuple(key.shape)}, value {tuple(value.shape)}: heads and tokens must agree")
    if key.shape[0] == 0 or query.shape[0] % key.shape[0]:
        raise ValueError(f"key heads must divide query heads, got {key.shape[0]} and {query.shape[0]}")
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"query, key, value must share bfloat16, float16 or float32, got {dtypes}: .to(query.dtype)")
    if sinks is not None and (sinks.shape != query.shape[:1] or not sinks.is_floating_point() or sinks.stride(0) != 1):
        raise ValueError(f"sinks must be [{query.shape[0]}] floats, contiguous, got {tuple(sinks.shape)} {sinks.dtype}")
    devices = {x.device for x in (query, key, value, sinks) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"query, key, value, sinks must be on one device, got {devices}: .to(query.device)")
    if not 0 < scaling < math.inf:
        raise ValueError(f"scaling must be positive and finite, got {scaling}: negate query for a negative one")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or None for none, got {softcap}")


def _validate_summary(summary: Summary, query: Tensor, key: Tensor, sliding_window: int | None) -> None:
    if (summary.n_queries, summary.n_tokens) != (query.shape[1], key.shape[1]):
        raise ValueError(
            f"the summary is of {summary.n_queries} queries and {summary.n_tokens} tokens, query has {query.shape[1]}, "
            f"key {key.shape[1]}: summarise their pack, with query_index where only some tokens are queries"
        )
    if summary.sliding_window != sliding_window:
        raise ValueError(
            f"the summary is of sliding_window {summary.sliding_window}, got {sliding_window}: summarise each window"
        )
    if summary.order.device != query.device:
        raise ValueError(f"query is on {query.device}, the pack's positions on {summary.order.device}: .to(device)")
