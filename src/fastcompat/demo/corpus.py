"""The embedded corpus: questions about Python's standard library, answered by response generators of known character.

Nothing is downloaded: questions and answers are made from the documentation that comes with the running Python, of
modules that the demo's base model has not seen (`HELD_OUT_MODULES`). What is good and bad about each generator is
known beforehand, so that a ranking can be checked by eye. The same Python gives the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastcompat.demo.library import HELD_OUT_MODULES, Documented, documented

MAXIMUM_CHARACTERS = 1200
# Shorter docstrings leave nothing to summarise, shuffle or cut.
MINIMUM_CHARACTERS = 80

QUESTIONS = (
    "What does `{name}` do in Python?",
    "Explain `{name}` from Python's standard library.",
    "How does `{name}` work?",
    "I came across `{name}` in some Python code. What is it for?",
    "Please describe `{name}` in Python.",
    "When would I use `{name}` in a Python program?",
)

_OPENINGS = (
    "Great question! I'm really happy to help you with that today.",
    "Thanks so much for asking! This is something a lot of people wonder about.",
    "Sure thing! Let me walk you through it, it's easier than it looks.",
    "Of course! Python's standard library is full of gems, and this is one of them.",
)
_CLOSINGS = (
    "I hope that clears things up! Feel free to reach out any time if you have more questions.",
    "And that's really all there is to it! Let me know if you'd like me to go into more detail.",
    "Isn't that neat? Happy coding, and don't hesitate to ask if anything is still unclear!",
    "There you have it! If this was helpful, I'd be glad to look at some examples together with you.",
)


class Generator(NamedTuple):
    """`respond` answers about a thing, given all things that can be asked about; None where it cannot."""

    respond: Callable[[Documented, Sequence[Documented]], str | None]
    description: str


def full_documentation(thing: Documented, others: Sequence[Documented]) -> str | None:
    return _capped(thing.text)


def summary(thing: Documented, others: Sequence[Documented]) -> str | None:
    return _capped(first_paragraph(thing))


def chatty(thing: Documented, others: Sequence[Documented]) -> str | None:
    chance = seeded("chatty", thing.name)
    opening, closing = chance.choice(_OPENINGS), chance.choice(_CLOSINGS)
    middle = f"So, here is what `{thing.name}` is all about:\n\n{_capped(first_paragraph(thing), 800)}"
    return f"{opening} {middle}\n\n{closing}"


def source_code(thing: Documented, others: Sequence[Documented]) -> str | None:
    # A body of one line, such as `pass`, says nothing.
    if thing.source.count("\n") < 2:
        return None
    return f"```python\n{_capped_lines(thing.source, MAXIMUM_CHARACTERS - 20)}\n```"


def other_function(thing: Documented, others: Sequence[Documented]) -> str | None:
    # Of another module, so that the answer is wrong and not merely beside the point.
    strangers = [other for other in others if other.module.split(".")[0] != thing.module.split(".")[0]]
    return _capped(seeded("other-function", thing.name).choice(strangers).text) if strangers else None


def shuffled_words(thing: Documented, others: Sequence[Documented]) -> str | None:
    words = _capped(thing.text).split()
    seeded("shuffled-words", thing.name).shuffle(words)
    return " ".join(words)


def truncated(thing: Documented, others: Sequence[Documented]) -> str | None:
    text = _capped(thing.text)
    words = list(re.finditer(r"\S+", text))
    # Past the signature, short of the end.
    return text[: words[len(words) * 3 // 5].end()].rstrip(".,;:") if len(words) >= 10 else None


def repetitive(thing: Documented, others: Sequence[Documented]) -> str | None:
    sentence = _first_sentence(thing)
    times = min(6, MAXIMUM_CHARACTERS // (len(sentence) + 1))
    return " ".join([sentence] * times) if times >= 3 else None


GENERATORS: dict[str, Generator] = {
    "full-documentation": Generator(full_documentation, "the signature and the whole documentation"),
    "summary": Generator(summary, "the first paragraph of the documentation"),
    "chatty": Generator(chatty, "the summary between pleasantries"),
    "source-code": Generator(source_code, "the source without its documentation, in a fenced block"),
    "other-function": Generator(other_function, "the documentation of something else: fluent and wrong"),
    "shuffled-words": Generator(shuffled_words, "the words of the documentation in random order"),
    "truncated": Generator(truncated, "the documentation up to the middle of a sentence"),
    "repetitive": Generator(repetitive, "the first sentence, again and again"),
}


def write_corpus(directory: Path, *, n_prompts: int = 500) -> list[Path]:
    """Write one JSONL file for each generator, `<generator>.jsonl`, and return their paths in the order of the table.

    A row is `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "generator": name}`. Row i of every file
    answers the same prompt. There are fewer than `n_prompts` rows where this Python documents fewer things.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    answered = answer_prompts(n_prompts)
    paths = []
    for generator in GENERATORS:
        path = directory / f"{generator}.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for thing, responses in answered:
                messages = [
                    {"role": "user", "content": question(thing)},
                    {"role": "assistant", "content": responses[generator]},
                ]
                file.write(json.dumps({"messages": messages, "generator": generator}, ensure_ascii=False) + "\n")
        paths.append(path)
    return paths


