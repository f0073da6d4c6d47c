"""The command line as a user gives it, in this process."""

from __future__ import annotations

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
