"""What computes what on this machine, and what stands in the way of something faster: `fastcompat doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from fastcompat.version import __version__

if TYPE_CHECKING:
    from fastcompat.models.packed_model import PackedModel
    from fastcompat.scoring.memory_choice import MemoryChoice

PACKAGES = ("torch", "transformers", "tokenizers", "triton")
REBUILD = "install a C++17 compiler (g++ or clang), then install fastcompat again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `advice` is there where something faster, or anything at all, is to be had."""

    section: str
    subject: str
    found: str
    why: str | None = None
    advice: str | None = None


def examine(
    base_model: str | None = None,
    reward_model: str | None = None,
    *,
    reward_output: str | None = None,
    memory: str = "auto",
    memory_limit: str | int | None = None,
) -> list[Finding]:
    """Everything that is known of this machine, section by section. Loads torch; takes seconds.

    With a model, a hub id or a directory, also what of it runs fused; of a reward model what it reads, and where.
    reward_output: as `RewardScorer`'s output; memory, memory_limit: as of `Scorer`. Raises ModelError where
    a model cannot be loaded, UsageError where one of several outputs must be chosen.
    """
    base = [] if base_model is None else [*_base_model(base_model, memory, memory_limit)]
    reward = [] if reward_model is None else [*_reward_model(reward_model, reward_output, memory, memory_limit)]
    return [*_machine(), *_kernels(), *base, *reward, *_versions()]


