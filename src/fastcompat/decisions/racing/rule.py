"""The rule of a race: figures of so many prompts, and what former looks decided -> who is out, whether it is over.

At a look every pair of generators that is still open is compared exactly as `rank` compares them, only that the
interval of a difference is one that may be looked at again and again (`ranking.looks`). What is told apart leaves its
share of the error to the pairs that are still open: Holm 1979, at a single look; sequentially, Bartroff and Song 2014,
"Sequential tests of multiple hypotheses controlling type I and II familywise error rates". The last look is the whole
corpus, at the level of an ordinary ranking.

Dimension key: N responses, G generators that are still in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.racing.known_rewards import KnownRewards, contest_with
from fastcompat.decisions.ranking.clustered_means import ClusteredMeans, Responses
from fastcompat.decisions.ranking.counted import coded
from fastcompat.decisions.ranking.estimates import RankingSettings, estimates_of, values_of
from fastcompat.decisions.ranking.intervals import FALSE_DIFFERENCES, PLAIN_TAIL, Estimate, interval
from fastcompat.decisions.ranking.looks import FALSE_ON_THE_WAY, repeated_tail
from fastcompat.decisions.ranking.ranking import MIN_PROMPTS, Figure
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA, checked_betas, finite, negative_reward
from fastcompat.rows import BoolArray, IntArray

Until: TypeAlias = Literal["winner", "ranking", "precision"]

# Figures so close, relatively, count as equal, unless it is asked for otherwise.
MARGIN = 0.01
# Digits of what is written of a look: the last ones hang on how sums are rounded.
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """What a race asks. UsageError for what is out of range.

    until: "winner": a generator that another one is surely better than leaves. "ranking": one leaves when it is surely
    apart from, or equal to, every other one. "precision": one leaves when its ordinary 95% interval reaches no further
    than `precision` of its figure. margin: relative; generators surely within it count as equal. figure: what is
    compared; None: CAR where there are losses and rewards, else what there is.
    """

    until: Until = "winner"
    margin: float = MARGIN
    precision: float | None = None
    figure: Figure | None = None
    beta: float = BETA
    average: Literal["response", "token"] = "response"
    reward_shift: float = 0.0

    def __post_init__(self) -> None:
        if self.until not in ("winner", "ranking", "precision"):
            raise UsageError(f"until must be 'winner', 'ranking' or 'precision', got {self.until!r}")
        if (self.until == "precision") != (self.precision is not None):
            raise UsageError(
                "precision goes with until='precision': say to within what share, 0.005 for half a per cent"
            )
        if self.precision is not None and not 0 < finite(self.precision, "precision") < 1:
            raise UsageError(f"precision must lie between 0 and 1, got {self.precision:g}")
        if not 0 <= finite(self.margin, "margin") < 1:
            raise UsageError(f"margin must be at least 0 and below 1, got {self.margin:g}")
        checked_betas(self.beta)
        _ = self.ranking

    @property
    def ranking(self) -> RankingSettings:
        """The same question, put to `rank`."""
        return RankingSettings(
            betas=(self.beta,),
            average=self.average,
            reward_shift=self.reward_shift,
            leave_out="response",
            sort_by=self.figure,
            draws=1,
            seed=0,
        )


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One generator at a look: its figure with a 95% interval that may be looked at again and again.

    lead: by which share of the leader's figure it is better than the leader, which it hardly is, with such an interval;
    None of what is not known yet.
    """

    generator: str
    n_prompts: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    lead: float | None = None
    lead_low: float | None = None
    lead_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look found.

    number: from 1 to n_looks. n_prompts: of the corpus's prompts, in their order, the first so many. n_responses: those
    that it rests on. standings: of the generators still in, the best first. claims: (better, worse), new and for good.
    equal: pairs within the margin. out: who leaves -> why. over: "" while the race goes on, else how it ended: "winner"
    (one is left), "margin" (all that are left are within it), "ranking", "precision", or "end" (of the corpus).
    """

    number: int
    n_looks: int
    n_prompts: int
    n_responses: int
    standings: tuple[Standing, ...]
    claims: tuple[tuple[str, str], ...] = ()
    equal: tuple[tuple[str, str], ...] = ()
    out: Mapping[str, str] = field(default_factory=dict)
    over: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Look:
        """Raises KeyError or TypeError for what `to_json` did not write."""
        pairs = {name: tuple((str(a), str(b)) for a, b in value[name]) for name in ("claims", "equal")}
        standings = tuple(Standing(**standing) for standing in value["standings"])
        return cls(**{**value, **pairs, "standings": standings})

    @property
    def leader(self) -> str | None:
        """Who has the best figure."""
        return next((standing.generator for standing in self.standings if standing.value is not None), None)


@dataclass(frozen=True)
class History:
    """The looks of a race so far, in order, among `names`; `before`: who was out before it began -> why."""

    names: tuple[str, ...]
    looks: tuple[Look, ...] = ()
    before: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def out(self) -> dict[str, str]:
        """Who has left -> why."""
        return dict(self.before) | {name: why for look in self.looks for name, why in look.out.items()}

    @property
    def still_in(self) -> list[str]:
        return [name for name in self.names if name not in self.out]

    @cached_property
    def settled(self) -> set[tuple[str, str]]:
        """Pairs, both ways, of which nothing more is asked."""
        told = [pair for look in self.looks for pair in (*look.claims, *look.equal)]
        return {*told, *((b, a) for a, b in told)}

    @property
    def over(self) -> str:
        """How the race ended, "" while it goes on."""
        return self.looks[-1].over if self.looks else ""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What a look compares: names [G], their figures, and of how many prompts; known: [G] of whom that is enough."""

    names: Sequence[str]
    estimate: Estimate
    known: BoolArray
    n_prompts: IntArray

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        estimates: Mapping[str | float, Estimate],
        n_prompts: IntArray,
        settings: RaceSettings,
        shares: Sequence[float] = (),
    ) -> Contest:
        """estimates: what `estimates_of` gave; UsageError where a mean reward has no CAR, and surely not by chance, at
        any of the looks of which these are the `shares`."""
        estimate = estimates[settings.beta if settings.figure == "car" else str(settings.figure)]
        enough = n_prompts >= MIN_PROMPTS
        if settings.figure == "car":
            tail = repeated_tail(FALSE_ON_THE_WAY / len(names), list(shares))
            _refuse_negative(estimates["reward"], names, enough, settings.reward_shift, tail)
        return cls(names=names, estimate=estimate, known=enough & np.isfinite(estimate.value), n_prompts=n_prompts)

    @property
    def order(self) -> list[int]:
        """Those that are known, the best first."""
        return [int(g) for g in self.estimate.order() if self.known[g]]

    def surely_better(self, tail: float) -> BoolArray:
        """[G, G] whether the row's is better than the column's."""
        both = self.known[:, None] & self.known
        better: BoolArray = both & (self.estimate.differences.value > self.estimate.reach(tail))
        return better

    def hardly_worse(self, tail: float, margin: float) -> BoolArray:
        """[G, G] whether the row's is surely worse than the column's by no more than the margin."""
        allowed = margin * np.abs(self.estimate.value)[:, None] * self.estimate.differences.scale
        both = self.known[:, None] & self.known
        own = self.estimate.differences
        near: BoolArray = both & (own.value + allowed > self.estimate.reach(tail))
        # Whose figures never differ are equal, be they zero, of which a share is nothing.
        near |= both & (own.value == 0) & (own.deviation == 0)
        return near


