"""Pairs of answers of which one is better for a known reason: what the demo's reward model is trained on and tested by.

Each of the four good styles of the demo's generators is an answer to be preferred, and none of them to another one. An
answer is spoilt in four ways, of which three keep its style, so that neither length nor style says which is better.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from fastcompat.demo.corpus import GENERATORS, seeded
from fastcompat.demo.library import HELD_OUT_MODULES, Documented
from fastcompat.demo.training.text import held_out_things, known_things, quotation_check, source_files

STYLES = ("full-documentation", "summary", "chatty", "source-code")
KINDS = ("mismatched", "truncated", "shuffled", "repetitive")

# Of fewer words nothing can be cut off or shuffled that anybody would notice.
_MINIMUM_WORDS = 10
# Most things have no source: so many are drawn until one has an answer in the style that is asked for.
_DRAWS = 200


class Preference(NamedTuple):
    """Two answers about a thing: `chosen` in one of `STYLES`, `rejected` what one of `KINDS` makes of it."""

    thing: Documented
    style: str
    kind: str
    chosen: str
    rejected: str


def training_things() -> list[Documented]:
    """Everything documented outside of the held-out packages that quotes no documentation of theirs."""
    packages = {module.split(".")[0] for module in HELD_OUT_MODULES}
    quotes = quotation_check(held_out_things())
    return [
        thing
        for thing in known_things(list(source_files()))
        # `_collections_abc` calls itself `collections.abc`.
        if thing.name.split(".")[0] not in packages and not quotes(f"{thing.text}\n{thing.source}")
    ]


def preferences(thing: Documented, style: str, others: Sequence[Documented], *, draw: int = 0) -> list[Preference]:
    """At most one pair of each kind about `thing`, with one chosen answer; none if it has no answer in that style.

    mismatched: the same style about one of `others`, of another module. truncated: cut off after 30 to 90% of the
    words. shuffled: the words in random order. repetitive: the first sentence of the documentation, again and again.
    Another `draw` gives another mismatch, cut and order; the same one gives the same pairs in every process.
    """
    chosen = GENERATORS[style].respond(thing, others)
    if not chosen:
        return []
    chance = seeded(f"preferences {style} {draw}", thing.name)
    rejected = {
        "mismatched": _mismatched(thing, style, others, chance),
        "truncated": _truncated(chosen, chance),
        "shuffled": _shuffled(chosen, chance),
        "repetitive": GENERATORS["repetitive"].respond(thing, others),
    }
    return [
        Preference(thing, style, kind, chosen, answer)
        for kind, answer in rejected.items()
        if answer and answer.strip() != chosen.strip()
    ]


def _mismatched(thing: Documented, style: str, others: Sequence[Documented], chance: random.Random) -> str | None:
    package = thing.module.split(".")[0]
    for _ in range(_DRAWS if others else 0):
        other = chance.choice(others)
        if other.module.split(".")[0] != package and (answer := GENERATORS[style].respond(other, others)):
            return answer
    return None


def _truncated(text: str, chance: random.Random) -> str | None:
    words = list(re.finditer(r"\S+", text))
    if len(words) < _MINIMUM_WORDS:
        return None
    return text[: words[int(len(words) * chance.uniform(0.3, 0.9)) - 1].end()].rstrip(".,;:")


def _shuffled(text: str, chance: random.Random) -> str | None:
    words = text.split()
    chance.shuffle(words)
    return " ".join(words) if len(words) >= _MINIMUM_WORDS else None
