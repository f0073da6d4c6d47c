"""The chart of a race: how far each generator was behind the leader at every look, until it left. As in `charts`.

Where generators leave as losers, the leader stays, and all are drawn against it. Other races let the leader go too, so
there the figures themselves are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import altair as alt
import numpy as np

from fastcompat.decisions import FIGURE_NAMES
from fastcompat.report.charts import FIRST, INK, MUTED, OTHER, PAPER, SHADE, Row, Spec, finished
from fastcompat.report.headline import named
from fastcompat.report.labels import CHARACTER_WIDTH, LINE_HEIGHT
from fastcompat.report.race import ShownRace

# Points of all lines of a chart; beyond, those that left first are not drawn.
MAX_POINTS = 1500
# Generators whose intervals are drawn: of more, the bands would hide each other.
MAX_BANDS = 3
HEIGHT = 360
# The plot's width as labels are placed in it, and the length of a name, on a desk and on a phone.
_SHAPES = {"wide": (700, 26), "narrow": (270, 14)}
# From a mark to its name, in pixels.
_GAP = 11
# By how many lines a name may be moved, in this order.
_STEPS = (0.0, *(sign * k / 2 for k in range(1, 9) for sign in (1, -1)))
_Box: TypeAlias = tuple[float, float, float, float]
_CROSS = "M-1,-1L1,1M1,-1L-1,1"


class _Point(NamedTuple):
    x: int
    y: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One generator: its points, and whether it has left."""

    name: str
    points: Sequence[_Point]
    left: bool


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """What is drawn upwards. constant: within it, in per cent, the axis is linear, beyond logarithmic; 0: linear."""

    title: str
    constant: float
    low: float
    high: float

    def scaled(self, value: float) -> float:
        return math.copysign(math.log1p(abs(value) / self.constant), value) if self.constant else value

    def _unscaled(self, value: float) -> float:
        return math.copysign(math.expm1(abs(value)) * self.constant, value) if self.constant else value

    @property
    def _ends(self) -> tuple[float, float]:
        low, high = self.scaled(self.low), self.scaled(self.high)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return low - room, high + room

    @property
    def domain(self) -> list[float]:
        return [_short(self._unscaled(end)) for end in self._ends]

    def pixel(self, value: float) -> float:
        low, high = self._ends
        return (high - self.scaled(value)) / (high - low) * HEIGHT

    def at(self, pixel: float) -> float:
        low, high = self._ends
        return _short(self._unscaled(high - pixel / HEIGHT * (high - low)))

    @property
    def ticks(self) -> list[float]:
        """Round numbers, not closer than a line and a half of text: 0 and powers of ten before others."""
        ticks, pixels = [0.0], [self.pixel(0)]
        low, high = self.domain
        for digit, power, sign in product((1, 5, 2), range(-1, 4), (-1, 1)):
            value = sign * digit * 10.0**power
            there = self.pixel(value)
            if low <= value <= high and all(abs(there - other) >= 1.5 * LINE_HEIGHT for other in pixels):
                ticks.append(value)
                pixels.append(there)
        return sorted(ticks)


def is_against_the_leader(race: ShownRace) -> bool:
    """Whether differences are drawn, or figures."""
    return race.settings.until == "winner"


