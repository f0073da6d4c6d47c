"""Settings for every test: nothing may reach the network; without a GPU, Triton's kernels run in its interpreter."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when a kernel is decorated, so before any kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-backend", help="what serves tensors of the CPU: native (as ever), torch, or triton in its interpreter"
    )


def pytest_configure(config):
    mend_interpreter()
    if config.getoption("--cpu-backend"):
        from fastcompat.ops import backends

        backends.FASTEST["cpu"] = config.getoption("--cpu-backend")


def mend_interpreter():
    """Triton 3.6's makes an int of an array of one element, which numpy refuses since 2.4; 3.7's squeezes it first."""
    try:
        if not version("triton").startswith("3.6."):
            return
    except PackageNotFoundError:
        return
    from triton.runtime import interpreter

    own = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        own(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = mended


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        buffer = empty(*size, **options)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", poisoned)
