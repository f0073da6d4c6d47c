"""Scripts that no test runs start at least: what they import is there, and they say what they do."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "bench/attention.py",
    "bench/compat.py",
    "bench/coverage.py",
    "bench/end_to_end.py",
    "bench/every_model.py",
    "bench/fused_head.py",
    "bench/preparation_scale.py",
    "bench/racing.py",
    "bench/ranking_scale.py",
    "bench/rewards.py",
    "bench/gpu/gpu_check.py",
    "bench/gpu/triton_report.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_says_what_it_does(script):
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


def test_the_package_that_the_gpu_check_puts_together_names_its_version(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "gpu"))
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench" / "gpu" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", check)
    spec.loader.exec_module(check)
    monkeypatch.setattr(check, "BUILD", tmp_path / "build")
    check.assemble()
    code = "import fastcompat, importlib.metadata as m; print(fastcompat.__file__, m.version('fastcompat'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "build")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(tmp_path / "build" / "fastcompat" / "__init__.py"), "0.1.0"]
