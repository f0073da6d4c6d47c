"""Whole scorers against each other on one model and workload, in turn in one run; every one's losses are compared.

    python bench/end_to_end.py [--shape SmolLM2-135M] [--workload generators] [--rounds 3]

Prints a table and writes bench/results/end_to_end-SHAPE-WORKLOAD.json. Useful FLOPs and efficiency: ARCHITECTURE.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hardware import machine
from workloads import SHAPES, WORKLOADS, random_model

from fastcompat.engine import CPU_TOKEN_BUDGET, ResponseScores, pack_sequences, score_sequences
from fastcompat.model import CausalLM, wrap
from fastcompat.tokenization import TokenSequence

RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def padded_loop(model: Any, sequences: Sequence[TokenSequence], *, batch_size: int = 8) -> np.ndarray:
    """What everybody writes: batches in corpus order, padded, full logits, the library's attention."""
    losses = np.empty(len(sequences))
    for begin in range(0, len(sequences), batch_size):
        batch = range(begin, min(begin + batch_size, len(sequences)))
        losses[list(batch)] = _padded_batch(model, [sequences[n] for n in batch], response_logits_only=False)
    return losses


@torch.no_grad()
def length_sorted_loop(model: Any, sequences: Sequence[TokenSequence], *, token_budget: int = 2048) -> np.ndarray:
    """The careful version: sorted by length, batches of at most token_budget padded tokens, response logits only."""
    losses = np.empty(len(sequences))
    order = sorted(range(len(sequences)), key=lambda n: len(sequences[n].input_ids))
    batch: list[int] = []
    for n in order:
        if batch and len(sequences[n].input_ids) * (len(batch) + 1) > token_budget:
            losses[batch] = _padded_batch(model, [sequences[k] for k in batch], response_logits_only=True)
            batch = []
        batch.append(n)
    losses[batch] = _padded_batch(model, [sequences[k] for k in batch], response_logits_only=True)
    return losses


def _padded_batch(model: Any, batch: Sequence[TokenSequence], *, response_logits_only: bool) -> list[float]:
    length = max(len(s.input_ids) for s in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    scored = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, s in enumerate(batch):
        ids[row, : len(s.input_ids)] = torch.from_numpy(s.input_ids)
        mask[row, : len(s.input_ids)] = 1
        scored[row, : len(s.input_ids)] = torch.from_numpy(s.scored)
    ids, mask, scored = (x.to(model.device) for x in (ids, mask, scored))
    target, chosen = ids[:, 1:], scored[:, 1:]
    if response_logits_only:
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        nll = F.cross_entropy(
            model.get_output_embeddings()(hidden[:, :-1][chosen]).float(), target[chosen], reduction="none"
        )
        counts = chosen.sum(1).tolist()
        return [float(part.mean()) for part in nll.split(counts)]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)
    return ((nll * chosen).sum(1) / chosen.sum(1)).tolist()


def packed(model: CausalLM, sequences: Sequence[TokenSequence], *, token_budget: int) -> np.ndarray:
    """fastcompat."""
    scores = score_sequences(model, sequences, token_budget=token_budget)
    return scores.nll_sum / np.array([s.n_tokens for s in sequences])


def useful_flops(model: CausalLM, sequences: Sequence[TokenSequence]) -> float:
    """2 x body parameters x distinct tokens + 2 x head parameters x scored + 4 x attended pairs x width x layers."""
    (forest,) = pack_sequences(model, ResponseScores.of(sequences), token_budget=1 << 40)
    config = model.full.config
    embedding = model.full.get_input_embeddings().weight.numel()
    head = model.weight.numel()
    tied = model.weight.data_ptr() == model.full.get_input_embeddings().weight.data_ptr()
    total = sum(parameter.numel() for parameter in model.full.parameters())
    body = total - embedding - (0 if tied else head)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pairs = int((forest.position_ids + 1).sum())
    return (
        2.0 * body * forest.n_tokens + 2.0 * head * len(forest.scored) + 4.0 * pairs * width * config.num_hidden_layers
    )


def product_rate(model: CausalLM) -> float:
    """FLOP/s of `F.linear` with 2,048 tokens through the model's own MLP up-projection: the machine's own speed."""
    weight = model.body.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    x = torch.randn(2048, weight.shape[1]).to(weight)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        F.linear(x, weight)
        seconds.append(time.perf_counter() - began)
    return 2.0 * 2048 * weight.numel() / statistics.median(seconds)


def measure(shape: str, workload: str, *, rounds: int, token_budget: int) -> dict[str, Any]:
    """Seconds of every scorer, interleaved, and how far its losses are from float32."""
    hugging_face, ours = random_model(shape), wrap(shape, random_model(shape))
    hugging_face.set_attn_implementation("sdpa")
    sequences = WORKLOADS[workload].sequences(ours.vocabulary)
    scorers: dict[str, Callable[[], np.ndarray]] = {
        "Hugging Face, padded batches of 8, full logits": lambda: padded_loop(hugging_face, sequences),
        "Hugging Face, length-sorted, response logits only": lambda: length_sorted_loop(hugging_face, sequences),
        "fastcompat": lambda: packed(ours, sequences, token_budget=token_budget),
    }
    exact = packed(wrap(shape, random_model(shape).float()), sequences, token_budget=token_budget)
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    rates, losses = [], {}
    for _ in range(rounds):
        rates.append(product_rate(ours))
        for name, scorer in scorers.items():
            began = time.perf_counter()
            losses[name] = scorer()
            seconds[name].append(time.perf_counter() - began)
    flops, rate = useful_flops(ours, sequences), statistics.median(rates)
    return {
        "shape": shape,
        "workload": workload,
        "dtype": "bfloat16",
        "token_budget": token_budget,
        "n_tokens": int(sum(len(s.input_ids) for s in sequences)),
        "useful_gflop": flops / 1e9,
        "product_gflop_per_s": rate / 1e9,
        "scorers": {
            name: {
                "seconds": statistics.median(values),
                "all_seconds": values,
                "efficiency": flops / statistics.median(values) / rate,
                "largest_error_nats": float(np.abs(losses[name] - exact).max()),
            }
            for name, values in seconds.items()
        },
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M")
    parser.add_argument("--workload", choices=WORKLOADS, default="generators")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--token-budget", type=int, default=CPU_TOKEN_BUDGET)
    arguments = parser.parse_args()
    result = measure(arguments.shape, arguments.workload, rounds=arguments.rounds, token_budget=arguments.token_budget)
    rate = result["product_gflop_per_s"]
    print(f"{arguments.shape}, {arguments.workload}, {result['n_tokens']:,} tokens; product at {rate:.0f} GFLOP/s")
    for name, entry in result["scorers"].items():
        print(
            f"{entry['seconds']:8.2f} s  {entry['efficiency']:6.1%} of the product's rate  "
            f"{entry['largest_error_nats']:.5f} nats off at most  {name}"
        )
    path = RESULTS / f"end_to_end-{arguments.shape}-{arguments.workload}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
