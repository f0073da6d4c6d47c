"""What launchers ask of the compiler, as it is noted for the ahead-of-time report."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from fastcompat.kernels import linear_nll as head
from fastcompat.kernels import linear_tiles, packed_nll, row_cases
from fastcompat.kernels.ahead_of_time import asked

KERNELS = {packed_nll: ("_split_kernel", "_merge_kernel")}


def rows(n_columns: int, begin: int = 0) -> partial[torch.Tensor]:
    logits = torch.empty(5, n_columns, dtype=torch.bfloat16, device="meta")[:, begin:]
    return partial(packed_nll.packed_nll, logits, torch.empty(5, dtype=torch.int64, device="meta"))


def test_alignment_is_noted_as_a_gpu_would_see_it():
    calls = [("even", rows(512)), ("odd", rows(513)), ("shifted", rows(512, 1)), ("even too", rows(512))]
    cases = {case.name: case for case in asked(90, calls, KERNELS, products=("merge",))}
    # What is asked alike is there once. (Which integers a kernel waives, the interpreter does not tell.)
    assert set(cases) - {"odd: merge"} == {"even: split", "even: merge", "odd: split", "shifted: split"}
    even, odd, shifted = (cases[f"{name}: split"] for name in ("even", "odd", "shifted"))
    assert {"n_columns", "row_stride"} <= set(even.divisible)
    assert not {"n_columns", "row_stride"} & set(odd.divisible)
    assert "row_stride" in shifted.divisible
    assert (even.unaligned, odd.unaligned, shifted.unaligned) == ((), (), ("logits",))
    assert even.signature["logits"] == "*bf16"
    assert even.signature["bias"] == "constexpr"
    assert even.constexprs["bias"] is None
    assert (even.constexprs["VECTOR"], odd.constexprs["VECTOR"]) == (8, 1)
    assert even.options == {"num_warps": 4, "enable_fp_fusion": True}
    assert not even.must_use_tensor_cores
    assert cases["even: merge"].must_use_tensor_cores  # as it was said above


def test_the_architecture_decides_and_everything_is_put_back():
    hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (5, 300))
    call = partial(head.linear_nll, hidden, weight, torch.empty(5, dtype=torch.int64, device="meta"))
    before = linear_tiles.architecture, packed_nll._split_kernel
    kernels = {head: ("_range_kernel", "_target_kernel", "_merge_kernel")}
    warps = {}
    for arch in (80, 100):
        [case] = [case for case in asked(arch, [("head", call)], kernels) if case.name == "head: range"]
        warps[arch] = case.options["num_warps"]
    assert warps == {arch: linear_tiles.TILES[arch].num_warps for arch in (80, 100)}
    with pytest.raises(ValueError, match="meant"):
        asked(90, [("broken", partial(_fail, "meant"))], KERNELS)
    assert (linear_tiles.architecture, packed_nll._split_kernel) == before


def _fail(message: str) -> None:
    raise ValueError(message)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_cases_of_rows_name_every_parameter(arch):
    cases = row_cases.aot_cases(arch)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == list(case.fn.arg_names)
        assert [name for name, kind in case.signature.items() if kind == "constexpr"] == list(case.constexprs)
