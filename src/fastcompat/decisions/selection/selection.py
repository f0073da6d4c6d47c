"""The responses to train on: the best of every prompt, by any metric or a mixture. No torch.

Dimension key: N rows (responses), E eligible rows, P prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastcompat.decisions.selection.generators import only_of, refuse_raced
from fastcompat.decisions.selection.settings import MIXTURE, SelectionSettings
from fastcompat.errors import UsageError
from fastcompat.metrics import ALIASES, BETA, METRICS, compute, missing, with_reference
from fastcompat.rows import (
    MISSING,
    SCORED_STATUSES,
    FloatArray,
    IntArray,
    Message,
    as_table,
    is_long,
    only,
    paired,
    spoken,
)
from fastcompat.store import Run

# Schema metadata of a selection: its settings and counts as JSON, for the card.
METADATA_KEY = b"fastcompat.selection"


def select(
    scores: Any,
    *,
    by: str | Mapping[str, float] = "car",
    beta: float = BETA,
    reward_shift: float = 0.0,
    top: int | None = None,
    threshold: float | None = None,
    budget: int | None = None,
    min_tokens: int | None = None,
    max_tokens: int | None = None,
    drop_duplicates: bool = True,
    generators: Sequence[str] | None = None,
    base_model: str | None = None,
    reward_model: str | None = None,
) -> pa.Table:
    """The rows of the best responses, in the order of `scores`, with the metrics' values and `rank` in the prompt.

    scores: a `Run`, or any frame that `pairing.as_table` takes: `Run.scores()`, or one with `prompt_id`, and `loss`
        and `reward` or whatever the metrics need. All its columns are kept, those that `SCORES_SCHEMA` names in its
        types, but `row_key` and `prompt_id` in their own.
    by: a metric (`metrics.METRICS`), or metrics with weights. A mixture is the weighted mean of percentiles: the share
        of the responses that have every metric that this one is better than, ties counted half; between 0 and 1, column
        `mixture`. Of `excess_loss` the reference is the other base model, where there are two.
    beta, reward_shift: a response's CAR is (reward + reward_shift) / (1 + beta * loss).
    top: responses of one prompt at most; 1, but no limit where there is a threshold.
    threshold: only responses at least that good, in the metric's own unit: at most that, where lower is better.
    budget: only so many prompts, those with the best best response.
    min_tokens, max_tokens: only responses of that many tokens of the base model, both ends included.
    drop_duplicates: of equal responses to one prompt only the best counts. Needs the column `response` or `response_id`
        in a frame, where several of a prompt can be chosen; a run has the texts.
    generators: only their responses; all where none is named.
    base_model, reward_model: whose figures, where there are several.

    A run that a race stopped has figures of a few prompts only, and of some generators of fewer still: nothing is
    chosen from it but what has been scored since of all `generators`.

    A row is never chosen whose value is null, NaN or infinite, or whose status says that it could not be scored, nor
    one whose metric is above `Metric.valid_at_most`: an IFD above 1, where the prompt makes the response harder. Of
    equal values the one with the lower loss goes first, then the one whose `row_key` is first as text. `rank` counts
    from 1 among what the guards leave of a prompt. The schema's metadata (`METADATA_KEY`) has the settings, and counts
    every row that is left out under one reason.

    Raises UsageError: an unknown metric or one that the table cannot give, rewards for which CAR has no meaning (not
    above 0 after the shift), several models and none named, a column of one's own where one is written (`car`, `rank`),
    or nothing left to choose.
    """
    settings = SelectionSettings(
        by=by,
        beta=beta,
        reward_shift=reward_shift,
        top=top,
        threshold=threshold,
        budget=budget,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        drop_duplicates=drop_duplicates,
        generators=None if generators is None else tuple(generators),
        base_model=base_model,
        reward_model=reward_model,
    )
    if isinstance(scores, Run):
        refuse_raced(scores, settings.generators)
        table = scores.scores()
        if not table.num_rows:
            scores.refuse_unscored()
    else:
        table = as_table(scores)
    if settings.generators is not None:
        table = only_of(table, settings.generators)
    if "prompt_id" not in table.column_names and settings.per_prompt is not None:
        raise UsageError("the best of every prompt needs a column prompt_id; without one, choose with threshold")
    _check_metrics(settings.weights, table)
    table = _without_former(table, settings)
    types = {name: table.schema.field(name).type for name in ("row_key", "prompt_id") if name in table.column_names}
    reference = _reference(table, settings)
    table = _one_pair(with_reference(table, reference) if reference else table, settings)
    responses = None
    if settings.drop_duplicates and settings.per_prompt != 1:  # else the best of a prompt is its only one
        responses = _run_responses(scores, table) if isinstance(scores, Run) else _frame_responses(table)
    chosen, record = _select(table, settings, responses)
    for name, type_ in types.items():
        chosen = _with_column(chosen, name, chosen[name].cast(type_))
    return chosen.replace_schema_metadata({METADATA_KEY: json.dumps(record | {"reference": reference})})


def _check_metrics(names: Iterable[str], table: pa.Table) -> None:
    """Raises UsageError for a metric that there is not, with those that the table can give."""
    for name in names:
        if name in ALIASES:
            raise UsageError(f"{name} stands for {' and '.join(ALIASES[name])}: name one of them")
        if name not in METRICS:
            rows = paired(table)
            there = [known for known in METRICS if missing(known, rows) is None]
            raise UsageError(f"{name!r} is no metric; these scores have {', '.join(there)}")


def _without_former(table: pa.Table, settings: SelectionSettings) -> pa.Table:
    """`table` without what an earlier `select` wrote and this one writes. UsageError where it is somebody else's."""
    written = dict.fromkeys((*settings.weights, settings.value_column, "rank"))
    there = [
        name
        for name in written
        if name in table.column_names and not (name in METRICS and METRICS[name].figures == (name,))
    ]
    if there and METADATA_KEY not in (table.schema.metadata or {}):
        raise UsageError(f"select writes {' and '.join(there)}, and the scores have such columns: rename or drop them")
    return table.drop_columns(there)


