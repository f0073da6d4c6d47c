"""What the launchers ask of the compiler for real shapes, written down as they ask it: the cases of the report.

A launcher is called as the engine calls it, on tensors without data, with its kernels replaced by something that notes
their arguments and starts nothing. So a case has the types, the constants, the multiples of 16 and the options that a
GPU would be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import AotCase, linear_tiles

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}

Calls = Iterable[tuple[str, Callable[[], object]]]


def asked(
    arch: int, calls: Calls, kernels: dict[ModuleType, tuple[str, ...]], *, products: tuple[str, ...] = ()
) -> list[AotCase]:
    """The kernels that calls start on an architecture, by the calls' names; what two calls ask alike is there once.

    kernels: the names of a module's kernels. products: of those, the ones that must use tensor cores, unless their
    operands are float32.
    """
    cases: dict[Any, AotCase] = {}
    # Calls are also made up there: which variants there are depends on the architecture.
    with _noted(arch, kernels) as launches:
        for name, call in calls:
            launches.clear()
            call()
            for kernel_name, kernel, arguments, options in launches:
                case = _case(f"{name}: {kernel_name}", kernel, arguments, options, must=kernel_name in products)
                key = kernel, repr(replace(case, name="", fn=print))
                # One call may ask for a kernel in two ways: for whole pieces, and for the last one.
                alike = sum(other.name.partition(" #")[0] == case.name for other in cases.values())
                cases.setdefault(key, replace(case, name=f"{case.name} #{alike + 1}") if alike else case)
    return list(cases.values())


@contextmanager
def _noted(arch: int, kernels: dict[ModuleType, tuple[str, ...]]) -> Iterator[list[tuple[str, Any, Any, Any]]]:
    """What is started meanwhile, on a GPU of that architecture: name, kernel, arguments by name, options."""
    launches: list[tuple[str, Any, Any, Any]] = []
    before = [(linear_tiles, "architecture", linear_tiles.architecture)]
    before += [(module, name, getattr(module, name)) for module, names in kernels.items() for name in names]
    try:
        linear_tiles.architecture = lambda _: arch
        for module, name, kernel in before[1:]:
            setattr(module, name, _Noting(name.strip("_").removesuffix("_kernel"), kernel, launches))
        yield launches
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _Noting:
    """In a kernel's place: `kernel[grid](...)` notes what it is given."""

    def __init__(self, name: str, kernel: Any, launches: list[tuple[str, Any, Any, Any]]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def note(*positional: object, **named: object) -> None:
            arguments = dict(zip(self.arg_names, positional, strict=False))
            options = {name: value for name, value in named.items() if name not in self.arg_names}
            arguments |= {name: value for name, value in named.items() if name in self.arg_names}
            self.launches.append((self.name, self.kernel, arguments, options))

        return note


def _case(name: str, kernel: Any, arguments: dict[str, Any], options: dict[str, Any], *, must: bool) -> AotCase:
    """As Triton specialises: a 1 is a constant, a multiple of 16 known as one, unless the kernel waives it."""
    fixed = {n for n, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    left_alone = set(getattr(kernel, "do_not_specialize", None) or ())  # the interpreter's kernels do not tell
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    divisible, unaligned = [], []
    for parameter in kernel.arg_names:
        value = arguments[parameter]
        if parameter in fixed or value is None or (type(value) is int and value == 1 and parameter not in left_alone):
            signature[parameter], constants[parameter] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter] = f"*{_TYPES[value.dtype]}"
            unaligned += [parameter] if value.data_ptr() % 16 else []
        elif isinstance(value, TensorDescriptor):
            signature[parameter] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter] = "fp32"
        else:
            signature[parameter] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and parameter not in left_alone:
                divisible.append(parameter)
    operands = [kind for kind in signature.values() if kind.startswith(("*", "tensordesc"))]
    return AotCase(
        name=name,
        fn=kernel,
        signature=signature,
        constexprs=constants,
        options=options,
        must_use_tensor_cores=must and "fp32" not in operands[0],
        divisible=tuple(divisible),
        unaligned=tuple(unaligned),
    )
