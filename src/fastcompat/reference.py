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
