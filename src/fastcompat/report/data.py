"""What the page shows, reduced from rows: rankings, histograms, rank correlations. Plain numbers, None for NaN.

Dimension key: N responses, G generators, K metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions import (
    BetaRange,
    Figure,
    Models,
    RankingSettings,
    RunRace,
    Unfinished,
    average_ranks,
    check_groups,
    races_that_count,
    rank_paired,
    sensitivity,
    unfinished_pairs,
)
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA, METRICS, checked_betas, compute, compute_by_group, missing
from fastcompat.report.examples import Examples, find_examples
from fastcompat.report.race import ShownRace
from fastcompat.report.reading import ScorerAccount, account_of_scorers, corpus_of, settings_of_scorers
from fastcompat.rows import FloatArray, IntArray, by_pair, carrying, paired
from fastcompat.store import UNIT, Run, ScorerStore

# Beside the one that decides.
BETAS = (0.0, 1.0, BETA, 10.0)
# Pairs of a base model and a reward model that get a section.
MAX_SECTIONS = 6
# Generators over all sections: each costs about 4 KB, and every section shows at least the first `MIN_GENERATORS`.
MAX_GENERATORS, MIN_GENERATORS = 100, 12
N_BINS = 60
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Responses whose metrics are correlated: beyond, every k-th.
MAX_CORRELATED = 200_000
# Fewer generators than this have no rank correlation to speak of.
MIN_CORRELATED = 4
# They order responses as the loss does.
_SAME_ORDER_AS_LOSS = ("token_loss", "perplexity", "grape")


@dataclass(frozen=True, kw_only=True)
class Options:
    """As of `write_report`."""

    by: str = "generator"
    betas: tuple[float, ...] = BETAS
    beta: float = BETA
    average: Literal["response", "token"] = "response"
    reward_shift: float = 0.0
    leave_out: Literal["response", "prompt"] = "response"
    draws: int = 1000
    seed: int = 0
    examples: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.examples, int) or not 0 <= self.examples <= 50:
            raise UsageError(f"examples must be a whole number from 0 to 50, got {self.examples!r}")
        if not all(isinstance(beta, int | float) and 0 <= beta < math.inf for beta in (*self.betas, self.beta)):
            raise UsageError(f"beta and betas must be numbers of at least 0, got {self.beta!r} and {self.betas!r}")

    @property
    def all_betas(self) -> list[float]:
        """`betas` and `beta`, ascending."""
        return sorted({float(beta) for beta in (*self.betas, self.beta)})

    @property
    def ranking(self) -> RankingSettings:
        """The same, for `rank_paired`."""
        return RankingSettings(
            betas=checked_betas(self.all_betas),
            average=self.average,
            reward_shift=self.reward_shift,
            leave_out=self.leave_out,
            sort_by=None,
            draws=self.draws,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Histograms of one figure of every generator, with the same bins.

    edges: [N_BINS + 1]; what lies outside is counted in the first and the last bin. logarithmic: equal bins of the
    logarithm, with shares of whole numbers. groups, in the ranking's order: name, n, counts [N_BINS], quantiles (of
    `QUANTILES`), mean.
    """

    figure: str
    edges: Sequence[float]
    logarithmic: bool
    groups: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Spearman's rho of metrics: [K, K] of `n` responses or generators, None where it is not defined.

    every: of how many responses one was taken. refused: metrics that these figures do not allow, CAR above all.
    """

    metrics: Sequence[str]
    rho: Sequence[Sequence[float | None]]
    n: int
    every: int = 1
    refused: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One base model with one reward model (None: the run has none).

    sort_by: what decides, car, loss or reward. rankings: beta (None without CAR) -> rows of `ranking.rank`.
    ranges: the winner under every beta. n_generators: of which `rankings` have the first. refused: why there is no CAR.
    unfinished: more may be scored. repeated: some intervals are those of a run that is looked at on its way, and there
    are no bootstrap draws. race: that of these models, however the rest came to be scored.
    """

    base_model: str | None
    reward_model: str | None
    sort_by: Figure
    rankings: Mapping[float | None, Sequence[Mapping[str, Any]]]
    ranges: Sequence[BetaRange]
    n_generators: int
    n_prompts: int
    distributions: Sequence[Distribution]
    of_responses: Agreement | None
    of_generators: Agreement | None
    examples: Sequence[Examples]
    refused: str = ""
    unfinished: bool = False
    repeated: bool = False
    race: ShownRace | None = None

    @property
    def claims(self) -> bool:
        """Whether the ranking's ranks are what a race claimed."""
        return self.race is not None and self.race.answers and self.race.settings.until != "precision"

    def ranking(self, beta: float) -> Sequence[Mapping[str, Any]]:
        """Under `beta` where CAR decides, else the only one."""
        return self.rankings[beta if beta in self.rankings else None]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a page shows. n_pairs: of which `sections` are the first."""

    sections: Sequence[Section]
    n_pairs: int
    accounts: Sequence[ScorerAccount]
    corpus: Mapping[str, Any]
    settings: Sequence[Mapping[str, Any]]


def report_data(run: Run, options: Options) -> ReportData:
    """Everything a report shows of a run. Raises UsageError for a run without scores, RunError for a damaged one."""
    current = run.current_scorers()
    labels = run.labels(current)
    scorers = {labels[store.name]: store for store in current}
    scores = run.scores_by_unit(current)
    if not scores.num_rows:
        run.refuse_unscored()
    rows = paired(scores)
    pairs = list(by_pair(rows))
    shown = pairs[:MAX_SECTIONS]
    # Of several races of a pair, that of the page's own question.
    asked = replace(options.ranking, betas=(float(options.beta),))
    unfinished, races = unfinished_pairs(run, asked), races_that_count(run, asked)
    sections = [
        _section(
            run,
            scorers,
            part,
            models,
            options,
            n_sections=len(shown),
            unfinished=unfinished.get(models),
            race=races.get(models),
        )
        for models, part in shown
    ]
    return ReportData(
        sections=sections,
        n_pairs=len(pairs),
        accounts=account_of_scorers(run, scores, options.by),
        corpus=corpus_of(run),
        settings=settings_of_scorers(scorers),
    )


def _section(
    run: Run,
    scorers: Mapping[str, ScorerStore],
    rows: pa.Table,
    models: Models,
    options: Options,
    *,
    n_sections: int,
    unfinished: Unfinished | None,
    race: RunRace | None,
) -> Section:
    if unfinished is not None:
        # The rest of the page is about the rows that the ranking is of.
        counts = unfinished.used(rows, options.by)
        if counts.any():
            rows = rows.filter(pa.array(counts))
        else:
            # Groups across generators, one of which was out from the beginning: there is no prompt that all were asked.
            unfinished = replace(unfinished, race=None)
    figures = [name for name in ("reward", "loss") if rows[name].null_count < rows.num_rows]
    ranking, refused = _ranked(rows, options, {} if unfinished is None else {models: unfinished})
    has_car = len(figures) == 2 and not refused
    groups: list[str | None] = list(dict.fromkeys(ranking[options.by].to_pylist()))
    limit = max(MIN_GENERATORS, MAX_GENERATORS // n_sections)
    rankings: dict[float | None, list[Mapping[str, Any]]] = {}
    for row in ranking.to_pylist():
        rankings.setdefault(row["beta"] if has_car else None, []).append({**row, "generator": row[options.by]})
    if has_car:
        groups = [row["generator"] for row in rankings[float(options.beta)]]
    kept = set(groups[:limit])
    carries = carrying(rows, figures)
    used = rows if pc.all(carries).as_py() else rows.filter(carries)
    own = rankings[float(options.beta) if has_car else None]
    # [N] each used row's place in the ranking.
    group = pc.index_in(used[options.by], pa.array(groups, pa.string())).to_numpy().astype(np.int64)
    drawn = [*figures, "n_tokens"] if used["n_tokens"].null_count < used.num_rows else figures
    return Section(
        base_model=models[0],
        reward_model=models[1],
        sort_by="car" if has_car else "loss" if "loss" in figures or not figures else "reward",
        rankings={beta: [row for row in own if row["generator"] in kept] for beta, own in rankings.items()},
        ranges=next(iter(sensitivity(ranking).values()), []) if has_car else [],
        n_generators=len(groups),
        n_prompts=pc.count_distinct(used["prompt_id"]).as_py(),
        distributions=[_distribution(name, used[name], group, groups[:limit]) for name in drawn]
        if used.num_rows
        else [],
        of_responses=_agreement_of_responses(used, options),
        of_generators=_agreement_of_generators(used, group, len(groups), options),
        examples=find_examples(
            run,
            scorers.get(models[0] or ""),
            used,
            by=options.by,
            beta=options.beta if has_car else None,
            reward_shift=options.reward_shift,
            n_examples=options.examples,
            n_sections=n_sections,
        ),
        refused=refused,
        unfinished=unfinished is not None,
        repeated="repeated" in ranking["interval"].to_pylist(),
        race=None if race is None else ShownRace.of(race, own, stopped=unfinished is not None),
    )


def _ranked(rows: pa.Table, options: Options, unfinished: Mapping[Models, Unfinished]) -> tuple[pa.Table, str]:
    """The ranking under every beta, or by loss where CAR is refused, with why it is."""
    rows, settings = rows.drop_columns(UNIT), options.ranking  # nobody ranks by that
    check_groups(rows, options.by)
    try:
        return rank_paired(rows, options.by, settings, unfinished), ""
    except UsageError as error:
        # A mean reward is negative; whatever else it may be is raised again here.
        settings = replace(settings, betas=(float(options.beta),), sort_by="loss")
        return rank_paired(rows, options.by, settings, unfinished), str(error)


def _distribution(figure: str, column: pa.ChunkedArray, group: IntArray, names: Sequence[str | None]) -> Distribution:
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    finite = np.isfinite(values)
    values, group = values[finite], group[finite]
    low, high = (float(edge) for edge in np.quantile(values, [0.001, 0.999]))
    logarithmic = figure == "n_tokens"
    bins = _of_lengths if logarithmic else _of_figures
    shown = group < len(names)
    edges, counts = bins(np.clip(values[shown], low, high), group[shown], len(names), low, high)
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(len(names) + 1))
    groups = []
    for g, name in enumerate(names):
        mine = values[order[ends[g] : ends[g + 1]]]
        if len(mine):
            quantiles = [_rounded(value) for value in np.quantile(mine, QUANTILES)]
            groups.append(
                {
                    "name": name,
                    "n": len(mine),
                    "counts": counts[g].tolist(),
                    "quantiles": quantiles,
                    "mean": _rounded(mine.mean()),
                }
            )
    return Distribution(figure=figure, edges=[_rounded(edge) for edge in edges], logarithmic=logarithmic, groups=groups)


def _of_figures(
    values: FloatArray, group: IntArray, n_groups: int, low: float, high: float
) -> tuple[FloatArray, FloatArray]:
    """Edges and [G, N_BINS] counts of values between low and high, in equal bins."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, N_BINS + 1)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, N_BINS - 1)
    counts = np.bincount(group * N_BINS + place, minlength=n_groups * N_BINS)
    return edges, counts.reshape(n_groups, N_BINS).astype(np.float64)


