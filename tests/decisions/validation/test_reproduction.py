"""The recipe for the paper's Table 4, run whole on a small corpus of Magpie-100K-Generator-Zoo's wide schema."""

from __future__ import annotations

import math
import random
import re
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import WORDS, save_small_model
from test_correlation import loop_rho
from typer.testing import CliRunner

from fastcompat.cli.application import app
from fastcompat.decisions.validation import paper
from fastcompat.decisions.validation.outcomes import outcomes
from fastcompat.decisions.validation.reproduction import (
    BASE_MODELS,
    CHOICES,
    CORPUS,
    TABLE4_SCHEMA,
    formatted_table4,
    plan,
    table4,
    table4_notes,
)
from fastcompat.errors import UsageError
from fastcompat.store.run import Run, open_run

REWARDS = ("ArmoRM-Llama3-8B-v0.1", "Skywork-Reward-Llama-3.1-8B", "Skywork-Reward-Gemma-2-27B")
# Whose outcomes the rewards of the second Skywork model are planted to follow.
PLANTED = "Qwen2.5-3B"
N_PROMPTS = 8


def average_performance(base_model: str) -> dict[str, float]:
    return {row["generator"]: row["outcome"] for row in outcomes(f"paper:{base_model}").to_pylist()}


def write_zoo(path: Path) -> Path:
    """`uuid`, `instruction` and a struct per generator: the paper's nineteen, and GPT-4, which has no outcome."""
    planted = average_performance(PLANTED)
    names = [*list(average_performance(PLANTED)), "gpt-4"]
    records = []
    for k in range(N_PROMPTS):
        draw = random.Random(k)
        record: dict = {"uuid": f"{k:08x}", "instruction": f"Question {k}: {' '.join(draw.choices(WORDS, k=5))}?"}
        for g, name in enumerate(names):
            text = " ".join(draw.choices(WORDS[: 4 + g % 7], k=draw.randint(3, 8) + g))
            # ArmoRM's say nothing, the first Skywork's neither and are negative for some, the second's are planted.
            rewards = (0.1 + 0.05 * draw.random(), draw.gauss(0, 5) - g, planted.get(name, 3.0) + draw.random() / 100)
            record[name] = {"content": text, **dict(zip(REWARDS, rewards, strict=True))}
        records.append(record)
    records[0][names[2]]["content"] = ""
    records[1][names[3]][REWARDS[0]] = None
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
    return path


@pytest.fixture(scope="module")
def zoo_run(tmp_path_factory) -> Run:
    """The recipe's own commands, with small models under the names of the large ones."""
    directory = tmp_path_factory.mktemp("zoo")
    corpus = write_zoo(directory / "train-00000-of-00001.parquet")
    models = [
        str(save_small_model(directory / "models" / name, seed=seed))
        for seed, name in enumerate(["Qwen2.5-3B", "Gemma-2-2B", "gpt2"])
    ]
    for step in plan(models[:2], corpus=corpus, output=directory / "run", gpt2=models[2]):
        result = CliRunner().invoke(app, list(step.arguments))
        assert result.exit_code == 0, (result.output, result.exception)
    return open_run(directory / "run")


@pytest.fixture(scope="module")
def reproduced(zoo_run) -> pa.Table:
    return table4(zoo_run, permutations=999)


def test_the_planted_metric_comes_out_on_top(reproduced):
    assert reproduced.schema == TABLE4_SCHEMA
    own = [row for row in reproduced.to_pylist() if row["paper_base_model"] == PLANTED]
    rewards = {row["table4"]: row for row in own if row["metric"] == "reward"}
    assert rewards["reward_skywork_gemma_27b"]["rho"] == 1
    assert rewards["reward_skywork_gemma_27b"]["p"] == 1 / 1000
    # Every other metric that does not read this reward is below it.
    others = [r["rho"] for r in own if r["rho"] is not None and "Skywork-Reward-Gemma" not in (r["reward_model"] or "")]
    # Two rewards, IFD twice for two models, their perplexities, the length, CAR of ArmoRM.
    assert len(others) == 2 + 4 + 2 + 1 + 1
    assert max(others) < 1
    assert all(row["n"] == (0 if row["rho"] is None else 19) for row in own)


def test_every_column_of_table_4_is_there_in_its_order_beside_what_was_published(reproduced):
    for name in ("Gemma-2-2B", PLANTED):
        own = [row for row in reproduced.to_pylist() if row["paper_base_model"] == name]
        assert list(dict.fromkeys(row["table4"] for row in own)) == list(paper.TABLE4_COLUMNS)
        assert all(row["published"] == paper.published(name)[row["table4"]] for row in own)
    assert list(dict.fromkeys(reproduced["paper_base_model"].to_pylist())) == ["Gemma-2-2B", PLANTED]


