"""Generators ranked by CAR, reward or loss, with how sure that is. No torch.

Dimension key: N responses, G generators, B bootstrap draws.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.ranking.counted import MAX_GROUPS, CountedResponses
from fastcompat.decisions.ranking.estimates import RankingSettings, estimates_of
from fastcompat.decisions.ranking.intervals import PLAIN_TAIL, Estimate
from fastcompat.decisions.ranking.looks import repeated_tail
from fastcompat.decisions.ranking.unfinished import Models, Unfinished, unfinished_pairs
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA, checked_betas, negative_reward
from fastcompat.rows import SCORES_SCHEMA, BoolArray, FloatArray, IntArray, as_table, by_pair, only, paired
from fastcompat.store import Run, Snapshot

# A handful of prompts says nothing about the next prompt.
MIN_PROMPTS = 10
_READ = ("row_key", "prompt_id", "base_model", "reward_model", "n_tokens", "nll_sum", "loss", "reward", "status")

Figure = Literal["car", "loss", "reward"]

_SCHEMA = pa.schema(
    [
        ("base_model", pa.string()),
        ("reward_model", pa.string()),
        ("beta", pa.float64()),
        ("reward_shift", pa.float64()),
        ("generator", pa.string()),
        ("rank", pa.int32()),
        ("n", pa.int64()),
        ("n_prompts", pa.int64()),
        ("n_prompts_total", pa.int64()),
        ("n_left_out", pa.int64()),
        ("mean_tokens", pa.float64()),
        *((name + end, pa.float64()) for name in ("reward", "loss", "car") for end in ("", "_low", "_high")),
        ("p_best", pa.float64()),
        ("interval", pa.string()),
        ("stopped_after", pa.int64()),
        ("claim", pa.string()),
    ]
)
# Columns that say nothing of whose a response is: scorers, keys, reasons, counts, and the ranking's own names.
_NO_GROUPS = {"row_key", "prompt_id", "status", "detail", "row_index", "response_index"}
_NO_GROUPS |= {"n_prompt_tokens", "n_tokens", "n_bytes", "greedy_matches", "unconditioned_n_tokens"}
_NO_GROUPS |= {name for name in _SCHEMA.names if name != "generator"}


def rank(
    table: Any,
    *,
    by: str = "generator",
    base_model: str | None = None,
    reward_model: str | None = None,
    beta: float | Sequence[float] = BETA,
    average: Literal["response", "token"] = "response",
    reward_shift: float = 0.0,
    leave_out: Literal["response", "prompt"] = "response",
    sort_by: Figure | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> pa.Table:
    """One row per base model, reward model, beta and generator, the best of each first.

    table: a `Run`, which is read in chunks of whole prompts, in memory that does not grow with it; or `Run.scores()`,
    or any frame that `pairing.paired` takes; rows without a `prompt_id` are prompts of their own. base_model,
    reward_model: only these are ranked; all where none is named. Columns: base_model, reward_model, beta and
    reward_shift (null without CAR), generator (or whatever `by` names), rank, n, n_prompts, n_prompts_total,
    n_left_out, mean_tokens, and of reward, loss and car each with `_low` and `_high`, p_best.

    `reward` and `loss` (nats) are means over the same `n` responses to `n_prompts` prompts: those that carry every
    figure that the pair of models has. `n_prompts_total` are the prompts that any generator has such a response to:
    where one has fewer, it was asked other questions. With `leave_out="prompt"` only prompts count that every generator
    answered and all of whose responses carry the figures (a generator that has no such response at all is not asked
    for). `n_left_out` counts the responses that do not count. `loss` is averaged over responses, or over tokens with
    `average="token"`; rewards always over responses. `car` is `(reward + reward_shift) / (1 + beta * loss)`.

    Sorted and ranked by `sort_by`: CAR where there are both figures, else the one that there is. `_low` and `_high` are
    95% intervals for new prompts, from the clustered variance by prompt with a correction for skewness
    (`intervals.interval`; bench/coverage.py measures what they cover). `rank` is 1 + the number of generators
    that are clearly better: those whose difference from this one, paired by prompt, has such an interval above zero, at
    96% for all pairs together (Holm). So a generator that few data say little of may have a better rank than one
    above it. `p_best` is the share of `draws` bootstrap draws of prompts in which the generator is the best, equals
    sharing a draw. Fewer than `MIN_PROMPTS` prompts give no interval and no `p_best`, and are compared with nobody.

    Of a `Run` that is not finished, or that a race stopped (`fastcompat score --until`), `interval` is "repeated": 95%
    intervals that may be looked at again and again; `p_best` is null (`unfinished`). `rank` then counts what the race
    claimed, or what such intervals tell apart at 99%; `stopped_after` are the prompts after which a generator was
    scored no further, and `claim` says what the race found. Otherwise `interval` is "plain", and both are null.

    The order of the rows changes nothing but the rounding of sums. Raises UsageError for a column whose values cannot
    be ranked, options out of range, a negative loss, no prompt left by `leave_out="prompt"`, and a mean reward that is
    negative where CAR decides; sorted by another figure, its `car` is null.
    """
    options = RankingSettings(
        betas=checked_betas(beta),
        average=average,
        reward_shift=reward_shift,
        leave_out=leave_out,
        sort_by=sort_by,
        draws=draws,
        seed=seed,
    )
    if isinstance(table, Run):
        return _rank_run(table, by, options, base_model=base_model, reward_model=reward_model)
    scores = as_table(table)
    check_groups(scores, by)
    if "prompt_id" not in scores.column_names and scores.num_rows > 1:
        logging.getLogger("fastcompat").warning(
            "no column prompt_id: every row counts as a prompt of its own, so intervals are too narrow where prompts "
            "repeat, and generators are not compared prompt by prompt; add prompt_id"
        )
    scores = only(scores, base_model=base_model, reward_model=reward_model)
    # What nobody reads here, per-token lists above all, is not joined.
    rows = paired(scores.select([name for name in scores.column_names if name in {*_READ, by}]))
    return rank_paired(rows, by, options, {})


def _rank_run(
    run: Run,
    by: str,
    options: RankingSettings,
    *,
    base_model: str | None,
    reward_model: str | None,
) -> pa.Table:
    """Of a run, which is read in chunks of whole prompts: it may be larger than memory."""
    _check_column(SCORES_SCHEMA, by)
    stores = run.current_scorers()
    # Asked before the rows are listed: what is finished in between is ranked as if it was not yet.
    unfinished = unfinished_pairs(run, options, stores)
    sums = ["nll_sum"] if options.average == "token" else []
    snapshot = Snapshot(run, stores, [by, "generator", "n_tokens", "loss", "reward", *sums])
    return _ranked(snapshot.pairs(base_model=base_model, reward_model=reward_model), by, options, unfinished)


def rank_paired(rows: pa.Table, by: str, options: RankingSettings, unfinished: Mapping[Models, Unfinished]) -> pa.Table:
    """`rank` of rows that are paired already; unfinished: what `unfinished_pairs` says of their run."""
    return _ranked(((models, [group]) for models, group in by_pair(rows)), by, options, unfinished)


def _ranked(
    pairs: Iterable[tuple[Models, Iterable[pa.Table]]],
    by: str,
    options: RankingSettings,
    unfinished: Mapping[Models, Unfinished],
) -> pa.Table:
    """pairs: of models, with their rows in chunks of whole prompts that can be gone through again."""
    parts = [_rank_pair(tables, models, by, options, unfinished.get(models)) for models, tables in pairs]
    names = [by if name == "generator" else name for name in _SCHEMA.names]
    return pa.concat_tables([_SCHEMA.empty_table(), *parts]).rename_columns(names)


def group_column(ranking: pa.Table) -> str:
    """The name of the column that `by` named."""
    name: str = ranking.column_names[_SCHEMA.get_field_index("generator")]
    return name


class BetaRange(NamedTuple):
    """The generator with the best CAR for every beta from `beta_from` to `beta_to` (infinity at the end)."""

    beta_from: float
    beta_to: float
    generator: str | None


def sensitivity(
    ranking: pa.Table, *, by: str | None = None, reward_shift: float | None = None
) -> dict[tuple[str | None, str | None], list[BetaRange]]:
    """(base model, reward model) -> the winner under every beta of [0, inf), where it changes exactly.

    ranking: what `rank` returned, for any beta. by, reward_shift: None: as in that call; another shift asks what it
    would change. Point figures only: the intervals of neighbours may overlap on both sides of a change. Pairs of models
    without CAR, be it for want of a figure or because a shifted mean reward is negative, are not there, nor are those
    whose rewards are all 0.
    """
    by = group_column(ranking) if by is None else by
    figures: dict[tuple[str | None, str | None], dict[str | None, tuple[float, float]]] = {}
    for row in ranking.to_pylist():
        if None not in (row["beta"], row["reward"], row["loss"]):
            shift = row["reward_shift"] if reward_shift is None else reward_shift
            own = figures.setdefault((row["base_model"], row["reward_model"]), {})
            own[row[by]] = (row["reward"] + shift, row["loss"])
    # A reward of 0 is a CAR of 0, which any other one beats.
    positive = {models: {name: figure for name, figure in own.items() if figure[0]} for models, own in figures.items()}
    return {models: _winners(own) for models, own in positive.items() if own and min(own.values())[0] > 0}


def _winners(figures: dict[str | None, tuple[float, float]]) -> list[BetaRange]:
    """1 / CAR = 1 / r + beta * L / r is a line in beta: the lower envelope of the generators' lines, from the left."""
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


