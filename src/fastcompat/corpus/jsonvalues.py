"""JSON values out of text: fast where it is plain JSON, else by what the text can only mean.

Programs that put JSON together by hand leave marks: raw line breaks in strings, `nan`, numbers without end, a name
twice in one object. Such a value costs at most itself, never the rest of its record.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fastcompat.corpus.records import AMBIGUOUS

_plain = json.JSONDecoder().raw_decode
# What C's printf writes where Python's json reads NaN and Infinity.
_NOT_FINITE = re.compile(r"[-+]?(?:nan|inf(?:inity)?)\b", re.IGNORECASE)
_MOST_NOT_FINITE = 256


class JsonReader:
    """Decodes the values of one file. While `thorough`, names that an object has twice are looked for, which takes a
    third longer: a program that writes such objects writes them from the start, so that a file's beginning tells.

    has_twice: an object with such names was seen; they are looked for from then on.
    """

    def __init__(self, *, thorough: bool = True, has_twice: bool = False) -> None:
        self.thorough = thorough
        self._thorough = json.JSONDecoder(object_pairs_hook=self._object).raw_decode
        self._lenient = json.JSONDecoder(object_pairs_hook=self._object, strict=False, parse_int=_number).raw_decode
        self.has_twice = has_twice

    def decode(self, text: str, position: int = 0) -> tuple[Any, int]:
        """The value that begins there, and where it ends. Raises JSONDecodeError, RecursionError."""
        decode = self._thorough if self.thorough or self.has_twice else _plain
        replaced = 0
        while True:
            try:
                return decode(text, position)
            except json.JSONDecodeError as error:
                odd = _NOT_FINITE.match(text, error.pos) if replaced < _MOST_NOT_FINITE else None
                if odd:
                    # Of the same length, so that places stay.
                    text = text[: odd.start()] + "NaN".ljust(odd.end() - odd.start()) + text[odd.end() :]
                    replaced += 1
                elif error.msg.startswith("Invalid control character") and decode is not self._lenient:
                    decode = self._lenient
                else:
                    raise
            except ValueError:
                # More digits than Python converts to an integer.
                if decode is self._lenient:
                    raise
                decode = self._lenient

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        self.has_twice = True
        found = {}
        for name, value in pairs:
            found[name] = AMBIGUOUS if name in found and found[name] != value else value
        return found


def _number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def what_is_broken(error: json.JSONDecodeError) -> str:
    """The error without its place."""
    # Some of the messages end with the word that the place should follow.
    return error.msg.removesuffix(" at")
