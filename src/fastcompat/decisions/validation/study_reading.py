"""A study's tables as people read them: cells of text, and the sentences that go with them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.validation.several_base_models import smallest_rho
from fastcompat.metrics import BETA, METRICS


class Section(NamedTuple):
    """A title, a table and what is said under it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def outcome_section(table: pa.Table) -> Section:
    """How good each outcome is."""
    header = ["outcome", "base model", "generators", "seeds", "lowest", "highest", "reliability", "ceiling of rho"]
    biased = pc.any(table["length_bias"].is_valid()).as_py()
    failed = pc.sum(table["failed"]).as_py()
    header += [*(["longer answer won"] if biased else []), *(["failed"] if failed else []), "judge"]
    rows = []
    for row in table.to_pylist():
        cells = [row["outcome"], row["base_model"], str(row["generators"]), str(row["seeds"])]
        cells += [_figure(row["lowest"]), _figure(row["highest"])]
        none = "one seed" if row["seeds"] < 2 else "none"
        cells += [none if row["reliability"] is None else f"{row['reliability']:.2f}", _rho(row["ceiling"])]
        cells += [("" if row["length_bias"] is None else f"{row['length_bias']:.0%}")] if biased else []
        cells += [str(row["failed"] or "")] if failed else []
        judge = row["reward_model"] or ""
        rows.append([*cells, f"{judge} (circular)" if row["circular"] else judge])
    notes = [
        "Lowest and highest: means over seeds of the generators. Reliability: ICC(1, k) of the mean over seeds, the "
        "share of the generators' differences that other seeds would give again; its square root is the highest rho "
        "that any metric can be expected to have.",
    ]
    if pc.any(table["circular"]).as_py():
        notes.append("Circular: judged by a reward model whose rewards the run's metrics read.")
    return Section("What training gave", header, rows, notes)


def sections(table: pa.Table, betas: pa.Table, *, of_car: Sequence[float] = ()) -> Iterator[Section]:
    """One for each outcome: every metric over all base models, and under each. of_car: betas of CAR beside 3."""
    table = table.filter(pc.or_kleene(table["beta"].is_null(), pc.is_in(table["beta"], pa.array([BETA, *of_car]))))
    best = {(row["outcome"], row["reward_model"]): row for row in betas.to_pylist()}
    for outcome in pc.unique(table["outcome"]).to_pylist():
        own = table.filter(pc.equal(table["outcome"], outcome)).to_pylist()
        bases = list(dict.fromkeys(row["base_model"] for row in own))
        if all(row["rho"] is None for row in own) and len({row["note"] for row in own}) == 1:
            yield Section(outcome, ["metric", "rho"], [["any", "none"]], [f"{own[0]['note']}.".capitalize()])
            continue
        several = len({row["reward_model"] for row in own if row["reward_model"]}) > 1
        by_metric: dict[str, dict[str | None, dict[str, Any]]] = {}
        for row in own:
            by_metric.setdefault(_name(row, several), {})[row["base_model"]] = row
        header = ["metric", "rho", "95% interval", "without one", "given length", "less CAR", "95% interval", "power"]
        header += [str(name) for name in bases[1:]] if bases[0] is None else []
        ordered = sorted(by_metric.items(), key=lambda item: -_or_least(item[1][bases[0]]["rho"]))
        rows = [_cells(name, by_base, bases) for name, by_base in ordered]
        where = "mean over base models" if bases[0] is None else str(bases[0])
        yield Section(f"{outcome}, {where}", header, rows, _notes(own, best, outcome))


def closing_notes() -> list[str]:
    """What a reader of all these tables must know."""
    lower = ", ".join(name for name, metric in METRICS.items() if metric.lower_is_better)
    return [
        f"Turned so that more is better, outcomes too: {lower} count as their negatives. Near 1 predicts well.",
        "Intervals: Bonett and Wright's of one base model, for other generators like these; base models, which share "
        "the generators, make them no narrower, and the noise of training seeds is in them. Differences from CAR with "
        "beta 3: Zou's of paired intervals. Nothing is corrected for the number of metrics.",
        "Without one: the lowest and highest rho with one generator left out. Power: the difference from CAR that "
        "would have been found in four of five such studies.",
    ]


def _notes(own: list[dict[str, Any]], best: Mapping[tuple[str, str | None], dict[str, Any]], outcome: str) -> list[str]:
    n = max(row["n"] for row in own)
    notes = [f"{n} generators: a rho of {smallest_rho(n):.2f} would have been told from 0 in four of five studies."]
    for (of, reward_model), row in best.items():
        if of == outcome:
            judge = f" with {reward_model}" if reward_model else ""
            notes.append(
                f"Best beta{judge}: {row['best']:g}; over generators drawn with replacement from {row['low']:g} to "
                f"{row['high']:g} in 95%."
            )
    if any(row["circular"] for row in own):
        notes.append("(circular): the metric reads the reward model that judged.")
    return notes


def _name(row: Mapping[str, Any], several: bool) -> str:
    name = str(row["metric"]) if row["beta"] is None else f"{row['metric']}, beta {row['beta']:g}"
    name += f", {row['reward_model']}" if several and row["reward_model"] else ""
    return name + (" (circular)" if row["circular"] else "")


def _cells(name: str, by_base: Mapping[str | None, dict[str, Any]], bases: list[str | None]) -> list[str]:
    row = by_base[bases[0]]
    if row["rho"] is None:
        cells = [name, "none", row["note"] or "", *[""] * 5]
    else:
        cells = [name, _rho(row["rho"]), _span(row, "rho"), _span(row, "without_one"), _rho(row["given_length"])]
        cells += [_signed(row["less_car"]), _span(row, "less_car"), _rho(row["smallest_difference"])]
    for base in bases[1:] if bases[0] is None else []:
        one = by_base.get(base)
        known = one is not None and one["rho"] is not None
        cells.append(f"{_rho(one['rho'])} ({_span(one, 'rho')})" if known and one else "none")
    return cells


def _or_least(rho: float | None) -> float:
    return -2.0 if rho is None else rho


def _span(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f"{low:.2f} to {high:.2f}"


def _rho(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
