"""Whether a tokenizer of transformers and a backend of the `tokenizers` library give the same ids.

That is told from what they are made of: normalizer, pre-tokenizer, vocabulary and merges with the model's options,
added tokens, BOS. What cannot change an id is left aside (decoder, offsets, the unknown token of a vocabulary that
knows every byte), so that what gives equal ids is seen to be equal. Texts on which tokenizers part ways are encoded by
both as well: for an example to show, and for the tokenizers in Python, of which nothing else can be seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastcompat.tokens.alignment import PROBE

_PROBES = (
    *("\n\n1.", "12 345 6789", "a  b   c", "a\n\n\n b", "\ta\t\tb", "a\r\n\r\nb", " a", "a ", "I'm, you’re, IT'S"),
    *("東京は日本", "e\u0301 ﬁ ½", "👩‍👩‍👧 🇯🇵", "नमस्ते", "مرحبا", "a.b/c_d-e", "?!!", "HelloWorld", "\x00\ufffd", PROBE),
)


def differences(tokenizer: Any, backend: Any) -> str | None:
    """How the ids that `tokenizer` gives differ from those of `backend`, None where they do not.

    In words that follow "the one differs", as in " in pre-tokenizer: '\\n\\n1.' is 4 tokens, not 3".

    What a class's Python code does to a text before its own backend sees it is no difference.
    """
    bos = tokenizer.bos_token_id
    # The call also ends any truncation that the tokenizer was saved with.
    adds_bos = tokenizer("x")["input_ids"][:1] == [bos], backend.encode("x").ids[:1] == [bos]
    parts = _different_parts(tokenizer, backend)
    if adds_bos[0] != adds_bos[1]:
        parts.append("BOS")
    example = next(_examples(tokenizer, backend), "")
    if not parts and not example:
        return None
    return (f" in {', '.join(parts)}" if parts else "") + (f": {example}" if example else "")


def _examples(tokenizer: Any, backend: Any) -> Iterator[str]:
    special = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    around = [text for token in sorted(special) for text in (f"a{token}b", f"a {token} b", f"{token}\n1.", token * 2)]
    for text in (*_PROBES, *around):
        own = _encoded(tokenizer.backend_tokenizer, text) if tokenizer.is_fast else _called(tokenizer, text)
        files = _encoded(backend, text)
        if own != files:
            n_own, n_files = len(own or ()), len(files or ())
            noun = "token" if n_own == 1 else "tokens"
            yield f"{text!r} is {f'{n_own} {noun}, not {n_files}' if n_own != n_files else f'{n_own} other {noun}'}"


def _encoded(backend: Any, text: str) -> list[int] | None:
    """None where the vocabulary lacks a character and has no unknown token."""
    try:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    except Exception:
        return None
    return ids


def _called(tokenizer: Any, text: str) -> list[int] | None:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:
        return None
    return ids


def _different_parts(tokenizer: Any, backend: Any) -> list[str]:
    if not tokenizer.is_fast:
        return ["vocabulary"] if tokenizer.get_vocab() != backend.get_vocab() else []
    own = tokenizer.backend_tokenizer
    found = []
    normalizer = _content(backend.normalizer)
    if _content(own.normalizer) != normalizer:
        found.append("normalizer")
    if _content(own.pre_tokenizer) != _content(backend.pre_tokenizer):
        found.append("pre-tokenizer")
    found += _differences_of_models(own, backend)
    if _added_tokens(own, normalizer is not None) != _added_tokens(backend, normalizer is not None):
        found.append("added tokens")
    return found


def _content(component: Any) -> Any:
    """A normalizer or pre-tokenizer without what decides no id; None where it does nothing."""
    return None if component is None else _essence(json.loads(component.__getstate__()))


def _essence(content: dict[str, Any]) -> dict[str, Any] | None:
    if content["type"] != "Sequence":
        return {key: value for key, value in content.items() if key != "trim_offsets"}
    (members,) = (value for key, value in content.items() if key != "type")
    kept = [essence for essence in map(_essence, members) if essence is not None]
    return {"type": "Sequence", "members": kept} if len(kept) > 1 else next(iter(kept), None)


def _differences_of_models(own: Any, backend: Any) -> list[str]:
    (own_options, own_body), (options, body) = _model(own), _model(backend)
    found = sorted(key for key in own_options.keys() | options.keys() if own_options.get(key) != options.get(key))
    return found + (["vocabulary or merges"] if own_body != body else [])


def _model(backend: Any) -> tuple[dict[str, Any], bytes]:
    """The options of a backend's model, and its vocabulary and all after that, as they are serialised."""
    head, _, body = backend.model.__getstate__().partition(b'"vocab":')
    options = {
        key: value for key, value in json.loads(head.rstrip(b",") + b"}").items() if value not in (None, "", False)
    }
    if _knows_every_byte(backend, options):
        for irrelevant in ("unk_token", "fuse_unk", "byte_fallback"):
            options.pop(irrelevant, None)
    return options, body


def _knows_every_byte(backend: Any, options: dict[str, Any]) -> bool:
    from tokenizers import pre_tokenizers

    if "ByteLevel" in json.dumps(_content(backend.pre_tokenizer)):
        names: list[str] = pre_tokenizers.ByteLevel.alphabet()
    elif options.get("byte_fallback"):
        names = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        return False
    return all(backend.model.token_to_id(name) is not None for name in names)


def _added_tokens(backend: Any, are_normalized: bool) -> dict[str, tuple[Any, ...]]:
    return {
        token.content: (
            *(index, token.single_word, token.lstrip, token.rstrip),
            are_normalized and token.normalized,
            backend.encode_special_tokens and token.special,
        )
        for index, token in backend.get_added_tokens_decoder().items()
    }
