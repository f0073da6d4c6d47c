"""A model's tokenizer as transformers loads it, with the token ids of the model's tokenizer.json.

tokenizer.json says how a text becomes the ids that a model was trained with: its normalizer, where it is split, its
vocabulary and its added tokens. Many classes of transformers 5 (`GPT2Tokenizer`, `Qwen2Tokenizer`, `LlamaTokenizer`)
take vocabulary and merges from it and build the rest as the first model of their name had it. Where that gives other
ids, the file's own backend takes the place of theirs. All else is as class and tokenizer_config.json say: special
tokens, chat template, tokens that the configuration adds.

A BOS is added where tokenizer.json's post-processor adds one. The configuration's `add_bos_token` is not heard, as
transformers 5 does not hear it beside a tokenizer.json: one file decides all ids. Where a BOS that the configuration
asks for is missing, that is told.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastcompat.errors import ModelError
from fastcompat.tokens.differences import differences

TokenIds = Literal["file", "class"]

# How `LoadedTokenizer.token_ids` says that nothing is to be said.
THE_FILES = "tokenizer.json's"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedTokenizer:
    """A tokenizer of transformers.

    token_ids: whose ids it gives, in words.
    is_asked_for_bos: the configuration asks for a BOS.
    """

    tokenizer: Any
    token_ids: str = "the given tokenizer's"
    is_asked_for_bos: bool = False


def load_tokenizer(model: str, token_ids: TokenIds = "file", *, revision: str | None = None) -> LoadedTokenizer:
    """The tokenizer of a model id or directory. Code from the repository is never run.

    token_ids: "file": those of tokenizer.json, where there is one; "class": those of transformers' class.
    Raises `ModelError` if there is no tokenizer, if it wants code of its own, or if tokenizer.json cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        tokenizer("x")  # some classes read no plain text
    except Exception as error:  # the loaders raise OSError, ValueError, KeyError, JSON errors, backend errors ...
        path = _tokenizer_json(model, revision)
        if path is not None:
            read_backend(model, path)  # raises where that is the reason
        if path is None or token_ids == "class" or "trust_remote_code" in str(error):
            raise ModelError(_cannot_load(model, error)) from error
        said = f"{THE_FILES}, of which the class that the configuration names cannot be made"
        return LoadedTokenizer(tokenizer=_of_no_class(model, revision), token_ids=said)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{model!r} holds no tokenizer: its vocabulary is empty.")
    name = type(tokenizer).__name__
    path = _tokenizer_json(model, revision)
    if token_ids == "class" or path is None:
        return LoadedTokenizer(tokenizer=tokenizer, token_ids=f"{name}'s" + ("" if path else " (no tokenizer.json)"))
    tokenizer, difference = _with_ids_of(read_backend(model, path), tokenizer, model, revision)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        token_ids=THE_FILES + (f"; {name} differs{difference}" if difference else ""),
        is_asked_for_bos=_configuration(model, revision).get("add_bos_token") is True,
    )


def read_backend(model: str, path: Path) -> Any:
    """The backend that a tokenizer.json describes. Raises `ModelError` where it is damaged or not understood."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own
        raise ModelError(f"{model}: {_fault_of(path, error)}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _fault_of(path: Path, error: Exception) -> str:
    import tokenizers

    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            return f"{path.name} is a pointer of Git LFS, not the file itself: run git lfs pull"
        json.loads(text)
    except (OSError, ValueError) as damage:  # not UTF-8, not JSON
        return f"{path.name} is damaged: {damage}; fetch it again"
    return (
        f"{path.name} is not understood by tokenizers {tokenizers.__version__}: {error}; if a newer version wrote it, "
        "pip install --upgrade tokenizers transformers, else fetch the file again"
    )


def _with_ids_of(backend: Any, tokenizer: Any, model: str, revision: str | None) -> tuple[Any, str | None]:
    """`tokenizer`, giving the ids of `backend`, and how its own differ; None where it is as it was."""
    backend.encode_special_tokens = tokenizer.split_special_tokens
    generic = tokenizer
    if not tokenizer.is_fast or tokenizer.get_added_vocab().keys() - _added(backend):
        # What the configuration adds is the model's; a token that only a class adds has no place in its vocabulary.
        generic = _of_no_class(model, revision)
    known = _added(backend)
    declared = sorted(generic.added_tokens_decoder.items())
    backend.add_tokens([token for _, token in declared if token.content not in known])
    difference = differences(tokenizer, backend)
    if difference is None:
        return tokenizer, None
    chosen = tokenizer if tokenizer.is_fast else generic
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            setattr(chosen, name, None if backend.token_to_id(token) is None else token)
    chosen._tokenizer = backend  # there is no public way
    return chosen, difference


def _added(backend: Any) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _of_no_class(model: str, revision: str | None) -> Any:
    """The tokenizer of tokenizer.json and of the configuration, as no class but transformers' generic one has it."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model, revision=revision)
        tokenizer("x")
        return tokenizer
    except Exception as error:
        raise ModelError(_cannot_load(model, error)) from error


def _tokenizer_json(model: str, revision: str | None) -> Path | None:
    """The file that transformers reads: of several versions of it the one for this version of transformers."""
    from transformers.tokenization_utils_base import get_fast_tokenizer_file

    versions = _configuration(model, revision).get("fast_tokenizer_files")
    return _file(model, get_fast_tokenizer_file(versions) if versions else "tokenizer.json", revision)


def _configuration(model: str, revision: str | None) -> dict[str, Any]:
    path = _file(model, "tokenizer_config.json", revision)
    try:
        content = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{model}: tokenizer_config.json is damaged: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{model}: tokenizer_config.json is damaged: it holds no JSON object; fetch it again")
    return content


def _file(model: str, name: str, revision: str | None) -> Path | None:
    from fastcompat.hub import model_file

    try:
        return model_file(model, name, revision)
    except OSError:  # what is neither a directory nor the name of a hub model
        return None


def _cannot_load(model: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"The tokenizer of {model!r} wants to run code from its repository, which fastcompat never does."
    if Path(model).is_dir():
        if not any(
            (Path(model) / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        ):
            return (
                f"The directory {model!r} holds no tokenizer: no tokenizer.json, tokenizer.model or vocabulary in it."
            )
    elif Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1:
        return f"There is no directory {model!r}."
    first_line = str(error).strip().split("\n")[0] or type(error).__name__
    return f"No tokenizer could be loaded from {model!r}: {first_line.rstrip('.')}."
