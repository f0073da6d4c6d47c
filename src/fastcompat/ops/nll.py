"""The fused head's two narrow functions: an LM head or logits in, per-token statistics out; the device decides how.

CPU tensors go to the C++ extension, CUDA tensors to Triton, and what those do not serve to plain torch; `backends.py`
chooses. `reference.py` defines every statistic. Arguments are checked here, once: shapes and dtypes in the two public
functions, values in the operators, which are single steps to torch.compile.

Dimension key: S scored tokens, D hidden size, V vocabulary, N responses, K statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from fastcompat.errors import ArgumentError
from fastcompat.ops import nll_torch
from fastcompat.ops.backends import NATIVE_DTYPES, choose, native, native_level, triton_variant

Statistic = Literal["nll", "entropy", "varentropy", "rank", "collision"]

# The rows of what every back end returns, in this order; or the first one alone.
STATISTICS: tuple[Statistic, ...] = ("nll", "entropy", "varentropy", "rank", "collision")
RANK = STATISTICS.index("rank")

FLOAT32 = torch.finfo(torch.float32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Several = tuple[Statistic, Statistic, *tuple[Statistic, ...]]


@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    statistics: tuple[Statistic] = ("nll",),
    cu_seqlens: Tensor | None = None,
    check_target: bool = True,
    backend: str | None = None,
) -> Tensor: ...
@overload
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    statistics: Several,
    cu_seqlens: Tensor | None = None,
    check_target: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ...]: ...
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    statistics: tuple[Statistic, ...] = ("nll",),
    cu_seqlens: Tensor | None = None,
    check_target: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Per-token NLL of each target under an LM head, and more of the same distributions, without the logits.

    The same as

        z = (hidden @ weight.T + bias) * logit_scale         # [S, V]
        z = softcap * tanh(z / softcap)                      # where softcap is given
        p = softmax(z)

        nll         -log p[target]                           # nats
        entropy     E_p[-log p]
        varentropy  Var_p(log p)
        rank        number of logits strictly above the target's
        collision   sum of p^2

    with everything in float32 whatever the dtype of hidden and weight, and no [S, V] tensor anywhere.

    hidden: [S, D], contiguous; weight: [V, D], contiguous, same dtype and device; target: [S] int64 in [0, V);
    bias: [V] or None; softcap: Gemma-2's final_logit_softcapping; logit_scale: a factor on the logits (Cohere; one over
    Granite's logits_scaling).
    statistics: the names above that are wanted. One: its tensor; several: a tuple in the order asked for. [S] float32
    each, rank int64.
    cu_seqlens: [N + 1] int32 or int64, from 0 to S, non-decreasing: response n holds the tokens from cu_seqlens[n] up
    to cu_seqlens[n + 1]. Then [N] float64 sums over each response's tokens are returned instead, 0 where it has none.
    check_target: False where the caller knows that every target lies in [0, V): of a GPU the question costs a wait.
    backend: None, or one by name: "native" (C++; "native:avx2" and the like for one level), "triton" ("triton:cublas"
    and the like for one variant: docs/kernels.md), "torch".

    A bias of -inf bars a word (with a positive logit_scale, and unless a softcap makes it finite): it adds nothing, and
    as a target it has NLL inf. NaN in hidden states gives NaN, inf a non-finite NLL unless a softcap makes it finite.
    The extension's bits are equal for any number of threads and any batch, at one level. float64 is computed by torch,
    in float64. Raises ArgumentError, a ValueError, that names what does not fit and the fix. No gradients.
    """
    rows = _rows(statistics)
    _check_head(hidden, weight, bias)
    _check_scaling(softcap, logit_scale)
    _check_common("hidden", hidden, target, cu_seqlens)
    _check_no_gradient("linear_nll", hidden=hidden, weight=weight, bias=bias)
    token = _linear_nll(hidden, weight, target, bias, softcap, logit_scale, rows != (0,), backend, check_target)
    return _pick(token, rows, cu_seqlens, backend)


