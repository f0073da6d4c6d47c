"""The paper's Table 4 done again: what to run, and what came out beside what was published. No torch.

    for step in plan(output="zoo"):          # print it, or run it: step.arguments are those of `fastcompat`
        print(step.command)
    table = table4(open_run("zoo"))

The corpus, Magpie-100K-Generator-Zoo, has one struct per generator with the response and three rewards, which
`fastcompat score` takes along by itself. What the paper leaves open, and what is done here instead, is `CHOICES`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions.validation import paper
from fastcompat.decisions.validation.outcomes import METADATA_KEY, PAPER, outcomes
from fastcompat.decisions.validation.validation import VALIDATION_SCHEMA, generator_metrics, unmatched, validate
from fastcompat.errors import UsageError
from fastcompat.metrics import BETA, missing
from fastcompat.rows import as_table
from fastcompat.store import Run

# 100,000 instructions, each answered by every generator: 10 Parquet files, about 2.4 GB.
CORPUS = "hf://datasets/Magpie-Align/Magpie-100K-Generator-Zoo"
# The paper's name of each base model -> its id on the hub.
BASE_MODELS = {
    "Qwen2-1.5B": "Qwen/Qwen2-1.5B",
    "Gemma-2-2B": "google/gemma-2-2b",
    "Qwen2.5-3B": "Qwen/Qwen2.5-3B",
    "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "Llama-3.1-Minitron-4B": "nvidia/Llama-3.1-Minitron-4B-Width-Base",
}
GPT2 = "openai-community/gpt2"
TEMPLATE = "plain"
MAX_LENGTH = 4096
# What the paper does not say -> what is done here.
CHOICES = {
    "beta": f"{BETA:g}, as in code of others (arXiv 2502.11779)",
    "the average L": "the mean over responses of each one's mean NLL, as in that code",
    "the template": f"{TEMPLATE} for every model: instruction, blank line, response, end of sequence. The models' own "
    "would differ (Qwen has one, the others have none), and GPT-2 knows no markers",
    "the end of a response": "the end-of-sequence token is scored, as a trainer would train on it",
    "where responses are cut": f"after {MAX_LENGTH:,} tokens, the paper's length in training; GPT-2 after its 1,024",
    "the reward model in CAR": "all three, side by side; one whose mean reward is negative for some generator has "
    "no CAR without a shift",
    "normalised rewards": "not normalised, not shifted",
    "IFD": "both, the ratio of losses and that of perplexities, averaged over responses",
    "a generator's perplexity": "exp of its mean loss",
    "the response length": "the base model's tokens",
    "which Minitron": "the width-pruned",
}
_METRICS = ("reward", "ifd_loss", "ifd_ppl", "perplexity", "response_length", "car")
_METRIC_OF = {"ifd": "ifd_loss", "ppl": "perplexity", "reward": "reward"}

TABLE4_SCHEMA = pa.schema([("paper_base_model", pa.string()), *VALIDATION_SCHEMA])


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the recipe; `arguments` are those of `fastcompat`."""

    title: str
    reason: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As it is typed in a shell."""
        return shlex.join(("fastcompat", *self.arguments))


def plan(
    base_models: Sequence[str] = (),
    *,
    corpus: str | os.PathLike[str] = CORPUS,
    output: str | os.PathLike[str] = "zoo",
    ifd: bool = True,
    gpt2: str | None = GPT2,
) -> list[Step]:
    """The commands that score the corpus into one run directory, one base model each; any can be repeated.

    base_models: the paper's names, hub ids or directories whose last part is one of them; all five where none is given.
    corpus: the hub's, or a copy. ifd: also read every response without its instruction. gpt2: the model for the two
    GPT-2 metrics; None leaves them out. Raises UsageError for a base model that the paper does not have.
    """
    models = [name if "/" in name else BASE_MODELS[paper.base_model_named(name)] for name in base_models or BASE_MODELS]
    for model in models:
        paper.base_model_named(model)
    every = ("--template", TEMPLATE, "--max-length", str(MAX_LENGTH), *(("--for", "ifd") if ifd else ()))
    steps: list[Step] = []
    for model in [*models, *([gpt2] if gpt2 else [])]:
        title = f"Score every response under {model}"
        reason = f"{'IFD and PPL' if ifd else 'PPL'} of GPT-2" if model == gpt2 else "loss, length, and with them CAR"
        if not steps:
            reason += "; this step reads the corpus, with the three rewards that it has"
        inputs = () if steps else (os.fspath(corpus),)
        arguments = ("score", *inputs, "--base-model", model, *every, "-o", os.fspath(output))
        steps.append(Step(title=title, reason=reason, arguments=arguments))
    return steps


def table4(
    scores: Any,
    *,
    betas: float | Sequence[float] = (BETA,),
    reward_shift: float = 0.0,
    permutations: int = 99_999,
    seed: int = 0,
) -> pa.Table:
    """Our Table 4 beside the published one: `TABLE4_SCHEMA`, rows of every base model of the paper that was scored.

    scores: a `Run` or the table of `Run.scores()`, under one or more of the five base models, with GPT-2 or without,
    and with the corpus's rewards. Rows are `validate`'s against the paper's outcomes for that base model, in Table 4's
    order: two for a published IFD, one for CAR of each reward model and beta. A column that the scores have nothing
    for has a row without rho, with what would add it in `note`. A generator without an outcome (GPT-4) counts
    nowhere; `table4_notes` lists it. Raises UsageError: none of the five base models, fewer than four of the paper's
    generators.
    """
    table = scores.scores() if isinstance(scores, Run) else as_table(scores)
    there = pc.unique(table["base_model"]).drop_null().to_pylist() if "base_model" in table.column_names else []
    ours = {found: name for name in there if (found := paper.find_base_model(name))}
    if not ours:
        raise UsageError(
            f"no base model of the paper ({', '.join(paper.base_models())}) was scored; "
            f"the scores are of {', '.join(there) or 'none'}"
        )
    metrics = [metric for metric in _METRICS if missing(metric, table) is None]
    figures = generator_metrics(table, metrics=metrics, betas=betas, reward_shift=reward_shift)
    parts = []
    for name in (known for known in paper.base_models() if known in ours):
        own = validate(figures, outcomes(PAPER + name), permutations=permutations, seed=seed)
        rows = [row for row in own.to_pylist() if row["table4"] is not None]
        rows += _absent(table, {row["table4"] for row in rows}, name)
        parts += [{"paper_base_model": name} | row for row in sorted(rows, key=_place)]
    # The five have the same generators, so what is told of the last one's holds for all.
    return pa.Table.from_pylist(parts, TABLE4_SCHEMA.with_metadata({METADATA_KEY: own.schema.metadata[METADATA_KEY]}))


def table4_notes(table: pa.Table) -> list[str]:
    """What a reader of `table4`'s table must know: who is in it, what is missing, what the paper leaves open."""
    told = json.loads(table.schema.metadata[METADATA_KEY])
    lines = [f"Spearman's rho over {len(told['matched'])} generators, with 95% intervals for other generators."]
    lines += unmatched(told)
    for row in table.to_pylist():
        if row["note"] is not None:
            lines.append(f"{row['paper_base_model']}, {_label(row)}: {row['note']}.")
    return [
        *lines,
        "The paper does not say these; here they are:",
        *(f"{what}: {ours}." for what, ours in CHOICES.items()),
    ]


