"""The token budget: in its range, a bound on what a pack really takes, and read off the machine's free memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpora import prepare_small_units, save_small_model, write_corpus
from transformers import LlamaConfig

from fastcompat.scoring.losses import Scorer
from fastcompat.scoring.machine_memory import available_memory, free_memory
from fastcompat.scoring.passes import open_scorer
from fastcompat.scoring.token_budget import (
    CPU_TOKEN_BUDGET,
    CUDA_TOKEN_BUDGET,
    LEAST_CPU_TOKEN_BUDGET,
    LEAST_CUDA_TOKEN_BUDGET,
    choose_token_budget,
)

SHAPE = dict(
    hidden_size=512,
    intermediate_size=1376,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=8192,
    vocab_size=8192,
)


@pytest.mark.parametrize(
    ("device", "least", "most"),
    [
        (torch.device("cpu"), LEAST_CPU_TOKEN_BUDGET, CPU_TOKEN_BUDGET),
        (torch.device("cuda"), LEAST_CUDA_TOKEN_BUDGET, CUDA_TOKEN_BUDGET),
    ],
)
def test_a_power_of_two_in_its_range_that_grows_with_the_memory(device, least, most):
    config = LlamaConfig(**SHAPE)
    chosen = [choose_token_budget(device, config, torch.float32, int(1.2**k)) for k in range(200)]
    assert chosen == sorted(chosen)
    assert set(chosen) == {least << k for k in range((most // least).bit_length())}
    assert choose_token_budget(device, config, torch.float32, 0) == least
    enough = next(int(1.2**k) for k, budget in enumerate(chosen) if budget == most)
    assert choose_token_budget(device, LlamaConfig(**(SHAPE | {"hidden_size": 1024})), torch.float32, enough) < most
    assert (
        choose_token_budget(device, LlamaConfig(**(SHAPE | {"intermediate_size": 8192})), torch.float32, enough) < most
    )
    short = enough * 3 // 5
    assert choose_token_budget(device, config, torch.float32, short) < most
    assert choose_token_budget(device, config, torch.bfloat16, short) == most


ACTIVATIONS = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import torch
from fake_model import sequence_of
from families import small_model
from fastcompat.scoring.token_budget import head_bytes, token_bytes
from fastcompat.scoring.losses import score_sequences
from fastcompat.models.base_model import wrap
torch.set_num_threads(1)
def peak():
    # Not ru_maxrss: that of the process which started this one is its lower bound.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
full = small_model({family!r}, dtype={dtype}, **{shape!r})
model = wrap("test", full)
generator = np.random.default_rng(0)
def score(n_tokens):
    sequences = [sequence_of(generator.integers(3, 300, size=n_tokens // 8), 10) for _ in range(8)]
    assert set(score_sequences(model, sequences, token_budget=n_tokens).status) == {{"ok"}}
score(128)
before = peak()
score(4096)
print(peak() - before, 4096 * token_bytes(full.config, {dtype}), head_bytes(torch.device("cpu"), full.config))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("family", "dtype", "shape"),
    [
        ("Llama", "torch.bfloat16", SHAPE),
        pytest.param(  # GELU, operation by operation
            *("GPT-2", "torch.float32", dict(n_embd=512, n_head=8, n_positions=8192)), marks=pytest.mark.long
        ),
        pytest.param("gpt-oss (sinks)", "torch.float32", SHAPE, marks=pytest.mark.long),  # a mixture of experts
        pytest.param(
            "Gemma-4 (shared keys, inputs per layer)",
            "torch.float32",
            SHAPE | dict(head_dim=64, global_head_dim=128, hidden_size_per_layer_input=64),
            marks=pytest.mark.long,
        ),
    ],
)
def test_activations_take_no_more_than_estimated(family, dtype, shape):
    code = ACTIVATIONS.format(tests=str(Path(__file__).parents[1] / "helpers"), family=family, dtype=dtype, shape=shape)
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    growth, estimate, head = map(int, result.stdout.split())
    assert growth <= estimate + head
    assert estimate <= 8 * growth, "an estimate this far off says nothing"


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_available_memory_of_a_machine_and_of_its_control_groups(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    4000 kB")
    assert available_memory(tmp_path) == 4000 << 10
    # Version 2: a group without a limit inside one that has one; files' pages do not count as used.
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner")
    mount = tmp_path / "sys/fs/cgroup"
    for group, limit, used, cached in (("outer/inner", "max", 10, 0), ("outer", 3000 << 10, 1000 << 10, 400 << 10)):
        write(mount / group / "memory.max", limit)
        write(mount / group / "memory.current", used)
        write(mount / group / "memory.stat", f"anon 1\ninactive_file {cached}")
    assert available_memory(tmp_path) == 2400 << 10
    write(mount / "outer/memory.current", 9000 << 10)
    assert available_memory(tmp_path) == 0
    # A container sees its own group as the mount, and the host's name for it.
    write(tmp_path / "proc/self/cgroup", "0::/of-the-host/abc")
    write(mount / "memory.max", 2000 << 10)
    write(mount / "memory.current", 500 << 10)
    write(mount / "memory.stat", "inactive_file 0")
    assert available_memory(tmp_path) == 1500 << 10
    # Version 1, then a limit that is none.
    write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n0::/elsewhere")
    write(mount / "memory.max", "max")
    write(mount / "memory/a/memory.limit_in_bytes", 1000 << 10)
    write(mount / "memory/a/memory.usage_in_bytes", 300 << 10)
    write(mount / "memory/a/memory.stat", f"total_inactive_file {100 << 10}")
    assert available_memory(tmp_path) == 800 << 10
    write(mount / "memory/a/memory.limit_in_bytes", (1 << 63) - 4096)
    assert available_memory(tmp_path) == 4000 << 10


def test_available_memory_where_the_system_does_not_say(tmp_path, monkeypatch):
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    assert available_memory(tmp_path) == 4096000
    monkeypatch.delattr("os.sysconf")
    assert available_memory(tmp_path) == 4 << 30


def test_free_memory_of_a_gpu_counts_what_torch_holds_in_reserve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_memory(torch.device("cuda")) == 1400


def test_a_scorer_takes_the_budget_that_is_given_or_that_memory_allows(tmp_path, monkeypatch):
    directory = str(save_small_model(tmp_path / "model"))
    assert Scorer(directory, token_budget=77).token_budget == 77
    monkeypatch.setattr("fastcompat.scoring.memory_choice.free_memory", lambda device: 1 << 40)
    plenty = Scorer(directory)
    assert plenty.token_budget == plenty.record()["token_budget"] == CPU_TOKEN_BUDGET
    monkeypatch.setattr("fastcompat.scoring.memory_choice.free_memory", lambda device: 1 << 20)
    assert plenty.token_budget == CPU_TOKEN_BUDGET  # chosen once
    assert Scorer(directory).token_budget == LEAST_CPU_TOKEN_BUDGET


def test_a_run_keeps_the_budget_of_its_first_session(tmp_path, monkeypatch):
    directory = str(save_small_model(tmp_path / "model"))
    write_corpus(tmp_path / "corpus", generators=1, n_prompts=4)
    run = prepare_small_units(tmp_path / "run", tmp_path / "corpus", target_unit_chars=2000)
    monkeypatch.setattr("fastcompat.scoring.memory_choice.free_memory", lambda device: 1 << 20)
    assert open_scorer(run, Scorer(directory), token_budget=None)[1] == LEAST_CPU_TOKEN_BUDGET
    monkeypatch.setattr("fastcompat.scoring.memory_choice.free_memory", lambda device: 1 << 40)
    assert open_scorer(run, Scorer(directory), token_budget=None)[1] == LEAST_CPU_TOKEN_BUDGET
