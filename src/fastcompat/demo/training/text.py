"""What the demo's models are trained on: the standard library of the running Python without the held-out modules."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastcompat.demo.corpus import MINIMUM_CHARACTERS, question
from fastcompat.demo.library import (
    HELD_OUT_MODULES,
    TRAINING_MODULES,
    Documented,
    definitions,
    documentation_text,
    documented,
)

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


def conversation(thing: Documented, answer: str) -> str:
    """The question about a thing and an answer, as the models' chat template renders them."""
    return f"{TURN_START}user\n{question(thing)}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"


def held_out_things() -> list[Documented]:
    """What the demo can ask about, and no model must have seen."""
    return documented(HELD_OUT_MODULES, minimum_characters=MINIMUM_CHARACTERS)


def source_files() -> Iterator[tuple[str, str]]:
    """(module, source) of the library without held-out modules, tests, tables, and this machine's configuration."""
    held_out = {name.split(".")[0] for name in HELD_OUT_MODULES}
    left_out = held_out | {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if left_out.isdisjoint(parts) and not re.match(r"config-|_sysconfigdata", parts[0]):
            try:
                yield ".".join(parts), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def known_things(sources: Sequence[tuple[str, str]]) -> list[Documented]:
    """What the source files document, private things included, and what the training modules document."""
    things = {thing.documentation: thing for module, source in sources for thing in _documented_in(module, source)}
    things |= {thing.documentation: thing for thing in documented(TRAINING_MODULES)}
    return list(things.values())


def quotation_check(held_out: Sequence[Documented]) -> Callable[[str], bool]:
    """Whether a text quotes a held-out documentation in whole: some modules copy docstrings from others."""
    # Found by a long word of theirs, because a thousand searches through all texts take too long.
    by_word: dict[str, list[str]] = {}
    for thing in held_out:
        inner_words = thing.documentation.split()[1:-1]
        by_word.setdefault(max(inner_words, key=len, default=""), []).append(spaced(thing.documentation))

    def quotes(text: str) -> bool:
        whole = spaced(text)
        words = {"", *whole.split()}
        return any(documentation in whole for word in words & by_word.keys() for documentation in by_word[word])

    return quotes


def spaced(text: str) -> str:
    """The text without its line breaks and indentation."""
    return " ".join(text.split())


def _documented_in(module: str, source: str) -> Iterator[Documented]:
    """What a source file documents, private things included: read, not imported."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a template or a sample of bad syntax
        return
    for name, definition in definitions(tree):
        documentation = documentation_text(ast.get_docstring(definition, clean=False))
        parameters = "" if isinstance(definition, ast.ClassDef) else f"({ast.unparse(definition.args)})"
        if len(documentation) >= 40:
            yield Documented(
                name=f"{module}.{name}",
                module=module,
                signature=f"{module}.{name}{parameters}",
                documentation=documentation,
                source="",
            )
