"""A GPU that is not there: tensors that say they lie on it, computed on the CPU, and a count of what the host asks.

Whatever is copied to it, a model's weights, and everything made of either says that it is on `cuda:0`, and all that
torch does with it passes here. What would make the host wait for a GPU is counted by name: values that are read,
indices that are looked for, copies back. Triton's kernels run in its interpreter, or are passed over.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from fastcompat.models.base_model import CausalLM
from fastcompat.models.fused_modules import FusedAttention, JoinedLinear
from fastcompat.models.packed_model import PackedModel
from fastcompat.models.reward_model import RewardModel
from fastcompat.ops import nll

GPU = torch.device("cuda:0")

# Operators whose result, or whose shape, the host has to wait for.
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero", "masked_select", "bincount", "allclose"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"}


class OnGpu(Tensor):
    """A tensor that is said to lie on the GPU; `values` has it."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
        )
        made.values = values
        return made

    def __init__(self, values: Tensor) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """As Python sees it. torch itself takes it for the CPU, since it may be built without any other."""
        return GPU

    def cpu(self) -> Tensor:  # type: ignore[override]
        """torch would find that it is there already."""
        return torch.empty_like(self.values).copy_(self)

    def tolist(self) -> Any:
        """torch has none for a subclass."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of a PretendedGpu")


class PretendedGpu(TorchDispatchMode):
    """While it is entered, `to(GPU)` gives tensors of it. `reads`: what the host waited for; `log`: when it did what.

    Memory that nothing was written to is zero, where kernels are passed over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies = 0  # to the GPU
        self.log: list[str] = []
        self.inexact: Counter[str] = Counter()  # products that torch's settings let round on the way

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        there = [x for x in flat if isinstance(x, OnGpu)]
        if there and func.namespace == "fastcompat":  # an operator of ours: what is in it counts
            with self:
                return getattr(nll, f"_{func.overloadpacket.__name__}")._init_fn(*args, **kwargs)
        name = func.overloadpacket.__name__
        asked = kwargs.get("device")
        to_gpu = asked is not None and torch.device(asked).type == "cuda"
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        result_there = bool(there) or to_gpu
        if name == "_to_copy" and there and asked is not None and not to_gpu:
            self.reads["to the host"] += 1
            result_there = False
        elif name == "copy_":
            onto, source = args[0], args[1]
            if isinstance(source, OnGpu) and not isinstance(onto, OnGpu):
                self.reads["to the host"] += 1
                result_there = False
            elif isinstance(onto, OnGpu) and not isinstance(source, OnGpu) and source.ndim:
                self.copies += 1
        elif name == "_to_copy" and to_gpu and not there:
            self.copies += 1
        elif there and name in READS:
            self.reads[name] += 1
            result_there = name not in ("_local_scalar_dense", "equal", "is_nonzero", "item", "allclose")
        elif there and name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.reads[name] += 1
        elif there and name in ("index", "index_put_", "index_put", "_unsafe_index"):
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.reads[f"{name} by a mask"] += 1
        if there:
            apart = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnGpu) and x.ndim]
            if name not in ("copy_", "_to_copy") and any(not x.is_floating_point() for x in apart):
                raise AssertionError(f"{name}: whole numbers of the CPU beside tensors of the GPU")
        args, kwargs = tree_map(lambda x: x.values if isinstance(x, OnGpu) else x, (args, kwargs))
        if there and name in PRODUCTS:
            matmul = torch.backends.cuda.matmul
            reduced = matmul.allow_bf16_reduced_precision_reduction or matmul.allow_fp16_reduced_precision_reduction
            self.inexact[name] += reduced or matmul.fp32_precision == "tf32"
        if name == "histc" and not args[0].is_floating_point():  # which a GPU can do, and a CPU cannot
            result = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        if not result_there:
            return result
        if name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            result.zero_()
        # What is changed in place is the same tensor.
        same = {id(x.values): x for x in there}

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return same[id(x)] if id(x) in same else OnGpu(x)

        return tree_map(placed, result)


def on_gpu(model: PackedModel) -> PackedModel:
    """The model with its weights on the pretended GPU; the one that was given cannot be used any more."""
    modules = [*model.full.modules(), *(model.module.modules() if isinstance(model, RewardModel) else ())]
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, OnGpu):
                    tensors[name] = OnGpu(tensor.detach())
    # Sinks, which a fused attention has of its module.
    for module in modules:
        fused = getattr(inspect.unwrap(getattr(module.forward, "fused", module.forward)), "__closure__", None) or ()
        for cell in fused:
            if isinstance(cell.cell_contents, FusedAttention) and cell.cell_contents.arguments.sinks is not None:
                arguments = cell.cell_contents.arguments
                cell.cell_contents.arguments = replace(arguments, sinks=OnGpu(arguments.sinks.detach()))
    if isinstance(model, CausalLM):
        return replace(model, weight=OnGpu(model.weight), bias=None if model.bias is None else OnGpu(model.bias))
    return model


@contextmanager
def pretended_gpu(*, kernels: bool) -> Iterator[PretendedGpu]:
    """kernels: Triton's kernels compute, in its interpreter, which takes seconds; else their results are zeros."""
    from triton.runtime.interpreter import GridExecutor

    gpu = PretendedGpu()
    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        if kernels:
            args, kwargs = tree_map(lambda x: x.values if isinstance(x, OnGpu) else x, (args, kwargs))
            with _disable_current_modes():
                launch(self, *args, **kwargs)

    class Stream:
        def record_event(self) -> Stream:
            gpu.log.append("queued")
            return self

        def synchronize(self) -> None:
            gpu.log.append("fetched")

    with ExitStack() as patches:
        for owner, name, value in (
            (GridExecutor, "__call__", launched),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_stream", lambda device=None: Stream()),
            (torch.cuda, "device_of", lambda tensor: nullcontext()),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (JoinedLinear, "_where", lambda self: self._places),  # a pretended tensor lies nowhere
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(mock.patch("fastcompat.kernels.linear_tiles._arch", return_value=0))
        patches.enter_context(gpu)
        yield gpu