def _reference(table: pa.Table, settings: SelectionSettings) -> str | None:
    """The other base model of two, where `excess_loss` needs one."""
    names = set(table.column_names)
    if "excess_loss" not in settings.weights or "reference_loss" in names or "base_model" not in names:
        return None
    models: list[str] = pc.unique(table["base_model"].drop_null()).to_pylist()
    others = [name for name in models if name != settings.base_model]
    if len(models) < 2 or settings.base_model not in (None, *models):
        return None  # what is lacking is said where it is read
    if settings.base_model is None:
        raise UsageError(
            f"excess_loss: of the base models {', '.join(models)} name the one to teach with --base-model "
            "(in Python base_model=); the other is the reference"
        )
    if len(others) > 1:
        raise UsageError(
            f"excess_loss: beside {settings.base_model} there are {', '.join(others)}, and one is the reference; "
            "in Python pass metrics.with_reference(run.scores(), REFERENCE)"
        )
    return others[0]


def _metric(name: str, table: pa.Table, settings: SelectionSettings, scored: NDArray[np.bool_]) -> FloatArray:
    """[N] the metric of every row; NaN where it has none, or is not scored."""
    own = {key: value for key, value in settings.of_metrics.items() if key in METRICS[name].settings}
    value = np.full(table.num_rows, np.nan)
    value[scored] = compute(name, table.filter(pa.array(scored)), **own)
    return value


def _one_pair(table: pa.Table, settings: SelectionSettings) -> pa.Table:
    """The paired rows of the one base model and the one reward model that are meant."""
    table = only(table, base_model=settings.base_model, reward_model=settings.reward_model)
    needs = {column for name in settings.weights for column in METRICS[name].needs}
    if "reward" not in needs and is_long(table, "base_model"):
        table = table.filter(table["base_model"].is_valid())
    table = paired(table)
    for column in ("base_model", "reward_model"):
        models = pc.unique(table[column].drop_null()).to_pylist()
        if len(models) > 1:
            raise UsageError(
                f"scores of {len(models)} {column.replace('_', ' ')}s ({', '.join(models)}): "
                f"choose one with --{column.replace('_', '-')} (in Python {column}=)"
            )
    return table


