"""RUN/log: what was done, when, by each process, a JSON object a line.

One file a process, because appending from several hosts cuts lines on some file systems, and objects cannot be appended
to at all.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from fastcompat.errors import RunError
from fastcompat.store.durable import own_name
from fastcompat.store.places import Place

# What is logged once for every unit may wait for more, where every line would be a request of its own.
_OF_UNITS = ("commit", "lost")


class Log:
    """All logs of a run; call it to add a line to this process's own."""

    def __init__(self, run: Place) -> None:
        self._run = run
        self._logs = run / "log"
        self._own = f"{own_name('').removeprefix('..')}.jsonl"

    def __call__(self, event: str, **values: Any) -> None:
        """Add a line. A log that cannot be written stops nothing: what counts is committed elsewhere, and fails there
        by name."""
        line = json.dumps({"time": now(), "event": event, "host": socket.gethostname(), "pid": os.getpid()} | values)
        with suppress(OSError, RunError):
            self._logs.append(self._own, (line + "\n").encode(), at_once=event not in _OF_UNITS)

    def lines(self) -> list[dict[str, Any]]:
        """Of all processes, by time; what a killed process wrote half is passed over."""
        files = [(self._logs, name) for name in sorted(self._logs.names()) if name.endswith(".jsonl")]
        # Runs of earlier versions have one log.
        if self._run.has("log.jsonl"):
            files.insert(0, (self._run, "log.jsonl"))
        lines = []
        for place, name in files:
            for line in place.read(name).decode("utf-8").splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(line))
        return sorted(lines, key=lambda line: line["time"])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
