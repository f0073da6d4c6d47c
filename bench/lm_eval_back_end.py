"""lm-evaluation-harness on `fastcompat` and on `hf`: processor time of one 5-shot and one 0-shot task, in turn.

    python bench/lm_eval_back_end.py [--questions 40] [--rounds 3] [--dtype float32] [--random]

Multiple choice with four letters in MMLU's format, made of the documentation of Python's standard library: nothing is
downloaded. Lengths are nearly those of MMLU (a 5-shot prefix of 594 tokens, questions of 103). SmolLM2-135M's published
weights and tokenizer from `make real`'s material, or its shape with random weights (`--random`). Both back ends get the
same requests through `loglikelihood`, tokenisation included. `hf` at the batch size that is best for it, tried before.
Tokens are counted where each model is called: those of our packs, those of HFLM's batches with their padding. Needs
`pip install 'fastcompat[lm-eval]'`. Writes bench/results/lm_eval.json, on a GPU cuda_lm_eval.json.

Predicted, for 40 questions on two cores in float32. 5-shot: `hf` computes 40 x 697 tokens, of which it pads few, and
their logits, a fifth of all its work; we compute 594 + 40 x 103 tokens, 5.9 times fewer, and logits of 160 tokens: 7 to
9 times less processor time. 0-shot: the same tokens, no logits of the questions: 0.6 to 0.8 of `hf`'s.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers.utils import logging as transformers_logging

from fastcompat.adapters.lm_eval import FastcompatLM
from fastcompat.benchmark.machine import machine
from fastcompat.benchmark.subjects import random_model
from fastcompat.demo.corpus import first_paragraph
from fastcompat.demo.library import HELD_OUT_MODULES, Documented, documented
from fastcompat.models import CausalLM

sys.path.insert(0, str(Path(__file__).parent / "real"))
from material import model_directory

RESULTS = Path(__file__).parent / "results"
SHOTS = 5
LETTERS = "ABCD"
BATCH_SIZES = (1, 4, 8, 16)
# Questions on which hf's batch sizes are tried.
TRIED = 12
# Words of an option; so the questions have the length of MMLU's.
WORDS = 15


def questions(n_questions: int) -> list[tuple[str, str]]:
    """A question with its options, up to "Answer:", and the letter of the right one."""
    draw = random.Random(17)
    things = [thing for thing in documented(HELD_OUT_MODULES) if len(first_paragraph(thing).split()) >= 8]
    found = []
    for thing in draw.sample(things, n_questions):
        options = [thing, *draw.sample(things, len(LETTERS) - 1)]
        draw.shuffle(options)
        listed = [f"{letter}. {said(option)}" for letter, option in zip(LETTERS, options, strict=True)]
        asked = f"Which of these describes `{thing.name}` of Python's standard library best?"
        found.append(("\n".join([asked, *listed, "Answer:"]), LETTERS[options.index(thing)]))
    return found


def said(thing: Documented) -> str:
    words = first_paragraph(thing).replace(thing.name.rpartition(".")[2], "it").split()
    return " ".join(words[:WORDS])


def requests(n_questions: int, shots: int) -> list[Instance]:
    """Of every question the four letters."""
    made = questions(SHOTS + n_questions)
    before = "The following are multiple choice questions (with answers) about Python.\n\n"
    before += "".join(f"{asked} {answer}\n\n" for asked, answer in made[:shots])
    return [
        Instance("loglikelihood", {}, (before + asked, f" {letter}"), n)
        for n, (asked, _) in enumerate(made[SHOTS:])
        for letter in LETTERS
    ]


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Tokens that the models are given."""
    tokens = {"fastcompat": 0, "hf": 0}
    hidden, call = CausalLM.hidden, HFLM._model_call

    def packed(model: Any, plan: Any) -> Any:
        tokens["fastcompat"] += plan.input_ids.numel()
        return hidden(model, plan)

    def batched(model: Any, inps: Any, *args: Any, **options: Any) -> Any:
        tokens["hf"] += inps.numel()
        return call(model, inps, *args, **options)

    CausalLM.hidden, HFLM._model_call = packed, batched  # type: ignore[method-assign]
    try:
        yield tokens
    finally:
        CausalLM.hidden, HFLM._model_call = hidden, call  # type: ignore[method-assign]


