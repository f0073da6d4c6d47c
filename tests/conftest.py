"""Settings for every test: nothing may reach the network; without a GPU, Triton's kernels run in its interpreter."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when a kernel is decorated, so before any kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        buffer = empty(*size, **options)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", poisoned)
