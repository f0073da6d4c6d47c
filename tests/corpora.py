"""Small corpora and models on disk, for tests of whole runs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from families import small_model

from fastcompat.corpus import prepare
from fastcompat.demo import model_directory
from fastcompat.store import Run, add_generation

WORDS = (
    "the",
    "list",
    "of",
    "a",
    "file",
    "returns",
    "one",
    "new",
    "value",
    "object",
    "when",
    "string",
    "path",
    "is",
    "not",
    "given",
    "raises",
    "an",
    "error",
)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(generator: str, *, n_prompts: int, seed: int = 0, words: int = 30) -> list[dict]:
    """One row per prompt; prompts are the same for every generator, some responses begin alike."""
    draw = random.Random(f"{generator}-{seed}")
    return [
        {
            "prompt": f"Question {k}: {' '.join(random.Random(k).choices(WORDS, k=6))}?",
            "response": "The answer: " + " ".join(draw.choices(WORDS, k=draw.randint(1, words))),
            "generator": generator,
        }
        for k in range(n_prompts)
    ]


def write_corpus(directory: Path, *, generators: int = 3, n_prompts: int = 20) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"generator-{g}" for g in range(generators)]
    return [write_jsonl(directory / f"{name}.jsonl", rows_of(name, n_prompts=n_prompts)) for name in names]


def prepare_small_units(directory: Path, corpus: Path, *, target_unit_chars: int) -> Run:
    """A run whose units are small, so that a test sees many of them."""
    return add_generation(
        directory,
        [],
        lambda shards, first: prepare(
            [str(corpus)], shards, target_unit_chars=target_unit_chars, target_shard_bytes=20_000, first_shard=first
        ),
    )


def save_small_model(directory: Path, *, family: str = "Llama", seed: int = 0, **changes: object) -> Path:
    """A random model of a family with the demo's tokenizer, as save_pretrained writes it."""
    small_model(family, seed=seed, vocab_size=4096, **changes).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_directory() / name, directory / name)
    return directory
