"""Generators ranked by CAR, reward or loss, with how sure that is. No torch.

Dimension key: N responses, G generators, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastcompat.bootstrap import (
    BoolArray,
    ClusteredMeans,
    Estimate,
    FloatArray,
    IntArray,
    Moments,
)
from fastcompat.errors import UsageError
from fastcompat.pairing import as_table, paired, rows_at
from fastcompat.response import SCORED_STATUSES
from fastcompat.response_metrics import car
from fastcompat.store import Run

# A handful of prompts says nothing about the next prompt.
MIN_PROMPTS = 10
# Every pair of generators is compared.
MAX_GROUPS = 1000
_NO_GROUPS = ("base_model", "reward_model", "row_key", "prompt_id", "detail")
_READ = ("row_key", "prompt_id", "base_model", "reward_model", "n_tokens", "nll_sum", "loss", "reward", "status")

Figure = Literal["car", "loss", "reward"]

_SCHEMA = pa.schema(
    [
        ("base_model", pa.string()),
        ("reward_model", pa.string()),
        ("beta", pa.float64()),
        ("generator", pa.string()),
        ("rank", pa.int32()),
        ("n", pa.int64()),
        ("n_left_out", pa.int64()),
        ("mean_tokens", pa.float64()),
        *((name + end, pa.float64()) for name in ("reward", "loss", "car") for end in ("", "_low", "_high")),
        ("p_best", pa.float64()),
    ]
)


def rank(
    table: Any,
    *,
    by: str = "generator",
    beta: float | Sequence[float] = 3.0,
    average: Literal["response", "token"] = "response",
    reward_shift: float = 0.0,
    leave_out: Literal["response", "prompt"] = "response",
    sort_by: Figure | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """One row per base model, reward model, beta and generator, the best of each first.

    table: a `Run`, or `Run.scores()`, or any frame that `pairing.paired` takes. Columns: base_model, reward_model, beta
    (null without CAR), generator (or whatever `by` names), rank, n, n_left_out, mean_tokens, and of reward, loss and car each
    with `_low` and `_high`, p_best.

    `reward` and `loss` (nats) are means over the same `n` responses: those that carry every figure that the pair of
    models has. `n_left_out` counts the others; with `leave_out="prompt"` all responses to their prompts are left out
    with them. `loss` is averaged over responses, or over tokens with `average="token"`; rewards always over responses.
    `car` is `(reward + reward_shift) / (1 + beta * loss)`.

    Sorted and ranked by `sort_by`: CAR where there are both figures, else the one that there is. `_low` and `_high` are
    95% intervals for new prompts, from the clustered variance by prompt with a correction for skewness
    (`bootstrap.interval`; bench/coverage.py measures what they cover). `rank` is shared by neighbours whose difference,
    paired by prompt, the same interval does not tell from zero, at 96% for all pairs together (Bonferroni). `p_best` is
    the share of `draws` bootstrap draws of prompts in which the generator is the best, equals sharing a draw. Fewer
    than `MIN_PROMPTS` prompts give no interval and no `p_best`, and separate nobody.

    Raises UsageError for a column whose values cannot be ranked, options out of range, and a mean reward that is not
    positive where CAR decides; sorted by another figure, its `car` is null.
    """
    betas = [float(value) for value in np.atleast_1d(beta)]
    _check_options(betas, average, leave_out, sort_by, reward_shift, draws)
    # What nobody reads here, per-token lists above all, is neither read nor joined.
    needed = list(dict.fromkeys((*_READ, by)))
    scores = table.scores(needed) if isinstance(table, Run) else as_table(table)
    _check_groups(scores, by)
    rows = paired(scores.select([name for name in scores.column_names if name in needed]))
    parts = [
        _rank_pair(group, models, by, _Options(betas, average, reward_shift, leave_out, sort_by, draws, seed))
        for models, group in _by_models(rows)
    ]
    names = [by if name == "generator" else name for name in _SCHEMA.names]
    return pa.concat_tables([_SCHEMA.empty_table(), *parts]).rename_columns(names)


class BetaRange(NamedTuple):
    """The generator with the best CAR for every beta from `beta_from` to `beta_to` (infinity at the end)."""

    beta_from: float
    beta_to: float
    generator: str | None


def sensitivity(
    ranking: pa.Table, *, by: str = "generator", reward_shift: float = 0.0
) -> dict[tuple[str | None, str | None], list[BetaRange]]:
    """(base model, reward model) -> the winner under every beta of [0, inf), where it changes exactly.

    ranking: what `rank` returned, for any beta, with the `reward_shift` of that call. Point figures only: the intervals
    of neighbours may overlap on both sides of a change. Pairs without reward or without loss are not there.
    """
    winners = {}
    for models in dict.fromkeys(
        zip(ranking["base_model"].to_pylist(), ranking["reward_model"].to_pylist(), strict=True)
    ):
        rows = {
            row[by]: (row["reward"] + reward_shift, row["loss"])
            for row in ranking.to_pylist()
            if (row["base_model"], row["reward_model"]) == models and None not in (row["reward"], row["loss"])
        }
        if rows:
            winners[models] = _winners(rows, reward_shift)
    return winners


def _winners(figures: dict[str | None, tuple[float, float]], reward_shift: float) -> list[BetaRange]:
    """1 / CAR = 1 / r + beta * L / r is a line in beta: the lower envelope of the generators' lines, from the left."""
    worst = min(figures, key=lambda name: figures[name][0])
    if figures[worst][0] <= 0:
        raise UsageError(_not_positive(worst, figures[worst][0] - reward_shift, reward_shift))
    lines = {name: (1 / reward, loss / reward) for name, (reward, loss) in figures.items()}
    winner = min(lines, key=lambda name: lines[name])
    ranges: list[BetaRange] = []
    begin = 0.0
    while True:
        # Only a flatter line can go below, and the first to do so is the next winner; of several, the flattest.
        height, slope = lines[winner]
        crossings = [
            ((other[0] - height) / (slope - other[1]), other[1], name)
            for name, other in lines.items()
            if other[1] < slope
        ]
        if not crossings:
            return [*ranges, BetaRange(begin, float("inf"), winner)]
        end, _, successor = min(crossings, key=lambda crossing: crossing[:2])
        if end > begin:
            ranges.append(BetaRange(begin, end, winner))
        begin, winner = end, successor


