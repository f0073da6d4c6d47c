"""How well every metric of a run predicted what a study found: per base model and over all of them. No torch.

Signs: every metric and every outcome is turned so that more is better (the loss counts as its negative), so that near 1
predicts well throughout. Other than `validation`, which takes metrics as they are.

Dimension key: B base models, K metrics, G generators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.validation.outcomes import match_generators
from fastcompat.decisions.validation.several_base_models import (
    MIN_GENERATORS,
    Pooled,
    best_of,
    partial,
    pooled,
    reliability,
)
from fastcompat.decisions.validation.study_outcomes import failures, measured, read_outcomes
from fastcompat.decisions.validation.validation import FIGURES_SCHEMA
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA, METRICS
from fastcompat.rows import FloatArray

# Of CAR; 0 is the reward alone, and with ever larger ones CAR orders by reward / loss.
BETAS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)

# `base_model` is null over all; `less_car` is rho less that of CAR with the paper's beta and the same reward model.
STUDY_TABLE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("outcome", "metric", "reward_model")),
        ("beta", pa.float64()),
        ("base_model", pa.string()),
        ("n", pa.int64()),
        *((f"rho{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((f"without_one{end}", pa.float64()) for end in ("_low", "_high")),
        ("given_length", pa.float64()),
        *((f"less_car{end}", pa.float64()) for end in ("", "_low", "_high")),
        ("smallest_difference", pa.float64()),
        ("circular", pa.bool_()),
        ("note", pa.string()),
    ]
)
# How good an outcome itself is. `ceiling` is the square root of its reliability.
OUTCOME_TABLE_SCHEMA = pa.schema(
    [
        ("outcome", pa.string()),
        ("base_model", pa.string()),
        ("generators", pa.int64()),
        ("seeds", pa.int64()),
        ("lowest", pa.float64()),
        ("highest", pa.float64()),
        ("reliability", pa.float64()),
        ("ceiling", pa.float64()),
        ("length_bias", pa.float64()),
        ("reward_model", pa.string()),
        ("circular", pa.bool_()),
        ("lower_is_better", pa.bool_()),
        ("failed", pa.int64()),
    ]
)
# Which beta would have been best, and how often each was over generators drawn with replacement.
BETA_TABLE_SCHEMA = pa.schema(
    [
        ("outcome", pa.string()),
        ("reward_model", pa.string()),
        ("best", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("shares", pa.list_(pa.float64())),
    ]
)


class Key(NamedTuple):
    """A metric whatever the base model; the reward model and beta where it has them."""

    metric: str
    reward_model: str | None
    beta: float | None


class Figures(NamedTuple):
    """values[b][key][generator]: what each metric says, turned so that more is better; notes[key]: why it has none."""

    base_models: tuple[str, ...]
    generators: tuple[str, ...]
    values: Mapping[str, Mapping[Key, Mapping[str, float]]]
    notes: Mapping[Key, str]


def study_tables(figures: pa.Table, rows: pa.Table) -> tuple[pa.Table, pa.Table, pa.Table]:
    """(how well each metric predicted each outcome, how good each outcome is, which beta would have been best).

    figures: what `generator_metrics` gives of the run, of all its base models. rows: a study's outcomes
    (`study_outcomes.read_outcomes`). Generators without a figure for some base model are left out of that outcome's
    means over base models, and of nothing else. Raises UsageError where run and study have no base model in common.
    """
    found, best = [], []
    every = measured(rows)
    known = _figures(figures)
    bases = _partners(known.base_models, list(dict.fromkeys(rows["base_model"].to_pylist())))
    about = {row["evaluation"]: row for row in rows.to_pylist()}
    for outcome, by_base in every.items():
        told = about[outcome]
        sign = -1.0 if told["lower_is_better"] else 1.0
        means = {
            ours: {name: sign * value for name, value in by_base[theirs].means().items()}
            for ours, theirs in bases.items()
            if theirs in by_base
        }
        groups: list[tuple[str | None, list[str]]] = [(None, list(means))] if len(means) > 1 else []
        groups += [(name, [name]) for name in means]
        for base_model, members in groups:
            found += _rows(told, base_model, members, means, known)
        best += _best_betas(outcome, list(means), means, known)
    return (
        pa.Table.from_pylist(found, STUDY_TABLE_SCHEMA),
        outcome_table(rows),
        pa.Table.from_pylist(best, BETA_TABLE_SCHEMA),
    )


def outcome_table(rows: pa.Table) -> pa.Table:
    """Every outcome under every base model: how far generators are apart, and how much of that other seeds would give
    again. `OUTCOME_TABLE_SCHEMA`."""
    found = []
    records = rows.to_pylist()
    failed = failures(rows)
    for outcome, by_base in measured(rows).items():
        for base_model, own in by_base.items():
            here = [r for r in records if (r["evaluation"], r["base_model"]) == (outcome, base_model)]
            means = list(own.means().values())
            bias = [row["length_bias"] for row in here if row["length_bias"] is not None]
            again = reliability(own.values)
            found.append(
                {
                    "outcome": outcome,
                    "base_model": base_model,
                    "generators": len(means),
                    "seeds": len(own.seeds),
                    "lowest": min(means, default=None),
                    "highest": max(means, default=None),
                    "reliability": _plain(again),
                    "ceiling": _plain(float(np.sqrt(again))),
                    "length_bias": float(np.mean(bias)) if bias else None,
                    "reward_model": here[0]["reward_model"],
                    "circular": here[0]["circular"],
                    "lower_is_better": here[0]["lower_is_better"],
                    "failed": sum((r["evaluation"], r["base_model"]) == (outcome, base_model) for r in failed),
                }
            )
    return pa.Table.from_pylist(found, OUTCOME_TABLE_SCHEMA)


def points(
    figures: pa.Table, rows: pa.Table, metrics: Sequence[str] = ("reward", "loss", "car")
) -> list[dict[str, Any]]:
    """What a chart of outcome against metric shows: a point an outcome, metric, base model and generator.

    x: the figure as it is, y: the outcome's mean over seeds, low and high: its lowest and highest seed. Of CAR with the
    paper's beta; of several reward models the first. metrics: those that the figures lack have no points.
    """
    known = _figures(figures)
    bases = _partners(known.base_models, list(dict.fromkeys(rows["base_model"].to_pylist())))
    found = []
    for outcome, by_base in measured(rows).items():
        for ours, theirs in bases.items():
            if theirs not in by_base:
                continue
            own, means = by_base[theirs], by_base[theirs].means()
            partners = match_generators(known.generators, list(means))
            keys = [key for key in known.values[ours] if key.beta in (None, BETA)]
            for metric in metrics:
                values = next((known.values[ours][key] for key in keys if key.metric == metric), {})
                for name, other in partners.items():
                    x = values.get(name, np.nan)
                    if not np.isfinite(x):
                        continue
                    seeds = own.values[own.generators.index(other)]
                    found.append(
                        {
                            "outcome": outcome,
                            "metric": metric,
                            "base_model": ours,
                            "generator": name,
                            "x": float(-x if METRICS[metric].lower_is_better else x),
                            "y": means[other],
                            "low": float(np.nanmin(seeds)),
                            "high": float(np.nanmax(seeds)),
                        }
                    )
    return found


def _rows(
    told: Mapping[str, Any],
    base_model: str | None,
    members: Sequence[str],
    means: Mapping[str, Mapping[str, float]],
    known: Figures,
) -> list[dict[str, Any]]:
    """One outcome under these base models: a row a metric."""
    generators = _common(members, means, known)
    keys = [key for key in known.values[members[0]] if all(key in known.values[m] for m in members)]
    blank = {"outcome": told["evaluation"], "base_model": base_model, "n": len(generators)}
    found = []
    if len(generators) < MIN_GENERATORS:
        note = f"{len(generators)} generators have both figures and outcomes; at least {MIN_GENERATORS} are needed"
        return [blank | key._asdict() | {"circular": _circular(told, key), "note": note} for key in keys]
    outcome = _matrix([means[m] for m in members], _theirs(generators, means[members[0]]))
    if (outcome == outcome[:, :1]).all():
        return [
            blank | key._asdict() | {"circular": _circular(told, key), "note": "every generator's outcome is the same"}
            for key in keys
        ]
    usable = []
    for key in keys:
        values = _matrix([known.values[m][key] for m in members], generators)
        if not np.isfinite(values).all():
            found.append((key, known.notes.get(key, "a generator has no such figure")))
        elif (values == values[:, :1]).all(axis=1).any():
            found.append((key, "the same for every generator"))
        else:
            usable.append((key, values))
    noted = [blank | key._asdict() | {"circular": _circular(told, key), "note": why} for key, why in found]
    if not usable:
        return noted
    metrics = np.stack([values for _, values in usable], axis=1)
    result = pooled(metrics, outcome)
    without = result.range_without_one()
    names = [key for key, _ in usable]
    length = next((k for k, key in enumerate(names) if key.metric == "response_length"), None)
    given = None if length is None else partial(metrics, outcome, metrics[:, length])
    out = []
    for k, key in enumerate(names):
        row = blank | key._asdict() | {"circular": _circular(told, key)}
        row |= {"rho": result.rho[k], "rho_low": result.low[k], "rho_high": result.high[k]}
        row |= {"without_one_low": without[0][k], "without_one_high": without[1][k]}
        row["given_length"] = None if given is None else _plain(float(given[k]))
        row |= _against_car(result, k, names)
        out.append(row)
    return [*out, *noted]


def _against_car(result: Pooled, k: int, names: Sequence[Key]) -> dict[str, float]:
    """The difference from CAR of the same reward model, or of the first one for what has none."""
    cars = [i for i, key in enumerate(names) if key.metric == "car" and key.beta == BETA]
    own = [i for i in cars if names[k].reward_model in (None, names[i].reward_model)]
    if not own or own[0] == k:
        return {}
    d, low, high = result.difference(k, own[0])
    return {
        "less_car": float(d),
        "less_car_low": float(low),
        "less_car_high": float(high),
        "smallest_difference": float(result.smallest_difference(k, own[0])),
    }


def _best_betas(
    outcome: str, members: Sequence[str], means: Mapping[str, Mapping[str, float]], known: Figures
) -> list[dict[str, Any]]:
    if not members:
        return []
    generators = _common(members, means, known)
    found = []
    for reward_model in dict.fromkeys(key.reward_model for key in known.values[members[0]] if key.metric == "car"):
        keys = [key for key in known.values[members[0]] if (key.metric, key.reward_model) == ("car", reward_model)]
        keys = [key for key in keys if all(key in known.values[m] for m in members)]
        keys.sort(key=lambda key: key.beta or 0.0)
        if len(generators) < MIN_GENERATORS or len(keys) < 2:
            continue
        values = np.stack([_matrix([known.values[m][key] for m in members], generators) for key in keys], axis=1)
        results = _matrix([means[m] for m in members], _theirs(generators, means[members[0]]))
        if not np.isfinite(values).all() or (results == results[:, :1]).all():
            continue
        best, shares = best_of(values, results)
        total = np.cumsum(shares)
        found.append(
            {
                "outcome": outcome,
                "reward_model": reward_model,
                "best": keys[best].beta,
                "low": keys[int(np.searchsorted(total, 0.025))].beta,
                "high": keys[min(int(np.searchsorted(total, 0.975)), len(keys) - 1)].beta,
                "shares": shares.tolist(),
            }
        )
    return found


def _figures(table: pa.Table) -> Figures:
    """Of a long table; a metric that reads no base model has its figures under every base model."""
    assert table.schema.names == FIGURES_SCHEMA.names
    records = table.to_pylist()
    bases = tuple(dict.fromkeys(r["base_model"] for r in records if r["base_model"] is not None))
    if not bases:
        raise UsageError("the run has no losses of a base model: fastcompat score --base-model, then study show")
    values: dict[str, dict[Key, dict[str, float]]] = {base: {} for base in bases}
    notes: dict[Key, str] = {}
    for row in records:
        key = Key(row["metric"], row["reward_model"], row["beta"])
        if row["note"]:
            notes.setdefault(key, row["note"])
        figure = np.nan if row["value"] is None else row["value"]
        if METRICS[row["metric"]].lower_is_better:
            figure = -figure
        for base in bases if row["base_model"] is None else (row["base_model"],):
            values[base].setdefault(key, {})[row["generator"]] = figure
    return Figures(bases, tuple(dict.fromkeys(r["generator"] for r in records)), values, notes)


def partners_in(scores: pa.Table, source: str, base_model: str | None) -> tuple[str, str]:
    """(the run's base model, its name in the study) to compare. UsageError where several are and none is named."""
    ours = [name for name in pc.unique(scores["base_model"]).to_pylist() if name is not None]
    if base_model is not None:
        ours = [name for name in ours if name == base_model]
        if not ours:
            raise UsageError(f"--base-model {base_model}: not in the scores")
    found = _partners(ours, pc.unique(read_outcomes(source)["base_model"]).to_pylist())
    if len(found) > 1:
        raise UsageError(
            f"{source} has outcomes of {', '.join(found)}: name one with --base-model; fastcompat study show has all"
        )
    return next(iter(found.items()))


def _partners(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """The run's base models -> the study's, by name; a run may say settings behind it ("model · dtype float32")."""
    found = {name: name.split(" · ")[0] for name in ours if name.split(" · ")[0] in theirs}
    if not found:
        raise UsageError(
            f"the run has scores of {', '.join(ours)}, the study trained {', '.join(theirs)}: "
            "score the run with the study's base models (fastcompat score --base-model)"
        )
    return found


def _common(members: Sequence[str], means: Mapping[str, Mapping[str, float]], known: Figures) -> list[str]:
    """Our names of the generators that have an outcome under all of these base models."""
    there = [name for name in means[members[0]] if all(name in means[m] for m in members)]
    return list(match_generators(known.generators, there))


def _theirs(generators: Sequence[str], outcome: Mapping[str, float]) -> list[str]:
    partners = match_generators(generators, list(outcome))
    return [partners[name] for name in generators]


def _matrix(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> FloatArray:
    """[B, G]."""
    return np.array([[row.get(name, np.nan) for name in names] for row in rows], np.float64)


def _circular(told: Mapping[str, Any], key: Key) -> bool:
    """Whether the metric reads the reward model that judged."""
    judge = told["reward_model"]
    return key.reward_model is not None and judge is not None and key.reward_model.split(" · ")[0] == judge


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None
