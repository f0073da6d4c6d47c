"""What `make triton-report` compiles of forest_attention: its kernel as the launcher starts it."""

from __future__ import annotations

from . import AotCase
from .forest_attention import _attention_kernel
from .forest_plan import FLOAT32_TILES, OTHER_TILES, TILES, Tiles

# What None leaves out of the kernel.
_PRESENT_WITH = {
    "softcap": ("slope",),
    "window": ("window", "key_position", "query_position"),
    "sinks": ("sinks",),
    "query_index": ("key_first",),
}


def aot_cases(arch: int) -> list[AotCase]:
    """For one architecture, with its tiles: every tile without and with all options, each option alone at 64."""
    half, everything = TILES.get(arch, OTHER_TILES), tuple(_PRESENT_WITH)
    cases = []
    for width in (12, 64, 80, 128, 192, 256, 512):
        cases += [_case(half, "bf16", width, width, options) for options in ((), everything)]
    cases += [_case(half, "bf16", 64, 64, (option,)) for option in everything]
    cases += [_case(half, "bf16", 192, 128, ()), _case(half, "fp16", 128, 128, everything)]
    for width in (64, 128, 256, 512):
        cases += [_case(FLOAT32_TILES, "fp32", width, width, options) for options in ((), everything)]
    return cases


def _case(table: dict[int, Tiles], dtype: str, C: int, Cv: int, options: tuple[str, ...]) -> AotCase:
    tiles = table[min(served for served in table if served >= max(C, Cv))]
    types = dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}") | {"sinks": "*fp32"}
    indices = ("key_first", "key_end", "key_position", "query_position", "order", "key_blocks")
    types |= dict.fromkeys(indices, "*i32") | dict.fromkeys(("begin", "full_end"), "*i64")
    types |= dict.fromkeys(("T", "Q", "heads", "group", "window"), "i32") | dict.fromkeys(("scale", "slope"), "fp32")
    strides = tuple(f"{name}_{step}" for name in ("query", "key", "value") for step in ("head", "token"))
    types |= dict.fromkeys(strides, "i32")
    constants = tiles.constants(C, Cv)
    for option, names in _PRESENT_WITH.items():
        constants |= {} if option in options else dict.fromkeys(names)
    width = str(C) if Cv == C else f"{C}:{Cv}"
    named = ("all options",) if len(options) == len(_PRESENT_WITH) else options
    return AotCase(
        name=f"forest_attention {', '.join([width, *named])} {dtype}",
        fn=_attention_kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in _attention_kernel.arg_names},
        constexprs={name: constants[name] for name in _attention_kernel.arg_names if name in constants},
        options=tiles.options(),
        must_use_tensor_cores=dtype != "fp32",
        divisible=() if C % 16 else strides,
    )
