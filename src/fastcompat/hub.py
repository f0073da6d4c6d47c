"""One file of a model, in a directory or on the hub. Loads no torch."""

from __future__ import annotations

from pathlib import Path


def model_file(model: str, name: str, revision: str | None) -> Path | None:
    """One file of a model directory, or of a hub model, downloaded if need be; None where there is none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
