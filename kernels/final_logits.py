"""What stands between an LM head's products and its logits: bias, scale, soft cap; one definition for every kernel."""

from __future__ import annotations

import math

import triton
import triton.language as tl


def scaling(softcap: float | None, logit_scale: float) -> dict[str, float | None]:
    """The kernels' logit_scale, softcap and slope; None for what a head does not have, which then costs nothing."""
    return {
        "logit_scale": None if logit_scale == 1.0 else float(logit_scale),
        "softcap": None if softcap is None else float(softcap),
        "slope": None if softcap is None else -2 * math.log2(math.e) / softcap,
    }


@triton.jit
def _logits(product, bias, logit_scale, softcap, slope):
    """Logits of products. No product feeds a sum but in an fma: wherever it is compiled, the bits are the same."""
    z = product
    if bias is not None:
        z = z + bias
    if logit_scale is not None:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * _tanh(z * slope)
    return z


@triton.jit
def _tanh(u):
    """tanh(x) of u = -2 log2(e) x, off by 3e-7 of itself at most: (1 - t) / (1 + t), t = exp(-2 x) = 2^u."""
    t = tl.exp2(tl.minimum(u, 60.0))
    r = tl.rsqrt(t + 1.0)
    inverse = r * r
    # One Newton step, because rsqrt is approximate.
    inverse = inverse * tl.fma(-(t + 1.0), inverse, 2.0)
    # For |x| < 0.35, where 1 - t cancels: a polynomial in u^2, fitted to 3.5e-8.
    v = u * u
    p = tl.fma(tl.fma(tl.fma(v, -2.94031576e-05, 6.64801174e-04), v, -1.38756480e-02), v, 3.46573578e-01)
    # Compared this way round, NaN goes the second way and stays NaN.
    return tl.where(tl.abs(u) > 1.0, (1.0 - t) * inverse, -u * p)
