"""The fastcompat command in processes of their own whose imports are done before they start.

Python, torch and transformers take seconds to import, and tests that kill processes start a hundred of them. These are
forked from a server that has imported them, one for each of pytest's workers. What happens during the imports is
another test's.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_POPEN = subprocess.Popen
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "warm_processes",
        "fastcompat.cli.application",
        "fastcompat.cli.score",
        "fastcompat.scoring.asked_models",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


class WarmProcess:
    """`fastcompat ARGUMENTS`, as much of subprocess.Popen as tests need: stdout and stderr are one text."""

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        output: str | None = None,
        script: Path | None = None,
    ) -> None:
        """output: a file that is there, for what it prints. script: run in the place of fastcompat."""
        self._kept = output is not None
        if output is None:
            handle, output = tempfile.mkstemp(prefix="warm-")
            os.close(handle)
        self._output = output
        variables = dict(os.environ if environment is None else environment)
        self._process: BaseProcess = _CONTEXT.Process(
            target=_main, args=([*map(str, arguments)], self._output, variables, os.getcwd(), script), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that killed it. None: it is at work."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = 300) -> int:
        """Seconds to wait. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("fastcompat", timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = 300) -> tuple[str, None]:
        """What it printed, after its end."""
        self.wait(timeout)
        output = Path(self._output).read_text(encoding="utf-8")
        return output, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()

    def __del__(self) -> None:
        if not self._kept:
            Path(self._output).unlink(missing_ok=True)


def popen(command: list[str], **options: Any) -> WarmProcess | subprocess.Popen[Any]:
    """In the place of subprocess.Popen: a warm one where `python -m fastcompat` is started, its output into a file."""
    if command[:3] != [sys.executable, "-m", "fastcompat"]:
        return _POPEN(command, **options)
    return WarmProcess(*command[3:], environment=options["env"], output=options["stdout"].name)


def _main(arguments: list[str], output: str, environment: dict[str, str], directory: str, script: Path | None) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if script:
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        return
    sys.argv = ["fastcompat", *arguments]
    from fastcompat.cli.application import main

    main()
