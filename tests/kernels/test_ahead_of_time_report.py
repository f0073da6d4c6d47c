"""The committed report of the ahead-of-time compilation holds every kernel, and what is said of it elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "bench" / "results" / "triton_report.json"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def versions() -> dict[str, list[dict]]:
    """The rows by version of Triton."""
    return json.loads(REPORT.read_text())["versions"]


@pytest.fixture(scope="module")
def cases() -> list[str]:
    """As the compiler is asked, so not in the interpreter, where kernels know less of themselves."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    listed = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu" / "triton_report.py", "--list"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.splitlines()


def newest() -> str:
    """The version that compiles for every architecture."""
    return max(versions(), key=lambda version: [int(part) for part in version.split(".")])


@pytest.mark.parametrize("version", versions())
def test_every_kernel_is_in_it(cases, version):
    """In an older version those of the architectures that it was asked for."""
    rows = versions()[version]
    there = {f"sm_{row['arch']} {row['kernel']}" for row in rows}
    asked = {"sm_80", "sm_90", "sm_100"} if version == newest() else {f"sm_{row['arch']}" for row in rows}
    assert asked >= {"sm_90"}
    wanted = {case for case in cases if case.split()[0] in asked}
    assert there == wanted, "python bench/gpu/triton_report.py --missing --json bench/results/triton_report.json"


@pytest.mark.parametrize("version", versions())
def test_what_readme_and_docs_say_of_it_is_so(version):
    rows = versions()[version]
    # A kernel that must use tensor cores and does not is a problem, too. docs/speed.md names the one that spills.
    bad = [(row["arch"], row["kernel"], row["problems"]) for row in rows if row["problems"] or row["stack_bytes"]]
    spills = (100, "head, Gemma-2-2B, bf16, all five: range", ["8 bytes of registers spilled"])
    assert bad == ([spills] if version == newest() else [])
    used = {(row["arch"], row["tensor_core_instruction"]) for row in rows if row["tensor_core_instruction"]}
    assert used == {(arch, TENSOR_CORES[arch]) for arch in {row["arch"] for row in rows}}
    compiled_for = {f"sm_{row['arch']}" for row in versions()[newest()]}
    for name in ("README.md", "docs/speed.md"):
        text = (ROOT / name).read_text()
        assert "compiled ahead of time" in text.replace("\n", " ")
        assert set(re.findall(r"sm_\d+", text)) == compiled_for, name
    said = (ROOT / "docs" / "kernels.md").read_text()
    assert "bench/results/triton_report.json" in said
    # What docs/kernels.md says that it shows.
    assert {"registers", "stack_bytes", "shared_bytes", "tensor_core_instruction"} <= rows[0].keys()
