"""What is to be said of a file's rows: counted while they are read, added up where a file is read in stretches.

A file's summary names the first few reasons, roles and columns only, so that one which has a new one in every row does
not fill it. Which are the first is not known within a stretch: that keeps many, and where it has more `exact` is False.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastcompat.corpus.formats import REMEMBERED_FORMS
from fastcompat.corpus.records import with_lines_before
from fastcompat.corpus.sources import Source
from fastcompat.corpus.summary import FileSummary
from fastcompat.corpus.turns import COUNTED_ROLES, Tally
from fastcompat.corpus.values import storable
from fastcompat.rows import Status

_COUNTED_REASONS = 8
_OTHER_REASONS = "other"
_COUNTED_COLUMNS = 64
# Of a stretch.
_MOST_KEPT = 10_000
_NUMBER = re.compile(r"\d+")


@dataclass(slots=True, kw_only=True)
class Account:
    """Counts of the rows of a file, or, where `in_part`, of a stretch of it.

    reasons: by the rows' detail with its numbers left out; examples: the first detail of each, which stands for all.
    of_lines: those of them that begin with a line's number. columns: those that the file's first records lack, in the
    order in which they came, and whether they are read all the same.
    """

    in_part: bool = False
    n_records: int = 0
    n_lines: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    of_lines: set[str] = field(default_factory=set)
    columns: dict[str, bool] = field(default_factory=dict)
    late_columns: dict[str, None] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    @property
    def exact(self) -> bool:
        """Whether a stretch's account has all that the whole file's may need."""
        kept = max(len(self.examples), len(self.columns))
        return not self.unreadable and kept < _MOST_KEPT and len(self.tally.unknown_roles) < COUNTED_ROLES

    def count(self, detail: str, *, of_line: bool = False, n: int = 1) -> None:
        """Count rows with that reason."""
        reason = _NUMBER.sub("#", detail)
        if reason not in self.examples:
            if len(self.examples) >= (_MOST_KEPT if self.in_part else _COUNTED_REASONS):
                self.reasons[_OTHER_REASONS] += n
                return
            self.examples[reason] = detail
            if of_line and self.in_part:
                self.of_lines.add(reason)
        self.reasons[reason] += n

    def note_column(self, name: str, *, is_read: bool) -> None:
        """Note a column that came after the first records; once each."""
        if self.in_part and len(self.columns) < _MOST_KEPT:
            self.columns[name] = is_read
        if not is_read and len(self.late_columns) < _COUNTED_COLUMNS:
            self.late_columns[storable(name)] = None

    def add(self, stretch: Account) -> None:
        """Add what follows in the file upon all that was added before, so that this is the account of the whole."""
        for reason, n in stretch.reasons.items():
            detail = stretch.examples[reason]
            self.count(with_lines_before(detail, self.n_lines) if reason in stretch.of_lines else detail, n=n)
        for name, is_read in stretch.columns.items():
            if name not in self.columns:
                self.columns[name] = is_read
                self.note_column(name, is_read=is_read)
        for role, n in stretch.tally.unknown_roles.items():
            self.tally.count_role(role, n)
        self.tally.dropped_turns += stretch.tally.dropped_turns
        self.tally.other_shapes.update(stretch.tally.other_shapes)
        self.n_records += stretch.n_records
        self.n_lines += stretch.n_lines
        self.statuses.update(stretch.statuses)

    def to_json(self) -> dict[str, Any]:
        """Of a stretch; plain JSON types, in which names may have unpaired surrogates."""
        return {
            "n_records": self.n_records,
            "n_lines": self.n_lines,
            "statuses": self.statuses,
            "reasons": [[self.examples[reason], n, reason in self.of_lines] for reason, n in self.reasons.items()],
            "columns": self.columns,
            "dropped_turns": self.tally.dropped_turns,
            "unknown_roles": self.tally.unknown_roles,
            "other_shapes": self.tally.other_shapes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Account:
        """The inverse of `to_json`, of an account that is exact."""
        account = cls(
            in_part=True,
            n_records=value["n_records"],
            n_lines=value["n_lines"],
            statuses=Counter(value["statuses"]),
            tally=Tally(
                dropped_turns=value["dropped_turns"],
                unknown_roles=Counter(value["unknown_roles"]),
                other_shapes=Counter(value["other_shapes"]),
            ),
        )
        for detail, n, of_line in value["reasons"]:
            account.count(detail, of_line=of_line, n=n)
        for name, is_read in value["columns"].items():
            account.note_column(name, is_read=is_read)
        return account


@dataclass(frozen=True, kw_only=True)
class HowRead:
    """How a file was read, or a stretch of it: its mapping's description, or what it `lacks` of every known shape.

    n_valid: records of its beginning that could be read. has_twice: an object with a name twice was found, though none
    in the file's first lines. alone: `RecordReader.read_alone()`.
    """

    account: Account
    container: str
    mapping: str
    lacks: str
    n_valid: int
    has_twice: bool = False
    alone: Mapping[str, str] | None = None

    @property
    def may_be_added(self) -> bool:
        """Whether a stretch tells all that is needed of it, beside other stretches."""
        return self.account.exact and self.alone is not None

    def summary(self, source: Source, sha256: str) -> FileSummary:
        """Of a whole file."""
        account = self.account
        reasons = {account.examples.get(reason, reason): n for reason, n in account.reasons.most_common()}
        return FileSummary(
            label=source.label,
            size=source.size,
            mtime_ns=source.mtime_ns,
            sha256=sha256,
            oid=source.oid,
            container=self.container,
            mapping=self.mapping,
            n_records=account.n_records,
            n_rows=account.statuses.total(),
            statuses={str(status): n for status, n in sorted(account.statuses.items())},
            dropped_turns=account.tally.dropped_turns,
            unknown_roles=dict(sorted(account.tally.unknown_roles.items())),
            other_shapes={storable(names): n for names, n in sorted(account.tally.other_shapes.items())},
            late_columns=tuple(account.late_columns),
            problem=self._problem(reasons),
            reasons=reasons,
        )

    def _problem(self, reasons: Mapping[str, int]) -> str:
        account = self.account
        if account.unreadable:
            more = len(account.unreadable) - 1
            return account.unreadable[0] + (f" (and {more:,} more such places)" if more else "")
        if not account.n_records:
            return "the file holds no record"
        if not self.mapping:
            return self.lacks if self.n_valid else "not one of its records can be read"
        if Status.OK not in account.statuses and reasons:
            reason, n = next(iter(reasons.items()))
            return f"not one of its rows can be scored: {reason} ({n:,} of {account.statuses.total():,})"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Of a stretch."""
        names = ("container", "mapping", "lacks", "n_valid", "has_twice", "alone")
        return {**{name: getattr(self, name) for name in names}, "account": self.account.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HowRead:
        """The inverse of `to_json`."""
        return cls(**{**value, "account": Account.from_json(value["account"])})


def read_as_in_one_go(stretches: Sequence[HowRead | None]) -> bool:
    """Whether a file's stretches, in their order, gave the rows that the file gives in one go.

    What is found in the course of a file may decide how what follows is read: then they did not. None stands for one
    that is not read yet; the others may all be added.
    """
    if any(stretch is not None and stretch.has_twice for stretch in stretches[:-1]):
        return False
    alone: dict[str, str] = {}
    for stretch in stretches:
        told = stretch.alone if stretch is not None and stretch.alone is not None else {}
        if any(alone.setdefault(form, how) != how for form, how in told.items()):
            return False
    return len(alone) <= REMEMBERED_FORMS


def added_up(stretches: Sequence[HowRead]) -> HowRead:
    """Of a file whose stretches were read as in one go."""
    account = Account()
    for stretch in stretches:
        account.add(stretch.account)
    first = stretches[0]
    return HowRead(
        account=account, container=first.container, mapping=first.mapping, lacks=first.lacks, n_valid=first.n_valid
    )
