"""Texts cut where a tokenizer itself always cuts them, so that each distinct piece is encoded once.

A tokenizer with a byte-level vocabulary splits a text by a pattern before it looks up anything. Of nearly all of them
the pattern is made of a few alternatives that are known here (GPT-2, Llama 3, Qwen, DeepSeek, gpt-oss, Mistral), and
what these can match says where a split is certain:

    before a blank that follows no white space     white space begins a match, or is all of it, or, as line breaks, ends
                                                   it after punctuation
    after ASCII letters and digits, before ASCII   what holds a letter or a digit ends with one, but for 's and the like
    punctuation but ', a blank or a line break
    after a line break, before what is neither     where line breaks have an alternative of their own, which reaches to
    white space nor /                              the last of them

The only alternative that looks ahead, `\\s+(?!\\S)`, looks from white space to what follows it. Only the last of these
cuts lies behind white space, and there it never has its turn. So what is left of a cut is encoded the same whatever is
right of it, and the other way round. NFC composes nothing across a cut, and an added token that could lie across one,
or looks at its neighbours, forbids that cut, or all.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

# Pieces that are kept, some 150 bytes each: the words of a few languages. Longer ones hardly come again.
_MOST_KEPT = 1 << 17
_LONGEST_KEPT = 48
_WORDS_PER_TEXT = 64

_PUNCTUATION = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~'
_WORD = re.compile(r"[A-Za-z0-9]")

# The alternatives of patterns that may split a text. \r and \n are written out, whatever the file has.
_SHORT = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"}
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = {
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{upper}{_LOWER}{lower}{suffix}"
    for upper, lower in (("*", "+"), ("+", "*"))
    for suffix in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
}
_LETTERS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    *_CASED,
}
_AFTER_PUNCTUATION = {r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""}
_DIGITS = {r" ?\p{N}+", r"\p{N}+", r"\p{N}{1,3}", r"\p{N}"}
_OTHERS = {
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[\p{P}\p{S}]+[\r\n]*",
}
_LINES = {r"\s*[\r\n]+", r"\s*[\r\n]"}
_BLANKS, _BUT_THE_LAST = r"\s+", r"\s+(?!\S)"
_KNOWN = _SHORT | _LETTERS | _AFTER_PUNCTUATION | _DIGITS | _OTHERS | _LINES | {_BLANKS, _BUT_THE_LAST}
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Patterns that isolate runs of characters among which no cut lies.
_RUNS = {r"\p{N}{1,3}", r"\p{N}", r"\p{N}+", "[一-龥぀-ゟ゠-ヿ]+"}  # as DeepSeek has it


def piece_pattern(backend: Any) -> re.Pattern[str] | None:
    """What finds the pieces of a text, one after the other; None where no cut is certain for this backend.

    backend: of the `tokenizers` library, without post-processor, truncation and padding.
    """
    from tokenizers.models import BPE

    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return None
    try:
        normalizer, splitting = (_content(part) for part in (backend.normalizer, backend.pre_tokenizer))
    except Exception:  # a part that is written in Python has no content
        return None
    cuts_lines = _cuts_lines(_flat(splitting, "pretokenizers"))
    if cuts_lines is None or any(part != {"type": "NFC"} for part in _flat(normalizer, "normalizers")):
        return None
    punctuation = set(_PUNCTUATION)
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word:
            return None
        # It may stand in a text as NFC has yet to make it: x and a Greek question mark, which becomes x;.
        for left, right in chain(pairwise(token.content), pairwise(normalize("NFD", token.content))):
            if (right == " " and not left.isspace()) or (left == "\n" and not right.isspace()):
                return None
            if _WORD.match(left):
                if right in "\r\n":
                    return None
                punctuation.discard(right)
    follows = "".join(map(re.escape, sorted(punctuation)))
    # Blanks, punctuation and a word; else all up to a cut after line breaks, or before a blank.
    word = rf" *+[!-/:-@\[-`{{-~]*+[A-Za-z0-9]++(?=[{follows} \r\n])"
    to_blank = r"(?:[^ ]++|(?<=\s) ++)*+"
    other = rf" *+[^ \n]*+(?:\n++(?=[^\s/])|{to_blank})" if cuts_lines else rf" *+{to_blank}"
    return re.compile(f"{word}|{other}")


def _content(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return found


def _flat(content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The parts of a sequence, in order."""
    if content.get("type") == "Sequence":
        return list(chain.from_iterable(_flat(part, key) for part in content[key]))
    return [content] if content else []


