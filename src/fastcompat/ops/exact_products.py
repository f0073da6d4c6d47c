"""What a GPU's matrix products may not do in a forward pass of ours: round where nobody asked them to.

The settings are torch's own, of the whole process, and they are put back when no thread needs them any more. On other
devices nothing is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

# Of products in these dtypes torch lets cuBLAS add up partial sums in the dtype itself.
_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextmanager
def exact_products(device: torch.device, *, split: bool = True) -> Iterator[None]:
    """Within this block products on `device` add up in float32 throughout, and float32 is never cut to TF32.

    By default torch lets cuBLAS divide a product of few rows along what it sums over, and add the parts up in bfloat16.
    With TF32, which a caller, or the environment of a container, may have allowed, positions beyond 2,048 lose bits
    where rotary angles come from a product.
    split: False: no product is divided in that way, so that a row's bits depend on the number of rows as little as
    cuBLAS allows; only cuBLASLt can promise it, so it computes all products.
    """
    if device.type != "cuda":
        yield
        return
    _blocks.enter(split)
    try:
        yield
    finally:
        _blocks.leave(split)


class _Blocks:
    """The blocks that are entered, of all threads: the first finds the settings, the last puts them back."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._splits: list[bool] = []
        self._precision = ""
        self._reductions: dict[str, tuple[bool, bool]] = {}
        self._library: Any = None  # where another one is preferred meanwhile

    def enter(self, split: bool) -> None:
        matmul = torch.backends.cuda.matmul
        with self._lock:
            if not self._splits:
                # Read and set by the newer of torch's two interfaces alone: where a caller has used the older one,
                # torch takes this for a mixture, but only asks the newer one before a product, and the older one's
                # state is as it was afterwards.
                self._precision = matmul.fp32_precision
                for name in _REDUCTIONS:
                    self._reductions[name] = (getattr(matmul, name), getattr(matmul, f"{name}_split_k"))
            self._splits.append(split)
            self._set()

    def leave(self, split: bool) -> None:
        with self._lock:
            self._splits.remove(split)
            self._set()

    def _set(self) -> None:
        matmul, blas = torch.backends.cuda.matmul, torch.backends.cuda.preferred_blas_library
        splits = all(self._splits)
        if splits and self._library is not None:
            blas(self._library)
            self._library = None
        elif not splits and self._library is None:
            self._library = blas()
            blas("cublaslt")
        for name, before in self._reductions.items():
            setattr(matmul, name, (False, splits) if self._splits else before)
        if self._precision == "tf32":
            matmul.fp32_precision = "ieee" if self._splits else "tf32"


_blocks = _Blocks()
