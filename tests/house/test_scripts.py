"""Scripts that no test runs start at least: what they import is there, and they say what they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from warm_processes import WarmProcess

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "bench/attention.py",
    "bench/coverage.py",
    "bench/end_to_end.py",
    "bench/every_model.py",
    "bench/fused_head.py",
    "bench/host_pipeline.py",
    "bench/preparation_scale.py",
    "bench/racing.py",
    "bench/ranking_scale.py",
    "bench/rewards.py",
    "bench/gpu/triton_report.py",
]
# They start where nothing of fastcompat is installed.
ALONE = ["bench/compat.py", "bench/gpu/gpu_check.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_says_what_it_does(script):
    process = WarmProcess("--help", script=ROOT / script)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "usage" in output


@pytest.mark.parametrize("script", ALONE)
def test_it_starts_by_itself(script):
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
