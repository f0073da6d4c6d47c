"""A study that takes seconds: a random base model and judge, generators of a word each."""

from __future__ import annotations

import json
from pathlib import Path

from corpora import save_small_model, save_small_reward_model

GENERATORS = ("alpha", "beta", "delta", "gamma", "omega")


def write_responses(directory: Path, *, n_prompts: int = 14, generators: tuple[str, ...] = GENERATORS) -> Path:
    """One file; every generator answers every prompt, its own word several times."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is number {prompt}?"},
                {"role": "assistant", "content": " ".join([name] * (3 + (prompt + k) % 4)) + "."},
            ],
            "generator": name,
        }
        for prompt in range(n_prompts)
        for k, name in enumerate(generators)
    ]
    path = directory / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_models(directory: Path) -> tuple[Path, Path]:
    """(base model, reward model)."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return (
        save_small_model(directory / "tiny", **shape),
        save_small_reward_model(directory / "judge", seed=3),
    )


def settings_text(directory: Path, **changes: object) -> str:
    """Settings as TOML for what lies in `directory`; changes: other values at the top."""
    values: dict[str, object] = {
        "inputs": [str(directory / "responses.jsonl")],
        "base_models": [str(directory / "tiny")],
        "examples": 6,
        "held_out": 4,
        "seeds": [0, 1],
    } | changes
    values = {name: value for name, value in values.items() if value is not None}
    top = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    judge = json.dumps(str(directory / "judge"))
    return f"""{top}

[training]
learning_rate = 1e-3
batch_tokens = 96
max_length = 128
device = "cpu"

[[evaluations]]
name = "reward"
reward_model = {judge}
max_new_tokens = 4

[[evaluations]]
name = "win_rate"
reward_model = {judge}
reference = "alpha"
max_new_tokens = 4

[[evaluations]]
name = "held_out_loss"
"""
