"""Scripts that no test runs start at least: what they import is there, and they say what they do."""

from __future__ import annotations

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
    "bench/host_pipeline.py",
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