class _Options(NamedTuple):
    betas: list[float]
    average: str
    reward_shift: float
    leave_out: str
    sort_by: str | None
    draws: int
    seed: int


def _check_options(
    betas: list[float], average: str, leave_out: str, sort_by: str | None, reward_shift: float, draws: int
) -> None:
    if not betas or not all(0 <= value < float("inf") for value in betas):
        raise UsageError(f"beta must be one or more numbers of at least 0, got {betas}")
    if not np.isfinite(reward_shift):
        raise UsageError(f"reward_shift must be a number, got {reward_shift}")
    if average not in ("response", "token"):
        raise UsageError(f"average must be 'response' or 'token', got {average!r}")
    if leave_out not in ("response", "prompt"):
        raise UsageError(f"leave_out must be 'response' or 'prompt', got {leave_out!r}")
    if sort_by not in (None, "car", "loss", "reward"):
        raise UsageError(f"sort_by must be 'car', 'loss' or 'reward', got {sort_by!r}")
    if draws < 1:
        raise UsageError(f"draws must be at least 1, got {draws}")


def _check_groups(scores: pa.Table, by: str) -> None:
    groups = [f.name for f in scores.schema if f.name == "generator" or pa.types.is_string(f.type)]
    groups = [name for name in groups if name not in _NO_GROUPS]
    if by not in groups:
        raise UsageError(f"--by {by}: not a column of groups; there are {', '.join(groups) or 'none'}")
    if scores.num_rows and scores[by].null_count == scores.num_rows:
        raise UsageError(f"--by {by}: every row's is null; name a column that says whose a response is")
    count = pc.count_distinct(scores[by], mode="all").as_py()
    if count > MAX_GROUPS:
        raise UsageError(f"--by {by}: {count:,} different values are no groups to rank")