def _cuts_lines(stages: Sequence[dict[str, Any]]) -> bool | None:
    """Whether cuts after line breaks are certain too; None where none is.

    A stage works on each part that the one before it has made, alone. So it is enough that one of them cuts for
    certain, and that those before it split nothing otherwise on one side of a cut because of what is on the other.
    """
    isolates_digits = False
    for number, stage in enumerate(stages):
        own = stage["type"]
        if own not in ("Split", "Digits", "ByteLevel") or stage.get("add_prefix_space"):
            return None
        if own == "Digits":
            isolates_digits = True
            continue
        pattern = _GPT2 if own == "ByteLevel" and stage.get("use_regex", True) else _written(stage)
        if pattern is None:
            return None
        if pattern in _RUNS:
            isolates_digits |= pattern.startswith(r"\p{N}")
            continue
        alternatives = _alternatives(pattern)
        found = set(alternatives)
        has_all = found & _LETTERS and found & _OTHERS and (isolates_digits or found & _DIGITS) and _BLANKS in found
        if not has_all or not found <= _KNOWN:
            return None
        if any(later["type"] not in ("Split", "Digits", "ByteLevel") for later in stages[number:]):
            return None
        if any(later.get("add_prefix_space") for later in stages[number:]):
            return None
        # The first alternative that fits has it: line breaks before other white space.
        blanks = [own for own in alternatives if own in {*_LINES, _BLANKS, _BUT_THE_LAST}]
        return blanks[0] in _LINES
    return None


def _written(stage: dict[str, Any]) -> str | None:
    """A stage's regular expression, None where it has none that isolates what it matches."""
    pattern = stage.get("pattern", {}).get("Regex")
    if pattern is None or (stage["behavior"], stage["invert"]) not in (("Isolated", False), ("Removed", True)):
        return None
    return str(pattern).replace("\r", r"\r").replace("\n", r"\n")


def _alternatives(pattern: str) -> list[str]:
    """What a regular expression is a choice of, in order."""
    found, depth, in_class, begin, index = [], 0, False, 0, 0
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            index += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            found.append(pattern[begin:index])
            begin = index + 1
        index += 1
    return [*found, pattern[begin:]]


