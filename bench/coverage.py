"""What the ranking's 95% intervals cover, how wide they get, and what it tells apart: simulated corpora.

    python bench/coverage.py [--simulations 1000] [--seed 0]

Every corpus is drawn from a known distribution, ranked by `fastcompat.rank` as a user would, and its intervals
are compared with the true means. Its two generators are equal, so a best one is a false one. Then one is made better,
by three standard errors of the difference of their CARs: how often it is found is the power. Plain samples, one value a
prompt, compare the methods that could have been chosen. Writes bench/results/coverage.json; a figure's `error` is its
Monte-Carlo standard error. One thread is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastcompat.decisions.ranking.intervals import (
    FALSE_DIFFERENCES,
    interval,
    skewness_corrected,
    student_t_quantile,
)
from fastcompat.decisions.ranking.ranking import rank

RESULTS = Path(__file__).parent / "results"
GENERATORS = ("a", "b")
PROMPTS = (30, 100, 500, 2000)
BETA = 3.0
NORMAL = NormalDist()
FIGURES = ("reward", "loss", "car")
# For `p_best` alone: the intervals need none.
DRAWS = 400
# By how many standard errors of the difference the better generator is better.
EFFECT = 3.0

FloatArray = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], FloatArray]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A distribution of corpora. A figure is its prompt's part, shared by both generators, and the response's own.

    reward: sum of the two parts and `mean_reward`; loss: product of the two, each log-normal with `loss_sigma`.
    """

    about: str
    reward_part: Draw
    mean_reward: float
    loss_sigma: float
    unequal_counts: bool = False
    missing: float = 0.0
    average: str = "response"

    @property
    def truth(self) -> dict[str, float]:
        """The expectations that the intervals should cover."""
        loss = math.exp(self.loss_sigma**2)
        return {"reward": self.mean_reward, "loss": loss, "car": self.mean_reward / (1 + BETA * loss)}


def normal(generator: np.random.Generator, size: int) -> FloatArray:
    return generator.normal(size=size)


def student(generator: np.random.Generator, size: int) -> FloatArray:
    """Three degrees of freedom: a variance, but no skewness and no kurtosis."""
    return generator.standard_t(3, size=size)


def skewed(generator: np.random.Generator, size: int) -> FloatArray:
    """Log-normal with sigma 0.9, the long tail to the left, around its mean."""
    return math.exp(0.9**2 / 2) - generator.lognormal(0, 0.9, size=size)


def coin(generator: np.random.Generator, size: int) -> FloatArray:
    """Half of a verdict of yes or no, 80% yes, around its mean: few different rewards."""
    return ((generator.random(size) < 0.8) - 0.8) / 2


SCENARIOS = {
    "light_tails": Scenario(
        about="normal rewards, log-normal losses", reward_part=normal, mean_reward=5.0, loss_sigma=0.3
    ),
    "heavy_tails": Scenario(
        about="Student's t rewards with 3 degrees of freedom, log-normal losses with sigma 0.5 twice over",
        reward_part=student,
        mean_reward=8.0,
        loss_sigma=0.5,
    ),
    "skewed": Scenario(
        about="rewards skewed to the left, losses to the right", reward_part=skewed, mean_reward=8.0, loss_sigma=0.5
    ),
    "extreme": Scenario(
        about="as heavy_tails, but log-normal losses with sigma 0.7 twice over: skewness 6",
        reward_part=student,
        mean_reward=8.0,
        loss_sigma=0.7,
    ),
    "few_values": Scenario(about="rewards of few different values", reward_part=coin, mean_reward=0.8, loss_sigma=0.5),
    "unequal_counts": Scenario(
        about="heavy tails; one to many responses per prompt and generator, geometric with mean 2",
        reward_part=student,
        mean_reward=8.0,
        loss_sigma=0.5,
        unequal_counts=True,
    ),
    "missing_prompts": Scenario(
        about="heavy tails; each generator lacks 30% of the prompts, at random",
        reward_part=student,
        mean_reward=8.0,
        loss_sigma=0.5,
        missing=0.3,
    ),
    "all_together": Scenario(
        about="skewed rewards, heavy losses, unequal counts, 30% of the prompts missing",
        reward_part=skewed,
        mean_reward=8.0,
        loss_sigma=0.5,
        unequal_counts=True,
        missing=0.3,
    ),
    "by_token": Scenario(
        about="heavy tails, the loss averaged over tokens; log-normal lengths, independent of the loss",
        reward_part=student,
        mean_reward=8.0,
        loss_sigma=0.5,
        average="token",
    ),
}


