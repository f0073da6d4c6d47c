"""Which characters of a text each of its tokens stands for.

A fast tokenizer says so itself (offsets). A slow one, written in Python, does not: its tokens are placed by matching
their surfaces along the text, all of it, or, where the surfaces do not show what they stand for, by decoding prefixes.
What cannot be placed for certain raises `AlignmentError`; nothing is guessed.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastcompat.tokens.pieces import Pieces, piece_pattern

# Encodings of a batch live at once, at some 200 bytes a token: a batch of characters that keeps them near 100 MB.
_CHARACTERS_PER_CALL = 1_000_000

# A text on which tokenizers differ.
PROBE = " Hello,\tWORLD  it's 12345\n\nnaïve café — 東京 😀 e\u0301 ﬁ <s></s>"


class AlignmentError(Exception):
    """A text cannot be tokenised, or its tokens cannot be placed in it. Never leaves the package."""


class Alignment(Protocol):
    """The tokens of one text. Extents are monotone: neither starts nor ends ever decrease."""

    @property
    def ids(self) -> Sequence[int] | npt.NDArray[np.int32]:
        """Token ids, [n]."""

    def extent(self, index: int) -> tuple[int, int]:
        """Characters [start, end) of token `index`; start == end for a token without characters of its own."""

    def around(self, character: int) -> tuple[int, int]:
        """Tokens [low, high): those before low end where `character` begins or before, those from high on begin there
        or behind it. What lies between has to be looked at."""


class Aligner(Protocol):
    """Tokenises texts without adding special tokens, in order. A text that fails has its error in its place."""

    def __call__(self, texts: Sequence[str]) -> Iterator[Alignment | AlignmentError]: ...


def aligner(tokenizer: Any) -> Aligner:
    """The aligner that fits a Hugging Face tokenizer."""
    if tokenizer.is_fast:
        fast = FastAligner(tokenizer)
        try:
            # A few classes rewrite the text in Python before their backend sees it; offsets would be in another text.
            if fast.backend.encode(PROBE, add_special_tokens=False).ids == _encode(tokenizer, PROBE):
                return fast
        except Exception:  # the vocabulary lacks a character of it, and has no unknown token
            return fast
    return SlowAligner(tokenizer)


def covering(alignment: Alignment, start: int, end: int) -> tuple[int, int]:
    """Tokens [first, stop) whose characters overlap [start, end).

    A token that straddles an end of the range is in; one without characters at the boundary belongs to what follows.
    """
    tokens = range(len(alignment.ids))

    def reaches(index: int) -> bool:
        token_start, token_end = alignment.extent(index)
        return token_end > start or token_start >= start

    low, high = alignment.around(start)
    first = bisect_left(tokens, True, lo=low, hi=high, key=reaches)
    low, high = alignment.around(end)
    stop = bisect_left(
        tokens, True, lo=max(first, low), hi=max(first, high), key=lambda index: alignment.extent(index)[0] >= end
    )
    return first, stop


class _Whole:
    """An alignment of which any token may lie anywhere."""

    __slots__ = ("ids",)

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def around(self, character: int) -> tuple[int, int]:
        return 0, len(self.ids)


class _FastAlignment(_Whole):
    __slots__ = ("_encoding",)

    def __init__(self, encoding: Any) -> None:
        super().__init__(encoding.ids)
        self._encoding = encoding

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
        pattern = piece_pattern(self.backend)
        self.pieces = None if pattern is None else Pieces(self.backend, pattern)
        if self.pieces is not None and not self._is_exact(self.pieces):
            self.pieces = None

    def __call__(self, texts: Sequence[str]) -> Iterator[Alignment | AlignmentError]:
        for batch in _batches(texts):
            found: Sequence[Alignment]
            try:
                found = self._batch(batch) if self.pieces is None else self.pieces(batch)
            except Exception:
                yield from map(self._one, batch)  # one row's fault is not its neighbours'
                continue
            yield from found

    def _batch(self, texts: Sequence[str]) -> list[_FastAlignment]:
        return [_FastAlignment(encoding) for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def _is_exact(self, pieces: Pieces) -> bool:
        """Whether the pieces of texts on which tokenizers differ give what the whole texts give."""
        texts = [PROBE, PROBE * 2]
        try:
            return all(_alike(own, whole) for own, whole in zip(pieces(texts), self._batch(texts), strict=True))
        except Exception:
            return False

    def _one(self, text: str) -> Alignment | AlignmentError:
        try:
            return _FastAlignment(self.backend.encode(text, add_special_tokens=False))
        except Exception as error:
            return _failure(error)


def _alike(one: Alignment, other: Alignment) -> bool:
    if list(one.ids) != list(other.ids):
        return False
    return all(one.extent(index) == other.extent(index) for index in range(len(one.ids)))


class _DecodedAlignment(_Whole):
    """Tokens placed by the length of the text that their prefix decodes to; found by bisection, so few are decoded."""

    __slots__ = ("_n_complete", "_text", "_tokenizer")

    def __init__(self, tokenizer: Any, ids: list[int], text: str) -> None:
        super().__init__(ids)
        self._tokenizer = tokenizer
        self._text = text
        self._n_complete = {0: 0}

    def extent(self, index: int) -> tuple[int, int]:
        # Of the tokens that split a character, the last one completes it; those before it are empty and precede it.
        return self._reach(index), self._reach(index + 1)

    def _reach(self, n_tokens: int) -> int:
        """Characters of the text that are complete after `n_tokens`."""
        if n_tokens not in self._n_complete:
            self._n_complete[n_tokens] = self._decoded_length(_decode(self._tokenizer, self.ids[:n_tokens]))
        return self._n_complete[n_tokens]

    def _decoded_length(self, decoded: str) -> int:
        if self._text.startswith(decoded):
            return len(decoded)
        whole = decoded.rstrip(_HALF_READ)
        if len(whole) < len(decoded) and self._text.startswith(whole):
            return len(whole)
        raise AlignmentError("the tokenizer gives no offsets, and a prefix of its tokens decodes to another text")


class _SurfaceAlignment(_Whole):
    """Tokens placed one after the other where their surfaces stand in the text; only blanks may lie between."""

    __slots__ = ("_extents",)

    def __init__(self, ids: list[int], extents: npt.NDArray[np.int64]) -> None:
        super().__init__(ids)
        self._extents = extents

    def extent(self, index: int) -> tuple[int, int]:
        start, end = self._extents[index].tolist()
        return start, end


class SlowAligner:
    """Placement for tokenizers without offsets: exact, or an `AlignmentError`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        self._is_byte_level = is_byte_level(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Iterator[Alignment | AlignmentError]:
        for text in texts:
            try:
                yield self._one(text)
            except AlignmentError as error:
                yield error
            except Exception as error:
                yield _failure(error)

    def _one(self, text: str) -> Alignment:
        ids = _encode(self._tokenizer, text)
        try:
            return _SurfaceAlignment(ids, self._match_surfaces(ids, text))
        except AlignmentError:
            # A character that stands for half-read ones would be taken for one of them.
            if _HALF_READ in text or _decode(self._tokenizer, ids) != text:
                raise
            return _DecodedAlignment(self._tokenizer, ids, text)

    def _match_surfaces(self, ids: list[int], text: str) -> npt.NDArray[np.int64]:
        data = text.encode()
        lowered = text.lower().encode()
        readings = (data, lowered if len(lowered) == len(data) else data)
        extents = np.zeros((len(ids), 2), dtype=np.int64)  # in bytes
        cursor = 0
        for index, (token, surface) in enumerate(zip(ids, self._tokenizer.convert_ids_to_tokens(ids), strict=True)):
            placed = _place(self._spellings(token, surface), readings, cursor)
            if placed is None and token == self._tokenizer.unk_token_id:
                raise AlignmentError("the tokenizer gives no offsets, and does not know some characters of the text")
            if placed is None:
                raise AlignmentError(f"the tokenizer gives no offsets, and token {surface!r} is not found in the text")
            extents[index] = placed
            cursor = placed[1]
        if _blanks_end(data, cursor) < len(data):
            raise AlignmentError("the tokenizer gives no offsets, and its tokens end before the text does")
        for index in range(len(ids) - 2, -1, -1):  # a blank that the tokenizer put in belongs to what follows
            if extents[index, 0] == extents[index, 1]:
                extents[index] = extents[index + 1, 0]
        is_first_byte = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
        n_begun = np.concatenate([[0], np.cumsum(is_first_byte)])  # characters begun in the first b bytes
        begins_inside = ~np.append(is_first_byte, True)[extents[:, 0]]
        ends = np.where(extents[:, 0] < extents[:, 1], n_begun[extents[:, 1]], n_begun[extents[:, 0]])
        return np.stack([n_begun[extents[:, 0]] - begins_inside, ends], axis=1)

    def _spellings(self, token: int, surface: str) -> tuple[bytes, ...]:
        """What a token of any kind of vocabulary can stand for in the text, the likeliest first."""
        if token in self._added:
            return (surface.encode(),)
        if byte := byte_of(surface):
            return (byte, surface.encode())
        if self._is_byte_level:
            return (byte_level_bytes(surface),)
        text = surface.replace("\u2581", " ")
        texts = [text, text.removeprefix("##"), text.removesuffix("</w>"), text.removesuffix("@@")]
        as_bytes = [surface.encode("latin-1")] if len(surface) == 1 and surface < "\u0100" else []  # ByT5
        return (*(spelling.encode() for spelling in texts), *as_bytes)


_HALF_READ = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are not yet a character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BLANKS = re.compile(rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe3\x80\x80)*")


def _blanks_end(data: bytes, cursor: int) -> int:
    match = _BLANKS.match(data, cursor)
    return match.end() if match else cursor


def _place(spellings: Sequence[bytes], readings: Sequence[bytes], cursor: int) -> tuple[int, int] | None:
    """Where one of `spellings` stands: at the cursor as it is, else after the blanks there and without its own."""
    for spelling in spellings:
        if spelling and any(reading.startswith(spelling, cursor) for reading in readings):
            return cursor, cursor + len(spelling)
    after_blanks = _blanks_end(readings[0], cursor)
    for spelling in spellings:
        bare = spelling.strip()
        if not bare:
            return cursor, cursor  # a blank that the tokenizer put in
        if any(reading.startswith(bare, after_blanks) for reading in readings):
            return after_blanks, after_blanks + len(bare)
    return None


def is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary is GPT-2's kind, whose tokens spell bytes in printable characters."""
    if tokenizer.is_fast:
        return "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    return "\u0120" in tokenizer.get_vocab()  # the blank


def byte_of(surface: str) -> bytes | None:
    """The byte that a token of a vocabulary with byte fallback stands for, None where it is another token."""
    found = _BYTE_TOKEN.fullmatch(surface)
    return bytes([int(found[1], 16)]) if found else None


def byte_level_bytes(surface: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary spells; of an added token, the bytes of its text."""
    stand_ins = _stand_ins()
    if any(character not in stand_ins for character in surface):
        return surface.encode()
    return bytes(stand_ins[character] for character in surface)


@cache
def _stand_ins() -> dict[str, int]:
    """GPT-2's stand-ins for bytes: printable Latin-1 is itself, the others are the characters from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


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
