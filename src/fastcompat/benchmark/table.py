"""A measurement as people read it: a table, what stands behind its figures, and one line in words."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastcompat.benchmark.flops import product_tokens
from fastcompat.benchmark.measurement import Measurement

# An error of a mean loss, in nats, that is marked: bf16's rounding stays below.
MARKED_NATS = 0.05


def rendered(measurement: Measurement) -> RenderableType:
    """One row a loop, the slowest first as they ran, fastcompat last."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("scorer", overflow="fold")
    for name in ("seconds", "tokens/s", "of the product's rate", "fastcompat is", "largest error, nats"):
        table.add_column(name, justify="right")
    for name, loop in measurement.loops.items():
        speedup = measurement.speedup(loop)
        ours = name == "fastcompat"
        wrong = loop.largest_error > MARKED_NATS
        table.add_row(
            Text(name, style="bold" if ours else ""),
            f"{loop.seconds:,.2f}",
            f"{measurement.tokens_per_second(loop):,.0f}",
            f"{measurement.efficiency(loop):.0%}",
            "" if ours or speedup is None else f"{speedup:.1f}x as fast",
            Text(f"{loop.largest_error:.5f}{' !' if wrong else ''}", style="bold red" if wrong else ""),
        )
    for name, reason in measurement.failed.items():
        table.add_row(Text(name), *[""] * 4, Text(reason, style="red"))
    return Group(table, *(Text(line, style="dim") for line in _legend(measurement)), Text(in_words(measurement)))


def _legend(measurement: Measurement) -> Iterator[str]:
    yield (
        f"medians of interleaved rounds; the product (F.linear, {product_tokens(measurement.subject.device):,} tokens "
        f"through the model's MLP) ran at {measurement.product_rate / 1e9:,.0f} GFLOP/s"
    )
    promised, ours = measurement.data_sheet_rate, measurement.loops.get("fastcompat")
    if promised is not None:
        share = "" if ours is None else f", fastcompat {measurement.useful_flops / ours.seconds / promised:.0%}"
        yield (
            f"of the data sheet's {promised / 1e12:,.0f} TFLOP/s the product reached "
            f"{measurement.product_rate / promised:.0%}{share}"
        )
    yield (
        "errors: of a response's mean loss, against float32 with the same weights, which the plain model confirms to "
        f"{measurement.check_nats:.0e} nats"
    )
    if any(loop.largest_error > MARKED_NATS for loop in measurement.loops.values()):
        yield f"!: off by more than {MARKED_NATS} nats; rounding explains less, but where it changes a router's choice"


def in_words(measurement: Measurement) -> str:
    """What it comes to."""
    ours = measurement.loops.get("fastcompat")
    if ours is None:
        return f"fastcompat has no figure: {measurement.failed.get('fastcompat', 'it did not run')}."
    others = {
        name: speedup
        for name, loop in measurement.loops.items()
        if name != "fastcompat" and (speedup := measurement.speedup(loop)) is not None
    }
    share = f"{measurement.efficiency(ours):.0%} of what this machine's matrix products allow"
    if not others:
        return f"{measurement.problem.workload}: fastcompat reaches {share}."
    slowest, fastest = max(others, key=lambda name: others[name]), min(others, key=lambda name: others[name])
    compared = f"{others[fastest]:.1f} times as fast as the fastest other scorer ({fastest})"
    if slowest != fastest:
        compared = f"{others[slowest]:.1f} times as fast as the slowest ({slowest}) and {compared}"
    return f"{measurement.problem.workload}: fastcompat is {compared}; it reaches {share}."
