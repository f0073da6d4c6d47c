"""Fused modules are the same function, are taken only then, and leave the model alone outside of a forward pass."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, small_model
from torch import nn

from fastcompat.models import replacements
from fastcompat.models.base_model import CausalLM, wrap
from fastcompat.models.forward_pass import ATTENTION_NAME
from fastcompat.ops import backends
from fastcompat.tokens.forest import pack_forest

LAYER_NORM = ("GPT-NeoX", "GPT-2", "Cohere (logit scale)", "StarCoder2")
# Norms without a weight, values that are normed, and a factor of the layer's own: only its MLP is a known one.
GEMMA_4 = ("Gemma-4 (a head width per layer)", "Gemma-4 (shared keys, inputs per layer)")
EXPERTS = ("Mixtral", "Qwen3-MoE", "gpt-oss (sinks)")


def fused_parts(model: CausalLM) -> dict[str, bool]:
    """Which parts are fused, all of their kind."""
    return {f.part: f.n_modules > 0 and f.n_fused == f.n_modules for f in model.fusions}


def forest_of(lengths, *, shared: int = 11, seed: int = 0):
    generator = np.random.default_rng(seed)
    stem = generator.integers(3, VOCABULARY, size=shared)
    ids = [np.concatenate([stem, generator.integers(3, VOCABULARY, size=n)]).astype(np.int32) for n in lengths]
    (forest,) = pack_forest(ids, [np.arange(len(x)) >= shared for x in ids], token_budget=1 << 20)
    return forest


def plain_hidden(full, forest) -> torch.Tensor:
    """[T, D] by the library's own attention, a path at a time."""
    before = full.config._attn_implementation
    full.set_attn_implementation("eager")
    hidden = None
    with torch.no_grad():
        for end in forest.path_end:
            path = [int(end)]
            while forest.parent[path[-1]] >= 0:
                path.append(int(forest.parent[path[-1]]))
            path.reverse()
            ids = torch.from_numpy(forest.input_ids[path])[None].long()
            states = full.base_model(ids, use_cache=False).last_hidden_state[0]
            if hidden is None:
                hidden = states.new_full((forest.n_tokens, states.shape[1]), float("nan"))
            hidden[path] = states
    full.set_attn_implementation(before)
    assert hidden is not None
    assert not hidden.isnan().any()
    return hidden


def fusible_parts(family: str) -> dict[str, bool]:
    wanted = {"RMSNorm": True, "attention": True, "MLP": True, "layer": True}
    if family in LAYER_NORM:
        wanted |= {"RMSNorm": False, "layer": False, "attention": family == "StarCoder2", "MLP": "Cohere" in family}
    if family in GEMMA_4:
        wanted |= {"RMSNorm": False, "attention": False, "layer": False}
    if family in EXPERTS:
        wanted["MLP"] = False
    return wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_fused_in_every_family(family):
    fused = fused_parts(wrap("test", small_model(family)))
    assert fused == fusible_parts(family)


@pytest.mark.parametrize("family", [name for name in FAMILIES if fusible_parts(name)["attention"]])
def test_in_bfloat16_plain_torch_lets_fuse_as_much(family, monkeypatch):
    """One plan serves the comparisons in float32 and those in the model's own dtype."""
    monkeypatch.delitem(backends.FASTEST, "cpu")
    model = wrap("test", small_model(family, dtype=torch.bfloat16))
    (attention,) = (fusion for fusion in model.fusions if fusion.part == "attention")
    assert (attention.n_fused, attention.why) == (attention.n_modules, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EXPERTS])
def test_fused_is_as_near_to_float64_as_plain(family, dtype):
    model = small_model(family, dtype=dtype)
    exact = plain_hidden(copy.deepcopy(model).double(), forest := forest_of([30, 8, 40]))
    plain = plain_hidden(model, forest)
    fused = wrap("test", model).forward(forest)

    def error(hidden: torch.Tensor) -> float:
        return float(((hidden.double() - exact).norm(dim=1) / exact.norm(dim=1)).max())

    assert error(fused) <= 1.5 * error(plain) + 1e-6


