"""The exception tree: every mistake of a user is a `FastcompatError` whose message says what to do.

The command line prints the message without a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class FastcompatError(Exception):
    """Base of all errors that a user can mend. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(FastcompatError):
    """Options that contradict each other, or a value out of range."""

    exit_code = 2


class ArgumentError(FastcompatError, ValueError):
    """A tensor or an option of a library call that does not fit; the message names the value and the fix."""


class CorpusError(FastcompatError):
    """A corpus that cannot be read at all: no such file, no known schema, a changed input."""

    exit_code = 3


class SchemaError(CorpusError):
    """No mapping from a file's columns to responses was found; the message lists what was tried."""


class ModelError(FastcompatError):
    """A model that cannot be loaded, or cannot be scored correctly when packed; the message says why."""

    exit_code = 4


class TemplateError(FastcompatError):
    """A chat template that is missing, unreadable or fails on every conversation."""

    exit_code = 4


class RunError(FastcompatError):
    """A run directory that is missing, damaged, of another format, or holds another corpus."""

    exit_code = 5


class SetAside(FastcompatError):
    """Everything is scored but units over which workers died again and again; the message names them."""

    exit_code = 3


class Interrupted(FastcompatError):
    """SIGINT or SIGTERM was received: everything finished so far is committed, the run can be resumed."""

    exit_code = 130
