"""Instructions whose following a program can check, appended to held-out prompts. Fixed here, before any training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple


class Constraint(NamedTuple):
    """`instruction` is appended to a prompt; `is_followed` says of an answer whether it does so."""

    name: str
    instruction: str
    is_followed: Callable[[str], bool]


def _words(text: str) -> int:
    return len(text.split())


def _items(text: str) -> int:
    return len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+\S", text, flags=re.MULTILINE))


def _is_json(text: str) -> bool:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)```\s*", text, flags=re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return isinstance(value, dict | list)


CONSTRAINTS = (
    Constraint("at most 30 words", "Answer in at most 30 words.", lambda text: 0 < _words(text) <= 30),
    Constraint("at least 60 words", "Answer in at least 60 words.", lambda text: _words(text) >= 60),
    Constraint(
        "one sentence",
        "Answer in a single sentence that ends with a full stop.",
        lambda text: text.rstrip().endswith(".") and not re.search(r"[.!?]\s+\S", text.strip()),
    ),
    Constraint(
        "three items",
        "Answer as a list of exactly three items, one a line, each after a dash.",
        lambda text: _items(text) == 3,
    ),
    Constraint(
        "keyword",
        "Use the word 'therefore' in your answer.",
        lambda text: re.search(r"\btherefore\b", text, flags=re.IGNORECASE) is not None,
    ),
    Constraint(
        "ends with",
        "End your answer with the word DONE.",
        lambda text: re.search(r"\bDONE\W*$", text.rstrip()) is not None,
    ),
    Constraint(
        "no commas", "Do not use any comma in your answer.", lambda text: bool(text.strip()) and "," not in text
    ),
    Constraint("JSON", "Answer as JSON only, without anything before or after it.", _is_json),
)


def constraint_of(n: int) -> Constraint:
    """That of the n-th held-out prompt: they take turns."""
    return CONSTRAINTS[n % len(CONSTRAINTS)]
