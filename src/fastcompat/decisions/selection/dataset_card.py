"""The card beside a file of chosen responses: what was chosen, by what, what was left out, how to train on it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.rows import Status
from fastcompat.store import Run
from fastcompat.version import __version__


def dataset_card(
    run: Run,
    chosen: pa.Table,
    record: dict[str, Any],
    file_name: str,
    *,
    n_unusual: int,
    repo: str | None = None,
) -> str:
    """Markdown. record: the metadata of `select`; n_unusual: conversations that are not user and assistant by turns;
    repo: the data set of the hub in which the file lies."""
    n_prompts = pc.count_distinct(chosen["prompt_id"]).as_py()
    cut = pc.sum(pc.equal(chosen["status"], str(Status.TRUNCATED))).as_py() or 0
    notes = []
    if pending := run.n_rows - record["n_rows"]:
        notes.append(f"{pending:,} responses of the run were not scored yet when these were chosen.")
    if cut:
        notes.append(
            f"{cut:,} chosen responses were longer than the scorer's limit: their figures are those of their "
            "beginning, the file has them whole."
        )
    if n_unusual:
        notes.append(
            f"{n_unusual:,} conversations are not user and assistant by turns: LLaMA-Factory skips them, and some chat "
            "templates refuse them."
        )
    sections = [
        f"# {file_name}",
        f"{chosen.num_rows:,} responses to {n_prompts:,} prompts, chosen of {record['n_rows']:,} responses to "
        f"{record['n_prompts']:,} prompts by fastcompat {__version__}.",
        "\n".join(f"- {note}" for note in notes),
        "## Generators",
        _generators(chosen, record),
        "## How they were chosen",
        settings_of(chosen, record),
        "## What was left out",
        _table(["reason", "responses"], [[reason, f"{n:,}"] for reason, n in record["left_out"].items()])
        if record["left_out"]
        else "Nothing.",
        "## Corpus",
        "\n".join(
            f"- fingerprint `{generation.fingerprint}`, {len(generation.files):,} files"
            for generation in run.generations
        ),
        "## Training on it",
        "Each row is a conversation: `messages`, a list of `role`, `content` and whatever else the corpus says of a "
        "turn (calls, reasoning, a weight), and `tools` where the corpus names some.",
        _trainers(file_name, repo),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _generators(chosen: pa.Table, record: dict[str, Any]) -> str:
    picked = Counter(name or "" for name in chosen["generator"].to_pylist())
    rows = []
    for name, n in sorted(record["available"].items(), key=lambda entry: (-picked[entry[0]], entry[0])):
        with_value = record["with_value"].get(name, 0)
        rows.append(
            [
                name or "(none)",
                f"{n:,}",
                f"{with_value:,}",
                f"{picked[name]:,}",
                f"{picked[name] / chosen.num_rows:.1%}",
            ]
        )
    return _table(["generator", "responses", f"with {record['value']}", "chosen", "share of the chosen"], rows)


def settings_of(chosen: pa.Table, record: dict[str, Any]) -> str:
    """How they were chosen, a Markdown list. record: the metadata of `select`."""
    settings = record["settings"]
    metrics = ", ".join(f"`{name}` ({better} is better)" for name, better in record["metrics"].items())
    if isinstance(settings["by"], dict) and len(settings["by"]) > 1:
        weights = ", ".join(f"{weight:g} x `{name}`" for name, weight in settings["by"].items())
        metrics = f"mixture of percentiles, {weights}: {metrics}"
    lines = [f"- metric: {metrics}"]
    if "car" in record["metrics"]:
        lines.append(
            f"- CAR of a response: (reward + {settings['reward_shift']:g}) / (1 + {settings['beta']:g} x loss), "
            f"beta = {settings['beta']:g}"
        )
    for column, label in (("base_model", "base model"), ("reward_model", "reward model")):
        models = [f"`{name}`" for name in pc.unique(chosen[column].drop_null()).to_pylist()]
        lines.append(f"- {label}: {', '.join(models) or 'not named'}")
    if record["reference"]:
        lines.append(f"- reference of `excess_loss`: `{record['reference']}`")
    if settings["generators"] is not None:
        lines.append(f"- generators: {', '.join(f'`{name}`' for name in settings['generators'])}")
    for name in ("top", "threshold", "budget", "min_tokens", "max_tokens", "drop_duplicates"):
        if settings[name] is not None:
            lines.append(f"- {name}: {settings[name]}")
    if settings["top"] is None and settings["threshold"] is None:
        lines.append("- one response for each prompt")
    lines.append("- equal values: the lower loss first, then the row key that is first as text")
    return "\n".join(lines)


def _trainers(file_name: str, repo: str | None) -> str:
    kind = "parquet" if file_name.endswith(".parquet") else "json"
    name = PurePath(file_name).name.split(".")[0]
    quoted = json.dumps(file_name)
    unpacked = file_name.removesuffix(".gz")
    packed = " after `gunzip`" if unpacked != file_name else ""
    loaded = f'"{kind}", data_files={quoted}'
    where = f"path: {quoted}, ds_type: {kind}"
    origin: dict[str, Any] = {"file_name": unpacked}
    if repo is not None:
        packed = ""
        loaded = f"{json.dumps(repo)}, data_files={quoted}"
        where = f"path: {json.dumps(repo)}, data_files: [{quoted}]"
        origin = {"hf_hub_url": repo}
    axolotl = f"datasets: [{{{where}, type: chat_template, field_messages: messages}}]"
    entry = origin | {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    return f"""TRL:

```python
rows = datasets.load_dataset({loaded}, split="train")
trl.SFTTrainer(model="BASE_MODEL", train_dataset=rows).train()
```

Axolotl, in the configuration:

```yaml
chat_template: tokenizer_default
{axolotl}
```

LLaMA-Factory{packed}, in `dataset_info.json`, then `dataset: {name}` in the configuration:

```json
{json.dumps(name)}: {json.dumps(entry)}
```"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    cells = [header, ["---", *["---:"] * (len(header) - 1)], *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
