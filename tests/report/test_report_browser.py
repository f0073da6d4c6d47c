"""The report in a real browser: charts are drawn, nothing is asked of a network, nothing fails, nothing sticks out.

Needs chromium, chromium-browser, google-chrome or chrome on the path. REPORT_SCREENSHOTS=DIR keeps the pictures.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chromium import PROGRAM, chromium
from scored_runs import add_scores, drawn, gamma_losses, make_run, normal_rewards
from test_report_race import raced

from fastcompat.report import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on the path")

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """A usual run with tokens, one of a hundred generators and hostile names, one of losses alone, several models, a
    race."""
    root = tmp_path_factory.mktemp("reports")

    def with_tokens(name, prompt):
        losses = drawn(name, prompt, "tokens").gamma(1, 2, size=30)
        texts = [" token", " longer-token", ".", " <i>", "\n", " 中文"] * 5
        return {
            "loss": float(losses.mean()),
            "n_tokens": 30,
            "token_nll": losses.tolist(),
            "token_text": texts,
            "entropy_sum": float(losses.sum() * 0.8 + prompt),
            "n_bytes": 200 + prompt,
        }

    usual = make_run(root / "usual", [f"generator-{k}" for k in range(6)], 60, reward=normal_rewards)
    add_scores(usual, with_tokens, extras=["token_nll", "token_text", "entropy_sum", "n_bytes"])
    hostile = ["<script>alert(1)</script>", "\u202eעברית", "👩‍🔬 " * 30, "no-space" * 60, "'\"\\ {{x}} [datum.value]"]
    names = [f"g{k} {hostile[k % len(hostile)]}" for k in range(100)]
    many = make_run(root / "many", names, 12, reward=normal_rewards, text=lambda name, prompt: name + "x" * 3000)
    add_scores(many, gamma_losses(worse=0.01))
    losses = make_run(root / "losses", ["only", "other"], 3)
    add_scores(losses, gamma_losses())
    several = make_run(root / "several", ["g0", "g1", "g2", "g3", "g4"], 30, reward=normal_rewards)
    for model in ("one/base", "another/base"):
        add_scores(several, gamma_losses(worse=0.2), model=model)
    stopped = raced(root / "raced", names=[f"{k}-{hostile[k % len(hostile)]}" for k in range(20)])
    runs = {"usual": usual, "many": many, "losses": losses, "several": several, "raced": stopped}
    return {name: write_report(run, root / f"{name}.html", draws=100) for name, run in runs.items()}


@pytest.fixture(scope="module")
def page():
    with chromium() as own:
        yield own


@pytest.mark.parametrize("name", ["usual", "many", "losses", "several", "raced"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_asks_nothing_fails_nowhere_and_fits(reports, page, name, scheme, window, tmp_path):
    page.resize(*window, scheme=scheme)
    page.open(reports[name])
    assert page.problems == []
    assert page.requests == []
    width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner == window[0]
    # Every chart in sight has marks, and none is wider than its place.
    charts = page.evaluate(
        """[...document.querySelectorAll("section.pair:not([hidden]) .chart")].map((place) => {
            const svg = place.querySelector("svg");
            const marks = svg.querySelectorAll("[role='graphics-symbol'], .mark-rect path, .mark-text text").length;
            return [place.id, marks, svg.getBoundingClientRect().width, place.getBoundingClientRect().width];
        })"""
    )
    assert charts
    for chart, marks, drawn_width, place_width in charts:
        assert marks > 0, chart
        assert 0.7 * place_width < drawn_width <= place_width + 1, chart
    folder = Path(os.environ.get("REPORT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    shape = "desktop" if window == DESKTOP else "phone"
    picture = page.screenshot(folder / f"{name}-{shape}-{scheme}.png", whole=bool(os.environ.get("REPORT_SCREENSHOTS")))
    assert picture.stat().st_size > 10_000
    # Text stands out by what WCAG asks for, in charts too: there the colours are the page's variables.
    places = [
        "body",
        ".caption",
        "figcaption",
        "td",
        "thead th",
        ".headline strong",
        ".between",
        ".role-axis-label text",
    ]
    for place in places:
        contrast, dark = page.evaluate(CONTRAST % place)
        assert contrast >= 4.5, place
        assert dark == (scheme == "dark")


CONTRAST = """(() => {
    const channels = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    const light = (colour) => channels(colour).reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
    const element = document.querySelector("section.pair:not([hidden])").querySelector("%s") || document.body;
    const style = getComputedStyle(element);
    const text = light(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return [(Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05), paper < 0.2];
})()"""


def test_another_pair_of_models_is_drawn_when_it_is_chosen(reports, page):
    page.resize(*DESKTOP)
    page.open(reports["several"])
    titles = page.evaluate("[...document.querySelectorAll('section.pair')].map((s) => [s.ariaLabel, s.hidden])")
    assert titles == [["one/base × column reward", False], ["another/base × column reward", True]]
    page.evaluate("pair.value = 1, pair.dispatchEvent(new Event('change')), 0")
    page.wait()
    assert page.evaluate("[...document.querySelectorAll('section.pair')].map((s) => s.hidden)") == [True, False]
    assert page.evaluate("document.querySelector('#pair-1 .chart svg').getBoundingClientRect().width") > 300
    assert page.problems == page.requests == []


def test_pointing_at_a_point_tells_its_figures(reports, page):
    page.resize(*DESKTOP)
    page.open(reports["usual"])
    x, y = page.evaluate(
        """(() => {
            const point = document.querySelector("#reward-loss-0 .mark-symbol path");
            point.scrollIntoView({block: "center", behavior: "instant"});
            const box = point.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        })()"""
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    told = page.evaluate("document.getElementById('vg-tooltip-element').innerText")
    assert "generator-" in told
    assert "CAR" in told
    assert page.problems == []


def test_on_paper_it_is_light_and_unfolded(reports, page, tmp_path):
    page.resize(*DESKTOP, scheme="dark", media="print")
    page.open(reports["usual"])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.evaluate("dispatchEvent(new Event('beforeprint')), 0")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.evaluate("dispatchEvent(new Event('afterprint')), 0")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") > 0
    assert len(page.call("Page.printToPDF")["data"]) > 50_000
