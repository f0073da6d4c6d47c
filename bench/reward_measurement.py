"""A reward model's shape, its workloads and all loops: seconds, and how far each one's rewards are from float32.

Dimension key: N conversations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_loops import (
    BATCH_SIZES,
    PIPELINE,
    Rewards,
    Texts,
    conversations,
    exact_rewards,
    id_tokenizer,
    packed_reward_loop,
    reward_loops,
    texts_of,
)
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastcompat.benchmark.flops import up_projection
from fastcompat.benchmark.loops import Sequences
from fastcompat.benchmark.machine import machine
from fastcompat.benchmark.measurement import Problem, release
from fastcompat.benchmark.rounds import LoopResult, run_in_turn
from fastcompat.benchmark.subjects import SHAPES, Subject, draw_weights
from fastcompat.models import (
    ModelSettings,
    RewardModel,
    load_config,
    load_reward_model,
    read,
    resolve_device,
    resolve_dtype,
    text_config,
)
from fastcompat.scoring import RewardScores, choose_token_budget, free_memory, pack_sequences

# Rewards of random weights are as far apart as those of real models: some units.
REWARD_DEVIATION = 3.0


def save_random_classifier(shape: str, directory: Path, *, seed: int = 0, device: str = "auto") -> None:
    """Write a *ForSequenceClassification of one of `SHAPES` there: one label, the last token pads, bfloat16."""
    from transformers import AutoModelForSequenceClassification

    config = SHAPES[shape]()
    config.pad_token_id = config.vocab_size - 1
    config.num_labels = 1
    torch.manual_seed(seed)
    # Drawn where that is fast: three billion normal numbers take a CPU minutes.
    with resolve_device(device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    draw_weights(model)
    with torch.no_grad():
        model.score.weight.mul_(REWARD_DEVIATION)
    model.save_pretrained(directory)


def classifier_subject(
    directory: Path, *, name: str, weights: str = "random", device: str = "auto", dtype: str = "auto"
) -> Subject[RewardModel]:
    """A *ForSequenceClassification with one label whose pad token is its vocabulary's last, as save_pretrained writes.

    Raises ModelError where it is no reward model.
    """
    config = load_config(str(directory), None)
    place = resolve_device(device)
    chosen = resolve_dtype(dtype, config, place)
    loaded = ModelSettings(device=str(place), dtype=str(chosen).removeprefix("torch."))

    def plain() -> Any:
        from transformers import AutoModelForSequenceClassification

        full = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=chosen, use_safetensors=True, trust_remote_code=False
        )
        return full.to(place).eval()

    return Subject(
        name=name,
        weights=weights,
        config=config,
        device=place,
        dtype=chosen,
        load_plain=plain,
        load_ours=lambda: load_reward_model(str(directory), loaded),
    )


@dataclass(frozen=True, kw_only=True)
class RewardMeasurement:
    """One reward model and workload, every loop."""

    subject: Subject[RewardModel]
    problem: Problem
    token_budget: int
    n_packed_tokens: int  # that fastcompat computes
    tokenization_seconds: float  # of all texts, one by one; a part of the pipeline's time
    product_rates: Sequence[float]  # FLOP/s, round by round
    exact: Rewards
    loops: Mapping[str, LoopResult]
    failed: Mapping[str, str]  # the loops without a figure, and why

    def best(self, prefix: str) -> str | None:
        """The fastest loop whose name begins so; None where none has a figure."""
        names = [name for name in self.loops if name.startswith(prefix)]
        return min(names, key=lambda name: self.loops[name].seconds, default=None)

    @property
    def best_of_kind(self) -> dict[str, str | None]:
        """The loop that stands for each way of doing it: its fastest batch size, of those above 1 where it sorts."""
        return {
            "pipeline": self.best(PIPELINE),
            "pipeline in corpus order": self.best(f"{PIPELINE}, batches"),
            "length-sorted pipeline": self.best(f"{PIPELINE}, length-sorted"),
            "length-sorted by hand": self.best("Hugging Face, length-sorted"),
            "one at a time": self.best("Hugging Face, one at a time"),
        }

    def ratio(self, loop: LoopResult, other: str | None) -> float | None:
        """How many times as fast as the loop named `other`; None where that one has no figure."""
        return self.loops[other].seconds / loop.seconds if other is not None and other in self.loops else None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        kinds = self.best_of_kind
        ours = self.loops.get("fastcompat")
        return {
            "shape": self.subject.name,
            "weights": self.subject.weights,
            "workload": self.problem.workload,
            "dtype": str(self.subject.dtype).removeprefix("torch."),
            "token_budget": self.token_budget,
            "n_prompts": self.problem.n_prompts,
            "n_sequences": len(self.problem.sequences),
            "n_cut": self.problem.n_cut,
            "n_tokens": self.problem.n_tokens,
            "n_packed_tokens": self.n_packed_tokens,
            "tokenization_seconds": self.tokenization_seconds,
            "product_gflop_per_s": statistics.median(self.product_rates) / 1e9,
            "all_product_gflop_per_s": [rate / 1e9 for rate in self.product_rates],
            "reward_mean": float(self.exact.mean()),
            "reward_deviation": float(self.exact.std()),
            "best_of_kind": kinds,
            "fastcompat_over_best_of_kind": {kind: ours and self.ratio(ours, name) for kind, name in kinds.items()},
            "scorers": {
                name: {
                    "seconds": loop.seconds,
                    "all_seconds": loop.all_seconds,
                    "tokens_per_second": self.problem.n_tokens / loop.seconds,
                    "speedup_over_best_pipeline": self.ratio(loop, kinds["pipeline"]),
                    "largest_error": loop.largest_error,
                    "mean_error": loop.mean_error,
                    "batch_size": loop.size,
                    "batch_unit": loop.unit,
                }
                for name, loop in self.loops.items()
            },
            "failed": dict(self.failed),
            "machine": machine(self.subject.device),
        }


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What is measured, and how; as `measurement.Settings`."""

    workloads: Sequence[str] = ("generators",)
    rounds: int = 3
    token_budget: int | None = None
    n_prompts: int | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES
    tell: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int, str], None] = lambda done, total, name: None


