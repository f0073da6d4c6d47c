"""Compiles every Triton kernel ahead of time, without a GPU, and prints what a compiler alone can show of it.

    python bench/gpu/triton_report.py [--arch 80 --arch 90 --arch 100] [--kernel TEXT] [--list | --json FILE]

The cases are what the launchers ask for on real models' shapes (`kernels/ahead_of_time.py`), and every variant that can
be chosen by name. FILE holds the results of several versions of Triton; a run replaces those of its own version that it
has compiled anew. Exits 1 where a kernel spills registers, needs more shared memory than the GPU has, lacks its
architecture's tensor-core instruction though it must use it, or has its wgmma serialised (each waits for the one
before).
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcompat import kernels
from fastcompat.kernels import AotCase

# Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Row:
    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core_instruction: str
    compile_seconds: float
    problems: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--missing", action="store_true", help="only what the file does not have of this version yet")
    parser.add_argument("--list", action="store_true", help="names only, nothing is compiled")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    if arguments.list:
        for arch in arguments.arch or sorted(SHARED_LIMIT):
            names = [case.name for case in all_cases(arch) if arguments.kernel in case.name]
            print(*(f"sm_{arch} {name}" for name in names), sep="\n")
        return 0
    # Otherwise the seconds would be those of reading a cache.
    triton.knobs.compilation.always_compile = True

    rows: list[Row] = []
    for arch in arguments.arch or sorted(SHARED_LIMIT):
        cases = all_cases(arch)
        names = {case.name for case in cases}
        if len(names) < len(cases):
            raise RuntimeError("two cases have one name")
        wanted = [case for case in cases if arguments.kernel in case.name]
        if arguments.missing:
            there = {row["kernel"] for row in known(arguments.json) if row["arch"] == arch}
            wanted = [case for case in wanted if case.name not in there]
        for case in wanted:
            rows.append(report(case, arch))
            if arguments.json:
                write(arguments.json, rows, arch, names)
    show(rows)
    return any(row.problems for row in rows)


def known(path: Path | None) -> list[dict[str, Any]]:
    """The rows that a file has of this version of Triton."""
    if path is None or not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["versions"].get(triton.__version__, [])
    return rows


def write(path: Path, rows: list[Row], arch: int, names: set[str]) -> None:
    """Put rows of one architecture in the place of its older ones; what is no longer a case goes."""
    versions: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())["versions"] if path.exists() else {}
    before = {(row["arch"], row["kernel"]): row for row in versions.get(triton.__version__, [])}
    before |= {(row.arch, row.kernel): asdict(row) for row in rows}
    kept = [row for key, row in sorted(before.items()) if row["arch"] != arch or key[1] in names]
    # A row a line: what changed shows.
    lines = [
        f' "{version}": [\n  ' + ",\n  ".join(map(json.dumps, found)) + "\n ]"
        for version, found in sorted((versions | {triton.__version__: kept}).items())
    ]
    path.write_text('{"versions": {\n' + ",\n".join(lines) + "\n}}\n")


def all_cases(arch: int) -> list[AotCase]:
    modules = [import_module(f"{kernels.__name__}.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    return [case for module in modules if hasattr(module, "aot_cases") for case in module.aot_cases(arch)]


def report(case: AotCase, arch: int) -> Row:
    start = time.perf_counter()
    kernel = compiled(case, arch)
    seconds = time.perf_counter() - start
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        sass = output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    instruction = TENSOR_CORE_INSTRUCTION[arch]
    problems = []
    if stack:
        problems.append(f"{stack} bytes of registers spilled")
    if kernel.metadata.shared > SHARED_LIMIT[arch]:
        problems.append(f"{kernel.metadata.shared} bytes of shared memory, the GPU has {SHARED_LIMIT[arch]}")
    if case.must_use_tensor_cores and instruction not in ptx:
        problems.append(f"no {instruction}")
    # Only the last instruction of a committed group should set the barrier that is waited for.
    if len(re.findall(r"HGMMA.*gsb0", sass)) > len(re.findall(r"wgmma\.commit_group", ptx)):
        problems.append("wgmma serialised")
    return Row(
        kernel=case.name,
        arch=arch,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        tensor_core_instruction=instruction if instruction in ptx else "",
        compile_seconds=round(seconds, 1),
        problems=problems,
    )


def compiled(case: AotCase, arch: int) -> Any:
    names = list(case.signature)
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(case.signature.items())
        if (kind.startswith("*") and name not in case.unaligned) or name in case.divisible
    }
    constants = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(fn=case.fn, signature=dict(case.signature), constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def show(rows: list[Row]) -> None:
    table = Table("kernel", "sm", "registers", "stack", "shared KiB", "tensor cores", "seconds", "problems")
    for row in rows:
        table.add_row(
            row.kernel,
            str(row.arch),
            str(row.registers),
            str(row.stack_bytes),
            f"{row.shared_bytes / 1024:.1f}",
            row.tensor_core_instruction,
            f"{row.compile_seconds:.1f}",
            "; ".join(row.problems),
        )
    # Wide enough not to wrap where it is logged to a file.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"Triton {triton.__version__}, ahead of time")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