def _of_lengths(
    values: FloatArray, group: IntArray, n_groups: int, low: float, high: float
) -> tuple[FloatArray, FloatArray]:
    """The same of whole numbers in equal bins of the logarithm, which may be narrower than 1.

    So each number is spread from half below it to half above, and shared out among the bins that it meets.
    """
    first, last = max(1, math.floor(low)), max(1, math.ceil(high))
    edges = np.geomspace(first - 0.5, last + 0.5, N_BINS + 1)
    halves = np.arange(first, last + 2) - 0.5
    length = np.clip(np.rint(values), first, last).astype(np.int64) - first
    width = last - first + 1
    each = np.bincount(group * width + length, minlength=n_groups * width).reshape(n_groups, width)
    below = np.concatenate([np.zeros((n_groups, 1)), each.cumsum(axis=1)], axis=1)
    shared = [np.diff(np.interp(edges, halves, own)) for own in below]
    return edges, np.round(shared, 2)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _metric_names(rows: pa.Table) -> list[str]:
    """Metrics of whole responses that the rows have, without those that order responses as the loss does."""
    return [
        name
        for name, metric in METRICS.items()
        if not metric.per_token and name not in _SAME_ORDER_AS_LOSS and missing(name, rows) is None
    ]


def _settings(name: str, options: Options) -> dict[str, float]:
    known = {"beta": options.beta, "reward_shift": options.reward_shift}
    return {setting: value for setting, value in known.items() if setting in METRICS[name].settings}


