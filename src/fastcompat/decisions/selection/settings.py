"""What `select` is asked for, checked, and how the command line writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fastcompat.errors import UsageError
from fastcompat.metrics import BETA

# The column of a mixture's values.
MIXTURE = "mixture"


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """What `select` is asked for; its docstring says what each means."""

    by: str | Mapping[str, float] = "car"
    beta: float = BETA
    reward_shift: float = 0.0
    top: int | None = None
    threshold: float | None = None
    budget: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    drop_duplicates: bool = True
    generators: tuple[str, ...] | None = None
    base_model: str | None = None
    reward_model: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.by, str | Mapping):
            raise UsageError(f"by must be a metric, or metrics with weights {{'car': 1, 'loss': 1}}; got {self.by!r}")
        if not self.by:
            raise UsageError("by names no metric; write car, or a mixture like car=0.7,ifd_ppl=0.3")
        if isinstance(self.by, Mapping):
            object.__setattr__(self, "by", {name: _weight(name, weight) for name, weight in self.by.items()})
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise UsageError(f"beta must be 0 or more, got {self.beta:g}")
        if not math.isfinite(self.reward_shift):
            raise UsageError(f"reward_shift must be a finite number, got {self.reward_shift:g}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"threshold must be a finite number, got {self.threshold:g}")
        for name, count in (("top", self.top), ("budget", self.budget)):
            if count is not None and count < 1:
                raise UsageError(f"{name} must be 1 or more, got {count}")
        low, high = self.min_tokens, self.max_tokens
        if low is not None and high is not None and low > high:
            raise UsageError(f"min_tokens {low} is above max_tokens {high}: no response has so many tokens")

    @property
    def weights(self) -> dict[str, float]:
        """Metric -> weight, in the order given; one metric alone has the weight 1."""
        return {self.by: 1.0} if isinstance(self.by, str) else dict(self.by)

    @property
    def of_metrics(self) -> dict[str, float]:
        """What metrics that know these settings are computed with."""
        return {"beta": self.beta, "reward_shift": self.reward_shift}

    @property
    def is_mixture(self) -> bool:
        return len(self.weights) > 1

    @property
    def value_column(self) -> str:
        """The column that rows are compared by."""
        return MIXTURE if self.is_mixture else next(iter(self.weights))

    @property
    def per_prompt(self) -> int | None:
        """Responses of one prompt at most; None: all above the threshold."""
        return 1 if self.top is None and self.threshold is None else self.top


def _weight(name: Any, weight: Any) -> float:
    if not isinstance(name, str) or not isinstance(weight, Real):
        raise UsageError(f"by: {name!r}: {weight!r} is no metric with a weight; write {{'car': 0.7, 'loss': 0.3}}")
    number = float(weight)
    if not (number > 0 and math.isfinite(number)):
        raise UsageError(f"by: the weight of {name} is {number:g}; weights of a mixture are above 0")
    return number


def parse_by(text: str) -> str | dict[str, float]:
    """`--by`: "car", or weights "car=0.7,ifd_ppl=0.3". Raises UsageError for what is neither."""
    if "=" not in text:
        if "," in text:
            equal = ",".join(f"{_plain(name)}=1" for name in text.split(",") if name.strip())
            raise UsageError(f"--by {text}: a mixture has weights; write {equal}")
        return _plain(text)
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[_plain(name)] = float(weight)
        except ValueError:
            raise UsageError(f"--by {text}: write METRIC or METRIC=WEIGHT,METRIC=WEIGHT, got {part!r}") from None
    return weights


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")
