"""The plain-torch definition of every kernel, in any dtype up to float64. Readable first; never used for speed.

Dimension key: T packed tokens, S scored tokens, D hidden size, V vocabulary, H query heads, K key heads, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[S, V] logits of hidden [S, D] under an LM head [V, D]: scaled, then soft-capped."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[S] negative log-likelihood of target [S], nats: `logsumexp(z) - z[target]`."""
    z = logits(hidden, weight, bias=bias, softcap=softcap, logit_scale=logit_scale)
    return token_statistics(z, target)["nll"]


def token_statistics(z: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What one distribution over the vocabulary says of its target: five statistics [S] of logits z [S, V].

    With p = softmax(z), natural logarithms, and target [S] int64 in [0, V):

        nll         -log p[target]
        entropy     E_p[-log p]
        varentropy  Var_p(log p)
        rank        number of logits strictly above the target's, int64
        collision   sum of p^2

    Each logit of -inf is a word of probability 0, which adds nothing; a row with +inf or NaN has no finite statistic
    but its rank.
    """
    log_p = z - torch.logsumexp(z, dim=-1, keepdim=True)
    p = log_p.exp()
    # 0 * -inf would be NaN; NaN itself stays.
    log_p_finite = log_p.masked_fill(z == float("-inf"), 0)
    entropy = -(p * log_p_finite).sum(-1)
    # Centred before it is squared: E[(log p)^2] - E[log p]^2 would lose all digits of a nearly flat distribution.
    centred = log_p_finite + entropy[:, None]
    target_logit = z.gather(-1, target[:, None])
    return {
        "nll": -log_p.gather(-1, target[:, None])[:, 0],
        "entropy": entropy,
        "varentropy": (p * centred.square()).sum(-1),
        "rank": (z > target_logit).sum(-1),
        "collision": p.square().sum(-1),
    }


def visible(position_ids: Tensor, subtree_end: Tensor, *, sliding_window: int | None = None) -> Tensor:
    """[T, T] bool: query i (row) sees key j (column) exactly when `j <= i < subtree_end[j]`.

    With a sliding window of w tokens, the query's own included, also `position_ids[i] - position_ids[j] < w`.
    """
    index = torch.arange(len(position_ids), device=position_ids.device)
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])
    if sliding_window is not None:
        mask = mask & (position_ids[:, None] - position_ids[None, :] < sliding_window)
    return mask


def forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    subtree_end: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[T, H, C] softmax attention over a prefix forest: query [H, T, C], key and value [K, T, C], K divides H.

    `sinks` [H] are logits that take part in the normalisation and carry no value (gpt-oss).
    """
    groups = query.shape[0] // key.shape[0]
    key = key.repeat_interleave(groups, dim=0)
    value = value.repeat_interleave(groups, dim=0)
    z = query @ key.transpose(1, 2) * scaling
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~visible(position_ids, subtree_end, sliding_window=sliding_window), float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.to(z.dtype)[:, None, None].expand(-1, z.shape[1], 1)], dim=-1)
    weights = torch.softmax(z, dim=-1)[..., : key.shape[1]]
    return (weights @ value).transpose(0, 1)


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype in which they are computed together: float64 where one of them is, else float32."""
    return torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32


def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`s * rsqrt(mean(s^2) + eps) * (offset + weight)` with s = x + residual, over the last axis of x [..., D].

    weight [D]; None scales nothing, whatever the offset. Gemma's weights are read with offset 1. Returns y, rounded
    once to x's dtype; with a residual [..., D] returns (s, y), where y is that of the s that is returned, rounded
    already.
    """
    wide = at_least_float32(x)
    s = x if residual is None else (x.to(wide) + residual.to(wide)).to(x.dtype)
    y = s.to(wide) * torch.rsqrt(s.to(wide).square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (offset + weight.to(wide))
    return y.to(x.dtype) if residual is None else (s, y.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves against each other, of the first R <= C channels of x [T, H, C].

    cos and sin [T, R], as Hugging Face makes them. With a = x[..., : R/2] and b = x[..., R/2 : R] these become
    `a * cos[: R/2] - b * sin[: R/2]` and `b * cos[R/2 :] + a * sin[R/2 :]`; the other channels stay. Rounded once.
    """
    half = cos.shape[-1] // 2
    wide = at_least_float32(x, cos, sin)
    a, b = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    cos, sin = cos.to(wide)[:, None, :], sin.to(wide)[:, None, :]
    rotated = (a * cos[..., :half] - b * sin[..., :half], b * cos[..., half:] + a * sin[..., half:])
    return torch.cat([*(part.to(x.dtype) for part in rotated), x[..., 2 * half :]], dim=-1)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up` of two [T, I], rounded once; the activation is "silu" or "gelu_tanh".

    silu(g) = g / (1 + exp(-g)) and gelu_tanh(g) = g / 2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))).
    """
    wide = at_least_float32(gate, up)
    g = gate.to(wide)
    if activation == "silu":
        acted = torch.nn.functional.silu(g)
    elif activation == "gelu_tanh":
        acted = torch.nn.functional.gelu(g, approximate="tanh")
    else:
        raise ValueError(f"activation is 'silu' or 'gelu_tanh', got {activation!r}")
    return (acted * up.to(wide)).to(gate.dtype)
