"""The demo's corpus through `fastcompat score` as a user runs it: whether it ends well, and what the loop waits for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_timing import Finding

from fastcompat.demo import model_directory, reward_model_directory
from fastcompat.demo.corpus import write_corpus

PROMPTS = 500


def pipeline(device: str) -> Iterator[Finding]:
    """Losses and rewards; seconds of the run's log: in all, in the passes, waiting for units and for the disk."""
    with tempfile.TemporaryDirectory() as directory:
        corpus, run = Path(directory) / "corpus", Path(directory) / "run"
        write_corpus(corpus, n_prompts=2 if device == "cpu" else PROMPTS)
        models = ["--base-model", str(model_directory()), "--reward-model", str(reward_model_directory())]
        command = [
            sys.executable,
            "-m",
            "fastcompat",
            "score",
            str(corpus),
            *models,
            "-o",
            str(run),
            "--device",
            device,
        ]
        began = time.monotonic()
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = time.monotonic() - began
        print(process.stdout)
        finding: Finding = {"case": " ".join(command[1:4]), "figures": {"whole command": {"s": seconds}}}
        if process.returncode:
            said = process.stdout.strip().splitlines()[-1:] or ["nothing"]
            finding["problem"] = f"exit code {process.returncode}: {said[0]}"
        lines = [json.loads(line) for log in sorted((run / "log").glob("*")) for line in log.read_text().splitlines()]
        stops = [line for line in lines if line["event"] == "stop"]
        for stop in stops:
            parts = stop["seconds"]
            total = max(parts["total"], 1e-9)
            finding["figures"][f"score {', '.join(stop['scorers'])}"[:60]] = {
                "rows": stop["rows"],
                "tokens": stop["tokens"],
                "s": parts["total"],
                "tokens/s": stop["tokens"] / total,
            }
            finding["figures"]["score"] = {
                "forward": parts["forward"] / total,
                "waiting for units": parts["waiting_for_units"] / total,
                "waiting for writes": parts["waiting_for_writes"] / total,
            }
        yield finding | {"log": stops}
        yield _losses(run)


def _losses(run: Path) -> Finding:
    """What there is to be read of it: every row has a figure."""
    command = [sys.executable, "-m", "fastcompat", "rank", str(run)]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(process.stdout)
    finding: Finding = {"case": "fastcompat rank", "output": process.stdout.splitlines()}
    return finding | ({"problem": f"exit code {process.returncode}"} if process.returncode else {})
