"""The report: its figures are those of `rank`, it holds what it says, and whatever a corpus brings stays text."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scored_runs import add_scores, gamma_losses, make_run, normal_rewards

from fastcompat.decisions.ranking.ranking import rank
from fastcompat.errors import UsageError
from fastcompat.report import write_report
from fastcompat.store.run import Run

BETAS = (0.0, 1.0, 3.0, 10.0)
NAMES = [
    "g0",
    '</script><script>alert("1")</script>',
    "<img src=https://example.org/x onerror=alert(2)>",
    "g3 & \u202eright-to-left עברית",
    "g4 👩‍🔬 🧪",
    "g5 " + "very-long-name-" * 40,
]


class Document(HTMLParser):
    """Every element of a page with its attributes, and its text; void elements close themselves."""

    VOID = frozenset(("meta", "link", "br", "img", "input", "hr", "base"))

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (id of the element, text) of scripts and styles; ("", text) of others
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, text):
        tag, attributes = self._open[-1] if self._open else ("", {})
        self.texts.append((attributes.get("id") or tag if tag in ("script", "style") else "", text))

    def text_of(self, name: str) -> str:
        return "".join(text for own, text in self.texts if own == name)

    @property
    def visible(self) -> str:
        return " ".join("".join(text for own, text in self.texts if not own).split())

    def json_of(self, name: str):
        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.text_of(name), parse_constant=refuse)


def written(run: Run, tmp_path: Path, **options) -> Document:
    path = write_report(run, tmp_path / "report.html", draws=200, **options)
    assert path.stat().st_size < 2_000_000
    document = Document(path.read_text(encoding="utf-8"))
    check_self_contained(document)
    return document


def check_self_contained(document: Document) -> None:
    for tag, attributes in document.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form", "video", "audio"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name, value)
            if name in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
                assert value in ("data:,",) or (value or "").startswith("#"), (tag, name, value)
    assert not re.search(r"url\(|@import", document.text_of("style"))
    assert sum(tag == "script" for tag, _ in document.elements) == 4
    policy = next(a["content"] for t, a in document.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "http" not in policy
    specs = document.json_of("chart-specifications")
    charts = [a["id"] for t, a in document.elements if a.get("class") == "chart"]
    assert set(charts) == set(specs)
    assert all(a["aria-label"] for t, a in document.elements if a.get("class") == "chart")
    identifiers = Counter(a["id"] for _, a in document.elements if "id" in a)
    assert max(identifiers.values()) == 1
    links = {a["href"][1:] for t, a in document.elements if t == "a"}
    assert links <= set(identifiers)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Five generators, losses and a reward column, a few rows that the base model could not score."""
    run = make_run(tmp_path_factory.mktemp("report"), [f"g{k}" for k in range(5)], 60, reward=normal_rewards)
    losses = gamma_losses()
    add_scores(run, lambda name, prompt: None if (name, prompt % 20) == ("g2", 7) else losses(name, prompt))
    return run


def test_its_rankings_are_those_of_rank(run, tmp_path):
    document = written(run, tmp_path)
    (own,) = document.json_of("rankings")["rankings"]
    expected = rank(run, beta=BETAS, draws=200)
    assert (own["base_model"], own["reward_model"]) == ("some/base", "column reward")
    for name in expected.column_names[2:]:
        if name not in ("interval", "stopped_after", "claim"):
            assert own[name] == expected[name].to_pylist(), name
    assert not {"interval", "stopped_after", "claim"} & set(own), "they say nothing of a finished run"
    at_three = expected.filter(np.array(expected["beta"]) == 3.0).to_pylist()
    for row in at_three:
        assert f"{row['loss']:.4f}{row['loss_low']:.4f} – {row['loss_high']:.4f}" in document.visible


def test_options_reach_the_ranking(run, tmp_path):
    options = dict(average="token", reward_shift=1.0, leave_out="prompt", seed=5)
    document = written(run, tmp_path, beta=2.0, betas=(0.5,), **options)
    (own,) = document.json_of("rankings")["rankings"]
    expected = rank(run, beta=[0.5, 2.0], draws=200, **options)
    assert own["beta"] == expected["beta"].to_pylist()
    assert own["car_low"] == expected["car_low"].to_pylist()
    assert own["p_best"] == expected["p_best"].to_pylist()
    assert {3} == set(rank(run, leave_out="prompt", draws=20)["n_left_out"].to_pylist())
    assert "with all responses to its prompt" in document.visible