@torch.no_grad()
def measure_rewards(subject: Subject[RewardModel], settings: RewardSettings) -> Iterator[RewardMeasurement]:
    """Each workload in turn; rewards in float32 first, so that this copy of the model is gone before others come."""
    subject.refuse_too_large()
    text = text_config(subject.config)
    pad_id = read(text, "pad_token_id")
    assert pad_id == read(text, "vocab_size") - 1, f"token {pad_id} pads, not the last one"
    problems = [
        Problem.create(subject, workload, settings.n_prompts, vocabulary=pad_id) for workload in settings.workloads
    ]
    tokenizer = id_tokenizer(pad_id)
    texts = [texts_of(problem.sequences) for problem in problems]
    tokenization = [
        tokenization_seconds(tokenizer, of_problem, problem.sequences)
        for of_problem, problem in zip(texts, problems, strict=True)
    ]
    for problem in problems:
        settings.tell(problem.described())
    model = subject.float32()
    weight = up_projection(model).to(subject.dtype, copy=True)
    exact = [exact_rewards(model, problem.sequences) for problem in problems]
    del model
    release()
    token_budget = settings.token_budget or choose_token_budget(
        subject.device, subject.config, subject.dtype, free_memory(subject.device)
    )
    full, ours = subject.plain(), subject.load_ours()
    for k, problem in enumerate(problems):
        loops = [
            *reward_loops(full, tokenizer, texts[k], settings.batch_sizes),
            packed_reward_loop(ours, token_budget=token_budget),
        ]
        rounds = run_in_turn(
            loops, problem.sequences, exact[k], weight, n_rounds=settings.rounds, progress=settings.progress
        )
        packs = pack_sequences(ours, RewardScores(conversations(problem.sequences)), token_budget=token_budget)
        yield RewardMeasurement(
            subject=subject,
            problem=problem,
            token_budget=token_budget,
            n_packed_tokens=sum(pack.n_tokens for pack in packs),
            tokenization_seconds=tokenization[k],
            product_rates=rounds.product_rates,
            exact=exact[k],
            loops=rounds.results,
            failed=rounds.failed,
        )


def tokenization_seconds(tokenizer: Any, texts: Texts, sequences: Sequences) -> float:
    """How long the pipeline's tokenizer takes for all texts, one by one; they must be the sequences' ids exactly."""
    began = time.perf_counter()
    found = [tokenizer(texts[sequence.input_ids.tobytes()])["input_ids"] for sequence in sequences]
    seconds = time.perf_counter() - began
    for ids, sequence in zip(found, sequences, strict=True):
        assert np.array_equal(ids, sequence.input_ids), f"{len(sequence.input_ids)} ids became {len(ids)} others"
    return seconds


def rendered(measurement: RewardMeasurement) -> RenderableType:
    """One row a loop, as they ran; what stands behind the figures; and what it comes to, in words."""
    kinds = measurement.best_of_kind
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("scorer", overflow="fold")
    for name in ("seconds", "tokens/s", "speed, best pipeline = 1", "largest error", "mean error"):
        table.add_column(name, justify="right")
    for name, loop in measurement.loops.items():
        ratio = measurement.ratio(loop, kinds["pipeline"])
        table.add_row(
            Text(name, style="bold" if name == "fastcompat" or name in kinds.values() else ""),
            f"{loop.seconds:,.2f}",
            f"{measurement.problem.n_tokens / loop.seconds:,.0f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{loop.largest_error:.5f}",
            f"{loop.mean_error:.5f}",
        )
    for name, reason in measurement.failed.items():
        table.add_row(Text(name), *[""] * 4, Text(reason, style="red"))
    legend = (
        "medians of interleaved rounds; bold: the fastest batch size of each kind. Errors: of a reward, against "
        "float32 with the same weights, one conversation at a time; rewards have a deviation of "
        f"{measurement.exact.std():.2f}. Tokenisation takes {measurement.tokenization_seconds:.3f} of the pipeline's "
        "seconds."
    )
    return Group(table, Text(legend, style="dim"), Text(in_words(measurement)))


def in_words(measurement: RewardMeasurement) -> str:
    """What it comes to."""
    ours = measurement.loops.get("fastcompat")
    if ours is None:
        return f"fastcompat has no figure: {measurement.failed.get('fastcompat', 'it did not run')}."
    compared = [
        f"{ratio:.1f} times as fast as {name}"
        for name in dict.fromkeys(measurement.best_of_kind.values())
        if (ratio := measurement.ratio(ours, name)) is not None
    ]
    return f"{measurement.problem.workload}: fastcompat is {'; '.join(compared)}."
