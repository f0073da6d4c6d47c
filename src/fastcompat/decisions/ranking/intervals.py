"""How sure the means of clustered responses are: each prompt's influence, intervals, bootstrap weights. NumPy only.

Responses to one prompt resemble each other, so prompts are what is independent. A mean is a ratio of sums over prompts,
`sum_p values / sum_p weights`, and to first order its error is a sum of one influence per prompt. Prompts are taken in
blocks: an array [P, G] never exists whole.

Dimension key: N responses, P prompts, G generators, F figures, B bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fastcompat.rows import BoolArray, FloatArray, IntArray

# Prompts in a block: their weights are [prompts, B] float32, 64 MiB for 1,000 draws.
BLOCK_PROMPTS = 1 << 14
# Cells [prompt, generator] in a block: 8 MiB an array.
BLOCK_CELLS = 1 << 20
# How often any of equal generators may be told from another: aimed below 5%, which is then kept under heavy tails too.
FALSE_DIFFERENCES = 0.04
# On either side of a 95% interval.
PLAIN_TAIL = 0.025
# The longest side of an interval, in Student's: Hall's correction leaps where one value makes all of the skewness.
LONGEST_SIDE = 2.0
# Of figures of size 1: squares of what is smaller vanish, so that nothing seems to vary.
VANISHING = 1e-150


class ClusteredMeans:
    """Means of several figures of the same responses, per generator, with what each prompt has to do with them.

    prompt, group: [N] codes from 0, of G groups. figures: (values [N], weights [N]) of each, float64 without NaN;
    weights that several figures have in common are one array.

    estimates: [G] of each figure, `sum(values) / sum(weights)`; NaN for a generator without responses.
    freedom: [G] of each figure, the degrees of freedom of its variance: Kish's effective number of prompts,
        `(sum_p w)^2 / sum_p w^2` of prompts' summed weights w, less one; at least 1.
    n_prompts: [G], the prompts that a generator answered.
    """

    def __init__(
        self, prompt: IntArray, group: IntArray, n_groups: int, figures: Sequence[tuple[FloatArray, FloatArray]]
    ) -> None:
        order = np.argsort(prompt, kind="stable")
        self.n_groups = n_groups
        self._prompt, self._group = prompt[order], group[order]
        ordered = {id(weights): weights[order] for _, weights in figures}
        self._figures = [(values[order], ordered[id(weights)]) for values, weights in figures]
        self._totals: list[FloatArray] = [
            np.bincount(self._group, weights, n_groups).astype(np.float64, copy=False) for _, weights in self._figures
        ]
        with np.errstate(invalid="ignore"):
            self.estimates: list[FloatArray] = [
                np.bincount(self._group, values, n_groups) / total
                for (values, _), total in zip(self._figures, self._totals, strict=True)
            ]
        self.n_prompts = np.zeros(n_groups, np.int64)
        squares = [np.zeros(n_groups) for _ in figures]
        for block in self._blocks():
            self.n_prompts += (block.sums(np.ones(len(block.cell))) > 0).sum(0)
            for square, (_, weights) in zip(squares, self._figures, strict=True):
                square += (block.sums(weights[block.rows]) ** 2).sum(0)
        with np.errstate(invalid="ignore"):
            self.freedom = [
                np.fmax(total**2 / square - 1, 1.0) for total, square in zip(self._totals, squares, strict=True)
            ]

    def replace_mean(self, figure: int, mean: FloatArray, total: FloatArray) -> None:
        """Take a mean [G] that more rows than these gave, with weights that sum to `total` [G]: the influences of these
        rows are then theirs on that mean."""
        self.estimates[figure], self._totals[figure] = mean, total

    def moments(self) -> Moments:
        """Moments of the influences of prompts on the figures' means.

        The influence of prompt p on a mean m is `(values_p - m * weights_p) / sum(weights)`, over
        `1 - weights_p / sum(weights)`: its residual from the mean of all others. The sum of squares is then the
        variance that a jackknife gives, which errs on the wide side where prompts are few or unequal (CR3: Bell and
        McCaffrey 2002, "Bias reduction in standard errors for linear regression with multi-stage samples"; here m is a
        regression on `weights` alone).
        """
        moments = Moments.none(len(self._figures), self.n_groups)
        for block in self._blocks():
            influences = []
            for (_, weights), residuals, total in zip(self._figures, self._residuals(block), self._totals, strict=True):
                with np.errstate(invalid="ignore", divide="ignore"):
                    share = block.sums(weights[block.rows]) / total
                    influence = block.sums(residuals) / (total * (1 - share))
                # No responses, or all of them in one prompt, which says nothing of the next one.
                influences.append(np.nan_to_num(influence, nan=0.0, posinf=0.0, neginf=0.0))
            moments.add(np.stack(influences, axis=1))
        return moments

    def replicates(self, draws: int, seed: int) -> list[FloatArray]:
        """[B, G] of each figure: its means with the prompts weighted at random, alike for every generator and figure.

        Residuals are multiplied, not values, in float32: what is rounded is a replicate's distance from the estimate,
        by less than a thousandth of it, and it is added to the estimate in float64, as blocks are to each other. NaN
        where a draw leaves a generator nothing.
        """
        all_weights = {id(weights): weights for _, weights in self._figures}
        sums = np.zeros(((len(self._figures) + len(all_weights)) * self.n_groups, draws))
        generator = np.random.default_rng(seed)
        for block in self._blocks():
            columns = [*self._residuals(block), *(weights[block.rows] for weights in all_weights.values())]
            by_prompt = np.concatenate([block.sums(column).astype(np.float32) for column in columns], axis=1)
            sums += by_prompt.T @ poisson_weights(generator, block.n_prompts, draws).astype(np.float32)
        parts = sums.reshape(-1, self.n_groups, draws)
        denominators = dict(zip(all_weights, parts[len(self._figures) :], strict=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            return [
                mean + (numerator / denominators[id(weights)]).T
                for mean, numerator, (_, weights) in zip(self.estimates, parts, self._figures, strict=False)
            ]

    def _blocks(self) -> Iterator[_Block]:
        n_prompts = int(self._prompt[-1]) + 1 if len(self._prompt) else 0
        # A multiple of 64, so that the random bytes do not depend on how prompts are cut into blocks.
        step = max(64, min(BLOCK_PROMPTS, BLOCK_CELLS // self.n_groups) // 64 * 64)
        for first in range(0, n_prompts, step):
            begin, end = np.searchsorted(self._prompt, [first, first + step])
            cell = (self._prompt[begin:end] - first) * self.n_groups + self._group[begin:end]
            yield _Block(
                rows=slice(begin, end), cell=cell, n_prompts=min(step, n_prompts - first), n_groups=self.n_groups
            )

    def _residuals(self, block: _Block) -> list[FloatArray]:
        group = self._group[block.rows]
        return [
            values[block.rows] - mean[group] * weights[block.rows]
            for (values, weights), mean in zip(self._figures, self.estimates, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Rows of consecutive prompts; `cell` is a row's place in the flattened [n_prompts, G]."""

    rows: slice
    cell: IntArray
    n_prompts: int
    n_groups: int

    def sums(self, values: FloatArray) -> FloatArray:
        """[n_prompts, G] sums of the block's rows."""
        flat = np.bincount(self.cell, values, self.n_prompts * self.n_groups).astype(np.float64, copy=False)
        return flat.reshape(self.n_prompts, self.n_groups)


