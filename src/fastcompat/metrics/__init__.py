"""Every metric by name: formula, unit, source. No torch.

catalogue          the table of metrics, what each needs, and how it is computed of a table of scores
response_formulas  of a response's sums and counts
token_formulas     of every token's figures
"""

from fastcompat.metrics.catalogue import (
    ALIASES,
    METRICS,
    compute,
    compute_by_group,
    metric_names,
    missing,
    with_reference,
)
from fastcompat.metrics.response_formulas import BETA, car, check_losses, checked_betas, finite, negative_reward

__all__ = [
    "ALIASES",
    "BETA",
    "METRICS",
    "car",
    "check_losses",
    "checked_betas",
    "compute",
    "compute_by_group",
    "finite",
    "metric_names",
    "missing",
    "negative_reward",
    "with_reference",
]
