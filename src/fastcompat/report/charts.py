"""The charts, as Vega-Lite specifications made by Altair: as wide as their place, in colours that the page names.

Every colour is a CSS variable of `page.css`, so that light, dark and paper need no second drawing. Meaning never hangs
on a colour alone: there is a number, a position or a line beside it, and a table of the same figures below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from fastcompat.report.data import N_BINS, Agreement, Distribution, Options, Section
from fastcompat.report.headline import named
from fastcompat.report.labels import placed_labels
from fastcompat.wording import percent

Spec = dict[str, Any]
Row = dict[str, Any]

# Rows of the chart of rankings; beyond, the table has them.
MAX_BUMPS = 30
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Ubuntu, "DejaVu Sans", sans-serif'
INK, MUTED, RULE, GRID, PAPER = "var(--ink)", "var(--muted)", "var(--rule)", "var(--grid)", "var(--paper)"
FIRST, OTHER, SHADE, MINUS = "var(--first)", "var(--other)", "var(--shade)", "var(--minus)"

_QUANTILE_FIELDS = ("low", "quarter", "median", "three_quarters", "high")
AXIS_TITLES = {"loss": "loss, nats per token", "reward": "reward", "n_tokens": "length, scored tokens (log scale)"}


def reward_against_loss(section: Section, options: Options) -> Spec:
    """One point a generator, intervals both ways, and the lines on which CAR is equal."""
    rows = [r for r in section.ranking(float(options.beta)) if r["reward"] is not None and r["loss"] is not None]
    points = [_point(row) for row in rows]
    x_domain, y_domain = _domain(points, "loss"), _domain(points, "reward")
    x = alt.X(
        "loss:Q",
        scale=alt.Scale(domain=x_domain, nice=False, zero=False),
        axis=alt.Axis(tickCount=8),
        title="mean loss, nats per token",
    )
    y = alt.Y("reward:Q", scale=alt.Scale(domain=y_domain, nice=False, zero=False), title="mean reward")
    tooltip = _tooltip(section, section.sort_by)
    base = alt.Chart(alt.NamedData("points"))
    datasets = {"points": points}
    layers: list[alt.Chart] = []
    if section.sort_by == "car":
        datasets |= _iso_lines(x_domain, y_domain, options, [row["car"] for row in rows])
        layers += _lines_of_equal_car(x, y)
    whole = base.transform_filter("datum.loss_low != null && datum.reward_low != null")
    layers += [
        whole.mark_rule(color=MUTED, strokeWidth=1.25, aria=False).encode(x=alt.X("loss_low:Q"), x2="loss_high:Q", y=y),
        whole.mark_rule(color=MUTED, strokeWidth=1.25, aria=False).encode(
            x=x, y=alt.Y("reward_low:Q"), y2="reward_high:Q"
        ),
        base.mark_circle(size=95, opacity=1, stroke=PAPER, strokeWidth=1.5).encode(
            x=x, y=y, color=_first_or_other(), tooltip=tooltip
        ),
    ]
    for narrow, size in ((False, (660, 380)), (True, (270, 320))):
        labels = placed_labels(points, x_domain, y_domain, size=size, length=14 if narrow else 26)
        for align in ("left", "right"):
            own = [label for label in labels if label["align"] == align]
            if own:
                name = f"labels_{align}_{'narrow' if narrow else 'wide'}"
                datasets[name] = own
                layers.append(
                    alt.Chart(alt.NamedData(name))
                    .mark_text(
                        align=align,
                        baseline="middle",
                        dx=7 if align == "left" else -7,
                        fontSize=11.5,
                        color=INK,
                        aria=False,
                    )
                    # Empty, not transparent, where the other labels are meant: a chart makes room for what is not seen.
                    .encode(x=x, y=y, text=alt.condition("!narrow" if narrow else "narrow", alt.value(""), "label:N"))
                )
    return finished(alt.layer(*layers), datasets, height=400)


def figure_with_intervals(section: Section, figure: str) -> Spec:
    """One figure of every generator with its interval: where there is only the loss, or only the reward."""
    rows = [row for row in next(iter(section.rankings.values())) if row[figure] is not None]
    points = [_point(row) | {"place": place} for place, row in enumerate(rows)]
    tooltip = _tooltip(section, figure)
    x_scale = alt.Scale(domain=_domain(points, figure), nice=False, zero=False)
    title = "mean " + AXIS_TITLES[figure]
    base = alt.Chart(alt.NamedData("points")).encode(y=_names_axis())
    layers = [
        base.transform_filter(f"datum.{figure}_low != null")
        .mark_rule(color=MUTED, strokeWidth=2, aria=False)
        .encode(x=alt.X(f"{figure}_low:Q", scale=x_scale, title=title), x2=f"{figure}_high:Q"),
        base.mark_circle(size=95, opacity=1, stroke=PAPER, strokeWidth=1.5).encode(
            x=alt.X(f"{figure}:Q", scale=x_scale, title=title), color=_first_or_other(), tooltip=tooltip
        ),
    ]
    return finished(
        alt.layer(*layers), {"points": points}, names=[row["generator"] for row in rows], height=24 * len(rows)
    )


def ranking_by_beta(section: Section) -> Spec:
    """Every generator's place under every beta, joined by a line; the number within is the rank."""
    betas = [beta for beta in section.rankings if beta is not None]
    ranked = {beta: [row for row in section.rankings[beta] if row["car"] is not None][:MAX_BUMPS] for beta in betas}
    ever_first = {row["generator"] for own in ranked.values() for row in own if row["rank"] == 1}
    lines: dict[str | None, int] = {}
    data: list[Row] = []
    for index, beta in enumerate(betas):
        for place, row in enumerate(ranked[beta], start=1):
            point = _point(row)
            data.append(
                {name: point[name] for name in ("told", "told_rank", "told_car", "told_best", "is_first")}
                | {"at": index, "beta": f"{beta:g}", "place": place, "ever_first": row["generator"] in ever_first}
                | {"line": lines.setdefault(row["generator"], len(lines))}
            )
    n_places = max(map(len, ranked.values()))
    first, last = ([named(row["generator"], 30) for row in ranked[beta]] for beta in (betas[0], betas[-1]))
    label = "{0}[datum.value - 1] || ''"
    x = alt.X(
        "at:Q",
        scale=alt.Scale(domain=[-0.15, len(betas) - 0.85], nice=False, zero=False),
        axis=alt.Axis(
            values=list(range(len(betas))), labelExpr=f"{[f'β = {b:g}' for b in betas]}[datum.value]", orient="top",
            title=None, grid=True, domain=False, labelFontSize=12,
        ),
    )  # fmt: skip

    def y(orient: str, expression: str) -> alt.Y:
        axis = alt.Axis(
            orient=orient,  # type: ignore[arg-type]
            values=list(range(1, n_places + 1)),
            labelExpr=expression,
            labelLimit=alt.ExprRef("narrow ? 130 : 220"),
            labelPadding=6,
            domain=False,
            ticks=False,
            grid=False,
            title=None,
        )
        return alt.Y("place:Q", scale=alt.Scale(domain=[n_places + 0.5, 0.5], nice=False, zero=False), axis=axis)

    told = [("told", "generator"), ("beta", "β"), ("told_rank", "rank"), ("told_car", "CAR")]
    told += [] if section.repeated else [("told_best", "best in")]
    base = alt.Chart(alt.NamedData("places"))
    left, right = y("left", f"narrow ? '' : {label.format('names_first')}"), y("right", label.format("names_last"))
    chart = alt.layer(
        base.mark_line(strokeWidth=1.75, opacity=0.6, aria=False).encode(
            x=x, y=left, detail="line:N",
            color=alt.condition("datum.ever_first", alt.value(FIRST), alt.value(OTHER)),
        ),
        base.mark_circle(size=330, opacity=1, stroke=PAPER, strokeWidth=2).encode(
            x=x, y=right, color=_first_or_other(),
            tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in told],
        ),
        base.mark_text(fontSize=11, fontWeight="bold", color=PAPER, aria=False).encode(
            x=x, y=right, text="told_rank:N"
        ),
    ).resolve_axis(y="independent")  # fmt: skip
    return finished(chart, {"places": data}, height=26 * n_places + 10, names_first=first, names_last=last)


