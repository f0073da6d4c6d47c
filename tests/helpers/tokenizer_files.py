"""Model directories with a tokenizer.json whose pieces are other than those that transformers' classes build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer_makers import BACKENDS
from tokenizers import Regex, Tokenizer, pre_tokenizers

# As SmolLM2's and StarCoder2's: digits apart, then GPT-2's pattern.
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
# Llama-3's numbers, of up to three digits.
THREE_DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}


def write_files(directory: Path, backend: Tokenizer, tokenizer_class: str | None = None, **configuration: Any) -> str:
    """A model directory of tokenizer.json, tokenizer_config.json and a configuration that chooses no class."""
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    content = {**SPECIAL, "tokenizer_class": tokenizer_class, **configuration}
    content = {name: value for name, value in content.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(directory)


def make_backend(kind: str = "byte_level", **parts: Any) -> Tokenizer:
    backend = Tokenizer.from_str(BACKENDS[kind]().to_str())
    backend.post_processor = None
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def ids_of_the_file(directory: str, text: str) -> list[int]:
    return Tokenizer.from_file(f"{directory}/tokenizer.json").encode(text, add_special_tokens=False).ids
