"""What computes what on this machine, and what stands in the way of something faster: `fastcompat doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastcompat import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "triton")
REBUILD = "install a C++17 compiler (g++ or clang), then install fastcompat again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `advice` is there where something faster, or anything at all, is to be had."""

    section: str
    subject: str
    found: str
    why: str | None = None
    advice: str | None = None


def examine(base_model: str | None = None) -> list[Finding]:
    """Everything that is known of this machine, section by section. Loads torch; takes seconds.

    With a base model, a hub id or a directory, also what of it runs fused. Raises ModelError where it cannot be loaded.
    """
    model = [] if base_model is None else [*_model(base_model)]
    return [*_machine(), *_kernels(), *model, *_versions()]


def _machine() -> Iterator[Finding]:
    import torch

    from fastcompat.configuration import native_bfloat16

    section = "machine"
    yield Finding(section=section, subject="system", found=f"{platform.system()} {platform.machine()}")
    n_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = torch.get_num_threads()
    limit = os.environ.get("OMP_NUM_THREADS")
    # Half of the hardware threads is torch's own choice where two share a core.
    idle = limit is not None and 2 * n_threads < n_processors
    yield Finding(
        section=section,
        subject="processor",
        found=f"{_processor()}, {n_threads} of {n_processors} hardware threads used",
        why=None if limit is None else f"OMP_NUM_THREADS={limit}",
        advice="unset OMP_NUM_THREADS where nothing else needs the processors" if idle else None,
    )
    yield _gpu()
    on_gpu = torch.cuda.is_available()
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else native_bfloat16()
    yield Finding(
        section=section,
        subject="dtype",
        found="bfloat16" if native else "float32",
        why="multiplied natively here" if native else "bfloat16 is not multiplied natively here, and would be slower",
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        return Finding(section="machine", subject="GPU", found=", ".join(names))
    build = torch.version.cuda or torch.version.hip
    card = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    why, advice = f"torch {torch.__version__} is built for CPUs only", None
    if build:
        why = f"torch is built for {'CUDA' if torch.version.cuda else 'ROCm'} {build} and finds no device"
    if card:
        advice = (
            "nvidia-smi shows whether the driver is too old for this torch, or CUDA_VISIBLE_DEVICES hides the GPU"
            if build
            else "an NVIDIA driver is here: install a CUDA build of torch (https://pytorch.org/get-started)"
        )
    return Finding(section="machine", subject="GPU", found="none", why=why, advice=advice)


def _kernels() -> Iterator[Finding]:
    import torch

    from fastcompat.backends import native_levels, why_not

    section = "kernels"
    problem = why_not("native", "cpu")
    levels = native_levels()
    yield Finding(
        section=section,
        subject="C++ extension",
        found="none" if problem else ", ".join(levels),
        why=problem or "levels that this processor offers, the first is used",
        advice=REBUILD if problem else None,
    )
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        place = "CPU" if device == "cpu" else "GPU"
        for name in ("linear_nll", "packed_nll", "attention", "element-wise"):
            yield _served(f"{name} on {place}", device)
    for device in devices:
        on_gpu = device == "cuda" and why_not("triton", device) is None
        place = "CPU" if device == "cpu" else "GPU"
        yield Finding(section=section, subject=f"response sums on {place}", found="Triton" if on_gpu else "NumPy")
        if device == "cuda":
            yield _unshared_attention()


def _unshared_attention() -> Finding:
    """What serves a GPU's attention where the sequences of a pack have nothing in common."""
    from fastcompat.attention import varlen_available

    subject = "attention, nothing shared"
    if varlen_available():
        return Finding(section="kernels", subject=subject, found="torch's varlen_attn", why="in half precision")
    why = "this torch has no varlen_attn with windows and grouped queries"
    return Finding(section="kernels", subject=subject, found="as any other pack", why=why)


def _model(base_model: str) -> Iterator[Finding]:
    from transformers.utils import logging as transformers_logging

    from fastcompat.model import load_causal_lm

    transformers_logging.disable_progress_bar()
    model = load_causal_lm(base_model)
    section = "model"
    name = type(model.full).__name__
    yield Finding(section=section, subject="architecture", found=f"{name}, {str(model.dtype).removeprefix('torch.')}")
    if not model.fusions:
        yield Finding(section=section, subject="fused", found="nothing", why="its layers could not be followed")
    for fusion in model.fusions:
        found = f"{fusion.n_fused} of {fusion.n_modules} fused" if fusion.n_modules else "none there"
        yield Finding(section=section, subject=fusion.part, found=found, why=fusion.why)


def _served(subject: str, device: str) -> Finding:
    """What serves a kernel for the tensors of a device type that this machine has."""
    from fastcompat.backends import FASTEST, native_levels, why_not

    fastest = FASTEST[device]
    problem = why_not(fastest, device)
    if problem is None:
        found = f"C++, {native_levels()[0]}" if fastest == "native" else "Triton"
        return Finding(section="kernels", subject=subject, found=found)
    if fastest == "native":
        advice = REBUILD
    elif "compiler" in problem:
        advice = "install gcc or clang, or name one in CC"
    else:
        advice = "pip install triton, in the version that this torch asks for"
    return Finding(section="kernels", subject=subject, found="torch, slower", why=problem, advice=advice)


def _versions() -> Iterator[Finding]:
    yield Finding(section="versions", subject="fastcompat", found=__version__)
    yield Finding(section="versions", subject="Python", found=platform.python_version())
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        yield Finding(section="versions", subject=package, found=found)
