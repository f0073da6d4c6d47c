"""One directory, one function: what makes transformers compute something else is undone, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import small_model
from reward_makers import classifier, edit_config, edit_tensors, llama3_tokenizer, save
from safetensors.torch import load_file
from tokenizer_makers import CHATML, make_tokenizer

import fastcompat as fc
from fastcompat.errors import ModelError
from fastcompat.models import loading, packed_model
from fastcompat.models.checkpoint import have_equal_tensors
from fastcompat.models.configuration import load_config

ROWS = [
    {"prompt": "What is two plus two?", "response": "It is four, as everybody knows who has ever counted."},
    {"prompt": "What is two plus two?", "response": "It is five."},
]
# What the FP4 of MXFP4 stands for (OCP Microscaling Formats 1.0, E2M1): sign, two bits of exponent, one of mantissa.
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    save(path, small_model("Llama", vocab_size=960), make_tokenizer(chat_template=CHATML))
    return path


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "reward"
    save(path, classifier("Llama", pad_token_id=2), llama3_tokenizer())
    return path


def losses(path: Path) -> np.ndarray:
    return fc.Scorer(str(path), dtype="float32").score(ROWS)["loss"].to_numpy()


def refused(path: Path | str, scorer=fc.Scorer) -> str:
    """The sentence with which a scorer is refused before anything of the model is loaded."""
    with pytest.raises(ModelError) as error:
        scorer(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def add_adapter(directory: Path, **more: object) -> None:
    """What peft's save_pretrained leaves, as far as transformers looks before it attaches an adapter."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "somebody/base", "r": 4, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | more))
    shutil.copy(
        next(iter(directory.glob("model.safetensors")), Path(__file__)), directory / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(("kind", "scorer"), [("base", fc.Scorer), ("reward", fc.RewardScorer)])
def test_an_adapter_beside_weights_is_refused(tmp_path, kind, scorer, request):
    path = shutil.copytree(request.getfixturevalue(kind), tmp_path / "adapted")
    add_adapter(path)
    message = refused(path, scorer)
    assert "adapter_config.json" in message
    assert "merge_and_unload" in message
    assert message.endswith("or name the base model, somebody/base")


@pytest.mark.parametrize("scorer", [fc.Scorer, fc.RewardScorer])
def test_a_directory_with_nothing_but_an_adapter_is_refused(tmp_path, scorer):
    add_adapter(tmp_path)
    assert refused(tmp_path, scorer).endswith("or name the base model, somebody/base")
    (tmp_path / "adapter_config.json").write_text("[")
    assert refused(tmp_path, scorer).endswith("or name the base model")
    (tmp_path / "adapter_config.json").unlink()
    assert "merge_and_unload" in refused(tmp_path, scorer)


def test_an_adapter_on_the_hub_is_refused(tmp_path, monkeypatch):
    add_adapter(tmp_path)

    def cached_file(model: str, name: str, **options: object) -> str | None:
        assert model == "somebody/adapted"
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert refused("somebody/adapted").endswith("or name the base model, somebody/base")


def test_an_adapter_that_was_attached_all_the_same_is_refused(base, monkeypatch):
    """As from_pretrained does where it finds one that was not seen before."""
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained

    def attaching(*args, **kwargs):
        full, report = own(*args, **kwargs)
        full._hf_peft_config_loaded = True
        return full, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", attaching)
    with pytest.raises(ModelError, match="attached an adapter"):
        _ = fc.Scorer(str(base)).model


@pytest.mark.parametrize(
    ("config", "name", "match"),
    [
        ({}, "shard-00001-model-00001-of-00002.safetensors", "distributed checkpoint"),
        ({"transformers_weights": "other.safetensors"}, "other.safetensors", "the weights lie in other.safetensors"),
        ({"configuration_files": ["config.5.0.0.json"]}, "config.5.0.0.json", "configuration_files"),
    ],
)
def test_other_files_than_those_of_the_fingerprint_are_refused(base, tmp_path, config, name, match):
    """transformers loads each of these instead of model.safetensors or config.json."""
    path = shutil.copytree(base, tmp_path / "other")
    shutil.copy(base / ("config.json" if name.endswith("json") else "model.safetensors"), path / name)
    edit_config(path, **config)
    assert match in refused(path)


def test_an_index_that_is_damaged_is_one_sentence(base, tmp_path):
    path = shutil.copytree(base, tmp_path / "damaged")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        (path / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json is damaged" in refused(path)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_kernels": True},
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}},
        {"trust_remote_code": True},
    ],
)
def test_a_setting_that_would_load_other_code_changes_nothing(base, tmp_path, setting):
    path = shutil.copytree(base, tmp_path / "set")
    edit_config(path, **setting)
    (path / "modeling_other.py").write_text("raise AssertionError('code of a model must not run')")
    np.testing.assert_array_equal(losses(path), losses(base))


