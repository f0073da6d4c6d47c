"""The demo: a corpus made from this interpreter's own documentation, and a small base model that was trained here.

Both are there without a network: `fastcompat.demo.corpus.write_corpus` reads the standard library of the running
Python, and `model_directory()` is a Llama-style model of 3.4 million parameters in this package. The corpus asks
about modules that the model never saw in training, so its losses on them are those of a base model on new text.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_directory"]


def model_directory() -> Path:
    """The directory of the shipped base model, as `from_pretrained` takes it; MODEL_CARD.md in it says what it is."""
    return Path(__file__).resolve().parent / "base-model"
