"""The benchmark of reward models: the pipeline, every loop and fastcompat give the same rewards on the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import small_model
from reward_loops import exact_rewards, id_tokenizer, packed_reward_loop, reward_loops, texts_of
from reward_makers import VOCABULARY, classifier
from reward_measurement import classifier_subject, tokenization_seconds

from fastcompat.benchmark.subjects import SHAPES
from fastcompat.benchmark.workloads import Lengths, Workload
from fastcompat.rows.status import Status
from fastcompat.tokens.conversations import TokenSequence

BENCH = Path(__file__).parents[2] / "bench"
SMALL = Workload(
    n_prompts=2,
    n_responses=3,
    prompt=Lengths(mu=2.5, sigma=0.5, low=4, high=30),
    response=Lengths(mu=3, sigma=0.5, low=2, high=60),
)
# Rewards of some units, float32 against float64, and float32 loops against each other.
FLOAT32 = 1e-4


# Windows and soft caps; learnt positions, for which padding would count where it is on the left.
@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "GPT-2"])
def test_the_pipeline_and_every_loop_give_fastcompats_rewards(tmp_path, family):
    pad_id = VOCABULARY - 1
    classifier(family, pad_token_id=pad_id).save_pretrained(tmp_path)
    subject = classifier_subject(tmp_path, name=family, dtype="float32")
    sequences = SMALL.sequences(pad_id, seed=1)
    full, ours = subject.plain(), subject.load_ours()
    loops = reward_loops(full, id_tokenizer(pad_id), texts_of(sequences), (1, 2, 100))
    loops.append(packed_reward_loop(ours, token_budget=64))
    found = {loop.title.format(loop.sizes[0]): loop.run(sequences, loop.sizes[0]) for loop in loops}
    assert len(found) == len(loops)
    found["exact"] = exact_rewards(full, sequences)
    full.double()
    with torch.no_grad():
        expected = [
            float(full(torch.from_numpy(s.input_ids).long()[None], use_cache=False).logits[0, 0]) for s in sequences
        ]
    assert np.std(expected) > 0.5, "the rewards must differ for this to test anything"
    for name, rewards in found.items():
        np.testing.assert_allclose(rewards, expected, rtol=0, atol=FLOAT32, err_msg=name)


def test_texts_of_ids_are_tokenised_to_these_ids():
    ids = [np.array(x, np.int32) for x in ([0], [0, 298, 0], range(299))]
    sequences = [TokenSequence(input_ids=x, scored=np.arange(len(x)) > 0, status=Status.OK) for x in ids]
    tokenizer, texts = id_tokenizer(299), texts_of(sequences)
    assert tokenizer.pad_token_id == 299
    assert tokenization_seconds(tokenizer, texts, sequences) > 0
    batch = tokenizer([texts[x.tobytes()] for x in ids], padding=True)
    for x, row, mask in zip(ids, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row == x.tolist() + [299] * (299 - len(x))
        assert mask == [1] * len(x) + [0] * (299 - len(x))
    with pytest.raises(AssertionError, match="3 ids became"):
        tokenization_seconds(id_tokenizer(200), texts, sequences)


def test_reward_models_beside_the_pipeline(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    from rewards import main

    monkeypatch.setitem(SHAPES, "tiny", lambda: small_model("Llama").config)
    options = ["--shape", "tiny", "--prompts", "1", "--rounds", "2", "--batch-sizes", "1", "3", "--dtype", "float32"]
    main([*options, "--workload", "generators", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "rewards-tiny-generators.json").read_text())
    assert (record["n_sequences"], record["failed"], record["dtype"]) == (16, {}, "float32")
    assert record["n_packed_tokens"] < record["n_tokens"]
    assert record["reward_deviation"] > 0.5
    pipelines = [f"Hugging Face pipeline, {name}batches of" for name in ("", "length-sorted, ")]
    by_hand, alone = "Hugging Face, length-sorted, batches of 3", "Hugging Face, one at a time"
    names = [f"{pipelines[0]} 1", f"{pipelines[0]} 3", f"{pipelines[1]} 3", by_hand, alone, "fastcompat"]
    scorers, ours = record["scorers"], record["scorers"]["fastcompat"]
    assert list(scorers) == names
    seconds = {name: entry["seconds"] for name, entry in scorers.items()}
    best = min(names[:3], key=lambda name: seconds[name])
    for entry in scorers.values():
        assert entry["largest_error"] < FLOAT32
        assert entry["mean_error"] <= entry["largest_error"]
        assert entry["seconds"] == pytest.approx(sum(entry["all_seconds"]) / 2)
        assert entry["speedup_over_best_pipeline"] == pytest.approx(seconds[best] / entry["seconds"])
    assert record["best_of_kind"] == {
        "pipeline": best,
        "pipeline in corpus order": min(names[:2], key=lambda name: seconds[name]),
        "length-sorted pipeline": names[2],
        "length-sorted by hand": by_hand,
        "one at a time": alone,
    }
    for kind, name in record["best_of_kind"].items():
        assert record["fastcompat_over_best_of_kind"][kind] == pytest.approx(seconds[name] / ours["seconds"])
    assert record["machine"]["versions"]["transformers"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert "generators: fastcompat is" in printed
