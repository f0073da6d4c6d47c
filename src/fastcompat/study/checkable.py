"""Whether an answer is the one that a task has."""

from __future__ import annotations

import re

# Behind the last of these stands what an answer comes to.
_MARKS = re.compile(r"####|(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*:?", flags=re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(answer: str, reference: str) -> bool:
    """Whether what an answer comes to is the reference.

    Where the reference is a number, the last number is compared, as a number. Otherwise what stands behind the last
    "####" or "answer is", else the last line: without case, blanks and punctuation at both ends.
    """
    if "####" in reference:
        reference = reference.rpartition("####")[2]
    wanted = _number(reference.strip().strip("$ ."))
    if wanted is not None:
        numbers = _NUMBER.findall(_behind_the_last_mark(answer)) or _NUMBER.findall(answer)
        return bool(numbers) and _number(numbers[-1]) == wanted
    return _plain(_behind_the_last_mark(answer)) == _plain(reference)


def _behind_the_last_mark(text: str) -> str:
    marks = [match for match in _MARKS.finditer(text) if text[match.end() :].strip()]
    if marks:
        return text[marks[-1].end() :]
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _number(text: str) -> float | None:
    return float(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().strip(" .,:;!?*'\"`")
