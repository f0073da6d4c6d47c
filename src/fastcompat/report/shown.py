"""The path of a page, which a notebook shows as the page."""

from __future__ import annotations

import html
from pathlib import Path

# Pixels; the page scrolls in its frame.
_HEIGHT = 720


class ReportPath(type(Path())):  # type: ignore[misc]
    """Where a page was written: a path like any other. In a notebook the page itself is seen, in a frame of its own
    that knows nothing of the notebook; its scripts draw the charts and ask no network."""

    def _repr_html_(self) -> str | None:
        try:
            page = self.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None  # it is not there any more, or is a directory made from this path
        return (
            f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts" title="fastcompat report" '
            f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
        )