def _machine() -> Iterator[Finding]:
    import torch

    from fastcompat.models.configuration import native_bfloat16

    section = "machine"
    yield Finding(section=section, subject="system", found=f"{platform.system()} {platform.machine()}")
    n_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_threads = torch.get_num_threads()
    limit = os.environ.get("OMP_NUM_THREADS")
    # Half of the hardware threads is torch's own choice where two share a core.
    idle = limit is not None and 2 * n_threads < n_processors
    yield Finding(
        section=section,
        subject="processor",
        found=f"{_processor()}, {n_threads} of {n_processors} hardware threads used",
        why=None if limit is None else f"OMP_NUM_THREADS={limit}",
        advice="unset OMP_NUM_THREADS where nothing else needs the processors" if idle else None,
    )
    yield _gpu()
    on_gpu = torch.cuda.is_available()
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else native_bfloat16()
    yield Finding(
        section=section,
        subject="dtype",
        found="bfloat16" if native else "float32",
        why="multiplied natively here" if native else "bfloat16 is not multiplied natively here, and would be slower",
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        return Finding(section="machine", subject="GPU", found=", ".join(names))
    build = torch.version.cuda or torch.version.hip
    card = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    why, advice = f"torch {torch.__version__} is built for CPUs only", None
    if build:
        why = f"torch is built for {'CUDA' if torch.version.cuda else 'ROCm'} {build} and finds no device"
    if card:
        advice = (
            "nvidia-smi shows whether the driver is too old for this torch, or CUDA_VISIBLE_DEVICES hides the GPU"
            if build
            else "an NVIDIA driver is here: install a CUDA build of torch (https://pytorch.org/get-started)"
        )
    return Finding(section="machine", subject="GPU", found="none", why=why, advice=advice)


def _kernels() -> Iterator[Finding]:
    import torch

    from fastcompat.ops.backends import native_levels, why_not

    section = "kernels"
    problem = why_not("native", "cpu")
    levels = native_levels()
    yield Finding(
        section=section,
        subject="C++ extension",
        found="none" if problem else ", ".join(levels),
        why=problem or "levels that this processor offers, the first is used",
        advice=REBUILD if problem else None,
    )
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        place = "CPU" if device == "cpu" else "GPU"
        for name in ("linear_nll", "packed_nll", "attention", "element-wise"):
            yield _served(f"{name} on {place}", device)
    for device in devices:
        on_gpu = device == "cuda" and why_not("triton", device) is None
        place = "CPU" if device == "cpu" else "GPU"
        yield Finding(section=section, subject=f"response sums on {place}", found="Triton" if on_gpu else "NumPy")
        if device == "cuda":
            yield _attention_libraries()


def _attention_libraries() -> Finding:
    """Which libraries could compute a GPU's attention, and whether they do."""
    from fastcompat.ops.attention_flash import LIBRARIES, load, version_of
    from fastcompat.ops.flash_choice import MEASURED

    why_not = {library: load(library) for library in LIBRARIES}
    here = [library for library, found in why_not.items() if not isinstance(found, str)]
    others = [f"{library.name}: {found}" for library, found in why_not.items() if isinstance(found, str)]
    use = "used where it was measured to be faster" if MEASURED else "not used: none was measured to be faster yet"
    return Finding(
        section="kernels",
        subject="attention, other libraries",
        found=", ".join(f"{library.name} {version_of(library)}" for library in here) or "none",
        why="; ".join([use] * bool(here) + others),
    )


def _probed_libraries(section: str, model: PackedModel) -> Iterator[Finding]:
    """Whether they give what our own attention gives, for each kind that the model's layers ask for."""
    from fastcompat.models import attention_kinds
    from fastcompat.ops.attention_flash import LIBRARIES, load
    from fastcompat.ops.flash_choice import problem

    if model.device.type != "cuda":
        return
    kinds = attention_kinds(model)
    for library in LIBRARIES:
        if isinstance(load(library), str):
            continue
        problems = [why for kind in kinds if (why := problem(library, kind)) is not None]
        found = f"right in {len(kinds) - len(problems)} of {len(kinds)} kinds of layers"
        subject = f"attention by {library.name}"
        yield Finding(section=section, subject=subject, found=found, why=problems[0] if problems else None)


def _base_model(name: str, memory: str, memory_limit: str | int | None) -> Iterator[Finding]:
    from transformers.utils import logging as transformers_logging

    from fastcompat.models import load_config, resolve_device, resolve_dtype
    from fastcompat.models.loading import load_causal_lm
    from fastcompat.scoring import choose_memory, choose_token_budget, left_memory, n_bytes_of

    transformers_logging.disable_progress_bar()
    config, device, limit = load_config(name, None), resolve_device("auto"), n_bytes_of(memory_limit)
    dtype = resolve_dtype("auto", config, device)
    choice = choose_memory(memory, limit, source=name, revision=None, config=config, device=device, dtype=dtype)
    model = load_causal_lm(name, streaming=choice.streaming)
    section = "base model"
    yield _architecture(section, model)
    yield from _fused(section, model)
    yield from _probed_libraries(section, model)
    n_tokens = choose_token_budget(device, model.full.config, model.dtype, left_memory(device, limit))
    yield _token_budget(section, n_tokens)
    yield from _memory(section, model, choice, n_tokens)


def _reward_model(name: str, output: str | None, memory: str, memory_limit: str | int | None) -> Iterator[Finding]:
    from transformers.utils import logging as transformers_logging

    from fastcompat.scoring.rewards import RewardScorer

    transformers_logging.disable_progress_bar()
    scorer = RewardScorer(name, output=output, memory=memory, memory_limit=memory_limit)
    head, tokenizer = scorer.head, scorer.tokenizer
    section = "reward model"
    yield _architecture(section, scorer.model)
    outputs = f"one of {', '.join(head.labels)}" if len(head.labels) > 1 else None
    yield Finding(section=section, subject="head", found=f"{head.kind.name}, output {head.output}", why=outputs)
    pad_id = head.read_out.pad_id
    places = {
        "last": "the last token",
        "non-pad": f"the rightmost token that is not {pad_id}",
        "before-pad": f"the token before the first {pad_id}, else the last one",
    }
    why = f"token {pad_id} pads" if pad_id is not None else "config.json names no pad token"
    if head.read_out.gate is not None:
        why = f"the gate where the last prompt ends; {why}"
    place = places["last" if pad_id is None else head.read_out.rule]
    yield Finding(section=section, subject="read at", found=place, why=why)
    yield Finding(section=section, subject="template", found=tokenizer.description)
    yield Finding(section=section, subject="BOS", found="one" if tokenizer.begins_with_bos else "none")
    limit = "none known" if tokenizer.max_length is None else f"{tokenizer.max_length:,} tokens"
    yield Finding(section=section, subject="longest conversation", found=limit)
    yield from _fused(section, scorer.model)
    yield from _probed_libraries(section, scorer.model)
    yield _token_budget(section, scorer.token_budget)
    yield from _memory(section, scorer.model, scorer.memory_choice, scorer.token_budget)


def _architecture(section: str, model: PackedModel) -> Finding:
    found = f"{type(model.full).__name__}, {str(model.dtype).removeprefix('torch.')}"
    return Finding(section=section, subject="architecture", found=found)


def _fused(section: str, model: PackedModel) -> Iterator[Finding]:
    if not model.fusions:
        yield Finding(section=section, subject="fused", found="nothing", why="its layers could not be followed")
    for fusion in model.fusions:
        found = f"{fusion.n_fused} of {fusion.n_modules} fused" if fusion.n_modules else "none there"
        yield Finding(section=section, subject=fusion.part, found=found, why=fusion.why)


def _token_budget(section: str, n_tokens: int) -> Finding:
    why = "by the memory that is free now beside it"
    return Finding(section=section, subject="token budget", found=f"{n_tokens:,} tokens a pack", why=why)


def _memory(section: str, model: PackedModel, choice: MemoryChoice, token_budget: int) -> Iterator[Finding]:
    """Whether layers stay in memory, and what is expected where they do not."""
    from fastcompat.scoring import told

    found, _, why = told(choice, model.layers, token_budget).partition(": ")
    yield Finding(section=section, subject="memory", found=found, why=why)


def _served(subject: str, device: str) -> Finding:
    """What serves a kernel for the tensors of a device type that this machine has."""
    from fastcompat.ops.backends import FASTEST, native_levels, why_not

    fastest = FASTEST[device]
    problem = why_not(fastest, device)
    if problem is None:
        found = f"C++, {native_levels()[0]}" if fastest == "native" else "Triton"
        return Finding(section="kernels", subject=subject, found=found)
    if fastest == "native":
        advice = REBUILD
    elif "compiler" in problem:
        advice = "install gcc or clang, or name one in CC"
    else:
        advice = "pip install triton, in the version that this torch asks for"
    return Finding(section="kernels", subject=subject, found="torch, slower", why=problem, advice=advice)


def _versions() -> Iterator[Finding]:
    yield Finding(section="versions", subject="fastcompat", found=__version__)
    yield Finding(section="versions", subject="Python", found=platform.python_version())
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        yield Finding(section="versions", subject=package, found=found)
