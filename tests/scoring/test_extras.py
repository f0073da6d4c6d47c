"""What a base model tells beside the loss, against plain logits; runs that come to tell more."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import prepare_small_units, save_small_model, save_small_reward_model, write_corpus
from fake_runs import part_path
from typer.testing import CliRunner

import fastcompat as fc
from fastcompat.cli.application import app
from fastcompat.errors import Interrupted, UsageError
from fastcompat.metrics.catalogue import METRICS, compute, extras_needed_by
from fastcompat.rows.columns import COLUMNS, EXTRAS
from fastcompat.scoring.engine import Progress
from fastcompat.scoring.passes import Pass, Worker, passes_of, score_corpus
from fastcompat.store.run import Run

ROWS = [
    {"prompt": "p", "response": "a list of new words", "generator": "a"},
    {"prompt": "p", "response": "a list of nothing", "generator": "b"},
    {"prompt": "q", "response": "", "generator": "a"},
    {"prompt": "another question", "response": "naïve ways — and so on " * 9, "generator": "b"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=3, n_prompts=12)
    return directory


def statistics_of(model: Path, ids: np.ndarray, scored: np.ndarray) -> dict[str, np.ndarray]:
    """Of every scored token, from the logits of one unpadded sequence in float64."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with torch.no_grad():
        logits = plain(torch.from_numpy(ids)[None].long()).logits[0, :-1].numpy()
    logits, target = logits[scored[1:]], ids[1:][scored[1:]]
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(1)
    own = log_p[np.arange(len(target)), target]
    return {
        "nll": -own,
        "entropy": entropy,
        "varentropy": (p * log_p**2).sum(1) - entropy**2,
        "rank": (log_p > own[:, None]).sum(1),
    }


def test_every_column_is_what_plain_logits_give(model):
    scorer = fc.Scorer(str(model), dtype="float32", extras=list(EXTRAS), token_budget=128)
    rows = scorer.score(ROWS).to_pylist()
    for given, row in zip(ROWS, rows, strict=True):
        if not given["response"]:
            assert all(row[name] is None for name in EXTRAS)
            continue
        (sequence,) = scorer.tokenizer([_response(given)])
        own = statistics_of(model, sequence.input_ids, sequence.scored)
        # Without the prompt: the same ids behind a BOS, here an EOS because the tokenizer has no BOS.
        start = scorer.tokenizer.tokenizer.eos_token_id
        assert scorer.tokenizer.tokenizer.bos_token_id is None
        alone_ids = np.concatenate([[start], sequence.input_ids[sequence.scored]])
        alone = statistics_of(model, alone_ids, np.arange(len(alone_ids)) > 0)["nll"]
        assert row["n_bytes"] == len(given["response"].encode())
        assert row["entropy_sum"] == pytest.approx(own["entropy"].sum(), rel=1e-5)
        assert row["greedy_matches"] == (own["rank"] == 0).sum()
        assert row["clipped_rank_sum"] == np.minimum(1 + own["rank"], 100).sum()
        assert row["unconditioned_nll_sum"] == pytest.approx(alone.sum(), rel=1e-5)
        assert row["unconditioned_n_tokens"] == row["n_tokens"] == len(alone)
        for name, wanted in [("nll", own["nll"]), ("entropy", own["entropy"]), ("varentropy", own["varentropy"])]:
            np.testing.assert_allclose(row[f"token_{name}"], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row["unconditioned_token_nll"], alone, rtol=1e-4, atol=1e-5)
        assert len(row["token_text"]) == row["n_tokens"]
        assert "".join(row["token_text"]) == given["response"] + "<|im_end|>"
        assert np.sum(row["token_nll"], dtype=np.float64) == pytest.approx(row["nll_sum"], rel=1e-6)


def _response(row: dict) -> object:
    from fastcompat.corpus import rows_from_records

    return rows_from_records([row])[0]


def test_the_loss_has_the_same_bits_with_and_without_them(model):
    plain = fc.Scorer(str(model)).score(ROWS)
    more = fc.Scorer(str(model), extras=list(EXTRAS)).score(ROWS)
    assert more.select(plain.column_names).equals(plain)


def test_every_metric_can_be_computed_from_what_it_asks_for(model):
    assert set(EXTRAS) <= set(COLUMNS)
    for name in METRICS:
        if {"reward", "reference_loss"} & set(METRICS[name].needs):
            continue
        extras = extras_needed_by([name], keep_tokens=True)
        values = compute(name, fc.Scorer(str(model), extras=extras.columns).score(ROWS))
        assert np.isfinite(values).tolist() == [True, True, name == "response_length", True], name
    with pytest.raises(UsageError, match="--keep-tokens"):
        extras_needed_by(["s_ifd", "loss"])
    assert extras_needed_by(["car", "loss", "excess_loss"]).columns == ()
    assert extras_needed_by(["rsr"], keep_tokens=True).columns == ("clipped_rank_sum", "token_nll", "token_text")
    # No column that no metric asks for: the text goes with the tokens.
    every = extras_needed_by(METRICS, keep_tokens=True).columns
    assert every == tuple(EXTRAS)
    assert extras_needed_by(["ifd_ppl"]).columns == ("unconditioned_nll_sum", "unconditioned_n_tokens")