def _select(
    table: pa.Table, settings: SelectionSettings, responses: pa.ChunkedArray | None
) -> tuple[pa.Table, dict[str, Any]]:
    """`select` on paired rows of one pair of models, and its record; `responses` [N] tells equal texts apart."""
    reasons = _Reasons(table.num_rows)
    status = pc.fill_null(table["status"], "ok")
    # A figure that one model lacks does not matter where the metric does not need it.
    scored = pc.is_in(status, pa.array([*map(str, SCORED_STATUSES), MISSING])).to_numpy(zero_copy_only=False)
    for entry in status.filter(pa.array(~scored)).value_counts().to_pylist():
        is_that = pc.equal(status, entry["values"]).to_numpy(zero_copy_only=False)
        reasons.leave_out(is_that, f"not scored: {entry['values']}")
    values = {name: _metric(name, table, settings, scored) for name in settings.weights}
    for name, value in values.items():
        reasons.leave_out(~np.isfinite(value), f"no {name}")
    with_value = reasons.left.copy()
    for name, value in values.items():
        if (limit := METRICS[name].valid_at_most) is not None:
            reasons.leave_out(value > limit, f"{name} above {limit:g}: {METRICS[name].why_at_most}")
    sign = {name: -1 if METRICS[name].lower_is_better else 1 for name in values} | {MIXTURE: 1}
    better = {name: sign[name] * value for name, value in values.items()}  # higher is better
    if settings.is_mixture:
        values[MIXTURE] = better[MIXTURE] = _mixture(better, settings.weights, reasons.left)
    value = better[settings.value_column]  # [N]
    _apply_length_guards(table, settings, reasons)

    prompt = _codes(table["prompt_id"])  # [N]
    reasons.leave_out(prompt < 0, "no prompt_id")
    eligible = np.flatnonzero(reasons.left)
    loss = table["loss"].to_numpy(zero_copy_only=False)
    order = eligible[_best_first(value[eligible], loss[eligible], table["row_key"].take(eligible), prompt[eligible])]
    if responses is not None:
        order = _without_duplicates(order, prompt, responses, reasons)
    firsts = np.flatnonzero(np.diff(prompt[order], prepend=-1))  # [P], positions in `order`
    rank = np.zeros(table.num_rows, np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(firsts, np.diff(np.append(firsts, len(order)))) + 1
    if settings.threshold is not None:
        name = settings.value_column
        side = "below" if sign[name] > 0 else "above"
        reasons.leave_out(value < sign[name] * settings.threshold, f"{name} {side} the threshold")
    if settings.per_prompt is not None:
        reasons.leave_out(rank > settings.per_prompt, f"not among the best {settings.per_prompt} of its prompt")
    if settings.budget is not None:
        best = order[firsts]
        best = best[reasons.left[best]]
        best = best[_best_first(value[best], loss[best], table["row_key"].take(best))]
        within = np.isin(prompt, prompt[best[: settings.budget]])
        reasons.leave_out(~within, "its prompt is beyond the budget")
    if not reasons.left.any():
        raise UsageError(f"nothing is chosen of {table.num_rows:,} rows: {reasons}")

    for name, column in values.items():
        table = _with_column(table, name, pa.array(column, from_pandas=True))
    table = _with_column(table, "rank", pa.array(rank, pa.int32()))
    chosen = table.filter(pa.array(reasons.left))
    record = {
        "settings": asdict(settings),
        "value": settings.value_column,
        "metrics": {name: "higher" if sign[name] > 0 else "lower" for name in settings.weights},
        "n_rows": table.num_rows,
        "n_prompts": int(prompt.max(initial=-1)) + 1,
        "available": _counts(table["generator"]),
        "with_value": _counts(table["generator"].filter(pa.array(with_value))),
        "left_out": reasons.counts,
    }
    return chosen, record


class _Reasons:
    """Which rows are left, and under what reason the others fell out: the first one that applied."""

    def __init__(self, n_rows: int) -> None:
        self.left = np.ones(n_rows, bool)
        self.counts: dict[str, int] = {}

    def leave_out(self, rows: NDArray[np.bool_], reason: str) -> None:
        out = rows & self.left
        if count := int(out.sum()):
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.left &= ~out

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items()) or "there are none"


def _mixture(better: Mapping[str, FloatArray], weights: Mapping[str, float], among: NDArray[np.bool_]) -> FloatArray:
    """[N] weighted mean of the metrics' percentiles among the rows `among`, NaN elsewhere."""
    out = np.full(len(among), np.nan)
    total = sum(weights.values())
    out[among] = sum(weight / total * _percentile(better[name][among]) for name, weight in weights.items())
    return out