def _agreement_of_responses(rows: pa.Table, options: Options) -> Agreement | None:
    every = -(-rows.num_rows // MAX_CORRELATED) if rows.num_rows else 1
    sample = rows.take(pa.array(np.arange(0, rows.num_rows, every))) if every > 1 else rows

    def values(name: str) -> FloatArray:
        return compute(name, sample, **_settings(name, options))

    return _agreement(values, _metric_names(sample), every=every, unless_fewer=30)


def _agreement_of_generators(rows: pa.Table, group: IntArray, n_groups: int, options: Options) -> Agreement | None:
    def values(name: str) -> FloatArray:
        return compute_by_group(name, rows, group, n_groups, **_settings(name, options))

    return _agreement(values, _metric_names(rows), every=1, unless_fewer=MIN_CORRELATED)


def _agreement(
    compute_one: Callable[[str], FloatArray], names: Sequence[str], *, every: int, unless_fewer: int
) -> Agreement | None:
    """Of rows that have every metric; a metric that most rows lack is left out, as is one that never varies."""
    kept, refused = {}, []
    for name in names:
        # CAR of single responses is refused where one reward is negative.
        try:
            values = compute_one(name)
        except UsageError:
            refused.append(name)
        else:
            if len(values) and np.isfinite(values).mean() > 0.5:
                kept[name] = values
    if len(kept) < 2:
        return None
    whole = np.isfinite(np.stack(list(kept.values()))).all(axis=0)
    ranks = {name: average_ranks(own[whole]) for name, own in kept.items()}
    varying = {name: own for name, own in ranks.items() if whole.any() and own.min() < own.max()}
    n = int(whole.sum())
    if len(varying) < 2 or n < unless_fewer:
        return None
    rho = np.atleast_2d(np.corrcoef(np.stack(list(varying.values()))))
    rounded = [[round(float(value), 3) + 0.0 for value in row] for row in rho]
    return Agreement(metrics=list(varying), rho=rounded, n=n, every=every, refused=refused)
