"""The operators as torch.compile meets them: their fakes are honest, and nothing breaks the graph."""

from __future__ import annotations

import pytest
import torch
from nll_problems import each_backend, problem
from torch.library import opcheck

from fastcompat import linear_nll, packed_nll
from fastcompat.ops.nll import STATISTICS

operators = torch.ops.fastcompat


@pytest.mark.parametrize("all_statistics", [False, True])
@each_backend
def test_opcheck(backend, device, all_statistics):
    p = problem(5, 16, 40, torch.float32).to(device)
    bias = torch.randn(40, dtype=torch.float64, device=device)
    opcheck(operators.linear_nll.default, (*p, None, None, 1.0, all_statistics, backend))
    opcheck(operators.linear_nll.default, (*p, bias, 30.0, 0.5, all_statistics, backend))
    rows_apart = torch.randn(5, 48, device=device)[:, :40]
    opcheck(operators.packed_nll.default, (rows_apart, p.target, all_statistics, backend))
    values, cu_seqlens = torch.randn(3, 7, device=device), torch.tensor([0, 0, 4, 7], device=device)
    opcheck(operators.segment_sum.default, (values, cu_seqlens, backend))


def figures(hidden, weight, target, cu_seqlens, backend, softcap=None):
    rank, nll = linear_nll(hidden, weight, target, softcap=softcap, statistics=("rank", "nll"), backend=backend)
    sums = linear_nll(hidden, weight, target, statistics=STATISTICS, cu_seqlens=cu_seqlens, backend=backend)
    logits = hidden @ weight.T
    entropy = packed_nll(logits, target, statistics=("entropy",), backend=backend)
    return rank, nll * 2, *sums, entropy, packed_nll(logits, target, cu_seqlens, backend=backend)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_compiled_whole_with_equal_bits_at_any_length(backend):
    torch._dynamo.reset()
    compiled = torch.compile(figures, fullgraph=True, backend="aot_eager")
    # From the second length on it is traced with a symbolic size.
    for n_scored, softcap in ((12, None), (17, 5.0), (30, 7.0)):
        p = problem(n_scored, 16, 60, torch.float32)
        arguments = (*p, torch.tensor([0, 5, 5, n_scored]), backend, softcap)
        for got, want in zip(compiled(*arguments), figures(*arguments), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_compiled_by_inductor():
    torch._dynamo.reset()
    # Nothing but the operators, so that no C++ has to be compiled for the test.
    compiled = torch.compile(linear_nll, fullgraph=True)
    p = problem(12, 16, 60, torch.bfloat16)
    assert torch.equal(compiled(*p), linear_nll(*p))
    cu_seqlens = torch.tensor([0, 5, 12])
    assert torch.equal(compiled(*p, cu_seqlens=cu_seqlens), linear_nll(*p, cu_seqlens=cu_seqlens))


def test_a_wrong_target_is_found_inside_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(linear_nll, fullgraph=True, backend="aot_eager")
    p = problem(3, 4, 10, torch.float32)
    with pytest.raises(ValueError, match="leave padding out"):
        compiled(p.hidden, p.weight, torch.tensor([0, -100, 1]))


def test_shapes_and_dtypes_are_known_without_values():
    with torch.device("meta"):
        hidden, weight, target = torch.zeros(7, 4), torch.zeros(9, 4), torch.zeros(7, dtype=torch.int64)
        cu_seqlens = torch.zeros(4, dtype=torch.int64)
    rank, nll = linear_nll(hidden, weight, target, statistics=("rank", "nll"))
    assert (rank.shape, rank.dtype, nll.dtype) == ((7,), torch.int64, torch.float32)
    sums = packed_nll(hidden, target, cu_seqlens)
    assert (sums.shape, sums.dtype) == ((3,), torch.float64)
