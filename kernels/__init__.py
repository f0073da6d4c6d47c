"""GPU kernels (Triton). Imports torch, triton and itself only; installed as `fastcompat.kernels`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One kernel with everything that compiling it ahead of time needs; `bench/gpu/triton_report.py` compiles them all.

    Every kernel's module, or one beside it, offers `aot_cases(arch) -> list[AotCase]`, arch 90 for sm_90: what its
    launcher starts there, as `ahead_of_time.asked` notes it.
    """

    name: str
    fn: Callable[..., object]
    """The `@triton.jit` function."""
    signature: Mapping[str, str]
    """Type of every parameter in order, `"*bf16"`, `"i32"`, `"fp32"` ..., and `"constexpr"` for those in `constexprs`.

    Pointers but those named in `unaligned`, and integers named in `divisible`, are compiled as multiples of 16.
    """
    constexprs: Mapping[str, object]
    options: Mapping[str, Any] = field(default_factory=dict)
    """num_warps, num_stages."""
    must_use_tensor_cores: bool = False
    divisible: tuple[str, ...] = ()
    """Integer parameters that the launcher's usual arguments make multiples of 16 (a row stride, the hidden size)."""
    unaligned: tuple[str, ...] = ()
    """Pointers that are not multiples of 16 bytes."""
