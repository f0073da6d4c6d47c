"""Runs whose figures a test chooses: a corpus of one file, and scores that no model computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastcompat.corpus import prepare
from fastcompat.rows.columns import Extras, part_schema
from fastcompat.store.parts import Unit
from fastcompat.store.preparing import add_generation
from fastcompat.store.run import Run

# From a row of the corpus (generator, row_index) to columns of a part; None stands for a row that is not scored.
Figures = Callable[[str, int], Mapping[str, object] | None]


def make_run(
    directory: Path,
    generators: Sequence[str],
    n_prompts: int,
    *,
    reward: Callable[[str, int], float | None] | None = None,
    text: Callable[[str, int], str] = lambda name, prompt: f"The answer of {name} to question {prompt}.",
    target_unit_chars: int = 100_000,
) -> Run:
    """A prepared corpus: every generator's response to every prompt, row_index = prompt * generators + generator."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {prompt}?"},
                {"role": "assistant", "content": text(name, prompt)},
            ],
            "generator": name,
        }
        | ({} if reward is None else {"reward": reward(name, prompt)})
        for prompt in range(n_prompts)
        for name in generators
    ]
    directory.mkdir(parents=True, exist_ok=True)
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return add_generation(
        directory / "run",
        [],
        lambda shards, first: prepare(
            [str(corpus)], shards, target_unit_chars=target_unit_chars, target_shard_bytes=1 << 20, first_shard=first
        ),
    )


def add_scores(
    run: Run,
    figures: Figures,
    *,
    model: str = "some/base",
    kind: str = "base_model",
    extras: Sequence[str] = (),
    units: Sequence[Unit] | None = None,
) -> None:
    """Commit parts of one scorer. figures: by generator and prompt; n_tokens is 10 unless it is there."""
    columns = Extras.of(extras)
    identity = {"kind": kind, "model_sha256": model, "dtype": "float32"}
    identity |= {"extras": list(columns.columns)} if columns.columns else {}
    name = "".join(c if c.isalnum() else "-" for c in model)
    settings = {"model": model, "token_budget": 64, "template": "<b>plain</b>"}
    store = run.scorer(f"{kind}-{name}", identity, lambda: settings)
    schema = part_schema(kind, columns)
    n_generators = len({name for generation in run.generations for name in generation.generators})
    for unit in run.units if units is None else units:
        rows = run.unit_rows(unit, ["row_key", "source", "row_index", "response_index", "prompt_id", "generator"])
        out = []
        for row in rows.to_pylist():
            own = figures(row["generator"], row["row_index"] // n_generators)
            if own is None:
                out.append(row | {"status": "oom", "detail": "too large for the device's memory"})
                continue
            scored = {"n_tokens": 10, "status": "ok", "detail": ""} | dict(own)
            if kind == "base_model" and "loss" in scored:
                scored = {"n_prompt_tokens": 5, "nll_sum": scored["loss"] * scored["n_tokens"]} | scored
            out.append(row | scored)
        table = {field.name: [row.get(field.name) for row in out] for field in schema}
        store.commit(unit, pa.table(table, schema=schema))


def drawn(*key: object) -> np.random.Generator:
    """Random numbers that only depend on the key."""
    return np.random.default_rng([int.from_bytes(repr(part).encode(), "big") % (1 << 32) for part in key])


def gamma_losses(worse: float = 0.05) -> Figures:
    """Losses about 2 nats, each generator's a little higher than that of the one before in the alphabet."""

    def figures(name: str, prompt: int) -> dict[str, object]:
        draw = drawn(name, prompt)
        difficulty = drawn(prompt).gamma(4, 0.25)
        place = int("".join(c for c in name if c.isdigit()) or 0)
        return {
            "loss": float(1 + difficulty + draw.gamma(4, 0.1) + worse * place),
            "n_tokens": int(draw.integers(5, 400)),
        }

    return figures


def normal_rewards(name: str, prompt: int) -> float:
    """Rewards about 4, that differ by prompt more than by generator."""
    place = int("".join(c for c in name if c.isdigit()) or 0)
    return round(
        float(4 + 0.1 * place + drawn("r", prompt).normal(0, 0.5) + drawn("r", name, prompt).normal(0, 0.3)), 4
    )
