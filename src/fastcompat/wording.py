"""Words for people: counts, durations, shares, what may be printed of a text that somebody else wrote."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def counted_noun(count: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def printable(text: str) -> str:
    """Text from a corpus for one line of a terminal or of a table: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def percent(share: float | None) -> str:
    """97%; a share that is not quite all or nothing is not rounded to it."""
    if share is None:
        return "–"
    if 0 < share < 0.01:
        return "<1%"
    if 0.99 < share < 1:
        return ">99%"
    return f"{share:.0%}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells of text."""
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(printable(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def visible(text: str) -> str:
    """Control characters as their pictures: they have no place in HTML, and would not be seen."""
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


def first_sentence(error: BaseException) -> str:
    """The first line of a library's error, without its trailing explanation."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(". ")
