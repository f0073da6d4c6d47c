"""The torch back end of the fused head: tiles of logits in plain torch, on every device that torch has.

It serves where neither the C++ extension nor Triton does. Each function returns the statistics of
`reference.token_statistics` as rows: float32 [1, S], the NLL alone, or [5, S], all of them.

Dimension key: S scored tokens (of one tile in private functions), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A tile of logits, [tokens, vocabulary] float32: 8 MiB, so that it stays in the cache between product and exponential.
TILE_TOKENS = 1024
TILE_VOCABULARY = 2048
# The same on a GPU, where the product wants large tiles and 256 MiB are nothing.
CUDA_TILE_TOKENS = 4096
CUDA_TILE_VOCABULARY = 16384


def tile_shape(on_gpu: bool) -> tuple[int, int]:
    """(tokens, words) of the logits that are there at once."""
    return (CUDA_TILE_TOKENS, CUDA_TILE_VOCABULARY) if on_gpu else (TILE_TOKENS, TILE_VOCABULARY)


# Columns, a slice or [n] indices, -> the logits [S, n] of one tile of tokens, in memory of their own.
Logits = Callable[[slice | Tensor], Tensor]


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    all_statistics: bool = False,
) -> Tensor:
    """[1 or 5, S] statistics of target [S] under the logits of hidden [S, D] and an LM head [V, D], tile by tile.

    Values are widened to float32 before they are multiplied (float64 stays as it is), which keeps products of
    bfloat16 and float16 exact.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def logits(rows: slice, columns: slice | Tensor) -> Tensor:
        bias_tile = None if bias is None else bias[columns].to(dtype)
        z = F.linear(hidden[rows].to(dtype), weight[columns].to(dtype), bias_tile)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        return z

    return _by_tiles(logits, target, len(weight), all_statistics=all_statistics)


def packed_nll(logits: Tensor, target: Tensor, *, all_statistics: bool = False) -> Tensor:
    """[1 or 5, S] statistics of target [S] under logits [S, V], tile by tile."""
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def tile(rows: slice, columns: slice | Tensor) -> Tensor:
        return logits[rows, columns].to(dtype, copy=True)

    return _by_tiles(tile, target, logits.shape[1], all_statistics=all_statistics)


def _by_tiles(
    logits: Callable[[slice, slice | Tensor], Tensor], target: Tensor, vocabulary: int, *, all_statistics: bool
) -> Tensor:
    on_gpu = target.device.type == "cuda"
    tile_tokens, width = tile_shape(on_gpu)
    out = target.new_empty((5 if all_statistics else 1, len(target)), dtype=torch.float32)
    for begin in range(0, len(target), tile_tokens):
        rows = slice(begin, begin + tile_tokens)

        def of_these_rows(columns: slice | Tensor, rows: slice = rows) -> Tensor:
            return logits(rows, columns)

        statistics = _all_statistics if all_statistics else _nll
        out[:, rows] = statistics(of_these_rows, target[rows], vocabulary, width)
    return out


def _nll(logits: Logits, target: Tensor, vocabulary: int, width: int) -> Tensor:
    total = _Softmax.empty(target)
    target_logit = torch.full_like(total.log_mass, float("nan"))
    for v in range(0, vocabulary, width):
        z = logits(slice(v, v + width))
        _take_targets(z, target - v, target_logit)
        total.log_mass = torch.logaddexp(total.log_mass, _log_mass(z)[0])
    return (total.log_mass - target_logit)[None]


def _all_statistics(logits: Logits, target: Tensor, vocabulary: int, width: int) -> Tensor:
    # A rank needs the target's logit before the first tile is counted. A small product computes it ahead; its last bit
    # is not always that of the same logit in its tile, and then the tiles are counted once more against that one.
    threshold = logits(target).diagonal()
    for _ in range(2):
        total = _Softmax.empty(target)
        target_logit = torch.full_like(threshold, float("nan"))
        above = torch.zeros_like(target)
        for v in range(0, vocabulary, width):
            z = logits(slice(v, v + width))
            _take_targets(z, target - v, target_logit)
            above += (z > threshold[:, None]).sum(1)
            total = _mixture(total, _softmax(z))
        if bool(((target_logit == threshold) | target_logit.isnan()).all()):
            break
        threshold = target_logit
    nll = total.log_mass - target_logit
    entropy = total.log_mass - total.mean
    return torch.stack([nll, entropy, total.variance, above.to(nll.dtype), total.collision])


def _take_targets(z: Tensor, column: Tensor, target_logit: Tensor) -> None:
    """Copy z[s, column[s]] for every s whose column lies in this tile."""
    (inside,) = torch.nonzero((column >= 0) & (column < z.shape[1]), as_tuple=True)
    target_logit[inside] = z[inside, column[inside]].to(target_logit.dtype)


@dataclass(slots=True)
class _Softmax:
    """The softmax over some of the words, one for each of S tokens; in float64 where the device has it.

    log p = z - log_mass, so that the variance of z is that of log p and the entropy is log_mass - mean.
    """

    log_mass: Tensor  # logsumexp(z)
    mean: Tensor  # E_p[z]
    variance: Tensor  # Var_p(z)
    collision: Tensor  # sum of p^2

    @classmethod
    def empty(cls, like: Tensor) -> _Softmax:
        """Over no words."""
        zeros = torch.zeros(like.shape, dtype=_wide(like), device=like.device)
        return cls(zeros - float("inf"), zeros, zeros, zeros)


def _softmax(z: Tensor) -> _Softmax:
    """Of one tile [S, n], which is overwritten."""
    log_mass, top, p = _log_mass(z)
    # Where p is 0, so is its share of every sum; 0 * -inf would be NaN.
    z.clamp_(min=-1000.0)
    mass = p.sum(1, keepdim=True)
    p /= torch.where(mass == 0, 1, mass)
    mean = (p * z).sum(1, keepdim=True)
    # Centred before it is squared: the difference of two sums would cancel.
    variance = z.sub_(mean).square_().mul_(p).sum(1)
    wide = log_mass.dtype
    return _Softmax(log_mass, (top.to(wide) + mean.to(wide))[:, 0], variance.to(wide), p.square_().sum(1).to(wide))


def _log_mass(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp(z) [S], its maximum [S, 1], exp(z - maximum)) of one tile, from which its maximum is subtracted."""
    top = z.amax(1, keepdim=True)
    top = torch.where(top == float("-inf"), 0, top)
    p = z.sub_(top).exp()
    wide = _wide(z)
    return (p.sum(1, keepdim=True).to(wide).log() + top.to(wide))[:, 0], top, p


def _mixture(a: _Softmax, b: _Softmax) -> _Softmax:
    """The softmax over the words of both: all terms of the variance are positive, nothing cancels."""
    log_mass = torch.logaddexp(a.log_mass, b.log_mass)
    anchor = torch.where(log_mass == float("-inf"), 0, log_mass)
    share_a, share_b = (a.log_mass - anchor).exp(), (b.log_mass - anchor).exp()
    return _Softmax(
        log_mass,
        share_a * a.mean + share_b * b.mean,
        share_a * a.variance + share_b * b.variance + share_a * share_b * (a.mean - b.mean).square(),
        share_a.square() * a.collision + share_b.square() * b.collision,
    )


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