def test_another_column_can_be_ranked(tmp_path):
    run = make_run(tmp_path, ["g0", "g1"], 20, reward=normal_rewards)
    add_scores(run, gamma_losses())
    document = written(run, tmp_path, by="source")
    own = document.json_of("rankings")
    assert own["by"] == "source"
    assert set(own["rankings"][0]["generator"]) == {run.generations[0].files[0].label}
    with pytest.raises(UsageError, match="nobody"):
        write_report(run, tmp_path / "report.html", by="nobody")


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    first = write_report(run, tmp_path / "first.html").read_bytes()
    code = "import sys; from fastcompat.report import write_report; from fastcompat.store.run import open_run"
    code += "; write_report(open_run(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    second = tmp_path / "second.html"
    subprocess.run([sys.executable, "-c", code, run.directory, second], check=True, env=environment)
    assert first == second.read_bytes()


def test_whatever_a_corpus_brings_stays_text(tmp_path):
    def text(name, prompt):
        return f"</div><script>alert({prompt})</script> <!-- {name} \u2028 & \x00 \ud7ff ]]> {{{{ 7 * 7 }}}}"

    run = make_run(tmp_path, NAMES, 12, reward=normal_rewards, text=text)
    add_scores(run, gamma_losses(), model='a<b>"model"</b>')
    document = written(run, tmp_path)
    assert '</script><script>alert("1")</script>' in document.visible
    assert "{{ 7 * 7 }}" in document.visible
    assert "<b>plain</b>" in document.visible
    own = document.json_of("rankings")["rankings"][0]
    assert set(own["generator"]) == set(NAMES)
    assert own["base_model"] == 'a<b>"model"</b>'
    # Nothing in a script element could end it.
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 4


def test_losses_alone(tmp_path):
    run = make_run(tmp_path, ["g0", "g1", "g2"], 40)
    add_scores(run, gamma_losses(worse=0.4))
    document = written(run, tmp_path)
    (own,) = document.json_of("rankings")["rankings"]
    assert own["loss"] == rank(run, draws=200)["loss"].to_pylist()
    assert set(own["car"]) == set(own["beta"]) == {own["reward_model"]} == {None}
    assert {"figure-0", "strip-loss-0", "strip-n_tokens-0"} <= set(document.json_of("chart-specifications"))
    assert "g0 comes first (loss" in document.visible
    assert "Loss alone asks what is easy to predict" in document.visible


def test_rewards_alone(tmp_path):
    run = make_run(tmp_path, ["g0", "g9"], 40, reward=normal_rewards)
    document = written(run, tmp_path)
    (own,) = document.json_of("rankings")["rankings"]
    assert own["generator"] == ["g9", "g0"]
    assert own["reward"] == rank(run, draws=200)["reward"].to_pylist()
    assert "Highest reward" in document.visible
    assert "--keep-tokens" not in document.visible


def test_a_run_without_scores_is_refused(tmp_path):
    run = make_run(tmp_path, ["g0"], 3)
    with pytest.raises(UsageError, match="has no scores yet"):
        write_report(run, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("generators", "n_prompts"), [(["only"], 30), (["g0", "g1"], 1), (["only"], 1)])
def test_little_to_compare(generators, n_prompts, tmp_path):
    run = make_run(tmp_path, generators, n_prompts, reward=normal_rewards)
    add_scores(run, gamma_losses())
    document = written(run, tmp_path)
    expected = "is the only one" if len(generators) == 1 else "too few prompts (below 10) to say how sure that is"
    assert expected in document.visible


def test_a_run_that_is_not_finished_says_so(tmp_path):
    run = make_run(tmp_path, ["g0", "g1"], 60, reward=normal_rewards, target_unit_chars=800)
    assert len(run.units) > 3
    add_scores(run, gamma_losses(), units=run.units[:2])
    add_scores(run, gamma_losses(), model="some/other", units=[])
    done = sum(unit.n_rows for unit in run.units[:2])
    document = written(run, tmp_path)
    assert f"some/base has gone through {done} of 120 responses" in document.visible
    assert f"{done} of 120 responses scored, {120 - done} pending" in document.visible
    (own,) = document.json_of("rankings")["rankings"]
    assert own["n"] == rank(run, beta=BETAS, draws=200)["n"].to_pylist()


