"""Today's date in a chat template, pinned: a run that is resumed tomorrow must give the same ids.

Llama-3.2's, Mistral's and others' templates print it through `strftime_now`.
"""

from __future__ import annotations

import re
from datetime import datetime

from fastcompat.errors import TemplateError

# That which Llama-3's own template falls back to.
PINNED_DATE = datetime(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
# What is left of them after that, other than the question whether there is such a function.
_OTHER_DATE = re.compile(r"\bstrftime_now\b(?!\s+is\s)")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def with_pinned_dates(source: str, description: str) -> tuple[str, str]:
    """A template and its description, with what was pinned. TemplateError where a date in it cannot be pinned."""
    pinned, n_dates = _DATE_CALL.subn(_pinned_date, source)
    if _OTHER_DATE.search(_COMMENT.sub("", pinned)):
        raise TemplateError(
            f"{description}: it prints today's date in a way that cannot be pinned, so that a run resumed tomorrow "
            "would differ; copy the template to a file, write a date in the place of strftime_now(...), and give "
            "that with --template FILE"
        )
    return pinned, f"{description}, its date pinned to {PINNED_DATE:%d %b %Y}" if n_dates else description


def _pinned_date(call: re.Match[str]) -> str:
    return repr(PINNED_DATE.strftime(call["format"]))