@pytest.mark.parametrize("family", ["Llama", "Gemma-3", "OLMo-2", "Mixtral", "GPT-2", "gpt-oss (sinks)"])
def test_outside_of_a_pass_the_model_computes_as_before(family):
    model = small_model(family)
    ids = torch.arange(3, 40)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        before = copy.deepcopy(model)(ids).logits
    wrap("test", model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    model.set_attn_implementation(ATTENTION_NAME)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_needed_tokens_only_is_all_tokens_cut_down(family, dtype):
    model = wrap("test", small_model(family, dtype=dtype))
    forest = forest_of([30, 8, 40, 25])
    every = model.forward(forest)
    for needed in (np.arange(20, 70, 2), np.arange(forest.n_tokens), np.array([0, 5]), np.unique(forest.predictors)):
        needed = needed.astype(np.int64)
        got = model.forward(forest, needed)
        if dtype == torch.bfloat16 and model.dtype == dtype and family not in EXPERTS:
            assert torch.equal(got, every[needed])
        else:
            torch.testing.assert_close(got, every[needed], rtol=1e-4, atol=1e-4)


def test_joined_weights_take_no_more_memory():
    model = small_model("Qwen2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrap("test", model)
    attention = model.model.layers[0].self_attn
    storages = {p.untyped_storage().data_ptr() for p in (attention.q_proj.weight, attention.v_proj.weight)}
    assert len(storages) == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_what_computes_something_else_is_kept():
    model = small_model("Llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x, own=mlp.forward: own(x) * 1.001
    norm = model.model.layers[2].input_layernorm
    norm.forward = lambda x, own=norm.forward: own(x - x.mean(-1, keepdim=True) * 0.01)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = model.base_model(ids).last_hidden_state[0]
    loaded = wrap("test", model)
    assert {f.part: f.n_fused for f in loaded.fusions} == {"RMSNorm": 6, "attention": 3, "MLP": 2, "layer": 2}
    assert "LlamaMLP: it computes something else" in next(f.why for f in loaded.fusions if f.part == "MLP")
    (forest,) = pack_forest([ids[0].numpy().astype(np.int32)], [np.zeros(37, np.bool_)], token_budget=100)
    torch.testing.assert_close(loaded.forward(forest), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_later_layer_with_a_setting_of_its_own_is_of_another_kind(dtype):
    """Which large values show only: it is compared with them, though the layers before it were."""
    model = small_model("Llama", dtype=dtype)
    own = type(model.model.layers[0].mlp)

    class Clamped(own):
        def forward(self, x):
            return own.forward(self, x.clamp(-self.limit, self.limit))

    for k, layer in enumerate(model.model.layers):
        layer.mlp.__class__ = Clamped
        layer.mlp.limit = 20.0 if k == 1 else 1e9
    counts = {fusion.part: (fusion.n_fused, fusion.n_modules) for fusion in wrap("test", model).fusions}
    assert counts["MLP"] == (2, 3)


def test_memory_that_runs_out_while_modules_are_compared_is_no_module_that_differs(monkeypatch):
    model = small_model("Llama")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(replacements, "_in_float32", full)
    with pytest.raises(MemoryError):
        wrap("test", model)


def test_a_swapped_gate_an_adapter_and_another_residual_are_kept():
    model = small_model("Llama")
    first, second, third = model.model.layers
    gate, up = first.mlp.gate_proj, first.mlp.up_proj
    first.mlp.forward = lambda x: first.mlp.down_proj(gate(x) * first.mlp.act_fn(up(x)))

    class Adapted(nn.Linear):
        pass

    adapted = Adapted(48, 48, bias=False)
    adapted.weight = second.self_attn.q_proj.weight
    second.self_attn.q_proj = adapted
    own = third.forward
    third.forward = lambda hidden_states, **kwargs: own(hidden_states, **kwargs) + 0.1 * hidden_states
    fusions = {f.part: f for f in wrap("test", model).fusions}
    assert (fusions["MLP"].n_fused, fusions["attention"].n_fused, fusions["layer"].n_fused) == (2, 2, 2)
    assert "no plain linear layer q_proj" in fusions["attention"].why


def test_what_shows_far_away_only_is_kept():
    model = small_model("Llama")
    first, second, _ = (layer.self_attn for layer in model.model.layers)
    own = first.forward

    def scaled(hidden_states, position_ids=None, own=own, **kwargs):
        out, weights = own(hidden_states, position_ids=position_ids, **kwargs)
        return out * (1 + (position_ids[0, -1] >> 12)), weights

    first.forward = scaled
    second.q_proj.register_forward_hook(lambda module, args, out: out.clamp(-8, 8))
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, out: out.clamp(max=7))
    fusions = {f.part: f for f in wrap("test", model).fusions}
    assert fusions["attention"].n_fused == 1
    assert fusions["MLP"].n_fused == 2


def test_a_layer_with_a_tensor_of_its_own_is_kept():
    model = small_model("Llama")
    model.model.layers[1].register_buffer("layer_scalar", torch.ones(1))
    fusion = next(f for f in wrap("test", model).fusions if f.part == "layer")
    assert (fusion.n_fused, fusion.why) == (2, "LlamaDecoderLayer: it has a tensor layer_scalar of its own")


def test_a_copy_of_a_fused_model_has_weights_of_its_own_and_parameters_still_train():
    model = small_model("Llama")
    loaded = wrap("test", model)
    twin = copy.deepcopy(model)
    for parameter in twin.model.layers.parameters():
        parameter.data.zero_()
    forest = forest_of([20, 30])
    assert not torch.equal(wrap("twin", twin).forward(forest), loaded.forward(forest))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_move_are_joined_again():
    model = small_model("Llama")
    loaded, forest = wrap("test", model), forest_of([20, 30])
    before = loaded.forward(forest)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight * 2
    assert not torch.equal(loaded.forward(forest), before)


def test_a_body_that_needs_all_tokens_gets_them():
    model = small_model("Llama")
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(x) + 0 * torch.ones(1, 94, 1)[:, : x.shape[1] + (x.shape[1] < 60)]
    loaded = wrap("test", model)
    assert not loaded.prunes
