"""What `ranking.rank` is told, and estimates from it: of reward, loss and CAR of every generator. No torch.

Dimension key: N responses, F figures, G generators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from fastcompat.decisions.ranking.clustered_means import ClusteredMeans, Moments
from fastcompat.decisions.ranking.intervals import Differences, Estimate
from fastcompat.errors import UsageError
from fastcompat.metrics import car, check_losses, finite
from fastcompat.rows import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingSettings:
    """Options of `ranking.rank`. UsageError for one out of range."""

    betas: tuple[float, ...]
    average: str
    reward_shift: float
    leave_out: str
    sort_by: str | None
    draws: int
    seed: int

    def __post_init__(self) -> None:
        finite(self.reward_shift, "reward_shift")
        if self.average not in ("response", "token"):
            raise UsageError(f"average must be 'response' or 'token', got {self.average!r}")
        if self.leave_out not in ("response", "prompt"):
            raise UsageError(f"leave_out must be 'response' or 'prompt', got {self.leave_out!r}")
        if self.sort_by not in (None, "car", "loss", "reward"):
            raise UsageError(f"sort_by must be 'car', 'loss' or 'reward', got {self.sort_by!r}")
        for name, value, least in (("draws", self.draws, 1), ("seed", self.seed, 0)):
            if not isinstance(value, int | np.integer) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")


class FigureReader:
    """Figures of responses that come in chunks, and the unit of each that all of them together are given in.

    The unit is a power of two, which changes no digit: figures are then of size 1 at most, so that squares and cubes
    neither overflow nor vanish.
    """

    def __init__(self, figures: Sequence[str], average: str) -> None:
        self._figures = figures
        self._average = average
        self._largest = dict.fromkeys(figures, 0.0)
        self._lowest_losses = [0.0, 0.0]  # of responses, and per token of what is averaged over tokens
        self._lacks_tokens = False

    def read(self, used: pa.Table) -> list[tuple[FloatArray, FloatArray]]:
        """(values, weights) [N] of each figure, whose means are wanted. used: responses that carry all of them."""
        pairs = []
        ones = np.broadcast_to(np.ones(1), used.num_rows)
        for figure in self._figures:
            values, weights = used[figure].to_numpy(), ones
            if figure == "loss":
                self._lowest_losses[0] = min(self._lowest_losses[0], values.min(initial=0.0))
                if self._average == "token":
                    values, weights = self._token_sums(used)
                    self._lowest_losses[1] = min(
                        self._lowest_losses[1], (values / np.maximum(weights, 1)).min(initial=0.0)
                    )
            self._largest[figure] = max(self._largest[figure], float(np.abs(values).max(initial=0.0)))
            pairs.append((values, weights))
        return pairs

    def _token_sums(self, used: pa.Table) -> tuple[FloatArray, FloatArray]:
        """(NLL sums, tokens) [N]: their summed ratio is the loss averaged over tokens."""
        if used["n_tokens"].null_count or used["nll_sum"].null_count:
            self._lacks_tokens = True
            return np.zeros(used.num_rows), np.zeros(used.num_rows)
        return used["nll_sum"].to_numpy(), used["n_tokens"].to_numpy().astype(np.float64)

    def check(self) -> None:
        """UsageError for a negative loss, and for an average over tokens whose numbers are not known."""
        check_losses(np.array(self._lowest_losses[:1]))
        if self._lacks_tokens:
            raise UsageError("average='token' needs the columns n_tokens and nll_sum in every scored row")
        check_losses(np.array(self._lowest_losses))

    @property
    def exponents(self) -> list[int]:
        """Of two, for the unit of each figure: so far."""
        return [int(np.frexp(self._largest[figure])[1]) - 1 for figure in self._figures]

    @property
    def units(self) -> dict[str, float]:
        return {name: math.ldexp(1.0, exponent) for name, exponent in zip(self._figures, self.exponents, strict=True)}


def in_units(
    pairs: Sequence[tuple[FloatArray, FloatArray]], exponents: Sequence[int]
) -> list[tuple[FloatArray, FloatArray]]:
    """What a `FigureReader` has read, in its units."""
    return [(np.ldexp(values, -own), weights) for (values, weights), own in zip(pairs, exponents, strict=True)]


def values_of(
    used: pa.Table, figures: Sequence[str], average: str
) -> tuple[list[tuple[FloatArray, FloatArray]], dict[str, float]]:
    """(values, weights) [N] of each figure of responses that carry all of them, in units; and the units.

    UsageError as of `FigureReader.check`.
    """
    reader = FigureReader(figures, average)
    pairs = reader.read(used)
    reader.check()
    return in_units(pairs, reader.exponents), reader.units


def estimates_of(
    means: ClusteredMeans,
    moments: Moments,
    units: Mapping[str, float],
    settings: RankingSettings,
    *,
    replicates: Sequence[FloatArray] = (),
    carried: float = 0.0,
) -> dict[str | float, Estimate]:
    """The estimates of each figure under its name, and of CAR under its beta where there are both figures.

    means, units: of what `values_of` gave; moments: theirs, and replicates, where it is asked how often a generator is
    the best. A generator whose shifted mean reward is negative has no CAR: NaN. carried: the loss is what `means` has
    in its place, plus so many times the reward (`known_rewards`).
    """
    figures = list(units)
    estimates: dict[str | float, Estimate] = {}
    for k, name in enumerate(figures):
        sign = -1 if name == "loss" else 1
        unit = np.eye(len(figures))[k]
        if name == "loss" and carried:
            unit[figures.index("reward")] = carried
        value = np.tensordot(unit, np.stack(means.estimates), axes=1)
        deviation, acceleration = moments.of(np.repeat(unit[:, None], means.n_groups, axis=1))
        estimates[name] = Estimate(
            value=value,
            deviation=deviation,
            acceleration=acceleration,
            freedom=means.freedom[k],
            sign=sign,
            unit=units[name],
            draw=partial(_drawn, replicates, k),
            compare=partial(_differences, sign * value, moments, sign * unit),
        )
    if len(figures) < 2:
        return estimates
    shift, reward, loss = settings.reward_shift / units["reward"], estimates["reward"].value, estimates["loss"].value
    reward = np.where(reward + shift >= 0, reward, np.nan)
    for beta in settings.betas:
        weight = beta * units["loss"]
        value = car(reward, loss, weight, reward_shift=shift)
        slopes = np.stack([1 - weight * value * carried, -weight * value]) / (1 + weight * loss)
        deviation, acceleration = moments.of(np.nan_to_num(slopes))
        estimates[beta] = Estimate(
            value=value,
            deviation=deviation,
            acceleration=acceleration,
            freedom=np.minimum(*means.freedom),
            sign=1,
            unit=units["reward"],
            draw=partial(_drawn_cars, replicates, shift, weight),
            compare=partial(_car_differences, reward + shift, loss, weight, moments, carried),
        )
    return estimates


def _drawn(replicates: Sequence[FloatArray], figure: int) -> FloatArray:
    return replicates[figure]


def _drawn_cars(replicates: Sequence[FloatArray], shift: float, weight: float) -> FloatArray:
    reward, loss = replicates
    return (reward + shift) / (1 + weight * loss)


def _differences(figure: FloatArray, moments: Moments, derivatives: FloatArray) -> Differences:
    difference = figure[:, None] - figure
    deviation, acceleration = moments.of_differences(derivatives[:, None, None])
    return Differences(value=difference, deviation=deviation, acceleration=acceleration, scale=np.ones_like(difference))


def _car_differences(
    reward: FloatArray, loss: FloatArray, beta: float, moments: Moments, carried: float
) -> Differences:
    """Two CARs are equal where `r - c * (1 + beta * L)` is, with c the CAR of both together.

    That is linear in the means and treats both alike. The difference of the CARs themselves is not: their slope is
    lower where the loss is higher, so that one huge loss would look surer than it is.
    """
    weight = 1 + beta * loss
    pooled = np.add.outer(reward, reward) / np.add.outer(weight, weight)
    difference = (reward[:, None] - reward) - pooled * beta * (loss[:, None] - loss)
    slopes = np.stack([1 - beta * pooled * carried, -beta * pooled])
    deviation, acceleration = moments.of_differences(np.nan_to_num(slopes))
    # r_i - c w_i - (r_j - c w_j) = (r_i / w_i - r_j / w_j) * 2 w_i w_j / (w_i + w_j)
    scale = 2 * np.multiply.outer(weight, weight) / np.add.outer(weight, weight)
    return Differences(value=difference, deviation=deviation, acceleration=acceleration, scale=scale)
