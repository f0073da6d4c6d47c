"""A model is probed with packs that share nothing too, and with the libraries that some measurement names."""

from __future__ import annotations

import logging
from importlib.metadata import version

import pytest
import torch
from fake_flash import FLASH_2, TORCH_2_12, FakeLibrary, forget, install
from families import small_model

from fastcompat.benchmark.doctor import _attention_libraries
from fastcompat.errors import ModelError
from fastcompat.models import attention_kinds, forward_pass, settings_of
from fastcompat.models.base_model import wrap
from fastcompat.models.probe import probe
from fastcompat.ops import flash_choice
from fastcompat.scoring.portable import versions


@pytest.fixture(scope="module")
def model():
    """Loaded before any library seems to be there: transformers looks for them too."""
    return wrap("test", small_model("Qwen3", dtype=torch.bfloat16))


@pytest.fixture
def measured(model, monkeypatch):
    """Two libraries, measured on the device that this is made to be."""
    monkeypatch.setattr(flash_choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash_choice, "_capability", lambda device: 90)
    monkeypatch.setattr(flash_choice, "MEASURED", {(90, 16): {"alone": "flash:2", "paths": "varlen"}})
    yield install(monkeypatch, "flash:2", FLASH_2), install(monkeypatch, "varlen", TORCH_2_12)
    forget()


def test_measured_libraries_serve_once_they_are_right(model, measured: tuple[FakeLibrary, FakeLibrary]):
    probe(model)
    (kind,) = attention_kinds(model)
    assert (kind.heads, kind.key_heads, kind.width, kind.dtype) == (4, 2, 16, torch.bfloat16)
    served = ["flash-attn 2 none", f"torch's varlen_attn {version('torch')}"]
    assert settings_of(model)["attention_libraries"] == served
    assert versions()["flash-attn 2"] == "none"
    before = [fake.calls for fake in measured]
    probe(model)
    # A call in each of three layers for the pack that shares nothing, and for those that share: the one that asks for
    # the kinds, and the probe's.
    assert [fake.calls - n for fake, n in zip(measured, before, strict=True)] == [3, 6]


def test_one_that_is_wrong_is_told_and_left_out(model, measured, caplog):
    measured[1].top_left = True
    with caplog.at_level(logging.WARNING, logger="fastcompat"):
        probe(model)
    (record,) = caplog.records
    assert "torch's varlen_attn" in record.getMessage()
    assert settings_of(model)["attention_libraries"] == ["flash-attn 2 none"]


def test_without_a_measurement_nothing_is_asked(model, monkeypatch):
    forget()
    monkeypatch.setattr("fastcompat.models.probe.attention_kinds", None)
    probe(model)
    assert "attention_libraries" not in settings_of(model)
    assert set(versions()) == {"fastcompat", "torch", "transformers"}


def test_a_fault_that_only_unshared_packs_show_is_found(model, monkeypatch):
    ours = forward_pass.forest_attention

    def faulty(query, key, value, plan, **options):
        out = ours(query, key, value, plan, **options)
        apart = plan.position_ids.diff().ne(1).sum() == plan.position_ids.eq(0).sum() - 1
        return out.flip(0) if apart else out

    monkeypatch.setattr(forward_pass, "forest_attention", faulty)
    with pytest.raises(ModelError, match="other hidden states"):
        probe(model)


def test_the_doctor_names_what_is_there(measured):
    finding = _attention_libraries()
    assert finding.found == f"flash-attn 2 none, torch's varlen_attn {version('torch')}"
    assert "flash-attn 3: it is not installed" in str(finding.why)
