"""Triton's interpreter as this machine's NumPy needs it, for trying steps on a CPU. Nothing on a GPU uses it."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def mend() -> None:
    """Before Triton 3.7, a tensor of one element becomes a number by int(array), which NumPy 2.4 refuses."""
    try:
        interpreter: Any = import_module("triton.runtime.interpreter")
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = mended
