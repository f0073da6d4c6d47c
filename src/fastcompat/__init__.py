"""fastcompat: which response generator will teach a base model best, told before any training.

    import fastcompat as fc

    scorer = fc.Scorer("Qwen/Qwen2.5-0.5B")
    table = scorer.score([{"prompt": "What is two plus two?", "response": "Four."}])

Importing this package loads neither torch nor transformers; the names below do so when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastcompat.errors import FastcompatError

__version__ = "0.1.0"

_HOMES = {
    "RewardScorer": "fastcompat.reward_scorer",
    "Run": "fastcompat.store",
    "Scorer": "fastcompat.scorer",
    "linear_nll": "fastcompat.nll",
    "open_run": "fastcompat.store",
    "packed_nll": "fastcompat.nll",
    "rank": "fastcompat.ranking",
}

__all__ = [
    "FastcompatError",
    "RewardScorer",
    "Run",
    "Scorer",
    "__version__",
    "linear_nll",
    "open_run",
    "packed_nll",
    "rank",
]

if TYPE_CHECKING:
    from fastcompat.nll import linear_nll, packed_nll
    from fastcompat.ranking import rank
    from fastcompat.reward_scorer import RewardScorer
    from fastcompat.scorer import Scorer
    from fastcompat.store import Run, open_run


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcompat' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
