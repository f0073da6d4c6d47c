"""The command line: it reads options, calls the library, shows what came back.

`score`, `demo`, `bench`, `doctor`, `study plan` and `study run` load torch; bench and doctor are in `machine.py`.

Exit codes: 0 done; 1 an error; 2 usage; 3 the corpus; 4 the model or its template; 5 the run directory;
130 interrupted, everything finished kept.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from fastcompat.cli.decide import rank, report, reproduce, select
from fastcompat.cli.demo import demo
from fastcompat.cli.display import errors
from fastcompat.cli.inspect import inspect
from fastcompat.cli.machine import bench, doctor
from fastcompat.cli.score import score
from fastcompat.cli.status import status, verify
from fastcompat.cli.study import app as study
from fastcompat.errors import FastcompatError, Interrupted
from fastcompat.version import __version__

# Where torch, which reads them when it is loaded, is told how to give out a GPU's memory: if at all, by the user.
ALLOCATOR_SETTINGS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}

app = typer.Typer(
    name="fastcompat",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point: a user's mistake is one message and an exit code, never a traceback."""
    # A model's weights load with a bar of their own, and warnings that a scorer's user can do nothing about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Packs are of ever other sizes, which leaves gaps in a GPU's memory that is given out in segments of fixed ones.
    if not ALLOCATOR_SETTINGS.intersection(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        app()
    except FastcompatError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("interrupted; give the same command again to go on", highlight=False)
        sys.exit(Interrupted.exit_code)
    except OSError as error:  # standard output on a full disk, an input that vanished
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastcompat {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Which response generator will teach a base model best, told before any training."""


for command in (score, rank, select, report, reproduce, status, verify, inspect, demo, bench, doctor):
    app.command()(command)
app.add_typer(study)
