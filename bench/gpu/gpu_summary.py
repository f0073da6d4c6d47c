"""What is printed at the end: failures first, then a line a figure beside its prediction, within 12,000 characters.

Keys of a finding that are shown: `case`, what it is of; `problem`, what is wrong; `timings`, of each call its `ms` and
rates, or why it `failed`; `figures`, of each thing its figures by unit; `kernels`, lines as they are; `test` with its
`outcome`, of which only those that failed are shown. Everything else is for the JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_predictions import predicted
from gpu_steps import Finding, problem

# What a reader of the last lines gets, less what is printed behind it.
LENGTH = 11_500
FAILURES_LENGTH = 5_000
LINE_LENGTH = 320
# Of a table of timings these are shown, in this order.
SHOWN = ("TFLOP/s", "TB/s", "of the product's rate", "of the copy's bandwidth")


def summary(result: dict[str, Any]) -> str:
    """Of the whole check, as long as its JSON is long."""
    failures = list(_cut(failure_lines(result), FAILURES_LENGTH))
    heading = [f"FAILED: {len(failures)}" if failures else "nothing failed"]
    head = "\n".join([*heading, *failures]) + "\n"
    return head + "\n".join(_cut(figure_lines(result), LENGTH - len(head)))


def failure_lines(result: dict[str, Any]) -> Iterator[str]:
    """What did not end well, what is wrong, what failed; a peer that failed comes last."""
    entries = result["steps"].items()
    for name, entry in entries:
        if entry["status"] != "ok":
            last = (entry.get("output") or "").strip().splitlines()
            yield _line(f"! {name}: {entry['status']}{f': {last[-1]}' if last else ''}")
    for name, entry in entries:
        for finding in entry["findings"]:
            if problem(finding):
                what = finding.get("case") or finding.get("test") or ""
                yield _line(f"! {name}: {what}: {problem(finding)}")
    for name, entry in entries:
        for finding in entry["findings"]:
            for call, timing in finding.get("timings", {}).items():
                if "failed" in timing:
                    yield _line(f"! {name}: {finding.get('case', '')}: {call}: {timing['failed']}")


def figure_lines(result: dict[str, Any]) -> Iterator[str]:
    """Step by step, a line for each figure that has a name."""
    for name, entry in result["steps"].items():
        yield f"{name}: {entry['status']}, {entry['seconds']} s"
        tests = [finding for finding in entry["findings"] if "test" in finding]
        if tests:
            yield f" {_counts(tests)}"
        checks = [finding for finding in entry["findings"] if finding.keys() & {"errors", "problem"}]
        if checks:
            yield f" {len(checks)} cases checked, {sum(bool(problem(finding)) for finding in checks)} wrong"
        for finding in entry["findings"]:
            lines = [*_timing_lines(name, finding), *_other_lines(name, finding)]
            if lines:
                yield _line(f" {finding.get('case', '')}")
                yield from lines


def _counts(tests: list[Finding]) -> str:
    outcomes = [test["outcome"] for test in tests]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))


def _timing_lines(step: str, finding: Finding) -> Iterator[str]:
    case = finding.get("case", "")
    for call, timing in finding.get("timings", {}).items():
        if "ms" not in timing:
            continue
        figures = [(unit, timing[unit]) for unit in SHOWN if unit in timing]
        shown = [f"{timing['ms']:.3f} ms", *(_figure(step, case, call, unit, value) for unit, value in figures)]
        yield _line(f"  {call}: {', '.join(shown)}")


def _other_lines(step: str, finding: Finding) -> Iterator[str]:
    case = finding.get("case", "")
    for call, figures in finding.get("figures", {}).items():
        shown = [_figure(step, case, call, unit, value) for unit, value in figures.items()]
        yield _line(f"  {call}: {', '.join(shown)}")
    for line in finding.get("kernels", []):
        yield _line(f"    {line}")


def _figure(step: str, case: str, call: str, unit: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return f"{unit} {value}"
    text = f"{value:,.0f} {unit}" if abs(value) >= 1e4 else f"{value:.3g} {unit}"
    prediction = predicted(step, case, call, unit)
    return text if prediction is None else f"{text} [{prediction}: {prediction.verdict(value)}]"


def _line(text: str) -> str:
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= LINE_LENGTH else f"{text[: LINE_LENGTH - 4]} ..."


def _cut(lines: Iterator[str], length: int) -> Iterator[str]:
    """As many lines as fit, and how many do not."""
    said = " ... {} more lines in the JSON"
    everything, left, n = list(lines), length - len(said) - 8, 0
    while n < len(everything) and left >= len(everything[n]) + 1:
        left -= len(everything[n]) + 1
        n += 1
    yield from everything[:n]
    if n < len(everything):
        yield said.format(len(everything) - n)
