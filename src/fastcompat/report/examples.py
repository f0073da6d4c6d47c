"""The responses at both ends of a figure, with their texts and, where the run keeps them, their tokens.

Only the units in which they lie are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastcompat.rows import Message, spoken
from fastcompat.store import UNIT, Run, ScorerStore

# Bytes of texts on a page as HTML, shared out among the responses that are shown; a token's mark costs as many.
BUDGET = 250_000
BYTES_PER_TOKEN = 40
PROMPT_BYTES = 600
# Of a response's heading and marks.
BYTES_PER_EXAMPLE = 900
# Alike responses (equal loss and length) are shown once: so many are looked at for each that is shown.
CANDIDATES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One response. tokens: (text, NLL in nats), where the run keeps them; `text` otherwise. cut: there is more."""

    name: str
    row_key: str
    prompt: str
    prompt_cut: bool
    n_turns: int
    text: str
    tokens: Sequence[tuple[str, float]] | None
    cut: bool
    n_tokens: int | None
    loss: float | None
    reward: float | None
    car: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Responses of the lowest and of the highest `figure`: loss, car or reward."""

    figure: str
    lowest: Sequence[Example]
    highest: Sequence[Example]


def find_examples(
    run: Run,
    scorer: ScorerStore | None,
    rows: pa.Table,
    *,
    by: str,
    beta: float | None,
    reward_shift: float,
    n_examples: int,
    n_sections: int,
) -> list[Examples]:
    """Those of the loss and of CAR, or of the reward where there is no loss.

    scorer: the base model's. rows: scored rows of one pair of models, with `store.UNIT`. beta: None without CAR;
    responses whose reward is negative have no CAR of their own.
    """
    if not n_examples or not rows.num_rows:
        return []
    figures: dict[str, NDArray[np.float64]] = {}
    reward, loss = (_floats(rows[name]) for name in ("reward", "loss"))
    car = np.full(rows.num_rows, np.nan)
    if beta is not None:
        usable = reward + reward_shift >= 0
        car[usable] = (reward[usable] + reward_shift) / (1 + beta * loss[usable])
    if np.isfinite(loss).any():
        figures["loss"] = loss
    if np.isfinite(car).any():
        figures["car"] = car
    if not figures and np.isfinite(reward).any():
        figures["reward"] = reward
    ends = {name: _ends(values, rows, n_examples) for name, values in figures.items()}
    chosen = np.unique(np.concatenate([np.concatenate(end) for end in ends.values()]))
    n_bytes = max(300, BUDGET // (n_sections * n_examples * 2 * max(1, len(ends))) - BYTES_PER_EXAMPLE)
    read = _read(run, scorer, rows.take(pa.array(chosen)), by, car[chosen], n_bytes)
    by_row = dict(zip(chosen.tolist(), read, strict=True))
    return [
        Examples(figure=name, lowest=[by_row[n] for n in low.tolist()], highest=[by_row[n] for n in high.tolist()])
        for name, (low, high) in ends.items()
    ]


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    values: NDArray[np.float64] = column.to_numpy(zero_copy_only=False).astype(np.float64)
    return values


def _ends(values: NDArray[np.float64], rows: pa.Table, n_examples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the lowest values, ascending, and of the highest, descending: none in both, alike ones once."""
    known = np.flatnonzero(np.isfinite(values))
    wanted = min(n_examples, (len(known) + 1) // 2)
    ends = []
    for sign in (1, -1):
        n_candidates = min(len(known), wanted * CANDIDATES)
        nearest = known[np.argpartition(sign * values[known], n_candidates - 1)[:n_candidates]]
        ordered = nearest[np.lexsort((nearest, sign * values[nearest]))]
        lengths = rows["n_tokens"].take(pa.array(ordered)).to_pylist()
        alike: dict[tuple[float, int | None], int] = {}
        for index, length in zip(ordered.tolist(), lengths, strict=True):
            alike.setdefault((float(values[index]), length), index)
        ends.append(np.array(list(alike.values())[:wanted], np.int64))
    low, high = ends
    return low, high[~np.isin(high, low)]


def _read(
    run: Run, scorer: ScorerStore | None, rows: pa.Table, by: str, car: NDArray[np.float64], n_bytes: int
) -> list[Example]:
    """The texts of rows, in their order."""
    texts: dict[str, list[dict[str, str]]] = {}
    tokens: dict[str, list[tuple[str, float]]] = {}
    unit_of = rows[UNIT].to_pylist()
    for index in sorted({unit for unit in unit_of if unit is not None}):
        unit = run.units[index]
        wanted = rows.filter(pc.equal(rows[UNIT], index))["row_key"].combine_chunks()
        own = run.unit_rows(unit, ["row_key", "messages"])
        for row in own.filter(pc.is_in(own["row_key"], wanted)).to_pylist():
            texts[row["row_key"]] = row["messages"] or []
        if scorer is not None:
            tokens |= _tokens(scorer, run, index, wanted)
    examples = []
    for row, own_car in zip(rows.to_pylist(), car.tolist(), strict=True):
        examples.append(_example(row, row[by], own_car, texts.get(row["row_key"], []), tokens, n_bytes))
    return examples


def _tokens(store: ScorerStore, run: Run, index: int, wanted: pa.Array) -> dict[str, list[tuple[str, float]]]:
    unit = run.units[index]
    columns = ["row_key", "token_nll", "token_text"]
    if not set(columns) <= set(store.schema.names):
        return {}
    scored = store.rows(unit, columns)
    kept = {}
    for row in scored.filter(pc.is_in(scored["row_key"], wanted)).to_pylist():
        if row["token_nll"] and row["token_text"] and len(row["token_nll"]) == len(row["token_text"]):
            kept[row["row_key"]] = list(zip(row["token_text"], row["token_nll"], strict=True))
    return kept


def _example(
    row: Mapping[str, Any],
    name: str,
    car: float,
    messages: Sequence[Mapping[str, str]],
    tokens: Mapping[str, Sequence[tuple[str, float]]],
    n_bytes: int,
) -> Example:
    *before, last = messages or [{"role": "assistant", "content": "", "extra": ""}]
    prompt = next((turn["content"] or "" for turn in reversed(before) if turn["role"] == "user"), "")
    response = text = spoken(Message(**last))
    own = tokens.get(row["row_key"])
    prompt_shown = prompt[: _fitting(list(prompt[:PROMPT_BYTES]), PROMPT_BYTES)]
    if own:
        kept = own[: _fitting([text for text, _ in own], n_bytes, each=BYTES_PER_TOKEN)]
        text = ""
    else:
        kept = None
        text = text[: _fitting(list(text[:n_bytes]), n_bytes)]
    return Example(
        name=name,
        row_key=row["row_key"],
        prompt=prompt_shown,
        prompt_cut=len(prompt_shown) < len(prompt),
        n_turns=len(before),
        text=text,
        tokens=kept,
        cut=len(kept) < len(own) if own and kept is not None else len(text) < len(response),
        n_tokens=row["n_tokens"],
        loss=row["loss"],
        reward=row["reward"],
        car=car if np.isfinite(car) else None,
    )


def _fitting(pieces: Sequence[str], n_bytes: int, *, each: int = 0) -> int:
    """How many of the first pieces fit into `n_bytes` of HTML, at `each` bytes more apiece."""
    spent = np.cumsum([each + len(escape(piece).encode()) for piece in pieces])
    return int(np.searchsorted(spent, n_bytes, side="right"))
