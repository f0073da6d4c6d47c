"""Every family on a GPU that is not there: fake tensors go all the way, and tell devices, dtypes and host reads apart.

A fake tensor has shape, dtype and device but no values. Torch refuses to mix devices or dtypes as it would on a GPU,
and whoever wants to see a value, which on a GPU waits for all that is queued, gets an error. Kernels are not launched:
their launchers run and check what they are handed, and a launch checks that every tensor of it lies on the GPU.

Loading may read values (does a replacement compute what its module computes?): there each comparison is answered as it
was on the CPU. The pass over a pack may not.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, small_model
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastcompat.models import packed_model, replacements
from fastcompat.models.base_model import wrap
from fastcompat.ops import AttentionPlan, backends
from fastcompat.ops.nll import STATISTICS
from fastcompat.ops.one_copy import _replaced, _tensors
from fastcompat.tokens import PrefixForest, pack_forest

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from fastcompat.kernels.linear_nll import linear_nll

# In the GPU's place: torch for CPUs cannot slice a tensor that says it lies on one.
GPU = torch.device("meta")

# Where joined weights lie is asked of tensors that lie nowhere: all at 0, so they stay joined.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

# Left out: where transformers itself reads a value on its way, so that no mend of ours could make it pass.
BEYOND = {
    "Phi-3 (LongRoPE)": "transformers reads the largest position in every pass, to choose the frequencies",
}


def pack() -> PrefixForest:
    """Three responses to one prompt, and a conversation that shares nothing."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(3, VOCABULARY, 20)
    ids = [np.concatenate([prompt, draw.integers(3, VOCABULARY, n)]).astype(np.int32) for n in (30, 18, 5)]
    ids.append(draw.integers(3, VOCABULARY, 40).astype(np.int32))
    (forest,) = pack_forest(ids, [np.arange(len(x)) >= 20 for x in ids], token_budget=1 << 20)
    return forest


# Two layers where a family needs no more to show all that it has.
FEWER = {family: {"num_hidden_layers": 2} for family in FAMILIES} | {
    "Gemma-3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma-4 (a head width per layer)": {},
    "Gemma-4 (shared keys, inputs per layer)": {},
    "GPT-2": {"n_layer": 2},
}


class Answers:
    """What comparisons of tensors answered on the CPU, by shape in their order; given where there are no values."""

    COMPARISONS = ((replacements, "_agree"), (torch, "allclose"), (torch, "equal"))

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], list[bool]] = defaultdict(list)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in self.COMPARISONS:
                patch.setattr(module, name, self._note(name, getattr(module, name)))
            yield

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in self.COMPARISONS:
                patch.setattr(module, name, self._give(name))
            yield

    def _note(self, name, compare):
        def noted(a, b, *args, **kwargs):
            answer = compare(a, b, *args, **kwargs)
            self.known[name, a.shape, b.shape].append(bool(answer))
            return answer

        return noted

    def _give(self, name):
        def given(a, b, *args, **kwargs):
            assert (a.device, a.dtype) == (b.device, b.dtype), f"{name}: {a.device, a.dtype}, {b.device, b.dtype}"
            assert self.known[name, a.shape, b.shape], f"{name} of {a.shape} and {b.shape} was not asked on the CPU"
            return self.known[name, a.shape, b.shape].pop(0)

        return given


