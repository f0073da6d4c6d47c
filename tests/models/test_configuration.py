"""Configurations of every model that transformers has are read without an exception, whatever stands in them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from corpora import save_small_model
from every_model import TASKS, types_of
from families import small_model
from small_configs import small_config
from transformers import CONFIG_MAPPING, DeepseekV3Config, Gemma4TextConfig, GPT2Config, LlamaConfig, WhisperConfig

from fastcompat.errors import ModelError
from fastcompat.models.configuration import (
    head_width,
    largest,
    layers,
    load_config,
    logit_scale,
    model_lengths,
    n_layers,
    n_windowed_layers,
    number,
    read,
    refuse_unsupported,
    resolve_dtype,
    softcap,
    text_config,
    windows,
)
from fastcompat.scoring.losses import Scorer
from fastcompat.scoring.token_budget import LEAST_CPU_TOKEN_BUDGET, choose_token_budget, head_bytes, token_bytes

CPU = torch.device("cpu")
TYPES = sorted({model_type for task in TASKS for model_type in types_of(task)})
WITHOUT_DEFAULTS = {"dots3_note", "gemma4_assistant"}
WITHOUT_WIDTHS = {"fnet", "perceiver"}  # no heads, or none of a language model


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> str | None:
    """The sentence with which something is refused; None where it is not. All else that is raised is a fault."""
    try:
        call(*arguments, **options)
    except ModelError as error:
        return str(error)
    return None


def read_everything(config) -> bool:
    """Read all that is ever read of a configuration; whether a model of it would be loaded for any task."""
    refusals = [refusal(refuse_unsupported, "a model", config, task=task) for task in TASKS.values()]
    assert not any("\n" in refused for refused in refusals if refused)
    assert all(length is None or length > 0 for length in model_lengths(config))
    assert resolve_dtype("auto", config, CPU) in (torch.float32, torch.bfloat16)
    assert math.isfinite(logit_scale(config))
    assert softcap(config) is None or math.isfinite(softcap(config))
    assert n_layers(config) is None or n_layers(config) > 0
    assert n_windowed_layers(config) >= 0
    assert all(window is None or window > 0 for window in windows(config))
    for of_pack in (token_bytes(config, torch.bfloat16), head_bytes(CPU, config)):
        assert of_pack is None or of_pack > 0
    return None in refusals


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_of_transformers_is_read(model_type):
    config_class = CONFIG_MAPPING[model_type]
    configs = []
    for make in (config_class, lambda: small_config(config_class)):
        with suppress(Exception):  # its defaults do not agree, so that nobody has such a file
            configs.append(make())
    assert configs or model_type in WITHOUT_DEFAULTS
    for config in configs:
        if read_everything(config):
            assert (token_bytes(config, torch.float32) is None) == (model_type in WITHOUT_WIDTHS)


def gemma4(**changes) -> Gemma4TextConfig:
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma4TextConfig(**(dict(num_hidden_layers=4, layer_types=kinds, global_head_dim=512) | changes))


def test_what_differs_from_layer_to_layer_is_bounded_by_the_largest():
    config = gemma4(head_dim=256)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.head_dim
    assert read(config, "head_dim") is None
    assert read(config, "head_dim", 7) == 7
    assert [read(layer, "head_dim") for layer in layers(config)] == [256, 512] * 2
    assert largest(config, "head_dim") == head_width(config) == 512
    assert windows(config) == [512, None] * 2
    assert n_windowed_layers(config) == 2
    # Six times the heads' elements of queries, keys and values, in float32.
    wide, narrow = (token_bytes(gemma4(head_dim=256, global_head_dim=width), torch.float32) for width in (512, 256))
    assert wide - narrow == 6 * (8 + 2 * 4) * 256 * 4
    few = gemma4(attention_k_eq_v=True, num_global_key_value_heads=2)
    assert largest(few, "num_key_value_heads") == 4


def test_inputs_of_all_layers_count():
    config = small_model("Gemma-4 (shared keys, inputs per layer)").config
    without = small_model("Gemma-4 (shared keys, inputs per layer)", hidden_size_per_layer_input=0).config
    assert token_bytes(config, torch.float32) - token_bytes(without, torch.float32) == 4 * 8 * (5 * 4 + 12)


def test_a_latent_is_as_wide_as_the_keys_that_become_of_it():
    config = DeepseekV3Config()
    assert config.head_dim == 64
    assert head_width(config) == 128 + 64


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (7, 7),
        (7.0, 7),
        ([3, 9, 5], 9),
        ((3, None, 5), 5),
        ({"a": 3, "b": {"c": [4]}}, 4),
        ([[2, 3], [4]], 4),
        (None, None),
        (True, None),
        ("12", None),
        (0, None),
        (-1, None),
        (7.5, None),
        (math.nan, None),
        (math.inf, None),
        ([], None),
        ({"a": "b"}, None),
        (object(), None),
    ],
)
def test_the_largest_number_of_a_value_of_any_kind(value, found):
    assert largest(SimpleNamespace(size=value), "size") == found
    assert largest(SimpleNamespace(size=value, other=1), "size", "other") == (found or 1)
    assert largest(SimpleNamespace(), "size") is None


def test_a_property_that_raises_is_no_value():
    class Raising:
        @property
        def hidden_size(self) -> int:
            raise ValueError("the layers do not agree")

    assert read(Raising(), "hidden_size", 3) == 3
    assert largest(Raising(), "hidden_size") is None


def test_parts_of_a_configuration_count_where_the_model_itself_has_no_number():
    dbrx = small_config(CONFIG_MAPPING["dbrx"])
    assert largest(dbrx, "kv_n_heads") == 2
    assert largest(dbrx, "moe_top_k") == 2
    assert largest(dbrx, "hidden_size") == 32
    assert text_config(CONFIG_MAPPING["gemma3"]()).model_type == "gemma3_text"


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, (2048, None)),
        ({"max_position_embeddings": -1}, (None, None)),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, (2048, None)),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 64,
                    "short_factor": [1.0] * 64,
                    "long_factor": [2.0] * 64,
                }
            },
            (2048, 64),
        ),
    ],
)
def test_lengths(changes, lengths):
    assert model_lengths(LlamaConfig(**changes)) == lengths
    assert model_lengths(GPT2Config(n_positions=96)) == (96, None)
    assert model_lengths(WhisperConfig(max_target_positions=96)) == (96, None)


def test_numbers_that_are_none_are_the_default():
    config = SimpleNamespace(scale=None, cap="30", flag=True, factor=math.nan, good=2, logit_scale=None)
    assert [number(config, name, 1.5) for name in ("scale", "cap", "flag", "factor", "nothing")] == [1.5] * 5
    assert number(config, "good", 1.5) == 2.0
    assert logit_scale(config) == 1.0


WEIRD = [None, "many", -1, 0, 2.5, 1e300, 10**4, True, [], [4, None], {"a": 3}]


@pytest.mark.parametrize("family", ["Llama", "Gemma-4 (a head width per layer)", "GPT-2"])
def test_whatever_stands_in_config_json_is_read_or_refused_in_one_sentence(tmp_path, family):
    small_model(family).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    n_read = n_refused = 0
    for name in [*whole, "sliding_window", "layer_types", "per_layer_config", "quantization_config", "sub_configs"]:
        for value in WEIRD:
            path.write_text(json.dumps(whole | {name: value}))
            refused = refusal(lambda: read_everything(load_config(str(tmp_path), None)))
            assert refused is None or "\n" not in refused, (name, value)
            n_read += refused is None
            n_refused += refused is not None
    assert min(n_read, n_refused) > 50


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', "{}", '{"model_type": null}', '{"model_type": 3}'])
def test_a_config_json_that_is_none_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        load_config(str(tmp_path), None)
    assert "\n" not in str(error.value)


def test_a_model_whose_widths_are_not_told_gets_a_small_budget_and_says_so_once(tmp_path, monkeypatch, caplog):
    unknown = SimpleNamespace(model_type="odd", vocab_size=100)
    with caplog.at_level(logging.WARNING, "fastcompat"):
        assert choose_token_budget(CPU, unknown, torch.float32, 1 << 40) == LEAST_CPU_TOKEN_BUDGET
    assert "this odd model does not say how wide its layers are" in caplog.text
    caplog.clear()
    directory: Path = save_small_model(tmp_path / "model")
    monkeypatch.setattr("fastcompat.scoring.token_budget.token_bytes", lambda config, dtype: None)
    scorer = Scorer(str(directory))
    with caplog.at_level(logging.WARNING, "fastcompat"):
        table = scorer.score([{"prompt": "What?", "response": "That."}] * 2)
        scorer.score([{"prompt": "What?", "response": "That."}])
    assert table["status"].to_pylist() == ["ok", "ok"]
    assert scorer.token_budget == LEAST_CPU_TOKEN_BUDGET
    assert len([record for record in caplog.records if "how wide" in record.message]) == 1
