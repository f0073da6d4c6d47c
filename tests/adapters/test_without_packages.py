"""What is said where a package is not there, or too old."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from fastcompat.errors import UsageError


def test_no_lm_eval(monkeypatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.delitem(sys.modules, "fastcompat.adapters.lm_eval", raising=False)
    with pytest.raises(UsageError, match=r"not installed here: pip install 'fastcompat\[lm-eval\]'"):
        importlib.import_module("fastcompat.adapters.lm_eval")


def test_an_old_lm_eval(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.2")
    monkeypatch.delitem(sys.modules, "fastcompat.adapters.lm_eval", raising=False)
    with pytest.raises(UsageError, match=r"0\.4\.2 is here, and 0\.\d+\.\d+ or newer is needed"):
        importlib.import_module("fastcompat.adapters.lm_eval")
