"""AlpacaEval's published outputs as a corpus for `make real`, from a checkout of the repository tatsu-lab/alpaca_eval.

    python bench/real/alpaca_eval.py CHECKOUT DIR

Writes DIR/NAME.jsonl.gz for each of `GENERATORS`, with the columns instruction, output, generator, dataset and
preference: how far the judge (weighted_alpaca_eval_gpt4_turbo) preferred this answer to the baseline's, from 0 to 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

# From strong to weak, with the judge's baseline (gpt4_1106_preview, 0.5 by definition) and the model that fooled it.
GENERATORS = (
    "gpt4_1106_preview",
    "NullModel",
    "claude-2.1",
    "OpenHermes-2.5-Mistral-7B",
    "gpt-3.5-turbo-0301",
    "Qwen-14B-Chat",
    "gemma-7b-it",
    "vicuna-13b-v1.5",
    "nous-hermes-13b",
    "ultralm-13b",
    "vicuna-7b-v1.5",
    "baize-v2-13b",
    "phi-2-sft",
    "gemma-2b-it",
    "falcon-40b-instruct",
    "chatglm2-6b",
    "alpaca-7b",
    "pythia-12b-mix-sft",
    "falcon-7b-instruct",
    "text_davinci_003",
)


def main() -> None:
    """Read the outputs and their annotations, write one file a generator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    parser.add_argument("directory", type=Path, metavar="DIR")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    for name in GENERATORS:
        results = options.checkout / "results" / name
        if not results.is_dir():
            raise SystemExit(f"{results} is not there: CHECKOUT is a clone of github.com/tatsu-lab/alpaca_eval")
        outputs = read(results / "model_outputs.json")
        # 1: the baseline's answer is better, 2: this one.
        judged = read(results / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json")
        preferences = {row["instruction"]: row["preference"] for row in judged}
        with gzip.open(options.directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for row in outputs:
                preference = preferences.get(row["instruction"])
                columns = {
                    "instruction": row["instruction"],
                    "output": row["output"],
                    "generator": name,
                    "dataset": row["dataset"],
                    "preference": None if preference is None else round(preference - 1, 6),
                }
                file.write(json.dumps(columns, ensure_ascii=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


if __name__ == "__main__":
    main()
