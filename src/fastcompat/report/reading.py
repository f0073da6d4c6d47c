"""What each scorer of a run has done and could not do, what the corpus is made of, every setting: for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.rows import SCORED_STATUSES, Status
from fastcompat.store import Run, ScorerStore

# Reasons of one scorer that are told, files that are listed.
SHOWN_REASONS = 8
# Reasons why a response is not scored yet: a race may have one for each look.
SHOWN_PENDING = 25
SHOWN_FILES = 40


@dataclass(frozen=True, kw_only=True)
class ScorerAccount:
    """What one scorer has done, and what it could not.

    n_rows: that it has gone through; n_pending: that are not scored yet, be it because a race does without them.
    statuses: every status that occurs; by_group: name -> rows by status, groups with something that has no figure only;
    reasons: (status, detail, rows), the most frequent first. waiting: (reason, rows) of what is not scored yet, where a
    race or `--only` left some out.
    """

    label: str
    kind: str
    n_scored: int
    n_rows: int
    n_pending: int
    statuses: Mapping[str, int]
    by_group: Mapping[str | None, Mapping[str, int]]
    reasons: Sequence[tuple[str, str, int]]
    waiting: Sequence[tuple[str, int]] = ()


def account_of_scorers(run: Run, scores: pa.Table, by: str) -> list[ScorerAccount]:
    """An account of every scorer of `scores`, in the order in which they come."""
    accounts = []
    for kind in ("base_model", "reward_model"):
        for label in pc.unique(scores[kind].drop_null()).to_pylist():
            rows = scores.select([by, "status", "detail"]).filter(pc.equal(scores[kind], label))
            left_out = pc.equal(rows["status"], str(Status.LEFT_OUT))
            waiting = _reasons(rows.filter(left_out), SHOWN_PENDING)
            n_untouched = run.n_rows - rows.num_rows
            rows = rows.filter(pc.invert(left_out))
            counts = rows.group_by([by, "status"], use_threads=False).aggregate([([], "count_all")]).to_pylist()
            statuses: dict[str, int] = {}
            by_group: dict[str | None, dict[str, int]] = {}
            for count in counts:
                statuses[count["status"]] = statuses.get(count["status"], 0) + count["count_all"]
                by_group.setdefault(count[by], {})[count["status"]] = count["count_all"]
            bad = rows.filter(pc.not_equal(rows["status"], "ok"))
            accounts.append(
                ScorerAccount(
                    label=label,
                    kind=kind.replace("_", " "),
                    n_scored=sum(statuses.get(status, 0) for status in SCORED_STATUSES),
                    n_rows=rows.num_rows,
                    n_pending=run.n_rows - rows.num_rows,
                    statuses=statuses,
                    by_group={name: own for name, own in by_group.items() if set(own) != {"ok"}},
                    reasons=_reasons(bad, SHOWN_REASONS),
                    waiting=_waiting(waiting, n_untouched) if waiting else (),
                )
            )
    return accounts


def _reasons(bad: pa.Table, shown: int) -> list[tuple[str, str, int]]:
    counts = bad.group_by(["status", "detail"], use_threads=False).aggregate([([], "count_all")])
    order = [("count_all", "descending"), ("status", "ascending"), ("detail", "ascending")]
    first = counts.sort_by(order).slice(0, shown).to_pylist()
    return [(row["status"], row["detail"] or "", row["count_all"]) for row in first]


def _waiting(left_out: Sequence[tuple[str, str, int]], n_untouched: int) -> list[tuple[str, int]]:
    """Reasons, with what the scorer has not come to yet."""
    untouched = [("not come to yet", n_untouched)] if n_untouched else []
    return [*((detail, count) for _, detail, count in left_out), *untouched]


def corpus_of(run: Run) -> dict[str, Any]:
    """What the run's corpus is made of: its files with their hashes, and what was noticed when they were read."""
    files = [file for generation in run.generations for file in generation.files]
    return {
        "n_rows": run.n_rows,
        "n_files": len(files),
        "n_units": len(run.units),
        "fingerprints": run.fingerprints,
        "files": [
            {
                "label": file.label,
                "bytes": file.size,
                "sha256": file.sha256,
                "n_rows": file.n_rows,
                "mapping": file.mapping,
                "problem": file.problem,
            }
            for file in files[:SHOWN_FILES]
        ],
        "problems": [f"{file.label}: {file.problem}" for file in files if file.problem][:SHOWN_REASONS],
        "overrides": sorted({f"{a}={b}" for generation in run.generations for a, b in generation.overrides.items()}),
        "reward_columns": run.reward_columns,
    }


def settings_of_scorers(scorers: Mapping[str, ScorerStore]) -> list[dict[str, Any]]:
    """The record of every scorer that the page shows: name, what it is, settings, identity, when it was first used.

    scorers: by their labels.
    """
    return [
        {
            "label": label,
            "kind": store.kind.replace("_", " "),
            "created": store.record["created"],
            "settings": dict(store.record["settings"]),
            "identity": dict(store.record["identity"]),
        }
        for label, store in scorers.items()
    ]
