"""Generators ranked by how compatible their responses are with a base model, with how sure that is. No torch.

Dimension key: P prompts, G generators, B bootstrap draws.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.errors import UsageError
from fastcompat.metrics import clustered_bootstrap_means
from fastcompat.response import SCORED_STATUSES


def rank(
    table: pa.Table,
    *,
    by: str = "generator",
    average: Literal["response", "token"] = "response",
    draws: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """One row per base model and generator, the lowest loss first.

    table: `Run.scores()`. `loss` is the unweighted mean over responses, or over tokens with `average="token"`, in nats;
    `loss_low` and `loss_high` are its 95% percentile interval under a bootstrap of `draws` draws clustered by prompt.
    `n` counts the responses that carry a loss, `n_left_out` those that do not. `rank` is shared by neighbours whose
    difference the bootstrap, paired by prompt, does not tell from zero, at 95% for all pairs together (Bonferroni);
    null without any loss. Fewer than `MIN_PROMPTS` prompts give no interval and separate nobody.

    Raises UsageError for a column whose values cannot be ranked.
    """
    groups = [field.name for field in table.schema if pa.types.is_string(field.type) and field.name not in _NO_GROUPS]
    if by not in groups:
        raise UsageError(f"--by {by}: not a column of groups; there are {', '.join(groups)}")
    if pc.count_distinct(table[by]).as_py() > MAX_GROUPS:
        raise UsageError(f"--by {by}: {pc.count_distinct(table[by]).as_py():,} different values are no groups to rank")
    if average not in ("response", "token"):
        raise UsageError(f"average must be 'response' or 'token', got {average!r}")
    models = pc.unique(table["base_model"]).to_pylist()
    own = [table.filter(pc.equal(table["base_model"], model)) for model in models]
    parts = [_rank_one(rows, model, by, average, draws, seed) for rows, model in zip(own, models, strict=True)]
    return pa.concat_tables(parts) if parts else _SCHEMA.empty_table().rename_columns(_columns(by))


# A bootstrap of a handful of prompts says nothing about the next prompt.
MIN_PROMPTS = 10
# [P, G] sums are dense.
MAX_GROUPS = 1000
_NO_GROUPS = ("base_model", "row_key", "prompt_id", "detail")

_SCHEMA = pa.schema(
    [
        ("base_model", pa.string()),
        ("generator", pa.string()),
        ("rank", pa.int32()),
        ("n", pa.int64()),
        ("n_left_out", pa.int64()),
        ("mean_tokens", pa.float64()),
        ("loss", pa.float64()),
        ("loss_low", pa.float64()),
        ("loss_high", pa.float64()),
    ]
)


def _columns(by: str) -> list[str]:
    return [by if name == "generator" else name for name in _SCHEMA.names]


def _rank_one(table: pa.Table, model: str, by: str, average: str, draws: int, seed: int) -> pa.Table:
    generators = table[by].cast(pa.string()).combine_chunks().dictionary_encode()
    names = generators.dictionary.to_pylist()
    group = generators.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    prompts = table["prompt_id"].combine_chunks().dictionary_encode()
    prompt = prompts.indices.to_numpy(zero_copy_only=False)
    carries = pc.is_in(table["status"], pa.array([str(s) for s in SCORED_STATUSES])).to_numpy(zero_copy_only=False)
    carries &= pc.is_valid(table["loss"]).to_numpy(zero_copy_only=False)
    tokens = table["n_tokens"].to_numpy(zero_copy_only=False).astype(np.float64)
    value = table["loss" if average == "response" else "nll_sum"].to_numpy(zero_copy_only=False)
    weight = np.ones(len(tokens)) if average == "response" else tokens

    shape = (len(prompts.dictionary), len(names))
    cell = (prompt * shape[1] + group)[carries]

    def by_prompt(values: np.ndarray) -> np.ndarray:  # [P, G]
        return np.bincount(cell, weights=values[carries], minlength=shape[0] * shape[1]).reshape(shape)

    numerator, denominator = by_prompt(value), by_prompt(weight)
    n = np.bincount(group[carries], minlength=shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        loss = numerator.sum(0) / denominator.sum(0)
        mean_tokens = np.bincount(group[carries], weights=tokens[carries], minlength=shape[1]) / n
    replicates = clustered_bootstrap_means(numerator, denominator, draws=draws, seed=seed)  # [B, G]
    n_prompts = (denominator > 0).sum(axis=0)
    replicates[:, n_prompts < MIN_PROMPTS] = np.nan
    low, high = _interval(replicates)
    order = np.argsort(np.where(np.isnan(loss), np.inf, loss), kind="stable")
    shared = _shared_ranks(loss[order], replicates[:, order])
    ranks = [None if np.isnan(loss[g]) else shared[k] for k, g in enumerate(order)]
    columns = [
        [model] * shape[1],
        [names[g] for g in order],
        ranks,
        n[order],
        (np.bincount(group, minlength=shape[1]) - n)[order],
        mean_tokens[order],
        loss[order],
        low[order],
        high[order],
    ]
    arrays = [pa.array(values, field.type, from_pandas=True) for values, field in zip(columns, _SCHEMA, strict=True)]
    return pa.table(arrays, names=_columns(by))


def _interval(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile interval of each column; NaN for one without any replicate."""
    out = np.full((2, replicates.shape[1]), np.nan)
    some = ~np.isnan(replicates).all(axis=0)
    if some.any():
        out[:, some] = np.nanpercentile(replicates[:, some], [2.5, 97.5], axis=0)
    return out[0], out[1]


def _shared_ranks(loss: np.ndarray, replicates: np.ndarray) -> list[int]:
    """Ranks from 1 of losses [G] in order; what cannot be told from the first of its group shares the group's rank.

    Every pair might have been compared, so each gets its share of the 5% (Bonferroni); so far out in the tail, the
    paired difference's bootstrap deviation with a normal quantile stands in for percentiles.
    """
    n_groups = len(loss)
    threshold = NormalDist().inv_cdf(1 - 0.05 / max(1, n_groups * (n_groups - 1)))
    ranks: list[int] = []
    first = 0
    for g in range(n_groups):
        difference = replicates[:, g] - replicates[:, first]
        difference = difference[~np.isnan(difference)]
        if len(difference) > 1 and loss[g] - loss[first] > threshold * difference.std(ddof=1):
            first = g
        ranks.append(first + 1)
    return ranks
