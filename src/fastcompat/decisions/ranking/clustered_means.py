"""Means of clustered responses: each prompt's influence on them, and bootstrap draws of prompts. NumPy only.

Responses to one prompt resemble each other, so prompts are what is independent. A mean is a ratio of sums over prompts,
`sum_p values / sum_p weights`, and to first order its error is a sum of one influence per prompt. Responses come in
chunks of whole prompts and are gone through twice, for the sums and for the influences; within a chunk prompts are
taken in blocks. So nothing here grows with N or P but what the caller keeps of the chunks.

Dimension key: N responses, P prompts, G generators, F figures, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fastcompat.rows import FloatArray, IntArray

# Prompts in a block: their weights are [prompts, B] float32, 64 MiB for 1,000 draws.
BLOCK_PROMPTS = 1 << 14
# Cells [prompt, generator] in a block: 8 MiB an array.
BLOCK_CELLS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Responses:
    """[N] responses to P whole prompts: all that count of any of these.

    prompt: [N] codes below `n_prompts`, ascending; a prompt may be without responses. group: [N] codes of generators.
    figures: (values [N], weights [N]) of each, float64 without NaN; weights that several figures have in common are one
    array.
    """

    prompt: IntArray
    n_prompts: int
    group: IntArray
    figures: Sequence[tuple[FloatArray, FloatArray]]

    @classmethod
    def of(
        cls,
        prompt: IntArray,
        group: IntArray,
        figures: Sequence[tuple[FloatArray, FloatArray]],
        n_prompts: int | None = None,
    ) -> Responses:
        """Of responses in any order. n_prompts: None: up to the highest code."""
        if (prompt[1:] < prompt[:-1]).any():
            order = np.argsort(prompt, kind="stable")
            prompt, group = prompt[order], group[order]
            # Of weights that are one number for all there is nothing to put in order.
            ordered = {id(own): own[order] if own.strides != (0,) else own for _, own in figures}
            figures = [(values[order], ordered[id(own)]) for values, own in figures]
        n_prompts = int(prompt.max(initial=-1)) + 1 if n_prompts is None else n_prompts
        return cls(prompt=prompt, n_prompts=n_prompts, group=group, figures=figures)

    def blocks(self, n_groups: int) -> Iterator[Responses]:
        """The same, so many prompts at a time that [P, G] is small."""
        # A multiple of 64, so that the random bytes do not depend on how prompts are cut into blocks.
        step = max(64, min(BLOCK_PROMPTS, BLOCK_CELLS // n_groups) // 64 * 64)
        for first in range(0, self.n_prompts, step):
            rows = slice(*np.searchsorted(self.prompt, [first, first + step]))
            cut = {id(weights): weights[rows] for _, weights in self.figures}
            yield Responses(
                prompt=self.prompt[rows] - first,
                n_prompts=min(step, self.n_prompts - first),
                group=self.group[rows],
                figures=[(values[rows], cut[id(weights)]) for values, weights in self.figures],
            )

    def sums(self, values: FloatArray, n_groups: int) -> FloatArray:
        """[P, G] sums of what each response has."""
        cell = self.prompt * n_groups + self.group
        flat = np.bincount(cell, values, self.n_prompts * n_groups).astype(np.float64, copy=False)
        return flat.reshape(self.n_prompts, n_groups)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Totals:
    """What is summed when responses are first gone through: values and weights [F, G], the squares of prompts' summed
    weights [F, G], and the prompts that each generator answered [G]."""

    values: FloatArray
    weights: FloatArray
    squares: FloatArray
    n_prompts: IntArray

    @classmethod
    def none(cls, n_figures: int, n_groups: int) -> Totals:
        values, weights, squares = (np.zeros((n_figures, n_groups)) for _ in range(3))
        return cls(values=values, weights=weights, squares=squares, n_prompts=np.zeros(n_groups, np.int64))

    def add(self, responses: Responses, n_groups: int) -> None:
        """Add a chunk, of the first so many generators."""
        for k, (values, weights) in enumerate(responses.figures):
            self.values[k, :n_groups] += np.bincount(responses.group, values, n_groups)
            self.weights[k, :n_groups] += np.bincount(responses.group, weights, n_groups)
        for block in responses.blocks(n_groups):
            counts = block.sums(np.ones(len(block.prompt)), n_groups)
            self.n_prompts[:n_groups] += (counts > 0).sum(0)
            squares = {id(weights): (block.sums(weights, n_groups) ** 2).sum(0) for _, weights in block.figures}
            for k, (_, weights) in enumerate(block.figures):
                self.squares[k, :n_groups] += squares[id(weights)]

    def at(self, groups: IntArray) -> Totals:
        """Those of some generators, in this order."""
        return Totals(
            values=self.values[:, groups],
            weights=self.weights[:, groups],
            squares=self.squares[:, groups],
            n_prompts=self.n_prompts[groups],
        )


class ClusteredMeans:
    """Means of several figures of the same responses, per generator, with what each prompt has to do with them.

    chunks: the responses of G generators, gone through as often as need be. totals: theirs, where they are known.

    estimates: [G] of each figure, `sum(values) / sum(weights)`; NaN for a generator without responses.
    freedom: [G] of each figure, the degrees of freedom of its variance: Kish's effective number of prompts,
        `(sum_p w)^2 / sum_p w^2` of prompts' summed weights w, less one; at least 1.
    n_prompts: [G], the prompts that a generator answered.
    """

    def __init__(self, chunks: Iterable[Responses], n_groups: int, totals: Totals | None = None) -> None:
        self._chunks = chunks
        for chunk in chunks if totals is None else ():
            totals = totals or Totals.none(len(chunk.figures), n_groups)
            totals.add(chunk, n_groups)
        assert totals is not None
        self.n_groups = n_groups
        self.n_prompts = totals.n_prompts
        self._weights = list(totals.weights)
        with np.errstate(invalid="ignore"):
            self.estimates: list[FloatArray] = list(totals.values / totals.weights)
            self.freedom: list[FloatArray] = list(np.fmax(totals.weights**2 / totals.squares - 1, 1.0))

    def replace_mean(self, figure: int, mean: FloatArray, total: FloatArray) -> None:
        """Take a mean [G] that more rows than these gave, with weights that sum to `total` [G]: the influences of these
        rows are then theirs on that mean."""
        self.estimates[figure], self._weights[figure] = mean, total

    def moments(self) -> Moments:
        """Moments of the influences of prompts on the figures' means.

        The influence of prompt p on a mean m is `(values_p - m * weights_p) / sum(weights)`, over
        `1 - weights_p / sum(weights)`: its residual from the mean of all others. The sum of squares is then the
        variance that a jackknife gives, which errs on the wide side where prompts are few or unequal (CR3: Bell and
        McCaffrey 2002, "Bias reduction in standard errors for linear regression with multi-stage samples"; here m is a
        regression on `weights` alone).
        """
        return self.moments_and_replicates(draws=0, seed=0)[0]

    def moments_and_replicates(self, draws: int, seed: int) -> tuple[Moments, list[FloatArray]]:
        """`moments`, and in the same go [B, G] of each figure: its means with the prompts weighted at random, alike for
        every generator and figure.

        Residuals are multiplied, not values, in float32: what is rounded is a replicate's distance from the estimate,
        by less than a thousandth of it, and it is added to the estimate in float64, as blocks are to each other. NaN
        where a draw leaves a generator nothing. Whatever the chunks, the k-th prompt has the same weights.
        """
        moments = Moments.none(len(self.estimates), self.n_groups)
        replicates = _Replicates(self.estimates, draws, seed)
        for chunk in self._chunks:
            for block in chunk.blocks(self.n_groups):
                # Of prompts at the end that nobody answered only the random bytes are used up.
                n_answered = int(block.prompt[-1]) + 1 if len(block.prompt) else 0
                if n_answered:
                    residuals, weights = self._residuals(replace(block, n_prompts=n_answered))
                    moments.add(np.stack(self._influences(residuals, weights), axis=1))
                    if draws:
                        replicates.add(residuals, weights)
                if draws:
                    replicates.pass_over(block.n_prompts - n_answered)
        return moments, replicates.means() if draws else []

    def _residuals(self, block: Responses) -> tuple[list[FloatArray], list[FloatArray]]:
        """Residuals from the means, and weights: [P, G] of each figure."""
        weights = {id(own): block.sums(own, self.n_groups) for _, own in block.figures}
        residuals = [
            block.sums(values - mean[block.group] * own, self.n_groups)
            for (values, own), mean in zip(block.figures, self.estimates, strict=True)
        ]
        return residuals, [weights[id(own)] for _, own in block.figures]

    def _influences(self, residuals: Sequence[FloatArray], weights: Sequence[FloatArray]) -> list[FloatArray]:
        """[P, G] of each figure."""
        influences = []
        for residual, weight, total in zip(residuals, weights, self._weights, strict=True):
            with np.errstate(invalid="ignore", divide="ignore"):
                influence = residual / (total * (1 - weight / total))
            # No responses, or all of them in one prompt, which says nothing of the next one.
            influences.append(np.nan_to_num(influence, nan=0.0, posinf=0.0, neginf=0.0))
        return influences


class _Replicates:
    """The bootstrap's sums over prompts, which are added in their order."""

    def __init__(self, estimates: Sequence[FloatArray], draws: int, seed: int) -> None:
        self._estimates, self._draws = estimates, draws
        self._generator = np.random.default_rng(seed)
        self._ahead = np.empty((0, draws), np.uint8)  # what was drawn for the prompts to come
        self._sums: FloatArray | None = None
        self._denominators: list[int] = []  # the place of each figure's weights among those that differ

    def add(self, residuals: Sequence[FloatArray], weights: Sequence[FloatArray]) -> None:
        """[P, G] of each figure; weights in common are one array."""
        different = {id(own): own for own in weights}
        self._denominators = [list(different).index(id(own)) for own in weights]
        by_prompt = np.concatenate([*residuals, *different.values()], axis=1).astype(np.float32)
        sums = by_prompt.T @ self._drawn(len(by_prompt)).astype(np.float32)
        if self._sums is None:
            self._sums = np.zeros(sums.shape)
        self._sums += sums

    def pass_over(self, n_prompts: int) -> None:
        """The next prompts have no response."""
        self._drawn(n_prompts)

    def _drawn(self, n_prompts: int) -> NDArray[np.uint8]:
        """[n_prompts, B] weights of the next prompts: 64 at a time, so that their bytes do not depend on the cuts."""
        lacking = n_prompts - len(self._ahead)
        if lacking > 0:
            drawn = poisson_weights(self._generator, -(-lacking // 64) * 64, self._draws)
            self._ahead = np.concatenate([self._ahead, drawn]) if len(self._ahead) else drawn
        now, self._ahead = self._ahead[:n_prompts], self._ahead[n_prompts:]
        return now

    def means(self) -> list[FloatArray]:
        """[B, G] of each figure."""
        n_figures, n_groups = len(self._estimates), len(self._estimates[0])
        if self._sums is None:
            return [np.full((self._draws, n_groups), np.nan) for _ in range(n_figures)]
        parts = self._sums.reshape(-1, n_groups, self._draws)
        with np.errstate(invalid="ignore", divide="ignore"):
            return [
                mean + (parts[k] / parts[n_figures + denominator]).T
                for k, (mean, denominator) in enumerate(zip(self._estimates, self._denominators, strict=True))
            ]


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
