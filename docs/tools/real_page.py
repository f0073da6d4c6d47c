"""Writes the figures of docs/real.md from bench/results, so that none is from memory.

python docs/tools/real_page.py         # after `make real RESPONSES=DIR`
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT, PAGE = ROOT / "bench" / "results" / "real-smollm2-alpacaeval.json", ROOT / "docs" / "real.md"


def figures() -> str:
    """What was run, how long it took, how far off the losses are, and the ranking."""
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    corpus, machine, score, check = (result[name] for name in ("corpus", "machine", "score", "check"))
    statuses = ", ".join(f"{count:,} {status}" for status, count in score["statuses"].items())
    lines = [
        f"{corpus['prompts']:,} prompts, {corpus['generators']} generators, {score['responses']:,} responses "
        f"({statuses}), {score['scored_tokens']:,} scored tokens. In {score['dtype']} on {machine['cores']} cores "
        f"({machine['processor']}): {score['seconds']:,.0f} s, {score['tokens_per_second']:,} tokens/s, "
        f"{score['saved_by_sharing']:.0%} of the tokens saved by sharing (torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}, {machine['date']}).",
        "",
        f"Of {check['responses']} responses the loss was computed again the plain way. Largest relative error: "
        f"{check['largest_relative_error_float32']:.1e} in float32, {check['largest_relative_error_of_the_run']:.1e} "
        f"in the run's {score['dtype']}; of the loss that transformers returns, with a log-softmax in float32, "
        f"{check['largest_relative_error_of_transformers_loss']:.1e}. Their median loss is "
        f"{check['median_loss']:.2f} nats a token, and the model "
        f"answers “{check['question']}” with “{check['answer']}”.",
        "",
        f"The report is {result['report_bytes'] / 1e6:.1f} MB, `select` chose {result['selected']:,} responses.",
        "",
        "| rank | generator | responses | reward | loss | CAR | best |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["ranking"]:
        reward, loss, car = (_with_interval(row, name) for name in ("reward", "loss", "car"))
        lines.append(
            f"| {row['rank']} | {row['generator']} | {row['n']} | {reward} | {loss} | {car} | {row['p_best']:.0%} |"
        )
    return "\n".join(lines)


def _with_interval(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3g} ({row[f'{name}_low']:.3g} to {row[f'{name}_high']:.3g})"


def rendered() -> str:
    """The page with its figures brought up to date."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)
    assert pattern.search(text), "docs/real.md has no place for figures"
    return pattern.sub(lambda match: f"{match[1]}{figures()}\n{match[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