def strips(distribution: Distribution) -> Spec:
    """A strip a generator, strong where its responses are; a line for the middle half, a tick for the median."""
    edges = distribution.edges
    groups = [
        {"place": place, "name": named(group["name"]), "n": group["n"], "counts": group["counts"]}
        | dict(zip(_QUANTILE_FIELDS, group["quantiles"], strict=True))
        for place, group in enumerate(distribution.groups)
    ]
    low, high = edges[0], edges[-1]
    if distribution.logarithmic:
        edge = f"{low} * pow({high / low}, ({{}}) / {N_BINS})"
    else:
        edge = f"{low} + {high - low} * ({{}}) / {N_BINS}"
    scale = alt.Scale(type="log" if distribution.logarithmic else "linear", domain=[low, high], nice=False, clamp=True)
    axis = alt.Axis(tickCount=6, format="~s" if distribution.logarithmic else "~g", labelSeparation=8)
    title = AXIS_TITLES[distribution.figure]
    base = alt.Chart(alt.NamedData("groups"))
    bins = (
        base.transform_calculate(bin=f"sequence({N_BINS})", most="max(1, extent(datum.counts)[1])")
        .transform_flatten(["counts", "bin"])
        .transform_filter("datum.counts > 0")
        .transform_calculate(
            begin=edge.format("datum.bin"), end=edge.format("datum.bin + 1"), share="sqrt(datum.counts / datum.most)"
        )
    )
    tooltip = [
        alt.Tooltip("name:N", title="generator"),
        *(
            alt.Tooltip(f"{field}:Q", title=title, format=",.4~g")
            for field, title in zip(_QUANTILE_FIELDS, ("5%", "25%", "median", "75%", "95%"), strict=True)
        ),
        alt.Tooltip("n:Q", title="responses", format=","),
    ]  # fmt: skip
    opacity = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 0.85]), legend=None)
    names = _names_axis()
    chart = alt.layer(
        bins.mark_rect(color=SHADE, aria=False, height={"band": 0.82}).encode(
            x=alt.X("begin:Q", scale=scale, axis=axis, title=title), x2="end:Q", y=names, opacity=opacity,
            tooltip=tooltip,
        ),
        base.mark_rule(color=INK, strokeWidth=1.5, aria=False).encode(
            x=alt.X("quarter:Q", scale=scale), x2="three_quarters:Q", y=names
        ),
        base.mark_tick(color=INK, thickness=2.5, height={"band": 0.82}, orient="vertical").encode(
            x=alt.X("median:Q", scale=scale), y=names, tooltip=tooltip
        ),
    )  # fmt: skip
    return finished(
        chart, {"groups": groups}, names=[group["name"] for group in distribution.groups], height=22 * len(groups)
    )


