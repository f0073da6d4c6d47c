"""The report of a run that a race stopped, of one that is only unfinished, of one that was finished after a race."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from scored_runs import add_scores, gamma_losses, make_run, normal_rewards
from test_report import written

from fastcompat.decisions import RaceSettings, rank
from fastcompat.decisions.ranking.looks import planned_looks, prompts_below
from fastcompat.report import Options, report_data, write_report
from fastcompat.report.headline import headline
from fastcompat.report.race_chart import MAX_BANDS, MAX_POINTS, race_chart
from fastcompat.rows.status import Status
from fastcompat.store import Run, start_race

NAMES = ["g0", "g1", "g2", "<b>g3</b>"]
# What is only right of who looks once, and of bootstrap draws.
ORDINARY = ("bootstrap draws", "best in", "their 95% intervals for new prompts", "clearly better", "95% interval ")


def raced(
    directory: Path, *, names: Sequence[str] = NAMES, finished: bool = False, over: str = "winner", **settings: Any
) -> Run:
    """A run of 500 prompts, and a race of three looks: the last of `names` leaves at the first, all but the first at
    the third, unless it ends otherwise."""
    run = make_run(
        directory, names, 500, reward=lambda name, prompt: normal_rewards("g1", prompt), target_unit_chars=9000
    )
    n_prompts = 500
    shares = planned_looks(n_prompts)
    asked = RaceSettings(**{"until": "winner", "figure": "car"} | settings)
    record = {
        "settings": asdict(asked),
        "base_model": "base_model-some-base",
        "reward_model": "column reward",
        "corpus": [generation.fingerprint for generation in run.generations],
        "generators": sorted(names),
        "n_prompts": n_prompts,
        "shares": shares,
        "before": {},
    }
    store = start_race(run, record)
    last, leaves = {names[-1]: 1}, {1: [names[-1]]}
    ends = (
        [name for name in names[:-1] if over != "winner" or name != names[0]] if over in ("winner", "ranking") else []
    )
    leaves[3] = ends
    for number in (1, 2, 3):
        n = round(shares[number - 1] * n_prompts)
        still_in = [name for name in names if name not in last or last[name] >= number]
        out = dict.fromkeys(leaves.get(number, []), f"out of the race after {n} prompts: below {names[0]}")
        store.add_look(
            number,
            {
                "number": number,
                "n_looks": len(shares),
                "n_prompts": n,
                "n_responses": n * len(still_in),
                "standings": [standing(name, place, n) for place, name in enumerate(still_in)],
                "claims": [[names[0], name] for name in out if name != names[0]],
                "equal": [[names[0], name] for name in still_in[1:]] if over == "margin" and number == 3 else [],
                "out": out,
                "over": over if number == 3 else "",
            },
        )
    add_scores(run, gamma_losses(), units=run.units if finished else below(run, prompts_below(shares[2])))
    return run


def below(run: Run, threshold: str) -> list[Any]:
    """The units with prompts below a threshold."""
    return [unit for unit, first in run.first_prompts().items() if first < threshold]


def standing(name: str, place: int, n: int) -> dict[str, Any]:
    reach = 0.5 / n**0.5 if place else 0.0
    value = 0.5 - 0.1 * place
    figures = {"value": value, "low": value - 0.1, "high": value + 0.1}
    leads = {"lead": -0.2 * place, "lead_low": -0.2 * place - reach, "lead_high": -0.2 * place + reach}
    return {"generator": name, "n_prompts": n} | figures | leads


def checked(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification that Vega-Lite's schema allows: the data may come as `datasets`, and `width` from its place."""
    alt.LayerChart.from_dict({name: value for name, value in spec.items() if name != "$schema"}, validate=True)
    return spec


def test_a_stopped_run(tmp_path):
    run = raced(tmp_path)
    document = written(run, tmp_path)
    for words in ORDINARY:
        assert words not in document.visible, words
    assert "Stopped by a race: some/base has gone through" in document.visible
    assert "95% repeated interval: one that holds at whichever look" in document.visible
    assert "The rank is 1 + the number of generators that the race found surely better." in document.visible
    assert "It asked for the best by CAR, beta 3, 1% counts as equal. Winner: g0, after 264 of 500" in document.visible
    assert "1% at all looks on the way together, and of less than 5%" in document.visible
    assert "two that left are not comparable with each other" in document.visible
    assert "what the race found" in document.visible
    assert "g0 comes first at β = 3 (CAR" in document.visible
    (own,) = document.json_of("rankings")["rankings"]
    expected = rank(run, beta=[0.0, 1.0, 3.0, 10.0], draws=20)
    for name in (
        "generator",
        "rank",
        "n",
        "car",
        "car_low",
        "car_high",
        "p_best",
        "interval",
        "stopped_after",
        "claim",
    ):
        assert own[name] == expected[name].to_pylist(), name
    assert set(own["p_best"]) == {None}
    spec = checked(document.json_of("chart-specifications")["funnel-0"])
    ends = {spec["params"][-1]["value"][end["g"]]: end for end in spec["datasets"]["ends"]}
    assert {name: end["out"] for name, end in ends.items()} == dict.fromkeys(NAMES, True) | {"g0": False}
    assert ends["<b>g3</b>"]["x"] == 200
    assert ends["g1"] | {"g": 0} == ends["g1"] | {"x": 264, "y": -20.0, "g": 0}
    about = next(
        a["aria-label"] for _, a in document.elements if a.get("id") == "funnel-0" and a.get("class") == "chart"
    )
    assert about.startswith("CAR relative to the leader's at 3 looks, after 200 to 264 prompts: 4 generators, 3 of")


