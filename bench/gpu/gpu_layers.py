"""The element-wise kernels of a decoder layer beside their peers.

Dimension key: T packed tokens, D hidden size, H query heads, K key heads, C head width, I inner width of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import COPY, Calls, Finding, in_turn
from gpu_variants import MLP_PIECES
from torch import Tensor

from fastcompat.kernels.elementwise import gated, rms_norm, rotate_
from fastcompat.ops import reference

EPS = 1e-6
CHECKED = 64  # tokens compared with float64


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The widths of a model's decoder layer."""

    model: str
    hidden: int
    heads: int
    key_heads: int
    head_width: int
    inner: int


def layers(device: str) -> list[Layer]:
    if device == "cpu":
        return [Layer(model="tiny", hidden=48, heads=3, key_heads=1, head_width=16, inner=40)]
    return [
        Layer(model="Qwen2.5-0.5B", hidden=896, heads=14, key_heads=2, head_width=64, inner=4864),
        Layer(model="Llama-3.2-3B", hidden=3072, heads=24, key_heads=8, head_width=128, inner=8192),
        Layer(model="SmolLM2-135M", hidden=576, heads=9, key_heads=3, head_width=64, inner=1536),
    ]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute something: the call that is timed, and the rows [n, ...] that are checked, of its result."""

    call: Callable[[], Any]
    checked: Callable[[Any], Tensor]


Contenders = dict[str, Contender]


def errors(contenders: Contenders, want: Tensor) -> Finding:
    """Of the checked rows against float64: the largest error, and the root mean square over that of what is right."""
    found: Finding = {}
    for name, contender in contenders.items():
        try:
            off = contender.checked(contender.call()).double() - want
            rms = off.square().mean().sqrt() / want.square().mean().sqrt()
            found[name] = {"at most": float(off.abs().max()), "rms, relatively": float(rms)}
        except Exception as error:  # a peer of another version, or no memory for it: the timings say so too
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return found


def compiled(function: Callable[..., Any], device: str, wanted: bool) -> Callable[..., Any] | None:
    """torch.compile for the shapes that it is called with and no others; None on a CPU, or where it is not wanted."""
    return torch.compile(function, dynamic=False) if wanted and device != "cpu" else None


@torch.no_grad()
def elementwise_beside_its_peers(device: str, *, compiling: bool = False) -> Iterator[Finding]:
    """compiling: also torch.compile, which takes some seconds a case."""
    n_tokens = 20 if device == "cpu" else 16_384
    for layer in layers(device):
        torch.manual_seed(0)
        cases = (
            rms_norm_case(layer, n_tokens, device, with_residual=False, compiling=compiling),
            rms_norm_case(layer, n_tokens, device, with_residual=True, compiling=compiling),
            head_norm_case(layer, n_tokens, device, compiling=compiling),
            rotate_case(layer, n_tokens, device, compiling=compiling),
            gated_case(layer, n_tokens, device, activation="silu", compiling=compiling),
            gated_case(layer, n_tokens, device, activation="gelu_tanh", compiling=compiling),
        )
        for name, n_bytes, contenders, want in cases:
            if compiling:
                # What was compiled for other widths would make it compile for any width.
                torch.compiler.reset()
            source = torch.empty(n_bytes // 2, dtype=torch.uint8, device=device)
            calls: Calls = {COPY: partial(torch.empty_like(source).copy_, source)}
            timings = in_turn(calls | {key: contender.call for key, contender in contenders.items()}, device)
            for timing in timings.values():
                if "ms" in timing:
                    timing["TB/s"] = 1e-12 * n_bytes / (1e-3 * timing["ms"])
                    if "ms" in timings[COPY]:
                        timing["of the copy's bandwidth"] = timings[COPY]["ms"] / timing["ms"]
            case = f"{name}, {n_tokens} tokens, bf16 ({layer.model})"
            yield {"case": case, "bytes": n_bytes, "timings": timings, "errors": errors(contenders, want)}


# A name, the bytes that must move at least, who computes it, and what is right in float64.
Case = tuple[str, int, Contenders, Tensor]


def draw(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def first(result: Tensor) -> Tensor:
    return result[:CHECKED]


def contenders_of(calls: dict[str, Callable[[], Any] | None], checked: Callable[[Any], Tensor] = first) -> Contenders:
    return {name: Contender(call=call, checked=checked) for name, call in calls.items() if call}


def rms_norm_case(layer: Layer, n_tokens: int, device: str, *, with_residual: bool, compiling: bool = False) -> Case:
    x, weight = draw(n_tokens, layer.hidden, device=device), draw(layer.hidden, device=device)
    residual = draw(n_tokens, layer.hidden, device=device) if with_residual else None
    of_reference = compiled(reference.rms_norm, device, compiling)

    def eager() -> Any:
        s = x if residual is None else x + residual
        y = F.rms_norm(s, (layer.hidden,), weight, EPS)
        return y if residual is None else (s, y)

    contenders = contenders_of(
        {
            "rms_norm": partial(rms_norm, x, weight, eps=EPS, residual=residual),
            "F.rms_norm": eager,
            "torch.compile": of_reference and partial(of_reference, x, weight, eps=EPS, residual=residual),
        },
        checked=lambda result: first(result if residual is None else result[1]),
    )
    s = first(x if residual is None else x + residual).double()
    want = reference.rms_norm(s, weight.double(), eps=EPS)
    assert isinstance(want, Tensor)
    n_bytes = (2 if residual is None else 4) * x.numel() * x.element_size()
    return f"rms_norm of {layer.hidden}{' with a residual' * with_residual}", n_bytes, contenders, want


def head_norm_case(layer: Layer, n_tokens: int, device: str, *, compiling: bool = False) -> Case:
    """The queries of a joined product, normalised head by head, as Qwen3 does."""
    joined = draw(n_tokens, layer.heads + 2 * layer.key_heads, layer.head_width, device=device)
    x, weight = joined[:, : layer.heads], draw(layer.head_width, device=device)
    of_reference = compiled(reference.rms_norm, device, compiling)
    want = reference.rms_norm(first(x).double(), weight.double(), eps=EPS)
    assert isinstance(want, Tensor)
    contenders = contenders_of(
        {
            "rms_norm": partial(rms_norm, x, weight, eps=EPS),
            "F.rms_norm": partial(F.rms_norm, x, (layer.head_width,), weight, EPS),
            "torch.compile": of_reference and partial(of_reference, x, weight, eps=EPS),
        }
    )
    n_bytes = 2 * x.numel() * x.element_size()
    return f"rms_norm of {layer.heads} heads of {layer.head_width}", n_bytes, contenders, want


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The expression of Hugging Face's models: query [H, T, C], key [K, T, C], cos and sin [T, C]."""
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def rotate_case(layer: Layer, n_tokens: int, device: str, *, compiling: bool = False) -> Case:
    n_heads = layer.heads + layer.key_heads
    joined = draw(n_tokens, n_heads + layer.key_heads, layer.head_width, device=device)
    x = joined[:, :n_heads]
    angle = torch.rand(n_tokens, layer.head_width // 2, device=device).mul_(100).repeat(1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    want = reference.rotate(first(x).double(), first(cos).double(), first(sin).double())
    query, key = x.clone().transpose(0, 1).split([layer.heads, layer.key_heads])
    expression = compiled(rotated, device, compiling)
    hugging_face = {
        "Hugging Face's expression": partial(rotated, query, key, cos, sin),
        "torch.compile of it": expression and partial(expression, query, key, cos, sin),
    }
    contenders = contenders_of(hugging_face, checked=lambda result: first(torch.cat(result).transpose(0, 1)))
    # In place: only its first call turns what was drawn, so that one is checked beforehand on a copy.
    copied = first(x).clone()
    ours = Contender(
        call=partial(rotate_, x, cos, sin), checked=lambda _: rotate_(copied.clone(), first(cos), first(sin))
    )
    n_bytes = 2 * x.numel() * x.element_size() + 2 * cos.numel() * cos.element_size()
    return f"rotate_ {n_heads} heads of {layer.head_width}", n_bytes, {"rotate_": ours, **contenders}, want


def gated_case(layer: Layer, n_tokens: int, device: str, *, activation: str, compiling: bool = False) -> Case:
    gate, up = draw(n_tokens, 2 * layer.inner, device=device).chunk(2, dim=1)

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    expression = compiled(eager, device, compiling)
    contenders = contenders_of(
        {
            "gated": partial(gated, gate, up, activation),
            "eager": partial(eager, gate, up),
            "torch.compile": expression and partial(expression, gate, up),
        }
    )
    want = reference.gated(first(gate).double(), first(up).double(), activation)
    return f"gated {activation} of {layer.inner}", 3 * gate.numel() * gate.element_size(), contenders, want


@torch.no_grad()
def mlp_in_pieces(device: str) -> Iterator[Finding]:
    """A whole pack through an MLP at once and in pieces, whose gate and up stay nearer to the processors."""
    shapes = {"Qwen2.5-0.5B": (896, 4864), "Llama-3.1-8B": (4096, 14336)}
    n_tokens, shapes = (20, {"tiny": (48, 40)}) if device == "cpu" else (65_536, shapes)
    for model, (hidden, inner) in shapes.items():
        torch.manual_seed(0)
        x, gate_up = draw(n_tokens, hidden, device=device), draw(2 * inner, hidden, device=device)
        down = draw(hidden, inner, device=device)
        gate_up *= hidden**-0.5
        down *= inner**-0.5
        out = torch.empty_like(x)
        calls: Calls = {}
        for size in MLP_PIECES:
            name = "all at once" if size is None else f"{size} tokens a piece"
            calls[name] = partial(_mlp, x, gate_up, down, out, size or n_tokens)
        timings = in_turn(calls, device, rounds=5)
        for timing in timings.values():
            if "ms" in timing:
                timing["TFLOP/s"] = 6e-12 * n_tokens * hidden * inner / (1e-3 * timing["ms"])
        yield {"case": f"MLP {hidden} -> {inner}, {n_tokens} tokens, bf16 ({model})", "timings": timings}


def _mlp(x: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, size: int) -> None:
    for piece, to in zip(x.split(size), out.split(size), strict=True):
        gate, up = F.linear(piece, gate_up).chunk(2, dim=1)
        torch.mm(gated(gate, up, "silu"), down.T, out=to)