def _by_models(rows: pa.Table) -> list[tuple[tuple[str | None, str | None], pa.Table]]:
    """The rows of each pair of models, in order of first appearance."""
    codes = [rows[name].combine_chunks().dictionary_encode("encode") for name in ("base_model", "reward_model")]
    base, reward = (code.indices.to_numpy(zero_copy_only=False).astype(np.int64) for code in codes)
    pair = base * len(codes[1].dictionary) + reward
    found, first = np.unique(pair, return_index=True)
    parts = []
    for value in found[np.argsort(first)]:
        own = rows_at(rows, pa.array(np.flatnonzero(pair == value)))
        k, m = divmod(int(value), len(codes[1].dictionary))
        parts.append(((codes[0].dictionary[k].as_py(), codes[1].dictionary[m].as_py()), own))
    return parts


def _rank_pair(rows: pa.Table, models: tuple[str | None, str | None], by: str, options: _Options) -> pa.Table:
    """The ranking of one base model and one reward model, under every beta."""
    groups = rows[by].combine_chunks().dictionary_encode("encode")
    names, group = groups.dictionary.to_pylist(), groups.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    figures = [name for name in ("reward", "loss") if rows[name].null_count < rows.num_rows] or ["loss"]
    sort_by = options.sort_by or ("car" if len(figures) == 2 else figures[0])
    if sort_by not in [*figures, *(["car"] if len(figures) == 2 else [])]:
        raise UsageError(
            f"cannot rank by {sort_by}: base model {models[0]} and reward model {models[1]} give only the {figures[0]}"
        )
    prompts = pc.coalesce(rows["prompt_id"], rows["row_key"]).combine_chunks().dictionary_encode()
    prompt = prompts.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    carries = _carries(rows, figures, prompt if options.leave_out == "prompt" else None)
    used = rows.select(["n_tokens", "nll_sum", "loss", "reward"]).filter(pa.array(carries))
    n = np.bincount(group[carries], minlength=len(names))
    ones = np.ones(used.num_rows)
    values = [
        _token_sums(used) if figure == "loss" and options.average == "token" else (used[figure].to_numpy(), ones)
        for figure in figures
    ]
    means = ClusteredMeans(prompt[carries], group[carries], len(names), values)
    known = means.n_prompts >= MIN_PROMPTS
    estimates = _estimates(means, figures, names, sort_by, options)
    of_responses = {
        "generator": np.array(names, dtype=object),
        "n": n,
        "n_left_out": np.bincount(group, minlength=len(names)) - n,
        "mean_tokens": _mean_tokens(used["n_tokens"], group[carries], len(names)),
    }
    parts = []
    for beta in options.betas if len(figures) == 2 else [None]:
        by_name: dict[str, str | float] = {name: name for name in figures} | ({} if beta is None else {"car": beta})
        ranked = estimates[by_name[sort_by]]
        order, ranks = ranked.ranks(known)
        by_generator: dict[str, NDArray[Any]] = of_responses | {"p_best": ranked.p_best(known)}
        for name, key in by_name.items():
            low, high = estimates[key].interval(known)
            by_generator |= {name: estimates[key].value, f"{name}_low": low, f"{name}_high": high}
        columns: dict[str, Any] = {name: values[order] for name, values in by_generator.items()} | {"rank": ranks}
        constants = {"base_model": models[0], "reward_model": models[1], "beta": beta}
        for field in _SCHEMA:
            columns.setdefault(field.name, [constants.get(field.name)] * len(names))
        arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in _SCHEMA]
        parts.append(pa.table(arrays, schema=_SCHEMA))
    return pa.concat_tables(parts)


def _carries(rows: pa.Table, figures: list[str], prompt: IntArray | None) -> BoolArray:
    """[N] which responses carry every figure; given their prompts, which of them belong to a prompt that is whole."""
    scored = pc.is_in(rows["status"], pa.array([str(s) for s in SCORED_STATUSES])).to_numpy(zero_copy_only=False)
    carries: BoolArray = scored.copy()
    for name in figures:
        carries &= rows[name].is_valid().to_numpy()
    if prompt is not None and len(prompt):
        carries &= np.bincount(prompt, ~carries)[prompt] == 0
    return carries


