"""Runs of models whose layers come and go: the bytes of a resident model's, whatever happens on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import fail, run_script, succeed
from corpora import prepare_small_units, save_small_model, save_small_reward_model, write_corpus
from fake_model import FakeModel
from fake_runs import BUDGET, new_run, packs_of, parts, score
from test_out_of_memory import CountedScores, assert_all_scored, random_sequences

import fastcompat as fc
from fastcompat.errors import Interrupted, ModelError, UsageError
from fastcompat.models.streamed_layers import StreamedLayers
from fastcompat.scoring.engine import Progress
from fastcompat.scoring.memory_choice import n_bytes_of
from fastcompat.scoring.packs import score_all
from fastcompat.scoring.passes import Pass, Worker, score_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=3, n_prompts=20)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def reward(base) -> Path:
    return save_small_reward_model(base.parent / "reward", body=base)


# ---- the loop


@pytest.mark.parametrize("most", [200, 70, 20])
def test_memory_that_runs_out_on_a_march_makes_it_smaller(most):
    marching = []

    class Small(FakeModel):
        def march(self, plans, given_up):
            marching.append(sum(plan.forest.n_tokens for plan in plans))
            if marching[-1] > most:
                raise MemoryError
            return super().march(plans, given_up)

    model = Small(tokens_at_once=256)
    scores = CountedScores(random_sequences(80))
    scores.counts = np.zeros(len(scores.sequences), int)
    score_all(model, scores, token_budget=BUDGET)
    assert_all_scored(scores)
    assert max(marching) >= 256
    assert (scores.counts == 1).all()
    # As soon as it was known, and for good; what does not fit by itself goes the way of any pack.
    assert sum(size > most for size in marching) <= 5 or most < BUDGET


def test_a_march_that_is_given_up_is_done_again_and_nothing_else(corpus, tmp_path):
    run, store = new_run(tmp_path / "whole", corpus)
    score(run, store, FakeModel())
    whole = parts(store)
    run, store = new_run(tmp_path / "broken", corpus)
    marches = []

    class Marching(FakeModel):
        def march(self, plans, given_up):
            marches.append(len(plans))
            return super().march(plans, given_up)

    model = Marching(tokens_at_once=3 * BUDGET)
    with pytest.raises(Interrupted):
        # Asked between layers: in the midst of the third march, before any pack of it is done.
        score(run, store, model, stop=lambda: len(marches) == 3)
    assert max(marches) > 1
    done = sum(marches[:2])
    assert len(model.sizes) == done
    again = Marching(tokens_at_once=3 * BUDGET)
    score(run, store, again)
    assert parts(store) == whole
    assert len(again.sizes) == sum(packs_of(run, unit) for unit in run.units) - done


# ---- models


def all_parts(run) -> dict[str, bytes]:
    return {
        f"{own.name}/{path.name}": path.read_bytes()
        for own in run.scorers()
        for path in own.place.directory.glob("part-*")
    }


def joint(base: Path, reward: Path, memory: str) -> Pass:
    return Pass(
        base=fc.Scorer(str(base), token_budget=128, memory=memory),
        reward=fc.RewardScorer(str(reward), token_budget=128, memory=memory),
    )


@pytest.fixture(scope="module")
def resident_parts(base, reward, corpus, tmp_path_factory) -> dict[str, bytes]:
    run = prepare_small_units(tmp_path_factory.mktemp("runs") / "run", corpus, target_unit_chars=3000)
    score_corpus(run, joint(base, reward, "resident"), token_budget=None, worker=Worker(), progress=Progress())
    assert run.scorers()[0].record["settings"]["layers"] == "resident"
    return all_parts(run)


def test_a_run_interrupted_in_a_march_and_gone_on_with(base, reward, corpus, resident_parts, tmp_path, monkeypatch):
    """Losses and rewards of one body, streamed; the end by a model that stays."""
    monkeypatch.setattr(StreamedLayers, "tokens_at_once", 300)
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=3000)
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 12

    served = joint(base, reward, "stream")
    with pytest.raises(Interrupted):
        score_corpus(run, served, token_budget=None, worker=Worker(), progress=Progress(), stop=stop)
    begun = all_parts(run)
    assert begun.keys() < resident_parts.keys()
    settings = run.scorers()[0].record["settings"]
    assert (settings["layers"], "memory" in run.scorers()[0].record["identity"]) == ("streamed", False)
    progress = Progress()
    score_corpus(run, joint(base, reward, "stream"), token_budget=None, worker=Worker(), progress=progress)
    assert progress.n_rows_skipped > 0
    assert all_parts(run) == resident_parts


def test_a_run_that_was_begun_resident_goes_on_streamed(base, reward, corpus, resident_parts, tmp_path):
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=3000)
    units = run.units
    for memory, chosen in (("resident", units[::2]), ("stream", units)):
        score_corpus(
            run,
            joint(base, reward, memory),
            token_budget=None,
            worker=Worker(),
            progress=Progress(),
            units=chosen,
        )
    assert all_parts(run) == resident_parts


def test_limits_in_bytes():
    for text, n_bytes in (("8GB", 8 * 10**9), ("7.5 GiB", 15 << 29), ("900mb", 9 * 10**8), ("12", 12), (5, 5)):
        assert n_bytes_of(text) == n_bytes
    for text in ("", "GB", "8 XB", "-3GB", True, "1e9"):
        with pytest.raises(UsageError, match="write bytes, or for example 8GB"):
            n_bytes_of(text)


def test_settings_that_mean_nothing(base):
    with pytest.raises(UsageError, match="memory 'disk' is not one of auto, resident, stream"):
        fc.Scorer(str(base), memory="disk")
    with pytest.raises(UsageError, match="memory limit 'much'"):
        fc.RewardScorer(str(base), memory_limit="much")


def test_the_smallest_limit_is_in_the_message(base):
    with pytest.raises(UsageError, match="the smallest memory limit that works is") as error:
        fc.Scorer(str(base), memory="stream", memory_limit="10MB").score([{"prompt": "a", "response": "b"}])
    smallest = n_bytes_of(re.search(r"works is (\S+)$", str(error.value))[1])
    # What the process has taken for other things in the meantime is beside it.
    scorer = fc.Scorer(str(base), memory="stream", memory_limit=smallest + (64 << 20))
    assert scorer.score([{"prompt": "a", "response": "b"}])["status"].to_pylist() == ["ok"]
    with pytest.raises(UsageError, match="have its layers stream: --memory stream"):
        _ = fc.Scorer(str(base), memory="resident", memory_limit="10MB").model


def test_auto_streams_where_the_weights_do_not_fit(base, monkeypatch):
    scorer = fc.Scorer(str(base))
    assert not scorer.choose_memory().streams
    choice = scorer.memory_choice
    monkeypatch.setattr("fastcompat.scoring.memory_choice.free_memory", lambda device: choice.weights + choice.work - 1)
    monkeypatch.setattr("fastcompat.models.streamed_loading._compared_bytes", lambda bones: 0)
    monkeypatch.setattr("fastcompat.models.streamed_loading.STAGING_BYTES", 0)
    assert scorer.choose_memory().streams
    assert "do not fit into the" in scorer.memory_choice.reason()


def test_the_commands_say_which_and_why(base, corpus, tmp_path):
    said = succeed("score", corpus, "-o", tmp_path / "run", "--base-model", base, "--memory", "stream")
    assert re.search(r"memory: 3 layers stream from the disk, .*/s: asked for by --memory stream; [\d,]+ tokens", said)
    assert re.search(r"layers were read at .*; [\d.]+ s of [\d.]+ s \([\d.]+%\) were spent waiting for them", said)
    told = json.loads(succeed("doctor", "--base-model", base, "--memory", "stream", "--format", "json"))
    finding = next(row for row in told if row["subject"] == "memory")
    assert "layers stream from the disk" in finding["found"]
    told = json.loads(succeed("doctor", "--base-model", base, "--format", "json"))
    assert next(row for row in told if row["subject"] == "memory")["found"] == "resident"
    assert "name one with --base-model" in fail(UsageError, "doctor", "--memory", "stream")


def test_a_checkpoint_that_is_cut_off_is_refused_before_anything(base, tmp_path):
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        _ = fc.Scorer(str(tmp_path), memory="stream").model


PEAK = """
import gc, sys, torch
from fastcompat.models.loading import load_causal_lm
from fastcompat.scoring.memory_choice import MemoryChoice, used_memory
from fastcompat.models.packed_model import sample_pack
def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM:"))
    return int(line.split()[1]) << 10
