"""Whole scorers against each other on one model and workload, in turn in one run; every one's losses are compared.

    python bench/end_to_end.py [--shape SmolLM2-135M ...] [--workload generators ... | all] [--rounds 3] [--peers]

What `fastcompat bench` does, for several shapes, and with `--peers` (`make peers`) also lm-evaluation-harness and
CTranslate2. Prints tables and writes bench/results/end_to_end-SHAPE-WORKLOAD.json, on a GPU with cuda_ before it.
Useful FLOPs and efficiency: ARCHITECTURE.md.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from transformers.utils import logging as transformers_logging

from fastcompat.benchmark.loops import PLAIN_LOOPS
from fastcompat.benchmark.measurement import Settings, measure
from fastcompat.benchmark.subjects import SHAPES, shape_subject
from fastcompat.benchmark.table import rendered
from fastcompat.benchmark.workloads import WORKLOADS, chosen_workloads

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["SmolLM2-135M"])
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS, "all"], default=["generators"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="of every workload, instead of its own number")
    parser.add_argument("--token-budget", type=int, help="of fastcompat, instead of the one it chooses")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peers", action="store_true", help="also what `make peers` installs")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    console = Console(width=160)
    for shape in arguments.shape:
        subject = shape_subject(shape, device=arguments.device, dtype=arguments.dtype)
        console.print(f"[bold]{shape}[/], {subject.dtype} on {subject.device}")
        with ExitStack() as stack:
            loops = PLAIN_LOOPS
            if arguments.peers:
                from peers import peer_loops

                loops += peer_loops(Path(stack.enter_context(TemporaryDirectory())))
            settings = Settings(
                workloads=chosen_workloads(arguments.workload),
                rounds=arguments.rounds,
                n_prompts=arguments.prompts,
                token_budget=arguments.token_budget,
                loops=loops,
                tell=lambda line: console.print(line, highlight=False),
            )
            for measurement in measure(subject, settings):
                console.print(rendered(measurement))
                place = "" if subject.device.type == "cpu" else f"{subject.device.type}_"
                path = arguments.output / f"{place}end_to_end-{shape}-{measurement.problem.workload}.json"
                path.write_text(json.dumps(measurement.record(), indent=2) + "\n")


if __name__ == "__main__":
    main()
