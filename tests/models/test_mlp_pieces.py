"""An MLP in pieces of the tokens: the same sums, and pieces only where they help."""

from __future__ import annotations

import torch
from torch import nn

from fastcompat.models.fused_modules import GPU_MLP_TOKENS, L2_MLP_BYTES, MLP_BYTES, FusedMlp, mlp_pieces


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 24, bias=False)
        self.down_proj, self.act_fn = nn.Linear(24, 8, bias=False), nn.SiLU()


@torch.no_grad()
def test_pieces_are_of_all_tokens_in_their_order(monkeypatch):
    torch.manual_seed(0)
    module, x = Mlp(), torch.randn(1, 50, 8)
    fused, rows = FusedMlp(module), []
    whole = fused(None, x)
    part = FusedMlp._rows
    monkeypatch.setattr(FusedMlp, "_rows", lambda self, x: rows.append(len(x)) or part(self, x))
    monkeypatch.setitem(MLP_BYTES, "cpu", 7 * 2 * 24 * 4)  # seven tokens
    torch.testing.assert_close(fused(None, x), whole)
    assert sum(rows) == 50
    assert max(rows) == 7
    assert min(rows) == 6


def test_a_gpu_takes_pieces_where_they_are_long_enough(monkeypatch):
    small, large = 2 * 4864 * 2, 2 * 14_336 * 2  # Qwen2.5-0.5B, Llama-3-8B, bf16
    assert mlp_pieces(65_536, small, "cuda") == 1  # until it is measured
    monkeypatch.setitem(MLP_BYTES, "cuda", L2_MLP_BYTES)
    pieces = mlp_pieces(65_536, small, "cuda")
    assert GPU_MLP_TOKENS <= 65_536 // pieces <= L2_MLP_BYTES // small
    assert mlp_pieces(65_536, large, "cuda") == 1
    assert mlp_pieces(300, small, "cuda") == 1
    assert mlp_pieces(65_536, large, "mps") == 1


def test_a_piece_has_a_token_at_least():
    assert [mlp_pieces(n_tokens, 1 << 30, "cpu") for n_tokens in (0, 1, 2)] == [1, 1, 2]
