"""What the host does for each token, without a model: rows read, rendered, encoded, packed, written; and what waits.

    python bench/host_pipeline.py [--responses DIR] [--prompts N] [--tokenizer DIR] [--rounds 3] [--shared-machine]

Steps are measured in seconds of the CPU (`time.thread_time`, one thread, tokenizers without threads of their own), as
the loop calls them, one unit after the other. Tokens are those of sequences, as packing without sharing would compute
them; those that the packs hold are told beside them. Then `score_run` with its threads and a null model, which sleeps
for each pack as long as a model of that rate would compute: the share of its time that the loop waited.

DIR of responses is what bench/real/alpaca_eval.py writes, the tokenizer by default Qwen3's (bench/real/material.py
fetches it). The demo's corpus with the demo's tokenizer comes second. Writes bench/results/host_pipeline.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "real"))
from material import material_directory

from fastcompat.benchmark.machine import machine
from fastcompat.demo import model_directory
from fastcompat.demo.corpus import write_corpus
from fastcompat.models.pack_plan import PackPlan, plan_pack
from fastcompat.ops import OneCopy
from fastcompat.rows import Response, from_table
from fastcompat.scoring.engine import Progress, score_run
from fastcompat.scoring.losses import ResponseScores
from fastcompat.scoring.packs import pack_sequences
from fastcompat.store import Run, ScorerStore, open_run
from fastcompat.store.preparing import CorpusSettings, prepare_run
from fastcompat.tokens import ConversationTokenizer, PrefixForest, TokenizationSettings

RESULT = Path(__file__).parent / "results" / "host_pipeline.json"
TOKEN_BUDGET = 65_536
# Packed tokens a second of the null models.
RATES = (250_000, 500_000, 1_000_000)
# The bars.
LEAST_TOKENS_PER_CPU_SECOND = 700_000
MOST_WAITED = 0.05


@dataclass(kw_only=True)
class NullModel:
    """All that the loop asks of a model, which computes nothing and takes as long as one of this rate.

    Its packs are planned as for a GPU, attention's lists included.
    """

    tokens_per_second: float
    vocabulary: int = 1 << 24
    rope_boundary: int | None = None
    device: Any = field(default_factory=lambda: SimpleNamespace(type="cuda"))

    def plan(self, forest: PrefixForest, positions: Any) -> NullPlan:
        plan = plan_pack(forest, positions, prunes=True, windows=(), device=torch.device("cpu"))
        plan.attention.summary(None)
        if plan.last_attention is not None:
            plan.last_attention.summary(None)
        return NullPlan(OneCopy(plan, torch.device("cpu")))

    def hidden(self, plan: PackPlan) -> torch.Tensor:
        time.sleep(plan.forest.n_tokens / self.tokens_per_second)
        return torch.ones(len(plan.targets), 1)

    def target_statistics(self, hidden: torch.Tensor, plan: PackPlan, statistics: Sequence[str]) -> torch.Tensor:
        return hidden.T.expand(len(statistics), -1)


class NullPlan:
    """A plan that stays where it is."""

    def __init__(self, plan: OneCopy[PackPlan]) -> None:
        self._plan = plan

    def to(self, device: Any) -> PackPlan:
        return self._plan.to(torch.device("cpu"))


@dataclass(kw_only=True)
class Steps:
    """Seconds of this thread by step; a step within another one counts for itself only."""

    seconds: dict[str, float] = field(default_factory=dict)
    _within: list[float] = field(default_factory=list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._within.pop()
                if self._within:
                    self._within[-1] += taken

        return call


class TimedBackend:
    """A tokenizer's backend whose encoding is a step."""

    def __init__(self, backend: Any, steps: Steps) -> None:
        self._backend = backend
        self.encode_batch = steps.timed("encode_batch", backend.encode_batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def timed_tokenizer(directory: Path, steps: Steps) -> Any:
    """A tokenizer as a scorer has it, whose steps are timed. What it remembers begins empty."""
    tokenizer: Any = ConversationTokenizer.from_pretrained(
        str(directory), TokenizationSettings(), context_length=32_768
    )
    aligner = tokenizer._align
    aligner.backend = backend = TimedBackend(aligner.backend, steps)
    if getattr(aligner, "pieces", None) is not None:
        aligner.pieces._backend = backend
    tokenizer._render = steps.timed("template", tokenizer._render)
    tokenizer._sequence = steps.timed("alignment and mask", tokenizer._sequence)
    return tokenizer


def begin(tokenizer: Any) -> Callable[[list[Response]], ResponseScores]:
    """What a scorer does with a unit's rows before they are packed."""
    return lambda rows: ResponseScores(tokenizer(rows))


def null_store(run: Run, name: str) -> ScorerStore:
    settings = {"model": "null", "token_budget": TOKEN_BUDGET}
    return run.scorer(name, {"kind": "base_model", "model": name}, lambda: settings)


def one_round(run: Run, directory: Path, name: str) -> dict[str, Any]:
    """Seconds of the CPU by step over the whole run, and the tokens."""
    steps = Steps()
    model = NullModel(tokens_per_second=float("inf"))
    scores_of = steps.timed("other of tokens", begin(timed_tokenizer(directory, steps)))
    store = null_store(run, name)
    tokens, packed = 0, 0
    for unit in run.units:
        table = steps.timed("read", run.unit_rows)(unit)
        rows = steps.timed("rows", from_table)(table)
        scores = scores_of(rows)
        packs = steps.timed("forest", pack_sequences)(model, scores, token_budget=TOKEN_BUDGET)
        for forest in packs:
            plan = steps.timed("plan", model.plan)(forest, scores.positions(forest)).to(model.device)
            (values,) = scores.compute(model, plan, model.hidden(plan))
            steps.timed("sums", scores.add)(forest, (values.numpy(),))
            tokens += forest.n_unshared_tokens
            packed += forest.n_tokens
        (part,) = steps.timed("table", scores.tables)(table)
        steps.timed("write", store.commit)(unit, part)
    return {"tokens": tokens, "packed_tokens": packed, "rows": run.n_rows, "seconds": steps.seconds}


def waiting(run: Run, directory: Path, rate: float, name: str) -> dict[str, Any]:
    """`score_run` with its threads and a null model of so many packed tokens a second."""
    tokenizer = ConversationTokenizer.from_pretrained(str(directory), TokenizationSettings(), context_length=32_768)
    progress = Progress()
    began, began_cpu = time.perf_counter(), time.process_time()
    model: Any = NullModel(tokens_per_second=rate)
    score_run(
        run,
        [null_store(run, name)],
        model,
        begin(tokenizer),
        token_budget=TOKEN_BUDGET,
        units=run.units,
        progress=progress,
    )
    seconds = time.perf_counter() - began
    waited = progress.timings.preparation.seconds + progress.timings.writing.seconds
    return {
        "rate": rate,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - began_cpu, 2),
        "packed_tokens_per_second": round(progress.n_tokens / seconds),
        "waited": round(waited / seconds, 4),
    }