def formatted_table4(table: pa.Table) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, rows of cells as text): a row per metric, and per base model our rho and the published."""
    models = [name for name in paper.base_models() if name in set(table["paper_base_model"].to_pylist())]
    header = ["metric", *(cell for name in models for cell in (name, "published"))]
    lines: dict[str, dict[str, tuple[str, str]]] = {}
    for row in sorted(table.to_pylist(), key=_place):
        rho = "none" if row["rho"] is None else f"{row['rho']:.4f}"
        if row["rho_low"] is not None:
            rho += f" ({row['rho_low']:.2f} to {row['rho_high']:.2f})"
        lines.setdefault(_label(row), {})[row["paper_base_model"]] = (rho, f"{row['published']:.4f}")
    return header, [
        [label, *(cell for name in models for cell in cells.get(name, ("", "")))] for label, cells in lines.items()
    ]


def _absent(table: pa.Table, present: set[str], base_model: str) -> list[dict[str, Any]]:
    """A row with the reason for each column of Table 4 that the scores have nothing for."""
    names = [name for name in pc.unique(table["base_model"]).to_pylist() if name is not None]
    of_models = {
        "gpt2": [name for name in names if paper.is_gpt2(name)],
        "self": [name for name in names if paper.find_base_model(name) == base_model],
    }
    rows = []
    for column in (column for column in paper.TABLE4_COLUMNS if column not in present):
        kind, _, whose = column.partition("_")
        metric = _METRIC_OF.get(kind, column)
        own = table
        if whose in of_models:
            own = table.filter(pc.is_in(table["base_model"], pa.array(of_models[whose], pa.string())))
        if whose == "gpt2" and not own.num_rows:
            note = f"no scores of GPT-2: `fastcompat score ... --base-model {GPT2}` adds them"
        else:
            note = missing(metric, own) or f"no rewards of {paper.TABLE4_COLUMNS[column].removeprefix('reward, ')}"
        published = paper.published(base_model)[column]
        rows.append({"metric": metric, "n": 0, "table4": column, "published": published, "note": note})
    return rows


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """Where a row stands: by its column in Table 4, then by that of the reward it reads."""
    order = list(paper.TABLE4_COLUMNS)
    reward = paper.table4_column("reward", None, row.get("reward_model"), "")
    return order.index(row["table4"]), order.index(reward) if reward else len(order)


def _label(row: dict[str, Any]) -> str:
    """A row of the printed table: the paper's column, and which of several of ours."""
    label = paper.TABLE4_COLUMNS[row["table4"]]
    if row["base_model"] is None:  # a reward, or nothing of ours
        return label
    if row["metric"] in ("ifd_loss", "ifd_ppl"):
        return f"{label}, ratio of {'losses' if row['metric'] == 'ifd_loss' else 'perplexities'}"
    if row["metric"] == "car":
        return f"{label}, {(row['reward_model'] or 'reward').removeprefix('column ')}, beta {row['beta']:g}"
    return label