def take_look(
    rows: pa.Table,
    settings: RaceSettings,
    history: History,
    shares: Sequence[float],
    *,
    n_prompts: int,
    rewards: KnownRewards | None = None,
) -> Look:
    """The next look, a function of nothing but its arguments.

    rows: prompt_id, generator, and the columns that the figure needs (loss, reward; nll_sum, n_tokens), of responses
    that carry all figures, to the first `n_prompts` prompts of the corpus; those of generators that have left count for
    nothing. shares: all `planned_looks`. rewards: where the corpus has rewards of its own, of all its prompts.
    """
    names = history.still_in
    rows = rows.filter(pc.is_in(rows["generator"], value_set=pa.array(names, pa.string())))
    group = pc.index_in(rows["generator"], value_set=pa.array(names, pa.string())).to_numpy().astype(np.int64)
    _, prompt = coded(rows["prompt_id"])
    if rewards is not None:
        means, estimates = contest_with(rewards, rows, prompt, group, names, settings.ranking)
    else:
        figures = ["reward", "loss"] if settings.figure == "car" else [str(settings.figure)]
        values, units = values_of(rows, figures, settings.average)
        means = ClusteredMeans([Responses.of(prompt, group, values)], len(names))
        estimates = estimates_of(means, means.moments(), units, settings.ranking)
    contest = Contest.of(names, estimates, means.n_prompts, settings, shares)
    return judge(contest, settings, history, shares, n_prompts=n_prompts, n_responses=rows.num_rows)


