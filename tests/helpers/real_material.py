"""Where the vendors' own files lie that are too large to be part of this repository: `make real` fetches them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("FASTCOMPAT_REAL") or Path(__file__).parents[2] / ".real")


def real_tokenizer_directory(name: str) -> Path:
    """The directory of a vendor's tokenizer.json and tokenizer_config.json; the test is skipped where it is absent."""
    directory = ROOT / "tokenizers" / name
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"no real tokenizer {name!r} in {ROOT}: make real fetches it")
    return directory
