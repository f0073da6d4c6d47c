"""Which back ends this machine has for a kernel, which one serves a tensor, and why not a faster one.

torch            plain torch, on every device
native           the C++ extension, for CPU tensors, at the fastest level that the processor offers
native:avx2 ...  one level of it: avx512_bf16, avx512, avx2 or portable
triton           the Triton kernels, for CUDA tensors (on a CPU only under Triton's interpreter, for tests)
triton:NAME      one of their variants, where a kernel has any (`kernels/linear_tiles.py`, `kernels/forest_plan.py`)
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcompat.errors import ArgumentError

# What serves the tensors of a device type where it can; torch serves all others.
FASTEST = {"cpu": "native", "cuda": "triton"}
# The C++ extension's names of the dtypes that it computes.
NATIVE_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def choose(backend: str | None, values: Tensor, *, variants: bool = False) -> str:
    """The back end that computes on `values`: the one that is named, else the fastest that the device has.

    variants: the caller has some of Triton's, and looks their names up (`triton_variant`).

    Raises ArgumentError where the one that is named does not serve these tensors. A slower one that steps in for the
    fastest is announced once.
    """
    device = values.device.type
    if backend is not None:
        problem = why_not(backend, device)
        if problem:
            here = ", ".join(available(device))
            raise ArgumentError(f"backend {backend!r}: {problem}. For {device} tensors this machine has: {here}")
        if backend.startswith("triton:") and not variants:
            raise ArgumentError(
                f"backend {backend!r}: only linear_nll and forest_attention have variants: use 'triton'"
            )
        if values.dtype == torch.float64 and backend != "torch":
            raise ArgumentError(
                f"backend {backend!r} computes in float32: use .float(), or backend='torch' for float64"
            )
        return backend
    fastest = FASTEST.get(device)
    if fastest is None or values.dtype == torch.float64:
        return "torch"
    problem = why_not(fastest, device)
    if problem is None:
        return fastest
    _announce(f"for {device} tensors plain torch serves, which is slower: {problem} (see `fastcompat doctor`)")
    return "torch"


def available(device: str) -> list[str]:
    """The back ends that serve tensors of a device type, the fastest first."""
    levels = [f"native:{level}" for level in native_levels()]
    return [name for name in ("triton", "native", *levels, "torch") if why_not(name, device) is None]


@functools.cache
def why_not(backend: str, device: str) -> str | None:
    """Why a back end does not serve tensors of a device type, as a phrase; None where it does."""
    name, _, level = backend.partition(":")
    if backend == "torch":
        return None
    if name == "native":
        if device != "cpu":
            return "the C++ extension serves CPU tensors only"
        extension = _load_native()
        if isinstance(extension, str):
            return extension
        if level and level not in native_levels():
            return f"this processor offers no level {level!r}"
        return None if level or ":" not in backend else "no level is named after the colon"
    if name == "triton":
        return _why_not_triton(device)
    return "there is no such back end"


def triton_variant(backend: str, variants: Mapping[str, Any]) -> Any:
    """What `variants` has under the name in triton:NAME, else ArgumentError; None for triton itself."""
    _, colon, name = backend.partition(":")
    if colon and name not in variants:
        raise ArgumentError(
            f"backend {backend!r}: there is no such variant for these tensors, but {', '.join(variants)}"
        )
    return variants[name] if colon else None


def native() -> ModuleType:
    """The C++ extension, where `why_not` found nothing against it."""
    extension = _load_native()
    assert isinstance(extension, ModuleType), extension
    return extension


def native_levels() -> list[str]:
    """The instruction-set levels of the C++ extension that this processor offers, the fastest first."""
    extension = _load_native()
    return [] if isinstance(extension, str) else list(extension.levels())


def native_level(backend: str) -> str:
    """avx2 of native:avx2; of native the fastest that the processor offers."""
    return backend.partition(":")[2] or native_levels()[0]


@functools.cache
def _load_native() -> ModuleType | str:
    """The C++ extension, or why there is none."""
    try:
        return import_module("fastcompat._native")
    except ModuleNotFoundError:
        return "the C++ extension was not built when fastcompat was installed"
    except ImportError as error:
        return f"the C++ extension cannot be loaded ({error})"


def _why_not_triton(device: str) -> str | None:
    try:
        import_module("fastcompat.kernels.linear_nll")
        knobs = import_module("triton").knobs
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device == "cpu" and not knobs.runtime.interpret:
        return "the Triton kernels serve CUDA tensors only"
    if device not in FASTEST:
        return f"the Triton kernels do not serve {device} tensors"
    # Triton compiles its launchers when they are first used.
    if device == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler (gcc or clang), and there is none"
    return None


@functools.cache
def _announce(message: str) -> None:
    logging.getLogger("fastcompat").warning(message)
