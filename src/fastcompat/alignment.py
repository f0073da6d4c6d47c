"""Which characters of a text each of its tokens stands for.

A fast tokenizer says so itself (offsets). A slow one, written in Python, does not: its tokens are placed by decoding
prefixes, or, where decoding does not give the text back, by matching the tokens' surfaces along the text. What cannot
be placed for certain raises `AlignmentError`; nothing is guessed.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# Encodings of a batch live at once, at some 200 bytes a token: a batch of characters that keeps them near 100 MB.
_CHARACTERS_PER_CALL = 1_000_000


class AlignmentError(Exception):
    """A text cannot be tokenised, or its tokens cannot be placed in it. Never leaves the package."""


class Alignment(Protocol):
    """The tokens of one text. Extents are monotone: neither starts nor ends ever decrease."""

    @property
    def ids(self) -> list[int]:
        """Token ids, [n]."""

    def extent(self, index: int) -> tuple[int, int]:
        """Characters [start, end) of token `index`; start == end for a token without characters of its own."""


class Aligner(Protocol):
    """Tokenises texts without adding special tokens, in order. A text that fails has its error in its place."""

    def __call__(self, texts: Sequence[str]) -> Iterator[Alignment | AlignmentError]: ...


def aligner(tokenizer: Any) -> Aligner:
    """The aligner that fits a Hugging Face tokenizer."""
    return FastAligner(tokenizer) if tokenizer.is_fast else SlowAligner(tokenizer)


def covering(alignment: Alignment, start: int, end: int) -> tuple[int, int]:
    """Tokens [first, stop) whose characters overlap [start, end).

    A token that straddles an end of the range is in; one without characters at the boundary belongs to what follows.
    """
    tokens = range(len(alignment.ids))

    def reaches(index: int) -> bool:
        token_start, token_end = alignment.extent(index)
        return token_end > start or token_start >= start

    first = bisect_left(tokens, True, key=reaches)
    stop = bisect_left(tokens, True, lo=first, key=lambda index: alignment.extent(index)[0] >= end)
    return first, stop


class _FastAlignment:
    __slots__ = ("_encoding", "ids")

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.ids: list[int] = encoding.ids

    def extent(self, index: int) -> tuple[int, int]:
        start, end = self._encoding.token_to_chars(index)
        return start, end


class FastAligner:
    """Offsets from the `tokenizers` library, on a private copy of the backend.

    The copy has no post-processor: it only adds special tokens, which are not wanted here, and trims the offsets of
    byte-level tokens, so that a token of blanks would lie nowhere. Truncation and padding are off for the same reason.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend: Any = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = tokenizer.split_special_tokens

    def __call__(self, texts: Sequence[str]) -> Iterator[Alignment | AlignmentError]:
        for batch in _batches(texts):
            try:
                encodings = self.backend.encode_batch(batch, add_special_tokens=False)
            except Exception:
                yield from map(self._one, batch)  # one row's fault is not its neighbours'
                continue
            yield from map(_FastAlignment, encodings)

    def _one(self, text: str) -> Alignment | AlignmentError:
        try:
            return _FastAlignment(self.backend.encode(text, add_special_tokens=False))
        except Exception as error:
            return _failure(error)


class _DecodedAlignment:
    """Tokens placed by the length of the text that their prefix decodes to; found by bisection, so few are decoded."""

    __slots__ = ("_reached", "_text", "_tokenizer", "ids")

    def __init__(self, tokenizer: Any, ids: list[int], text: str) -> None:
        self.ids = ids
        self._tokenizer = tokenizer
        self._text = text
        self._reached: dict[int, tuple[int, int]] = {0: (0, 0)}

    def extent(self, index: int) -> tuple[int, int]:
        complete, _ = self._reach(index)
        _, begun = self._reach(index + 1)
        return complete, begun

    def _reach(self, n_tokens: int) -> tuple[int, int]:
        """Characters complete after `n_tokens`, and characters begun: one more inside a character of several tokens."""
        if n_tokens not in self._reached:
            self._reached[n_tokens] = self._decoded_length(_decode(self._tokenizer, self.ids[:n_tokens]))
        return self._reached[n_tokens]

    def _decoded_length(self, decoded: str) -> tuple[int, int]:
        if self._text.startswith(decoded):
            return len(decoded), len(decoded)
        whole = decoded.rstrip("\N{REPLACEMENT CHARACTER}")
        n_replaced = len(decoded) - len(whole)
        if not n_replaced or not self._text.startswith(whole):
            raise AlignmentError("the tokenizer gives no offsets, and a prefix of its tokens decodes to another text")
        # Some of the replacement characters may stand in the text itself; the last one is a character half read.
        complete = len(whole)
        while n_replaced and self._text.startswith("\N{REPLACEMENT CHARACTER}", complete):
            complete, n_replaced = complete + 1, n_replaced - 1
        return complete, complete + bool(n_replaced)


