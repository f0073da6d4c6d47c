"""Which metric predicts what training will bring: Spearman's rho of each with an outcome, per generator. No torch.

    table = validate(run.scores(), outcomes("paper:Qwen2.5-3B"))      # or outcomes("trained.csv")

Signs are those of the metrics as they are, as in the paper's Table 4: of a metric where lower is better (loss,
perplexity), rho near -1 is as good as near 1 of the others. Nothing is negated; `lower_is_better` is a column.

Dimension key: G generators.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastcompat.decisions.validation import paper
from fastcompat.decisions.validation.correlation import MAX_EXACT, permutation_p, rho_interval, spearman
from fastcompat.decisions.validation.outcomes import METADATA_KEY, match_generators, outcomes, outcomes_in
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA, METRICS, checked_betas, compute_by_group, metric_names, missing
from fastcompat.rows import as_table, is_scored, only, paired

# Of three generators even a perfect rho has p = 1/3.
MIN_GENERATORS = 4

# One metric of one generator under one pair of models; the columns that a metric does not read are null.
_SERIES = [("metric", pa.string()), ("base_model", pa.string()), ("reward_model", pa.string()), ("beta", pa.float64())]
FIGURES_SCHEMA = pa.schema(
    [*_SERIES, ("generator", pa.string()), ("value", pa.float64()), ("n", pa.int64()), ("note", pa.string())]
)
VALIDATION_SCHEMA = pa.schema(
    [
        *_SERIES,
        ("n", pa.int64()),
        ("rho", pa.float64()),
        ("rho_low", pa.float64()),
        ("rho_high", pa.float64()),
        ("p", pa.float64()),
        ("lower_is_better", pa.bool_()),
        ("table4", pa.string()),
        ("published", pa.float64()),
        ("note", pa.string()),
    ]
)
# The order of Table 4, with what it has not in between.
_FIRST = ("reward", "ifd_loss", "ifd_ppl", "perplexity", "response_length")
_ORDER = (*_FIRST, *(name for name in METRICS if name not in (*_FIRST, "car")), "car")

Series = tuple[str, str | None, str | None, float | None]


def generator_metrics(
    scores: Any,
    *,
    metrics: str | Sequence[str] | None = None,
    betas: float | Sequence[float] = BETA,
    reward_shift: float = 0.0,
    by: str = "generator",
    base_model: str | None = None,
    reward_model: str | None = None,
) -> pa.Table:
    """Every metric of every generator: `FIGURES_SCHEMA`, one row per metric, models it reads, beta and generator.

    scores: any frame that `pairing.paired` takes; with several models CAR is there for every pair. metrics: names, or
    all that the scores have what it takes for. base_model, reward_model: only these; all where none is named. Each
    figure is over all responses that carry it (`n`), whatever the other generators have; a row whose status says that
    it was not scored carries none. A metric that refuses the figures (CAR of negative rewards) has null values and the
    reason in `note`.

    Raises UsageError: no such column or metric, a null in `by`, a beta out of range.
    """
    betas = checked_betas(betas)
    table = as_table(scores)
    if by not in table.column_names:
        raise UsageError(f"no column {by!r} to group by; there are {', '.join(table.column_names)}")
    table = only(table, base_model=base_model, reward_model=reward_model)
    if table[by].null_count:
        raise UsageError(f"column {by} is null in {table[by].null_count:,} rows; name the generator of each")
    asked = None if metrics is None else metric_names(metrics if isinstance(metrics, str) else ",".join(metrics))
    columns: dict[Series, pa.Table] = {}
    lacking: dict[str, str] = {}
    for base_model, reward_model, rows in _pairs(table, by):
        some, every = rows["loss"].null_count < rows.num_rows, not rows["loss"].null_count
        scored = rows.filter(rows["loss"].is_valid()) if some and not every else rows
        for name in asked or _ORDER:
            metric = METRICS[name]
            of_base, of_reward = set(metric.needs) != {"reward"}, "reward" in metric.needs
            if of_base and base_model is None and reward_model is not None and not some:
                lacking.setdefault(name, f"{name} needs the rows of a base model: `fastcompat score --base-model`")
                continue  # a reward model's own tokens are those of the whole conversation
            own = scored if of_base else rows
            if (why := missing(name, own)) is not None:
                lacking.setdefault(name, why)
                continue
            models = (base_model if of_base else None, reward_model if of_reward else None)
            for beta in betas if "beta" in metric.settings else (None,):
                series = (name, *models, beta)
                if series not in columns:
                    settings = {} if beta is None else {"beta": beta, "reward_shift": reward_shift}
                    columns[series] = _figures(series, own, by, settings)
    absent = [lacking[name] for name in asked or () if not any(series[0] == name for series in columns)]
    if absent or not columns:
        raise UsageError("; ".join(absent) or "the scores have what no metric needs")
    ordered = sorted(columns, key=lambda series: _ORDER.index(series[0]))
    return pa.concat_tables([columns[series] for series in ordered])


def validate(
    scores: Any,
    against: Any,
    *,
    metrics: str | Sequence[str] | None = None,
    betas: float | Sequence[float] = BETA,
    reward_shift: float = 0.0,
    by: str = "generator",
    base_model: str | None = None,
    reward_model: str | None = None,
    permutations: int = 99_999,
    seed: int = 0,
) -> pa.Table:
    """Spearman's rho of every metric with the outcome: `VALIDATION_SCHEMA`, in the order of the paper's Table 4.

    scores: what `generator_metrics` takes, or what it gives. against: `outcomes`, what it takes, or a frame of such
    columns. `p` is two-sided, by permutation (`correlation.permutation_p`); `rho_low` and `rho_high` are the 95%
    interval for other generators like these (`correlation.rho_interval`): wide, with the paper's 19 too, and null
    where rho is 1 or -1. No p is corrected for the number of metrics. `published` is the figure in Table 4, column
    `table4`, where outcomes are the paper's. rho is null, with the reason in `note`, for a metric that fewer than four
    generators have, or that is the same for all.

    Generators are matched by name (`match_generators`); who has no partner counts nowhere and is listed by `notes`.
    Raises UsageError: fewer than four generators on both sides, one outcome for all, an ambiguous name, a beta or a
    number of permutations out of range.
    """
    if isinstance(against, str | os.PathLike):
        against = outcomes(against)
    elif METADATA_KEY not in ((against := as_table(against)).schema.metadata or {}):
        against = outcomes_in(against.to_pylist(), "the table of outcomes")
    figures = scores if isinstance(scores, pa.Table) and scores.schema.names == FIGURES_SCHEMA.names else None
    if figures is not None:
        # A metric that reads no such model has none.
        figures = only(figures, base_model=base_model, reward_model=reward_model, of_neither=True)
    else:
        figures = generator_metrics(
            scores,
            metrics=metrics,
            betas=betas,
            reward_shift=reward_shift,
            by=by,
            base_model=base_model,
            reward_model=reward_model,
        )
    told = json.loads(against.schema.metadata[METADATA_KEY])
    ours, theirs = pc.unique(figures["generator"]).to_pylist(), against["generator"].to_pylist()
    matched = match_generators(ours, theirs)
    told |= {
        "matched": matched,
        "only_in_scores": [name for name in ours if name not in matched],
        "only_in_outcomes": [name for name in theirs if name not in matched.values()],
    }
    if len(matched) < MIN_GENERATORS:
        raise UsageError(
            f"{len(matched)} generators have both scores and an outcome; rank correlation needs at least "
            f"{MIN_GENERATORS}. {' '.join(unmatched(told))}".strip()
        )
    by_name = dict(zip(theirs, against["outcome"].to_pylist(), strict=True))
    outcome = np.array([by_name[name] for name in matched.values()])
    if (outcome == outcome[0]).all():
        raise UsageError(f"every generator's outcome is {outcome[0]:g}: there is nothing to correlate with")
    told |= {"permutations": permutations, "seed": seed}
    rows: dict[Series, dict[str, Any]] = {}
    alike: dict[bytes, dict[Series, NDArray[np.float64]]] = {}
    for series, values, note in _by_series(figures, list(matched)):
        known = np.isfinite(values)
        rows[series] = _row(series, told.get("base_model"), int(known.sum()), note)
        if known.sum() < MIN_GENERATORS:
            rows[series]["note"] = note or f"only {known.sum()} generators have it"
        else:
            # Metrics that the same generators have share permutations.
            alike.setdefault(known.tobytes(), {})[series] = values
    for mask, group in alike.items():
        known = np.frombuffer(mask, bool)
        own, against_it = np.stack(list(group.values()))[:, known], outcome[known]
        rho = spearman(own, against_it)
        p = permutation_p(own, against_it, permutations=permutations, seed=seed)
        low, high = rho_interval(rho, int(known.sum()))
        for series, *found in zip(group, rho, low, high, p, strict=True):
            if math.isnan(found[0]):
                rows[series]["note"] = "the same for every generator"
            else:
                plain = (None if math.isnan(figure) else float(figure) for figure in found)
                rows[series] |= dict(zip(("rho", "rho_low", "rho_high", "p"), plain, strict=True))
    schema = VALIDATION_SCHEMA.with_metadata({METADATA_KEY: json.dumps(told).encode()})
    return pa.Table.from_pylist(list(rows.values()), schema)


def notes(table: pa.Table) -> list[str]:
    """What a reader of `validate`'s table must know, a sentence each: who is in it, and what p and signs are."""
    told = json.loads(table.schema.metadata[METADATA_KEY])
    n = len(told["matched"])
    against = f"{told['outcome']} in {told['source']}"
    if "trained" in told:
        against = f"{told['outcome']} of {told['trained']}, mean over training seeds, in {told['source']}"
    kind = (
        f"all {math.factorial(n):,} permutations" if n <= MAX_EXACT else f"{told['permutations']:,} random permutations"
    )
    lines = [
        f"Spearman's rho over {n} generators with {against}; p two-sided by {kind}, for each metric alone.",
        "95% intervals (Bonett and Wright): other generators like these, not other responses; none at 1 and -1.",
        *unmatched(told),
    ]
    if any(table["lower_is_better"].to_pylist()):
        lower = pc.unique(table.filter(table["lower_is_better"])["metric"]).to_pylist()
        lines.append(
            f"Nothing is negated: lower is better of {', '.join(lower)}, so there a rho near -1 predicts well."
        )
    if pc.any(table["published"].is_valid()).as_py():
        lines.append(
            "Published figures: Table 4 of arXiv 2411.07133, whose beta, template and averaging are not known."
        )
    return lines


