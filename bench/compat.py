"""Versions that fastcompat says it works with, tried: one environment a row, each built, tested and deleted again.

    python bench/compat.py [--rows NAME ...] [--steps NAME ...] [--keep]

A row is a Python and versions of torch, transformers, triton and numpy; `oldest` takes every lower bound of
pyproject.toml at its word. In each the package is installed from this checkout with its extension, as a user's pip
would, and tested. A GPU is not needed, the packages' registry is. An environment with torch's CUDA libraries takes
6 GB, so there is one at a time. Writes bench/results/compat.json after every step.

Runs on the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "compat.json"
ENVIRONMENTS = ROOT / "build" / "compat"
# What setup.py builds from.
SOURCES = ("csrc", "kernels", "src", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
TESTING = ("pytest>=8.3", "hypothesis>=6.100")
# What is reported of an environment.
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "pyarrow", "safetensors", "huggingface_hub")
# Wall seconds of a step, so that one that hangs costs no other.
LIMIT = 3600


@dataclass(frozen=True, kw_only=True)
class Row:
    """A Python, and what pip is asked for beside fastcompat."""

    python: str
    requirements: tuple[str, ...] = ()
    bounds: bool = False  # every lower bound of pyproject.toml exactly
    pins: bool = False  # constraints.txt


ROWS = {
    "oldest": Row(python="3.11", requirements=("triton==3.6.0",), bounds=True),
    # As a machine with a GPU was found.
    "gpu-machine": Row(
        python="3.12",
        requirements=("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "tokenizers==0.23.2", "numpy==2.5.2"),
    ),
    "pins": Row(python="3.11", requirements=("torch", "triton"), pins=True),
    "newest": Row(
        python="3.13", requirements=("torch==2.13.0", "triton==3.7.1", "transformers==5.23.0", "numpy==2.5.2")
    ),
}

PYTEST = ("-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider")
STEPS: dict[str, tuple[str, ...]] = {
    "parity": (*PYTEST, "tests/house/test_parity.py"),
    "engine": (*PYTEST, "tests/scoring/test_engine.py"),
    "models": (
        *PYTEST,
        "tests/models/test_fusion.py",
        "tests/models/test_fake_device.py",
        "tests/ops/test_custom_ops.py",
        "tests/ops/test_exact_products.py",
    ),
    "triton": (
        *(*PYTEST, "tests/scoring/test_through_triton.py", "tests/kernels/test_triton_elementwise.py"),
        *("tests/kernels/test_triton_forest_plan.py", "tests/kernels/test_triton_segment_sum.py"),
    ),
    "parity through triton": (*PYTEST, "tests/house/test_parity.py", "-k", "float32_parity", "--cpu-backend", "triton"),
    "gpu-check": ("bench/gpu/gpu_check.py", "--dry-run"),
}


def interpreter(version: str) -> Path | None:
    """An interpreter of that minor version: this one, one on the PATH, or pyenv's."""
    found = [sys.executable, shutil.which(f"python{version}")]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found += sorted(versions.glob(f"{version}.*/bin/python"), reverse=True)
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])), sys.base_prefix)"
    for path in filter(None, found):
        # A shim is there for versions that are not.
        tried = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if tried.returncode == 0 and tried.stdout.split()[0] == version:
            own = Path(tried.stdout.split(maxsplit=1)[1].strip()) / "bin" / f"python{version}"
            return own if own.exists() else Path(path)
    return None


