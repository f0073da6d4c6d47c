"""The whole scorer on a GPU beside the loops that everybody writes, as `end_to_end.py` does on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_timing import Finding

from fastcompat.benchmark.loops import length_sorted, padded
from fastcompat.benchmark.measurement import Measurement, Settings, measure
from fastcompat.benchmark.subjects import SHAPES, shape_subject

# Prompts of the `generators` workload, 16 responses each: seconds for the slowest scorer.
PROMPTS = {"Qwen2.5-1.5B": 48, "Llama-3.2-3B": 16, "Gemma-2-2B": 16}
ROUNDS = 2


def tiny() -> object:
    """For a dry run."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def engine_beside_hugging_face(device: str) -> Iterator[Finding]:
    """Seconds, tokens a second and efficiency (ARCHITECTURE.md) of each scorer, interleaved; losses against float32."""
    SHAPES["tiny"] = tiny
    for shape, n_prompts in ({"tiny": 1} if device == "cpu" else PROMPTS).items():
        subject = shape_subject(shape, device=device, dtype="bfloat16")
        # One at a time would take the minutes that others need.
        settings = Settings(n_prompts=n_prompts, rounds=1 if device == "cpu" else ROUNDS, loops=(padded, length_sorted))
        for measurement in measure(subject, settings):
            yield finding(measurement)


def finding(measurement: Measurement) -> Finding:
    """As `gpu_check.py` writes and prints it."""
    record = measurement.record()
    timings: dict[str, Finding] = {
        name: {
            "ms": 1e3 * entry["seconds"],
            "rounds": [1e3 * seconds for seconds in entry["all_seconds"]],
            "tokens/s": entry["tokens_per_second"],
            "of the product's rate": entry["efficiency"],
            "batch_size": entry["batch_size"],
        }
        for name, entry in record["scorers"].items()
    }
    timings |= {name: {"failed": reason} for name, reason in record["failed"].items()}
    return {
        "case": f"{record['shape']} shape, bf16, {record['n_sequences']} responses of {record['n_prompts']} prompts, "
        f"{record['n_tokens']} tokens",
        "timings": timings,
        "product_tflop_per_s": record["product_gflop_per_s"] / 1e3,
        "useful_tflop": record["useful_gflop"] / 1e3,
        "float32_check_nats": record["float32_check_nats"],
        "errors": {name: {"loss": entry["largest_error_nats"]} for name, entry in record["scorers"].items()},
    }
