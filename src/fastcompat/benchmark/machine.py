"""What a figure was measured on, recorded with every result."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("fastcompat", "torch", "transformers", "numpy", "pyarrow")
# Only where they are installed.
OPTIONAL_PACKAGES = ("triton", "lm_eval", "ctranslate2")


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores, memory, the device (None: the GPU where there is one), and the versions that matter."""
    import torch

    processor = platform.processor() or platform.machine()
    flags: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                processor = value.strip()
            if name.strip() == "flags":
                flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in value.split()]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor,
        "instructions": flags,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in (*PACKAGES, *OPTIONAL_PACKAGES) if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