def formatted(table: pa.Table) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows of cells as text) of `validate`'s table, for a terminal or Markdown."""
    several = [name for name in ("base_model", "reward_model") if pc.count_distinct(table[name]).as_py() > 1]
    paper_too = pc.any(table["published"].is_valid()).as_py()
    noted = pc.any(table["note"].is_valid()).as_py()
    header = ["metric", *(name.replace("_", " ") for name in several), "rho", "95% interval", "p"]
    header += [*(["published"] if paper_too else []), "generators", *(["note"] if noted else [])]
    rows = []
    for row in table.to_pylist():
        cells = [row["metric"] if row["beta"] is None else f"{row['metric']}, beta {row['beta']:g}"]
        cells += [row[name] or "" for name in several]
        known = row["rho"] is not None
        interval = f"{row['rho_low']:.2f} to {row['rho_high']:.2f}" if known and row["rho_low"] is not None else ""
        cells += [f"{row['rho']:.4f}" if known else "none", interval, p_text(row["p"])]
        cells += [("" if row["published"] is None else f"{row['published']:.4f}")] if paper_too else []
        rows.append([*cells, str(row["n"]), *([row["note"] or ""] if noted else [])])
    return header, rows


def p_text(p: float | None) -> str:
    """A p to two digits."""
    return "" if p is None else f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"


