"""Small corpora and models on disk, for tests of whole runs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from families import small_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastcompat.corpus import prepare
from fastcompat.demo import model_directory
from fastcompat.store.preparing import add_generation
from fastcompat.store.run import Run

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

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
    for name in TOKENIZER_FILES:
        shutil.copy(model_directory() / name, directory / name)
    return directory


def save_small_reward_model(directory: Path, *, body: Path | None = None, seed: int = 0) -> Path:
    """A random Llama sequence classifier with the demo's tokenizer; `body`: a model whose body it has."""
    causal = AutoModelForCausalLM.from_pretrained(body) if body else small_model("Llama", seed=seed, vocab_size=4096)
    config = AutoConfig.from_pretrained(body) if body else causal.config
    config.architectures, config.num_labels, config.pad_token_id = None, 1, 0
    model = AutoModelForSequenceClassification.from_config(config).to(causal.dtype)
    model.base_model.load_state_dict(causal.base_model.state_dict())
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed + 1)
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=draw) * 0.3)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(model_directory() / name, directory / name)
    return directory