@pytest.mark.parametrize("over", ["margin", ""])
def test_how_it_ended_and_whether_it_did(tmp_path, over):
    run = raced(tmp_path, over=over)
    section = report_data(run, Options(draws=20)).sections[0]
    text = headline(section, Options(draws=20)).text
    page = written(run, tmp_path).visible
    assert ("; it is surely within 1% of the best." in text) == (over == "margin")
    assert ("Unfinished: some/base" in page) == (over == "")
    assert ("Under way: 3 of 4 generators still in" in page) == (over == "")
    assert "\nSo far, " in text


def test_another_question_than_the_race_had(tmp_path):
    document = written(raced(tmp_path), tmp_path, beta=1.0, betas=())
    assert "That is another question than the ranking above answers" in document.visible
    assert "surely better, at 99% for all pairs and all looks together" in document.visible
    assert "bootstrap draws" not in document.visible


def test_a_run_that_is_only_unfinished(tmp_path):
    run = make_run(tmp_path, NAMES, 60, reward=normal_rewards, target_unit_chars=800)
    add_scores(run, gamma_losses(), units=run.units[: len(run.units) // 2])
    document = written(run, tmp_path)
    for words in ORDINARY:
        assert words not in document.visible, words
    assert "their intervals are repeated ones, which hold at every look at a run on its way" in document.visible
    assert "surely better, at 99% for all pairs and all looks together" in document.visible
    assert "The race" not in document.visible
    assert "funnel-0" not in document.json_of("chart-specifications")


def test_a_run_that_was_finished_after_its_race(tmp_path):
    run = raced(tmp_path, finished=True)
    document = written(run, tmp_path)
    assert "Everything has been scored since: the ranking above is that of the whole corpus." in document.visible
    assert "200 bootstrap draws of the prompts" in document.visible
    assert "repeated" not in document.visible.split("The race It asked")[0]
    assert "funnel-0" in document.json_of("chart-specifications")
    (own,) = document.json_of("rankings")["rankings"]
    assert own["p_best"] == rank(run, beta=[0.0, 1.0, 3.0, 10.0], draws=200)["p_best"].to_pylist()
    assert not {"interval", "claim"} & set(own)


@pytest.mark.parametrize(("until", "precision"), [("ranking", None), ("precision", 0.01)])
def test_races_that_let_the_leader_go_are_drawn_by_figure(tmp_path, until, precision):
    run = raced(tmp_path, over=until, until=until, precision=precision)
    document = written(run, tmp_path)
    spec = checked(document.json_of("chart-specifications")["funnel-0"])
    assert {look["y"] for look in spec["datasets"]["looks"]} == {0.5, 0.4, 0.3, 0.2}
    assert spec["datasets"]["rules"] == []
    # Its rule asked only how wide the intervals are: they are ordinary ones.
    assert ("bootstrap draws" in document.visible) == (until == "precision")
    assert ("claims nothing else" in document.visible) == (until == "precision")


def test_what_a_race_left_out_is_not_scored_yet(tmp_path):
    run = make_run(tmp_path, ["g0", "g1"], 40, reward=normal_rewards)
    losses, why = gamma_losses(), "out of the race after 20 prompts: below g0"

    def figures(name, prompt):
        if name == "g1" and prompt >= 20:
            return {"status": str(Status.LEFT_OUT), "detail": why, "n_tokens": None}
        return None if prompt == 3 else losses(name, prompt)

    add_scores(run, figures)
    (account,) = (own for own in report_data(run, Options(draws=20)).accounts if own.kind == "base model")
    assert (account.n_scored, account.n_rows, account.n_pending) == (58, 60, 20)
    assert account.statuses == {"ok": 58, "oom": 2}
    assert account.waiting == [(why, 20)]
    assert all(status != "left_out" for status, _, _ in account.reasons)
    assert all("left_out" not in own for own in account.by_group.values())
    document = written(run, tmp_path)
    assert "58 of 80 responses scored, 20 pending; oom 2." in document.visible
    assert re.search(rf"Not scored yet, and why\s*reason\s*responses\s*{why}\s*20", document.visible)


def test_a_large_race_stays_small_and_readable(tmp_path):
    names = [f"generator-{k:02d}" for k in range(20)]
    run = raced(tmp_path, names=names)
    race = report_data(run, Options(draws=20)).sections[0].race
    assert race is not None
    spec = checked(race_chart(race))
    banded = {look["g"] for look in spec["datasets"]["looks"] if look["band"]}
    assert len(banded) == MAX_BANDS
    few = race_chart(race, n_sections=MAX_POINTS // 9)
    assert len({look["g"] for look in few["datasets"]["looks"]}) == 3
    for shape in ("wide", "narrow"):
        labels = spec["datasets"][f"names_{shape}"]
        assert "generator-00" in [label["label"] for label in labels]
        assert len({(label["x"], label["at"]) for label in labels}) == len(labels)


def test_the_same_stopped_run_gives_the_same_bytes(tmp_path):
    run = raced(tmp_path)
    first, second = (write_report(run, tmp_path / name, draws=20).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
