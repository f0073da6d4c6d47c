"""What the command line sets before torch is loaded."""

from __future__ import annotations

import os

import pytest

from fastcompat.cli import application


@pytest.mark.parametrize("own", [None, *sorted(application.ALLOCATOR_SETTINGS)])
def test_segments_of_gpu_memory_grow_unless_the_user_has_said_how_it_is_given_out(monkeypatch, own):
    seen = {}
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # which it sets too
    for name in application.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "backend:native")
    monkeypatch.setattr(application, "app", lambda: seen.update(os.environ))
    application.main()
    found = {name: seen[name] for name in application.ALLOCATOR_SETTINGS if name in seen}
    assert found == ({own: "backend:native"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
