"""A model in training is borrowed and given back as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import small_model
from torch import nn

from fastcompat.errors import ModelError
from fastcompat.models import borrowed, wrap
from fastcompat.tokens import pack_forest


def state_of(full: Any) -> dict[str, Any]:
    """All that a training could miss."""
    return {
        "values": {name: value.clone() for name, value in full.state_dict().items()},
        "places": [parameter.data_ptr() for parameter in full.parameters()],
        "same": [id(parameter) for parameter in full.parameters()],
        "gradients": [(parameter.requires_grad, parameter.grad is None) for parameter in full.parameters()],
        "modes": [module.training for module in full.modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in full.modules()],
        "own": [sorted(vars(module)) for module in full.modules()],
        "attention": full.config._attn_implementation,
        "cache": full.config.use_cache,
        "random": torch.get_rng_state().tolist(),
    }


def forest_of() -> Any:
    draw = np.random.default_rng(3)
    stem = draw.integers(3, 300, 9)
    ids = [np.concatenate([stem, draw.integers(3, 300, n)]).astype(np.int32) for n in (7, 12)]
    (forest,) = pack_forest(ids, [np.arange(len(x)) >= 9 for x in ids], token_budget=1 << 20)
    return forest


def in_training(attention: str = "eager") -> Any:
    full = small_model("Llama").train()
    full.set_attn_implementation(attention)
    full.gradient_checkpointing_enable()
    full.enable_input_require_grads()
    full.model.layers[1].eval()  # somebody's frozen layer
    return full


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_is_given_back_as_it_was(attention):
    full = in_training(attention)
    before = state_of(full)
    forest = forest_of()
    with borrowed("live", full, probed=True) as model:
        assert not full.training
        got = model.forward(forest)
        assert not got.requires_grad
    after = state_of(full)
    values = before.pop("values"), after.pop("values")
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())
    assert after == before
    # The same as of a model that is loaded for it, whose modules are fused.
    expected = wrap("loaded", small_model("Llama").eval()).forward(forest)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_its_gradients_are_those_of_before():
    full = in_training()
    ids = torch.arange(3, 40)[None]

    def gradients() -> list[torch.Tensor]:
        full.zero_grad()
        full(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in full.parameters()]

    before = gradients()
    with borrowed("live", full, probed=False) as model:
        model.forward(forest_of())
    assert all(torch.equal(one, two) for one, two in zip(before, gradients(), strict=True))


def test_an_error_gives_it_back_too():
    full = in_training()
    before = state_of(full)
    values = before.pop("values")
    with pytest.raises(RuntimeError, match="mine"), borrowed("live", full, probed=False):
        raise RuntimeError("mine")
    after = state_of(full)
    assert all(torch.equal(value, after["values"][name]) for name, value in values.items())
    del after["values"]
    assert after == before


def test_mixed_precision_is_set_aside():
    """accelerate puts another forward in the place of the class's, which rounds."""
    full = in_training()
    own = full.forward

    def rounding(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return own(*args, **options)

    full.forward = rounding
    with borrowed("live", full, probed=True) as model:
        got = model.forward(forest_of())
    assert full.forward is rounding
    torch.testing.assert_close(got, wrap("loaded", small_model("Llama").eval()).forward(forest_of()))


def test_an_adapted_head_is_refused():
    full = in_training()

    class Adapted(nn.Linear):
        pass

    full.lm_head = Adapted(4, 4)
    with pytest.raises(ModelError, match="LM head is a Adapted"), borrowed("live", full, probed=False):
        pass
