"""How often a race claims something false, and how many responses it needs: simulated races.

    python bench/racing.py [--races 1000] [--demo RUN] [--time] [--only errors-equal]

Races go through the project's own rule, look by look; only the figures are drawn. Every generator answers every prompt
once, so what a look needs of the rows are sums over prompts, which are carried from look to look: the first thing done
is to compare such looks with those that `take_look` takes of the rows. Writes bench/results/racing.json after every
cell, and skips the cells that it finds there. RUN: a finished `fastcompat demo`, whose figures are drawn with
replacement.

Beside the rule, of the same figures: `naive` tells a pair apart whenever z exceeds 1.96 at any look, `own_level` asks
at every look what `rank` asks at the end (`FALSE_DIFFERENCES` over all pairs, Holm). One thread is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastcompat.decisions.racing import rule
from fastcompat.decisions.racing.known_rewards import KnownRewards, contest_with
from fastcompat.decisions.racing.rule import Contest, History, Look, RaceSettings, judge, take_look
from fastcompat.decisions.ranking import intervals
from fastcompat.decisions.ranking.clustered_means import ClusteredMeans, Moments, Responses
from fastcompat.decisions.ranking.counted import coded
from fastcompat.decisions.ranking.estimates import estimates_of, values_of
from fastcompat.decisions.ranking.intervals import FALSE_DIFFERENCES
from fastcompat.decisions.ranking.looks import FALSE_ON_THE_WAY, planned_looks, repeated_tail

RESULTS = Path(__file__).parent / "results" / "racing.json"
BETA = 3.0
# Of the best generator, and by how much the mean losses differ.
REWARD, LOSS, LOSSES_DIFFER = 6.0, 1.5, 0.2
# Of a Monte-Carlo share: Wilson's one-sided 95% limit.
Z_LIMIT = 1.6448536
NAIVE = 1.959964
# Cells [prompt, figure, generator] drawn at once: they stay in the cache.
BLOCK_CELLS = 1 << 17

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


# --- worlds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tails:
    """A distribution of figures. reward: mean + prompt's part + own part, sd 1 each; loss: mean x prompt's part x own
    part, log-normal. second_half: whether half of the generators have `unlike` in place of it."""

    about: str
    reward: str
    prompt_sigma: float
    own_sigma: float
    unlike: tuple[str, float] | None = None


TAILS = {
    "light": Tails(about="normal rewards, log losses 0.2 + 0.3", reward="normal", prompt_sigma=0.2, own_sigma=0.3),
    "heavy": Tails(
        about="Student's t rewards with 3 degrees, log losses 0.7 + 0.7: skewness 6",
        reward="student",
        prompt_sigma=0.7,
        own_sigma=0.7,
    ),
    "skewed": Tails(
        about="rewards skewed to the left (log-normal 0.9), log losses 0.5 + 0.5",
        reward="skewed",
        prompt_sigma=0.5,
        own_sigma=0.5,
    ),
    "unequal": Tails(
        about="half of the generators as light, half with skewed rewards and log losses 0.2 + 0.95",
        reward="normal",
        prompt_sigma=0.2,
        own_sigma=0.3,
        unlike=("skewed", 0.95),
    ),
}
_SKEWED_MEAN = math.exp(0.9**2 / 2)
_SKEWED_DEVIATION = _SKEWED_MEAN * math.sqrt(math.expm1(0.9**2))


def standard(kind: str, draw: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Mean 0, deviation 1."""
    if kind == "student":
        return draw.standard_t(3, size=shape) / math.sqrt(3)
    normal = draw.standard_normal(shape)
    return normal if kind == "normal" else (_SKEWED_MEAN - np.exp(0.9 * normal)) / _SKEWED_DEVIATION


