"""A forest as calls of a variable-length attention, exact in float64; a library that is not right is never used."""

from __future__ import annotations

import inspect
import logging
import sys
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fake_flash import (
    FLASH_2,
    FLASH_3,
    FLASH_4,
    FLASH_4_FIRST,
    TORCH_2_11,
    TORCH_2_12,
    FakeLibrary,
    forget,
    install,
    library,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcompat.errors import ArgumentError
from fastcompat.ops import attention_flash, flash_choice, reference
from fastcompat.ops.attention import AttentionPlan, forest_attention
from fastcompat.ops.attention_flash import LIBRARIES, Library, flash_attention, load
from fastcompat.ops.flash_plan import FlashPlan, flash_plan
from fastcompat.tokens.forest import PrefixForest, pack_forest

SERVING = {
    "flash-attn 2.8": ("flash:2", FLASH_2),
    "flash-attn 3": ("flash:3", FLASH_3),
    "flash-attn 4": ("flash:4", FLASH_4),
    "flash-attn 4.0.0b4": ("flash:4", FLASH_4_FIRST),
    "torch 2.11": ("varlen", TORCH_2_11),
    "torch 2.12": ("varlen", TORCH_2_12),
}
TOO_OLD = {
    "flash-attn 2.5": ("flash:2", FLASH_2.replace("softcap=0.0, ", ""), "softcap"),
    "flash-attn 3 of early 2025": ("flash:3", FLASH_3.replace(", return_attn_probs=False", ""), "return_attn_probs"),
    "flash-attn 2.8's cute": (
        "flash:4",
        "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None, "
        "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, pack_gqa=None",
        "max_seqlen_k, max_seqlen_q, return_lse",
    ),
    "torch 2.10": (
        "varlen",
        "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None",
        "scale, window_size",
    ),
}


@pytest.fixture
def installed(monkeypatch):
    """Put a fake into the place of a library: installed(backend, parameters)."""
    forget()
    yield partial(install, monkeypatch)
    forget()


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(flash_choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash_choice, "TOLERANCE", {torch.float64: 1e-10, torch.bfloat16: 0.03})
    monkeypatch.setattr(flash_choice, "_capability", lambda device: 90)


def pack(sequences: list[list[int]]) -> PrefixForest:
    ids = [np.array(x, np.int32) for x in sequences]
    (forest,) = pack_forest(ids, [np.zeros(len(x), np.bool_) for x in ids], token_budget=1 << 30)
    return forest


def conversations(*prompts: tuple[int, list[int]]) -> PrefixForest:
    """A prompt of so many tokens and its responses, no two of which begin alike: one level."""
    sequences = []
    for n, (length, responses) in enumerate(prompts):
        prompt = [1000 + n] * length
        sequences += [prompt + [10 * k + 1] * response for k, response in enumerate(responses)]
    return pack(sequences)


def draw(forest: PrefixForest, *, heads: int = 4, key_heads: int = 2, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(forest.n_tokens, h, width) for h in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).transpose(0, 1) * 2 for shape in shapes]


def forest_tensors(forest: PrefixForest) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(forest.position_ids), torch.from_numpy(forest.subtree_end)


def plan_of(forest: PrefixForest, **options: Any) -> FlashPlan:
    plan = flash_plan(forest.position_ids, forest.subtree_end, **options)
    assert plan is not None
    return plan


def check_exact(of: Library, forest: PrefixForest, plan: FlashPlan, **options: Any) -> None:
    tensors = draw(forest)
    sinks = torch.linspace(-2, 3, 4, dtype=torch.float64) if options.pop("with_sinks", False) else None
    options |= {"scaling": 0.4, "sinks": sinks}
    want = reference.forest_attention(*tensors, *forest_tensors(forest), **options)
    torch.testing.assert_close(flash_attention(of, *tensors, plan, **options), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SERVING)
def test_any_forest_is_exact(name, installed):
    backend, parameters = SERVING[name]
    installed(backend, parameters)
    of = library(backend)
    lengths = st.integers(1, 9)

    @settings(max_examples=15, deadline=None, database=None, derandomize=True)
    @given(
        sequences=st.lists(
            lengths.flatmap(lambda n: st.lists(st.integers(0, 2), min_size=n, max_size=n)), min_size=1, max_size=9
        ),
        price=st.sampled_from([0.0, 1.0, np.inf]),
        sliding_window=st.sampled_from([None, None, 1, 3]),
        softcap=st.sampled_from([None, 3.0] if of.softcap else [None]),
        with_sinks=st.booleans(),
    )
    def check(sequences, price, sliding_window, softcap, with_sinks):
        forest = pack(sequences)
        plan = plan_of(forest, sliding_window=sliding_window, keys_per_merged_query=price)
        options = {"sliding_window": sliding_window, "softcap": softcap, "with_sinks": with_sinks}
        check_exact(of, forest, plan, **options)

    check()