def test_figures_are_those_of_a_loop_over_the_runs_rows(zoo_run, reproduced):
    losses, lengths, alone = (defaultdict(lambda: defaultdict(list)) for _ in range(3))
    rewards = defaultdict(list)
    for row in zoo_run.scores().to_pylist():
        if row["reward_model"] == f"column {REWARDS[0]}" and row["reward"] is not None:
            rewards[row["generator"]].append(row["reward"])
        elif row["base_model"] is not None and row["loss"] is not None:
            name = Path(row["base_model"]).name
            losses[name][row["generator"]].append(row["loss"])
            lengths[name][row["generator"]].append(row["n_tokens"])
            without = row["unconditioned_nll_sum"] / row["unconditioned_n_tokens"]
            alone[name][row["generator"]].append((row["loss"] / without, math.exp(row["loss"] - without)))
    names = list(average_performance(PLANTED))
    for of in ("Gemma-2-2B", PLANTED):
        outcome = [average_performance(of)[name] for name in names]
        expected = {
            ("reward_armorm", "reward"): [fmean(rewards[g]) for g in names],
            ("ppl_self", "perplexity"): [fmean(losses[of][g]) for g in names],
            ("ppl_gpt2", "perplexity"): [fmean(losses["gpt2"][g]) for g in names],
            ("ifd_self", "ifd_loss"): [fmean(pair[0] for pair in alone[of][g]) for g in names],
            ("ifd_gpt2", "ifd_ppl"): [fmean(pair[1] for pair in alone["gpt2"][g]) for g in names],
            ("response_length", "response_length"): [fmean(lengths[of][g]) for g in names],
            ("car", "car"): [fmean(rewards[g]) / (1 + 3 * fmean(losses[of][g])) for g in names],
        }
        found = {
            (row["table4"], row["metric"]): row["rho"]
            for row in reproduced.to_pylist()
            if row["paper_base_model"] == of and REWARDS[0] in (row["reward_model"] or REWARDS[0])
        }
        for key, values in expected.items():
            assert found[key] == pytest.approx(loop_rho(values, outcome), abs=1e-9), key


def test_car_of_negative_rewards_is_refused_by_name(reproduced):
    refused = [row for row in reproduced.to_pylist() if row["metric"] == "car" and row["rho"] is None]
    assert [row["reward_model"] for row in refused] == [f"column {REWARDS[1]}"] * 2
    assert all("negative" in row["note"] for row in refused)


def test_the_printed_table_has_a_line_for_each_figure(reproduced):
    header, rows = formatted_table4(reproduced)
    assert header == ["metric", "Gemma-2-2B", "published", PLANTED, "published"]
    labels = [row[0] for row in rows]
    assert len(set(labels)) == len(labels) == 3 + 4 + 2 + 1 + 3
    assert labels[0] == "reward, ArmoRM"
    assert labels[3:5] == ["IFD, GPT-2, ratio of losses", "IFD, GPT-2, ratio of perplexities"]
    assert labels[-1] == f"CAR, {REWARDS[2]}, beta 3"
    planted = rows[labels.index("reward, Skywork-Gemma-27B")]
    assert planted[3:] == ["1.0000", "0.7456"], "at 1 there is no interval"
    length = rows[labels.index("response length")]
    assert re.fullmatch(r"-?0\.\d{4} \(-?0\.\d\d to -?0\.\d\d\)", length[1]), length
    told = table4_notes(reproduced)
    assert "over 19 generators" in told[0]
    assert "Without an outcome, left out: gpt-4." in told
    assert sum(line.startswith(("Gemma-2-2B, CAR", f"{PLANTED}, CAR")) for line in told) == 2
    assert told[-len(CHOICES) - 1].startswith("The paper does not say")


def test_what_a_run_lacks_is_said(zoo_run):
    scores = zoo_run.scores()
    of_one = [name is not None and name.endswith(PLANTED) for name in scores["base_model"].to_pylist()]
    kept = scores.filter(pa.array(of_one)).drop_columns(["unconditioned_nll_sum", "unconditioned_n_tokens"])
    rows = {row["table4"]: row for row in table4(kept, permutations=99).to_pylist()}
    assert list(rows) == list(paper.TABLE4_COLUMNS)
    assert {column for column, row in rows.items() if row["rho"] is not None} == {"ppl_self", "response_length"}
    assert "--reward-model" in rows["reward_armorm"]["note"]
    assert "--for ifd_loss" in rows["ifd_self"]["note"]
    assert "--base-model openai-community/gpt2" in rows["ppl_gpt2"]["note"]
    assert "car needs reward" in rows["car"]["note"]
    with pytest.raises(UsageError, match=r"no base model of the paper \(Qwen2-1.5B.*the scores are of other"):
        table4(kept.set_column(kept.column_names.index("base_model"), "base_model", pa.array(["other"] * len(kept))))


def test_the_plan_names_the_hub():
    steps = plan()
    assert len(steps) == 6
    assert steps[0].arguments[:4] == ("score", CORPUS, "--base-model", "Qwen/Qwen2-1.5B")
    assert all(step.arguments[1] == "--base-model" for step in steps[1:])  # the corpus is read once
    assert [step.arguments[step.arguments.index("--base-model") + 1] for step in steps[:5]] == list(
        BASE_MODELS.values()
    )
    assert all(shlex.split(step.command) == ["fastcompat", *step.arguments] for step in steps)
    assert list(BASE_MODELS) == paper.base_models()
    (only,) = plan(["llama-3.2 3b"], gpt2=None, ifd=False, output="my run")
    assert only.command == (
        f"fastcompat score {CORPUS} --base-model meta-llama/Llama-3.2-3B --template plain --max-length 4096 -o 'my run'"
    )
    with pytest.raises(UsageError, match="no base model of the paper"):
        plan(["Qwen/Qwen2.5-7B"])
    assert CHOICES["beta"].startswith("3,")
