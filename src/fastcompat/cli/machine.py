"""The commands about this machine: what serves what on it (`doctor`), and how fast that is (`bench`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastcompat.cli.display import LiveDisplay, console, errors, say
from fastcompat.cli.options import Device, Dtype, Memory, MemoryLimit, MemoryUse, ReportFormat, TokenBudget
from fastcompat.errors import UsageError

DEFAULT_SHAPE = "SmolLM2-135M"


def doctor(
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="ID_OR_DIR", help="Also what of this model runs fused.")
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option("--reward-model", metavar="ID_OR_DIR", help="Also its head, what it reads, what runs fused."),
    ] = None,
    reward_output: Annotated[
        str | None, typer.Option(metavar="NAME|INDEX", help="Which output of a reward model with several.")
    ] = None,
    memory: Memory = MemoryUse.auto,
    memory_limit: MemoryLimit = None,
    format: Annotated[ReportFormat, typer.Option("--format", help="How it is written.")] = ReportFormat.table,
) -> None:
    """What computes what on this machine, and why nothing faster does."""
    from fastcompat.benchmark.doctor import examine
    from fastcompat.cli.display import write_findings

    if reward_output is not None and reward_model is None:
        raise UsageError("--reward-output is about a reward model: name one with --reward-model")
    if (memory is not MemoryUse.auto or memory_limit) and base_model is None and reward_model is None:
        raise UsageError("--memory and --memory-limit are about a model: name one with --base-model or --reward-model")
    findings = examine(
        base_model, reward_model, reward_output=reward_output, memory=memory.value, memory_limit=memory_limit
    )
    write_findings(findings, as_json=format is ReportFormat.json)


def bench(
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="ID_OR_DIR", help="A model of yours, instead of a shape.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights in the shape of SmolLM2-135M, Qwen2.5-0.5B, Qwen2.5-1.5B, Llama-3.2-3B or Gemma-2-2B.",
            show_default=DEFAULT_SHAPE,
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="generators, unshared, context, reasoning or all. Repeatable.", show_default="generators"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Every scorer runs once a round; the median counts.")] = 3,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of a workload.", show_default="the workload's own, 8x on a GPU")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    token_budget: TokenBudget = None,
    to_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write everything there too; - prints only that.")
    ] = None,
) -> None:
    """This machine against the plain Hugging Face loss: seconds, efficiency, and how far each is from float32.

    The padded loop that everybody writes, the length-sorted one, one response at a time, and fastcompat score the same
    random token ids in turn.
    """
    from transformers.utils import logging as transformers_logging

    from fastcompat.benchmark.measurement import Settings, measure
    from fastcompat.benchmark.subjects import model_subject, shape_subject
    from fastcompat.benchmark.table import rendered
    from fastcompat.benchmark.workloads import chosen_workloads

    if base_model and shape:
        raise UsageError(f"--base-model {base_model} and --shape {shape}: give one of them")
    workloads = chosen_workloads(workload or ["generators"])
    if to_json and to_json != "-" and not Path(to_json).absolute().parent.is_dir():
        raise UsageError(f"--json {to_json}: there is no directory {Path(to_json).parent}")
    transformers_logging.disable_progress_bar()
    if base_model:
        subject = model_subject(base_model, device=device, dtype=dtype)
    else:
        subject = shape_subject(shape or DEFAULT_SHAPE, device=device, dtype=dtype)

    alone = to_json == "-"  # then nothing else is on standard output
    display = LiveDisplay("bench")

    def tell(line: str) -> None:
        if alone:
            errors.print(line, highlight=False, soft_wrap=True, markup=False)
        else:
            say(escape(line))

    def progress(done: int, total: int, name: str) -> None:
        if not alone:
            display.show(done, total, name)

    tell(f"{subject.name}, {subject.weights} weights, {str(subject.dtype).removeprefix('torch.')} on {subject.device}")
    settings = Settings(
        workloads=workloads,
        rounds=rounds,
        token_budget=token_budget,
        n_prompts=prompts,
        tell=tell,
        progress=progress,
    )
    records = []
    with display.showing():
        for measurement in measure(subject, settings):
            records.append(measurement.record())
            if not alone:
                console.print()
                console.print(rendered(measurement))
    if to_json:
        text = json.dumps(records, indent=2)
        if alone:
            print(text)
        else:
            Path(to_json).write_text(text + "\n", encoding="utf-8")