def test_one_level_is_two_calls_without_a_gathered_key(installed, monkeypatch):
    fake = installed("flash:2", FLASH_2)
    monkeypatch.setattr(attention_flash, "MERGED_ROWS", 7)
    forest = conversations((40, [5, 1, 12]), (1, [3, 3]), (6, [9]))
    plan = plan_of(forest, keys_per_merged_query=0)
    assert plan.shape == "trunks"
    assert (plan.own.queries, plan.own.keys) == (None, None)
    assert plan.own.cu_keys is plan.own.cu_queries
    # The last prompt and its only response are one sequence.
    assert sorted(plan.own.cu_queries.diff().tolist()) == [1, 1, 3, 3, 5, 12, 15, 40]
    assert plan.trunks is not None
    assert plan.trunks.cu_queries.diff().tolist() == [18, 6]
    assert plan.trunks.cu_keys.diff().tolist() == [40, 1]
    for with_sinks in (False, True):
        check_exact(library("flash:2"), forest, plan, with_sinks=with_sinks)
    assert fake.calls == 4


def test_what_shares_nothing_is_one_call_in_place(installed):
    fake = installed("flash:3", FLASH_3)
    forest = pack([[1, 1, 1], [2], [3, 3, 3, 3]])
    plan = plan_of(forest)
    assert plan.shape == "alone"
    assert plan.own.cu_queries.tolist() == [0, 3, 4, 8]
    check_exact(library("flash:3"), forest, plan)
    assert fake.calls == 1


def test_a_trunk_must_pay():
    """A prompt of 4,000 tokens is not gathered for 30 responses; one of 40 is, and so is what all prompts share."""
    assert plan_of(conversations((4000, [100] * 30))).shape == "trunks"
    assert plan_of(conversations((40, [100] * 30))).shape == "paths"
    both = plan_of(
        pack([[7] * 9 + [n] * length + [k] * 50 for n, length in ((1, 3000), (2, 20)) for k in range(10, 40)])
    )
    assert both.trunks is not None
    assert both.trunks.cu_keys.tolist() == [0, 3009]
    # Under a window there is none, and no key is gathered that no query reaches.
    windowed = plan_of(conversations((4000, [100] * 30)), sliding_window=65)
    assert windowed.shape == "paths"
    assert windowed.own.cu_keys.diff().max() == 4000
    assert sorted(windowed.own.cu_keys.diff().tolist())[:-1] == [64 + 100] * 30


def test_a_pack_that_would_be_gathered_too_often_is_none():
    comb = pack([[1] * n + [2] for n in range(1, 400)])
    assert flash_plan(comb.position_ids, comb.subtree_end, keys_per_merged_query=np.inf) is None
    assert flash_plan(np.empty(0, np.int64), np.empty(0, np.int32)) is None


@pytest.mark.parametrize("name", SERVING)
def test_signatures_as_read_take_what_is_given(name, installed):
    backend, parameters = SERVING[name]
    fake, of = installed(backend, parameters), library(backend)
    assert load(of) is fake.function
    forest = conversations((9, [2, 3]))
    plan = plan_of(forest, keys_per_merged_query=0)
    for call, causal in ((plan.own, True), (plan.trunks, False)):
        given = of.arguments(
            call, causal=causal, scaling=0.5, sliding_window=None, softcap=2.0 if of.softcap else None, lse=True
        )
        inspect.signature(fake.function).bind(None, None, None, **given)


def test_this_torch_takes_what_is_given_or_is_refused():
    load.cache_clear()
    function = load(of := library("varlen"))
    if isinstance(function, str):
        assert torch.__version__.startswith("2.10."), function
    else:
        given = of.arguments(
            plan_of(pack([[1, 2]])).own, causal=True, scaling=0.5, sliding_window=None, softcap=None, lse=True
        )
        inspect.signature(function).bind(None, None, None, **given)


@pytest.mark.parametrize("name", TOO_OLD)
def test_older_signatures_are_refused(name, installed):
    backend, parameters, missing = TOO_OLD[name]
    installed(backend, parameters)
    assert load(library(backend)) == f"this version takes no {missing}"


def test_what_is_not_there_is_told(installed, monkeypatch):
    for of in LIBRARIES[:3]:
        assert load(of) == "it is not installed"
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # what flash-attn 4 leaves
    load.cache_clear()
    assert load(library("flash:2")) == "it is not installed"