def test_experts_are_computed_by_what_torch_has(tmp_path):
    path = Path(save(tmp_path / "moe", small_model("Mixtral", vocab_size=960), make_tokenizer(chat_template=CHATML)))
    wanted = losses(path)
    edit_config(path, experts_implementation="sonicmoe")  # a package from the hub
    np.testing.assert_array_equal(losses(path), wanted)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "unheard of"},
        {"bits": 4},
        {},
    ],
    ids=lambda quantisation: quantisation.get("quant_method", "without a method"),
)
def test_quantised_weights_are_refused(base, reward, tmp_path, quantisation):
    for path, scorer in ((base, fc.Scorer), (reward, fc.RewardScorer)):
        quantised = shutil.copytree(path, tmp_path / path.name)
        edit_config(quantised, quantization_config=quantisation)
        message = refused(quantised, scorer)
        assert "quantised" in message
        assert quantisation.get("quant_method", "quantization_config") in message


@pytest.mark.parametrize("quantisation", ["gptq", ["gptq"], 4])
def test_a_quantisation_that_is_no_dictionary_is_one_sentence(base, tmp_path, quantisation):
    path = shutil.copytree(base, tmp_path / "odd")
    edit_config(path, quantization_config=quantisation)
    assert refused(path)


def test_mxfp4_experts_are_turned_back_wherever_they_run(tmp_path):
    """As gpt-oss': two values a byte, the lower half first, and a power of two for every 32 of them."""
    plain = small_model("gpt-oss (sinks)", vocab_size=960, hidden_size=64, intermediate_size=32, head_dim=16)
    quantised = Path(save(tmp_path / "mxfp4", plain, make_tokenizer(chat_template=CHATML)))
    widened = shutil.copytree(quantised, tmp_path / "wide")
    draw = torch.Generator().manual_seed(0)
    for name, weight in load_file(quantised / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(123, 126, (experts, outputs, inputs // 32), generator=draw, dtype=torch.uint8)
        halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        values = torch.tensor(FP4 + [-value for value in FP4])[halves] * 2.0 ** (scales[..., None].float() - 127)
        wide = values.flatten(-2).transpose(1, 2)
        key = name.replace(".", "__")
        edit_tensors(widened, **{key: wide})
        edit_tensors(quantised, name, **{f"{key}_blocks": blocks, f"{key}_scales": scales})
    edit_config(quantised, quantization_config={"quant_method": "mxfp4"})
    assert load_config(str(quantised), None).quantization_config["dequantize"] is True
    np.testing.assert_allclose(losses(quantised), losses(widened), rtol=1e-6)


def test_tensors_are_compared_bit_by_bit_in_every_dtype(base, tmp_path):
    eighths, others = (shutil.copytree(base, tmp_path / name) for name in ("eighths", "others"))
    name, weight = next(iter(load_file(base / "model.safetensors").items()))
    eighth = weight.to(torch.float8_e4m3fn)
    edit_tensors(eighths, **{name.replace(".", "__"): eighth})
    assert have_equal_tensors(str(eighths), str(eighths), [name], (None, None))
    assert not have_equal_tensors(str(eighths), str(base), [name], (None, None))
    edit_tensors(others, **{name.replace(".", "__"): (-weight).to(torch.float8_e4m3fn)})
    assert not have_equal_tensors(str(eighths), str(others), [name], (None, None))
    edit_tensors(others, **{name.replace(".", "__"): eighth.reshape(-1)})
    assert not have_equal_tensors(str(eighths), str(others), [name], (None, None))


def test_weights_go_straight_to_a_gpu_where_accelerate_is_there(base, monkeypatch):
    from transformers import utils

    monkeypatch.setattr(utils, "is_accelerate_available", lambda: True)
    assert loading._placement(torch.device("cuda:1")) == {"device_map": {"": torch.device("cuda:1")}}
    assert loading._placement(torch.device("cpu")) == {}
    monkeypatch.setattr(utils, "is_accelerate_available", lambda: False)
    assert loading._placement(torch.device("cuda:1")) == {}


def test_weights_that_go_straight_to_their_device_are_the_same(base, monkeypatch):
    pytest.importorskip("accelerate")
    plain = loading.load_causal_lm(str(base)).full.state_dict()
    monkeypatch.setattr(loading, "_placement", lambda device: {"device_map": {"": device}})
    placed = loading.load_causal_lm(str(base)).full
    assert not any(hasattr(module, "_hf_hook") for module in placed.modules())
    assert plain.keys() == placed.state_dict().keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in placed.state_dict().items())


def test_a_model_that_is_to_divide_no_product_says_so_to_all_that_computes(base):
    scorer = fc.Scorer(str(base), deterministic=True)
    assert scorer.model.deterministic
    # On a CPU it is the same scorer, and its record says that nothing was done.
    assert scorer.identity == fc.Scorer(str(base)).identity
    assert scorer.record()["deterministic"] is False


def test_what_is_raised_while_a_model_is_made_ready_is_one_sentence(base, monkeypatch):
    monkeypatch.setattr(packed_model, "n_windowed_layers", lambda config: [][0])
    with pytest.raises(ModelError, match="cannot be run on packed sequences \\(IndexError: "):
        _ = fc.Scorer(str(base)).model