def test_every_column_is_read_by_a_metric_but_the_text():
    read = {column for metric in METRICS.values() for column in metric.needs}
    assert set(COLUMNS) == read | {"token_text"}


def test_columns_that_cannot_be(model):
    with pytest.raises(UsageError, match="surprise"):
        fc.Scorer(str(model), extras=["surprise"])
    with pytest.raises(UsageError, match="--turns all"):
        fc.Scorer(str(model), extras=["unconditioned_nll_sum"], turns="all")
    with pytest.raises(UsageError, match="no metric"):
        CliRunner().invoke(
            app, ["score", "x", "--base-model", str(model), "-o", "y", "--for", "luck"], catch_exceptions=False
        )


def score(run: Run, served: Pass, **options) -> Progress:
    options = {"progress": Progress()} | options
    score_corpus(run, served, token_budget=None, worker=Worker(), **options)
    return options["progress"]


def parts(run: Run) -> dict[tuple[str, str], bytes]:
    return {(s.name, path.name): path.read_bytes() for s in run.scorers() for path in s.place.directory.glob("part-*")}


@pytest.mark.parametrize("with_reward", [False, True])
def test_interrupted_it_goes_on_and_gives_the_same_bytes(tmp_path, model, corpus, with_reward):
    rewards = [str(save_small_reward_model(tmp_path / "head", body=model))] if with_reward else []

    def served() -> Pass:
        base = fc.Scorer(str(model), token_budget=128, extras=list(EXTRAS))
        (only,) = passes_of([base], [fc.RewardScorer(path, token_budget=128) for path in rewards])
        return only

    whole = prepare_small_units(tmp_path / "whole", corpus, target_unit_chars=10_000_000)
    n_tokens = score(whole, served()).n_tokens
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=10_000_000)
    computed, incomplete = [], 0
    while len(parts(run)) < len(parts(whole)):
        progress = Progress()
        stops = itertools.chain([False] * 3, itertools.repeat(True))
        with contextlib.suppress(Interrupted):
            score_corpus(
                run, served(), token_budget=None, worker=Worker(), progress=progress, stop=partial(next, stops)
            )
        computed.append(progress.n_tokens)
        # A row is there with its loss, and then with what is read of it without its prompt.
        rows = [row for row in run.scores().to_pylist() if row["base_model"] is not None]
        assert all(row["loss"] is not None and row["token_nll"] is not None for row in rows)
        incomplete += sum(row["unconditioned_nll_sum"] is None for row in rows)
    assert incomplete
    assert len(computed) > 2
    assert sum(computed) == n_tokens
    assert parts(run) == parts(whole)
    table = run.scores()
    assert table.filter(table["base_model"].is_valid())["token_nll"].null_count == 0
    assert table.num_rows == (1 + with_reward) * run.n_rows


def test_a_run_that_comes_to_tell_more_shows_each_response_once(tmp_path, model, corpus):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=1500)
    score(run, Pass(base=fc.Scorer(str(model), token_budget=128)))
    losses = run.scores()["loss"]
    richer = fc.Scorer(str(model), token_budget=128, extras=["greedy_matches"])
    half = run.units[: len(run.units) // 2]
    score(run, Pass(base=richer))
    assert len(run.scorers()) == 2
    assert run.scores()["loss"].equals(losses)
    assert run.scores()["greedy_matches"].null_count == 0
    assert set(run.scores()["base_model"].to_pylist()) == {"base"}
    # Half done, both are shown: nothing that is known is hidden.
    (new,) = (store for store in run.scorers() if store.extras.columns)
    for unit in half:
        part_path(new, unit).unlink()
    assert run.scores().num_rows == 2 * run.n_rows - sum(unit.n_rows for unit in half)
    # Resumed without the option, the richer one goes on only if the plain one is not there.
    plain = fc.Scorer(str(model), token_budget=128)
    assert score(run, Pass(base=plain)).n_rows == 0


def test_resuming_without_the_option_goes_on_with_the_columns(tmp_path, model, corpus):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=1500)
    stops = itertools.chain([False] * 3, itertools.repeat(True))
    with contextlib.suppress(Interrupted):
        score(
            run, Pass(base=fc.Scorer(str(model), token_budget=128, extras=["entropy_sum"])), stop=partial(next, stops)
        )
    score(run, Pass(base=fc.Scorer(str(model), token_budget=128)))
    assert len(run.scorers()) == 1
    assert run.scores()["entropy_sum"].null_count == 0
