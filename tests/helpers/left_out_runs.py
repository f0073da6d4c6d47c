"""Four generators, and sessions that leave some of them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corpora import rows_of, write_jsonl

from fastcompat.store.parts import LeaveOut, Unit

A, B = "generator-0", "generator-1"


def without(*names: str) -> LeaveOut:
    def leave_out(unit: Unit) -> Mapping[str, str]:
        return {name: f"{name} is not asked for" for name in names}

    return leave_out


def four_generators(directory: Path) -> Path:
    """40 responses of each, of which one is empty: whoever is left out, that one says so itself."""
    rows = [row for k in range(4) for row in rows_of(f"generator-{k}", n_prompts=40)]
    for k in range(4):
        rows[40 * k + 7]["response"] = ""
    write_jsonl(directory / "all.jsonl", rows)
    return directory
