"""The page: one file of HTML with its style, its charts and the one script that draws them. Asks no network."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
from markupsafe import Markup

from fastcompat.decisions import FIGURE_NAMES
from fastcompat.metrics import METRICS
from fastcompat.report import charts
from fastcompat.report.data import MAX_SECTIONS, QUANTILES, Agreement, Options, ReportData, Section
from fastcompat.report.examples import Example
from fastcompat.report.headline import Headline, Name, headline, named
from fastcompat.report.race import ShownRace, claimed
from fastcompat.report.race_chart import is_against_the_leader, race_caption, race_chart
from fastcompat.version import __version__
from fastcompat.wording import percent, visible

# Metrics' names where they are written out.
METRIC_TITLES: Mapping[str, str] = {
    "car": "CAR",
    "reward": "reward",
    "loss": "loss",
    "bits_per_byte": "bits per byte",
    "response_length": "length",
    "ifd_loss": "IFD (loss)",
    "ifd_ppl": "IFD (perplexity)",
    "rsr": "rank-surprisal",
    "persyn": "PerSyn",
    "excess_loss": "excess loss",
    "greedy_match_rate": "greedy matches",
    "entropy": "entropy",
}
# Upper ends of the shades of a token, in nats; the last has none.
SHADES = (0.5, 1.5, 3.0, 5.0, 8.0)
# Characters of a name in the page's data.
MAX_NAME = 1000
_FIGURE_TITLES = {"loss": "Loss", "reward": "Reward", "n_tokens": "Length"}
_UNITS = {"loss": "nats per token", "n_tokens": "tokens"}


class Chart(NamedTuple):
    """A chart's place in the page. about: what it shows, for those who do not see it."""

    id: str
    about: str


class SectionPage(NamedTuple):
    """A section with what the template needs of it beside the figures."""

    section: Section
    title: str
    headline: Headline
    main: Chart | None
    by_beta: Chart | None
    strips: Sequence[tuple[Any, Chart]]
    agreement: Sequence[tuple[str, Agreement, Chart]]
    race: RacePage | None


class RacePage(NamedTuple):
    """The race of a section. chart: None where no look knew of two generators."""

    chart: Chart | None
    caption: str


def render(data: ReportData, options: Options) -> str:
    """The page as text. The same data and options give the same text."""
    specs: dict[str, charts.Spec] = {}
    pages = [
        _section_page(section, number, options, specs, len(data.sections))
        for number, section in enumerate(data.sections)
    ]
    figures = {
        "by": options.by,
        "rankings": [_columns(section) for section in data.sections],
    }
    scripts = [_vega(), _resource("page.js")]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "named": named,
        "percent": percent,
        "json": _json,
        "decimals": _decimals,
        "shade": _shade,
        "visible": visible,
        "plain": _plain,
        "signed": _signed,
        "claimed": claimed,
        "metric": lambda name: METRIC_TITLES.get(name, name),
    }
    environment.tests |= {
        "name": lambda fragment: isinstance(fragment, Name),
        "better_lower": lambda name: METRICS[name].lower_is_better,
    }
    return environment.from_string(_resource("page.html.jinja")).render(
        data=data,
        options=options,
        pages=pages,
        specs=specs,
        figures=figures,
        scripts=scripts,
        style=_resource("page.css"),
        script_hashes=[_script_hash(script) for script in scripts],
        versions=_versions(),
        shades=_shade_legend(),
        quantiles=[f"{quantile:.0%}" for quantile in QUANTILES],
        figure_titles=_FIGURE_TITLES,
        units=_UNITS,
        max_sections=MAX_SECTIONS,
        fastcompat=__version__,
        has_tokens=any(_has_tokens(page.section) for page in pages),
    )


