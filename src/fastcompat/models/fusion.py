"""Replaces the slow parts of a Hugging Face module tree by fused ones, where they are the same function.

The tree stays as transformers built it. A module's forward is replaced only after the replacement gave, on random
input, what the module itself gives (`replacements.py`). What does not match stays as it is; `PackedModel.fusions` says
what and why, and so does `fastcompat doctor --base-model`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastcompat.models.forward_pass import ForwardPass
from fastcompat.models.fused_modules import FusedRmsNorm, Mismatch
from fastcompat.models.layer_store import UnreadableError
from fastcompat.models.replacements import (
    Calls,
    fused_attention,
    fused_layer,
    fused_mlp,
    fused_norm,
    fused_whole,
    install,
    whole_kind,
)
from fastcompat.wording import first_sentence

PARTS = ("RMSNorm", "attention", "MLP", "layer")


def is_of_the_machine(error: BaseException) -> bool:
    """Whether it says nothing of the model: weights that could not be read, memory that ran out."""
    return isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError, UnreadableError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """What became of one kind of module."""

    part: str  # "RMSNorm", "attention", "MLP", "layer"
    n_fused: int
    n_modules: int
    why: str | None  # why the rest is kept as it is


class Layers(Protocol):
    """Layers that are not all in memory (`streamed_layers.py`)."""

    def follow(self, run: Callable[[], Tensor], at_each: Callable[[nn.Module, bool], None]) -> Tensor:
        """What `run` returns; `at_each` is called with each layer that has computed, and whether it is the last."""


@torch.no_grad()
def fuse(
    body: nn.Module, run: Callable[[ForwardPass], Tensor], forward: ForwardPass, layers: Layers | None = None
) -> tuple[Fusion, ...]:
    """Replace what can be replaced in `body`; `run` sends a small pack through it, inside `forward`.

    Modules that the pack did not reach keep their forward.
    """
    fuser = _Fuser(forward)
    with fuser.observing(body):
        if layers is None:
            run(forward)
        else:
            layers.follow(lambda: run(forward), lambda layer, last: fuser.fuse(layer.modules(), last=last))
    whole = fuser.layers()
    for layer in whole:
        fuser.fuse(layer.modules(), last=layer is whole[-1])
    fuser.fuse(body.modules(), last=False)  # what is outside of them
    return fuser.report()


class _Fuser:
    """Replaces modules layer by layer, and counts."""

    def __init__(self, forward: ForwardPass) -> None:
        self._calls = Calls(forward=forward)
        self._norms: dict[nn.Module, FusedRmsNorm] = {}
        self._done: set[nn.Module] = set()
        self._noting = False
        self._counts = dict.fromkeys(PARTS, 0)
        self._reasons = {part: Counter[str]() for part in PARTS}

    @contextmanager
    def observing(self, body: nn.Module) -> Iterator[None]:
        """While it is entered, it is noted what the body's modules are called with."""
        calls = self._calls

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._noting:
                return
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            named = dict(bound.arguments)
            for name, parameter in bound.signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    named |= named.pop(name, {})
            calls.arguments[module] = named
            calls.order.setdefault(module, len(calls.order))

        hooks = [
            module.register_forward_pre_hook(remember, with_kwargs=True)
            for module in body.modules()
            if module is not body
        ]
        try:
            with self._noted(True):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _noted(self, noting: bool) -> Iterator[None]:
        """Not while modules are compared: copies of them would be kept."""
        before = self._noting
        self._noting, self._calls.forward.observed = noting, self._calls.observed if noting else None
        try:
            yield
        finally:
            self._noting, self._calls.forward.observed = before, self._calls.observed if before else None

    def layers(self) -> list[nn.Module]:
        """The modules that have attention as a part, in the order of their calls."""
        observed = self._calls.observed
        found = [module for module in self._calls.arguments if any(child in observed for child in module.children())]
        return sorted(found, key=lambda module: self._calls.order[module])

    @torch.no_grad()
    def fuse(self, modules: Iterable[nn.Module], *, last: bool) -> None:
        """Replace what can be replaced of a layer and of all that is in it, or of what is outside of layers.

        last: it is the last layer.
        """
        calls, norms = self._calls, self._norms
        own = [module for module in modules if module in calls.arguments and module not in self._done]
        self._done.update(own)
        with self._noted(False):
            found = self._fuse_norms(own)
            norms |= found
            attention = [module for module in own if module in calls.observed]
            mlps = [module for module in own if hasattr(module, "down_proj") and module not in calls.observed]
            layers = [module for module in own if any(child in calls.observed for child in module.children())]
            kind = None  # of the layer with all its parts
            if (len(attention), len(mlps), len(layers)) == (1, 1, 1):
                kind = whole_kind(layers[0], attention[0], calls, norms)
            if kind in calls.known and not last and self._fuse_whole(layers[0], attention[0], mlps[0]):
                attention, mlps, layers = [], [], []
            self._fuse_each(
                "attention", attention, lambda module: fused_attention(module, calls, calls.observed[module], norms)
            )
            self._fuse_each("MLP", mlps, lambda module: fused_mlp(module, calls))
            whole = self._fuse_each(
                "layer", layers, lambda module: fused_layer(module, calls, norms, last=last and module is layers[-1])
            )
            if kind is not None and whole and mlps[0] in calls.fused_mlps:
                calls.known[kind] = calls.scales[layers[0]]
            for module, norm in found.items():
                install(module, norm)

    def _fuse_whole(self, layer: nn.Module, attention: nn.Module, mlp: nn.Module) -> bool:
        """Whether a layer is of a known kind, and is replaced with its parts."""
        try:
            replacements = fused_whole(layer, attention, mlp, self._calls, self._norms)
        except Exception as error:  # what it is then, is told where its parts are compared one by one
            if is_of_the_machine(error):
                raise
            return False
        for module, forward in replacements.items():
            install(module, forward)
        for part in ("attention", "MLP", "layer"):
            self._counts[part] += 1
        return True

    def _fuse_each(self, part: str, modules: Sequence[nn.Module], build: Callable[[nn.Module], Any]) -> dict[Any, Any]:
        """Install what `build` gives for each module, and count."""
        found = {}
        self._counts[part] += len(modules)
        for module in modules:
            try:
                found[module] = build(module)
                if part != "RMSNorm":
                    install(module, found[module])
            except Exception as error:  # a module that is not what it looks like breaks as it likes
                if is_of_the_machine(error):
                    raise
                self._reasons[part][f"{type(module).__name__}: {_reason(error)}"] += 1
        return found

    def _fuse_norms(self, modules: Sequence[nn.Module]) -> dict[nn.Module, FusedRmsNorm]:
        """Found, and installed when the layer was compared that has them."""
        norms = [
            module
            for module in modules
            if "norm" in type(module).__name__.lower() and next(module.children(), None) is None
        ]
        return self._fuse_each("RMSNorm", norms, lambda module: fused_norm(module, self._calls))

    def report(self) -> tuple[Fusion, ...]:
        return tuple(_report(part, self._counts[part], self._reasons[part]) for part in PARTS)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Mismatch) else f"{type(error).__name__}, {first_sentence(error)}"


def _report(part: str, n_modules: int, reasons: Counter[str]) -> Fusion:
    why = reasons.most_common(1)[0][0] if reasons else None
    return Fusion(part=part, n_fused=n_modules - reasons.total(), n_modules=n_modules, why=why)
