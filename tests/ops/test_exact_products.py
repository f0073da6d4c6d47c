"""What torch may do to a GPU's products inside `exact_products`, and that everything is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastcompat.ops import exact_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MATMUL = torch.backends.cuda.matmul
REDUCED = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def settings() -> list[object]:
    splits = [getattr(MATMUL, f"{name}_split_k") for name in REDUCED]
    return [MATMUL.fp32_precision, *(getattr(MATMUL, name) for name in REDUCED), *splits]


@pytest.fixture(params=["nobody", "the older interface", "the newer interface", "all of torch"])
def tf32(request) -> Iterator[bool]:
    """Whether TF32 is allowed: by whom it was."""
    everywhere, own = torch.backends.fp32_precision, MATMUL.fp32_precision
    if request.param == "the older interface":
        MATMUL.allow_tf32 = True
    elif request.param == "the newer interface":
        MATMUL.fp32_precision = "tf32"
    elif request.param == "all of torch":
        torch.backends.fp32_precision = "tf32"
    yield request.param != "nobody"
    if request.param == "the older interface":
        MATMUL.allow_tf32 = False
    torch.backends.fp32_precision, MATMUL.fp32_precision = everywhere, own


def test_nothing_rounds_on_the_way_and_all_is_put_back(tf32):
    before = settings()
    assert (before[0] == "tf32") == tf32
    assert before[1:] == [True, True, True, True]
    with exact_products(CUDA):
        assert MATMUL.fp32_precision != "tf32"
        assert settings()[1:] == [False, False, True, True]
        with exact_products(CUDA):
            assert settings()[1:] == [False, False, True, True]
        assert settings()[1:] == [False, False, True, True]
    assert settings() == before
    with pytest.raises(KeyError), exact_products(CUDA):
        raise KeyError
    assert settings() == before


def test_two_threads_blocks_that_overlap(tf32):
    before = settings()
    first, second = exact_products(CUDA), exact_products(CUDA)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert MATMUL.fp32_precision != "tf32"
    assert settings()[1:] == [False, False, True, True]
    second.__exit__(None, None, None)
    assert settings() == before


def test_a_cpu_computes_as_it_did(tf32):
    before = settings()
    with exact_products(CPU, split=False):
        assert settings() == before


def test_no_product_is_divided_where_that_is_asked(monkeypatch):
    # A torch without CUDA has no cuBLASLt to prefer.
    preferred = ["cublas"]

    def prefer(library: str | None = None) -> str:
        preferred[:] = [library or preferred[0]]
        return preferred[0]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", prefer)
    before = settings()
    with exact_products(CUDA, split=False):
        assert settings()[1:] == [False, False, False, False]
        assert preferred == ["cublaslt"]
        with exact_products(CUDA):  # in another thread, say
            assert settings()[1:] == [False, False, False, False]
        assert preferred == ["cublaslt"]
    assert settings() == before
    assert preferred == ["cublas"]
