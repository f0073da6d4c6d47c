"""The tests of the kernels and of the functions above them, natively on the GPU; each result kept when it is there.

This file is also pytest's plugin for that: results go to the step's findings one by one, so that a run that is killed
loses nothing; each test gives its memory back; and a worker whose GPU has failed for good ends, so that it does not
fail all further tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_steps import FINDINGS, Finding, add_finding

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 10
SECONDS = 105.0
PATTERNS = ("kernels/test_triton_*.py", "ops/test_nll*.py", "ops/test_custom_ops.py")
# One that takes a second in the interpreter.
DRY_RUN = ["tests/kernels/test_triton_segment_sum.py"]
MESSAGE_LENGTH = 600


def tests(device: str) -> Iterator[Finding]:
    """Of all patterns, those that run on a GPU; compiling takes the time, so that they run in many processes."""
    files = [str(path.relative_to(ROOT)) for name in PATTERNS for path in sorted((ROOT / "tests").glob(name))]
    files, chosen = (DRY_RUN, "") if device == "cpu" else (files, "cuda or triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-p",
        "gpu_tests",
        "-k",
        chosen,
        *files,
    ]
    if device != "cpu" and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(timeout=None if device == "cpu" else SECONDS)
        # 1: some failed, each of which says so itself.
        wrong = "" if code in (0, 1) else f"pytest ended with exit code {code}"
    except subprocess.TimeoutExpired:
        process.kill()
        wrong = f"not all tests were done after {SECONDS:.0f} s"
    figures = {"pytest": {"seconds": time.monotonic() - began}}
    yield {"case": f"{len(files)} files", "command": command, "figures": figures} | (
        {"problem": wrong} if wrong else {}
    )


def _file() -> Path | None:
    return Path(os.environ[FINDINGS]) if FINDINGS in os.environ else None


class _Results:
    """Where tests are reported: the process that deals them out, or the only one."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            finding = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.outcome == "failed":
                finding["message"] = _message(report)
            add_finding(self._file, finding)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            add_finding(self._file, {"test": report.nodeid, "outcome": "failed", "message": _message(report)})


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr).strip()
    return text[:MESSAGE_LENGTH]


def pytest_configure(config: pytest.Config) -> None:
    file = _file()
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Results(file))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "teardown" and "torch" in sys.modules:
        torch = sys.modules["torch"]
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                # The context is lost, and with it every test to come. pytest-xdist starts another worker, and reports
                # the test that was at work. Alone, the tests to come say it themselves.
                if hasattr(item.config, "workerinput"):
                    os._exit(70)
    return report
