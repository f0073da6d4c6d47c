"""flash-attn 2, 3 and 4 and torch's varlen_attn, played by a dense computation with the same parameters."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcompat.ops import flash_choice
from fastcompat.ops.attention_flash import Library, load

# The public functions' parameters, as the sources of flash-attn 2.8.3, of 3 in August 2026, of 4.0.0b36 and of 4.0.0b4
# have them, and torch 2.11 and 2.13.
FLASH_2 = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, "
    "block_table=None"
)
FLASH_3 = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
    "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, "
    "return_attn_probs=False"
)
FLASH_4 = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, "
    "seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, "
    "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, "
    "return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False, "
    "gather_bwd_recompute_p=None, gather_bwd_token_chunk=None"
)
FLASH_4_FIRST = (
    "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, "
    "seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, "
    "softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, aux_tensors=None, return_lse=False"
)
TORCH_2_11 = "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)"
TORCH_2_12 = f"{TORCH_2_11}, enable_gqa=False, seqused_k=None, block_table=None, num_splits=None"


def library(backend: str) -> Library:
    (found,) = flash_choice.named(backend)
    return found


class FakeLibrary:
    """A library's function with its parameters, which computes densely, sequence by sequence, in at least float32."""

    def __init__(self, backend: str, parameters: str) -> None:
        self.backend, self.calls = backend, 0
        self.top_left = False  # the causal mask is aligned to the beginnings
        self.lse_unit = 1.0
        self.error: Exception | None = None
        space: dict[str, Any] = {"compute": self.compute}
        exec(f"def function({parameters}):\n    return compute(locals())", space)
        self.function = space["function"]

    def compute(self, given: dict[str, Any]) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        if self.backend == "varlen":
            names = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale"]
            left, right = given["window_size"]
            causal, lse_wanted, softcap = right == 0, given["return_aux"] is not None and given["return_aux"].lse, 0
            if given["query"].shape[1] != given["key"].shape[1] and not given.get("enable_gqa", True):
                raise ValueError("Expect query and key/value to have the same number of heads")
        else:
            names = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"]
            left, causal, softcap = given["window_size"][0], given["causal"], given["softcap"]
            lse_wanted = given.get("return_attn_probs", given.get("return_lse"))
        q, k, v, cu_q, cu_k, longest_q, longest_k, scale = (given[name] for name in names)
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
        assert cu_q.diff().max() <= longest_q
        assert cu_k.diff().max() <= longest_k
        reach = None if left in (None, -1) else left
        out, lse = (
            torch.empty_like(q),
            torch.empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32)),
        )
        for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
            self.sequence(q[a:b], k[c:d], v[c:d], out[a:b], lse[:, a:b], scale, causal, reach, softcap)
        if self.backend == "flash:4":
            return out, lse if lse_wanted else None
        if not lse_wanted:
            return out
        return (out, lse, None) if self.backend == "flash:2" else (out, lse)

    def sequence(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, reach, softcap
    ) -> None:
        groups = q.shape[1] // k.shape[1]
        wide = lse.dtype
        q, k, v = (x.to(wide).transpose(0, 1) for x in (q, k, v))
        z = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        behind = 0 if self.top_left else k.shape[1] - q.shape[1]
        apart = torch.arange(q.shape[1])[:, None] + behind - torch.arange(k.shape[1])
        if causal:
            z = z.masked_fill(apart < 0, float("-inf"))
        if reach is not None:
            z = z.masked_fill(apart > reach, float("-inf"))
        out[:] = (z.softmax(-1) @ v.repeat_interleave(groups, 0)).transpose(0, 1).to(out.dtype)
        lse[:] = torch.logsumexp(z, -1) * self.lse_unit


def forget() -> None:
    """What was found out of libraries in this process."""
    load.cache_clear()
    flash_choice._problems.clear()
    flash_choice._announce.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, backend: str, parameters: str) -> FakeLibrary:
    """A fake in the place of a library. Whoever installs one forgets at the end."""
    fake, of = FakeLibrary(backend, parameters), library(backend)
    if backend == "varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake.function)
    else:
        module = ModuleType(of.module)
        setattr(module, of.function, fake.function)
        if of.module == "flash_attn.cute" and "flash_attn" not in sys.modules:
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, of.module, module)
    forget()
    return fake
