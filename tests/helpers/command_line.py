"""The command line as a user gives it, in this process; and a script in one of its own, for no longer than it may."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from click.testing import Result
from typer.testing import CliRunner

from fastcompat.cli.application import app
from fastcompat.errors import FastcompatError


def invoke(*arguments: object) -> Result:
    """What a command did, on a terminal of 250 columns."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})


def succeed(*arguments: object) -> str:
    """What a command prints that must end well."""
    result = invoke(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def fail(kind: type[FastcompatError], *arguments: object) -> str:
    """The one message of a command that must fail; anything but a FastcompatError would be a traceback."""
    result = invoke(*arguments)
    assert isinstance(result.exception, kind), (result.exception, result.output)
    assert str(result.exception).strip()
    return str(result.exception)


def run_script(code: str, *arguments: str, seconds: float, **environment: str) -> str:
    """What a script prints in a new process, which must end well; with what it started it is ended after `seconds`."""
    path = os.pathsep.join(part for part in sys.path if part)
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = child.communicate(timeout=seconds)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert child.returncode == 0, errors
    return said
