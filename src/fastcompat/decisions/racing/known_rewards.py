"""Rewards that came with the corpus are known of every prompt before any loss is: they help a race along.

Of a paired difference of CARs most of the noise is usually the rewards', and that part is known for the whole corpus at
once (with it a race on the demo's figures needs a third of the responses: bench/results/racing.json). What else the
rewards tell is of the losses: the loss is split into what goes with the reward, `b * reward`, whose mean is known, and
the rest, whose mean is estimated from the prompts scored so far. That is a control variate, with b from these prompts
(prediction-powered inference with a tuned weight: Angelopoulos et al. 2023, "PPI++", arXiv 2311.01453). When every
prompt is scored, b has no part in it any more.

Dimension key: N responses, G generators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.ranking.clustered_means import ClusteredMeans, Responses
from fastcompat.decisions.ranking.counted import coded
from fastcompat.decisions.ranking.estimates import RankingSettings, estimates_of, values_of
from fastcompat.decisions.ranking.intervals import Estimate
from fastcompat.rows import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownRewards:
    """What is known of all prompts' rewards: mean and number of responses [G], and the sums over prompts of products of
    influences on the means, [G, G] of two generators each: x_g x_h and x_g^2 x_h; in units of `unit`."""

    names: tuple[str, ...]
    unit: float
    means: FloatArray
    counts: FloatArray
    second: FloatArray
    third: FloatArray

    @classmethod
    def of(cls, rows: pa.Table, names: Sequence[str]) -> KnownRewards:
        """rows: prompt_id, generator and reward of every response of the corpus that has one."""
        group = _groups(rows, names)
        _, prompt = coded(rows["prompt_id"])
        values, units = values_of(rows, ["reward"], "response")
        means = ClusteredMeans([Responses.of(prompt, group, values)], len(names))
        moments = means.moments()
        return cls(
            names=tuple(names),
            unit=units["reward"],
            means=means.estimates[0],
            counts=np.bincount(group, minlength=len(names)).astype(np.float64),
            second=moments.second[0, :, 0],
            third=moments.third[0, 0, :, 0],
        )


def contest_with(
    rewards: KnownRewards,
    rows: pa.Table,
    prompt: IntArray,
    group: IntArray,
    names: Sequence[str],
    settings: RankingSettings,
) -> tuple[ClusteredMeans, Mapping[str | float, Estimate]]:
    """The means that a look rests on, and the estimates from them: reward of all prompts, loss of those scored so far.

    rows: [N] scored responses, with reward and loss; prompt, group: [N] codes, the latter of `names` [G].
    """
    ((loss, weights),), units = values_of(rows, ["loss"], "response")
    units = {"reward": rewards.unit} | units
    reward = rows["reward"].to_numpy() / rewards.unit
    carried = _slope(reward, loss, prompt, group, len(names))
    figures = [(reward, weights), (loss - carried * reward, weights)]
    means = ClusteredMeans([Responses.of(prompt, group, figures)], len(names))
    there = np.array([rewards.names.index(name) for name in names], np.int64)
    means.replace_mean(0, rewards.means[there], rewards.counts[there])
    moments = means.moments()
    # Prompts without a loss have no part in the other figure: their influences are all in the rewards' own moments.
    moments.second[0, :, 0] = rewards.second[np.ix_(there, there)]
    moments.third[0, 0, :, 0] = rewards.third[np.ix_(there, there)]
    return means, estimates_of(means, moments, units, settings, carried=carried)


def _groups(rows: pa.Table, names: Sequence[str]) -> IntArray:
    group: IntArray = pc.index_in(rows["generator"], value_set=pa.array(names, pa.string())).to_numpy().astype(np.int64)
    return group


def _slope(reward: FloatArray, loss: FloatArray, prompt: IntArray, group: IntArray, n_groups: int) -> float:
    """By how much the loss grows with the reward, once generators' and prompts' own levels are taken from both: that is
    what is left in a difference of two generators. 0 where rewards do not vary."""
    x, y = (
        _less_means(_less_means(values, group, n_groups), prompt, int(prompt.max(initial=-1)) + 1)
        for values in (reward, loss)
    )
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 0 else 0.0


def _less_means(values: FloatArray, code: IntArray, n_codes: int) -> FloatArray:
    counts = np.maximum(np.bincount(code, minlength=n_codes), 1)
    own: FloatArray = values - (np.bincount(code, values, n_codes) / counts)[code]
    return own