def with_tensors(module: torch.nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """The module itself, its parameters and buffers converted, as `to` does it; other tensors stay as they are."""
    parameters = {
        id(parameter): torch.nn.Parameter(convert(parameter), requires_grad=False) for parameter in module.parameters()
    }
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else parameters[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else convert(buffer)
    return module


def in_float32(module: torch.nn.Module) -> torch.nn.Module:
    return with_tensors(copy.deepcopy(module), lambda x: x.float() if x.is_floating_point() else x)


class ProductsOfOneDtype(TorchDispatchMode):
    """Fake tensors do not mind what every device refuses: a product of two dtypes."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.PRODUCTS:
            dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func} of several dtypes: {dtypes}")
        return func(*args, **(kwargs or {}))


class FakeGpu:
    """Where tensors have no values, and the names of the kernels that were launched."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.launched: set[str] = set()
        self._moved: dict[int, tuple[Any, Any]] = {}  # the original too, so that its id stays its own

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        def launch(kernel, *args, grid, warmup=False, **kwargs):
            for name, value in (dict(zip(kernel.arg_names, args, strict=False)) | kwargs).items():
                if isinstance(value, torch.Tensor):
                    assert isinstance(value, FakeTensor), f"{kernel.fn.__name__}: {name} was left on the host"
                    assert value.device == GPU, f"{kernel.fn.__name__}: {name} lies on {value.device}"
            self.launched.add(kernel.fn.__name__)

        with pytest.MonkeyPatch.context() as patch, self.mode, ProductsOfOneDtype():
            patch.setattr(InterpretedFunction, "run", launch)
            patch.setitem(backends.FASTEST, GPU.type, "triton")
            # A module's copy stays in the mode that it was made in.
            patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
            yield

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._moved:
            with unset_fake_temporarily():
                plain = tensor.detach()
            fake = self.mode.from_tensor(plain)
            with self.mode:
                fake = fake.to(GPU)
            self._moved[id(tensor)] = tensor, fake
        return self._moved[id(tensor)][1]

    def copied(self, structure: Any) -> Any:
        """As `OneCopy` does."""
        return _replaced(structure, {id(tensor): self.moved(tensor) for tensor in _tensors(structure)})


@contextlib.contextmanager
def loading(gpu: FakeGpu) -> Iterator[None]:
    """What is planned is planned on the host, with what attention reads of it."""
    plan_pack, summary = packed_model.plan_pack, AttentionPlan.summary
    planned: list[AttentionPlan] = []

    def plan(*args, **kwargs):
        with unset_fake_temporarily():
            made = plan_pack(*args, **kwargs)
        planned.append(made.attention)
        return made

    class Copy:
        def __init__(self, structure, device):
            self.structure = structure

        def to(self, device):
            return gpu.copied(self.structure)

    def summarised(self, sliding_window, query_block=None):
        """Loading may wait; which tokens are the queries makes no difference to shapes."""
        with unset_fake_temporarily():
            plan = planned[-1]
            if self.query_index is not None:
                plan = plan.for_queries(torch.arange(len(self.query_index)))
            return gpu.copied(summary(plan, sliding_window, query_block))

    generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        # A GPU's own needs a GPU; what is drawn has no values either way.
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        # What torch does for `float()` goes wrong with some fake parameters.
        patch.setattr(replacements, "_in_float32", in_float32)
        patch.setattr(packed_model, "plan_pack", plan)
        patch.setattr(packed_model, "OneCopy", Copy)
        patch.setattr(AttentionPlan, "summary", summarised)
        yield


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in BEYOND])
def test_a_pack_goes_through_without_a_value_being_read(family, caplog):
    dtype = torch.bfloat16
    caplog.set_level(logging.DEBUG, logger="fastcompat")  # says why nothing was fused
    answers, gpu, forest = Answers(), FakeGpu(), pack()
    full = small_model(family, dtype=dtype, **FEWER[family])
    with answers.noted():
        on_cpu = wrap(family, copy.deepcopy(full))
    with_tensors(full, gpu.moved)
    with gpu.entered():
        with loading(gpu), answers.given():
            model = wrap(family, full)
        assert model.fusions == on_cpu.fusions, model.fusions
        assert (model.prunes, model.windows) == (on_cpu.prunes, on_cpu.windows)
        gpu.launched.clear()
        with unset_fake_temporarily():
            plan = packed_model.plan_pack(
                forest, forest.predictors, prunes=model.prunes, windows=model.windows, device=GPU
            )
        plan = gpu.copied(plan)
        hidden = model.hidden(plan)
        found = model.statistics(hidden, plan.targets, STATISTICS)
        # The operator's own body is not run where tensors are fake.
        launched = linear_nll(hidden, model.weight, plan.targets, bias=model.bias, all_statistics=True)
    assert (hidden.device, hidden.dtype, hidden.shape) == (GPU, dtype, (len(forest.targets), model.weight.shape[1]))
    for values in (found, launched):
        assert (values.device, values.dtype) == (GPU, torch.float32)
        assert values.shape == (len(STATISTICS), len(forest.targets))
    assert {"_attention_kernel", "_target_kernel", "_range_kernel", "_merge_kernel"} <= gpu.launched


def test_what_is_read_or_lies_apart_is_found():
    gpu = FakeGpu()
    values, others = gpu.moved(torch.ones(3)), torch.ones(3)
    with gpu.entered():
        with pytest.raises(DataDependentOutputException):
            values.max().item()
        with pytest.raises(DataDependentOutputException):
            bool((values > 0).any())
        with pytest.raises(DynamicOutputShapeException):
            torch.nonzero(values)
        with pytest.raises(RuntimeError, match="devices"):
            values + gpu.mode.from_tensor(others)
        with pytest.raises(AssertionError, match="convert all Tensors"):
            values + others
        with pytest.raises(RuntimeError, match="dtypes"):
            torch.nn.functional.linear(values[None], values[None].bfloat16())
