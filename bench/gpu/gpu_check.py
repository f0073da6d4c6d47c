"""Everything that only a GPU can tell, in one command of at most nine minutes: GPU tests, timings, errors; one JSON.

    python3 bench/gpu/gpu_check.py [--output bench/results] [--only STEP ...] [--dry-run]

Needs a GPU, and a Python with torch, triton, transformers, numpy and pytest. fastcompat need not be installed: the
package is put together under build/gpu-check. Every step is a process of its own with its own time limit, and the JSON
is written anew after each, so that whatever fails or hangs costs itself only. `--dry-run` runs every step's code on
the CPU, in Triton's interpreter, on tiny shapes: figures mean nothing then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-check"
MINUTES = 9.0
KEPT_OUTPUT = 8000  # characters of a step's output

# A finding: one thing measured, as JSON. With `timings` it becomes rows of the table.
Finding = dict[str, Any]


def extension(device: str) -> Iterator[Finding]:
    """The C++ extension, where pybind11 and a compiler are there; without it, tests of its levels are left out."""
    processes = 1 if device == "cpu" else os.cpu_count() or 1
    command = [sys.executable, "setup.py", "build_ext", "--parallel", str(processes)]
    command += ["--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    built = sorted(path.name for path in (BUILD / "fastcompat").glob("_native*"))
    yield {"built": built, "output": (process.stdout + process.stderr)[-1500:]}


def hardware(device: str) -> Iterator[Finding]:
    """The machine as the CPU benchmarks record it, the GPU, and the two ceilings that every figure is held against."""
    try:
        from fastcompat.benchmark.machine import machine

        yield {"machine": machine()}
    except Exception as error:  # a package without metadata, a system without /proc: the timings stand without it
        yield {"machine": None, "reason": f"{type(error).__name__}: {error}"}
    from gpu_timing import ceilings, gpu

    yield {"gpu": gpu(device)}
    yield ceilings(device)


def tests(device: str) -> Iterator[Finding]:
    """The tests of the kernels and of the functions above them, natively on the GPU."""
    patterns = ("test_triton_*.py", "test_nll*.py", "test_custom_ops.py")
    files = [str(path.relative_to(ROOT)) for name in patterns for path in sorted((ROOT / "tests").rglob(name))]
    if device == "cpu":
        files = ["tests/kernels/test_triton_segment_sum.py"]
    report = BUILD / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    if device != "cpu" and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # compiling takes the time, and is done in parallel
    process = subprocess.run(command, cwd=ROOT)
    yield {"files": files, "exit_code": process.returncode, **_test_counts(report)}


def _test_counts(report: Path) -> Finding:
    if not report.exists():
        return {"failed_tests": ["no report: see the output"]}
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    cases = [case for suite in suites for case in suite.iter("testcase")]
    broken = [(case, mark) for case in cases for mark in case if mark.tag in ("failure", "error")]
    return {
        "n_tests": len(cases),
        "n_skipped": sum(case.find("skipped") is not None for case in cases),
        "n_failed": len(broken),
        "failed_tests": [f"{case.get('name')}: {(mark.get('message') or '')[:600]}" for case, mark in broken],
    }


def linear_nll(device: str) -> Iterator[Finding]:
    from gpu_head import linear_nll_beside_its_peers

    yield from linear_nll_beside_its_peers(device)


def packed_nll(device: str) -> Iterator[Finding]:
    from gpu_rows import packed_nll_beside_its_peers

    yield from packed_nll_beside_its_peers(device)


def segment_sum(device: str) -> Iterator[Finding]:
    from gpu_rows import segment_sum_beside_its_peers

    yield from segment_sum_beside_its_peers(device)


def elementwise(device: str) -> Iterator[Finding]:
    from gpu_layers import elementwise_beside_its_peers

    yield from elementwise_beside_its_peers(device)


def attention(device: str) -> Iterator[Finding]:
    from gpu_attention import attention_beside_its_peers

    yield from attention_beside_its_peers(device)


def engine(device: str) -> Iterator[Finding]:
    try:
        from gpu_engine import engine_beside_hugging_face
    except ImportError as error:  # pyarrow, say: the kernels need none of it
        yield {"case": "the whole scorer is left out:", "failed": str(error)}
    else:
        yield from engine_beside_hugging_face(device)


def row_tiles(device: str) -> Iterator[Finding]:
    from gpu_rows import tile_sweep

    yield from tile_sweep(device)


def head_tiles(device: str) -> Iterator[Finding]:
    from gpu_head import tile_sweep

    yield from tile_sweep(device)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A function from the device to its findings, and the seconds that it may take."""

    run: Callable[[str], Iterator[Finding]]
    seconds: float


