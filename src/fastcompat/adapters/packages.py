"""Whether the package that an adapter stands in is there, and not too old."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from fastcompat.errors import UsageError


def require(package: str, lowest: str, *, extra: str) -> None:
    """Raises UsageError, with what to install, unless `package` is there in the version `lowest` or a later one."""
    how = f"pip install 'fastcompat[{extra}]'"
    try:
        there = version(package)
    except PackageNotFoundError:
        raise UsageError(f"{package} is not installed: {how}") from None
    if _numbers(there) < _numbers(lowest):
        raise UsageError(f"fastcompat works with {package} {lowest} and later, and here is {there}: {how}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