def agreement(matrix: Agreement, titles: Mapping[str, str]) -> Spec:
    """Spearman's rho of each pair of metrics, in hundredths."""
    names = [titles.get(name, name) for name in matrix.metrics]
    cells = [
        {"row": i, "column": j, "rho": value, "size": abs(value), "told": f"{value * 100:.0f}".replace("-", "−"),
         "first": names[i], "second": names[j]}
        for i, row in enumerate(matrix.rho)
        for j, value in enumerate(row[:i])
        if value is not None
    ]  # fmt: skip
    rows, columns = list(range(1, len(names))), list(range(len(names) - 1))
    axis: dict[str, Any] = dict(title=None, domain=False, ticks=False, labelExpr="names[datum.value]", labelLimit=150)
    x = alt.X("column:O", sort=columns, axis=alt.Axis(**axis, labelAngle=-45, orient="bottom"))
    y = alt.Y("row:O", sort=rows, axis=alt.Axis(**axis))
    opacity = alt.Opacity("size:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 0.5]), legend=None)
    tooltip = [
        alt.Tooltip("first:N", title=" "),
        alt.Tooltip("second:N", title="with"),
        alt.Tooltip("rho:Q", title="rho"),
    ]
    base = alt.Chart(alt.NamedData("cells")).encode(x=x, y=y)
    signs = [("datum.rho >= 0", SHADE), ("datum.rho < 0", MINUS)]
    chart = alt.layer(
        *(
            base.transform_filter(sign).mark_rect(color=color, aria=False).encode(opacity=opacity, tooltip=tooltip)
            for sign, color in signs
        ),
        base.mark_text(color=INK, fontSize=11, aria=False).encode(text="told:N", tooltip=tooltip),
    )  # fmt: skip
    return finished(chart, {"cells": cells}, names=names, height=28 * len(rows))


_TOLD: Mapping[str, Sequence[tuple[str, str]]] = {
    "car": [("told", "generator"), ("told_rank", "rank"), ("told_car", "CAR"), ("told_best", "best in"),
            ("told_reward", "reward"), ("told_loss", "loss"), ("n", "responses")],
    "loss": [("told", "generator"), ("told_rank", "rank"), ("told_loss", "loss"), ("told_best", "best in"),
             ("n", "responses")],
    "reward": [("told", "generator"), ("told_rank", "rank"), ("told_reward", "reward"), ("told_best", "best in"),
               ("n", "responses")],
}  # fmt: skip


def _tooltip(section: Section, figure: str) -> list[alt.Tooltip]:
    told = [(field, title) for field, title in _TOLD[figure] if not (section.repeated and field == "told_best")]
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in told]


def _point(row: Mapping[str, Any]) -> dict[str, Any]:
    """A ranking's row for a chart: the figures as they are, and `told_` as people read them."""
    figures = {name: row[name] for name in ("reward", "reward_low", "reward_high", "loss", "loss_low", "loss_high")}
    told = {f"told_{name}": _told(row, name) for name in ("car", "reward", "loss") if row[name] is not None}
    return {
        "told": named(row["generator"]),
        "is_first": row["rank"] == 1,
        "told_rank": "" if row["rank"] is None else str(row["rank"]),
        "told_best": percent(row["p_best"]),
        "n": f"{row['n']:,}",
        **{name: float(f"{value:.7g}") for name, value in figures.items() if value is not None},
        **told,
    }