def _section_page(
    section: Section, number: int, options: Options, specs: dict[str, charts.Spec], n_sections: int
) -> SectionPage:
    def added(name: str, spec: charts.Spec, about: str) -> Chart:
        specs[f"{name}-{number}"] = spec
        return Chart(f"{name}-{number}", about)

    own_headline = headline(section, options)
    reading = "".join(own_headline.result)
    rows = section.ranking(float(options.beta))
    main = by_beta = None
    if any(row["reward"] is not None and row["loss"] is not None for row in rows):
        iso = f", with lines of equal CAR at β = {options.beta:g}" if section.sort_by == "car" else ""
        about = f"Mean reward against mean loss, one point for each of {len(rows)} generators{iso}. {reading}"
        main = added("reward-loss", charts.reward_against_loss(section, options), about)
    elif any(row[section.sort_by] is not None for row in rows):
        kind = "95% repeated intervals" if section.repeated else "95% intervals"
        about = f"Mean {section.sort_by} of {len(rows)} generators with {kind}. {reading}"
        main = added("figure", charts.figure_with_intervals(section, section.sort_by), about)
    if section.sort_by == "car" and len(section.rankings) > 1 and len(rows) > 1:
        betas = ", ".join(f"{beta:g}" for beta in section.rankings if beta is not None)
        about = f"Places of the generators under β = {betas}. {''.join(own_headline.dependence)}"
        by_beta = added("by-beta", charts.ranking_by_beta(section), about)
    race = None
    if section.race is not None:
        spec = race_chart(section.race, n_sections=n_sections)
        chart = None if spec is None else added("funnel", spec, _about_race(section.race))
        race = RacePage(chart, race_caption(section.race, n_sections=n_sections))
    strips = [
        (
            distribution,
            added(
                f"strip-{distribution.figure}",
                charts.strips(distribution),
                f"Distribution of the {_FIGURE_TITLES[distribution.figure].lower()} of each generator's responses.",
            ),
        )
        for distribution in section.distributions
        if distribution.groups
    ]
    agreements = []
    for over, matrix in (("generators", section.of_generators), ("responses", section.of_responses)):
        if matrix is not None:
            about = f"Spearman's rank correlation of {len(matrix.metrics)} metrics over {matrix.n:,} {over}."
            chart = added(f"agreement-{over}", charts.agreement(matrix, METRIC_TITLES), about)
            agreements.append((over, matrix, chart))
    models = [named(model) for model in (section.base_model, section.reward_model) if model is not None]
    return SectionPage(section, " × ".join(models), own_headline, main, by_beta, strips, agreements, race)


def _about_race(race: ShownRace) -> str:
    figure = FIGURE_NAMES[race.settings.figure or "car"]
    drawn = f"{figure} relative to the leader's" if is_against_the_leader(race) else figure
    first, last = race.looks[0], race.looks[-1]
    if len(race.looks) > 1:
        looks = f"{len(race.looks)} looks, after {first.n_prompts:,} to {last.n_prompts:,} prompts"
    else:
        looks = f"one look, after {last.n_prompts:,} prompts"
    names = race.history.names
    n_out = len(race.history.out)
    return f"{drawn} at {looks}: {len(names)} generators, {n_out} of which left the race. {race.ended}"


def _columns(section: Section) -> dict[str, Any]:
    """A section's rankings in full precision: columns of equal length, for programs that read the page."""
    rows = [{**row, "beta": beta} for beta, own in section.rankings.items() for row in own]
    names = [name for name in rows[0] if name not in ("base_model", "reward_model")]
    models = {"base_model": section.base_model, "reward_model": section.reward_model}
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in names}
    # Of a run that is finished, they say nothing.
    for name, usual in (("interval", "plain"), ("stopped_after", None), ("claim", None)):
        if set(columns[name]) == {usual}:
            del columns[name]
    columns["generator"] = [name and name[:MAX_NAME] for name in columns["generator"]]
    return models | columns


def _json(value: Any) -> Markup:
    """JSON that may stand in a script element. ValueError for NaN, which is no JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # An unpaired surrogate is no UTF-8.
    return Markup(text.encode("utf-8", "replace").decode())


def _decimals(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """A format that gives a column four significant digits at its largest value, at most six decimals."""
    largest = max((abs(row[name]) for row in rows if row[name] is not None), default=0.0)
    digits = 4 if largest == 0 else min(6, max(0, 3 - math.floor(math.log10(largest))))
    return f",.{digits}f"


def _signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.2f}%".replace("-", "−")


def _shade(nll: float) -> int:
    return sum(nll > end for end in SHADES)


def _shade_legend() -> list[tuple[int, str]]:
    ends = [f"{end:g}" for end in SHADES]
    spans = [f"up to {ends[0]}", *(f"{low} to {high}" for low, high in itertools.pairwise(ends))]
    return list(enumerate([*spans, f"over {ends[-1]}"]))


def _has_tokens(section: Section) -> bool:
    shown: list[Example] = [e for own in section.examples for e in (*own.lowest, *own.highest)]
    return any(example.tokens for example in shown)


def _plain(value: Any) -> str:
    """A setting as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _versions() -> dict[str, str]:
    import numpy as np

    return {"fastcompat": __version__, "numpy": np.__version__, "pyarrow": pa.__version__, "altair": version("altair")}


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`."""
    import vl_convert
    from altair import SCHEMA_VERSION

    release = ".".join(SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=release)
    # Within a script element, only the end of a script would end it, and only this would begin a comment.
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _script_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