def corpus(scenario: Scenario, n_prompts: int, generator: np.random.Generator, raised: float = 0.0) -> pa.Table:
    """One simulated corpus as a table of scores. raised: by how much the rewards of the second generator are."""
    prompt_reward = scenario.reward_part(generator, n_prompts)
    prompt_loss = generator.lognormal(0, scenario.loss_sigma, size=n_prompts)
    prompts, groups = [], []
    for k in range(len(GENERATORS)):
        counts = generator.geometric(0.5, size=n_prompts) if scenario.unequal_counts else np.ones(n_prompts, np.int64)
        counts[generator.random(n_prompts) < scenario.missing] = 0
        prompts.append(np.repeat(np.arange(n_prompts), counts))
        groups.append(np.full(counts.sum(), k, np.int32))
    prompt, group = np.concatenate(prompts), np.concatenate(groups)
    loss = prompt_loss[prompt] * generator.lognormal(0, scenario.loss_sigma, size=len(prompt))
    return pa.table(
        {
            "generator": pa.DictionaryArray.from_arrays(group, list(GENERATORS)),
            "prompt_id": pa.array(prompt),
            "reward": scenario.mean_reward
            + prompt_reward[prompt]
            + scenario.reward_part(generator, len(prompt))
            + raised * group,
            "loss": loss,
            "n_tokens": pa.array(np.ceil(generator.lognormal(5, 0.6, size=len(prompt))).astype(np.int32)),
        }
    )


def share(hits: FloatArray) -> dict[str, float]:
    """The mean of one value per simulation, and its standard error."""
    return {"share": round(float(hits.mean()), 4), "error": round(float(hits.std(ddof=1)) / len(hits) ** 0.5, 4)}


