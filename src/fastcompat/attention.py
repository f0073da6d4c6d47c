"""Attention over a prefix forest: one narrow function, and the plan that is made once a pack and used by every layer.

CPU tensors go to the C++ extension where it is built, everything else to plain torch (`attention_torch.py`).

Dimension key: T packed tokens, H query heads, K key heads, C head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcompat import attention_torch
from fastcompat.backends import native, native_levels, why_not

NATIVE_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """What every layer of a forward pass needs to know of a pack, on the model's device."""

    position_ids: Tensor  # [T] int32, depth on the path
    subtree_end: Tensor  # [T] int32, one past the last token below
    max_position: int
    blocks: attention_torch.Blocks = field(repr=False)

    @classmethod
    def create(cls, position_ids: Tensor, subtree_end: Tensor) -> AttentionPlan:
        return cls(
            position_ids=position_ids.to(torch.int32).contiguous(),
            subtree_end=subtree_end.to(torch.int32).contiguous(),
            max_position=int(position_ids.max()),
            blocks=attention_torch.Blocks(position_ids=position_ids, subtree_end=subtree_end),
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
    """[T, H, C] attention in which query i sees key j exactly when `j <= i < subtree_end[j]`.

    With a sliding window of w tokens (the query's own counts) also `position_ids[i] - position_ids[j] < w`; the logits
    `q . k * scaling` are soft-capped where `softcap` is given; `sinks` [H] take part in the softmax without a value.

    query [H, T, C]; key, value [K, T, C], not repeated, K divides H (C of value may differ). The definition in plain
    torch is `reference.forest_attention`.
    backend: None, or one by name: "native" (C++; "native:avx2" and the like for one level), "torch".
    """
    if sliding_window is not None and sliding_window > plan.max_position:
        sliding_window = None
    if backend is None:
        on_cpu = query.device.type == "cpu" and query.dtype in NATIVE_DTYPES and why_not("native", "cpu") is None
        backend = "native" if on_cpu else "torch"
    if backend == "torch":
        return attention_torch.forest_attention(
            query,
            key,
            value,
            plan.blocks,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
    # Heads and tokens may lie any distance apart; a head's elements adjoin.
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    sinks = None if sinks is None else sinks.float().contiguous()
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    native().forest_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        [stride for x in (query, key, value) for stride in x.stride()[:2]],
        query.shape[1],
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
        backend.partition(":")[2] or native_levels()[0],
        torch.get_num_threads(),
    )
    return out
