"""Attention over a prefix forest: one narrow function, and the plan that is made once a pack and used by every layer.

CPU tensors go to the C++ extension, CUDA tensors to Triton, or to another library where that was measured to be faster
(`flash_choice.py`). Everything else goes to plain torch (`attention_torch.py`).

Dimension key: T packed tokens, Q queries, H query heads, K key heads, C head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastcompat.ops import attention_torch, flash_choice
from fastcompat.ops.attention_flash import flash_attention
from fastcompat.ops.backends import FASTEST, NATIVE_DTYPES, choose, native, native_level, triton_variant, why_not
from fastcompat.ops.flash_plan import FlashPlan, flash_plan

# Wider heads do not fit into a GPU's registers.
TRITON_WIDTH = 512


@dataclass(slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """What every layer of a forward pass needs to know of a pack, on the model's device."""

    position_ids: Tensor  # [T] int32, depth on the path
    subtree_end: Tensor  # [T] int32, one past the last token below
    max_position: int
    query_index: Tensor | None  # [Q] int32, ascending: the packed tokens whose attention is wanted; None: all
    blocks: attention_torch.Blocks = field(repr=False)
    # Triton's, by sliding window and queries of a list.
    summaries: dict[tuple[int | None, int], Any] = field(default_factory=dict, repr=False)
    flash_plans: dict[int | None, FlashPlan | None] = field(default_factory=dict, repr=False)  # by sliding window

    @classmethod
    def create(cls, position_ids: Tensor, subtree_end: Tensor) -> AttentionPlan:
        """Of [T] int64 and [T] int32. Made on the CPU and copied (`OneCopy`), it costs a GPU no synchronisation."""
        return cls(
            position_ids=position_ids.to(torch.int32).contiguous(),
            subtree_end=subtree_end.to(torch.int32).contiguous(),
            max_position=int(position_ids.max()),
            query_index=None,
            blocks=attention_torch.Blocks.create(position_ids, subtree_end),
        )

    def for_queries(self, query_index: Tensor) -> AttentionPlan:
        """The plan of an attention that is wanted for some packed tokens only: query_index [Q], ascending."""
        return AttentionPlan(
            position_ids=self.position_ids,
            subtree_end=self.subtree_end,
            max_position=self.max_position,
            query_index=query_index.to(torch.int32).contiguous(),
            blocks=self.blocks,
        )

    def summary(self, sliding_window: int | None, query_block: int | None = None) -> Any:
        """What Triton reads of the plan under a window, in lists of `query_block` queries (None: what most tiles read).

        Made when it is first asked for, on a GPU by waiting for it.
        """
        if query_block is None:
            query_block = import_module("fastcompat.kernels.forest_plan").QUERY_BLOCK
        lists = self.reaching(sliding_window), query_block
        if lists not in self.summaries:
            self.summaries[lists] = import_module("fastcompat.kernels.forest_attention").summarise(
                self.position_ids,
                self.subtree_end,
                sliding_window=lists[0],
                query_index=None if self.query_index is None else self.query_index.long(),
                query_block=query_block,
            )
        return self.summaries[lists]

    def reaching(self, sliding_window: int | None) -> int | None:
        """The window, None where no position of the pack reaches beyond it."""
        return None if sliding_window is not None and sliding_window > self.max_position else sliding_window

    def flash_plan(self, sliding_window: int | None) -> FlashPlan | None:
        """The pack for a library of sequences, made when it is first asked for; None where it is not for one."""
        window = self.reaching(sliding_window)
        if window not in self.flash_plans:
            position_ids, subtree_end = self.position_ids.cpu().numpy(), self.subtree_end.cpu().numpy()
            made = flash_plan(position_ids, subtree_end, sliding_window=window)
            self.flash_plans[window] = None if made is None else made.to(self.position_ids.device)
        return self.flash_plans[window]


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
    and the like for one variant: docs/kernels.md), "torch", or another library's: "flash" (flash-attn; "flash:3" and
    the like for one version), "varlen" (torch's own). Raises ArgumentError where one that is named does not serve these
    tensors.
    """
    sliding_window = plan.reaching(sliding_window)
    # Heads and tokens may lie any distance apart; a head's elements adjoin.
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    if flash_choice.measured(query.device, query.shape[2]) if backend is None else flash_choice.named(backend):
        kind = flash_choice.AttentionKind(
            device=query.device,
            dtype=query.dtype,
            heads=query.shape[0],
            key_heads=key.shape[0],
            width=query.shape[2],
            value_width=value.shape[2],
            scaling=scaling,
            softcap=softcap,
            sinks=sinks is not None,
        )
        chosen = flash_choice.chosen(backend, kind, plan, sliding_window)
        if chosen is not None:
            library, calls = chosen
            return flash_attention(
                library,
                query,
                key,
                value,
                calls,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
            )
    backend = choose(backend, query, variants=True)
    if backend.startswith("triton") and max(query.shape[2], value.shape[2]) > TRITON_WIDTH:
        backend = "torch"
    if backend.startswith("native"):
        return _native_attention(query, key, value, plan, scaling, sliding_window, softcap, sinks, backend)
    if backend.startswith("triton"):
        kernel = import_module("fastcompat.kernels.forest_attention")
        width = max(query.shape[2], value.shape[2])
        tiles = triton_variant(backend, kernel.variants(query.dtype, query.device, width))
        attended: Tensor = kernel.forest_attention(
            query,
            key,
            value,
            plan.position_ids,
            plan.subtree_end,
            plan.summary(sliding_window, kernel.query_block(query, key, value, tiles)),
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
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


def reads_summaries(device: torch.device) -> bool:
    """Whether attention on this device reads a plan's summaries: where Triton serves."""
    return FASTEST.get(device.type) == "triton" and why_not("triton", device.type) is None