def answer_prompts(n_prompts: int) -> list[tuple[Documented, dict[str, str]]]:
    """The first `n_prompts` things that every generator can answer about, with their responses."""
    if n_prompts < 1:
        raise ValueError(f"n_prompts is {n_prompts}: give at least 1")
    things = documented(HELD_OUT_MODULES, minimum_characters=MINIMUM_CHARACTERS)
    answered = []
    for thing in evenly_across_modules(things):
        responses = {name: generator.respond(thing, things) for name, generator in GENERATORS.items()}
        complete = {name: response for name, response in responses.items() if response}
        if len(complete) == len(GENERATORS):
            answered.append((thing, complete))
        if len(answered) == n_prompts:
            break
    return answered


def evenly_across_modules(things: Sequence[Documented]) -> list[Documented]:
    """One thing of each module in turn, until all are used; within a module in an order that is fixed and arbitrary."""
    by_module: dict[str, list[Documented]] = defaultdict(list)
    for thing in sorted(things, key=lambda thing: (digest("order", thing.name), thing.name)):
        by_module[thing.module].append(thing)
    turns = [(turn, module, thing) for module, members in by_module.items() for turn, thing in enumerate(members)]
    return [thing for _, _, thing in sorted(turns, key=lambda turn: turn[:2])]


def question(thing: Documented) -> str:
    """The prompt about a thing, in one of several phrasings."""
    return QUESTIONS[digest("question", thing.name) % len(QUESTIONS)].format(name=thing.name)


def first_paragraph(thing: Documented) -> str:
    """The first paragraph of the documentation, and the second one too if the first is only a call or a heading."""
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", thing.documentation) if paragraph.strip()]
    short = len(paragraphs[0]) < 30 and len(paragraphs) > 1
    return "\n\n".join(paragraphs[: 2 if short else 1])


def digest(purpose: str, name: str) -> int:
    """64 bits of a hash that, unlike `hash()`, is the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}\0{name}".encode(), digest_size=8).digest(), "big")


def seeded(purpose: str, name: str) -> random.Random:
    """A random generator of its own for each purpose and name: no prompt depends on which others are asked."""
    return random.Random(digest(purpose, name))


def _first_sentence(thing: Documented) -> str:
    text = " ".join(first_paragraph(thing).split())
    end = re.search(r"[.!?](?=\s|$)", text)
    return text[: end.end()] if end else f"{text}."


def _capped(text: str, maximum: int = MAXIMUM_CHARACTERS) -> str:
    """The text up to its last paragraph, line, sentence or word that ends within `maximum` characters."""
    if len(text) <= maximum:
        return text
    for boundary in ("\n\n", "\n", ". ", " "):
        end = text.rfind(boundary, maximum // 2, maximum)
        if end > 0:
            return text[: end + boundary.startswith(".")].rstrip()
    return text[:maximum]


def _capped_lines(text: str, maximum: int) -> str:
    if len(text) <= maximum:
        return text
    return text[: max(text.rfind("\n", 0, maximum), 0)].rstrip() or text[:maximum]