def _percentile(values: FloatArray) -> FloatArray:
    """[E] share of the values that each is above, equal ones counted half."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    share: FloatArray = ((below + counts / 2) / len(values))[inverse]
    return share


def _apply_length_guards(table: pa.Table, settings: SelectionSettings, reasons: _Reasons) -> None:
    if settings.min_tokens is None and settings.max_tokens is None:
        return
    if table["n_tokens"].null_count == table.num_rows:
        raise UsageError("min_tokens and max_tokens need the column n_tokens: score with a base model")
    n_tokens = table["n_tokens"].to_numpy(zero_copy_only=False).astype(np.float64)  # null is NaN
    reasons.leave_out(np.isnan(n_tokens), "no token count")
    if settings.min_tokens is not None:
        reasons.leave_out(n_tokens < settings.min_tokens, f"fewer than {settings.min_tokens:,} tokens")
    if settings.max_tokens is not None:
        reasons.leave_out(n_tokens > settings.max_tokens, f"more than {settings.max_tokens:,} tokens")


def _best_first(
    value: FloatArray, loss: FloatArray, row_key: pa.ChunkedArray, prompt: IntArray | None = None
) -> IntArray:
    """[E] order by prompt, then the highest value, the lower loss, the row key that is first as text."""
    keys = (loss, -value) if prompt is None else (loss, -value, prompt)
    order = np.lexsort(keys)
    # Texts are slow to sort, and only rows that are equal in all else need it. A NaN equals NaN here: both are last.
    differs = np.zeros(max(len(order) - 1, 0), bool)
    for key in keys:
        at = key[order]
        differs |= ~((at[1:] == at[:-1]) | ((at[1:] != at[1:]) & (at[:-1] != at[:-1])))
    starts = np.concatenate([[True], differs])[: len(order)]
    tied = np.flatnonzero(~starts | ~np.append(starts[1:], True)[: len(order)])
    if len(tied):
        rows = order[tied]
        text = np.empty(len(rows), np.int64)
        text[pc.sort_indices(row_key.take(rows)).to_numpy()] = np.arange(len(rows))
        order[tied] = rows[np.lexsort((text, np.cumsum(starts)[tied]))]
    return order


def _without_duplicates(order: IntArray, prompt: IntArray, responses: pa.ChunkedArray, reasons: _Reasons) -> IntArray:
    """`order` with the first of equal responses to one prompt only; a null response equals nothing."""
    code = _codes(responses)
    known = order[code[order] >= 0]
    _, first = np.unique(prompt[known] * (code.max(initial=0) + 1) + code[known], return_index=True)
    repeated = np.zeros(len(prompt), bool)
    repeated[known] = True
    repeated[known[first]] = False
    reasons.leave_out(repeated, "equal to a better response to its prompt")
    return order[~repeated[order]]


def _frame_responses(table: pa.Table) -> pa.ChunkedArray:
    for name in ("response_id", "response"):
        if name in table.column_names:
            if not (pa.types.is_string(table[name].type) or pa.types.is_integer(table[name].type)):
                raise UsageError(f"column {name} is {table[name].type}: duplicates are found by texts or integers")
            return table[name]
    raise UsageError(
        "duplicates cannot be told without a column response or response_id: add one, or set drop_duplicates=False"
    )


def _run_responses(run: Run, table: pa.Table) -> pa.ChunkedArray:
    """[N] BLAKE2b-128 of each row's response, unit by unit."""
    keys, digests = [], []
    digest = partial(blake2b, digest_size=16)
    for unit in run.units:
        rows = run.unit_rows(unit, ["row_key", "messages"])
        messages = rows["messages"].combine_chunks()
        ends = messages.offsets.to_numpy().astype(np.int64)
        last = pa.array(ends[1:] - 1, mask=ends[1:] == ends[:-1])
        turns = messages.values.take(last).to_pylist()
        hashed = [None if turn is None else digest(spoken(Message(**turn)).encode()).digest() for turn in turns]
        keys.append(rows["row_key"])
        digests.append(pa.array(hashed, pa.binary(16)))
    all_keys = pa.chunked_array([chunk for key in keys for chunk in key.chunks], pa.string())
    found = pc.index_in(table["row_key"], all_keys)
    return pa.chunked_array(digests, pa.binary(16)).take(found)


def _codes(column: pa.ChunkedArray) -> IntArray:
    """[N] integers, equal for equal values; null is -1."""
    encoded = column.combine_chunks().dictionary_encode()
    codes: IntArray = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _counts(generators: pa.ChunkedArray) -> dict[str, int]:
    counted = Counter({entry["values"] or "": entry["counts"] for entry in generators.value_counts().to_pylist()})
    return dict(sorted(counted.items()))