def check_groups(scores: pa.Table, by: str) -> None:
    """UsageError for a column that makes no groups to rank."""
    _check_column(scores.schema, by)
    if scores.num_rows and scores[by].null_count == scores.num_rows:
        raise UsageError(f"--by {by}: every row's is null; name a column that says whose a response is")
    count = pc.count_distinct(scores[by], mode="all").as_py()
    if count > MAX_GROUPS:
        raise UsageError(f"--by {by}: {count:,} different values are no groups to rank")


def _check_column(schema: pa.Schema, by: str) -> None:
    groups = [
        field.name
        for field in schema
        if field.name not in _NO_GROUPS
        and (field.name == "generator" or pa.types.is_string(field.type) or pa.types.is_integer(field.type))
    ]
    if by not in groups:
        raise UsageError(f"--by {by}: not a column of groups; there are {', '.join(groups) or 'none'}")


def _rank_pair(
    tables: Iterable[pa.Table], models: Models, by: str, options: RankingSettings, unfinished: Unfinished | None
) -> pa.Table:
    """The ranking of one base model and one reward model, under every beta."""
    counted = CountedResponses(tables, by, options, unfinished)
    names, figures, means = counted.names, counted.figures, counted.means
    sort_by = options.sort_by or ("car" if len(figures) == 2 else figures[0])
    if sort_by not in [*figures, *(["car"] if len(figures) == 2 else [])]:
        raise UsageError(
            f"cannot rank by {sort_by}: base model {models[0]} and reward model {models[1]} give only the {figures[0]}"
        )
    counted.check()
    known = means.n_prompts >= MIN_PROMPTS
    if unfinished is None or unfinished.is_plain(names).all():
        moments, replicates = means.moments_and_replicates(options.draws, options.seed)
    else:
        moments, replicates = means.moments(), []
    estimates = estimates_of(means, moments, counted.units, options, replicates=replicates)
    if sort_by == "car":
        _check_rewards(estimates["reward"], names, options.reward_shift)
    of_responses = {
        "generator": np.array(names, dtype=object),
        "n": counted.n,
        "n_prompts": means.n_prompts,
        "n_left_out": counted.n_asked - counted.n,
        "mean_tokens": counted.mean_tokens,
    }
    n_prompts_total = counted.n_prompts
    parts = []
    for beta in options.betas if len(figures) == 2 else [None]:
        by_name: dict[str, str | float] = {name: name for name in figures} | ({} if beta is None else {"car": beta})
        ranked = estimates[by_name[sort_by]]
        sight = _sight(unfinished, ranked, known, names, by, sort_by, beta, n_prompts_total, options)
        order, ranks = sight.order, ranked.ranks(sight.better)
        by_generator: dict[str, Any] = of_responses | sight.columns
        for name, key in by_name.items():
            columns_of = (name, f"{name}_low", f"{name}_high")
            by_generator |= dict(zip(columns_of, _bounds(estimates[key], known, sight), strict=True))
        columns: dict[str, Any] = {name: values[order] for name, values in by_generator.items()}
        columns["rank"] = [ranks[g] for g in order]
        constants = {
            "base_model": models[0],
            "reward_model": models[1],
            "beta": beta,
            "reward_shift": None if beta is None else options.reward_shift,
            "n_prompts_total": n_prompts_total,
        }
        for field in _SCHEMA:
            columns.setdefault(field.name, [constants.get(field.name)] * len(names))
        arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in _SCHEMA]
        parts.append(pa.table(arrays, schema=_SCHEMA))
    return pa.concat_tables(parts)


