"""What is printed at the end: failures first, then a line a case, figures beside predictions, in 12,000 characters.

Keys of a finding that are shown: `case`, what it is of; `problem`, what is wrong; `timings`, of each call its `ms` and
rates, or why it `failed`; `figures`, of each thing its figures by unit; `kernels`, lines as they are; `test` with its
`outcome`, of which only those that failed are shown. Findings of one `sweep` are one line, the fastest `variant` first;
of findings of one case the last is shown. Everything else is for the JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from gpu_predictions import predicted
from gpu_steps import Finding, problem

# What a reader of the last lines gets, less what is printed behind it.
LENGTH = 11_500
FAILURES_LENGTH = 4_500
FAILURE_LENGTH, CASE_LENGTH = 300, 1_200
LEGEND = "[what was predicted, and = within, < below, > above it]"
RATES = ("TFLOP/s", "TB/s")
SHARES = ("of the product's rate", "of the copy's bandwidth")
# Beside which others are timed: their own share is 1.
YARDSTICKS = ("cuBLAS product alone", "device copy")


def summary(result: dict[str, Any]) -> str:
    """Of the whole check, as long as its JSON is long."""
    failures = list(dict.fromkeys(_all(partial(failure_lines, result))))
    heading = f"FAILED: {len(failures)}" if failures else "nothing failed"
    head = "\n".join([heading, *cut(failures, FAILURES_LENGTH), LEGEND])
    blocks = [_all(partial(step_lines, name, entry)) for name, entry in result["steps"].items()]
    lengths = shares([sum(len(line) + 1 for line in block) for block in blocks], LENGTH - len(head))
    kept = [line for block, length in zip(blocks, lengths, strict=True) for line in cut(block, length)]
    return "\n".join([head, *kept])


def _all(lines: Callable[[], Iterator[str]]) -> list[str]:
    """What can be said, whatever a step has written."""
    said = []
    try:
        for line in lines():
            said.append(line)
    except Exception as error:  # the rest of the summary must not be lost over it
        said.append(f" the rest cannot be shown: {type(error).__name__}: {error}"[:FAILURE_LENGTH])
    return said


def shares(wanted: list[int], length: int) -> list[int]:
    """Of a length that all share: what each wants, as far as nobody has less than another gets beyond that."""
    given = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    for position, n in enumerate(order):
        given[n] = min(wanted[n], length // (len(order) - position))
        length -= given[n]
    return given


def cut(lines: list[str], length: int) -> Iterator[str]:
    """As many lines as fit, and how many do not."""
    if sum(len(line) + 1 for line in lines) <= length:
        yield from lines
        return
    said = " ... {} more lines in the JSON"
    left, n = length - len(said) - 8, 0
    while n < len(lines) and left >= len(lines[n]) + 1:
        left -= len(lines[n]) + 1
        n += 1
    yield from lines[:n]
    if length > len(said) + 8:
        yield said.format(len(lines) - n)


def failure_lines(result: dict[str, Any]) -> Iterator[str]:
    """What did not end well, what is wrong, what failed; a peer that failed comes last."""
    entries = result["steps"].items()
    for name, entry in entries:
        if entry["status"] != "ok":
            last = (entry.get("output") or "").strip().splitlines()
            yield _line(f"! {name}: {entry['status']}{f': {last[-1]}' if last else ''}", FAILURE_LENGTH)
    for name, entry in entries:
        for finding in entry["findings"]:
            if problem(finding):
                what = finding.get("case") or finding.get("test") or ""
                yield _line(f"! {name}: {what}: {problem(finding)}", FAILURE_LENGTH)
    for name, entry in entries:
        for finding in entry["findings"]:
            for call, timing in finding.get("timings", {}).items():
                if "failed" in timing:
                    case = finding.get("case", "")
                    yield _line(f"! {name}: {case}: {call}: {timing['failed']}", FAILURE_LENGTH)


def step_lines(name: str, entry: dict[str, Any]) -> Iterator[str]:
    """How a step ended, and its figures."""
    findings = entry["findings"]
    said = [f"{name}: {entry['status']}, {entry['seconds']} s"]
    outcomes = [finding["outcome"] for finding in findings if "test" in finding]
    said += [f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)]
    checked = [finding for finding in findings if "test" not in finding and finding.keys() & {"errors", "problem"}]
    if checked:
        said.append(f"{len(checked)} cases checked, {sum(bool(problem(finding)) for finding in checked)} wrong")
    yield ", ".join(said)
    yield from _sweeps(findings)
    # What is measured in rounds is told after each.
    last = {finding.get("case"): n for n, finding in enumerate(findings)}
    for n, finding in enumerate(findings):
        case = finding.get("case", "")
        if n < last[finding.get("case")] or "sweep" in finding:
            continue
        shown = [*_timings(name, case, finding), *_figures(name, case, finding)]
        if shown:
            yield _line(f" {case}: {'; '.join(shown)}", CASE_LENGTH)
        yield from (_line(f"    {line}", FAILURE_LENGTH) for line in finding.get("kernels", []))


def _sweeps(findings: list[Finding]) -> Iterator[str]:
    swept: dict[str, list[tuple[float, str]]] = {}
    for finding in findings:
        timings = [(call, timing) for call, timing in finding.get("timings", {}).items() if call not in YARDSTICKS]
        if "sweep" in finding and timings and "ms" in timings[0][1]:
            (unit,) = [unit for unit in RATES if unit in timings[0][1]]
            rates = [f"{timing[unit]:.3g}" for _, timing in timings if "ms" in timing]
            sweep = f"{finding['sweep']}, {unit} of {' / '.join(call for call, _ in timings)}"
            swept.setdefault(sweep, []).append((timings[0][1]["ms"], f"{finding['variant']} {'/'.join(rates)}"))
    for sweep, variants in swept.items():
        yield _line(f" {sweep}: {', '.join(text for _, text in sorted(variants))}", CASE_LENGTH)


def _timings(step: str, case: str, finding: Finding) -> Iterator[str]:
    for call, timing in finding.get("timings", {}).items():
        if "ms" not in timing or (call in YARDSTICKS and step != "hardware" and "TFLOP/s" not in timing):
            continue
        words = [f"{call} {timing['ms']:.4g} ms"]
        words += [_figure(step, case, call, unit, timing[unit]) for unit in RATES if unit in timing]
        if call not in YARDSTICKS:
            words += [_figure(step, case, call, unit, timing[unit]) for unit in SHARES if unit in timing]
        yield " ".join(words)


def _figures(step: str, case: str, finding: Finding) -> Iterator[str]:
    for call, figures in finding.get("figures", {}).items():
        yield f"{call}: {', '.join(_figure(step, case, call, unit, value) for unit, value in figures.items())}"


def _figure(step: str, case: str, call: str, unit: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return f"{unit} {value}"
    number = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3g}"
    text = f"x{number}" if unit in SHARES else f"{number} {unit}"
    prediction = predicted(step, case, call, unit)
    return text if prediction is None else f"{text} [{prediction} {prediction.verdict(value)}]"


def _line(text: str, length: int) -> str:
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= length else f"{text[: length - 4]} ..."
