"""What a value of a record is, in a reader's words, and the text that it stands for."""

from __future__ import annotations

# Of the parts of a content; the last two are those of OpenAI's responses.
_TEXT_PARTS = ("text", "input_text", "output_text")


class UnfitError(Exception):
    """A value that is not what its place asks for; the message becomes the row's detail."""


def kind_of(value: object) -> str:
    """A value's type in a reader's words: "null", "a number", "an object", ..."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return "an object" + (f" with the keys {', '.join(map(str, list(value)[:8]))}" if value else "")
    if isinstance(value, list | tuple):
        return f"a list of {kind_of(value[0]).split(' with ')[0].split(' ')[-1]}s" if value else "an empty list"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, bytes):
        return "bytes that are not UTF-8"
    return (
        repr(value) if type(value).__repr__ is not object.__repr__ and len(repr(value)) < 40 else type(value).__name__
    )


def text_of(value: object, place: str) -> str:
    """A string, or the joined texts of a list of `{"type": "text", "text": ...}` parts; UnfitError for all else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    elif isinstance(value, list) and value:
        texts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type", "text") not in _TEXT_PARTS:
                what = (
                    f"a part of type {part['type']!r}" if isinstance(part, dict) and part.get("type") else kind_of(part)
                )
                raise UnfitError(f"{place} has {what} where only text can be scored")
            texts.append(text)
        return "".join(texts)
    raise UnfitError(f"{place} is {kind_of(value)}, not text")


def storable(text: str) -> str:
    """The text with U+FFFD for what UTF-8 cannot hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
