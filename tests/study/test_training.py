"""What is trained is what `score` scores: the same tokens, the same loss; and the same seed gives the same model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_studies import save_models, settings_text, write_responses

from fastcompat.errors import Interrupted, UsageError
from fastcompat.models import load_causal_lm
from fastcompat.models.configuration import ModelSettings
from fastcompat.scoring import score_sequences
from fastcompat.study import training as subject
from fastcompat.study.rows import choose_rows
from fastcompat.study.settings import settings_of
from fastcompat.study.training import (
    TrainingError,
    are_alone_when_packed,
    load_trainable,
    sequences_of,
    steps_of,
    tokenizer_of,
    train,
)

pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """(source, tokenizer, sequences, settings of the training)."""
    directory = tmp_path_factory.mktemp("training")
    write_responses(directory)
    base, _ = save_models(directory)
    settings = settings_of(settings_text(directory, examples=8), "s.toml")
    tokenizer = tokenizer_of(str(base), settings.training)
    rows = choose_rows(settings).trained["beta"]
    return str(base), tokenizer, sequences_of(tokenizer, rows), replace(settings.training, warm_up=0.0)


def trained(material, directory, *, seed=0, **changes):
    source, tokenizer, sequences, training = material
    directory.mkdir()
    return train(source, sequences, replace(training, **changes), seed, directory, tokenizer=tokenizer)


def first_loss(material, seed=0, **changes):
    """What `score` says of the responses of the first step: nats a token."""
    source, _, sequences, training = material
    step = [sequences[n] for n in steps_of(sequences, replace(training, **changes), seed)[0]]
    model = load_causal_lm(source, ModelSettings(device="cpu", dtype="float32"))
    return score_sequences(model, step, token_budget=1024).nll_sum.sum() / sum(own.n_tokens for own in step)


def test_the_first_loss_is_that_of_score_and_a_seed_gives_the_same_model(material, tmp_path):
    record = trained(material, tmp_path / "one", seed=7, epochs=2)
    assert record["packed"]
    assert record["losses"][0] == pytest.approx(first_loss(material, seed=7, epochs=2), abs=1e-5)
    assert record["losses"][-1] < record["losses"][0]
    assert json.loads((tmp_path / "one" / subject.RECORD).read_text()) == record
    again = trained(material, tmp_path / "two", seed=7, epochs=2)
    assert again["losses"] == record["losses"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert trained(material, tmp_path / "three", seed=8, epochs=2)["losses"] != record["losses"]


def test_packed_and_unpacked_losses_agree(material, tmp_path, monkeypatch):
    # All responses in one step, so that both ways add up the same ones.
    packed = trained(material, tmp_path / "packed", batch_tokens=10_000)
    monkeypatch.setattr(subject, "are_alone_when_packed", lambda model, sequences: False)
    alone = trained(material, tmp_path / "alone", batch_tokens=10_000)
    assert (packed["packed"], alone["packed"]) == (True, False)
    assert packed["losses"][0] == pytest.approx(alone["losses"][0], abs=1e-5)


def test_a_model_that_sees_its_neighbours_is_not_packed(material):
    source, _, sequences, _ = material
    model = load_trainable(source, torch.device("cpu"))
    assert are_alone_when_packed(model, sequences)
    forward = model.forward

    def blind(input_ids, position_ids=None, **other):
        """Positions that go on: a causal mask over the whole row."""
        whole = torch.arange(input_ids.shape[1])[None]
        return forward(input_ids=input_ids, position_ids=whole, use_cache=False)

    model.forward = blind
    assert not are_alone_when_packed(model, sequences)


def test_every_epoch_has_every_response_once_in_an_order_of_its_seed(material):
    _, _, sequences, training = material
    steps = steps_of(sequences, replace(training, epochs=3), 1)
    every = [n for step in steps for n in step]
    for epoch in np.split(np.array(every), 3):
        assert sorted(epoch.tolist()) == list(range(len(sequences)))
    assert all(sum(len(sequences[n].input_ids) for n in step) <= training.batch_tokens for step in steps)
    assert steps == steps_of(sequences, replace(training, epochs=3), 1)
    assert steps != steps_of(sequences, replace(training, epochs=3), 2)
    assert [len(step) for step in steps_of(sequences, replace(training, batch_tokens=1), 0)] == [1] * len(sequences)


def test_a_loss_that_is_no_number_and_an_interruption(material, tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match="lower learning_rate") as caught:
        trained(material, tmp_path / "wild", learning_rate=1e30, epochs=2)
    assert caught.value.status == "nonfinite"
    source, tokenizer, sequences, training = material
    (tmp_path / "stopped").mkdir()
    with pytest.raises(Interrupted):
        train(source, sequences, training, 0, tmp_path / "stopped", tokenizer=tokenizer, stop=lambda: True)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()


def test_lora_without_peft(material, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="lora_rank needs peft"):
        trained(material, tmp_path / "lora", lora_rank=4)


def test_lora(material, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: make test-adapters")
    record = trained(material, tmp_path / "lora", lora_rank=4, epochs=2)
    assert record["losses"][0] == pytest.approx(first_loss(material, epochs=2), abs=1e-5)
    assert record["losses"][-1] < record["losses"][0]
    assert not (tmp_path / "lora" / "adapter_config.json").exists()