def lower_bounds() -> list[str]:
    """Every dependency of the package at the oldest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.sub(r">=([^,;]+)[^;]*", r"==\1", wanted) for wanted in project["dependencies"]]


def build(name: str, row: Row, python: Path) -> Path:
    """An environment with the package and its extension in it, or what --keep left of one brought up to date. Raises
    CalledProcessError."""
    directory = ENVIRONMENTS / name
    if not (directory / "bin" / "python").exists():
        run([python, "-m", "venv", directory])
    # Not from the checkout: setuptools would leave its build there, and take up what an earlier one left.
    source = directory / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for entry in SOURCES:
        path = ROOT / entry
        unwanted = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "kernels" if entry == "src" else "")
        if path.is_dir():
            shutil.copytree(path, source / entry, ignore=unwanted)
        else:
            shutil.copy(path, source / entry)
    wanted = [*row.requirements, *TESTING, *(lower_bounds() if row.bounds else ())]
    pins = ("--constraint", ROOT / "constraints.txt") if row.pins else ()
    pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    run([*pip, *pins, *wanted, source], environment={"FASTCOMPAT_NATIVE": "required"})
    return directory


def run(command: Sequence[str | Path], *, environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, env=os.environ | (environment or {}), check=True, capture_output=True, text=True)


def versions(directory: Path) -> dict[str, str]:
    code = f"""
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
    told = subprocess.run([directory / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(told.stdout)
    return found


def why_not(step: str, found: dict[str, str]) -> str | None:
    """Why a step cannot be run with these versions, or None."""
    if step == "gpu-check" and release(found["triton"]) < (3, 7) and release(found["numpy"]) >= (2, 4):
        # tests/conftest.py mends that for the tests.
        return "Triton 3.6's interpreter, which serves in the GPU's place, fails with numpy 2.4 and newer"
    return None


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def take(step: str, directory: Path) -> dict[str, Any]:
    """Run a step; what came of it: counts of tests, the names of those that failed, CPU seconds."""
    junit = directory / "junit.xml"
    junit.unlink(missing_ok=True)
    arguments = [*STEPS[step]]
    if arguments[:2] == ["-m", "pytest"]:
        arguments += ["--junitxml", str(junit)]
    log = directory / f"{step.replace(' ', '-')}.log"
    # One thread: the sums' order, and with it the last bits, are those of `make test`.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    began = cpu_seconds()
    with log.open("w") as out:
        try:
            code: int | str = subprocess.run(
                [directory / "bin" / "python", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=LIMIT,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"still at it after {LIMIT} s"
    result: dict[str, Any] = {"passed": code == 0, "cpu_s": round(cpu_seconds() - began)}
    if code != 0:
        result |= {"exit": code, "end": log.read_text(errors="replace")[-1500:]}
    return result | (tests_of(junit) if junit.exists() else {})


def tests_of(junit: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [why for c in cases if (why := c.find("skipped")) is not None]
    return {
        "tests": {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)},
        "failed": failed,
        "skipped": sorted({str(why.get("message")) for why in skipped}),
    }


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    return found


def write(name: str, row: dict[str, Any]) -> None:
    result = recorded()
    rows = result["rows"] | {name: row}
    result |= {
        "processor": platform.processor() or platform.machine(),
        "rows": {key: rows[key] for key in ROWS if key in rows},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def try_row(name: str, steps: Sequence[str], *, keep: bool) -> bool:
    """Whether everything that could be run passed."""
    row = ROWS[name]
    result: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "python": row.python}
    python = interpreter(row.python)
    if python is None:
        say(name, f"Python {row.python} is not here")
        write(name, result | {"not_run": f"Python {row.python} is not here"})
        return True
    began = cpu_seconds()
    try:
        directory = build(name, row, python)
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if not line.startswith("WARNING")]
        say(name, "it cannot be installed:\n" + "\n".join(said[-20:]))
        write(name, result | {"passed": False, "install": "\n".join(said)[-1500:]})
        return False
    found = versions(directory)
    earlier = recorded()["rows"].get(name, {})
    # Of a step that is not taken now, what came of it with the same versions.
    taken = dict(earlier["steps"]) if earlier.get("versions") == found else {}
    result |= {"versions": found, "install_cpu_s": round(cpu_seconds() - began), "passed": True, "steps": taken}
    say(name, ", ".join(f"{package} {version}" for package, version in found.items()))
    for step in steps:
        why = why_not(step, found)
        outcome = {"not_run": why} if why else take(step, directory)
        result["steps"][step] = outcome
        result["passed"] = all(outcome.get("passed", True) for outcome in taken.values())
        say(name, f"{step}: {why or json.dumps({k: v for k, v in outcome.items() if k != 'end'})}")
        write(name, result)
    if not keep:
        shutil.rmtree(directory)
    return bool(result["passed"])


def say(name: str, text: str) -> None:
    print(f"{name}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/compat, for the next time")
    arguments = parser.parse_args()
    passed = [try_row(name, arguments.steps, keep=arguments.keep) for name in arguments.rows]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