@overload
def packed_nll(
    logits: Tensor,
    target: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    statistics: tuple[Statistic] = ("nll",),
    backend: str | None = None,
) -> Tensor: ...
@overload
def packed_nll(
    logits: Tensor,
    target: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    statistics: Several,
    backend: str | None = None,
) -> tuple[Tensor, ...]: ...
def packed_nll(
    logits: Tensor,
    target: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    statistics: tuple[Statistic, ...] = ("nll",),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The statistics of `linear_nll` for callers who already hold logits, in one read of them.

    logits: [S, V] with columns next to each other, rows any distance apart; widened to float32 as they are read.
    target, cu_seqlens, statistics, backend and what is returned: as for `linear_nll`.
    """
    rows = _rows(statistics)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ArgumentError(f"logits must be [S, V] with V > 0, got {tuple(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1 and logits.shape[0]:
        raise ArgumentError(f"logits have strides {tuple(logits.stride())}: columns must adjoin, use .contiguous()")
    _check_common("logits", logits, target, cu_seqlens)
    _check_no_gradient("packed_nll", logits=logits)
    return _pick(_packed_nll(logits, target, rows != (0,), backend), rows, cu_seqlens, backend)


def _rows(statistics: Sequence[str]) -> tuple[int, ...]:
    """Which rows of a back end's result are wanted."""
    unknown = [name for name in statistics if name not in STATISTICS]
    if isinstance(statistics, str) or unknown:  # a name alone would be taken apart into its letters
        raise ArgumentError(f"statistics {statistics!r} must be a tuple of some of: {', '.join(STATISTICS)}")
    if not statistics or len(set(statistics)) < len(statistics):
        raise ArgumentError(f"statistics {tuple(statistics)} must name at least one, and none twice")
    return tuple(STATISTICS.index(name) for name in statistics)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        raise ArgumentError(
            "hidden must be [S, D] and weight [V, D] with one D, D and V above 0, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ArgumentError(f"hidden is {hidden.dtype}, weight {weight.dtype}: convert one, both must be the same")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not tensor.is_contiguous():
            raise ArgumentError(f"{name} has strides {tuple(tensor.stride())}: lay it out anew with .contiguous()")
    if weight.device != hidden.device:
        raise ArgumentError(f"hidden is on {hidden.device}, weight on {weight.device}: move one")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in DTYPES):
        raise ArgumentError(f"bias must be [{len(weight)}] of a float dtype, got {tuple(bias.shape)} {bias.dtype}")
    if bias is not None and bias.device != hidden.device:
        raise ArgumentError(f"hidden is on {hidden.device}, bias on {bias.device}: move one")


def _check_scaling(softcap: float | None, logit_scale: float) -> None:
    # Kernels take both as float32, where smaller values are 0 and larger ones inf. Comparisons are false for NaN, and
    # torch.compile can trace them.
    if softcap is not None and not FLOAT32.tiny <= softcap <= FLOAT32.max:
        raise ArgumentError(f"softcap must be above 0 and finite as float32, or None for none, got {softcap}")
    if not -FLOAT32.max <= logit_scale <= FLOAT32.max:
        raise ArgumentError(f"logit_scale must be finite as float32, got {logit_scale}")


def _check_common(name: str, values: Tensor, target: Tensor, cu_seqlens: Tensor | None) -> None:
    """What both functions ask of hidden or logits [S, ...], target and cu_seqlens."""
    if values.dtype not in DTYPES:
        raise ArgumentError(f"{name} is {values.dtype}: convert to one of {', '.join(map(str, DTYPES))}")
    if target.shape != values.shape[:1] or target.dtype != torch.int64:
        raise ArgumentError(f"target must be [{len(values)}] int64, got {tuple(target.shape)} {target.dtype}")
    if target.device != values.device:
        raise ArgumentError(f"{name} is on {values.device}, target on {target.device}: move one")
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"cu_seqlens must be [N + 1] int32 or int64, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != values.device:
        raise ArgumentError(f"{name} is on {values.device}, cu_seqlens on {cu_seqlens.device}: move one")


def _check_no_gradient(function: str, **tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ArgumentError(
                f"{function} computes no gradients, and {name} requires one: call it under torch.no_grad(), "
                f"or pass {name}.detach()"
            )


def _pick(
    token: Tensor, rows: tuple[int, ...], cu_seqlens: Tensor | None, backend: str | None
) -> Tensor | tuple[Tensor, ...]:
    """The wanted rows of [1 or 5, S], or their sums over each response."""
    if cu_seqlens is None:
        picked = [token[row].to(torch.int64) if row == RANK else token[row] for row in rows]
    else:
        wanted = token if len(rows) == len(token) and rows == tuple(range(len(token))) else token[list(rows)]
        if backend is not None and backend.startswith("triton"):
            backend = "triton"  # whatever variant
        picked = list(_segment_sum(wanted, cu_seqlens, backend).unbind())
    return picked[0] if len(picked) == 1 else tuple(picked)


@torch.library.custom_op("fastcompat::linear_nll", mutates_args=())
def _linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    all_statistics: bool,
    backend: str | None,
    check_target: bool = True,
) -> Tensor:
    """[1 or 5, S] float32."""
    backend = choose(backend, hidden, variants=True)
    if check_target:
        _check_range(target, len(weight))
    target = target.contiguous()
    out = _result(hidden, all_statistics)
    if not len(target):
        return out
    if not backend.startswith("native"):
        kernel = nll_torch.linear_nll if backend == "torch" else _triton_head(backend, hidden)
        # A caller's autocast would round float32 products to bfloat16.
        with torch.autocast(hidden.device.type, enabled=False):
            return kernel(
                hidden,
                weight,
                target,
                bias=bias,
                softcap=softcap,
                logit_scale=logit_scale,
                all_statistics=all_statistics,
            )
    bias = None if bias is None else bias.float().contiguous()
    native().linear_nll(
        hidden.data_ptr(),
        weight.data_ptr(),
        target.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *hidden.shape,
        len(weight),
        NATIVE_DTYPES[hidden.dtype],
        softcap or 0.0,
        logit_scale,
        all_statistics,
        native_level(backend),
        torch.get_num_threads(),
    )
    return out


@_linear_nll.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    all_statistics: bool,
    backend: str | None,
    check_target: bool = True,
) -> Tensor:
    return _result(hidden, all_statistics)


