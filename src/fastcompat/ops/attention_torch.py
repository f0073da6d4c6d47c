"""Attention over a prefix forest in plain torch, on any device.

Dimension key: T packed tokens, Q queries and J keys of a block, H query heads, K key heads, C head width.

The T queries are cut into blocks of some hundred tokens; the keys that any query of a block sees (its ancestors and
the block itself) are gathered, and `scaled_dot_product_attention` runs on each. No [T, T] mask exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# A block closes at the end of a chain once it has MIN_BLOCK queries, and anywhere at MAX_BLOCK. Small blocks waste
# calls, large ones compute masked pairs.
MIN_BLOCK = 64
MAX_BLOCK = 256
# Masks up to this many elements a pack are kept for all layers; a longer pack makes each again in every layer.
CACHED_MASK_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Queries [begin, end) and the packed indices of every key that one of them sees, ascending, the last `end - 1`.

    `keys` is a slice where they lie together, which spares the gather.
    """

    begin: int
    end: int
    keys: slice | Tensor  # [J]
    n_keys: int
    causal: bool  # the keys are exactly the queries, one chain: no mask is needed


@dataclass(slots=True, kw_only=True, eq=False)
class Blocks:
    """What every layer of a forward pass needs to know of a pack's blocks, made when it is first asked for."""

    position_ids: Tensor  # [T] int64
    subtree_end: Tensor  # [T] int32
    on_host: tuple[NDArray[Any], NDArray[Any]] | None  # both, where they came from the CPU
    blocks: dict[int | None, list[Block]] = field(default_factory=dict)  # by sliding window
    masks: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)
    mask_elements: int = 0

    @classmethod
    def create(cls, position_ids: Tensor, subtree_end: Tensor) -> Blocks:
        on_cpu = position_ids.device.type == "cpu"
        on_host = (position_ids.numpy(), subtree_end.numpy()) if on_cpu else None
        return cls(position_ids=position_ids, subtree_end=subtree_end, on_host=on_host)

    def blocks_for(self, sliding_window: int | None) -> list[Block]:
        """The blocks under a window; None, and any window that no position reaches, is full attention."""
        if sliding_window not in self.blocks:
            on_host = self.on_host or (self.position_ids.cpu().numpy(), self.subtree_end.cpu().numpy())
            position, subtree_end = on_host
            self.blocks[sliding_window] = _cut_blocks(position, subtree_end, sliding_window, self.position_ids.device)
        return self.blocks[sliding_window]

    def mask(self, index: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """[Q, J] additive: 0 where the block's query sees the key, -inf elsewhere."""
        cached = self.masks.get((sliding_window, index, dtype))
        if cached is not None:
            return cached
        block = self.blocks_for(sliding_window)[index]
        device = self.position_ids.device
        queries = torch.arange(block.begin, block.end, device=device)[:, None]
        if isinstance(block.keys, slice):
            keys = torch.arange(block.keys.start, block.keys.stop, device=device)
        else:
            keys = block.keys
        hidden = (keys > queries) | (queries >= self.subtree_end[keys])
        if sliding_window is not None:
            hidden |= self.position_ids[queries] - self.position_ids[keys] >= sliding_window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        if self.mask_elements + mask.numel() <= CACHED_MASK_ELEMENTS:
            self.masks[sliding_window, index, dtype] = mask
            self.mask_elements += mask.numel()
        return mask


def _cut_blocks(
    position: NDArray[np.int64], subtree_end: NDArray[np.int32], sliding_window: int | None, device: torch.device
) -> list[Block]:
    n_tokens = len(position)
    # A chain ends where the next token does not continue it: a leaf, or a token whose child begins elsewhere.
    chain_ends = [*(np.flatnonzero(np.diff(position) != 1) + 1).tolist(), n_tokens]
    blocks = []
    begin = 0
    for chain_end in chain_ends:
        while chain_end - begin > MAX_BLOCK:
            blocks.append((begin, begin + MAX_BLOCK))
            begin += MAX_BLOCK
        if chain_end - begin >= MIN_BLOCK or (chain_end == n_tokens and chain_end > begin):
            blocks.append((begin, chain_end))
            begin = chain_end
    return [_block(begin, end, position, subtree_end, sliding_window, device) for begin, end in blocks]


def _block(
    begin: int,
    end: int,
    position: NDArray[np.int64],
    subtree_end: NDArray[np.int32],
    sliding_window: int | None,
    device: torch.device,
) -> Block:
    seen = subtree_end[:begin] > begin
    if sliding_window is not None:
        # A key is out of every query's reach when it is out of the reach of the block's shallowest.
        seen &= position[:begin] > int(position[begin:end].min()) - sliding_window
    before = np.flatnonzero(seen)
    n_keys = len(before) + end - begin
    contiguous = len(before) == 0 or int(before[0]) == begin - len(before)
    keys: slice | Tensor
    if contiguous:
        keys = slice(end - n_keys, end)
    else:
        keys = torch.from_numpy(np.concatenate([before, np.arange(begin, end)])).to(device)
    one_chain = bool((subtree_end[begin:end] >= end).all())
    in_window = sliding_window is None or end - begin <= sliding_window
    return Block(begin=begin, end=end, keys=keys, n_keys=n_keys, causal=len(before) == 0 and one_chain and in_window)


def forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[T, H, C], as `attention.forest_attention`."""
    n_tokens = query.shape[1]
    out = query.new_empty(n_tokens, query.shape[0], value.shape[2])
    for index, block in enumerate(blocks.blocks_for(sliding_window)):
        q = query[:, block.begin : block.end]
        if isinstance(block.keys, slice):
            k, v = key[:, block.keys], value[:, block.keys]
        else:
            k, v = key.index_select(1, block.keys), value.index_select(1, block.keys)
        mask = None if block.causal else blocks.mask(index, sliding_window, query.dtype)
        if softcap or sinks is not None:
            if mask is None:
                mask = blocks.mask(index, sliding_window, query.dtype)
            result = _explicit_softmax(q, k, v, mask, scaling=scaling, softcap=softcap, sinks=sinks)
        else:
            result = F.scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                attn_mask=None if mask is None else mask[None, None],
                is_causal=block.causal,
                scale=scaling,
                enable_gqa=query.shape[0] != key.shape[0],
            )[0]
        out[block.begin : block.end] = result.transpose(0, 1)
    return out


def _explicit_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[H, Q, C] for what scaled_dot_product_attention cannot do; logits and softmax in at least float32."""
    n_heads, n_queries, width = query.shape
    groups = n_heads // key.shape[0]
    q = query.reshape(key.shape[0], groups * n_queries, width)
    z = (q @ key.transpose(1, 2)).view(n_heads, n_queries, -1)
    z = (z.float() if z.dtype in (torch.bfloat16, torch.float16) else z) * scaling
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    z = z + mask
    if sinks is not None:
        z = torch.cat([z, sinks.to(z.dtype)[:, None, None].expand(-1, n_queries, 1)], dim=-1)
    weights = torch.softmax(z, dim=-1)[..., : key.shape[1]].to(value.dtype)
    return (weights.reshape(key.shape[0], groups * n_queries, -1) @ value).view(n_heads, n_queries, -1)
