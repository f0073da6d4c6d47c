"""fastcompat: which response generator will teach a base model best, told before any training.

    import fastcompat as fc

    losses = fc.Scorer("Qwen/Qwen2.5-0.5B").score(rows)
    rewards = fc.RewardScorer("Skywork/Skywork-Reward-V2-Qwen3-0.6B").score(rows)
    fc.rank(pa.concat_tables([losses, rewards]), beta=3.0)

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
    "car": "fastcompat.response_metrics",
    "linear_nll": "fastcompat.nll",
    "open_run": "fastcompat.store",
    "packed_nll": "fastcompat.nll",
    "rank": "fastcompat.ranking",
    "select": "fastcompat.selection",
    "write_selection": "fastcompat.training_file",
}

__all__ = [
    "FastcompatError",
    "RewardScorer",
    "Run",
    "Scorer",
    "__version__",
    "car",
    "linear_nll",
    "open_run",
    "packed_nll",
    "rank",
    "select",
    "write_selection",
]

if TYPE_CHECKING:
    from fastcompat.nll import linear_nll, packed_nll
    from fastcompat.ranking import rank
    from fastcompat.response_metrics import car
    from fastcompat.reward_scorer import RewardScorer
    from fastcompat.scorer import Scorer
    from fastcompat.selection import select
    from fastcompat.store import Run, open_run
    from fastcompat.training_file import write_selection


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcompat' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