# The dearest last: what the nine minutes do not suffice for is left out.
STEPS = {
    "hardware": Step(run=hardware, seconds=45),
    "extension": Step(run=extension, seconds=60),
    "tests": Step(run=tests, seconds=200),
    "linear_nll": Step(run=linear_nll, seconds=120),
    "attention": Step(run=attention, seconds=110),
    "packed_nll": Step(run=packed_nll, seconds=60),
    "elementwise": Step(run=elementwise, seconds=70),
    "segment_sum": Step(run=segment_sum, seconds=30),
    "engine": Step(run=engine, seconds=180),
    "head_tiles": Step(run=head_tiles, seconds=150),
    "row_tiles": Step(run=row_tiles, seconds=60),
}


def assemble() -> None:
    """build/gpu-check/fastcompat: src/fastcompat, kernels/ as its subpackage, and the metadata that names a version."""
    shutil.rmtree(BUILD, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "src" / "fastcompat", BUILD / "fastcompat", ignore=ignored)
    shutil.copytree(ROOT / "kernels", BUILD / "fastcompat" / "kernels", ignore=ignored)
    found = re.search(r'__version__ = "(.+)"', (BUILD / "fastcompat" / "version.py").read_text())
    assert found, "src/fastcompat/version.py names no version"
    metadata = BUILD / f"fastcompat-{found[1]}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: fastcompat\nVersion: {found[1]}\n")


def run_step(name: str, device: str, seconds: float) -> dict[str, Any]:
    """Run a step in a process of its own; its findings so far are kept when it fails or is stopped."""
    findings, log = BUILD / f"{name}.jsonl", BUILD / f"{name}.log"
    path = os.pathsep.join(filter(None, (str(BUILD), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "--step", name, "--device", device, "--into", str(findings)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=seconds)
            status = "ok" if process.returncode == 0 else f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            if process.returncode is None:
                # Its whole session: compilers and test workers are its children.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = findings.read_text().splitlines() if findings.exists() else []
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    entry["findings"] = [json.loads(line) for line in lines if line.endswith("}")]
    if status != "ok" or any(finding.get("failed_tests") for finding in entry["findings"]):
        entry["output"] = log.read_text(errors="replace")[-KEPT_OUTPUT:]
    return entry


def write(path: Path, result: dict[str, Any]) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def table(result: dict[str, Any]) -> str:
    """The figures that somebody reads first."""
    lines = []
    for name, entry in result["steps"].items():
        lines.append(f"{name}: {entry['status']}, {entry['seconds']} s")
        for finding in entry["findings"]:
            if "n_tests" in finding:
                counts = finding["n_tests"], finding["n_failed"], finding["n_skipped"]
                lines.append("  {} tests, {} failed, {} skipped".format(*counts))
            lines += [f"    {test[:150]}" for test in finding.get("failed_tests", [])]
            if "case" in finding:
                lines.append(f"  {finding['case']} {finding.get('failed', '')[:150]}")
            lines += [f"    {_row(timing)}  {call}" for call, timing in finding.get("timings", {}).items()]
            lines += [f"    off by {_errors(value)}  {call}" for call, value in finding.get("errors", {}).items()]
    return "\n".join(lines)


def _errors(errors: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.1e}'}" for name, value in errors.items())


def _row(timing: dict[str, Any]) -> str:
    if "failed" in timing:
        return f"failed: {timing['failed'][:100]}"
    figures = [f"{value:.3g} {unit}" for unit, value in timing.items() if isinstance(value, float) and unit != "ms"]
    return f"{timing['ms']:10.3f} ms  " + ", ".join(figures)


def check(steps: list[str], device: str, output: Path, minutes: float) -> int:
    """Run the steps, write the JSON after each, print the table; 0 where all of them and all tests passed."""
    deadline = time.monotonic() + 60 * minutes
    assemble()
    name = "cpu" if device == "cpu" else _gpu_name()
    path = output / f"gpu_check-{name}{'-dry-run' if device == 'cpu' else ''}.json"
    result: dict[str, Any] = {"dry_run": device == "cpu", "steps": {}}
    for step in steps:
        seconds = min(STEPS[step].seconds, deadline - time.monotonic())
        if seconds < 5:
            result["steps"][step] = {"status": f"left out after {minutes} minutes", "seconds": 0.0, "findings": []}
        else:
            print(f"{step} ...", flush=True)
            result["steps"][step] = run_step(step, device, seconds)
        write(path, result)
    print(table(result))
    print(path)
    entries = result["steps"].values()
    failed_tests = any(finding.get("failed_tests") for entry in entries for finding in entry["findings"])
    return int(failed_tests or any(entry["status"] != "ok" for entry in entries))


def _gpu_name() -> str:
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        with arguments.into.open("w") as file:
            for finding in STEPS[arguments.step].run(arguments.device):
                file.write(json.dumps(finding) + "\n")
                file.flush()
        return 0
    if not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("gpu_check needs a GPU that torch can use, and finds none (--dry-run tries the steps on the CPU)")
            return 2
    device = "cpu" if arguments.dry_run else "cuda"
    output = arguments.output or (BUILD if arguments.dry_run else ROOT / "bench" / "results")
    return check(arguments.only, device, output, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
