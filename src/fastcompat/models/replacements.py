"""What may stand in for a module's forward, and the comparisons that it has to pass.

Norms, MLPs and attention are compared in float32 on a copy of the module, the first of each kind; all of them, and
whole layers, in the model's own dtype.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcompat.models.forward_pass import AttentionArguments, ForwardPass, current_pass, forward_pass
from fastcompat.models.fused_modules import (
    ROTARY_LAYOUTS,
    FusedAttention,
    FusedLayer,
    FusedMlp,
    FusedRmsNorm,
    Mismatch,
    adjoining,
)

# Largest relative difference of a token's values. A wrong formula shows as 0.01 and more; in float32 the order of sums
# shows as 1e-6.
FLOAT32_TOLERANCE = 2e-5
LARGE_TOLERANCE = 1e-3
# How much larger values are, and how much later positions, that must not make a difference either.
LARGE, LATE = 30.0, 1 << 17
POSITIONS = ("position_ids", "cache_position")
LAYER_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.004, torch.float64: 2e-5}


@dataclass(slots=True, kw_only=True, eq=False)
class Calls:
    """A forward pass as its modules saw it."""

    forward: ForwardPass
    observed: dict[nn.Module, AttentionArguments] = field(default_factory=dict)  # what attention was asked
    arguments: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)  # of each module's last call, by name
    order: dict[nn.Module, int] = field(default_factory=dict)
    fused_mlps: set[nn.Module] = field(default_factory=set)
    scales: dict[nn.Module, Tensor] = field(default_factory=dict)  # of layers: what they add, over what comes in
    # How modules of one kind are replaced, once the replacement was compared with the first of them in float32.
    known: dict[Hashable, Any] = field(default_factory=dict)


def _kind(module: nn.Module, *more: Hashable) -> Hashable:
    """Equal for modules that are the same function of their weights, as far as can be seen."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    shapes = tuple((name, tuple(own.shape), own.dtype) for name, own in tensors)
    settings = sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and name != "layer_idx"
    )
    return type(module), vars(module).get("forward"), shapes, tuple(settings), *more


def fused_norm(module: nn.Module, calls: Calls) -> FusedRmsNorm:
    arguments = calls.arguments[module]
    if len(arguments) != 1:
        raise Mismatch("it takes more than what it normalises")
    x = _random_like(next(iter(arguments.values())))
    candidates = FusedRmsNorm.candidates(module)
    if candidates[0].weight.dtype != x.dtype:
        raise Mismatch("its weight is of another dtype than what it normalises")
    kind = _kind(module, x.ndim)
    known: FusedRmsNorm | None = candidates[calls.known[kind]] if kind in calls.known else None
    if known is not None and _agree(known(None, x), module(x), LAYER_TOLERANCE[x.dtype]):
        return known
    exact = _in_float32(module)
    # A weight of ones or zeros hides what is done with it.
    generator = torch.Generator(x.device).manual_seed(20)
    for parameter in exact.parameters():
        parameter.normal_(generator=generator)
    for k, candidate in enumerate(candidates):
        if _agree(candidate.of(exact)(None, x.float()), exact(x.float()), FLOAT32_TOLERANCE):
            calls.known[kind] = k
            return candidate
    raise Mismatch("it computes something else than RMSNorm")


def fused_mlp(module: nn.Module, calls: Calls) -> Callable[..., Any]:
    arguments = calls.arguments[module]
    if len(arguments) != 1:
        raise Mismatch("it takes more than hidden states")
    x = _random_like(next(iter(arguments.values()))).float()
    if x.ndim != 3:
        raise Mismatch("it takes no [1, T, D]")
    FusedMlp.parts(module)  # found unfit before anything is copied
    kind = _kind(module)
    if kind not in calls.known:
        exact = _in_float32(module)
        fused = FusedMlp(exact)
        for values in (x, LARGE * x):
            if not _agree(_call(fused, calls.forward, values), exact(values), FLOAT32_TOLERANCE):
                raise Mismatch("it computes something else than down(act(gate(x)) * up(x))")
        del exact, fused
    forward = _mlp_forward(FusedMlp(module))
    _compare_in_place(module, forward, calls)
    calls.known[kind] = None
    calls.fused_mlps.add(module)
    return forward