def _told(row: Mapping[str, Any], name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:.4g}" if low is None else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _first_or_other() -> alt.Color:
    return alt.Color("is_first:N", scale=alt.Scale(domain=[True, False], range=[FIRST, OTHER]), legend=None)


def _names_axis() -> alt.Y:
    axis = alt.Axis(
        title=None, domain=False, ticks=False, labelExpr="names[datum.value]", labelPadding=8,
        labelLimit=alt.ExprRef("narrow ? 110 : 240"),
    )  # fmt: skip
    return alt.Y("place:O", axis=axis)


def _domain(points: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """From the lowest to the highest interval, with room around."""
    values = [p[key] for p in points for key in (name, f"{name}_low", f"{name}_high") if p.get(key) is not None]
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or max(0.05 * abs(high), 0.05)
    return [low - room if low < 0 or low - room > 0 or name == "reward" else 0.0, high + room]


def _iso_lines(
    x_domain: Sequence[float], y_domain: Sequence[float], options: Options, cars: Sequence[float]
) -> dict[str, list[Row]]:
    """r = c * (1 + beta * L) - shift, within the chart, for round c: the ends of each line, and its label."""
    beta, shift = float(options.beta), options.reward_shift
    (x0, x1), (y0, y1) = x_domain, y_domain
    corners = [(y + shift) / (1 + beta * x) for x in x_domain for y in y_domain]
    ends: list[Row] = []
    labels: list[Row] = []
    for c in _round_values(cars, low=max(min(corners), 0.0), high=max(corners)):
        slope, height = c * beta, c - shift
        begin, end = (x0, x1) if slope == 0 else (max(x0, (y0 - height) / slope), min(x1, (y1 - height) / slope))
        if begin >= end or not y0 - 1e-9 <= height + slope * begin <= y1 + 1e-9:
            continue
        ends += [{"c": f"{c:.6g}", "loss": x, "reward": height + slope * x} for x in (begin, end)]
        label: Row = {"c": f"CAR {c:.6g}", "loss": end, "reward": height + slope * end}
        # A fifth of a narrow chart's width, a line's height.
        room = {"loss": (x1 - x0) / 5, "reward": (y1 - y0) / 20}
        if not any(all(abs(other[name] - label[name]) < room[name] for name in room) for other in labels):
            labels.append(label)
    return {"car_lines": ends, "car_labels": labels}


def _lines_of_equal_car(x: alt.X, y: alt.Y) -> list[alt.Chart]:
    return [
        alt.Chart(alt.NamedData("car_lines"))
        .mark_line(color=RULE, strokeWidth=1, strokeDash=[4, 4], aria=False)
        .encode(x=x, y=y, detail="c:N"),
        alt.Chart(alt.NamedData("car_labels"))
        .mark_text(color=MUTED, fontSize=10.5, align="right", dx=-3, dy=-6, fontStyle="italic", aria=False)
        .encode(x=x, y=y, text="c:N"),
    ]


def _round_values(values: Sequence[float], *, low: float, high: float) -> list[float]:
    """Round numbers between low and high that tell the values apart: up to six among them, and one on either side."""
    spread = max(max(values) - min(values), (high - low) / 20) if len(values) > 1 else high - low
    unit = 10.0 ** math.floor(math.log10(spread / 5))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= spread / 5 * 0.999)
    first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
    return [k * step for k in range(first, last + 1) if low < k * step < high]


def finished(
    chart: alt.LayerChart | alt.FacetChart,
    datasets: Mapping[str, Sequence[Row]],
    *,
    height: int,
    **lists: Sequence[str | None],
) -> Spec:
    """The specification of a chart as wide as its place. lists: what its expressions look names up in."""
    sized = chart.properties(width="container", height=height, padding=2)
    specification: Spec = sized.configure(**_CONFIG).to_dict()
    specification["datasets"] = {name: list(rows) for name, rows in datasets.items()}
    specification["params"] = [
        {"name": "narrow", "expr": "containerSize()[0] < 520"},
        *({"name": name, "value": [named(entry, 40) for entry in values]} for name, values in lists.items()),
    ]
    return specification


_CONFIG: Mapping[str, Any] = dict(
    background="transparent",
    font=FONT,
    view=alt.ViewConfig(stroke=None),
    axis=alt.AxisConfig(
        labelColor=MUTED, titleColor=INK, gridColor=GRID, domainColor=RULE, tickColor=RULE, labelFontSize=11.5,
        titleFontSize=12, titleFontWeight="normal", titlePadding=10, labelFont=FONT, titleFont=FONT,
    ),
    aria=True,
)  # fmt: skip
