"""What the report reduces a run to, and the charts and sentences that it makes of that."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scored_runs import add_scores, gamma_losses, make_run, normal_rewards

from fastcompat.report import Options, report_data
from fastcompat.report.charts import reward_against_loss
from fastcompat.report.headline import headline, named, percent
from fastcompat.report.labels import CHARACTER_WIDTH, GAP, LINE_HEIGHT, placed_labels
from fastcompat.store.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Five generators, losses and a reward column, a few rows that the base model could not score."""
    run = make_run(tmp_path_factory.mktemp("report"), [f"g{k}" for k in range(5)], 60, reward=normal_rewards)
    losses = gamma_losses()
    add_scores(run, lambda name, prompt: None if (name, prompt % 20) == ("g2", 7) else losses(name, prompt))
    return run


def test_histograms_and_quantiles(run):
    section = report_data(run, Options(draws=20)).sections[0]
    distributions = {own.figure: own for own in section.distributions}
    table = run.scores()
    rewards = {row["row_key"]: row["reward"] for row in table.to_pylist() if row["reward"] is not None}
    rows = [r for r in table.to_pylist() if r["loss"] is not None and r["row_key"] in rewards]
    order = [row["generator"] for row in section.ranking(3.0)]
    for figure in ("loss", "n_tokens", "reward"):
        own = distributions[figure]
        assert [group["name"] for group in own.groups] == order
        for group in own.groups:
            values = [rewards[r["row_key"]] if figure == "reward" else r[figure] for r in rows]
            mine = np.array([v for v, r in zip(values, rows, strict=True) if r["generator"] == group["name"]])
            assert group["n"] == len(mine)
            assert math.fsum(group["counts"]) == pytest.approx(len(mine), abs=0.5)
            assert group["quantiles"] == pytest.approx(np.quantile(mine, [0.05, 0.25, 0.5, 0.75, 0.95]), rel=1e-4)
            assert group["mean"] == pytest.approx(mine.mean(), rel=1e-4)
            if figure == "loss":
                clipped = np.clip(mine, own.edges[0], own.edges[-1])
                inner = [sum(a <= v < b for v in clipped) for a, b in itertools.pairwise(own.edges)]
                assert np.abs(np.array(group["counts"]) - inner).sum() <= 4  # an edge is rounded to five digits


def test_lengths_are_spread_over_narrow_bins(tmp_path):
    run = make_run(tmp_path, ["g0"], 60)
    add_scores(run, lambda name, prompt: {"loss": 1.0, "n_tokens": 1 + prompt % 3})
    (own,) = (d for d in report_data(run, Options(draws=20)).sections[0].distributions if d.figure == "n_tokens")
    counts, edges = np.array(own.groups[0]["counts"]), np.array(own.edges)
    assert (edges[0], edges[-1]) == pytest.approx((0.5, 3.5))
    assert (counts > 0).all()
    assert counts[edges[1:] <= 1.5].sum() == pytest.approx(20, abs=1)


def test_agreement_of_metrics(tmp_path):
    run = make_run(
        tmp_path, [f"g{k}" for k in range(6)], 20, reward=lambda name, prompt: 20.0 - int(name[1:]) - prompt / 50
    )
    add_scores(
        run,
        lambda name, prompt: {
            "loss": 1.0 + int(name[1:]) + prompt / 50,
            "n_tokens": 10,
            "n_bytes": 40,
            "entropy_sum": 10.0 * (prompt % 7),
        },
        extras=["n_bytes", "entropy_sum"],
    )
    section = report_data(run, Options(draws=20)).sections[0]
    of_responses = section.of_responses
    rho = {
        (a, b): of_responses.rho[i][j]
        for i, a in enumerate(of_responses.metrics)
        for j, b in enumerate(of_responses.metrics)
    }
    assert of_responses.n == 120
    assert "response_length" not in of_responses.metrics, "it never varies"
    assert not {"perplexity", "grape", "token_loss"} & set(of_responses.metrics)
    assert rho["loss", "bits_per_byte"] == rho["loss", "loss"] == 1
    assert rho["loss", "reward"] == rho["loss", "car"] == -1
    loss = [row["loss"] for row in run.scores().to_pylist() if row["loss"] is not None]
    entropy = [row["entropy_sum"] for row in run.scores().to_pylist() if row["loss"] is not None]
    assert rho["loss", "entropy"] == pytest.approx(spearman_by_hand(loss, entropy), abs=6e-4)
    assert section.of_generators.n == 6
    assert section.of_generators.rho[0][section.of_generators.metrics.index("loss")] == -1