def _mlp_forward(fused: FusedMlp) -> Callable[..., Any]:
    def forward(context: ForwardPass, *args: Any, **kwargs: Any) -> Tensor:
        return fused(context, *args, *kwargs.values())

    return forward


def fused_attention(
    module: nn.Module, calls: Calls, arguments: AttentionArguments, norms: dict[nn.Module, FusedRmsNorm]
) -> Callable[..., Any]:
    passed_on = dict(calls.arguments[module])
    x = _random_like(passed_on.pop("hidden_states", None)).float()
    named, found, kind = _attention_kind(module, calls, arguments, norms)
    # What it keeps must not be a part of the slot that the next layer is read into.
    kept = replace(arguments, sinks=None if arguments.sinks is None else arguments.sinks.clone())
    if kind in calls.known:
        forward = _attention_forward(FusedAttention(module, kept, found, calls.known[kind]))
        with suppress(Mismatch, RuntimeError):  # of another kind all the same
            _compare_in_place(module, forward, calls)
            return forward
    exact = _in_float32(module)
    passed_on = {name: _to_float32(value) for name, value in passed_on.items()}
    in_float32 = replace(arguments, sinks=None if arguments.sinks is None else arguments.sinks.float())
    with forward_pass(calls.forward):
        result = exact(hidden_states=x, **passed_on)
    if not isinstance(result, tuple) or len(result) != 2:
        raise Mismatch("it returns more than its output")
    if any(norm is not None and norm not in norms for norm in named):
        raise Mismatch("its norms of queries and keys are kept as they are")
    exact_norms = [
        None if norm is None else norm.of(getattr(exact, name))
        for norm, name in zip(found, ("q_norm", "k_norm"), strict=True)
    ]
    embeddings = passed_on.get("position_embeddings")
    for rotary in ROTARY_LAYOUTS:
        fused = FusedAttention(exact, in_float32, exact_norms, rotary)
        try:
            got = _call(fused, calls.forward, x, embeddings)
        except (Mismatch, RuntimeError):  # the shapes are not this layout's
            continue
        if _agree(got, result[0], FLOAT32_TOLERANCE):
            _compare_far_away(exact, fused, calls, x, passed_on)
            forward = _attention_forward(FusedAttention(module, kept, found, rotary))
            _compare_in_place(module, forward, calls)
            calls.known[kind] = rotary
            return forward
    raise Mismatch("it computes something else than attention after a rotary embedding by halves")


def _attention_kind(
    module: nn.Module, calls: Calls, arguments: AttentionArguments, norms: dict[nn.Module, FusedRmsNorm]
) -> tuple[list[Any], list[FusedRmsNorm | None], Hashable]:
    """Its norms of queries and keys, what replaces them, and of what kind it is."""
    named = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    found = [None if norm is None else norms.get(norm) for norm in named]
    asked = replace(arguments, sinks=None), arguments.sinks is None, tuple(sorted(calls.arguments[module]))
    offsets = tuple((norm is None, None if own is None else own.offset) for norm, own in zip(named, found, strict=True))
    return named, found, _kind(module, asked, offsets)


