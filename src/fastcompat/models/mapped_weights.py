"""Weights that safetensors maps from their file, and whose pages a process keeps for as long as the file is open."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED on Linux


def unmap(weight: Tensor) -> None:
    """Give back the pages of a weight that was copied and is not needed any more, if they are those of a file.

    Whoever should read them all the same has them from the file again.
    """
    if sys.platform != "linux" or weight.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    begin = -(-weight.data_ptr() // page) * page
    end = (weight.data_ptr() + weight.nbytes) // page * page
    if begin < end and _is_of_a_file(begin, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def _is_of_a_file(begin: int, end: int) -> bool:
    """Whether a stretch of memory lies in one mapping of a safetensors file."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        if line.endswith(".safetensors"):
            first, last = (int(end, 16) for end in line.split(maxsplit=1)[0].split("-"))
            if first <= begin and end <= last:
                return True
    return False