def broken(fake: FakeLibrary, how: str) -> None:
    if how == "top left":
        fake.top_left = True
    elif how == "base 2":
        fake.lse_unit = 1 / np.log(2)
    else:
        fake.error = RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("how", "why"), [("top left", "something else"), ("base 2", "something else"), ("no kernel", "no kernel image")]
)
def test_a_library_that_is_not_right_serves_nothing(how, why, installed, on_a_cpu, monkeypatch, caplog):
    fake = installed("flash:2", FLASH_2)
    broken(fake, how)
    forest = conversations((9, [2, 3]))
    tensors, plan = draw(forest), AttentionPlan.create(*forest_tensors(forest))
    with pytest.raises(ArgumentError, match=rf"flash-attn 2: .*{why}.*leave backend out"):
        forest_attention(*tensors, plan, scaling=0.4, backend="flash")
    tried = fake.calls
    monkeypatch.setattr(flash_choice, "MEASURED", {(90, 8): {"paths": "flash:2"}})
    ours = forest_attention(*tensors, plan, scaling=0.4, backend="torch")
    with caplog.at_level(logging.WARNING, logger="fastcompat"):
        for _ in range(2):
            assert torch.equal(forest_attention(*tensors, plan, scaling=0.4), ours)
    (record,) = caplog.records
    assert "flash-attn 2" in record.getMessage()
    assert why in record.getMessage()
    assert fake.calls == tried  # what was found out is kept
    assert flash_choice.used_libraries(torch.device("cpu"), torch.float64) == []


def test_the_first_that_is_right_serves_a_name(installed, on_a_cpu):
    for name in ("flash-attn 2.8", "flash-attn 3", "flash-attn 4"):
        fake = installed(*SERVING[name])
        if name == "flash-attn 3":
            broken(fake, "top left")
    forest = conversations((9, [2, 3]), (5, [1, 1, 4]))
    tensors = draw(forest)
    got = forest_attention(
        *tensors, plan := AttentionPlan.create(*forest_tensors(forest)), scaling=0.4, backend="flash"
    )
    want = reference.forest_attention(*tensors, *forest_tensors(forest), scaling=0.4)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert [name for (name, _), why in flash_choice._problems.items() if why is None] == ["flash:4"]
    some = plan.for_queries(torch.tensor([1, 4]))
    with pytest.raises(ArgumentError, match="not for some of them"):
        forest_attention(tensors[0][:, [1, 4]], *tensors[1:], some, scaling=0.4, backend="flash")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16 only"),
        ({"device": torch.device("meta")}, "GPUs only"),
        ({"width": 12, "value_width": 12}, "multiple of 8"),
        ({"width": 264, "value_width": 264}, "at most 256"),
        ({"value_width": 8}, "values as wide as keys"),
        ({"softcap": 30.0}, "no soft cap"),
    ],
)
def test_what_a_library_does_not_do(change, why, installed, on_a_cpu):
    fake = installed("varlen", TORCH_2_11)
    kind = {
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "heads": 2,
        "key_heads": 1,
        "width": 64,
        "value_width": 64,
        "scaling": 0.125,
        "softcap": None,
        "sinks": False,
    }
    assert why in str(flash_choice.problem(library("varlen"), flash_choice.AttentionKind(**(kind | change))))
    assert fake.calls == 0


def test_a_measurement_chooses_by_shape_of_pack(installed, on_a_cpu, monkeypatch, caplog):
    fake = installed("flash:4", FLASH_4)
    monkeypatch.setattr(flash_choice, "MEASURED", {(90, 8): {"alone": "flash:4"}, (90, 64): {"paths": "varlen"}})
    assert flash_choice.library_versions() == {"flash-attn 4": "none"}
    sharing, apart = conversations((9, [2, 3])), conversations((9, [2]), (3, [5]))
    plans = [AttentionPlan.create(*forest_tensors(forest)) for forest in (sharing, apart)]
    forest_attention(*draw(sharing), plans[0], scaling=0.4)
    tried = fake.calls
    forest_attention(*draw(sharing), plans[0], scaling=0.4)
    assert fake.calls == tried > 0
    forest_attention(*draw(apart), plans[1], scaling=0.4)
    assert fake.calls == tried + 1
    assert flash_choice.used_libraries(torch.device("cpu"), torch.float64) == ["flash-attn 4 none"]
    assert flash_choice.used_libraries(torch.device("cpu"), torch.bfloat16) == []
    # What it does not compute is ours without a word.
    with caplog.at_level(logging.WARNING, logger="fastcompat"):
        forest_attention(*(x.float() for x in draw(apart)), plans[1], scaling=0.4)
    assert (fake.calls, caplog.records) == (tried + 1, [])