@torch.library.custom_op("fastcompat::packed_nll", mutates_args=())
def _packed_nll(logits: Tensor, target: Tensor, all_statistics: bool, backend: str | None) -> Tensor:
    """[1 or 5, S] float32."""
    backend = choose(backend, logits)
    _check_range(target, logits.shape[1])
    target = target.contiguous()
    out = _result(logits, all_statistics)
    if not len(target):
        return out
    if not backend.startswith("native"):
        kernel = nll_torch.packed_nll if backend == "torch" else _triton("packed_nll")
        return kernel(logits, target, all_statistics=all_statistics)
    native().packed_nll(
        logits.data_ptr(),
        target.data_ptr(),
        out.data_ptr(),
        *logits.shape,
        logits.stride(0),
        NATIVE_DTYPES[logits.dtype],
        all_statistics,
        native_level(backend),
        torch.get_num_threads(),
    )
    return out


@_packed_nll.register_fake
def _(logits: Tensor, target: Tensor, all_statistics: bool, backend: str | None) -> Tensor:
    return _result(logits, all_statistics)


@torch.library.custom_op("fastcompat::segment_sum", mutates_args=())
def _segment_sum(values: Tensor, cu_seqlens: Tensor, backend: str | None) -> Tensor:
    """[K, N] float64 sums of values [K, S]; the order of additions depends on a segment's length alone."""
    bounds = cu_seqlens.cpu().numpy()
    if bounds[0] != 0 or bounds[-1] != values.shape[1]:
        raise ArgumentError(f"cu_seqlens must run from 0 to S = {values.shape[1]}, got {bounds[0]} to {bounds[-1]}")
    falls = np.flatnonzero(bounds[1:] < bounds[:-1])
    if len(falls):
        n = falls[0]
        raise ArgumentError(f"cu_seqlens must not decrease, got {bounds[n]} and then {bounds[n + 1]} at index {n}")
    if choose(backend, values) == "triton" and values.numel():
        return _triton("segment_sum")(values.contiguous(), cu_seqlens.long().contiguous())
    sums = np.zeros((len(values), len(bounds) - 1))
    some = np.flatnonzero(bounds[1:] > bounds[:-1])
    if len(some):
        for row, row_sums in zip(values.cpu().numpy().astype(np.float64), sums, strict=True):
            row_sums[some] = np.add.reduceat(row, bounds[some])
    return torch.from_numpy(sums).to(values.device)


@_segment_sum.register_fake
def _(values: Tensor, cu_seqlens: Tensor, backend: str | None) -> Tensor:
    return values.new_empty((values.shape[0], cu_seqlens.shape[0] - 1), dtype=torch.float64)


def _result(values: Tensor, all_statistics: bool) -> Tensor:
    """[1 or 5, S] for the statistics of values [S, ...]."""
    n_rows = len(STATISTICS) if all_statistics else 1
    return torch.empty((n_rows, values.shape[0]), dtype=torch.float32, device=values.device)


def _check_range(target: Tensor, vocabulary: int) -> None:
    if not len(target):
        return
    low, high = torch.stack(target.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        raise ArgumentError(
            f"target must lie in [0, {vocabulary}), got {low}..{high}: leave padding out, do not mark it with -100"
        )


def _triton_head(backend: str, hidden: Tensor) -> Callable[..., Tensor]:
    """Triton's launcher, by the variant that is named."""
    table = import_module("fastcompat.kernels.linear_tiles")
    tiles = triton_variant(backend, table.variants(hidden.dtype, hidden.device))
    if tiles is None:
        return _triton("linear_nll")
    problem = table.why_not(tiles, hidden.dtype, hidden.shape[1])
    if problem:
        raise ArgumentError(f"backend {backend!r}: {problem}")
    return partial(_triton("linear_nll"), tiles=tiles)


def _triton(name: str) -> Callable[..., Tensor]:
    """The launcher of that name in the module of that name."""
    launcher: Callable[..., Tensor] = getattr(import_module(f"fastcompat.kernels.{name}"), name)
    return launcher