@dataclass(frozen=True)
class Moments:
    """Sums over prompts of products of influences, from which those of any linear combination of figures follow.

    second: [F, G, F, G], of figure k on generator g times figure l on generator h. third: [F, F, G, F, G], of figures k
    and l on generator g times figure m on generator h.
    """

    second: FloatArray
    third: FloatArray

    @classmethod
    def none(cls, n_figures: int, n_groups: int) -> Moments:
        shape = (n_figures, n_groups)
        return cls(np.zeros(shape * 2), np.zeros((n_figures, *shape, *shape)))

    def add(self, influence: FloatArray) -> None:
        """Add a block of prompts, [prompts, F, G]."""
        flat = influence.reshape(len(influence), -1)
        squares = (influence[:, :, None] * influence[:, None]).reshape(len(influence), -1)
        np.add(self.second, (flat.T @ flat).reshape(self.second.shape), out=self.second)
        np.add(self.third, (squares.T @ flat).reshape(self.third.shape), out=self.third)

    def of(self, derivatives: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Standard errors and accelerations [G] of a function of the figures with the derivatives [F, G]."""
        d = derivatives
        squares = np.einsum("kg,lg,kglg->g", d, d, self.second)
        cubes = np.einsum("kg,lg,mg,klgmg->g", d, d, d, self.third)
        return np.sqrt(np.maximum(squares, 0)), _acceleration(squares, cubes)

    def of_differences(self, derivatives: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Standard errors and accelerations [G, G] of generators' figures less others', paired by prompt.

        derivatives: [F, G, G], alike for both generators of a pair; or [F, 1, 1], alike for all pairs.
        """
        n_figures, n_groups = self.second.shape[:2]
        squares, cubes = np.zeros((n_groups, n_groups)), np.zeros((n_groups, n_groups))
        for j, k in product(range(n_figures), repeat=2):
            both = derivatives[j] * derivatives[k]
            crossed = self.second[j, :, k]
            own = np.diagonal(crossed)
            squares += both * (own[:, None] + own - crossed - crossed.T)
            for third in range(n_figures):
                crossed = self.third[j, k, :, third]
                own = np.diagonal(crossed)
                cubes += both * derivatives[third] * (own[:, None] - own - 3 * (crossed - crossed.T))
        squares = np.maximum(squares, 0)
        return np.sqrt(squares), _acceleration(squares, cubes)


def _acceleration(squares: FloatArray, cubes: FloatArray) -> FloatArray:
    """A sixth of the skewness of a sum of influences; 0 where nothing varies."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(cubes / (6 * squares**1.5), nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, kw_only=True)
class Differences:
    """By how much the row's generator is better than the column's, [G, G] each, paired by prompt.

    value / scale is the difference of the figures themselves; a CAR's is compared in a form that treats both alike.
    """

    value: FloatArray
    deviation: FloatArray
    acceleration: FloatArray
    scale: FloatArray


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure of every generator with all that is known of its error."""

    value: FloatArray  # [G], NaN without responses
    deviation: FloatArray  # [G]
    acceleration: FloatArray  # [G]
    freedom: FloatArray  # [G]
    sign: int  # 1 where higher is better, else -1
    unit: float  # that the figures are in, so that their size is about 1
    draw: Callable[[], FloatArray]  # [B, G] of the bootstrap; dear, and not always asked for
    compare: Callable[[], Differences]

    @cached_property
    def differences(self) -> Differences:
        return self.compare()

    def figures(self, known: BoolArray, tail: float = PLAIN_TAIL) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(value, low, high) [G] as users know them; without bounds where there are not enough prompts to know.

        tail: the chance that either bound may be passed.
        """
        low, high = interval(self.value, self.deviation, self.acceleration, self.freedom, 1 - 2 * tail)
        low, high = np.where(known, low, np.nan), np.where(known, high, np.nan)
        return self.value * self.unit, low * self.unit, high * self.unit

    def p_best(self, known: BoolArray) -> FloatArray:
        """[G] share of the draws in which each is the best of those that are known."""
        replicates = self.draw()
        figure = np.where(known & ~np.isnan(replicates), self.sign * replicates, -np.inf)
        best = (figure == figure.max(axis=1, keepdims=True)) & known
        share = (best / np.maximum(best.sum(axis=1, keepdims=True), 1)).mean(axis=0)
        return np.where(known, share, np.nan)

    def order(self) -> IntArray:
        """The generators by their figures, the best first."""
        return np.argsort(np.where(np.isnan(self.value), np.inf, -self.sign * self.value), kind="stable")

    def ranks(self, better: BoolArray) -> list[int | None]:
        """[G] 1 + how many are better than each, as `better` [G, G] has it; None for one without a figure."""
        n_better = better.sum(axis=0)
        return [None if np.isnan(value) else 1 + int(n) for value, n in zip(self.value, n_better, strict=True)]

    def clearly_better(
        self, known: BoolArray, tail: Callable[[int], float] = lambda n_pairs: FALSE_DIFFERENCES / 2 / n_pairs
    ) -> BoolArray:
        """[G, G] whether the row's generator is better than the column's, and the interval of the difference says so.

        All pairs of known generators are compared, and each gets its share of `FALSE_DIFFERENCES`; what is told apart
        leaves its share to the others (Holm 1979, "A simple sequentially rejective multiple test procedure").
        tail: of so many pairs, how often the interval of each may lie wholly on the wrong side.
        """
        open_pairs = known[:, None] & known & ~np.eye(len(known), dtype=bool)
        better = np.zeros_like(open_pairs)
        while open_pairs.any():
            new: BoolArray = open_pairs & (self.differences.value > self.reach(tail(int(open_pairs.sum()) // 2)))
            if not new.any():
                break
            better |= new
            open_pairs &= ~(new | new.T)
        return better

    def reach(self, tail: float) -> FloatArray:
        """[G, G] how far above zero a difference must be if it may be there by chance in `tail` of all cases."""
        quantiles = student_t_quantile(1 - tail, self.freedom)
        side, _ = sides(
            np.maximum.outer(quantiles, quantiles),
            self.differences.acceleration,
            np.minimum.outer(self.freedom, self.freedom),
        )
        # Equal figures may differ in their last bits, where nothing varies at all.
        return side * self.differences.deviation + np.maximum(1e-12 * np.abs(self.value)[:, None], VANISHING)


def interval(
    estimate: FloatArray, deviation: FloatArray, acceleration: FloatArray, freedom: FloatArray, level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """(low, high) of figures [G]: on each side the wider of Student's t and Hall's skewness-corrected interval.

    deviation, acceleration: standard errors and a sixth of the skewness, of the estimates. Why both, from
    bench/results/coverage.json: on 30 log-normal values with sigma 1, Student's t covers 89% and the percentile
    bootstrap 88%, BCa 90%, bootstrap-t and Hall 93%, the wider of the two 94%; on 30 values of Student's t with 3
    degrees it is 96%, 94%, 92%, 94%, 94% and 96%. Bootstrap-t can moreover have no bound at all where figures take few
    different values, because a draw may not vary. On corpora the wider covers 93% to 97%, and 98% only for the mean
    of 30 prompts' rewards of few different values. Neither side is longer than `LONGEST_SIDE` times Student's; that
    costs no coverage, and bounds follow the data without a leap.
    """
    below, above = sides(student_t_quantile((1 + level) / 2, freedom), acceleration, freedom)
    return estimate - deviation * below, estimate + deviation * above


def sides(quantile: FloatArray, acceleration: FloatArray, freedom: FloatArray) -> tuple[FloatArray, FloatArray]:
    """How far an interval reaches (below, above) an estimate, in standard errors, if Student's reaches `quantile`.

    Nowhere less than Student's, nor more than `LONGEST_SIDE` times as far.
    """
    # A small sample understates its skewness: G1 of Joanes and Gill 1998, "Comparing measures of sample skewness".
    acceleration = acceleration * np.sqrt((freedom + 1) * freedom) / np.maximum(freedom - 1, 1)
    corrected = skewness_corrected(quantile, acceleration), -skewness_corrected(-quantile, acceleration)
    below, above = (np.clip(side, quantile, LONGEST_SIDE * quantile) for side in corrected)
    return below, above


def skewness_corrected(quantile: FloatArray, acceleration: FloatArray) -> FloatArray:
    """The quantile of a studentised mean whose own would be `quantile` without skewness.

    The inverse of `g(t) = t + 2 a t^2 + 4/3 a^2 t^3 + a`, with a the acceleration: Hall 1992, "On the removal of
    skewness by transformation", where a = skewness / (6 sqrt(n)).
    """
    tiny = np.abs(acceleration) < 1e-8
    a = np.where(tiny, 1.0, acceleration)
    return np.where(tiny, quantile, (np.cbrt(1 + 6 * a * (quantile - a)) - 1) / (2 * a))


def student_t_quantile(probability: float, freedom: FloatArray) -> FloatArray:
    """Quantiles of Student's t for a probability above 1/2, [G] for degrees of freedom [G] of at least 1, any real.

    Newton's steps from the normal quantile, which lies below: the distribution function is concave there, so no step
    goes too far. The function itself is an integral of cos(angle)^(freedom - 1), by Gauss-Legendre.
    """
    freedom = np.asarray(freedom, np.float64)
    normal = NormalDist().inv_cdf(probability)
    nodes, node_weights = _gauss_legendre()
    gammas = [math.exp(math.lgamma((v + 1) / 2) - math.lgamma(v / 2)) for v in freedom.ravel()]
    constant = np.reshape(gammas, freedom.shape) / math.sqrt(math.pi)
    t = np.full(freedom.shape, normal)
    for _ in range(80):
        angle = np.arctan(t / np.sqrt(freedom))
        cosines = np.cos(angle[..., None] * (nodes + 1) / 2) ** (freedom[..., None] - 1)
        below = 0.5 + constant * angle / 2 * (cosines @ node_weights)
        density = constant / np.sqrt(freedom) * np.cos(angle) ** (freedom + 1)
        step = (probability - below) / density
        t = t + step
        if (np.abs(step) <= 1e-10 * t).all():
            break
    return t


@cache
def _gauss_legendre() -> tuple[FloatArray, FloatArray]:
    """64 nodes on [-1, 1] and their weights."""
    return np.polynomial.legendre.leggauss(64)


# How often each of 256 equally likely bytes means the weight 0, 1, 2 ...: Poisson(1) to within half a percent in total.
BYTES_OF_WEIGHT = (94, 95, 46, 16, 4, 1)
_WEIGHT_OF_BYTE = bytes(np.repeat(np.arange(len(BYTES_OF_WEIGHT), dtype=np.uint8), BYTES_OF_WEIGHT))


def poisson_weights(generator: np.random.Generator, n_prompts: int, draws: int) -> NDArray[np.uint8]:
    """[P, B] independent weights, nearly Poisson(1), one random byte each.

    Poisson weights are the bootstrap's multinomial in the limit of many prompts (Chamandy et al. 2012, "Estimating
    Uncertainty for Massive Data Streams"). Any weights with mean 1 and variance 1 give a consistent bootstrap
    (Praestgaard and Wellner 1993, "Exchangeably weighted bootstraps"); these have both exactly, and a third factorial
    moment of 252/256 for Poisson's 1.
    """
    drawn = generator.bytes(n_prompts * draws).translate(_WEIGHT_OF_BYTE)
    return np.frombuffer(drawn, np.uint8).reshape(n_prompts, draws)