def simulate(name: str, n_prompts: int, n_simulations: int, seed: int) -> dict[str, Any]:
    """Rank simulated corpora of one scenario and size: what was covered, how often a best one was named, and found.

    width_tail: 99th percentiles of an interval's longer side over its shorter one, which is Student's.
    """
    scenario = SCENARIOS[name]
    generator = np.random.default_rng([seed, list(SCENARIOS).index(name), n_prompts])
    covered = {figure: np.zeros(n_simulations) for figure in FIGURES}
    widths = {figure: np.zeros(n_simulations) for figure in FIGURES}
    stretched = {figure: np.zeros((n_simulations, len(GENERATORS))) for figure in FIGURES}
    apart = np.zeros(n_simulations)
    false_best, sure = np.zeros(n_simulations), np.zeros(n_simulations)
    for k in range(n_simulations):
        table = corpus(scenario, n_prompts, generator)
        rows = rank(table, beta=BETA, average=scenario.average, draws=DRAWS, seed=k).to_pylist()
        for figure in FIGURES:
            inside = [row[f"{figure}_low"] <= scenario.truth[figure] <= row[f"{figure}_high"] for row in rows]
            covered[figure][k] = np.mean(inside)
            widths[figure][k] = np.mean([row[f"{figure}_high"] - row[f"{figure}_low"] for row in rows])
            sides = np.array(
                [[row[figure] - row[f"{figure}_low"], row[f"{figure}_high"] - row[figure]] for row in rows]
            )
            stretched[figure][k] = sides.max(axis=1) / sides.min(axis=1)
        apart[k] = (rows[0]["car"] - rows[1]["car"]) * (1 if rows[0]["generator"] == "b" else -1)
        false_best[k] = len({row["rank"] for row in rows}) > 1
        sure[k] = max(row["p_best"] for row in rows) > 0.975
    raised = EFFECT * apart.std(ddof=1) * (1 + BETA * scenario.truth["loss"])
    found = np.zeros(n_simulations // 2)
    for k in range(len(found)):
        table = corpus(scenario, n_prompts, generator, raised)
        ranks = {
            row["generator"]: row["rank"]
            for row in rank(table, beta=BETA, average=scenario.average, draws=1).to_pylist()
        }
        found[k] = ranks == {"b": 1, "a": 2}
    return {
        "scenario": name,
        "prompts": n_prompts,
        "coverage": {figure: share(covered[figure]) for figure in FIGURES},
        "median_width": {figure: round(float(np.median(widths[figure])), 5) for figure in FIGURES},
        "width_tail": {figure: round(float(np.quantile(stretched[figure], 0.99)), 3) for figure in FIGURES},
        "false_best": share(false_best),
        "power": share(found),
        "p_best_above_0.975": share(sure),
    }


# Plain samples, around a known mean.
DISTRIBUTIONS: dict[str, Draw] = {
    "normal": normal,
    "student_3": student,
    "log_normal_0.5": lambda generator, size: generator.lognormal(-(0.5**2) / 2, 0.5, size=size) - 1,
    "log_normal_1": lambda generator, size: generator.lognormal(-1 / 2, 1, size=size) - 1,
    "coin_0.8": coin,
}


def methods(name: str, n_values: int, n_simulations: int, seed: int) -> dict[str, Any]:
    """What intervals of several kinds cover of the mean (0) of one sample; 1,000 draws where they are bootstraps."""
    generator = np.random.default_rng([seed, list(DISTRIBUTIONS).index(name), n_values])
    covered: dict[str, list[float]] = {}
    degrees = np.full(1, n_values - 1.0)
    t = student_t_quantile(0.975, degrees)
    for _ in range(n_simulations):
        values = DISTRIBUTIONS[name](generator, n_values)
        mean, centred = values.mean(), values - values.mean()
        error = values.std(ddof=1) / n_values**0.5
        if error == 0:
            continue
        a = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
        weights = generator.multinomial(n_values, np.full(n_values, 1 / n_values), size=1000)
        shift = weights @ centred / n_values
        own_error = np.sqrt(np.maximum(weights @ centred**2 / n_values - shift**2, 0) / (n_values - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            studentised = np.nan_to_num(shift / own_error, nan=0.0, posinf=1e300, neginf=-1e300)
        tail = np.quantile(studentised, [0.975, 0.025])
        bias = NORMAL.inv_cdf(min(max(((shift < 0).mean() + (shift <= 0).mean()) / 2, 0.001), 0.999))
        ends = [NORMAL.cdf(bias + (bias + z) / (1 - a * (bias + z))) for z in (-1.959964, 1.959964)]
        hall = [skewness_corrected(sign * t, np.full(1, a))[0] for sign in (1, -1)]
        jackknife = np.full(1, error * (n_values / (n_values - 1)) ** 0.5)
        intervals = {
            "percentile": mean + np.quantile(shift, [0.025, 0.975]),
            "bca": mean + np.quantile(shift, ends),
            "bootstrap_t": mean - error * tail,
            "student": mean + error * t[0] * np.array([-1, 1]),
            "hall": mean - error * np.array(hall),
            "wider (in use)": np.concatenate(interval(np.full(1, mean), jackknife, np.full(1, a), degrees)),
        }
        for method, (low, high) in intervals.items():
            covered.setdefault(method, []).append(low <= 0 <= high)
    return {
        "distribution": name,
        "values": n_values,
        "coverage": {method: share(np.array(hits, np.float64)) for method, hits in covered.items()},
    }


def main() -> None:
    """Simulate every scenario at every size, write the result and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.perf_counter()
    results = []
    for name in SCENARIOS:
        for n_prompts in PROMPTS:
            result = simulate(name, n_prompts, options.simulations, options.seed)
            results.append(result)
            shares = "  ".join(f"{figure} {result['coverage'][figure]['share']:.1%}" for figure in FIGURES)
            false = result["false_best"]["share"]
            power = result["power"]["share"]
            print(f"{name:16} {n_prompts:5} prompts  {shares}  false best {false:.1%}  power {power:.1%}", flush=True)
    by_method = [methods(name, n, options.simulations, options.seed) for name in DISTRIBUTIONS for n in (30, 100)]
    for result in by_method:
        shares = "  ".join(f"{method} {hits['share']:.1%}" for method, hits in result["coverage"].items())
        print(f"{result['distribution']:16} {result['values']:5} values  {shares}", flush=True)
    coverage = [result["coverage"][figure]["share"] for result in results for figure in FIGURES]
    summary = {
        "lowest_coverage": min(coverage),
        "highest_coverage": max(coverage),
        "mean_coverage": round(float(np.mean(coverage)), 4),
        "highest_false_best": max(result["false_best"]["share"] for result in results),
        "mean_false_best": round(float(np.mean([result["false_best"]["share"] for result in results])), 4),
        "highest_width_tail": max(tail for result in results for tail in result["width_tail"].values()),
        "median_width_tail": round(float(np.median([list(result["width_tail"].values()) for result in results])), 3),
        "lowest_power": min(result["power"]["share"] for result in results),
        "mean_power": round(float(np.mean([result["power"]["share"] for result in results])), 4),
        # Of a normal difference whose standard error is known, at the level of the ranking.
        "power_if_normal": round(1 - NORMAL.cdf(NORMAL.inv_cdf(1 - FALSE_DIFFERENCES / 2) - EFFECT), 4),
    }
    report = {
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__},
        "simulations": options.simulations,
        "seed": options.seed,
        "level": 0.95,
        "beta": BETA,
        "draws": DRAWS,
        "effect": EFFECT,
        "seconds": round(time.perf_counter() - begin),
        "summary": summary,
        "scenarios": {name: {"about": s.about, "truth": s.truth} for name, s in SCENARIOS.items()},
        "results": results,
        "methods": by_method,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coverage.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
