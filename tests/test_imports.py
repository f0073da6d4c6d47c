"""Imports point one way, and what a laptop runs loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fastcompat"
HEAVY = {"torch", "transformers"}
# Modules that a laptop uses on a finished run, or before any model is loaded.
LIGHT = ["", ".cli", ".display", ".errors", ".response", ".corpus", ".tokenization", ".store", ".forest", ".statistics"]
LIGHT += [".metrics", ".ranking", ".verification", ".demo", ".demo.corpus", ".inspection", ".doctor"]
LIGHT += [".commands.machine", ".commands.options", ".benchmark", ".benchmark.workloads", ".benchmark.machine"]
LIGHT += [".response_metrics", ".token_metrics", ".extras", ".schemas", ".durable", ".reward_tokenization"]
LIGHT += [".bootstrap", ".pairing", ".selection", ".training_file"]
LIGHT += [".correlation", ".validation", ".reproduction", ".training_outcomes", ".paper", ".ranking_display"]
LIGHT += [".ranking_estimates", ".commands.results", ".commands.score", ".report"]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_transformers(module):
    code = f"import sys, fastcompat{module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_help_loads_neither_torch_nor_pyarrow():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fastcompat.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_kernels_import_nothing_of_fastcompat():
    for path in (SOURCE.parent.parent / "kernels").glob("*.py"):
        assert not any(name.split(".")[0] == "fastcompat" for name in imported(path)), path


@pytest.mark.parametrize(
    "lower", ["errors", "response", "forest", "statistics", "backends", "nll", "nll_torch", "attention", "reference"]
)
def test_lower_modules_do_not_know_the_upper_ones(lower):
    upper = {f"fastcompat.{name}" for name in ("cli", "engine", "session", "scorer", "store", "ranking", "model")}
    assert not upper & imported(SOURCE / f"{lower}.py")


def test_every_public_name_is_there():
    import fastcompat

    assert all(getattr(fastcompat, name) is not None for name in fastcompat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastcompat.nothing