def factor(sigma: float, draw: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Log-normal with mean 1."""
    return np.exp(sigma * draw.standard_normal(shape) - sigma**2 / 2)


class World:
    """Generators with the given CARs, relative to the best, and the tails of a name."""

    def __init__(self, tails: str, cars: list[float]) -> None:
        self.tails = TAILS[tails]
        self.cars = np.array(cars)
        n = len(cars)
        spread = np.linspace(1 - LOSSES_DIFFER / 2, 1 + LOSSES_DIFFER / 2, n)
        losses = LOSS * np.random.default_rng(n).permutation(spread)
        rewards = self.cars * REWARD / (1 + BETA * LOSS) * (1 + BETA * losses)
        self.centre = np.stack([rewards, losses])
        self.unlike: BoolArray = np.arange(n) % 2 == 1
        self.false: BoolArray = self.cars[:, None] <= self.cars

    def figures(self, draw: np.random.Generator, n_prompts: int, there: list[int]) -> Iterator[FloatArray]:
        """[prompts, 2, generators that are there] of so many prompts, block by block, less their means."""
        step = max(1, BLOCK_CELLS // (2 * len(there)))
        for begin in range(0, n_prompts, step):
            yield self._block(draw, min(step, n_prompts - begin), there)

    def _block(self, draw: np.random.Generator, m: int, there: list[int]) -> FloatArray:
        tails, shape = self.tails, (m, len(there))
        x = np.empty((m, 2, len(there)))
        if tails.unlike is None:
            reward, loss = standard(tails.reward, draw, shape), factor(tails.own_sigma, draw, shape)
        else:
            reward, loss = np.empty(shape), np.empty(shape)
            for unlike, kind, sigma in ((False, tails.reward, tails.own_sigma), (True, *tails.unlike)):
                columns = self.unlike[there] == unlike
                part = (m, int(columns.sum()))
                reward[:, columns], loss[:, columns] = standard(kind, draw, part), factor(sigma, draw, part)
        x[:, 0] = reward + standard(tails.reward, draw, (m, 1))
        x[:, 1] = self.centre[1, there] * (loss * factor(tails.prompt_sigma, draw, (m, 1)) - 1)
        return x


# --- looks from sums --------------------------------------------------------------------------------------------------


class Sums:
    """Of figures [prompts, 2, G] less a centre: everything a look wants of them, to which further prompts are added."""

    def __init__(self, centre: FloatArray) -> None:
        n_groups = centre.shape[1]
        self.centre, self.n = centre, 0
        self.first = np.zeros((2, n_groups))
        self.second = np.zeros((2, n_groups, 2, n_groups))
        self.third = np.zeros((3, n_groups, 2, n_groups))  # of reward^2, reward x loss, loss^2

    def add(self, x: FloatArray, there: list[int]) -> None:
        m, where = len(x), np.arange(self.centre.shape[1])[there]
        flat = x.reshape(m, -1)
        squares = np.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], axis=1).reshape(m, -1)
        g = len(there)
        self.n += m
        self.first[:, where] += flat.sum(axis=0).reshape(2, g)
        both = np.ix_(range(2), where, range(2), where)
        self.second[both] += (flat.T @ flat).reshape(2, g, 2, g)
        self.third[np.ix_(range(3), where, range(2), where)] += (squares.T @ flat).reshape(3, g, 2, g)

    def moments(self, there: list[int]) -> tuple[FloatArray, Moments]:
        """Means [2, G], and the moments that `ClusteredMeans.moments` finds of one response a prompt and generator."""
        n, where = self.n, np.arange(self.centre.shape[1])[there]
        d = self.first[:, where] / n
        second = self.second[np.ix_(range(2), where, range(2), where)]
        third = self.third[np.ix_(range(3), where, range(2), where)]
        kl = np.arange(2)[:, None] + np.arange(2)
        own = second.diagonal(axis1=1, axis2=3)  # [2, 2, G]
        centred = (
            third[kl]
            - np.einsum("kg,lgmh->klgmh", d, second)
            - np.einsum("lg,kgmh->klgmh", d, second)
            - np.einsum("klg,mh->klgmh", own, d)
            + 2 * n * np.einsum("kg,lg,mh->klgmh", d, d, d)
        )
        around = second - n * np.multiply.outer(d, d)
        return self.centre[:, where] + d, Moments(around / (n - 1) ** 2, centred / (n - 1) ** 3)


def largest_z(sums: Sums) -> float:
    """Of all pairs' differences in CAR, in their standard errors. No rule tells apart what has less than its normal
    quantile, because no interval is narrower: such looks need not be taken in full."""
    n, d = sums.n, sums.first / sums.n
    reward, loss = sums.centre + d
    around = (sums.second - n * np.multiply.outer(d, d)) / (n - 1) ** 2
    weight = 1 + BETA * loss
    slope = BETA * np.add.outer(reward, reward) / np.add.outer(weight, weight)

    def between(k: int, m: int) -> FloatArray:
        cross = around[k, :, m]
        own = cross.diagonal()
        return own[:, None] + own - cross - cross.T

    variance = between(0, 0) - 2 * slope * between(0, 1) + slope**2 * between(1, 1)
    difference = reward[:, None] - reward - slope * (loss[:, None] - loss)
    pairs = np.triu_indices(len(reward), 1)
    return float(np.sqrt((difference[pairs] ** 2 / variance[pairs]).max()))


def contest(sums: Sums, names: list[str], there: list[int], settings: RaceSettings) -> Contest:
    """Of generators that are there, as `take_look` would make it."""
    means, moments = sums.moments(there)
    freedom = np.full(len(there), max(sums.n - 1.0, 1.0))
    stand_in: Any = SimpleNamespace(estimates=list(means), freedom=[freedom, freedom], n_groups=len(there))
    estimates = estimates_of(stand_in, moments, {"reward": 1.0, "loss": 1.0}, settings.ranking)
    return Contest.of([names[g] for g in there], estimates, np.full(len(there), sums.n), settings)


def rows_of(figures: FloatArray, names: list[str], first: int = 0) -> pa.Table:
    """[prompts, 2, G] as a table of scores."""
    m, _, g = figures.shape
    prompts = pa.array([f"p{first + k:07}" for k in range(m)])
    return pa.table(
        {
            "prompt_id": prompts.take(pa.array(np.repeat(np.arange(m), g))),
            "generator": pa.array(names).take(pa.array(np.tile(np.arange(g), m))),
            "reward": figures[:, 0].ravel(),
            "loss": figures[:, 1].ravel(),
        }
    )


def names_of(n: int) -> list[str]:
    return [f"g{k:02}" for k in range(n)]


def make_haste() -> None:
    """Compute once what every race asks again, quantiles; and not at all the standings, which are only shown."""
    quantile, found = intervals.student_t_quantile, {}

    def remembered(probability: float, freedom: FloatArray) -> FloatArray:
        key = (probability, freedom.tobytes())
        if key not in found:
            found[key] = quantile(probability, freedom)
        return found[key]

    intervals.student_t_quantile = remembered
    rule._standings = lambda contest, tail: ()


def compare_with_rows() -> float:
    """Looks from sums against `take_look` of the rows: the largest relative difference; AssertionError above 1e-9."""
    worst = 0.0
    for tails in TAILS:
        world, names, draw = World(tails, [1, 1, 1, 0.9, 0.8]), names_of(5), np.random.default_rng(0)
        settings = RaceSettings(figure="car", beta=BETA, margin=0.0)
        shares = planned_looks(600)
        x = np.concatenate(list(world.figures(draw, 600, list(range(5)))))
        sums, history, n = Sums(world.centre), History(tuple(names)), 0
        for share in shares:
            n_next = round(share * 600)
            sums.add(x[n:n_next], list(range(5)))
            n = n_next
            there = [names.index(name) for name in history.still_in]
            rows = rows_of(x[:n] + world.centre, names)
            look = take_look(rows, settings, history, shares, n_prompts=n)
            found = contest(sums, names, there, settings)
            own = judge(found, settings, history, shares, n_prompts=n, n_responses=look.n_responses)
            assert (own.claims, own.out, own.over) == (look.claims, look.out, look.over), (own, look)

            chosen = rows.filter(pa.array(np.isin(rows["generator"].to_numpy(zero_copy_only=False), history.still_in)))
            values, units = values_of(chosen, ["reward", "loss"], "response")
            prompt, group = (coded(chosen[name])[1] for name in ("prompt_id", "generator"))
            means = ClusteredMeans([Responses.of(prompt, group, values)], len(there))
            wanted = estimates_of(means, means.moments(), units, settings.ranking)[BETA]
            a, b = found.estimate, wanted
            for x_, y_, unit in (
                (a.value, b.value, b.unit),
                (a.deviation, b.deviation, b.unit),
                (a.acceleration, b.acceleration, 1.0),
                (a.freedom, b.freedom, 1.0),
                (a.differences.value, b.differences.value, b.unit),
                (a.differences.deviation, b.differences.deviation, b.unit),
                (a.differences.acceleration, b.differences.acceleration, 1.0),
            ):
                size = np.abs(y_).max() * unit
                worst = max(worst, float(np.abs(x_ - y_ * unit).max() / size))
            history = History(history.names, (*history.looks, look))
            if history.over:
                break
    whole, direct = (
        KnownRewards.of(rows_of(x + world.centre, names), names),
        known_rewards(x[:, 0] + world.centre[0], names),
    )
    for a_, b_, power in (
        (whole.means, direct.means, 1),
        (whole.second, direct.second, 2),
        (whole.third, direct.third, 3),
    ):
        worst = max(worst, float(np.abs(a_ * whole.unit**power - b_).max() / np.abs(b_).max()))
    assert worst < 1e-9, worst
    return worst


# --- errors -----------------------------------------------------------------------------------------------------------


def share(hits: int, n: int) -> dict[str, float]:
    """With its upper Monte-Carlo limit."""
    p, z = hits / n, Z_LIMIT
    upper = (p + z * z / 2 / n + z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)) / (1 + z * z / n)
    return {"share": round(p, 4), "upper": round(upper, 4)}


def errors(world: World, n_prompts: int, goals: list[str], n_races: int, seed: list[int]) -> dict[str, Any]:
    """How many races claim anything false at any look, of each goal, of the naive rule, and at `rank`'s own level."""
    n = len(world.cars)
    names, everybody, shares = names_of(n), list(range(n)), planned_looks(n_prompts)
    settings = {goal: RaceSettings(until=goal, figure="car", beta=BETA, margin=0.0) for goal in goals}  # type: ignore[arg-type]
    false = dict.fromkeys(["naive", "own_level", *goals], 0)
    least = {
        who: NormalDist().inv_cdf(1 - tail)
        for who, tail in (
            ("own_level", FALSE_DIFFERENCES / n / (n - 1)),
            # Of a single pair: the least that any number of pairs asks for.
            ("on_the_way", repeated_tail(FALSE_ON_THE_WAY / 2, shares)),
            ("the_end", FALSE_DIFFERENCES / 2),
        )
    } | {"naive": NAIVE}
    at_the_end, ended_early = dict.fromkeys(goals, 0), dict.fromkeys(goals, 0)
    begin = time.perf_counter()
    for race in range(n_races):
        draw = np.random.default_rng([*seed, race])
        sums = Sums(world.centre)
        history = {goal: History(tuple(names)) for goal in goals}
        wrong = dict.fromkeys(false, False)
        for number, reached in enumerate(shares, start=1):
            for block in world.figures(draw, round(reached * n_prompts) - sums.n, everybody):
                sums.add(block, everybody)
            open_goals = [goal for goal in goals if not (wrong[goal] or history[goal].over)]
            needed = [least["naive"]] * (not wrong["naive"]) + [least["own_level"]] * (not wrong["own_level"])
            needed += [least["the_end" if number == len(shares) else "on_the_way"]] * bool(open_goals)
            if largest_z(sums) < 0.999 * min(needed, default=np.inf):
                for goal in open_goals:
                    nothing = Look(
                        number=number,
                        n_looks=len(shares),
                        n_prompts=sums.n,
                        n_responses=0,
                        standings=(),
                        over="end" if number == len(shares) else "",
                    )
                    history[goal] = History(history[goal].names, (*history[goal].looks, nothing))
                continue
            of_all = contest(sums, names, everybody, settings[goals[0]])
            between = of_all.estimate.differences
            if not wrong["naive"]:
                wrong["naive"] = bool(((between.value > NAIVE * between.deviation) & world.false).any())
            if not wrong["own_level"]:
                wrong["own_level"] = bool((of_all.estimate.clearly_better(of_all.known) & world.false).any())
            for goal in open_goals:
                there = [names.index(name) for name in history[goal].still_in]
                own = of_all if len(there) == n else contest(sums, names, there, settings[goal])
                look = judge(
                    own, settings[goal], history[goal], shares, n_prompts=sums.n, n_responses=sums.n * len(there)
                )
                history[goal] = History(history[goal].names, (*history[goal].looks, look))
                if any(world.false[names.index(a), names.index(b)] for a, b in look.claims):
                    wrong[goal] = True
                    at_the_end[goal] += number == len(shares)
                ended_early[goal] += bool(look.over) and number < len(shares)
            if all(wrong.values()):
                break
        for who, is_wrong in wrong.items():
            false[who] += is_wrong
    return {
        "prompts": n_prompts,
        "generators": n,
        "looks": len(shares),
        "races": n_races,
        "false_claim": {who: share(hits, n_races) for who, hits in false.items()},
        "first_false_claim_at_the_end": {goal: round(hits / n_races, 4) for goal, hits in at_the_end.items()},
        "over_before_the_end": {goal: round(hits / n_races, 4) for goal, hits in ended_early.items()},
        "seconds": round(time.perf_counter() - begin),
    }


# --- costs ------------------------------------------------------------------------------------------------------------


def scored(looks: tuple[Look, ...], n_generators: int, n_prompts: int, *, behind: int) -> float:
    """The share of the corpus's responses that is scored if who leaves at a look is left out `behind` looks later."""
    n_responses, before, leaves = 0, 0, [len(look.out) for look in looks]
    for k, look in enumerate(looks):
        n_responses += (look.n_prompts - before) * (n_generators - sum(leaves[: max(k - behind, 0)]))
        before = look.n_prompts
    return n_responses / (n_generators * n_prompts)


Step = Callable[[History, int], Contest]


def race(step: Step, settings: RaceSettings, names: list[str], n_prompts: int) -> tuple[Look, ...]:
    """The looks of one race. step: the contest after so many prompts, of those that are still in."""
    history, shares = History(tuple(names)), planned_looks(n_prompts)
    for reached in shares:
        n = round(reached * n_prompts)
        found = step(history, n)
        look = judge(found, settings, history, shares, n_prompts=n, n_responses=n * len(history.still_in))
        history = History(history.names, (*history.looks, look))
        if history.over:
            break
    return history.looks


def costs(
    races: list[tuple[Look, ...]], cars: FloatArray, names: list[str], n_prompts: int, seconds: float
) -> dict[str, Any]:
    """What races needed, and what they claimed."""
    of = {
        behind: np.array([scored(looks, len(names), n_prompts, behind=behind) for looks in races]) for behind in (0, 1)
    }
    claims = [[pair for look in looks for pair in look.claims] for looks in races]
    place = {name: k for k, name in enumerate(names)}
    wrong = [any(cars[place[a]] <= cars[place[b]] for a, b in told) for told in claims]
    n_pairs = len(names) * (len(names) - 1) // 2
    return {
        "prompts": n_prompts,
        "generators": len(names),
        "races": len(races),
        "scored": round(float(of[1].mean()), 5),
        "scored_error": round(float(of[1].std(ddof=1)) / len(races) ** 0.5, 5),
        "scored_90%": round(float(np.quantile(of[1], 0.9)), 5),
        "scored_if_left_out_at_once": round(float(of[0].mean()), 5),
        "over": {how: sum(looks[-1].over == how for looks in races) for how in sorted({x[-1].over for x in races})},
        "false_claim": share(sum(wrong), len(races)),
        "pairs_told_apart": round(float(np.mean([len(set(told)) / n_pairs for told in claims])), 4),
        "seconds": round(seconds),
    }


def simulated_costs(world: World, n_prompts: int, until: str, n_races: int, seed: list[int]) -> dict[str, Any]:
    names = names_of(len(world.cars))
    settings = RaceSettings(until=until, figure="car", beta=BETA, margin=0.0)  # type: ignore[arg-type]
    begin, races = time.perf_counter(), []
    for number in range(n_races):
        draw, sums = np.random.default_rng([*seed, number]), Sums(world.centre)

        def step(history: History, n: int, draw: Any = draw, sums: Sums = sums) -> Contest:
            there = [names.index(name) for name in history.still_in]
            for block in world.figures(draw, n - sums.n, there):
                sums.add(block, there)
            return contest(sums, names, there, settings)

        races.append(race(step, settings, names, n_prompts))
    return costs(races, world.cars, names, n_prompts, time.perf_counter() - begin)


def demo_figures(run: Path) -> tuple[list[str], FloatArray]:
    """Generators and [prompts, 2, G] rewards and losses, of prompts that all of them answered once."""
    from fastcompat.rows import paired
    from fastcompat.store import open_run

    rows = paired(
        open_run(run).scores(["row_key", "prompt_id", "generator", "loss", "reward", "base_model", "reward_model"])
    )
    names = sorted(set(rows["generator"].to_pylist()))
    cells: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows.to_pylist():
        if row["loss"] is not None and row["reward"] is not None:
            cells.setdefault(row["prompt_id"], {})[row["generator"]] = (row["reward"], row["loss"])
    whole = [own for own in cells.values() if len(own) == len(names)]
    return names, np.array([[[own[name][k] for name in names] for k in range(2)] for own in whole])


def demo_costs(
    names: list[str], figures: FloatArray, n_prompts: int, settings: RaceSettings, known: bool, n_races: int, seed: int
) -> dict[str, Any]:
    """Races on prompts drawn with replacement. known: whether rewards are known of all of them beforehand."""
    centre = figures.mean(axis=0)
    cars = centre[0] / (1 + settings.beta * centre[1])
    begin, races = time.perf_counter(), []
    for number in range(n_races):
        drawn = np.random.default_rng([seed, number]).integers(len(figures), size=n_prompts)
        rewards = known_rewards(figures[drawn, 0], names) if known else None
        sums = Sums(centre)

        def step(
            history: History, n: int, drawn: Any = drawn, rewards: KnownRewards | None = rewards, sums: Sums = sums
        ) -> Contest:
            there = [names.index(name) for name in history.still_in]
            if rewards is None:
                sums.add(figures[drawn[sums.n : n]][:, :, there] - centre[:, there], there)
                return contest(sums, names, there, settings)
            rows = rows_of(figures[drawn[:n]][:, :, there], history.still_in)
            prompt, group = coded(rows["prompt_id"])[1], coded(rows["generator"])[1]
            means, estimates = contest_with(rewards, rows, prompt, group, history.still_in, settings.ranking)
            return Contest.of(history.still_in, estimates, means.n_prompts, settings)

        races.append(race(step, settings, names, n_prompts))
    found = costs(races, cars, names, n_prompts, time.perf_counter() - begin)
    relative = sorted((cars / cars.max()).round(4).tolist(), reverse=True)
    return {"drawn_from_prompts": len(figures), "relative_cars": relative} | found


def known_rewards(x: FloatArray, names: list[str]) -> KnownRewards:
    """`KnownRewards.of` of one reward [P, G] a prompt and generator."""
    n, mean = len(x), x.mean(axis=0)
    influence = (x - mean) / (n - 1)
    return KnownRewards(
        names=tuple(names),
        unit=1.0,
        means=mean,
        counts=np.full(len(names), float(n)),
        second=influence.T @ influence,
        third=(influence**2).T @ influence,
    )


# --- time -------------------------------------------------------------------------------------------------------------


def look_times(n_prompts: int = 100_000, n_generators: int = 20) -> dict[str, Any]:
    """Seconds of every look at rows of equal generators, nobody leaving."""
    world, names = World("light", [1.0] * n_generators), names_of(n_generators)
    everybody = list(range(n_generators))
    x = np.concatenate(list(world.figures(np.random.default_rng(0), n_prompts, everybody))) + world.centre
    rows = rows_of(x, names)
    settings, shares = RaceSettings(figure="car", beta=BETA, margin=0.0), planned_looks(n_prompts)
    history, seconds = History(tuple(names)), []
    for reached in shares:
        n = round(reached * n_prompts)
        begin = time.perf_counter()
        look = take_look(rows.slice(0, n * n_generators), settings, history, shares, n_prompts=n)
        seconds.append(time.perf_counter() - begin)
        history = History(history.names, (*history.looks, replace(look, claims=(), out={}, over="")))
    return {
        "rows": rows.num_rows,
        "looks": len(shares),
        "last_look_seconds": round(seconds[-1], 2),
        "all_looks_seconds": round(sum(seconds), 2),
        "first_look_seconds": round(seconds[0], 4),
        "note": "one thread, on a machine that others used at the same time; without reading the parts from disk",
    }


# --- all of it --------------------------------------------------------------------------------------------------------


def ladder(step: float, n: int = 20) -> list[float]:
    return [1 - step * k for k in range(n)]


# Gaps that might break the recycling of error.
MIXED = {
    "ten_equal_ten_far_below": [1.0] * 10 + [0.7] * 10,
    "steps_of_0.05%": ladder(0.0005),
    "two_equal_best_18_below": [1.0, *ladder(0.02, 19)],
    "two_equal_at_the_top_18_far_below": [1.0] * 2 + [0.7] * 18,
}


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(section, name, what gives its result), in order of importance."""
    n_races, seed = options.races, options.seed
    equal = [
        (tails, n, n_prompts)
        for n_prompts, sizes in ((20_000, (20, 2)), (2_000, (20, 2)))
        for n in sizes
        for tails in TAILS
    ]
    number = 0
    for tails, n, n_prompts in equal:
        number += 1
        yield (
            "errors-equal",
            f"{tails}-{n}-{n_prompts}",
            lambda t=tails, n=n, p=n_prompts, k=number: errors(World(t, [1.0] * n), p, ["winner"], n_races, [seed, k]),
        )
    for until, step, tails, few in (
        ("winner", 0.02, "light", 200),
        ("ranking", 0.04, "light", 100),
        ("winner", 0.02, "skewed", 100),
        ("winner", 0.02, "heavy", 60),
    ):
        number += 1
        yield (
            "costs",
            f"{until}-ladder_{step:.0%}-{tails}-20-100000",
            lambda u=until, s=step, t=tails, r=few, k=number: simulated_costs(
                World(t, ladder(s)), 100_000, u, min(r, n_races), [seed, k]
            ),
        )
    if options.demo:
        names, figures = demo_figures(options.demo)
        for until, known, margin in (
            ("winner", False, 0.0),
            ("ranking", False, 0.0),
            ("winner", True, 0.0),
            ("ranking", True, 0.0),
            ("winner", False, 0.01),
        ):
            settings = RaceSettings(until=until, figure="car", beta=BETA, margin=margin)  # type: ignore[arg-type]
            name = f"{until}{'-rewards_known' if known else ''}{f'-margin_{margin:.0%}' if margin else ''}-100000"
            yield (
                "demo",
                name,
                lambda s=settings, k=known: demo_costs(names, figures, 100_000, s, k, min(60, n_races), seed),
            )
    for name, cars in MIXED.items():
        for tails in ("light", "unequal"):
            number += 1
            yield (
                "errors-mixed",
                f"{name}-{tails}-10000",
                lambda t=tails, c=cars, k=number: errors(
                    World(t, c), 10_000, ["winner", "ranking"], n_races, [seed, k]
                ),
            )


def hardware() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "")}


def write(report: dict[str, Any], out: Path) -> None:
    """By rename: who interrupts this finds what there was."""
    out.parent.mkdir(exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(out)


def main() -> None:
    """Work off the cells that are not there yet, write each result and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--races", type=int, default=1000, help="of a cell of errors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demo", type=Path, help="a finished run of `fastcompat demo`")
    parser.add_argument("--time", action="store_true", help="also time the looks at 2,000,000 rows")
    parser.add_argument("--only", help="sections or cells whose name begins so: errors-equal, costs/winner ...")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    worst = compare_with_rows()
    times = look_times() if options.time else None
    make_haste()
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__},
        "hardware": hardware(),
        "seed": options.seed,
        "beta": BETA,
        "looks_from_sums_differ_from_take_look_by": float(f"{worst:.1g}"),
        "tails": {name: tails.about for name, tails in TAILS.items()},
    }
    done = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    report = {**report, **{name: value for name, value in done.items() if name not in report}}
    if times:
        report["time"] = times
        write(report, options.out)
    for section, name, compute in cells(options):
        if name in report.get(section, {}) or not f"{section}/{name}".startswith(options.only or ""):
            continue
        result = compute()
        report.setdefault(section, {})[name] = result
        write(report, options.out)
        print(f"{section}/{name}: {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
