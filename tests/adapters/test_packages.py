"""What is said where the package of an adapter is missing or too old."""

from __future__ import annotations

import importlib
import sys

import pytest

from fastcompat.adapters.packages import require
from fastcompat.errors import UsageError


def test_a_package_that_is_there_will_do():
    require("pyarrow", "1.0", extra="some")
    require("pyarrow", "20", extra="some")


def test_the_error_says_what_to_install():
    with pytest.raises(UsageError, match=r"no-such-package is not installed: pip install 'fastcompat\[some\]'"):
        require("no-such-package", "1.0", extra="some")
    with pytest.raises(UsageError, match=r"works with pyarrow 999\.1 and later, and here is \d+.*fastcompat\[some\]"):
        require("pyarrow", "999.1", extra="some")


@pytest.mark.parametrize(
    ("adapter", "package"),
    [("data_juicer", "py-data-juicer"), ("datatrove", "datatrove"), ("lm_eval", "lm-eval")],
)
def test_an_adapter_without_its_package_says_so(monkeypatch, adapter, package):
    from importlib.metadata import PackageNotFoundError

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fastcompat.adapters.packages.version", version)
    monkeypatch.delitem(sys.modules, f"fastcompat.adapters.{adapter}", raising=False)
    with pytest.raises(UsageError, match=f"{package} is not installed: pip install"):
        importlib.import_module(f"fastcompat.adapters.{adapter}")
