"""How `linear_nll` cuts its product, on which GPU: tiles, ranges of the vocabulary, registers seen.

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Ranges of the vocabulary: so many that few tokens keep a GPU busy, so few that partial sums stay small.
MAX_RANGES = 64
MIN_RANGE_TILES = 4


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of the product and how they are folded. A token's last bits depend on these and its own logits, no more."""

    block_s: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    # Running sums a token: as many as threads share a row of the accumulator, times the warps that do.
    lanes: int
    # Parts in which a tile of logits is folded; more of them need fewer registers.
    slices: int
    # One software pipeline over all tiles of a range: the next tile's loads are under way during a tile's epilogue.
    flatten: bool = False
    # Loads by the tensor memory accelerator (sm_90 and up) instead of by pointers; rows must be multiples of 16 bytes.
    descriptors: bool = False

    def __post_init__(self) -> None:
        if self.block_v % (2 * self.lanes * self.slices):
            raise ValueError(f"block_v must be a multiple of 2 x lanes x slices: {self}")

    def constants(self, D: int, V: int) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        return {
            "BLOCK_S": self.block_s,
            "BLOCK_V": self.block_v,
            "BLOCK_D": self.block_d,
            "LANES": self.lanes,
            "SLICES": self.slices,
            "FLATTEN": self.flatten,
            "DESCRIPTORS": self.descriptors,
            "EVEN_D": D % self.block_d == 0,
            "EVEN_V": V % self.block_v == 0,
        }

    def operands(self, hidden: Tensor, weight: Tensor) -> dict[str, Any]:
        """hidden [S, D] and weight [V, D] in the form in which the range kernel reads them."""
        if not self.descriptors:
            return {"hidden": hidden, "weight": weight}
        return {
            "hidden": TensorDescriptor.from_tensor(hidden, [self.block_s, self.block_d]),
            "weight": TensorDescriptor.from_tensor(weight, [self.block_v, self.block_d]),
        }

    def options(self) -> dict[str, Any]:
        """The compiler's. Fusion is pinned, because its default changes between Triton's versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def ranges(self, V: int) -> tuple[int, int]:
        """Tiles of a range, and ranges. From V alone, never from S: a token's bits are the same in every batch."""
        n_tiles = -(-V // self.block_v)
        range_tiles = max(MIN_RANGE_TILES, -(-n_tiles // MAX_RANGES))
        return range_tiles, -(-n_tiles // range_tiles)


# Above each: registers a thread for nll, all five, all five with bias, scale and softcap, from `make triton-report`
# (Triton 3.7.1; 3.6.0 mostly differs by 5 at most). None spills; all have their tensor cores' instruction, and nothing
# makes one wait for the one before.
TILES = {
    # 208, 255, 255
    80: Tiles(block_s=128, block_v=128, block_d=64, num_warps=8, num_stages=4, lanes=16, slices=2),
    # 236, 255, 255; the same of 256 x 128 does not spill either, nor with descriptors
    90: Tiles(block_s=128, block_v=256, block_d=64, num_warps=8, num_stages=4, lanes=4, slices=4, flatten=True),
    # 148, 178, 208: two programs a multiprocessor; 256 x 128 spills up to 96 bytes by pointers
    100: Tiles(block_s=128, block_v=128, block_d=64, num_warps=4, num_stages=3, lanes=4, slices=4, flatten=True),
}
# Any other of NVIDIA's: 32 KiB of shared memory.
OTHER_TILES = Tiles(block_s=128, block_v=128, block_d=32, num_warps=8, num_stages=3, lanes=16, slices=2)
# float32 goes through ordinary multiply-adds everywhere: small tiles (8 bytes spill on sm_86 and sm_89).
FLOAT32_TILES = Tiles(block_s=64, block_v=128, block_d=16, num_warps=8, num_stages=2, lanes=32, slices=1)
# ROCm counts stages otherwise; 64 KiB are all there is.
ROCM_TILES = replace(OTHER_TILES, num_stages=2)


def choose_tiles(dtype: torch.dtype, device: torch.device) -> Tiles:
    if dtype == torch.float32:
        return FLOAT32_TILES
    if device.type != "cuda":
        # The interpreter does large tiles fastest.
        return TILES[90]
    return ROCM_TILES if torch.version.hip else TILES.get(_arch(device), OTHER_TILES)


@lru_cache
def _arch(device: torch.device) -> int:
    """90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
