"""A model whose layers stream against the same one resident: time, bits, peak memory; and one larger than memory.

    python bench/streaming.py [--shape Qwen2.5-1.5B Qwen2.5-14B] [--tokens 16384] [--rounds 3] [--directory DIRECTORY]
    python bench/streaming.py --shape tiny --tokens 600 --rounds 1      # to try it

Random weights in bfloat16 are written layer by layer, in shards, to a temporary directory (3.1 GB and 29.5 GB). Shapes
that fit are loaded both ways in one process and scored in turn, the streamed one with a page cache that was emptied
before; memory is the high-water mark of a process of its own for each. Writes bench/results/streaming.json, with the
predictions that were made before.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fastcompat.benchmark.machine import machine
from fastcompat.models import CausalLM, ModelSettings, load_causal_lm, load_config
from fastcompat.scoring import choose_memory
from fastcompat.tokens import PrefixForest, pack_forest

RESULTS = Path(__file__).parent / "results"

# What Qwen2 configurations say beside their defaults; whether a resident model is measured too.
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "tiny": (
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
        True,
    ),
    "Qwen2.5-1.5B": (
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
        | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        True,
    ),
    "Qwen2.5-14B": (
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40}
        | {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
        False,
    ),
}

# Before anything was run: 2 cores, a disk of 0.85 GB/s.
PREDICTIONS: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B": {
        "equal_bits": True,
        "streamed_over_resident": "1.00 to 1.02, and below 1.05: reading costs a memcpy of 3.1 GB, some 1 s of 130",
        "waiting_share": "below 0.005: a layer takes 0.11 s to read and 4.5 s to compute for 16,384 tokens",
        "streamed_peak_gb": "1.3 to 1.4: embedding 0.47, two layers 0.19, a pack at work 0.2, the interpreter 0.45",
        "resident_peak_gb": "3.7 to 4.0: weights 3.1, a pack 0.2, the interpreter 0.45; before the change 5.2",
    },
    "Qwen2.5-14B": {
        "streamed_peak_gb": "5.3 to 6.0: embedding and head 3.1, two layers 1.1, copies in float32 at load 1.2",
        "waiting_share": "0.00 to 0.02 with packs of 4,096 tokens: a layer takes 0.65 s to read and 6 s to compute",
        "load_seconds": "110 to 180: three ways through 26 GB at 0.85 GB/s are 93 s, and comparing 48 layers 40 s",
    },
}
DRAWN_AT_ONCE = 1 << 24
SEQUENCES_A_PROMPT = 4


def config_of(shape: str) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**SHAPES[shape][0], dtype=torch.bfloat16, architectures=["Qwen2ForCausalLM"])


def write_checkpoint(directory: Path, shape: str) -> int:
    """A shard for each layer and one for the rest; never more than one of them in memory. Returns their bytes."""
    from transformers import Qwen2ForCausalLM

    config = config_of(shape)
    config.save_pretrained(directory)
    with torch.device("meta"):
        full = Qwen2ForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, own in full.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            layer = name.split(".")[2] if ".layers." in name else "rest"
            shards.setdefault(f"model-{layer}.safetensors", {})[name] = own.shape
    generator = torch.Generator().manual_seed(20)
    places, total = {}, 0
    for file, names in shards.items():
        tensors = {name: draw(name, shape, generator) for name, shape in names.items()}
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(own.nbytes for own in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Such that states and logits are of order 1. One matrix is repeated from a stretch of numbers: it is the bytes
    that take time."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = (3.0 if "embed" in name else 1.0) * shape[-1] ** -0.5
    values = torch.randn(min(shape.numel(), DRAWN_AT_ONCE), generator=generator).mul_(scale).bfloat16()
    return values.repeat(-(-shape.numel() // len(values)))[: shape.numel()].view(shape).clone()


def forests(vocabulary: int, n_tokens: int, pack_tokens: int) -> list[PrefixForest]:
    """Packs of random ids, some n_tokens in all: four responses of 200 tokens to every prompt of 100."""
    generator = np.random.default_rng(7)
    ids: list[np.ndarray] = []
    for _ in range(max(1, n_tokens // 900)):
        prompt = generator.integers(vocabulary, size=100, dtype=np.int32)
        for _ in range(SEQUENCES_A_PROMPT):
            ids.append(np.concatenate([prompt, generator.integers(vocabulary, size=200, dtype=np.int32)]))
    return pack_forest(ids, [np.arange(len(own)) >= 100 for own in ids], token_budget=pack_tokens)


def load(directory: Path, *, memory: str, dtype: str) -> CausalLM:
    config = load_config(str(directory), None)
    device = torch.device("cpu")
    chosen = getattr(torch, dtype)
    choice = choose_memory(
        memory, None, source=str(directory), revision=None, config=config, device=device, dtype=chosen
    )
    return load_causal_lm(str(directory), ModelSettings(device="cpu", dtype=dtype), streaming=choice.streaming)


def score(model: CausalLM, packs: list[PrefixForest]) -> dict[str, Any]:
    """One super-batch: seconds, processor seconds, and the digest of all losses."""
    plans = [model.plan(pack, pack.predictors) for pack in packs]
    layers = model.layers
    before = (0.0, 0.0, 0) if layers is None else (layers.store.waited, layers.store.reading, layers.store.n_bytes)
    digest = hashlib.sha256()
    wall, processor = time.perf_counter(), time.process_time()
    on_device = [plan.to(model.device) for plan in plans]
    for plan, hidden in zip(on_device, model.march(on_device), strict=True):
        digest.update(model.target_statistics(hidden, plan, ("nll",)).numpy().tobytes())
    found: dict[str, Any] = {
        "seconds": round(time.perf_counter() - wall, 3),
        "processor_seconds": round(time.process_time() - processor, 3),
        "tokens": sum(pack.n_tokens for pack in packs),
        "sha256": digest.hexdigest(),
    }
    if layers is not None:
        waited = layers.store.waited - before[0]
        found |= {
            "waited_seconds": round(waited, 3),
            "waiting_share": round(waited / found["seconds"], 4),
            "read_gb": round((layers.store.n_bytes - before[2]) / 1e9, 3),
            "read_gb_a_second": round((layers.store.n_bytes - before[2]) / 1e9 / (layers.store.reading - before[1]), 2),
            "packs_march": layers.marches,
        }
    return found


def forget(directory: Path) -> None:
    """Empty the page cache of a checkpoint's files."""
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def peak_gb() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return round((int(line.split()[1]) << 10) / 1e9, 3)