def unmatched(told: Mapping[str, Any]) -> list[str]:
    """Sentences on the generators without a partner; `told` is the metadata of `validate`'s table."""
    lines = []
    for key, where in (("only_in_scores", "Without an outcome"), ("only_in_outcomes", "Without scores")):
        if told[key]:
            lines.append(f"{where}, left out: {', '.join(told[key])}.")
    return lines


def _row(series: Series, of: str | None, n: int, note: str | None) -> dict[str, Any]:
    metric, base_model, reward_model, beta = series
    column = paper.table4_column(metric, base_model, reward_model, of) if of else None
    return {
        "metric": metric,
        "base_model": base_model,
        "reward_model": reward_model,
        "beta": beta,
        "n": n,
        "lower_is_better": METRICS[metric].lower_is_better,
        "table4": column,
        "published": paper.published(of)[column] if of and column else None,
        "note": note,
    }


def _by_series(figures: pa.Table, generators: list[str]) -> Iterator[tuple[Series, NDArray[np.float64], str | None]]:
    """Every series of the table with its values for these generators, NaN where it has none."""
    place = {name: k for k, name in enumerate(generators)}
    found: dict[Series, tuple[NDArray[np.float64], list[str]]] = {}
    for row in figures.to_pylist():
        series: Series = (row["metric"], row["base_model"], row["reward_model"], row["beta"])
        values, reasons = found.setdefault(series, (np.full(len(generators), np.nan), []))
        if row["generator"] in place and row["value"] is not None:
            values[place[row["generator"]]] = row["value"]
        reasons += [row["note"]] if row["note"] else []
    for series, (values, reasons) in found.items():
        yield series, values, reasons[0] if reasons else None


