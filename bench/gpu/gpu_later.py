"""What can wait for a third visit: rewards, long prompts and answers, experts, memory's segments, compiled peers."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_attention import attention_beside_its_peers
from gpu_engine import beside_hugging_face
from gpu_layers import elementwise_beside_its_peers
from gpu_models import register
from gpu_profile import profile
from gpu_timing import Finding

from fastcompat.benchmark.measurement import release
from fastcompat.benchmark.rounds import synchronize
from fastcompat.benchmark.subjects import random_model
from fastcompat.benchmark.workloads import WORKLOADS
from fastcompat.models import wrap
from fastcompat.scoring import ResponseScores, choose_token_budget, free_memory, pack_sequences, score_sequences

N_PACKS = 24


def rewards(device: str) -> Iterator[Finding]:
    """A 0.5B reward model beside transformers' pipeline."""
    from reward_measurement import RewardSettings, classifier_subject, measure_rewards, save_random_classifier

    register()
    shape, n_prompts, sizes = ("tiny", 1, (2,)) if device == "cpu" else ("Qwen2.5-0.5B", 24, (16, 64))
    with tempfile.TemporaryDirectory() as directory:
        save_random_classifier(shape, Path(directory), device=device)
        subject = classifier_subject(Path(directory), name=shape, device=device, dtype="bfloat16")
        settings = RewardSettings(
            n_prompts=n_prompts, rounds=1 if device == "cpu" else 2, batch_sizes=sizes, tell=print
        )
        for measurement in measure_rewards(subject, settings):
            record = measurement.record()
            timings: dict[str, Finding] = {
                name: {"ms": 1e3 * entry["seconds"]} for name, entry in record["scorers"].items()
            }
            timings |= {name: {"failed": why} for name, why in record["failed"].items()}
            figures = {
                name: {"tokens/s": entry["tokens_per_second"], "off float32 at most": entry["largest_error"]}
                for name, entry in record["scorers"].items()
            }
            case = f"{shape}, one label: {measurement.problem.described()}"
            yield {"case": case, "timings": timings, "figures": figures, "record": record}


def context(device: str) -> Iterator[Finding]:
    """Long prompts, short answers."""
    yield from beside_hugging_face("Qwen2.5-0.5B", device, n_prompts=48, workload="context")
    if device != "cpu":
        release()
        yield from beside_hugging_face("Llama-3.2-3B", device, n_prompts=16, workload="context")


def reasoning(device: str) -> Iterator[Finding]:
    """Short prompts, long answers."""
    yield from beside_hugging_face("Qwen2.5-0.5B", device, n_prompts=24, workload="reasoning")
    if device != "cpu":
        release()
        yield from beside_hugging_face("Llama-3.2-3B", device, n_prompts=6, workload="reasoning")


def experts(device: str) -> Iterator[Finding]:
    """A mixture of experts: what is fused of it, and where its time goes."""
    yield from profile("Qwen3-30B-A3B, 12 layers", device)


@torch.no_grad()
def segments(device: str) -> Iterator[Finding]:
    """Packs of ever other sizes through an 8B shape: whether the allocator's segments fit them; the setting's is the
    environment's."""
    register()
    shape, place = ("tiny" if device == "cpu" else "Llama-3.1-8B"), torch.device(device)
    model = wrap(shape, random_model(shape, device=place))
    budget = 300 if device == "cpu" else choose_token_budget(place, model.full.config, model.dtype, free_memory(place))
    sizes = random.Random(20).choices(range(budget // 8, budget + 1), k=3 if device == "cpu" else N_PACKS)
    seconds, n_tokens = [], []
    for number, size in enumerate(sizes):
        sequences = WORKLOADS["generators"].sequences(model.vocabulary, n_prompts=2 + size // 3000, seed=number)
        pack = pack_sequences(model, ResponseScores(sequences), token_budget=size)[0]
        run = partial(score_sequences, model, [sequences[n] for n in pack.sequences], token_budget=size)
        synchronize(place)
        began = time.perf_counter()
        run()
        synchronize(place)
        seconds.append(time.perf_counter() - began)
        n_tokens.append(pack.n_tokens)
    figures: Finding = {"packed tokens/s": sum(n_tokens) / sum(seconds)}
    rates = [n / s for n, s in zip(n_tokens, seconds, strict=True)]
    figures["slowest pack's share of the median rate"] = min(rates[1:]) / statistics.median(rates[1:])
    if device != "cpu":
        figures |= {
            "reserved GiB": torch.cuda.memory_reserved() / 2**30,
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
            "retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        }
    yield {
        "case": f"{shape}: {len(sizes)} packs of {min(n_tokens)} to {max(n_tokens)} tokens",
        "figures": {"all": figures},
    }


def compiled_attention(device: str) -> Iterator[Finding]:
    """With FlexAttention."""
    yield from attention_beside_its_peers(device, flex=True)


def compiled_elementwise(device: str) -> Iterator[Finding]:
    """With torch.compile."""
    yield from elementwise_beside_its_peers(device, compiling=True)
