"""The filters in the real Data-Juicer: stats are the scorer's figures, and no row vanishes unasked."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastcompat as fc
from fastcompat.demo import model_directory, reward_model_directory
from fastcompat.errors import UsageError
from fastcompat.metrics import compute

pytest.importorskip("data_juicer", reason="py-data-juicer is not installed")

STATS = "__dj__stats__"
MODEL, REWARD_MODEL = str(model_directory()), str(reward_model_directory())


def answer(n: int) -> str | None:
    return None if n % 20 == 3 else "" if n % 20 == 7 else f"It is {n % 13}, I think, and {'so ' * (n % 5)}on."


ROWS = [{"query": f"What is {n // 4}?", "response": answer(n), "number": n} for n in range(200)]
EMPTY = [n for n in range(200) if not answer(n)]


@pytest.fixture(scope="module")
def operators() -> Any:
    """By name, loaded by the path of the file as the command line does."""
    from data_juicer.config.config import load_custom_operators
    from data_juicer.ops.base_op import OPERATORS

    path = subprocess.run(
        [sys.executable, "-m", "fastcompat.adapters.data_juicer_ops"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.split()[-1]
    load_custom_operators([path])
    return OPERATORS.modules


@pytest.fixture(scope="module")
def losses() -> Any:
    return fc.Scorer(MODEL, device="cpu").score([{"prompt": row["query"], "response": row["response"]} for row in ROWS])


def processed(operator: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from data_juicer.core.data import NestedDataset

    return NestedDataset.from_list(rows).process([operator], open_monitor=False).to_list()


def kept(value: float | None) -> float | None:
    """As `datasets` keeps it in stats: JSON of ten decimals, without NaN."""
    return None if value is None else pytest.approx(value, abs=1e-10, rel=0)


def test_stats_are_the_scorers_and_every_row_stays_in_order(operators, losses):
    operator = operators["fastcompat_loss_filter"](model=MODEL, num_proc=1)
    found = processed(operator, ROWS)
    from fastcompat.adapters import scorers

    assert not scorers._loaded  # it computed here, and its memory is given back
    assert [row["number"] for row in found] == list(range(200))
    stats = [row[STATS] for row in found]
    assert [own["fastcompat_loss_status"] for own in stats] == losses["status"].to_pylist()
    assert [own["fastcompat_loss"] for own in stats] == [kept(loss) for loss in losses["loss"].to_pylist()]


def test_bounds_drop_rows_and_what_has_no_figure_goes_only_if_asked(operators, losses):
    values = losses["loss"].to_pylist()
    limit = sorted(value for value in values if value is not None)[80] + 1e-9
    good = {n for n, value in enumerate(values) if value is not None and value <= limit}
    for keep, also in ((True, set(EMPTY)), (False, set())):
        operator = operators["fastcompat_loss_filter"](model=MODEL, max_score=limit, keep_unscored=keep, num_proc=2)
        assert {row["number"] for row in processed(operator, ROWS)} == good | also


@pytest.mark.parametrize("metric", ["perplexity", "ifd_ppl"])
def test_other_metrics_and_a_rank(operators, metric):
    extras = ["unconditioned_nll_sum", "unconditioned_n_tokens"] if metric == "ifd_ppl" else []
    rows = [row for row in ROWS[:40] if row["response"]]
    want = compute(
        metric,
        fc.Scorer(MODEL, device="cpu", extras=extras).score(
            [{"prompt": row["query"], "response": row["response"]} for row in rows]
        ),
    )
    operator = operators["fastcompat_loss_filter"](model=MODEL, metric=metric, stats_key="own")
    batch = {name: [row[name] for row in rows] for name in ("query", "response")} | {STATS: [{} for _ in rows]}
    found = operator.compute_stats(batch, rank=0)
    np.testing.assert_array_equal([own["own"] for own in found[STATS]], want)
    batch = {"query": ["What?"], "response": [None], STATS: [{"earlier": 1}]}
    (own,) = operator.compute_stats(batch, rank=1)[STATS]
    assert (own["earlier"], own["own_status"], math.isnan(own["own"])) == (1, "empty", True)


def test_conversations_texts_and_rewards(operators):
    messages = [
        [{"role": "user", "content": "What does len do?"}, {"role": "assistant", "content": f"The length, {n}."}]
        for n in range(6)
    ]
    operator = operators["fastcompat_reward_filter"](model=REWARD_MODEL, messages_key="talk", num_proc=1)
    found = processed(operator, [{"talk": talk} for talk in messages])
    want = fc.RewardScorer(REWARD_MODEL, device="cpu").score([{"messages": talk} for talk in messages])
    assert [row[STATS]["fastcompat_reward"] for row in found] == [kept(one) for one in want["reward"].to_pylist()]

    texts = [f"Once there were {n} birds." for n in range(6)]
    params = {"template": "plain", "dtype": "float32"}
    operator = operators["fastcompat_loss_filter"](model=MODEL, scorer_params=params, num_proc=1)
    found = processed(operator, [{"text": text} for text in texts])
    scorer = fc.Scorer(MODEL, device="cpu", **params)
    want = scorer.score([{"response": text} for text in texts], mapping={"response": "response"})
    assert [row[STATS]["fastcompat_loss"] for row in found] == [kept(one) for one in want["loss"].to_pylist()]

    talk = {"query": ["And now?"], "response": ["Now."], "history": [[["Hi.", "Hello."]]], "system": ["Be brief."]}
    (own,) = operator.compute_stats(talk | {STATS: [{}]})[STATS]
    turns = [
        ("system", "Be brief."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "And now?"),
        ("assistant", "Now."),
    ]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    assert own["fastcompat_loss"] == scorer.score(rows)["loss"][0].as_py()


def test_what_fails_for_all_rows_stops_and_drops_none(operators, tmp_path):
    operator = operators["fastcompat_loss_filter"](model=MODEL, skip_op_error=True, num_proc=1)
    with pytest.raises(UsageError, match="name yours with messages_key"):
        operator.compute_stats({"other": ["a"], STATS: [{}]})


def test_a_response_without_the_column_that_it_answers_is_refused(operators):
    operator = operators["fastcompat_loss_filter"](model=MODEL)
    with pytest.raises(UsageError, match="no column query that response answers; there are question, response"):
        operator.compute_stats({"question": ["What?"], "response": ["It."], STATS: [{}]})


def test_settings_of_the_scorer(operators):
    for name in ("fastcompat_loss_filter", "fastcompat_reward_filter"):
        with pytest.raises(UsageError, match="has no foo; it has device, "):
            operators[name](model=MODEL, scorer_params={"foo": 1})
    params = {"extras": ["entropy_sum"]}
    operator = operators["fastcompat_loss_filter"](model=MODEL, metric="ifd_ppl", scorer_params=params)
    (own,) = operator.compute_stats({"query": ["What?"], "response": ["It."], STATS: [{}]})[STATS]
    assert own["fastcompat_ifd_ppl"] > 0


def test_metrics_of_more_than_a_row_are_refused(operators):
    for metric in ("car", "s_ifd", "excess_loss", "nonsense"):
        with pytest.raises(UsageError, match=metric):
            operators["fastcompat_loss_filter"](model=MODEL, metric=metric)


def test_the_command_line_keeps_what_has_no_figure(tmp_path, losses):
    import fastcompat.adapters.data_juicer_ops as file

    corpus = tmp_path / "rows.jsonl"
    corpus.write_text("".join(json.dumps(row | {"text": ""}) + "\n" for row in ROWS))
    values = losses["loss"].to_pylist()
    limit = sorted(value for value in values if value is not None)[80] + 1e-9
    recipe = {
        "dataset_path": str(corpus),
        "export_path": str(tmp_path / "out" / "kept.jsonl"),
        "np": 1,
        "custom_operator_paths": [str(Path(file.__file__))],
        "process": [{"fastcompat_loss_filter": {"model": MODEL, "max_score": limit}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "from data_juicer.tools.process_data import main; main()",
            "--config",
            str(tmp_path / "recipe.yaml"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [n for n, value in enumerate(values) if value is None or value <= limit]
