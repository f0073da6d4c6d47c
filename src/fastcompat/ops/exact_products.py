"""What a GPU's matrix products may not do in a forward pass of ours: round where nobody asked them to.

The settings are torch's own, of the whole process, and they are put back. On other devices nothing is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    matmul = torch.backends.cuda.matmul
    # Read and set by the newer of torch's two interfaces alone: where a caller has used the older one, torch takes this
    # for a mixture, but only asks the newer one before a product, and the older one's state is as it was afterwards.
    precision = matmul.fp32_precision
    reductions = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in _REDUCTIONS}
    library = None if split else torch.backends.cuda.preferred_blas_library()
    try:
        if precision == "tf32":
            matmul.fp32_precision = "ieee"
        for name in _REDUCTIONS:
            setattr(matmul, name, (False, split))
        if library is not None:
            torch.backends.cuda.preferred_blas_library("cublaslt")
        yield
    finally:
        if library is not None:
            torch.backends.cuda.preferred_blas_library(library)
        for name, before in reductions.items():
            setattr(matmul, name, before)
        if precision == "tf32":
            matmul.fp32_precision = precision