def first_prompts(files: Sequence[Path], n_prompts: int | None, folder: Path) -> list[Path]:
    """The files, or the first lines of each in `folder`."""
    if n_prompts is None:
        return list(files)
    for file in files:
        with (
            gzip.open(file, "rt", encoding="utf-8") as whole,
            gzip.open(folder / file.name, "wt", encoding="utf-8") as some,
        ):
            some.writelines(islice(whole, n_prompts))
    return [folder / file.name for file in files]


@contextmanager
def without_threads_of_tokenizers() -> Any:
    """As the loop sets it where the model computes on the same cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]


def measured(name: str, files: Sequence[Path], tokenizer: Path, rounds: int, rates: Sequence[float]) -> dict[str, Any]:
    """Medians over rounds of one corpus with one tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_run(Path(folder) / "run", [str(file) for file in files], CorpusSettings())
        run = open_run(Path(folder) / "run")
        with without_threads_of_tokenizers():
            found = [one_round(run, tokenizer, f"round-{k}") for k in range(rounds)]
        waits = [waiting(run, tokenizer, rate, f"rate-{rate:g}") for rate in rates]
    totals = [sum(own["seconds"].values()) for own in found]
    total = statistics.median(totals)
    tokens = found[0]["tokens"]
    steps = {step: statistics.median(own["seconds"][step] for own in found) for step in found[0]["seconds"]}
    result = {key: found[0][key] for key in ("rows", "tokens", "packed_tokens")} | {
        "cpu_seconds": round(total, 3),
        "cpu_seconds_of_rounds": [round(own, 3) for own in totals],
        "tokens_per_cpu_second": round(tokens / total),
        "packed_tokens_per_cpu_second": round(found[0]["packed_tokens"] / total),
        "steps": {
            step: {"cpu_seconds": round(own, 3), "share": round(own / total, 3)}
            for step, own in sorted(steps.items(), key=lambda item: -item[1])
        },
        "null_models": waits,
    }
    show(name, result)
    return result


def show(name: str, result: Mapping[str, Any]) -> None:
    print(f"{name}: {result['rows']:,} rows, {result['tokens']:,} tokens ({result['packed_tokens']:,} packed)")
    print(f"  {result['tokens_per_cpu_second']:,} tokens per CPU second")
    for step, own in result["steps"].items():
        print(f"  {step:20}{own['cpu_seconds']:8.3f} s {own['share']:7.1%}")
    for wait in result["null_models"]:
        print(f"  null model of {wait['rate']:>9,.0f} tokens/s: the loop waits {wait['waited']:.1%} of its time")


def main() -> None:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--responses", type=Path, help="20 generators' answers to AlpacaEval; default: the demo's only")
    parser.add_argument("--prompts", type=int, help="of each file the responses to its first N prompts only")
    parser.add_argument("--tokenizer", type=Path, default=material_directory() / "tokenizers" / "qwen3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shared-machine", action="store_true", help="say that others were at work on the machine")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    results = {}
    if options.responses:
        named = f"AlpacaEval, {options.tokenizer.name}"
        with tempfile.TemporaryDirectory() as folder:
            files = first_prompts(sorted(options.responses.glob("*.jsonl.gz")), options.prompts, Path(folder))
            results[named] = measured(named, files, options.tokenizer, options.rounds, RATES)
    with tempfile.TemporaryDirectory() as folder:
        files = write_corpus(Path(folder), n_prompts=options.prompts or 500)
        results["demo"] = measured("demo", files, model_directory(), options.rounds, RATES[-1:])
    report = {
        "machine": machine() | {"tokenizers": version("tokenizers")},
        "shared_machine": options.shared_machine,
        "load_before": round(load, 2),
        "prompts": options.prompts,
        "bars": {"tokens_per_cpu_second": LEAST_TOKENS_PER_CPU_SECOND, "waited": MOST_WAITED},
        "results": results,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
