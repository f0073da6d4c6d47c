"""Other ways to compute the same, by name, so that one visit to a GPU decides which of them serves.

Names come from the kernels' own tables, so that what is written there is measured here. The smoke step holds each
against float64, the timing steps put each beside what serves now.

Dimension key: S scored tokens, D hidden size, V vocabulary, T packed tokens, H query heads, K key heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastcompat.kernels import forest_attention, forest_plan, linear_tiles

# Tokens of the pieces in which an MLP is computed; None: all at once.
MLP_PIECES: tuple[int | None, ...] = (None, 2048, 4096, 8192, 16384)


def head_variants(dtype: torch.dtype, device: torch.device, D: int) -> dict[str, Any]:
    """`tiles=` of `linear_nll` by name, those that can compute a head of D."""
    named = linear_tiles.variants(dtype, device)
    return {name: tiles for name, tiles in named.items() if not linear_tiles.why_not(tiles, dtype, D)}


def is_of_cublas(variant: Any) -> bool:
    """Whether a head's variant has its products from cuBLAS: quick to compile, and to be tried with every head."""
    return not isinstance(variant, linear_tiles.Tiles)


def attention_variants(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, subtree_end: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """By name what computes [T, H, C] of query [H, T, C], key and value [K, T, C]; lists are made in the first call."""
    pack = position_ids, subtree_end

    @cache
    def summary(query_block: int) -> Any:
        return forest_plan.summarise(*pack, sliding_window=None, query_block=query_block)

    def attend(tiles: Any) -> Tensor:
        lists = summary(tiles.query_block(len(query) // len(key)))
        return forest_attention.forest_attention(
            query, key, value, *pack, lists, scaling=query.shape[2] ** -0.5, tiles=tiles
        )

    width = max(query.shape[2], value.shape[2])
    named = forest_plan.variants(query.dtype, query.device, width)
    return {name: partial(attend, tiles) for name, tiles in named.items()}
