"""Every causal model and every sequence classifier that transformers has, small and random: exact, refused, or a fault.

    python bench/every_model.py [--task causal reward] [--type gemma4_text ...]

Each type is built, saved and scored in a process of its own (`tests/helpers/every_model.py`): "exact" where losses or
rewards are those of its own class, one sequence at a time, "refused" where a ModelError says why in one sentence; all
else ("wrong", or whatever was raised) is a fault, and the exit code is 1. Writes bench/results/every_model.json; some
minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from every_model import TASKS, outcome, types_of  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from fastcompat.benchmark.machine import machine  # noqa: E402

RESULT = ROOT / "bench" / "results" / "every_model.json"
SECONDS = 300


def one(task: str, model_type: str, found: Connection) -> None:
    """Send what became of a type; the text of what was raised, where that is no ModelError."""
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as directory:
            found.send(outcome(task, model_type, Path(directory)))
    except Exception:
        found.send(("raised", traceback.format_exc()))


def apart(task: str, model_type: str) -> tuple[str, str]:
    """What became of a type, in a process of its own, which has the modules that are loaded here."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=one, args=(task, model_type, sending))
    process.start()
    sending.close()
    try:
        what, why = receiving.recv() if receiving.poll(SECONDS) else ("raised", f"not done after {SECONDS} s")
    except EOFError:
        what, why = "raised", "the process died"
    process.kill()
    process.join()
    return what, why


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--type", nargs="+", metavar="TYPE", help="of these types only; nothing is written")
    chosen = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as directory:  # what every process needs is loaded here, once
        outcome("causal", "llama", Path(directory))
    found = []
    for task in chosen.task:
        for model_type in chosen.type or types_of(task):
            what, why = apart(task, model_type)
            print(f"{task} {model_type}: {what} ({why})", flush=True)
            found.append({"task": task, "type": model_type, "outcome": what, "why": why})
    counts = {task: Counter(entry["outcome"] for entry in found if entry["task"] == task) for task in chosen.task}
    print(counts)
    if not chosen.type:
        RESULT.write_text(json.dumps({"machine": machine(), "counts": counts, "models": found}, indent=2) + "\n")
    return int(any(entry["outcome"] not in ("exact", "refused") for entry in found))


if __name__ == "__main__":
    sys.exit(main())
