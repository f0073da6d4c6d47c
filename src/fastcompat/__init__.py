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
from fastcompat.version import __version__

_HOMES = {
    "Race": "fastcompat.decisions",
    "RewardScorer": "fastcompat.scoring",
    "Run": "fastcompat.store",
    "Scorer": "fastcompat.scoring",
    "car": "fastcompat.metrics",
    "linear_nll": "fastcompat.ops",
    "open_run": "fastcompat.store",
    "packed_nll": "fastcompat.ops",
    "rank": "fastcompat.decisions",
    "report": "fastcompat.report",
    "score": "fastcompat.scoring",
    "select": "fastcompat.decisions",
    "write_selection": "fastcompat.decisions",
}

__all__ = [
    "FastcompatError",
    "Race",
    "RewardScorer",
    "Run",
    "Scorer",
    "__version__",
    "car",
    "linear_nll",
    "open_run",
    "packed_nll",
    "rank",
    "report",
    "score",
    "select",
    "write_selection",
]

if TYPE_CHECKING:
    from fastcompat.decisions import Race, rank, select, write_selection
    from fastcompat.metrics import car
    from fastcompat.ops import linear_nll, packed_nll
    from fastcompat.report import report
    from fastcompat.scoring import RewardScorer, Scorer, score
    from fastcompat.store import Run, open_run


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcompat' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