def plans(model):
    return [model.plan(sample_pack(model.vocabulary, n)[1]).to(model.device) for n in (16, 24, 20)]
import transformers.models.llama.modeling_llama
open("/proc/self/clear_refs", "w").write("5")
before = peak()
choice = MemoryChoice(model="m", limit=before + int(sys.argv[2]), device=torch.device("cpu"), weights=1, work=0,
                      memory="stream", free=1)
streamed = load_causal_lm(sys.argv[1], streaming=choice.streaming)
states = list(streamed.march(plans(streamed)))
print(peak() - before)
del streamed
gc.collect()
resident = load_causal_lm(sys.argv[1])
print(peak() - before)
print(all(torch.equal(a, resident.hidden(b)) for a, b in zip(states, plans(resident))))
"""


def test_peak_memory_by_the_processs_own_high_water_mark(tmp_path):
    """Streamed within two thirds of the weights, libraries included; resident without the half of them twice."""
    from families import small_model

    model = small_model(
        "Llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, vocab_size=512
    )
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    weights = sum(own.numel() * 4 for own in model.parameters())
    assert weights > 130 << 20
    limit = 100 << 20
    streamed, resident, equal = run_script(PEAK, str(tmp_path), str(limit), seconds=120).split()
    assert int(streamed) < limit
    assert int(resident) < 1.3 * weights + (80 << 20)
    assert equal == "True"
