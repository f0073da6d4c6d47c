"""What is said where a package is not there, or too old."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from fastcompat.errors import UsageError


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, found: str | None) -> None:
    """`package` is there in another version, or not at all; what was imported of its adapter is forgotten."""
    own = importlib.metadata.version

    def version(name: str) -> str:
        if name != package:
            return own(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, f"fastcompat.adapters.{package}", raising=False)


def test_no_lm_eval(monkeypatch):
    pretend(monkeypatch, "lm_eval", None)
    with pytest.raises(UsageError, match=r"not installed here: pip install 'fastcompat\[lm-eval\]'"):
        importlib.import_module("fastcompat.adapters.lm_eval")


def test_an_old_lm_eval(monkeypatch):
    pretend(monkeypatch, "lm_eval", "0.4.2")
    with pytest.raises(UsageError, match=r"0\.4\.2 is here, and 0\.\d+\.\d+ or newer is needed"):
        importlib.import_module("fastcompat.adapters.lm_eval")