class _SurfaceAlignment:
    """Tokens placed one after the other where their surfaces stand in the text; only blanks may lie between."""

    __slots__ = ("_extents", "ids")

    def __init__(self, ids: list[int], extents: npt.NDArray[np.int64]) -> None:
        self.ids = ids
        self._extents = extents

    def extent(self, index: int) -> tuple[int, int]:
        start, end = self._extents[index].tolist()
        return start, end


class SlowAligner:
    """Placement for tokenizers without offsets: exact, or an `AlignmentError`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)

    def __call__(self, texts: Sequence[str]) -> Iterator[Alignment | AlignmentError]:
        for text in texts:
            try:
                yield self._one(text)
            except AlignmentError as error:
                yield error
            except Exception as error:
                yield _failure(error)

    def _one(self, text: str) -> Alignment:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if _decode(self._tokenizer, ids) == text:
            decoded = _DecodedAlignment(self._tokenizer, ids, text)
            try:
                for quarter in (1, 2, 3):  # a tokenizer whose prefixes do not decode to prefixes shows it early
                    decoded.extent(len(ids) * quarter // 4)
                return decoded
            except (AlignmentError, IndexError):
                pass
        return _SurfaceAlignment(ids, self._match_surfaces(ids, text))

    def _match_surfaces(self, ids: list[int], text: str) -> npt.NDArray[np.int64]:
        extents = np.zeros((len(ids), 2), dtype=np.int64)
        cursor = 0
        pending = b""  # bytes that are still missing of the character at the cursor
        for index, (token, surface) in enumerate(zip(ids, self._tokenizer.convert_ids_to_tokens(ids), strict=True)):
            byte = None if token in self._added else _BYTE_TOKEN.fullmatch(surface)
            if byte is not None and (pending or text[cursor : cursor + 1]):
                pending = pending or text[cursor].encode()
                if pending[0] != int(byte[1], 16):
                    raise AlignmentError(f"token {surface!r} is not a byte of character {cursor} of the text")
                extents[index] = cursor, cursor + 1
                pending = pending[1:]
                cursor += not pending
                continue
            spellings = (surface,) if token in self._added else _spellings(surface)
            placed = _place(spellings, text, cursor)
            if placed is None and token == self._tokenizer.unk_token_id:
                raise AlignmentError("the tokenizer gives no offsets, and does not know some characters of the text")
            if pending or placed is None:
                raise AlignmentError(
                    f"the tokenizer gives no offsets, and token {surface!r} does not stand in the text"
                )
            extents[index] = placed
            cursor = placed[1]
        if pending or text[cursor:].strip():
            raise AlignmentError("the tokenizer gives no offsets, and its tokens end before the text does")
        return extents


_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _spellings(surface: str) -> tuple[str, ...]:
    """The texts that a token of a SentencePiece, WordPiece or BPE vocabulary can stand for, the likeliest first."""
    text = surface.replace("\u2581", " ")
    return (text, text.removeprefix("##"), text.removesuffix("</w>"), text.removesuffix("@@"))


def _place(spellings: Sequence[str], text: str, cursor: int) -> tuple[int, int] | None:
    """Where one of `spellings` stands: at the cursor as it is, else after the blanks there and without its own."""
    for spelling in spellings:
        if spelling and text.startswith(spelling, cursor):
            return cursor, cursor + len(spelling)
    after_blanks = cursor
    while text[after_blanks : after_blanks + 1].isspace():
        after_blanks += 1
    for spelling in spellings:
        bare = spelling.strip()
        if not bare:
            return cursor, cursor  # a blank that the tokenizer put in
        end = after_blanks + len(bare)
        if text[after_blanks:end] == bare or text[after_blanks:end].lower() == bare:
            return after_blanks, end
    return None


def _decode(tokenizer: Any, ids: list[int]) -> str:
    decoded: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return decoded


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_characters = 0
    for text in texts:
        if batch and n_characters + len(text) > _CHARACTERS_PER_CALL:
            yield batch
            batch, n_characters = [], 0
        batch.append(text)
        n_characters += len(text)
    if batch:
        yield batch


def _failure(error: Exception) -> AlignmentError:
    return AlignmentError(f"the text cannot be tokenised: {' '.join(str(error).split()) or type(error).__name__}")
