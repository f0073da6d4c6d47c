"""What `make triton-report` compiles of forest_attention: what it asks for on real layers, by every variant."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from . import AotCase, forest_attention
from .ahead_of_time import Calls, asked
from .forest_plan import Tiles, variants

T = 37  # packed tokens
# Query heads, key heads, their width, and that of values.
LAYERS = {
    "Llama-3-8B": (32, 8, 128, 128),
    "Qwen2.5-0.5B": (14, 2, 64, 64),
    "SmolLM2-135M": (9, 3, 64, 64),
    "Phi-2": (32, 32, 80, 80),
    "Gemma-2-2B": (8, 4, 256, 256),
    "DeepSeek-V2-Lite": (16, 16, 192, 128),
    "512": (4, 1, 512, 512),
    "12": (4, 2, 12, 12),
}
NEEDED = {"needed": True}
EVERYTHING = {"softcap": 50.0, "sliding_window": 4, "sinks": True, "needed": True}


def aot_cases(arch: int) -> list[AotCase]:
    """For one architecture: every layer as whole and as last layer, and with all options; each option alone once."""
    return asked(arch, _calls(), {forest_attention: ("_attention_kernel",)}, products=("attention",))


def _calls() -> Calls:
    for layer in LAYERS:
        real = layer in ("Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-2B")
        for options in ({}, NEEDED, EVERYTHING) if real else ({}, EVERYTHING):
            yield _call(layer, torch.bfloat16, options)
    yield _call("Gemma-2-2B", torch.bfloat16, {"softcap": 50.0})
    yield _call("Gemma-2-2B", torch.bfloat16, {"softcap": 50.0, "sliding_window": 4})
    yield _call("Qwen2.5-0.5B", torch.bfloat16, {"sliding_window": 4})
    yield _call("Qwen2.5-0.5B", torch.bfloat16, {"sinks": True})
    yield _call("Qwen2.5-0.5B", torch.bfloat16, {"sinks": True, "sliding_window": 4})
    yield _call("Llama-3-8B", torch.float16, EVERYTHING)
    for layer in ("Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-2B", "512"):
        yield _call(layer, torch.float32, {} if layer == "512" else EVERYTHING)
    for layer, (_, _, C, Cv) in LAYERS.items():
        for name, tiles in variants(torch.bfloat16, torch.device("cpu"), max(C, Cv)).items():
            if name != "heads" and layer in ("Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-2B"):
                for options in ({}, EVERYTHING):
                    yield _call(layer, torch.bfloat16, options, name, tiles)


def _call(layer: str, dtype: torch.dtype, options: dict[str, Any], name: str = "", tiles: Tiles | None = None) -> Any:
    """As a fused layer calls it: queries, keys and values side by side, tokens apart by all of them."""
    heads, key_heads, C, Cv = LAYERS[layer]
    widths = [heads * C, key_heads * C, key_heads * Cv]
    query, key, value = (
        part.view(T, -1, C if n < 2 else Cv).transpose(0, 1)
        for n, part in enumerate(torch.empty(T, sum(widths), dtype=dtype).split(widths, dim=1))
    )
    position = torch.arange(T, dtype=torch.int32)
    arguments: dict[str, Any] = {"scaling": 0.1, "tiles": tiles, **options}
    if arguments.pop("needed", False):
        arguments["query_index"] = torch.arange(0, T, 2)
        # Computed by themselves, for these tokens only.
        query = torch.empty(len(arguments["query_index"]), heads, C, dtype=dtype).transpose(0, 1)
    if "sinks" in options:
        arguments["sinks"] = torch.empty(heads, dtype=dtype)
    call = partial(
        forest_attention.forest_attention, query, key, value, position, torch.full_like(position, T), **arguments
    )
    named = ", ".join(["all options"] if options is EVERYTHING else list(_shown(options)))
    by = f" by {name}" if name else ""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return f"attention{by}, {layer}{', ' * bool(named)}{named}, {kind}", call


def _shown(options: dict[str, Any]) -> Iterator[str]:
    for name in options:
        yield {"sliding_window": "window", "needed": "needed tokens"}.get(name, name)