def _token_sums(used: pa.Table) -> tuple[FloatArray, FloatArray]:
    """(NLL sums, tokens) [N]: their summed ratio is the loss averaged over tokens."""
    if used["n_tokens"].null_count or used["nll_sum"].null_count:
        raise UsageError("average='token' needs the columns n_tokens and nll_sum in every scored row")
    return used["nll_sum"].to_numpy(), used["n_tokens"].to_numpy().astype(np.float64)


def _mean_tokens(n_tokens: pa.ChunkedArray, group: IntArray, n_groups: int) -> FloatArray:
    """[G] mean number of tokens of the responses whose number is known."""
    there = n_tokens.is_valid().to_numpy()
    counts = np.bincount(group[there], minlength=n_groups)
    with np.errstate(invalid="ignore"):
        return np.bincount(group[there], n_tokens.drop_null().to_numpy(), n_groups) / counts


def _estimates(
    means: ClusteredMeans, figures: list[str], names: list[str | None], sort_by: str, options: _Options
) -> dict[str | float, Estimate]:
    """The estimates of each figure under its name, and of CAR under its beta where there are both figures."""
    moments = means.moments()
    replicates = means.replicates(options.draws, options.seed)
    estimates: dict[str | float, Estimate] = {}
    for k, name in enumerate(figures):
        sign = -1 if name == "loss" else 1
        unit = np.eye(len(figures))[k]
        deviation, acceleration = moments.of(np.repeat(unit[:, None], means.n_groups, axis=1))
        estimates[name] = Estimate(
            value=means.estimates[k],
            deviation=deviation,
            acceleration=acceleration,
            freedom=means.freedom[k],
            replicates=replicates[k],
            sign=sign,
            apart=partial(_apart, sign * means.estimates[k], moments, sign * unit),
        )
    if len(figures) < 2:
        return estimates
    shift, (reward, loss) = options.reward_shift, means.estimates
    refused = reward + shift <= 0
    if refused.any() and sort_by == "car":
        lowest = int(np.nanargmin(reward))
        raise UsageError(_not_positive(names[lowest], float(reward[lowest]), shift))
    reward = np.where(refused, np.nan, reward)
    for beta in options.betas:
        value = car(reward, loss, beta, reward_shift=shift)
        slopes = np.stack([1 / (1 + beta * loss), -beta * value / (1 + beta * loss)])
        deviation, acceleration = moments.of(np.nan_to_num(slopes))
        estimates[beta] = Estimate(
            value=value,
            deviation=deviation,
            acceleration=acceleration,
            freedom=np.minimum(*means.freedom),
            replicates=(replicates[0] + shift) / (1 + beta * replicates[1]),
            sign=1,
            apart=partial(_car_apart, reward + shift, loss, beta, moments),
        )
    return estimates


def _apart(
    figure: FloatArray, moments: Moments, derivatives: FloatArray, better: int, worse: int
) -> tuple[float, float, float]:
    return float(figure[better] - figure[worse]), *moments.of_difference(derivatives, better, worse)


def _car_apart(
    reward: FloatArray, loss: FloatArray, beta: float, moments: Moments, better: int, worse: int
) -> tuple[float, float, float]:
    """Two CARs are equal where `r - c * (1 + beta * L)` is, with c the CAR of both together.

    That is linear in the means and treats both alike. The difference of the CARs themselves is not: their slope is
    lower where the loss is higher, so that one huge loss would look surer than it is.
    """
    pooled = (reward[better] + reward[worse]) / (2 + beta * (loss[better] + loss[worse]))
    return _apart(reward - pooled * (1 + beta * loss), moments, np.array([1.0, -pooled * beta]), better, worse)


def _not_positive(generator: str | None, reward: float, shift: float) -> str:
    shifted = f" with the shift {shift:g}" if shift else ""
    return (
        f"the mean reward of {generator} is {reward + shift:.4g}{shifted}, not positive: "
        "CAR = r / (1 + beta * L) would then rise with the loss; shift every reward by more than "
        f"{-reward:.4g} (--reward-shift, reward_shift=), or rank by loss or reward"
    )