def judge(
    contest: Contest,
    settings: RaceSettings,
    history: History,
    shares: Sequence[float],
    *,
    n_prompts: int,
    n_responses: int,
) -> Look:
    """The next look, of the figures of those that are still in."""
    assert not history.over
    assert list(contest.names) == history.still_in
    number, every_look = len(history.looks) + 1, list(shares)
    at_the_end = number == len(shares)

    def tail(n_pairs: int) -> float:
        if at_the_end:
            return FALSE_DIFFERENCES / 2 / n_pairs
        return repeated_tail(FALSE_ON_THE_WAY / 2 / n_pairs, every_look)

    rule = {"winner": _until_winner, "ranking": _until_ranking, "precision": _until_precision}[settings.until]
    verdict = rule(contest, settings, history, tail, f"after {n_prompts:,} prompts")
    return Look(
        number=number,
        n_looks=len(shares),
        n_prompts=n_prompts,
        n_responses=n_responses,
        standings=_standings(contest, PLAIN_TAIL if at_the_end else repeated_tail(PLAIN_TAIL, every_look)),
        claims=tuple(sorted(verdict.claims)),
        equal=tuple(sorted(verdict.equal)),
        out=verdict.out,
        over=verdict.over or ("end" if at_the_end else ""),
    )


@dataclass(kw_only=True)
class _Verdict:
    claims: set[tuple[str, str]] = field(default_factory=set)
    equal: set[tuple[str, str]] = field(default_factory=set)
    out: dict[str, str] = field(default_factory=dict)
    over: str = ""


def _refuse_negative(reward: Estimate, names: Sequence[str], known: BoolArray, shift: float, tail: float) -> None:
    """At an early look a mean may be negative by chance, and is then not known yet; what surely is has no CAR."""
    means, _, high = reward.figures(known, tail=tail)
    if (high + shift < 0).any():
        lowest = int(np.nanargmin(np.where(high + shift < 0, means, np.nan)))
        raise UsageError(negative_reward(f"the mean reward of {names[lowest]},", float(means[lowest]), shift))


def _until_winner(contest: Contest, settings: RaceSettings, history: History, tail: Any, when: str) -> _Verdict:
    verdict, names = _Verdict(), contest.names
    inside = np.ones(len(names), bool)
    while True:
        n_pairs = int(inside.sum()) * int(inside.sum() - 1) // 2
        if not n_pairs:
            break
        own_tail = tail(n_pairs)
        sure = contest.surely_better(own_tail) & inside[:, None] & inside
        losers = np.flatnonzero(sure.any(axis=0)).tolist()
        if not losers:
            break
        for loser in losers:
            better = [g for g in contest.order if sure[g, loser]]
            verdict.claims |= {(names[g], names[loser]) for g in better}
            verdict.out[names[loser]] = f"out of the race {when}: below {names[better[0]]}"
        inside[losers] = False
    if inside.sum() == 1:
        verdict.over = "winner"
    elif contest.known[inside].all():
        leader = next(g for g in contest.order if inside[g])
        others = inside.copy()
        others[leader] = False
        if settings.margin and contest.hardly_worse(own_tail, settings.margin)[leader, others].all():
            verdict.equal = {(names[leader], names[g]) for g in np.flatnonzero(others).tolist()}
            verdict.over = "margin"
    return verdict


