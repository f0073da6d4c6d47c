"""The fused head's one narrow function: hidden states and an LM head in, per-token NLL out, never the logits.

Dimension key: S scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A tile of logits, [TOKENS, VOCABULARY] float32: 8 MiB, so that it stays in the cache between product and logsumexp.
TILE_TOKENS = 1024
TILE_VOCABULARY = 2048
# The same on a GPU, where the product wants large tiles and 256 MiB are nothing.
CUDA_TILE_TOKENS = 4096
CUDA_TILE_VOCABULARY = 16384


@torch.no_grad()
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """[S] float32 negative log-likelihood of each target, in nats, from float32-accumulated logits.

    The same as

        z = (hidden @ weight.T + bias) * logit_scale         # [S, V]
        z = softcap * tanh(z / softcap)                      # where softcap is given
        logsumexp(z, dim=-1) - z[arange(S), target]

    with products of hidden's and weight's values accumulated in float32 whatever their dtype, and no [S, V] tensor.

    hidden: [S, D]; weight: [V, D], same dtype and device; target: [S] int64 in [0, V); bias: [V] or None.
    softcap: Gemma-2's final_logit_softcapping; logit_scale: a factor on the logits (Cohere; 1 / Granite's).
    Raises ValueError for shapes, dtypes or targets that do not fit, naming the value.
    """
    _validate(hidden, weight, target, bias)
    n_scored, vocabulary = len(hidden), len(weight)
    on_cpu = hidden.device.type == "cpu"
    tile_tokens = TILE_TOKENS if on_cpu else CUDA_TILE_TOKENS
    tile_vocabulary = TILE_VOCABULARY if on_cpu else CUDA_TILE_VOCABULARY
    hidden32 = hidden.float()
    log_sum = hidden32.new_full((n_scored,), float("-inf"))
    target_logit = hidden32.new_full((n_scored,), float("nan"))
    # The vocabulary is the outer loop: each weight is cast to float32 once.
    for v in range(0, vocabulary, tile_vocabulary):
        weight32 = weight[v : v + tile_vocabulary].float()
        bias32 = None if bias is None else bias[v : v + tile_vocabulary].float()
        for s in range(0, n_scored, tile_tokens):
            rows = slice(s, s + tile_tokens)
            z = F.linear(hidden32[rows], weight32, bias32)
            if logit_scale != 1.0:
                z.mul_(logit_scale)
            if softcap:
                z.div_(softcap).tanh_().mul_(softcap)
            column = target[rows] - v
            (inside,) = torch.nonzero((column >= 0) & (column < z.shape[1]), as_tuple=True)
            target_logit[s + inside] = z[inside, column[inside]]
            log_sum[rows] = torch.logaddexp(log_sum[rows], torch.logsumexp(z, dim=1))
    return log_sum - target_logit


def _validate(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [S, D] and weight [V, D] with one D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: convert one, both must be the same float")
    if hidden.device != weight.device or target.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}, target on {target.device}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be [{len(hidden)}] int64, got {tuple(target.shape)} {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {tuple(bias.shape)}")
    if len(target):
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"target must lie in [0, {len(weight)}), got {low}..{high}: leave padding out, do not mark it with -100"
            )