def timed(directory: Path, packs: list[PrefixForest], *, memory: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Load, then score as often as it is asked for."""
    forget(directory)
    wall, processor = time.perf_counter(), time.process_time()
    model = load(directory, memory=memory, dtype=dtype)
    yield {
        "load_seconds": round(time.perf_counter() - wall, 1),
        "load_processor_seconds": round(time.process_time() - processor, 1),
    }
    while True:
        if memory == "stream":
            forget(directory)
        yield score(model, packs)


def in_turn(directory: Path, packs: list[PrefixForest], rounds: int, dtype: str) -> dict[str, Any]:
    """Both modes in one process, one after the other in every round."""
    modes = {memory: timed(directory, packs, memory=memory, dtype=dtype) for memory in ("resident", "stream")}
    loads = {memory: next(mode) for memory, mode in modes.items()}
    found: dict[str, list[dict[str, Any]]] = {memory: [] for memory in modes}
    for k in range(rounds):
        for memory in list(modes)[:: 1 if k % 2 == 0 else -1]:
            found[memory].append(next(modes[memory]))
            print(f"  round {k + 1}, {memory}: {found[memory][-1]}", flush=True)
    ratios = [
        {name: round(streamed[name] / resident[name], 4) for name in ("seconds", "processor_seconds")}
        for resident, streamed in zip(found["resident"], found["stream"], strict=True)
    ]
    return {
        "loads": loads,
        "rounds": found,
        "streamed_over_resident": ratios,
        "median_streamed_over_resident": float(np.median([ratio["seconds"] for ratio in ratios])),
        "equal_bits": len({own["sha256"] for results in found.values() for own in results}) == 1,
    }


def alone(directory: Path, packs: list[PrefixForest], memory: str, dtype: str) -> dict[str, Any]:
    """One mode in this process, and its peak memory."""
    mode = timed(directory, packs, memory=memory, dtype=dtype)
    loaded = next(mode) | {"peak_gb_after_loading": peak_gb()}
    scored = next(mode)
    gc.collect()
    return loaded | scored | {"peak_gb": peak_gb()}


def in_a_process(arguments: argparse.Namespace, directory: Path, shape: str, memory: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", memory, "--directory", str(directory), "--shape", shape]
    command += ["--tokens", str(arguments.tokens), "--pack", str(arguments.pack), "--dtype", arguments.dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {memory} alone: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["Qwen2.5-1.5B", "Qwen2.5-14B"])
    parser.add_argument("--tokens", type=int, default=16384, help="of a super-batch")
    parser.add_argument("--pack", type=int, default=4096, help="tokens of a pack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="as it is stored; float32 is twice as large")
    parser.add_argument("--directory", help="where the weights are written, instead of the system's temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS / "streaming.json", metavar="FILE")
    parser.add_argument("--child", choices=["resident", "stream"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if arguments.child:
        (shape,) = arguments.shape
        packs = forests(config_of(shape).vocab_size, arguments.tokens, arguments.pack)
        print(json.dumps(alone(Path(arguments.directory), packs, arguments.child, arguments.dtype)))
        return
    results: dict[str, Any] = {}
    for shape in arguments.shape:
        with TemporaryDirectory(dir=arguments.directory) as temporary:
            directory = Path(temporary)
            print(f"{shape}: writing", flush=True)
            n_bytes = write_checkpoint(directory, shape)
            packs = forests(config_of(shape).vocab_size, arguments.tokens, arguments.pack)
            print(f"{shape}: {n_bytes / 1e9:.2f} GB, packs of {[pack.n_tokens for pack in packs]} tokens", flush=True)
            both = SHAPES[shape][1]
            results[shape] = {
                "weights_gb": round(n_bytes / 1e9, 3),
                "dtype": arguments.dtype,
                "packs": [pack.n_tokens for pack in packs],
                "predicted": PREDICTIONS.get(shape),
                "alone": {
                    memory: in_a_process(arguments, directory, shape, memory)
                    for memory in (("stream", "resident") if both else ("stream",))
                },
                **(in_turn(directory, packs, arguments.rounds, arguments.dtype) if both else {}),
            }
    record = {"machine": machine(torch.device("cpu")), "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
