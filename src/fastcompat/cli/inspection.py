"""What `fastcompat inspect` prints: a row, its tokens, and which of them are scored, or where a reward is read.

Scored runs, and the tokens at which a head reads, stand between ⟦ and ⟧, so that a pipe, or a reader who cannot tell
the colours apart, sees them too. Blanks and control characters are made visible: a terminal must not run what a
corpus contains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastcompat.rows import SCORED_STATUSES, Response
from fastcompat.tokens import (
    ConversationTokenizer,
    RewardSequence,
    RewardTokenizer,
    TokenSequence,
    byte_level_bytes,
    byte_of,
    is_byte_level,
)

AnySequence: TypeAlias = TokenSequence | RewardSequence
AnyTokenizer: TypeAlias = ConversationTokenizer | RewardTokenizer

SCORED_BEGIN, SCORED_END = "⟦", "⟧"

# Neighbouring tokens alternate, so that their borders show.
_SCORED_STYLES = ("bold black on green", "bold black on bright_green")
_PROMPT_STYLES = ("default", "dim")
_SPECIAL_STYLE = "magenta"
_VISIBLE = {" ": "·", "\t": "→", "\n": "↵\n", "\r": "␍", "\x7f": "␡"}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring tokens that make whole characters only together: mostly one token."""

    text: str
    first: int
    n_tokens: int
    is_special: bool


def render_inspection(
    row: Response, sequence: AnySequence, tokenizer: AnyTokenizer, *, ids: bool = False
) -> RenderableType:
    """A header, the conversation as tokens with the scored ones marked, and with `ids` a table of every token.

    Of a row without tokens the turns as they are in the corpus.
    """
    parts: list[RenderableType] = [_header(row, sequence, tokenizer), Text()]
    if len(sequence.input_ids):
        parts.append(_conversation(sequence, tokenizer.tokenizer))
    else:
        parts += [_turn(role, content, extra) for role, content, extra in row.messages]
    if ids:
        parts += [Text(), _id_table(sequence, tokenizer.tokenizer)]
    return Group(*parts)


def _marked(sequence: AnySequence) -> NDArray[np.bool_]:
    """[n] the tokens that count."""
    if isinstance(sequence, TokenSequence):
        return sequence.scored
    marked = np.zeros(len(sequence.input_ids), np.bool_)
    marked[list(sequence.reads)] = True
    return marked


def _turn(role: str, content: str, extra: str) -> Text:
    text = Text(f"{_in_a_line(role)}: ", style="bold", overflow="fold")
    text.append(visible(content), style="default")
    text.append(f" {_in_a_line(extra)}" if extra else "", style="dim")
    return text


def _in_a_line(text: str) -> str:
    return "".join(c if c == " " else _visible_character(c) for c in text)