class Pieces:
    """Encodes texts piece by piece, and remembers what pieces are encoded to."""

    def __init__(self, backend: Any, pattern: re.Pattern[str]) -> None:
        self._backend = backend
        self._pattern = pattern
        self._kept: dict[str, bytes] = {}
        self._extents: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, texts: Sequence[str]) -> list[PiecedAlignment]:
        """The tokens of each text. Raises what the backend raises."""
        if len(self._kept) > _MOST_KEPT:
            self._kept = {}
        kept = self._kept  # as it is: another thread may begin a new one
        pieces = [self._pattern.findall(text) for text in texts]
        ids: list[list[bytes]] = [list(map(kept.get, own)) for own in pieces]  # type: ignore[arg-type]  # None for new
        new = {piece for own, found in zip(pieces, ids, strict=True) if None in found for piece in _new(own, found)}
        encoded = self._encoded(new)
        for own, found in zip(pieces, ids, strict=True):
            if None in found:
                found[:] = [encoded[piece] if known is None else known for piece, known in zip(own, found, strict=True)]
        kept.update((piece, own) for piece, own in encoded.items() if len(piece) <= _LONGEST_KEPT)
        return [PiecedAlignment(self, *own) for own in zip(texts, pieces, ids, strict=True)]

    def _encoded(self, new: set[str]) -> dict[str, bytes]:
        """The ids of each piece, int32."""
        # A call takes the backend longer than a word. Where one begins with a blank and the one before it does not end
        # with one, there is a cut between them.
        words = [piece for piece in new if piece[:1] == " " and not piece[-1].isspace()]
        groups = [words[begin : begin + _WORDS_PER_TEXT] for begin in range(0, len(words), _WORDS_PER_TEXT)]
        others = list(new.difference(words))
        encodings = self._backend.encode_batch(["".join(group) for group in groups] + others, add_special_tokens=False)
        found: dict[str, bytes] = {}
        for group, encoding in zip(groups, encodings, strict=False):
            ids = np.array(encoding.ids, np.int32)
            starts = np.array([start for start, _ in encoding.offsets], np.int64)
            bounds = np.searchsorted(starts, [0, *accumulate(map(len, group))]).tolist()
            for piece, (begin, end) in zip(group, pairwise(bounds), strict=True):
                found[piece] = ids[begin:end].tobytes()
        for piece, encoding in zip(others, encodings[len(groups) :], strict=True):
            found[piece] = np.array(encoding.ids, np.int32).tobytes()
        return found

    def extents(self, piece: str) -> list[tuple[int, int]]:
        """Characters [start, end) of each token of a piece, in the piece."""
        found = self._extents.get(piece)
        if found is None:
            if len(self._extents) > _MOST_KEPT // 16:
                self._extents = {}
            found = self._backend.encode(piece, add_special_tokens=False).offsets
            self._extents[piece] = found
        return found


class PiecedAlignment:
    """The tokens of a text, and where they lie, by those of its pieces."""

    __slots__ = ("_encoded", "_found", "_n_characters", "_pieces", "_texts", "ids")

    def __init__(self, pieces: Pieces, text: str, texts: Sequence[str], encoded: Sequence[bytes]) -> None:
        self.ids: npt.NDArray[np.int32] = np.frombuffer(b"".join(encoded), np.int32)
        self._pieces = pieces
        self._n_characters = len(text)
        self._texts = texts
        self._encoded = encoded
        self._found = (0, 0, 0)  # a piece, its first token and its first character

    def extent(self, index: int) -> tuple[int, int]:
        """Characters [start, end) of token `index`."""
        piece, first, begin = self._found
        if not 0 <= index - first < len(self._encoded[piece]) // 4:
            counts = [0, *accumulate(len(ids) // 4 for ids in self._encoded)]
            piece = bisect_right(counts, index) - 1
            first, begin = counts[piece], sum(map(len, self._texts[:piece]))
            self._found = piece, first, begin
        start, end = self._pieces.extents(self._texts[piece])[index - first]
        return begin + start, begin + end

    def around(self, character: int) -> tuple[int, int]:
        """Tokens [low, high) of the piece in which `character` stands, none where a piece begins with it."""
        texts, encoded = self._texts, self._encoded
        if 2 * character < self._n_characters:
            piece, begin = 0, 0
            while piece < len(texts) and begin + len(texts[piece]) <= character:
                begin += len(texts[piece])
                piece += 1
            first = sum(map(len, encoded[:piece])) // 4
        else:
            piece, begin = len(texts), self._n_characters
            while piece and begin > character:
                piece -= 1
                begin -= len(texts[piece])
            first = len(self.ids) - sum(map(len, encoded[piece:])) // 4
        if begin >= character:
            return first, first
        if piece == len(texts):
            return len(self.ids), len(self.ids)
        self._found = piece, first, begin
        return first, first + len(encoded[piece]) // 4


def _new(pieces: Sequence[str], ids: Sequence[bytes | None]) -> Iterator[str]:
    return (piece for piece, known in zip(pieces, ids, strict=True) if known is None)
