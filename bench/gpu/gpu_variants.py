"""Other ways to compute the same, by name, so that one visit to a GPU decides: whoever writes one adds it here.

The smoke step holds each against float64, the timing steps put each beside the table's own way.

Dimension key: S scored tokens, D hidden size, V vocabulary, T packed tokens, H query heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# hidden [S, D], weight [V, D], target [S], softcap=, all_statistics= -> [1 or 5, S], as `linear_nll`.
HEAD: dict[str, Callable[..., Tensor]] = {}

# A pack of gpu_attention.py -> what computes [T, H, C] of it, as `forest_attention`; what is made once a pack is made
# when the call is.
ATTENTION: dict[str, Callable[[Any], Callable[[], Tensor]]] = {}

# Changes to the head's table of tiles: first stages and pipeline, then how a tile is folded, then its shape.
HEAD_TILES: list[dict[str, Any]] = [
    {},
    {"num_stages": 3},
    {"flatten": False},
    {"flatten": False, "num_stages": 3},
    {"descriptors": True},
    {"descriptors": True, "flatten": False},
    {"slices": 2},
    {"slices": 8},
    {"block_d": 32, "num_stages": 6},
    {"block_d": 128, "num_stages": 2},
    {"block_v": 128, "slices": 2},
    {"block_v": 128, "slices": 2, "num_warps": 4},
    # 96 KiB: two programs a multiprocessor, one's epilogue beside the other's products.
    {"block_v": 128, "slices": 2, "num_warps": 4, "num_stages": 3},
    {"block_s": 64, "num_warps": 4},
    {"block_s": 256, "block_v": 128, "slices": 4},
    {"block_s": 256, "block_v": 128, "slices": 4, "descriptors": True},
]

# Tokens of the pieces in which an MLP is computed; None: all at once.
MLP_PIECES: tuple[int | None, ...] = (None, 2048, 4096, 8192, 16384)
