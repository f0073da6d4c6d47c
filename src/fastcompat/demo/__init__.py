"""The demo: a corpus made from this interpreter's own documentation, and two small models that were trained here.

All is there without a network: `fastcompat.demo.corpus.write_corpus` reads the standard library of the running Python,
`model_directory()` is a Llama-style base model of 3.4 million parameters in this package and `reward_model_directory()`
a reward model made of it. The corpus asks about modules that neither saw in training, so the losses are those of a
base model on new text, and the rewards those of a judge of new answers.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_directory", "reward_model_directory"]


def model_directory() -> Path:
    """The directory of the shipped base model, as `from_pretrained` takes it; MODEL_CARD.md in it says what it is."""
    return Path(__file__).resolve().parent / "base-model"


def reward_model_directory() -> Path:
    """The directory of the shipped reward model, a `LlamaForSequenceClassification` with one label and its card."""
    return Path(__file__).resolve().parent / "reward-model"