def _pairs(table: pa.Table, by: str) -> Iterator[tuple[str | None, str | None, pa.Table]]:
    """Paired rows of each base model and reward model in turn: all pairs at once would not fit into memory.

    Other than with `rows.by_pair`, rows that name no model are no pair of their own where others name one.
    """
    if "status" in table.column_names:
        scored = pc.or_(table["status"].is_null(), is_scored(table["status"]))
        table = table if pc.all(scored).as_py() else table.filter(scored)
    # What no metric reads is wide, and costs seconds to filter.
    unread = {"source", "row_index", "prompt_id", "status", "detail"} - {by}
    table = table.drop_columns([name for name in table.column_names if name in unread])
    if {"base_model", "reward_model"} <= set(table.column_names):
        of_base, of_reward = table["base_model"].is_valid(), table["reward_model"].is_valid()
        alone = (pc.and_not(of_base, of_reward), pc.and_not(of_reward, of_base))
        if all(pc.any(rows).as_py() for rows in alone):
            for base_model in _models(table, "base_model"):
                for reward_model in _models(table, "reward_model"):
                    either = pc.or_kleene(
                        pc.equal(table["base_model"], base_model), pc.equal(table["reward_model"], reward_model)
                    )
                    own = table if pc.all(pc.fill_null(either, False)).as_py() else table.filter(either)
                    yield base_model, reward_model, _paired(own, by)
            return
    rows = _paired(table, by)
    for base_model in _models(rows, "base_model"):
        of_one = rows if base_model is None else rows.filter(pc.equal(rows["base_model"], base_model))
        for reward_model in _models(of_one, "reward_model"):
            of_pair = of_one if reward_model is None else of_one.filter(pc.equal(of_one["reward_model"], reward_model))
            yield base_model, reward_model, of_pair


def _paired(table: pa.Table, by: str) -> pa.Table:
    """`paired`, and of its columns those that are read here."""
    rows = paired(table)
    read = {by, "base_model", "reward_model", "loss", *(name for metric in METRICS.values() for name in metric.needs)}
    return rows.select([name for name in rows.column_names if name in read])


def _models(table: pa.Table, column: str) -> list[str | None]:
    """Those that are named; one None where none is."""
    return [name for name in pc.unique(table[column]).to_pylist() if name is not None] or [None]


def _figures(series: Series, rows: pa.Table, by: str, settings: Mapping[str, float | None]) -> pa.Table:
    """One series of `FIGURES_SCHEMA`."""
    groups = rows[by].cast(pa.string()).combine_chunks().dictionary_encode()
    names = groups.dictionary.to_pylist()
    group = groups.indices.to_numpy(zero_copy_only=False)
    carries = np.logical_and.reduce([rows[name].is_valid().to_numpy() for name in METRICS[series[0]].needs])
    note = None
    try:
        values = compute_by_group(series[0], rows, group, len(names), **settings)
    except UsageError as error:
        values, note = np.full(len(names), np.nan), str(error)
    figures = {name: [value] * len(names) for name, value in zip(FIGURES_SCHEMA.names, series, strict=False)}
    figures |= {
        "generator": names,
        "value": [float(value) if np.isfinite(value) else None for value in values],
        "n": np.bincount(group[carries], minlength=len(names)).tolist(),
        "note": [note] * len(names),
    }
    return pa.table(figures, FIGURES_SCHEMA)
