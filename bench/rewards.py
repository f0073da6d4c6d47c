"""fastcompat's reward models against transformers' text-classification pipeline, in turn in one run.

    python bench/rewards.py [--shape SmolLM2-135M ...] [--workload generators context] [--rounds 3]

The shape as a *ForSequenceClassification with random weights judges whole conversations: by the pipeline at several
batch sizes, in corpus order and sorted by length; by a length-sorted loop written by hand; one at a time; and by
fastcompat. Every one's rewards are compared with float32. Prints tables and writes
bench/results/rewards-SHAPE-WORKLOAD.json, on a GPU with cuda_ before it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from reward_loops import BATCH_SIZES
from reward_measurement import (
    RewardSettings,
    classifier_subject,
    measure_rewards,
    rendered,
    save_random_classifier,
)
from rich.console import Console
from transformers.utils import logging as transformers_logging

from fastcompat.benchmark.subjects import SHAPES
from fastcompat.benchmark.workloads import WORKLOADS, chosen_workloads

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["SmolLM2-135M"])
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS, "all"], default=["generators", "context"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="of every workload, instead of its own number")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="N")
    parser.add_argument("--token-budget", type=int, help="of fastcompat, instead of the one it chooses")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY")
    chosen = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    console = Console(width=160)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    for shape in chosen.shape:
        with TemporaryDirectory() as directory:
            save_random_classifier(shape, Path(directory), device=chosen.device)
            subject = classifier_subject(Path(directory), name=shape, device=chosen.device, dtype=chosen.dtype)
            tell(f"{shape}, one label, {subject.dtype} on {subject.device}")
            settings = RewardSettings(
                workloads=chosen_workloads(chosen.workload),
                rounds=chosen.rounds,
                token_budget=chosen.token_budget,
                n_prompts=chosen.prompts,
                batch_sizes=chosen.batch_sizes,
                tell=tell,
                progress=lambda done, total, name: tell(f"{done}/{total} {name}"),
            )
            for measurement in measure_rewards(subject, settings):
                console.print(rendered(measurement))
                place = "" if subject.device.type == "cpu" else f"{subject.device.type}_"
                path = chosen.output / f"{place}rewards-{shape}-{measurement.problem.workload}.json"
                path.write_text(json.dumps(measurement.record(), indent=2) + "\n")


if __name__ == "__main__":
    main()