@dataclass(frozen=True, kw_only=True)
class _Sight:
    """How surely a group is seen. better: [G, G]; plain: [G] whose ordinary intervals are right; tail: that of the
    others' bounds; columns: what the table says of it."""

    order: IntArray
    better: BoolArray
    plain: BoolArray
    tail: float
    columns: dict[str, Any]


def _sight(
    unfinished: Unfinished | None,
    ranked: Estimate,
    known: BoolArray,
    names: list[str | None],
    by: str,
    sort_by: str,
    beta: float | None,
    n_prompts: int,
    options: RankingSettings,
) -> _Sight:
    if unfinished is None:
        columns = {"p_best": ranked.p_best(known), "interval": np.full(len(names), "plain", dtype=object)}
        everybody = np.ones(len(names), bool)
        return _Sight(
            order=ranked.order(), better=ranked.clearly_better(known), plain=everybody, tail=PLAIN_TAIL, columns=columns
        )
    race = unfinished.race if by == "generator" else None
    claims = race is not None and race.asks(sort_by, beta, options)
    plain = unfinished.is_plain(names)
    columns = {
        "p_best": ranked.p_best(known) if plain.all() else np.full(len(names), np.nan),
        "interval": np.where(plain, "plain", "repeated").astype(object),
        "stopped_after": np.array([unfinished.stopped_after(name) for name in names], dtype=object),
        "claim": np.array([race.claim(name) if race and claims else None for name in names], dtype=object),
    }
    return _Sight(
        order=unfinished.order(ranked, names, claims),
        better=unfinished.better(ranked, known, names, claims, n_prompts),
        plain=plain,
        tail=repeated_tail(PLAIN_TAIL, unfinished.shares(n_prompts)),
        columns=columns,
    )


def _bounds(estimate: Estimate, known: BoolArray, sight: _Sight) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(value, low, high) [G]."""
    value, low, high = estimate.figures(known)
    if sight.plain.all():
        return value, low, high
    _, lowest, highest = estimate.figures(known, sight.tail)
    return value, np.where(sight.plain, low, lowest), np.where(sight.plain, high, highest)


def _check_rewards(reward: Estimate, names: list[str | None], shift: float) -> None:
    means = reward.value * reward.unit
    if (means + shift < 0).any():
        lowest = int(np.nanargmin(means))
        raise UsageError(negative_reward(f"the mean reward of {names[lowest]},", float(means[lowest]), shift))