def spearman_by_hand(a: list[float], b: list[float]) -> float:
    def ranks(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    return sum((u - mean) * (v - mean) for u, v in zip(x, y, strict=True)) / math.sqrt(
        sum((u - mean) ** 2 for u in x) * sum((v - mean) ** 2 for v in y)
    )


def test_examples_are_the_ends_and_only_their_units_are_read(tmp_path, monkeypatch):
    run = make_run(tmp_path, ["g0", "g1"], 300, reward=normal_rewards, target_unit_chars=1000)
    add_scores(run, lambda name, prompt: {"loss": 1 + prompt + (0.5 if name == "g1" else 0.0)})
    read = []
    original = Run.unit_rows

    def noted(self, unit, columns=None):
        if columns is None or "messages" in columns:
            read.append(unit.name)
        return original(self, unit, columns)

    monkeypatch.setattr(Run, "unit_rows", noted)
    section = report_data(run, Options(draws=20, examples=3)).sections[0]
    by_figure = {own.figure: own for own in section.examples}
    assert [example.loss for example in by_figure["loss"].lowest] == [1.0, 1.5, 2.0]
    assert [example.loss for example in by_figure["loss"].highest] == [300.5, 300.0, 299.5]
    assert by_figure["loss"].lowest[0].text == "The answer of g0 to question 0."
    assert by_figure["loss"].lowest[0].prompt == "Question 0?"
    joined = rank_rows(run, 3.0)
    assert [example.row_key for example in by_figure["car"].highest] == [key for _, key in joined[-3:][::-1]]
    assert [example.row_key for example in by_figure["car"].lowest] == [key for _, key in joined[:3]]
    assert 0 < len(read) < len(run.units) / 2
    assert len(set(read)) == len(read)


def rank_rows(run: Run, beta: float) -> list[tuple[float, str]]:
    rows = run.scores().to_pylist()
    loss = {row["row_key"]: row["loss"] for row in rows if row["loss"] is not None}
    return sorted(
        (r["reward"] / (1 + beta * loss[r["row_key"]]), r["row_key"]) for r in rows if r["reward"] is not None
    )


def test_headlines(tmp_path):
    def of(run, **options):
        own = Options(draws=200, **options)
        return headline(report_data(run, own).sections[0], own).text.split("\n")

    run = make_run(tmp_path / "a", ["g0", "g1"], 50, reward=lambda name, prompt: {"g0": 2.0, "g1": 4.0}[name])
    add_scores(run, lambda name, prompt: {"loss": {"g0": 1.0, "g1": 3.0}[name] + prompt % 5 / 100})
    first, second = of(run)
    assert first.startswith("g0 comes first at β = 3 (CAR 0.49")
    assert first.endswith(
        "best in all 200 bootstrap draws of the prompts); for every other there is one that is clearly better."
    )
    # 2 / (1 + 1.02 b) = 4 / (1 + 3.02 b) where b = 2 / (2 * 3.02 - 4 * 1.02) = 1.0204.
    assert second == "The winner depends on β, the weight of the loss: g1 below 1, g0 above 1."
    assert of(run, beta=0.0)[0].startswith("g1 comes first at β = 0")

    alike = make_run(tmp_path / "b", ["x", "y", "z"], 50, reward=lambda name, prompt: 2.0)
    add_scores(alike, lambda name, prompt: {"loss": 1.0 + prompt % 5})
    first, second = of(alike)
    assert "leads at β = 3" in first
    assert first.endswith("but is not clearly better than y and z.")
    assert second.startswith("Its CAR is the highest for every β")


def test_iso_lines_have_the_car_that_they_say(run):
    options = Options(draws=20, beta=3.0, reward_shift=0.5)
    section = report_data(run, options).sections[0]
    spec = reward_against_loss(section, options)
    ends = spec["datasets"]["car_lines"]
    assert len(ends) >= 4
    for end in ends:
        assert (end["reward"] + 0.5) / (1 + 3 * end["loss"]) == pytest.approx(float(end["c"]))


def test_labels_lie_on_nothing():
    draw = np.random.default_rng(0)
    points = [
        {"told": f"name {k}", "loss": x, "reward": y, "loss_low": x - 0.01, "loss_high": x + 0.01}
        for k, (x, y) in enumerate(draw.random((60, 2)).tolist())
    ]
    labels = placed_labels(points, (0, 1), (0, 1), size=(600, 400), length=20)
    assert 10 < len(labels) < 60
    boxes = []
    for label in labels:
        extent = CHARACTER_WIDTH * len(label["label"])
        left = label["loss"] * 600 + (GAP if label["align"] == "left" else -GAP - extent)
        boxes.append((left, (1 - label["reward"]) * 400 - LINE_HEIGHT / 2, extent, LINE_HEIGHT))
        assert left >= 0
        assert left + extent <= 600
    for a, (left, top, width, height) in enumerate(boxes):
        for other_left, other_top, other_width, other_height in boxes[:a]:
            apart_x = left >= other_left + other_width or other_left >= left + width
            assert apart_x or top >= other_top + other_height or other_top >= top + height
        for point in points:
            inside_x = left < point["loss"] * 600 < left + width
            assert not (inside_x and top < (1 - point["reward"]) * 400 < top + height)


def test_names_and_shares():
    assert named(None) == named("  ") == "(no name)"
    assert named("a\n b") == "a b"
    assert named("x" * 100) == "x" * 79 + "…"
    assert [percent(share) for share in (None, 0.0, 0.004, 0.5, 0.996, 1)] == ["–", "0%", "<1%", "50%", ">99%", "100%"]
