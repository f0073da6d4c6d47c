"""The grid of a study, and what it will cost before it starts.

DIR/settings.toml            a copy of the settings; others are refused from then on
    rows.parquet             the responses that are trained on, and those held out
    plan.json                base models and what they are, generators, evaluations, cells, the digest of it all
    cells/<cell>/            what is kept of a cell (`cells.py`)
    outcomes.parquet         a row a trained model and evaluation
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastcompat.errors import RunError, UsageError
from fastcompat.models import fingerprint, resolve_device, tensor_shapes
from fastcompat.rows import Response
from fastcompat.store import Place, is_remote, open_run, place_of
from fastcompat.study.answers import asked, encoded, generated
from fastcompat.study.rows import Rows, choose_rows, read_rows, write_rows
from fastcompat.study.settings import ALL, EACH, OWN, Evaluation, Settings, Training, differences, read_settings
from fastcompat.study.training import load_trainable, sequences_of, tokenizer_of

PLAN, SETTINGS = "plan.json", "settings.toml"
FORMAT = 1
# Multiplications and additions a trained token and weight: forward and twice as many back; with LoRA no gradients of
# the weights themselves.
FLOPS_FULL, FLOPS_LORA, FLOPS_FORWARD = 6, 4, 2
# How much is computed to measure how fast that goes.
_MEASURED_TOKENS = 1024
_MEASURED_ANSWERS, _MEASURED_NEW = 8, 16


class Cell(NamedTuple):
    """One training: of a base model on a generator's responses, with a seed."""

    base_model: str
    generator: str
    seed: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a study takes. generated_tokens: at most, as long as no answer ends before its limit. hours: of one process,
    None where nothing was measured."""

    cells: int
    trained_tokens: int
    generated_tokens: int
    flops: float
    hours: float | None


@dataclass(frozen=True)
class Study:
    """An open study."""

    place: Place
    settings: Settings
    record: dict[str, Any]

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return Path(str(self.place))

    @property
    def cells(self) -> list[Cell]:
        """The grid: seeds outermost, so that every generator has one result early."""
        return [Cell(*cell) for cell in self.record["cells"]]

    @property
    def generators(self) -> list[str]:
        """In the order of the corpus."""
        return list(self.record["generators"])

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """One an outcome."""
        return expanded(self.settings.evaluations, self.generators)

    @property
    def cost(self) -> Cost:
        """As it was counted when the study was planned."""
        return Cost(**self.record["cost"])

    @cached_property
    def rows(self) -> Rows:
        """The responses."""
        return read_rows(self.place)

    def source(self, base_model: str) -> str:
        """Where a base model lies. Raises RunError where it is no longer what it was."""
        told = self.record["base_models"][base_model]
        now = fingerprint(told["source"])
        if now != told["fingerprint"]:
            raise RunError(
                f"{told['source']} is another model than when the study was planned: give the old one back, or plan "
                "a study in a new directory"
            )
        return str(told["source"])

    def cell_place(self, cell: Cell) -> Place:
        """What is kept of a cell."""
        return self.place / "cells" / cell.name


def plan(
    directory: str | os.PathLike[str], settings: str | os.PathLike[str] | Settings, *, measure: bool = True
) -> Study:
    """Plan a study in `directory`, or open the one that is there. settings: a file of them, or what it says.

    measure: train and generate a little, to say how many hours it will take. Raises UsageError where the settings are
    others than those of the study that is there, where a generator has too few responses, and where something that an
    evaluation needs is not installed; ModelError and TemplateError as `Scorer`.
    """
    place = _place(directory)
    if isinstance(settings, Settings):
        given, text = settings, None
    else:
        given = read_settings(settings)
        text = Path(settings).read_text(encoding="utf-8")
    if place.has(PLAN):
        there = open_study(directory)
        if changed := differences(there.settings, given):
            raise UsageError(
                f"{place} is a study with other settings ({'; '.join(changed)}): plan a new one in another directory"
            )
        return there
    base_models = _base_models(given)
    rows = choose_rows(given)
    every = expanded(given.evaluations, rows.generators)
    _check_evaluations(every, rows)
    judges = {one.reward_model: _judge(one.reward_model, given.run) for one in every if one.reward_model}
    content = {
        "settings": asdict(given),
        "base_models": base_models,
        "rows": _digest_of(
            [row for half in (rows.trained, rows.held_out, rows.files) for own in half.values() for row in own]
        ),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    record = {
        "format": FORMAT,
        "digest": digest,
        "settings": asdict(given),
        "base_models": base_models,
        "generators": rows.generators,
        "judges": judges,
        "run": None if given.run is None else _absolute(given.run),
        "cells": [
            Cell(base, generator, seed, _cell_name(base, generator, seed, digest))
            for seed in given.seeds
            for base in base_models
            for generator in rows.generators
        ],
        "cost": asdict(_cost(given, base_models, rows, every, measure)),
    }
    place.make()
    write_rows(place, rows)
    if text is not None:
        place.put(SETTINGS, text.encode())
    place.put_new_json(PLAN, record)  # last: what has a plan is whole
    return open_study(directory)


def open_study(directory: str | os.PathLike[str]) -> Study:
    """The study that is there. Raises RunError where there is none, or it is of another format."""
    place = _place(directory)
    if not place.has(PLAN):
        raise RunError(
            f"{place} is no study: it has no {PLAN} (fastcompat study plan {place} --settings FILE makes one)"
        )
    record = place.read_json(PLAN)
    if record.get("format") != FORMAT:
        raise RunError(f"{place.path(PLAN)} has format {record.get('format')!r}; this fastcompat reads format {FORMAT}")
    try:
        return Study(place, _settings_of(record["settings"]), record)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{place.path(PLAN)} is damaged ({error!r}); plan the study in a new directory") from error


def expanded(evaluations: Sequence[Evaluation], generators: Sequence[str]) -> list[Evaluation]:
    """One an outcome: of `on = "each"` one a generator."""
    found: list[Evaluation] = []
    for one in evaluations:
        if one.on == EACH:
            found += [replace(one, on=name, label=f"{one.label}/{name}") for name in generators]
        else:
            found.append(one)
    return found


def answer_sets(evaluations: Sequence[Evaluation]) -> dict[tuple[str, int], Evaluation]:
    """What tuned models are asked: (name of the set, most new tokens) -> one of the evaluations that read it."""
    return {set_of(one): one for one in evaluations if one.name in ("reward", "win_rate", "constraints", "exact_match")}


def set_of(evaluation: Evaluation) -> tuple[str, int]:
    """The answers that an evaluation reads; those of reward and win_rate are the same."""
    if evaluation.name == "exact_match":
        return f"asked-{evaluation.label}", evaluation.max_new_tokens
    return ("constraints" if evaluation.name == "constraints" else "held-out"), evaluation.max_new_tokens


def _place(directory: str | os.PathLike[str]) -> Place:
    if is_remote(directory):
        raise UsageError(f"{directory}: a study lies in a directory, because models are trained into it")
    return place_of(directory)


def _settings_of(told: dict[str, Any]) -> Settings:
    """The inverse of `asdict`, through JSON."""
    lists = {name: tuple(told[name]) for name in ("base_models", "seeds", "inputs")}
    return Settings(
        **told
        | lists
        | {
            "generators": None if told["generators"] is None else tuple(told["generators"]),
            "training": Training(**told["training"]),
            "evaluations": tuple(Evaluation(**one) for one in told["evaluations"]),
        }
    )


def _base_models(settings: Settings) -> dict[str, dict[str, str]]:
    """Name, as a ranking has it -> where it lies and what it is."""
    found: dict[str, dict[str, str]] = {}
    for model in settings.base_models:
        path = Path(model)
        name = path.resolve().name if path.is_dir() else model
        if name in found:
            raise UsageError(f"two base models are called {name}; rename one's directory")
        tokenizer_of(model, settings.training)  # what cannot be scored is not trained
        found[name] = {"source": str(path.resolve()) if path.is_dir() else model, "fingerprint": fingerprint(model)}
    return found


def _check_evaluations(evaluations: Sequence[Evaluation], rows: Rows) -> None:
    for one in evaluations:
        if one.reference is not None and one.reference not in rows.generators:
            raise UsageError(f"{one.label}: reference {one.reference} is none of {', '.join(rows.generators)}")
        if one.on is not None and one.on not in (ALL, OWN, *rows.generators):
            raise UsageError(f"{one.label}: on is {one.on!r}, none of all, own, each, {', '.join(rows.generators)}")
        if one.name == "lm_eval" and importlib.util.find_spec("lm_eval") is None:
            raise UsageError(f"{one.label}: pip install lm_eval, or leave that evaluation away")


def _judge(model: str, run: str | None) -> dict[str, Any]:
    """A reward model's name, and whether it is one whose rewards the run has; then the name is the run's."""
    own = fingerprint(model)
    path = Path(model)
    told = {"source": str(path.resolve()) if path.is_dir() else model, "fingerprint": own}
    name = path.resolve().name if path.is_dir() else model
    for store in open_run(run).scorers() if run else []:
        identity = store.record["identity"]
        if identity["kind"] == "reward_model" and identity.get("model_sha256") == own:
            return told | {"name": store.record["settings"]["model"], "circular": True}
    return told | {"name": name, "circular": False}


def _absolute(run: str) -> str:
    return run if is_remote(run) else str(Path(run).resolve())


def _digest_of(rows: Sequence[Response]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(repr((row.generator, row.messages, row.tools)).encode())
    return total.hexdigest()


def _cell_name(base_model: str, generator: str, seed: int, digest: str) -> str:
    """Readable, and different for different cells."""
    own = hashlib.sha256(json.dumps([base_model, generator, seed, digest]).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", f"{base_model.split('/')[-1]}-{generator.split('/')[-1]}")[:60]
    return f"{readable}-{seed}-{own[:10]}"


def _cost(
    settings: Settings,
    base_models: dict[str, dict[str, str]],
    rows: Rows,
    evaluations: Sequence[Evaluation],
    measure: bool,
) -> Cost:
    seeds, training = len(settings.seeds), settings.training
    asked_of: dict[str, int] = {"held-out": len(rows.prompts), "constraints": len(rows.prompts)}
    new_tokens = sum(
        most * (asked_of[name] if name in asked_of else len(rows.files[str(one.file)]))
        for (name, most), one in answer_sets(evaluations).items()
    )
    trained = generated_ = 0
    flops, seconds = 0.0, 0.0
    for told in base_models.values():
        tokenizer = tokenizer_of(told["source"], training)
        own = [len(s.input_ids) for name in rows.generators for s in sequences_of(tokenizer, rows.trained[name])]
        tokens = sum(own) * training.epochs * seeds
        answers = new_tokens * len(rows.generators) * seeds
        weights = sum(float(np.prod(shape)) for shape in tensor_shapes(told["source"]).values())
        trained += tokens
        generated_ += answers
        flops += weights * (tokens * (FLOPS_LORA if training.lora_rank else FLOPS_FULL) + answers * FLOPS_FORWARD)
        if measure:
            a_token, a_new_token = _measured(told["source"], settings, rows)
            seconds += tokens * a_token + answers * a_new_token
    return Cost(
        cells=len(base_models) * len(rows.generators) * seeds,
        trained_tokens=trained,
        generated_tokens=generated_,
        flops=flops,
        hours=seconds / 3600 if measure else None,
    )


def _measured(source: str, settings: Settings, rows: Rows) -> tuple[float, float]:
    """Seconds a trained token, and a generated one: of some, computed twice, since the first time warms up."""
    device = resolve_device(settings.training.device)
    model = load_trainable(source, device)
    tokenizer = tokenizer_of(source, settings.training)
    first = next(iter(rows.trained.values()))
    sequences = sequences_of(tokenizer, first[:64])
    prompts = [own for own in encoded(tokenizer, [asked(row) for row in rows.prompts[:_MEASURED_ANSWERS]]) if own]
    if not sequences or not prompts:
        return 0.0, 0.0
    ids = np.concatenate([own.input_ids for own in sequences])[:_MEASURED_TOKENS].astype(np.int64)
    batch = torch.from_numpy(ids)[None].to(device)
    best = []
    for work, n in (
        (lambda: model(input_ids=batch, labels=batch, use_cache=False).loss.backward(), len(ids)),
        (lambda: generated(model, prompts, _MEASURED_NEW), len(prompts) * _MEASURED_NEW),
    ):
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        best.append(min(seconds) / n)
    return best[0], best[1]