def visible(text: str) -> str:
    """`text` with blanks and control characters as printable marks; a line break keeps its effect after its mark."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's pictures of control characters
    # Marks that combine are printable; direction changes, zero-width and unassigned characters are not.
    return character if character.isprintable() else f"\\u{{{ord(character):x}}}"


def _counts(sequence: AnySequence) -> str:
    if isinstance(sequence, RewardSequence):
        places = " and ".join(str(position) for position in sequence.reads)
        return f"{sequence.n_tokens}" + (f", read at {places}" if places else "")
    n_after = len(sequence.input_ids) - sequence.n_prompt_tokens - sequence.n_tokens
    counts = f"{sequence.n_prompt_tokens} before the response, {sequence.n_tokens} scored"
    return counts + (f", {n_after} others" if n_after and sequence.n_tokens else "")


def _beside(row: Response) -> str:
    """What the row holds beside texts."""
    keys = {n: [key for key in message.others if key != "content"] for n, message in enumerate(row.messages)}
    turns = [f"turn {n}: {', '.join(own)}" for n, own in keys.items() if own]
    tools = [f"tools: {len(json.loads(row.tools))}"] if row.tools else []
    return " · ".join(turns + tools)


def _header(row: Response, sequence: AnySequence, tokenizer: AnyTokenizer) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    limit = "none" if tokenizer.max_length is None else f"{tokenizer.max_length} tokens"
    status = str(sequence.status) + (f": {sequence.detail}" if sequence.detail else "")
    for name, value in (
        ("row", row.row_key),
        ("generator", row.generator),
        ("template", tokenizer.description),
        ("token ids", tokenizer.token_ids),
        ("length limit", limit),
        ("beside texts", _beside(row)),
        ("tokens", _counts(sequence)),
        ("status", status),
    ):
        if not value:
            continue
        style = "red" if name == "status" and sequence.status not in SCORED_STATUSES else ""
        table.add_row(name, Text(_in_a_line(value), style=style))
    return table


def _conversation(sequence: AnySequence, tokenizer: Any) -> Text:
    text = Text(overflow="fold")
    pieces = token_pieces(tokenizer, sequence.input_ids.tolist())
    n_shown = 0
    marked = _marked(sequence)
    for scored, run in groupby(pieces, key=lambda piece: bool(marked[piece.first])):
        text.append(SCORED_BEGIN if scored else "")
        for piece in run:
            style = (_SCORED_STYLES if scored else _PROMPT_STYLES)[n_shown % 2]
            if piece.is_special and not scored:
                style = _SPECIAL_STYLE
            text.append(visible(piece.text), style=style)
            n_shown += 1
        text.append(SCORED_END if scored else "")
    return text


def _id_table(sequence: AnySequence, tokenizer: Any) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("index", justify="right")
    table.add_column("id", justify="right")
    table.add_column("scored" if isinstance(sequence, TokenSequence) else "read")
    table.add_column("token")
    surfaces = _surfaces(tokenizer, sequence.input_ids.tolist())
    for index, (token, scored, surface) in enumerate(zip(sequence.input_ids, _marked(sequence), surfaces, strict=True)):
        mark = Text("yes", style="green") if scored else Text("")
        table.add_row(str(index), str(token), mark, Text(_one_line(surface)))
    return table


def _one_line(surface: str | bytes) -> str:
    if isinstance(surface, bytes):
        try:
            surface = surface.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in surface)
    return visible(surface).replace("\n", "")


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[_Piece]:
    """The tokens' texts in order; tokens that split a character between them come as one piece.

    Joined, the pieces of a byte-level vocabulary are the tokenised text, byte for byte.
    """
    special = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    first, pending = 0, b""
    surfaces = _surfaces(tokenizer, ids)
    for index, surface in enumerate(surfaces):
        if isinstance(surface, str):
            if pending:  # a character that never becomes whole
                yield _Piece(pending.decode(errors="replace"), first, index - first, False)
            yield _Piece(surface, index, 1, ids[index] in special)
            first, pending = index + 1, b""
            continue
        pending += surface
        if _is_whole(pending) or index + 1 == len(ids):
            yield _Piece(pending.decode(errors="replace"), first, index + 1 - first, False)
            first, pending = index + 1, b""


def _is_whole(utf8: bytes) -> bool:
    try:
        utf8.decode()
    except UnicodeDecodeError as error:
        # Bytes that no further ones can mend are shown as they are.
        return error.reason != "unexpected end of data"
    return True


def _surfaces(tokenizer: Any, ids: Sequence[int]) -> list[str | bytes]:
    """What each token stands for: text, or bytes where it may be part of a character."""
    tokens: list[str] = tokenizer.convert_ids_to_tokens(list(ids))
    added = tokenizer.added_tokens_decoder
    spells_bytes = is_byte_level(tokenizer)
    surfaces: list[str | bytes] = []
    for index, token in zip(ids, tokens, strict=True):
        # Gemma's runs of blanks are added tokens that merges make as well; a special one is written as it is.
        if index in added and (spells_bytes or added[index].special):
            surfaces.append(added[index].content)
        elif spells_bytes:
            surfaces.append(byte_level_bytes(token))
        else:
            byte = byte_of(token)
            surfaces.append(token.replace("\u2581", " ") if byte is None else byte)
    return surfaces
