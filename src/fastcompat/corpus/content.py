"""What a file's first bytes say that is no record: that they only stand for the file, or are of a foreign format."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

# What stands for a file is a few lines; a page for a login or a proxy's error may be longer.
STAND_IN_BYTES = 4096


class StandIn(NamedTuple):
    """Content that is certainly not the data that was meant: what it is, and how to get the data."""

    what: str
    remedy: str


_LFS = StandIn("a Git LFS pointer", "fetch the files with `git lfs pull`")
_ANNEX = StandIn("a git-annex pointer", "fetch the files with `git annex get`")
_XET = StandIn("a Xet pointer", "fetch the files with `git xet checkout`, or download them again")
_AGAIN = "download them again (logged in, where that is asked for)"

_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", _LFS),
    (b"version https://hawser.github.com/spec/", _LFS),
    (b"/annex/objects/", _ANNEX),
    (b"# xet version ", _XET),
)
_ERROR_CODE = re.compile(rb"<Error>.{0,200}?<Code>([\w.]{1,60})</Code>", re.DOTALL)
# What the hub and GitHub answer in words.
_ANSWERS = re.compile(
    rb"(Entry|Repository|Revision) not found|(404: )?Not Found|Invalid username or password"
    rb"|Access to (dataset|model|this repo).{0,400}|Unauthorized|Forbidden|Access denied",
    re.IGNORECASE | re.DOTALL,
)
# The keys of an answer that says nothing but what went wrong; one of the first must be among them.
_ERROR_SAID = ("error", "errors", "detail", "message")
_ERROR_KEYS = frozenset((*_ERROR_SAID, "code", "status", "statuscode", "status_code", "documentation_url", "cause"))

_FORMATS = (
    (b"PK\x03\x04", "a zip archive", "unpack it and name the files in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and name the files in it"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it and name the files in it"),
    (b"\x04\x22\x4d\x18", "lz4 data", "unpack it (lz4 -d FILE)"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy data", "unpack it first"),
    (b"LZIP\x01", "lzip data", "unpack it (lzip -d FILE)"),
    (b"Obj\x01", "an Avro file", "convert it to Parquet or JSON lines"),
    (b"SQLite format 3\0", "an SQLite database", "export its table as JSON lines"),
    (b"\x89HDF", "an HDF5 file", "convert it to Parquet or JSON lines"),
    (b"\x93NUMPY", "a NumPy file", "convert it to Parquet or JSON lines"),
    (b"\x80\x04\x95", "a Python pickle", "load it in Python and write JSON lines"),
    (b"%PDF-", "a PDF file", "extract its text as JSON lines"),
    (b"<?xml", "XML", "convert it to JSON lines"),
)


def stand_in(content: bytes) -> StandIn | None:
    """Whether a file with this content (its first `STAND_IN_BYTES` at least) only stands for the data: a pointer of
    Git LFS, git-annex or Xet, a web page, or the answer of a server that did not give the file.
    """
    text = content[:STAND_IN_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    # Most files are told by their first character.
    if not text or text[:1] not in b'{</v#"EeRrIiAaNn4UuFf':
        return None
    for beginning, pointer in _POINTERS:
        if text.startswith(beginning):
            return pointer
    if text[:14].lower() == b"<!doctype html" or re.match(rb"<html\b", text, re.IGNORECASE):
        return StandIn("a web page (of a login or an error?)", _AGAIN)
    if text.startswith((b"<?xml", b"<Error>")) and (code := _ERROR_CODE.search(text)):
        return StandIn(f"the error of a storage bucket ({code[1].decode()})", _AGAIN)
    if len(content) < STAND_IN_BYTES and (said := _error_said(text.rstrip())):
        return StandIn(f"an error message ({said})", _AGAIN)
    return None


def _error_said(text: bytes) -> str:
    """What the answer of a server says that is nothing but an error; else ""."""
    if _ANSWERS.fullmatch(text.rstrip(b".")):
        return text.decode("utf-8", "replace")[:80]
    if not text.startswith(b"{"):
        return ""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    lower = {key.lower(): value for key, value in answer.items()}
    # A message alone may be anything.
    if not lower.keys() <= _ERROR_KEYS or lower.keys() <= {"message", "code", "status"}:
        return ""
    said = next((lower[key] for key in _ERROR_SAID if lower.get(key)), "")
    return " ".join(str(said).split())[:80]


def foreign_format(head: bytes) -> str:
    """What these bytes are and what to do, where they are of a known format that is not read; else ""."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff", b"{\0", b"[\0", b"\0{", b"\0["):
        return "the text is UTF-16; save it as UTF-8"
    if head[257:262] == b"ustar":
        return "this is a tar archive; unpack it and name the files in it"
    for magic, what, remedy in _FORMATS:
        if head.startswith(magic):
            return f"this is {what}; {remedy}"
    return ""
