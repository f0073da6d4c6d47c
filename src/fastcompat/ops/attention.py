"""Attention over a prefix forest: one narrow function, and the plan that is made once a pack and used by every layer.

CPU tensors go to the C++ extension, CUDA tensors to Triton; where a pack shares nothing, torch's own variable-length
attention serves CUDA tensors. Everything else goes to plain torch (`attention_torch.py`).

Dimension key: T packed tokens, Q queries, H query heads, K key heads, C head width.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastcompat.errors import ArgumentError
from fastcompat.ops import attention_torch
from fastcompat.ops.backends import NATIVE_DTYPES, choose, native, native_level, triton_variant

# Wider heads do not fit into a GPU's registers.
TRITON_WIDTH = 512


@dataclass(slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """What every layer of a forward pass needs to know of a pack, on the model's device."""

    position_ids: Tensor  # [T] int32, depth on the path
    subtree_end: Tensor  # [T] int32, one past the last token below
    max_position: int
    query_index: Tensor | None  # [Q] int32, ascending: the packed tokens whose attention is wanted; None: all
    cu_seqlens: Tensor | None  # [N + 1] int32, the sequences of a pack that shares nothing; None: it shares something
    blocks: attention_torch.Blocks = field(repr=False)
    # Triton's, by sliding window and queries of a list.
    summaries: dict[tuple[int | None, int], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def create(cls, position_ids: Tensor, subtree_end: Tensor) -> AttentionPlan:
        roots = torch.nonzero(position_ids == 0).flatten()
        # Depth first, a token that is neither a root nor one deeper than the one before it begins a branch.
        shares = bool(((position_ids.diff() != 1) & (position_ids[1:] != 0)).any())
        end = roots.new_tensor([len(position_ids)])
        return cls(
            position_ids=position_ids.to(torch.int32).contiguous(),
            subtree_end=subtree_end.to(torch.int32).contiguous(),
            max_position=int(position_ids.max()),
            query_index=None,
            cu_seqlens=None if shares else torch.cat([roots, end]).to(torch.int32),
            blocks=attention_torch.Blocks(position_ids=position_ids, subtree_end=subtree_end),
        )

    def for_queries(self, query_index: Tensor) -> AttentionPlan:
        """The plan of an attention that is wanted for some packed tokens only: query_index [Q], ascending."""
        return AttentionPlan(
            position_ids=self.position_ids,
            subtree_end=self.subtree_end,
            max_position=self.max_position,
            query_index=query_index.to(torch.int32).contiguous(),
            cu_seqlens=None,
            blocks=self.blocks,
        )


def forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """[Q, H, C] attention in which query i sees key j exactly when `j <= i < subtree_end[j]`.

    With a sliding window of w tokens (the query's own counts) also `position_ids[i] - position_ids[j] < w`; the logits
    `q . k * scaling` are soft-capped where `softcap` is given; `sinks` [H] take part in the softmax without a value.

    query [H, Q, C], of the plan's `query_index` or of all T tokens; key, value [K, T, C], not repeated, K divides H (C
    of value may differ). The definition in plain torch is `reference.forest_attention`.
    backend: None, or one by name: "native" (C++; "native:avx2" and the like for one level), "triton" ("triton:group"
    and the like for one variant: docs/kernels.md), "varlen" (torch's own, for a pack that shares nothing), "torch".
    """
    if sliding_window is not None and sliding_window > plan.max_position:
        sliding_window = None
    if backend is None and query.device.type == "cuda" and _varlen_serves(query, value, plan, softcap, sinks):
        backend = "varlen"
    if backend == "varlen":
        return _varlen_attention(query, key, value, plan, scaling, sliding_window, softcap, sinks)
    backend = choose(backend, query, variants=True)
    if backend.startswith("triton") and max(query.shape[2], value.shape[2]) > TRITON_WIDTH:
        backend = "torch"
    # Heads and tokens may lie any distance apart; a head's elements adjoin.
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    if backend.startswith("native"):
        return _native_attention(query, key, value, plan, scaling, sliding_window, softcap, sinks, backend)
    if backend.startswith("triton"):
        kernel = import_module("fastcompat.kernels.forest_attention")
        width = max(query.shape[2], value.shape[2])
        tiles = triton_variant(backend, kernel.variants(query.dtype, query.device, width))
        index = None if plan.query_index is None else plan.query_index.long()
        lists = sliding_window, kernel.query_block(query, key, value, tiles)
        if lists not in plan.summaries:
            plan.summaries[lists] = kernel.summarise(
                plan.position_ids,
                plan.subtree_end,
                sliding_window=sliding_window,
                query_index=index,
                query_block=lists[1],
            )
        attended: Tensor = kernel.forest_attention(
            query,
            key,
            value,
            plan.position_ids,
            plan.subtree_end,
            plan.summaries[lists],
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            query_index=index,
            tiles=tiles,
        )
        return attended
    every = query
    if plan.query_index is not None:
        every = query.new_zeros(query.shape[0], key.shape[1], query.shape[2])
        every[:, plan.query_index] = query
    out = attention_torch.forest_attention(
        every,
        key,
        value,
        plan.blocks,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )
    return out if plan.query_index is None else out[plan.query_index]


def _native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
) -> Tensor:
    sinks = None if sinks is None else sinks.float().contiguous()
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    native().forest_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        [stride for x in (query, key, value) for stride in x.stride()[:2]],
        key.shape[1],
        query.shape[1],
        0 if plan.query_index is None else plan.query_index.data_ptr(),
        query.shape[0],
        key.shape[0],
        query.shape[2],
        value.shape[2],
        plan.position_ids.data_ptr(),
        plan.subtree_end.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        NATIVE_DTYPES[query.dtype],
        scaling,
        softcap or 0.0,
        sliding_window or 0,
        native_level(backend),
        torch.get_num_threads(),
    )
    return out


@functools.cache
def varlen_available() -> bool:
    """Whether torch has variable-length attention with windows and grouped queries here; it needs a GPU."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    offered = inspect.signature(varlen_attn).parameters
    return torch.cuda.is_available() and {"window_size", "scale", "enable_gqa"} <= set(offered)


def _varlen_serves(
    query: Tensor, value: Tensor, plan: AttentionPlan, softcap: float | None, sinks: Tensor | None
) -> bool:
    return (
        plan.cu_seqlens is not None
        and plan.query_index is None
        and not softcap
        and sinks is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] == value.shape[2]
        and query.shape[2] % 8 == 0
        and query.shape[2] <= 256
        and varlen_available()
    )


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if not _varlen_serves(query, value, plan, softcap, sinks):
        raise ArgumentError(
            "backend 'varlen' serves packs that share nothing, in float16 or bfloat16 on a GPU, without soft cap and "
            "sinks; leave backend out, or name 'triton'"
        )
    from torch.nn.attention.varlen import varlen_attn

    assert plan.cu_seqlens is not None
    longest = plan.max_position + 1
    reach = -1 if sliding_window is None else sliding_window - 1
    attended = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        plan.cu_seqlens,
        plan.cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0),
        enable_gqa=query.shape[0] != key.shape[0],
    )
    assert isinstance(attended, Tensor)
    return attended