def _until_ranking(contest: Contest, settings: RaceSettings, history: History, tail: Any, when: str) -> _Verdict:
    verdict, names = _Verdict(), contest.names
    everybody = len(history.names)
    # Of those that are still in, what is settled between them; what is settled with others is what let these go.
    is_open = np.array([[a != b and (a, b) not in history.settled for b in names] for a in names], bool)
    is_open = is_open.reshape(len(names), len(names))
    while is_open.any():
        own_tail = tail(int(is_open.sum()) // 2)
        sure = contest.surely_better(own_tail) & is_open
        near = contest.hardly_worse(own_tail, settings.margin) & is_open if settings.margin else np.zeros_like(is_open)
        equal = near & near.T & ~sure & ~sure.T
        if not (sure.any() or equal.any()):
            break
        verdict.claims |= {(names[i], names[j]) for i, j in np.argwhere(sure).tolist()}
        verdict.equal |= {(names[i], names[j]) for i, j in np.argwhere(np.triu(equal)).tolist()}
        is_open &= ~(sure | sure.T | equal)
    for g in np.flatnonzero(~is_open.any(axis=1)).tolist():
        verdict.out[names[g]] = f"out of the race {when}: its place among {everybody} is settled"
    verdict.over = "" if is_open.any() else "ranking"
    return verdict


def _until_precision(contest: Contest, settings: RaceSettings, history: History, tail: Any, when: str) -> _Verdict:
    """A rule that asks only how wide an interval is needs no correction for looking again and again: Chow and Robbins
    1965, "On the asymptotic theory of fixed-width sequential confidence intervals for the mean"."""
    assert settings.precision is not None
    own, verdict = contest.estimate, _Verdict()
    low, high = interval(own.value, own.deviation, own.acceleration, own.freedom)
    widest = np.maximum(high - own.value, own.value - low)
    enough: BoolArray = contest.known & (widest <= settings.precision * np.abs(own.value))
    for g in np.flatnonzero(enough).tolist():
        verdict.out[contest.names[g]] = (
            f"out of the race {when}: known to within {settings.precision:.3g} of its figure"
        )
    verdict.over = "precision" if enough.all() else ""
    return verdict


def _standings(contest: Contest, tail: float) -> tuple[Standing, ...]:
    value, low, high = contest.estimate.figures(contest.known, tail)
    order = contest.order
    lead = lead_low = lead_high = np.full(len(value), np.nan)
    if order:
        best, differences = order[0], contest.estimate.differences
        of_one = differences.scale[:, best] * abs(contest.estimate.value[best])
        with np.errstate(invalid="ignore", divide="ignore"):
            lead = differences.value[:, best] / of_one
            # The interval of the leader's own lead, seen from the other side; sides differ where figures are skewed.
            reach = contest.estimate.reach(tail)
            lead_low, lead_high = lead - reach[:, best] / of_one, lead + reach[best] / of_one
        lead[best] = lead_low[best] = lead_high[best] = 0.0
    figures = {"value": value, "low": low, "high": high, "lead": lead, "lead_low": lead_low, "lead_high": lead_high}
    return tuple(
        Standing(
            generator=contest.names[g],
            n_prompts=int(contest.n_prompts[g]),
            **{name: _rounded(own[g]) for name, own in figures.items() if contest.known[g]},
        )
        for g in [*order, *np.flatnonzero(~contest.known).tolist()]
    )


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
