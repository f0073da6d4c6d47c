"""Which back end serves a tensor: the fastest that is there, by name where asked, never silently a slower one."""

from __future__ import annotations

import logging

import pytest
import torch

from fastcompat import linear_nll
from fastcompat.errors import ArgumentError
from fastcompat.ops import backends


@pytest.fixture
def without_extension(monkeypatch):
    """A machine that had no compiler when fastcompat was installed."""
    caches = (backends.why_not, backends._announce)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(backends, "_load_native", lambda: "the C++ extension was not built when it was installed")
    yield
    for cached in caches:
        cached.cache_clear()


def test_a_slower_back_end_is_announced_once_with_the_reason(without_extension, caplog):
    arguments = torch.zeros(2, 8), torch.zeros(10, 8), torch.tensor([0, 1])
    with caplog.at_level(logging.WARNING, logger="fastcompat"):
        assert linear_nll(*arguments).tolist() == pytest.approx([2.302585] * 2)
        linear_nll(*arguments)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "plain torch" in message
    assert "was not built" in message
    assert "fastcompat doctor" in message


def test_a_back_end_that_is_asked_for_is_never_replaced(without_extension):
    with pytest.raises(ArgumentError, match=r"'native': the C\+\+ extension was not built.*cpu tensors.*torch"):
        backends.choose("native", torch.zeros(1))
    with pytest.raises(ArgumentError, match=r"'native:avx2': the C\+\+ extension was not built"):
        backends.choose("native:avx2", torch.zeros(1))


def test_each_device_has_its_own(caplog):
    with caplog.at_level(logging.WARNING, logger="fastcompat"):
        if "native" in backends.available("cpu"):
            assert backends.choose(None, torch.zeros(1)) == "native"
        assert backends.choose(None, torch.zeros(1, dtype=torch.float64)) == "torch"
        assert backends.choose(None, torch.zeros(1, device="meta")) == "torch"
    assert not caplog.records  # nothing faster exists for these
    assert "serves CPU tensors only" in str(backends.why_not("native", "cuda"))
    assert "do not serve" in str(backends.why_not("triton", "xpu")) or "imported" in str(
        backends.why_not("triton", "xpu")
    )


def test_levels_are_named_the_fastest_first():
    levels = backends.native_levels()
    assert levels == [level for level in ("avx512_bf16", "avx512", "avx2", "portable") if level in levels]
    assert backends.available("cpu")[-1] == "torch"
    for level in levels:
        assert backends.why_not(f"native:{level}", "cpu") is None
    assert backends.why_not("native:", "cpu") is not None


def test_on_a_gpu_triton_needs_a_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    problem = str(backends._why_not_triton("cuda"))
    assert "gcc or clang" in problem or "cannot be imported" in problem
