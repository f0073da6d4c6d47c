"""When a run is looked at on its way, and how much further intervals reach because of that. NumPy only.

Who looks again and again, and stops when something is clear, is wrong more often than any single look says: of two
equal generators an ordinary 95% interval tells one from the other in a third of all runs at 34 looks. Looks are
therefore planned, a fixed factor apart, and every interval is that of one constant z, so large that the chance of any
crossing at any look is what is asked for: repeated confidence intervals (Jennison and Turnbull 1989, "Interim analyses:
the repeated confidence interval approach"), with Pocock's constant boundary on a logarithmic scale (1977), because the
size of the differences is not known. They hold at whatever look one stops, and why.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np

from fastcompat.rows import FloatArray

# Prompts at the first look: with fewer, tails that differ between generators make the error too large.
FIRST_LOOK = 200
# Looks are so many times as many prompts apart, and there are about so many at most.
RATIO = 1.15
MOST_LOOKS = 50
# How often anything false may be claimed on the way. What the last look claims, of the whole corpus, has
# `intervals.FALSE_DIFFERENCES`: together below 5% (strict on the way, nominal at the end: Haybittle 1971, Peto 1976).
FALSE_ON_THE_WAY = 0.01

_NORMAL = NormalDist()
# Beyond it a normal tail is 3e-10, and Student's quantile is no longer found.
_LARGEST_Z = 6.2
# What lies further below the boundary does not come back.
_LOWEST = -6.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(80)


def planned_looks(n_prompts: int, *, ratio: float = RATIO, first: int = FIRST_LOOK) -> list[float]:
    """The share of the corpus's prompts at each look, ascending; the last is the whole corpus, 1.0."""
    if n_prompts <= first:
        return [1.0]
    ratio = max(ratio, (n_prompts / first) ** (1 / MOST_LOOKS))
    # A look within a thousandth of the end would see nothing new there.
    n_looks = math.ceil(math.log(n_prompts / first * 0.999) / math.log(ratio))
    return [*(first * ratio**k / n_prompts for k in range(n_looks)), 1.0]


def prompts_below(share: float) -> str:
    """The prompt ids, hashes in 32 hex digits, below this text are this share of all there can be."""
    return f"{int(share * 2.0**128):032x}" if share < 1 else "g"  # a digit beyond every hash


def repeated_tail(tail: float, shares: list[float]) -> float:
    """The one-sided tail of each look's interval, if in `tail` of all runs it may be passed at any look on the way.

    shares: of `planned_looks`; the last, the whole corpus, is not on the way.
    """
    if len(shares) < 3:
        return tail
    z = _boundary(tail, len(shares) - 1, round(shares[1] / shares[0], 9))
    return 1 - _NORMAL.cdf(z)


@cache
def _boundary(tail: float, n_looks: int, ratio: float) -> float:
    """The z that a driftless process crosses at any of its looks with this probability."""
    low, high = 0.0, _LARGEST_Z
    if crossing(high, n_looks, ratio) >= tail:
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if crossing(middle, n_looks, ratio) > tail else (low, middle)
    return high


def crossing(z: float, n_looks: int, ratio: float) -> float:
    """The chance that z-scores at looks `ratio` apart exceed `z` at any of them, where nothing is there to be found.

    Scores at looks of n and m prompts, n < m, have the correlation sqrt(n / m). The density of those that have not
    crossed is carried from look to look (Armitage, McPherson and Rowe 1969, "Repeated significance tests on
    accumulating data").
    """
    correlation = math.sqrt(1 / ratio)
    deviation = math.sqrt(1 - 1 / ratio)
    x = (z - _LOWEST) / 2 * (_NODES + 1) + _LOWEST
    weights = (z - _LOWEST) / 2 * _WEIGHTS
    out_next = _upper_tails((z - correlation * x) / deviation)
    kernel = _densities((x[:, None] - correlation * x) / deviation) / deviation * weights
    density = _densities(x)
    crossed = 1 - _NORMAL.cdf(z)
    for _ in range(n_looks - 1):
        crossed += float(out_next @ (weights * density))
        density = kernel @ density
    return crossed


def _densities(x: FloatArray) -> FloatArray:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _upper_tails(x: FloatArray) -> FloatArray:
    return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in x])