def test_negative_rewards_leave_the_page_without_car(tmp_path):
    run = make_run(tmp_path, ["g0", "g1"], 40, reward=lambda name, prompt: normal_rewards(name, prompt) - 5)
    add_scores(run, gamma_losses())
    document = written(run, tmp_path)
    assert "is negative" in document.visible
    assert "Ranking by loss" in document.visible
    (own,) = document.json_of("rankings")["rankings"]
    assert own["loss"] == rank(run, sort_by="loss", draws=200)["loss"].to_pylist()
    shifted = written(run, tmp_path, reward_shift=5)
    assert "Reward against loss" in shifted.visible
    assert shifted.json_of("rankings")["rankings"][0]["beta"] == [beta for beta in BETAS for _ in range(2)]


@pytest.mark.long
def test_a_hundred_generators_and_many_pairs_stay_small(tmp_path):
    names = [f"generator-{k:03d}-{'x' * 100}" for k in range(100)]
    run = make_run(tmp_path, names, 12, reward=normal_rewards, text=lambda name, prompt: "&" * 20_000)
    for model in ("one", "two", "three"):
        add_scores(run, gamma_losses(worse=0.01), model=model)
        if model == "one":
            page = written(run, tmp_path)
            assert len(page.json_of("rankings")["rankings"][0]["generator"]) == 400
    for model in ("r-one", "r-two"):
        add_scores(run, lambda name, prompt: {"reward": normal_rewards(name, prompt)}, model=model, kind="reward_model")
    document = written(run, tmp_path)
    assert "The first 6 of 9 pairs." in document.visible
    assert len(document.json_of("rankings")["rankings"]) == 6


def test_no_examples_no_text(run, tmp_path):
    document = written(run, tmp_path, examples=0)
    assert "The answer of" not in document.visible
    assert "Responses at both ends" not in document.visible


def test_tokens_are_shaded_by_their_nll(tmp_path):
    run = make_run(tmp_path, ["g0", "g1"], 20)
    texts = ["The", " <b>", " answer", "\n", "👩‍🔬", "."]
    nlls = [0.1, 0.9, 2.0, 4.0, 6.0, 12.5]
    add_scores(
        run,
        lambda name, prompt: {"loss": 2.0 + prompt, "n_tokens": 6, "token_nll": nlls, "token_text": texts},
        extras=["token_nll", "token_text"],
    )
    document = written(run, tmp_path, examples=1)
    tokens = [attributes for tag, attributes in document.elements if tag == "i" and "title" in attributes]
    assert [t["title"] for t in tokens[:6]] == [f"{nll:.2f}" for nll in nlls]
    assert [t.get("class") for t in tokens[:6]] == [None, "s1", "s2", "s3", "s4", "s5"]
    assert "The <b> answer 👩‍🔬." in document.visible
    assert "underline" in document.text_of("style").split(".s4 {")[1].split("}")[0], "not colour alone"
    assert "--keep-tokens" not in document.visible
    plain = make_run(tmp_path / "plain", ["g0", "g1"], 20)
    add_scores(plain, gamma_losses())
    assert "--keep-tokens" in written(plain, tmp_path).visible


def test_what_was_left_out_is_told(run, tmp_path):
    document = written(run, tmp_path)
    assert "297 of 300 responses scored; oom 3." in document.visible
    assert re.search(r"oom\s*too large for the device's memory\s*3", document.visible)
    (generation,) = run.generations
    assert generation.fingerprint in document.visible
    assert generation.files[0].sha256 in document.visible


@pytest.mark.parametrize("options", [{"examples": -1}, {"examples": 51}, {"beta": -1.0}, {"betas": (math.nan,)}])
def test_options_out_of_range(run, tmp_path, options):
    with pytest.raises(UsageError):
        write_report(run, tmp_path / "report.html", **options)


def test_it_loads_no_torch():
    code = "import sys, fastcompat.report; print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
