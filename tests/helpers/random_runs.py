"""Runs of all that can be: generations that share prompts, scorers that are not finished, rows without figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from corpora import write_jsonl

from fastcompat.corpus import prepare
from fastcompat.decisions import RaceSettings
from fastcompat.rows import FIGURES, Extras, part_schema
from fastcompat.store import Packing, Run, ScorerStore, Unit, start_race
from fastcompat.store.preparing import add_generation

WHERE = ("row_key", "source", "row_index", "response_index", "prompt_id", "generator", "status", "detail")


def random_run(
    directory: Path,
    draw: np.random.Generator,
    *,
    n_prompts: int = 24,
    n_generations: int = 2,
    rewards: bool = True,
    max_unit_rows: int = 12,
) -> Run:
    """Generations of some generators each; prompts are common to some of them. Units of some twelve rows.

    rewards: whether the corpus brings its own.
    """
    run = None
    for generation in range(n_generations):
        rows = []
        for name in ("a", "b", "c", "d")[generation : generation + 3]:
            asked = draw.choice(n_prompts, size=int(draw.integers(n_prompts // 2, n_prompts)), replace=False)
            for prompt in asked.tolist():
                for k in range(int(draw.integers(1, 3))):
                    text = "" if draw.random() < 0.02 else f"Answer {k} of {name} to {prompt}."
                    row = {"prompt": f"Question {prompt}?", "response": text, "generator": name}
                    rows.append(
                        row | ({} if not rewards or draw.random() < 0.1 else {"reward": float(draw.normal(8, 2))})
                    )
        files = [write_jsonl(directory / f"{generation}-{k}.jsonl", rows[k::2]) for k in range(2)]

        def into(shards: Path, first: int, files: list[Path] = files):
            return prepare(
                [str(file) for file in files],
                shards,
                max_unit_rows=max_unit_rows,
                target_unit_chars=1 << 20,
                target_shard_bytes=50 * n_prompts,
                first_shard=first,
            )

        run = add_generation(directory / "run", run.generations if run else [], into)
    assert run is not None
    return run


def add_random_scores(
    run: Run,
    draw: np.random.Generator,
    kind: str,
    model: str,
    *,
    finished: float = 1.0,
    begun: float = 0.0,
    lacking: str | None = None,
    left_out: str | None = None,
) -> ScorerStore:
    """Figures of one scorer. finished, begun: shares of the units; what is begun is done in half. lacking: a generator
    without any figure; left_out: one that is left out of half of the units."""
    settings = {"model": model, "token_budget": 64}
    store = run.scorer(f"{kind}-{model}", {"kind": kind, "model": model}, lambda: settings)
    for unit in run.units:
        chance = draw.random()
        if chance > finished + begun:
            continue
        scores = _scores(run, draw, kind, unit, lacking, left_out if draw.random() < 0.5 else None)
        if chance < finished:
            store.commit(unit, scores)
        else:
            figures = {FIGURES[kind], "loss"} & set(scores.column_names)
            undone = pa.array(np.arange(unit.n_rows) % 2 == 1)
            for name in figures:
                column = pa.array(scores[name].to_pylist(), pa.float64())
                kept = pc.if_else(undone, None, column)
                scores = scores.set_column(scores.column_names.index(name), name, kept)
            store.keep_beginning(unit, scores, Packing(token_budget=64, n_stores=1, n_packs=1))
    return store


def _scores(
    run: Run, draw: np.random.Generator, kind: str, unit: Unit, lacking: str | None, left_out: str | None
) -> pa.Table:
    out = []
    for row in run.unit_rows(unit, WHERE).to_pylist():
        n_tokens = int(draw.integers(3, 90))
        effect = int(row["prompt_id"][:6], 16) / (1 << 24)
        loss, reward = float(draw.lognormal(effect, 0.4)), float(draw.normal(8 + 3 * effect, 1))
        if row["generator"] == left_out:
            row |= {"status": "left_out", "detail": "not asked for"}
        elif row["generator"] == lacking or (row["status"] == "ok" and draw.random() < 0.05):
            row |= {"status": "oom", "detail": "too large"}
        if row["status"] == "ok":
            row |= {"n_tokens": n_tokens, "nll_sum": loss * n_tokens, "loss": loss, "reward": reward}
        out.append(row)
    schema = part_schema(kind, Extras())
    return pa.table({field.name: [row.get(field.name) for row in out] for field in schema}, schema=schema)


def add_race(run: Run, base_model: str, reward_model: str, *, n_prompts: int) -> None:
    """A race of two looks: d leaves at the first, of a third of the prompts, c at the second, of two thirds."""
    asked = RaceSettings(until="winner", figure="car", reward_shift=0.0)
    shares = [1 / 3, 2 / 3, 1.0]
    record = {
        "settings": asdict(asked),
        "base_model": base_model,
        "reward_model": reward_model,
        "corpus": run.fingerprints,
        "generators": ["a", "b", "c", "d"],
        "n_prompts": n_prompts,
        "shares": shares,
        "before": {},
    }
    store = start_race(run, record)
    for number, name in ((1, "d"), (2, "c")):
        look = {"number": number, "n_looks": 3, "n_prompts": round(shares[number - 1] * n_prompts), "n_responses": 9}
        look |= {"standings": [{"generator": "a"}], "claims": [["a", name]], "equal": [], "over": ""}
        store.add_look(number, look | {"out": {name: f"out of the race at look {number}"}})
