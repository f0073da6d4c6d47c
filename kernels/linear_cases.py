"""What `make triton-report` compiles of linear_nll: its kernels as the launcher starts them."""

from __future__ import annotations

from dataclasses import replace

from . import AotCase
from .linear_nll import _MERGE_CONSTANTS, _MERGE_OPTIONS, _merge_kernel, _range_kernel, _target_kernel
from .linear_tiles import FLOAT32_TILES, OTHER_TILES, TILES


def aot_cases(arch: int) -> list[AotCase]:
    """For one architecture, with its tiles; V 50,257 has a tail tile, 128,256 none."""
    half = TILES.get(arch, OTHER_TILES)
    head = {"bias", "logit_scale", "softcap", "slope"}
    cases = []
    for name, kernel, dtype, present, V, tiles in (
        ("nll", _range_kernel, "bf16", set(), 50257, half),
        ("all", _range_kernel, "bf16", {"target_logit"}, 50257, half),
        ("all, bias, scale, softcap", _range_kernel, "bf16", {"target_logit"} | head, 50257, half),
        ("nll, bias, scale, softcap", _range_kernel, "bf16", head, 50257, half),
        ("nll, no tail", _range_kernel, "bf16", set(), 128256, half),
        ("all, no tail", _range_kernel, "bf16", {"target_logit"}, 128256, half),
        ("all, bias, scale, softcap", _range_kernel, "fp16", {"target_logit"} | head, 50257, half),
        ("all, bias, scale, softcap", _range_kernel, "fp32", {"target_logit"} | head, 50257, FLOAT32_TILES),
        ("all, no tail, descriptors", _range_kernel, "bf16", {"target_logit"}, 128256, replace(half, descriptors=True)),
        ("target", _target_kernel, "bf16", {"target_logit"}, 50257, half),
        ("target, bias, scale, softcap", _target_kernel, "bf16", {"target_logit"} | head, 50257, half),
        ("target", _target_kernel, "fp32", {"target_logit"}, 50257, FLOAT32_TILES),
        ("merge, nll", _merge_kernel, "fp32", {"target_logit"}, 50257, half),
        ("merge, all", _merge_kernel, "fp32", {"target_logit", "ALL"}, 50257, half),
    ):
        types = dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}") | {"target": "*i64"}
        types |= dict.fromkeys(("target_logit", "partials", "out"), "*fp32")
        types |= dict.fromkeys(("logit_scale", "softcap", "slope"), "fp32")
        types |= dict.fromkeys(("S", "V", "D", "range_tiles", "n_ranges"), "i32")
        if tiles.descriptors:
            # Tensor descriptors are hardware from sm_90 on; before, they only cost registers.
            if arch < 90:
                continue
            types |= {
                "hidden": f"tensordesc<{dtype}[{tiles.block_s}, {tiles.block_d}]>",
                "weight": f"tensordesc<{dtype}[{tiles.block_v}, {tiles.block_d}]>",
            }
        constants = tiles.constants(4096, V) | _MERGE_CONSTANTS | {"ALL": "ALL" in present}
        constants |= dict.fromkeys((head | {"target_logit"}) - present)
        cases.append(
            AotCase(
                name=f"linear_nll {name} {dtype}",
                fn=kernel,
                signature={name: "constexpr" if name in constants else types[name] for name in kernel.arg_names},
                constexprs={name: constants[name] for name in kernel.arg_names if name in constants},
                options=_MERGE_OPTIONS if kernel is _merge_kernel else tiles.options(),
                must_use_tensor_cores=kernel is not _merge_kernel and dtype != "fp32",
                divisible=("D",),
            )
        )
    return cases
