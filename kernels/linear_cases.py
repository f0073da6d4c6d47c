"""What `make triton-report` compiles of the head: what its launchers ask for on real heads, by every variant."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import AotCase, linear_nll, packed_nll
from .ahead_of_time import Calls, asked
from .linear_tiles import Pieces, Tiles, variants

S = 2100  # tokens of a pack that are scored: two blocks of rows
# Hidden size, vocabulary, and what stands between products and logits. V 128,256 and 256,000 are whole tiles, the
# others have a tail; D 1,040 is no multiple of a tile's.
HEADS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "Llama-3-8B": (4096, 128_256, {}),
    "Qwen2.5-0.5B": (896, 151_936, {}),
    "GPT-2": (768, 50_257, {}),
    "Gemma-2-2B": (2304, 256_000, {"softcap": 30.0}),
    "Command R": (8192, 256_000, {"logit_scale": 0.0625}),
    "Phi-2, bias": (2560, 51_200, {"bias": True}),
    "everything": (1040, 50_257, {"bias": True, "logit_scale": 0.5, "softcap": 30.0}),
}
KERNELS = {
    linear_nll: ("_target_kernel", "_range_kernel", "_merge_kernel"),
    packed_nll: ("_split_kernel", "_merge_kernel"),
}


def aot_cases(arch: int) -> list[AotCase]:
    """For one architecture: what serves, on every head; every other variant of the tiles on one with a tail."""
    return asked(arch, _calls(), KERNELS, products=("target", "range"))


def _calls() -> Calls:
    for head in HEADS:
        yield from _both(f"head, {head}, bf16", head)
    for dtype in (torch.float16, torch.float32):
        yield from _both(f"head, everything, {_name(dtype)}", "everything", dtype=dtype)
    for name, tiles in variants(torch.bfloat16, torch.device("meta")).items():
        heads = ("Llama-3-8B", "GPT-2", "Gemma-2-2B", "Phi-2, bias", "everything")
        for head in ("GPT-2",) if isinstance(tiles, Tiles) else heads:
            yield from _both(f"head by {name}, {head}, bf16", head, tiles=tiles)
    for name, V, step in (("aligned", 151_936, 151_936), ("odd", 50_257, 50_257)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            logits = torch.empty(S, step, dtype=dtype, device="meta")[:, :V]
            for every in (False, True):
                call = partial(packed_nll.packed_nll, logits, _targets(), all_statistics=every)
                yield f"rows of logits, {name}, {_name(dtype)}{', all five' * every}", call


def _both(
    name: str, head: str, *, dtype: torch.dtype = torch.bfloat16, tiles: Tiles | Pieces | None = None
) -> Iterator[Any]:
    D, V, options = HEADS[head]
    hidden, weight = (torch.empty(n, D, dtype=dtype, device="meta") for n in (S, V))
    options = options | {"bias": torch.empty(V, dtype=dtype, device="meta") if "bias" in options else None}
    for every in (False, True):
        call = partial(linear_nll.linear_nll, hidden, weight, _targets(), all_statistics=every, tiles=tiles, **options)
        yield name + ", all five" * every, call


def _targets() -> Tensor:
    return torch.empty(S, dtype=torch.int64, device="meta")


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