def timed(model: Any, asked: Sequence[Instance]) -> tuple[list[tuple[float, bool]], float, float]:
    """The answers, seconds of all processors, and seconds on the clock."""
    began = time.process_time(), time.perf_counter()
    answers = model.loglikelihood(list(asked), disable_tqdm=True)
    return answers, time.process_time() - began[0], time.perf_counter() - began[1]


def best_batch_size(theirs: Any, asked: Sequence[Instance]) -> tuple[int, dict[int, float]]:
    seconds = {}
    theirs.batch_size_per_gpu = min(BATCH_SIZES)
    timed(theirs, asked[: len(LETTERS)])  # warms up
    for size in BATCH_SIZES:
        theirs.batch_size_per_gpu = size
        seconds[size] = timed(theirs, asked)[1]
    return min(seconds, key=lambda size: seconds[size]), seconds


def measure(ours: Any, theirs: Any, n_questions: int, shots: int, rounds: int) -> dict[str, Any]:
    asked = requests(n_questions, shots)
    theirs.batch_size_per_gpu, tried = best_batch_size(theirs, asked[: TRIED * len(LETTERS)])
    timed(ours, asked[: len(LETTERS)])
    lengths = [len(ours.tok_encode(one.args[0])) for one in asked[:: len(LETTERS)]]
    with counted() as tokens:
        once = {name: timed(model, asked)[0] for name, model in (("fastcompat", ours), ("hf", theirs))}
    difference = np.array(once["fastcompat"])[:, 0] - np.array(once["hf"])[:, 0]
    chosen = {name: np.array(answers)[:, 0].reshape(-1, len(LETTERS)).argmax(1) for name, answers in once.items()}
    seconds: dict[str, list[float]] = {"fastcompat": [], "hf": []}
    clock: dict[str, list[float]] = {"fastcompat": [], "hf": []}
    for _ in range(rounds):
        for name, model in (("fastcompat", ours), ("hf", theirs)):
            _, processors, elapsed = timed(model, asked)
            seconds[name].append(round(processors, 3))
            clock[name].append(round(elapsed, 3))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shots": shots,
        "questions": n_questions,
        "mean_context_tokens": round(statistics.mean(lengths), 1),
        "tokens": tokens,
        "hf_batch_size": theirs.batch_size_per_gpu,
        "hf_batch_sizes_tried": {size: round(value, 3) for size, value in tried.items()},
        "processor_seconds": seconds,
        "clock_seconds": clock,
        "times_less": round(medians["hf"] / medians["fastcompat"], 2),
        "times_fewer_tokens": round(tokens["hf"] / tokens["fastcompat"], 2),
        "largest_difference_nats": float(np.abs(difference).max()),
        "same_answers": int((chosen["fastcompat"] == chosen["hf"]).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--random", action="store_true", help="random weights of that shape instead of the published")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with TemporaryDirectory() as directory:
        model = str(model_directory())
        if arguments.random:
            from transformers import AutoTokenizer

            random_model("SmolLM2-135M").save_pretrained(directory)
            AutoTokenizer.from_pretrained(model).save_pretrained(directory)
            model = directory
        options = {"device": arguments.device, "dtype": arguments.dtype}
        ours, theirs = FastcompatLM(model, **options), HFLM(model, **options)
        tasks = []
        for shots in (SHOTS, 0):
            tasks.append(measure(ours, theirs, arguments.questions, shots, arguments.rounds))
            print(json.dumps(tasks[-1], indent=2), flush=True)
    record = {
        "model": "SmolLM2-135M, random weights" if arguments.random else "SmolLM2-135M-Instruct",
        "dtype": arguments.dtype,
        "token_budget": ours.token_budget,
        "tasks": tasks,
        "machine": machine(ours.device),
    }
    place = "cuda_" if ours.device.type == "cuda" else ""
    (arguments.output / f"{place}lm_eval.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