def race_chart(race: ShownRace, *, n_sections: int = 1) -> Spec | None:
    """The funnel; None where no look knew of two generators."""
    lines = _lines(race, MAX_POINTS // n_sections)
    if len(lines) < 2:
        return None
    bands = _banded(race, lines)
    axis = _axis(race, lines, bands)
    first, last = (end(p.x for line in lines for p in line.points) for end in (min, max))
    x_ends = _x_ends(first, last, lines)
    x_scale = alt.Scale(
        type="log", nice=False, domainMin=x_ends["wide"][0],
        domainMax=alt.ExprRef(f"narrow ? {x_ends['narrow'][1]} : {x_ends['wide'][1]}"),
    )  # fmt: skip
    x = alt.X(
        "x:Q", scale=x_scale, title="prompts (log scale)",
        axis=alt.Axis(values=_prompt_ticks(first, last), format="~s", grid=False, labelOverlap=True),
    )  # fmt: skip
    against = is_against_the_leader(race)
    y_axis: dict[str, Any] = {"tickCount": 8}
    if against:
        y_axis = {
            "values": axis.ticks,
            "labelOverlap": False,
            "labelExpr": "(datum.value > 0 ? '+' : '') + format(datum.value, '~g') + '%'",
        }
    kind: dict[str, Any] = {"type": "symlog", "constant": axis.constant} if axis.constant else {"zero": False}
    y_scale = alt.Scale(domain=axis.domain, nice=False, clamp=True, **kind)

    def upwards(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", scale=y_scale, axis=alt.Axis(**y_axis), title=axis.title)

    y = upwards("y")
    margin = [100 * race.settings.margin] if against and race.settings.margin else []
    datasets: dict[str, list[Row]] = {
        "looks": [
            {"g": g, "x": p.x, "y": p.y, "low": p.low, "high": p.high, "band": line in bands, "out": line.left}
            for g, line in enumerate(lines)
            for p in line.points
        ],
        "ends": [
            {"g": g, "x": p.x, "y": p.y, "low": p.low, "high": p.high, "band": line in bands, "out": line.left}
            | {"told": "left the race" if line.left else "in to the end" if race.is_over else "still in"}
            for g, line in enumerate(lines)
            for p in line.points[-1:]
        ],
        "rules": [{"x": first, "to": last, "y": value, "dashed": value > 0} for value in (0.0, *margin) if against],
    }
    looks = alt.Chart(alt.NamedData("looks")).transform_calculate(name="names[datum.g]")
    ends = alt.Chart(alt.NamedData("ends")).transform_calculate(name="names[datum.g]")
    rules = alt.Chart(alt.NamedData("rules"))
    value = "relative to the leader, %" if against else axis.title
    number = "+.2~f" if against else ".4~g"
    tooltip = [
        alt.Tooltip("name:N", title="generator"),
        alt.Tooltip("x:Q", title="prompts", format=","),
        *(alt.Tooltip(f"{f}:Q", title=t, format=number) for f, t in (("y", value), ("low", "from"), ("high", "to"))),
    ]
    color = alt.condition("datum.out", alt.value(OTHER), alt.value(FIRST))
    layers: list[alt.Chart] = [
        looks.transform_filter("datum.band && datum.low < datum.high")  # while it leads, it has no interval
        .mark_area(color=SHADE, opacity=0.13, aria=False)
        .encode(x=x, y=upwards("low"), y2="high:Q", detail="g:N"),
        rules.transform_filter("!datum.dashed")
        .mark_rule(color=INK, strokeWidth=1, aria=False)
        .encode(x=x, x2="to:Q", y=y),
        rules.transform_filter("datum.dashed")
        .mark_rule(color=MUTED, strokeDash=[4, 4], aria=False)
        .encode(x=x, x2="to:Q", y=y),
        looks.mark_line(strokeWidth=1.75, aria=False).encode(x=x, y=y, detail="g:N", color=color),
        looks.mark_circle(size=14, opacity=1, aria=False).encode(x=x, y=y, color=color, tooltip=tooltip),
        ends.transform_filter("datum.band")
        .mark_rule(color=MUTED, strokeWidth=1.25, aria=False)
        .encode(x=x, y=upwards("low"), y2="high:Q"),
        ends.transform_filter("!datum.out")
        .mark_circle(size=95, opacity=1, stroke=PAPER, strokeWidth=1.5)
        .encode(x=x, y=y, color=alt.value(FIRST), tooltip=[*tooltip, alt.Tooltip("told:N", title=" ")]),
        ends.transform_filter("datum.out")
        .mark_point(size=36, shape=_CROSS, filled=False, strokeWidth=2, opacity=1)
        .encode(x=x, y=y, color=alt.value(OTHER), tooltip=[*tooltip, alt.Tooltip("told:N", title=" ")]),
    ]
    for shape, (width, length) in _SHAPES.items():
        across = _across(x_ends[shape], width)
        own = _labels(lines, across, axis.pixel, axis.at, width=width, length=length)
        datasets[f"names_{shape}"] = own
        layers += _names(f"names_{shape}", x, y, upwards("at"), shape)
    return finished(
        alt.layer(*layers), datasets, height=HEIGHT, names=[line.name for line in lines],
    )  # fmt: skip


def race_caption(race: ShownRace, *, n_sections: int = 1) -> str:
    """What is to be seen in it."""
    lines = _lines(race, MAX_POINTS // n_sections)
    n_drawn = len(lines)
    n_bands = len(_banded(race, lines))
    parts = []
    if is_against_the_leader(race):
        even = f"within ±{_constant(race):g}% the vertical axis is even, beyond it logarithmic"
        parts.append(f"A line is one generator at every look; {even}.")
        near = "The band is the" if n_bands == 1 else f"Bands: for the {n_bands} that stayed longest, the"
        whose = " of the one that stayed longest" if n_bands == 1 else ""
        parts.append(f"{near} 95% repeated interval{whose}; to drop one, the race asks for more.")
        if race.settings.margin:
            most = f"{100 * race.settings.margin:.3g}% at most"
            parts.append(f"Dashed: who is surely below it is better than the leader by {most}.")
    else:
        parts.append("A line is one generator’s figure at every look.")
        parts.append(f"Bands: for the {n_bands} that stayed longest, the 95% repeated interval." if n_bands > 1 else "")
    parts.append("×: left the race; point at a mark for the name where there is no room for it.")
    if n_drawn < len(race.history.names):
        parts.append(f"The {n_drawn} of {len(race.history.names)} that stayed longest.")
    return " ".join(filter(None, parts))


def _names(dataset: str, x: alt.X, y: alt.Y, at: alt.Y, shape: str) -> list[alt.Chart]:
    """Text beside its mark, with paper around it, and a line to it where it had to move."""
    base = alt.Chart(alt.NamedData(dataset))
    shown = "narrow" if shape == "narrow" else "!narrow"
    # Empty, not transparent, where the other names are meant: a chart makes room for what is not seen.
    text = alt.condition("narrow" if shape == "wide" else "!narrow", alt.value(""), "label:N")
    style: dict[str, Any] = dict(align="left", baseline="middle", dx=_GAP, fontSize=11.5, aria=False)
    return [
        base.transform_filter(f"{shown} && datum.moved")
        .mark_rule(color=MUTED, strokeWidth=0.75, xOffset=4, x2Offset=_GAP - 1, aria=False)
        .encode(x=x, x2="x:Q", y=y, y2="at:Q"),
        base.mark_text(**style, stroke=PAPER, strokeWidth=3.5, strokeJoin="round").encode(x=x, y=at, text=text),
        base.mark_text(**style, color=INK).encode(x=x, y=at, text=text),
    ]


def _lines(race: ShownRace, most: int) -> list[_Line]:
    """Those that stayed longest first, of these the best first."""
    against = is_against_the_leader(race)
    points: dict[str, list[_Point]] = {}
    for look in race.looks:
        for own in look.standings:
            triple = (own.lead, own.lead_low, own.lead_high) if against else (own.value, own.low, own.high)
            figures = [_short((100 if against else 1) * value) for value in triple if value is not None]
            if len(figures) == 3:
                point = _Point(look.n_prompts, *figures)
                points.setdefault(own.generator, []).append(point)
    out = race.history.out
    order = sorted(points, key=lambda name: (-points[name][-1].x, -points[name][-1].y, name))
    lines: list[_Line] = []
    n_points = 0
    for name in order:
        n_points += len(points[name])
        if n_points > most and len(lines) >= 2:
            break
        lines.append(_Line(name=name, points=points[name], left=name in out))
    return lines


def _banded(race: ShownRace, lines: Sequence[_Line]) -> list[_Line]:
    """The few others that stayed longest; of those that left at once only where nobody else is left."""
    others = [line for line in lines if line.name != race.looks[-1].leader or not is_against_the_leader(race)]
    return ([line for line in others if len(line.points) > 1] or others)[:MAX_BANDS]


def _axis(race: ShownRace, lines: Sequence[_Line], bands: Sequence[_Line]) -> _Axis:
    values = [p.y for line in lines for p in line.points]
    values += [value for line in bands for p in line.points for value in (p.low, p.high)]
    if not is_against_the_leader(race):
        title = FIGURE_NAMES[race.settings.figure or "car"]
        return _Axis(title=title, constant=0, low=min(values), high=max(values))
    title = f"{FIGURE_NAMES[race.settings.figure or 'car']} relative to the leader’s"
    constant = _constant(race)
    return _Axis(title=title, constant=constant, low=min(*values, 0), high=max(*values, 2 * constant))


def _constant(race: ShownRace) -> float:
    """The margin tells which differences matter."""
    return min(2.0, max(0.1, 100 * race.settings.margin)) if race.settings.margin else 1.0


def _x_ends(first: int, last: int, lines: Sequence[_Line]) -> dict[str, tuple[float, float]]:
    """From the first look to the last, with room for the longest name at the end."""
    low, high = math.log10(first), math.log10(last)
    span = max(high - low, 0.1)
    ends = {}
    for shape, (width, length) in _SHAPES.items():
        longest = max(len(named(line.name, length)) for line in lines if line.points[-1].x == last)
        room = min(0.6, (_GAP + 8 + longest * CHARACTER_WIDTH) / width)
        ends[shape] = (_short(10 ** (low - 0.04 * span)), _short(10 ** (high + span * room / (1 - room))))
    return ends


def _across(ends: tuple[float, float], width: float) -> Callable[[float], float]:
    low, high = map(math.log10, ends)
    return lambda x: (math.log10(x) - low) / (high - low) * width


def _prompt_ticks(first: int, last: int) -> list[int]:
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(k / 10 for k in range(10, 100, 5))):
        ticks = [round(d * 10**power) for power in range(8) for d in digits]
        inside = [tick for tick in dict.fromkeys(ticks) if first * 0.97 <= tick <= last * 1.01]
        if len(inside) >= 3:
            return inside
    return sorted({first, last})


def _labels(
    lines: Sequence[_Line],
    across: Callable[[float], float],
    down: Callable[[float], float],
    up: Callable[[float], float],
    *,
    width: float,
    length: int,
) -> list[Row]:
    """A name to the right of every end for which there is room there, a few lines higher or lower if need be."""
    paths = [[(across(p.x), down(p.y)) for p in line.points] for line in lines]
    ends = [path[-1] for path in paths]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in ends]
    taken: list[_Box] = []
    labels: list[Row] = []
    for line, (x, y) in zip(lines, ends, strict=True):
        text = named(line.name, length)
        left, right = x + _GAP, x + _GAP + CHARACTER_WIDTH * len(text)
        boxes = {step: (left, y + (step - 0.5) * LINE_HEIGHT, right, y + (step + 0.5) * LINE_HEIGHT) for step in _STEPS}
        free = [
            step
            for step, box in boxes.items()
            if right <= width and box[1] >= 0 and box[3] <= HEIGHT and not any(_meet(box, o) for o in (*taken, *marks))
        ]
        # Rather a few lines away than on another generator's line, but on it where it is near.
        clear = [step for step in free if not any(_crosses(path, boxes[step]) for path in paths)]
        step = next(iter([*clear, *(step for step in free if abs(step) <= 1)]), None)
        if step is not None:
            taken.append(boxes[step])
            end = line.points[-1]
            moved = abs(step) * LINE_HEIGHT > 5
            labels.append({"x": end.x, "y": end.y, "at": up(y + step * LINE_HEIGHT), "label": text, "moved": moved})
    return labels


def _crosses(path: Sequence[tuple[float, float]], box: _Box) -> bool:
    """Whether a line of ascending points goes through a box, looked at every few pixels."""
    left, right = max(box[0], path[0][0]), min(box[2], path[-1][0])
    if left > right:
        return False
    xs = np.linspace(left, right, 12)
    ys = np.interp(xs, [x for x, _ in path], [y for _, y in path])
    return bool(((ys > box[1]) & (ys < box[3])).any())


def _meet(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
