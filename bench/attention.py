"""Forest attention on a CPU beside torch's causal attention, interleaved, and its error against float64.

    python bench/attention.py [--rounds 15]

Prints a table and writes bench/results/attention-cpu.json. A single sequence is the best case for torch; a forest is a
prompt under several responses, which torch computes as so many whole sequences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastcompat.benchmark.machine import machine
from fastcompat.benchmark.workloads import WORKLOADS
from fastcompat.ops import reference
from fastcompat.ops.attention import AttentionPlan, forest_attention
from fastcompat.tokens.forest import PrefixForest, pack_forest

RESULT = Path(__file__).parent / "results" / "attention-cpu.json"
HEADS = ((14, 2, 64), (9, 3, 64), (8, 2, 128))  # query heads, key heads, head width
LENGTHS = (128, 512, 2048, 8192)


def one_sequence(n_tokens: int) -> PrefixForest:
    ids = np.arange(n_tokens, dtype=np.int32)
    (forest,) = pack_forest([ids], [ids < 0], token_budget=n_tokens)
    return forest


def workload_pack(name: str) -> PrefixForest:
    sequences = WORKLOADS[name].sequences(30_000, n_prompts=1)
    ids, scored = ([getattr(s, field) for s in sequences] for field in ("input_ids", "scored"))
    (forest,) = pack_forest(ids, scored, token_budget=1 << 30)
    return forest


def paths(forest: PrefixForest) -> list[list[int]]:
    """The packed indices of each sequence, from its root."""
    return [forest.path(k).tolist() for k in range(len(forest.path_end))]


def measure(case: str, forest: PrefixForest, heads: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    n_heads, n_key_heads, width = heads
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(h, forest.n_tokens, width, dtype=torch.bfloat16) for h in (n_heads, n_key_heads, n_key_heads)
    )
    plan = AttentionPlan.create(torch.from_numpy(forest.position_ids), torch.from_numpy(forest.subtree_end))
    scaling = width**-0.5
    whole = [[x[None, :, path] for x in (query, key, value)] for path in paths(forest)]

    def theirs() -> list[Tensor]:
        return [F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True) for qkv in whole]

    def ours() -> Tensor:
        return forest_attention(query, key, value, plan, scaling=scaling)

    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    timed: dict[str, Callable[[], object]] = {"theirs": theirs, "ours": ours}
    for _ in range(rounds):
        for name, function in timed.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    pairs = int((forest.position_ids + 1).sum())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "case": case,
        "heads": n_heads,
        "key_heads": n_key_heads,
        "width": width,
        "n_tokens": forest.n_tokens,
        "seconds": medians,
        "faster": statistics.median(t / o for t, o in zip(seconds["theirs"], seconds["ours"], strict=True)),
        "gflop_per_s": 4e-9 * pairs * width * n_heads / medians["ours"],
    }
    if forest.n_tokens <= 2048:
        exact = reference.forest_attention(
            query.double(), key.double(), value.double(), plan.position_ids, plan.subtree_end, scaling=scaling
        )
        result["largest_error"] = float((ours().double() - exact).abs().max())
        if len(whole) == 1:
            result["largest_error_of_theirs"] = float((theirs()[0][0].transpose(0, 1).double() - exact).abs().max())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    table = Table("case", "H/K/C", "tokens", "torch, ms", "ours, ms", "times as fast", "GFLOP/s", "error", box=None)
    results = []
    for heads in HEADS:
        forests = [(f"one sequence of {n}", one_sequence(n)) for n in LENGTHS]
        forests += [(f"one prompt of `{name}`", workload_pack(name)) for name in ("generators", "context")]
        for case, forest in forests:
            result = measure(case, forest, heads, arguments.rounds)
            results.append(result)
            milliseconds = [f"{1e3 * result['seconds'][name]:.2f}" for name in ("theirs", "ours")]
            error = f"{result['largest_error']:.1e}" if "largest_error" in result else ""
            shape = "/".join(map(str, heads))
            rates = [f"{result['faster']:.2f}", f"{result['gflop_per_s']:.0f}"]
            table.add_row(case, shape, f"{result['n_tokens']:,}", *milliseconds, *rates, error)
    Console(width=140).print(table)
    RESULT.write_text(json.dumps({"dtype": "bfloat16", "results": results, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
