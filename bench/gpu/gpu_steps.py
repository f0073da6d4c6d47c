"""Steps of the check as processes: each in a session of its own, with a limit; several of them side by side.

    python bench/gpu/gpu_steps.py MODULE:FUNCTION DEVICE FILE

runs one: FUNCTION(DEVICE) gives findings, each a line of JSON at the end of FILE as soon as it is there. What fails,
hangs or is killed costs itself only, and what it found before is kept. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

# A finding: one thing measured, as JSON. gpu_summary.py says which keys are shown.
Finding = dict[str, Any]

# Where a step's findings go, for what a step starts itself.
FINDINGS = "FASTCOMPAT_GPU_CHECK_FINDINGS"
KEPT_OUTPUT = 8000  # characters of a step's output
PATIENCE = 2.0  # times its planned seconds that a step may take, where others do not need them
POLL = 0.1  # seconds
INTERIM = 5.0  # seconds between two readings of what is found so far
GONE = 3.0  # seconds that what a step started has to go once it is killed


@dataclass(frozen=True, kw_only=True)
class Step:
    """A function from the device to its findings, `module:function`, and the seconds that it is planned to take."""

    target: str
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


def allowance(planned: float, later: float, remaining: float) -> float:
    """Seconds that what is planned for `planned` may take, of `remaining` ones, `later` ones being planned after it.

    Slack goes to whoever needs it first; where time is short, everybody has the same share of what was planned.
    """
    share = remaining * planned / (planned + later)
    return max(0.0, min(PATIENCE * planned, max(share, remaining - later)))


class RunningStep:
    """A step's process."""

    def __init__(self, name: str, step: Step, device: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._findings, self._log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self._findings.unlink(missing_ok=True)
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._status: str | None = None
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, step.target, device, str(self._findings)],
                env={**os.environ, **environment, **step.environment, FINDINGS: str(self._findings)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether it has ended by itself; whatever it left behind is ended then."""
        if self._status is None and self._process.poll() is not None:
            code = self._process.returncode
            self._end("ok" if code == 0 else f"failed with exit code {code}" if code > 0 else f"killed by {-code}")
        return self._status is not None

    def stop(self, why: str) -> None:
        """End it and all that it started, unless it has ended."""
        if not self.ended():
            self._end(why)

    def entry(self) -> dict[str, Any]:
        """For the JSON: as it is now."""
        seconds = time.monotonic() - self._began if self._seconds is None else self._seconds
        entry: dict[str, Any] = {"status": self._status or "under way", "seconds": round(seconds, 1)}
        entry |= self._found()
        if entry["status"] not in ("ok", "under way") or any(problem(finding) for finding in entry["findings"]):
            entry["output"] = self._log.read_text(errors="replace")[-KEPT_OUTPUT:]
        return entry

    def _found(self) -> dict[str, Any]:
        findings, n_unreadable = [], 0
        lines = self._findings.read_text(errors="replace").splitlines() if self._findings.exists() else []
        for line in lines:
            try:
                finding = json.loads(line)
            except ValueError:  # killed while it was written, or written by what the step started
                n_unreadable += 1
            else:
                if isinstance(finding, dict):
                    findings.append(finding)
        return {"findings": findings} | ({"unreadable_lines": n_unreadable} if n_unreadable else {})

    def _end(self, status: str) -> None:
        self._status, self._seconds = status, time.monotonic() - self._began
        # Its whole session: compilers and test workers are its children, and hold the GPU.
        gone_by = time.monotonic() + GONE
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < gone_by:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.poll()
                time.sleep(0.02)
        self._process.wait()


def run_side_by_side(
    steps: Mapping[str, Step],
    *,
    seconds: float,
    device: str,
    folder: Path,
    environment: Mapping[str, str],
    keep: Callable[[dict[str, dict[str, Any]]], None],
) -> None:
    """Run steps at the same time, each for at most `seconds`; all of them have ended afterwards, however it ends.

    keep: takes the entries by name, now and then and at the end.
    """
    running: dict[str, RunningStep] = {}
    deadline = time.monotonic() + seconds
    interim = time.monotonic()
    try:
        for name, step in steps.items():
            running[name] = RunningStep(name, step, device, folder, environment)
        while sum(not step.ended() for step in running.values()) and time.monotonic() < deadline:
            if time.monotonic() >= interim:
                keep({name: step.entry() for name, step in running.items()})
                interim = time.monotonic() + INTERIM
            time.sleep(POLL)
        for step in running.values():
            step.stop(f"stopped after {seconds:.0f} s")
    finally:
        for step in running.values():
            step.stop("stopped with the check")
        keep({name: step.entry() for name, step in running.items()})


def problem(finding: Finding) -> str:
    """What is wrong by a finding, in words; empty where nothing is."""
    if finding.get("problem"):
        return str(finding["problem"])
    if finding.get("outcome") == "failed":
        return str(finding.get("message") or "failed")
    return ""


def plain(value: Any) -> Any:
    """As JSON knows it: what is no finite number is a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def add_finding(file: Path, finding: Finding) -> None:
    """A line at the end of a step's findings, at once."""
    with file.open("a") as findings:
        findings.write(json.dumps(plain(finding)) + "\n")


def _end_with_the_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, on Linux only


def main() -> int:
    target, device, file = sys.argv[1:]
    _end_with_the_parent()
    if device == "cpu":
        import_module("gpu_interpreter").mend()
    module, _, function = target.partition(":")
    for finding in getattr(import_module(module), function)(device):
        add_finding(Path(file), finding)
    return 0


if __name__ == "__main__":
    sys.exit(main())