def _compare_far_away(
    exact: nn.Module, fused: FusedAttention, calls: Calls, x: Tensor, passed_on: dict[str, Any]
) -> None:
    """Mismatch where large values or late positions show what small ones hide: a clamp, a scale that grows."""
    late = {name: passed_on[name] + LATE for name in POSITIONS if isinstance(passed_on.get(name), Tensor)}
    with forward_pass(calls.forward):
        here, there = exact(hidden_states=x, **passed_on)[0], exact(hidden_states=x, **(passed_on | late))[0]
        large = exact(hidden_states=LARGE * x, **passed_on)[0]
    if not torch.equal(here, there):
        raise Mismatch("it depends on positions by more than its rotary embedding")
    got = _call(fused, calls.forward, LARGE * x, passed_on.get("position_embeddings"))
    # Softmax over such large logits is all or nothing: a few near-ties may fall either way.
    if not _agree(got, large, LARGE_TOLERANCE, by_median=True):
        raise Mismatch("with large values it computes something else")


def _attention_forward(fused: FusedAttention) -> Callable[..., Any]:
    def forward(
        context: ForwardPass,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        return fused(context, hidden_states, position_embeddings), None

    return forward


def fused_layer(
    module: nn.Module, calls: Calls, norms: dict[nn.Module, FusedRmsNorm], *, last: bool
) -> Callable[..., Any]:
    _refuse_own_tensors(module)
    passed_on = dict(calls.arguments[module])
    x = _random_like(passed_on.pop("hidden_states", None))
    fused = FusedLayer(module, norms, last=last)
    tolerance = LAYER_TOLERANCE[x.dtype]
    with forward_pass(calls.forward):
        # Scaled so that what the layer adds weighs as much as what comes in.
        added = module(x, **passed_on) - x
        calls.scales[module] = added.float().norm() / x.float().norm()
        x = x * calls.scales[module].to(x.dtype)
        expected = module(x, **passed_on)
    if not isinstance(expected, Tensor):
        raise Mismatch("it returns more than hidden states")
    # Of experts a near-tie may choose others.
    experts = fused.mlp not in calls.fused_mlps
    if not _agree(_call(fused, calls.forward, x, **passed_on), expected, tolerance, by_median=experts):
        raise Mismatch("it does not add attention and MLP to its input one after the other")
    if last:
        needed = torch.arange(1, x.shape[1], 2, device=x.device)
        pruned = replace(calls.forward, needed=calls.forward.plan.for_queries(needed))
        if not _agree(_call(fused, pruned, x, **passed_on), expected[:, needed], tolerance, by_median=experts):
            raise Mismatch("computed for some tokens only it gives something else")
    return _layer_forward(module, fused)


def _refuse_own_tensors(layer: nn.Module) -> None:
    own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    if own:
        raise Mismatch(f"it has a tensor {own[0][0]} of its own")


def _layer_forward(module: nn.Module, fused: FusedLayer) -> Callable[..., Any]:
    names = list(inspect.signature(module.forward).parameters)

    def forward(context: ForwardPass, *args: Any, **kwargs: Any) -> Tensor:
        named = dict(zip(names, args, strict=False)) | kwargs
        return fused(context, named.pop("hidden_states"), **named)

    return forward


def whole_kind(layer: nn.Module, attention: nn.Module, calls: Calls, norms: dict[nn.Module, FusedRmsNorm]) -> Hashable:
    """Of what kind a layer with all its parts is."""
    _, _, kind = _attention_kind(attention, calls, calls.observed[attention], norms)
    return _kind(layer, kind, tuple((name, _kind(part)) for name, part in layer.named_modules() if part is not layer))


def fused_whole(
    layer: nn.Module,
    attention: nn.Module,
    mlp: nn.Module,
    calls: Calls,
    norms: dict[nn.Module, FusedRmsNorm],
) -> dict[nn.Module, Callable[..., Any]]:
    """What replaces a layer and its parts, of a kind of which all were compared one by one; compared together.

    Mismatch where they are to be compared one by one all the same. None of them is installed.
    """
    _refuse_own_tensors(layer)
    passed_on = dict(calls.arguments[layer])
    x = _random_like(passed_on.pop("hidden_states", None))
    x = x * calls.known[whole_kind(layer, attention, calls, norms)].to(x.dtype)
    with forward_pass(calls.forward):
        expected = layer(x, **passed_on)
        share = float((expected - x).float().norm() / x.float().norm())
    if not 0.1 <= share <= 10.0:
        raise Mismatch("what it adds is of another size")
    arguments = calls.observed[attention]
    kept = replace(arguments, sinks=None if arguments.sinks is None else arguments.sinks.clone())
    _, found, attention_kind = _attention_kind(attention, calls, arguments, norms)
    parts = {
        attention: _attention_forward(FusedAttention(attention, kept, found, calls.known[attention_kind])),
        mlp: _mlp_forward(FusedMlp(mlp)),
    }
    own = {part: part.forward for part in parts}
    fused = FusedLayer(layer, norms, last=False)
    try:
        for part, forward in parts.items():
            install(part, forward)
        got = _call(fused, calls.forward, x, **passed_on)
    finally:
        for part, forward in own.items():
            part.forward = forward
    if not _agree(got, expected, LAYER_TOLERANCE[x.dtype]):
        raise Mismatch("it gives something else than its replacements")
    calls.fused_mlps.add(mlp)
    return parts | {layer: _layer_forward(layer, fused)}


def _call(fused: Callable[..., Tensor], forward: ForwardPass, *args: Any, **kwargs: Any) -> Tensor:
    with forward_pass(forward):
        return fused(forward, *args, **kwargs)


def _compare_in_place(module: nn.Module, fused: Callable[..., Any], calls: Calls) -> None:
    """Mismatch unless both give the same for random input in the model's own dtype."""
    arguments = dict(calls.arguments[module])
    name = next(iter(arguments))
    arguments[name] = _random_like(arguments[name])
    with forward_pass(calls.forward):
        results = module(**arguments), fused(calls.forward, **arguments)
    expected, got = (result[0] if isinstance(result, tuple) else result for result in results)
    if not _agree(got, expected, LAYER_TOLERANCE[expected.dtype], by_median=True):
        raise Mismatch("in the model's own dtype it gives something else")


def install(module: nn.Module, fused: Callable[..., Any]) -> None:
    """From now on `fused` computes for `module` inside a forward pass of ours, and its own forward elsewhere."""
    module.forward = _Replacement(module.forward, fused)


class _Replacement:
    """A module's forward and what stands in for it; a deep copy of the module has its own forward again."""

    def __init__(self, own: Callable[..., Any], fused: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self.own, self.fused = own, fused

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = current_pass()
        return self.own(*args, **kwargs) if context is None else self.fused(context, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        own: Callable[..., Any] = copy.deepcopy(self.own, memo)
        return own


def _in_float32(module: nn.Module) -> nn.Module:
    """A copy whose weights lie in one block, those that are joined side by side: they are not there twice."""
    weights = dict(module.named_parameters())
    sizes = [own.numel() for own in weights.values()]
    block = torch.empty(sum(sizes), device=next((own.device for own in weights.values()), None))
    memo: dict[int, Any] = {}
    begin = 0
    for name in adjoining(list(weights)):
        own = weights[name]
        place = block[begin : begin + own.numel()].view(own.shape)
        memo[id(own)] = nn.Parameter(place.copy_(own.detach()), requires_grad=False)
        begin += own.numel()
    return copy.deepcopy(module, memo).float()


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return tuple(_to_float32(item) for item in value) if isinstance(value, tuple) else value


def _random_like(x: Any) -> Tensor:
    """Standard normal, the same on every machine."""
    if not isinstance(x, Tensor):
        raise Mismatch("it takes no hidden states")
    generator = torch.Generator().manual_seed(20)
    return torch.randn(x.shape, generator=generator).to(x)


def _agree(got: Any, expected: Any, tolerance: float, *, by_median: bool = False) -> bool:
    """Whether rows [..., D] are that near to each other; their median, where a near-tie may choose other experts."""
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    difference = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1).clamp_min(1e-300)
    return float(difference.median() if by_median else difference.max()) <= tolerance
