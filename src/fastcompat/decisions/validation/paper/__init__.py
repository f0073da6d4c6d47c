"""The published figures of the paper that CAR comes from: its Tables 4 and 6 (README.md says what is not known).

No torch. The data are two CSV files beside this module.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fastcompat.errors import UsageError

_HERE = Path(__file__).resolve().parent

# The columns of Table 4 in its order, as people read them.
TABLE4_COLUMNS = {
    "reward_armorm": "reward, ArmoRM",
    "reward_skywork_llama_8b": "reward, Skywork-Llama-8B",
    "reward_skywork_gemma_27b": "reward, Skywork-Gemma-27B",
    "ifd_gpt2": "IFD, GPT-2",
    "ifd_self": "IFD, self",
    "ppl_gpt2": "PPL, GPT-2",
    "ppl_self": "PPL, self",
    "response_length": "response length",
    "car": "CAR",
}
# A reward model's name, without case and punctuation, begins or goes on like this.
_REWARD_COLUMNS = {
    "armorm": "reward_armorm",
    "skyworkrewardllama318b": "reward_skywork_llama_8b",
    "skyworkrewardgemma227b": "reward_skywork_gemma_27b",
}
_OF_A_BASE_MODEL = {"ifd_loss": "ifd", "ifd_ppl": "ifd", "perplexity": "ppl"}


@cache
def average_performance() -> pa.Table:
    """Table 6: `base_model`, `generator`, `alpaca_eval2_lc`, `alpaca_eval2_wr`, `arena_hard_wr` (percent) and
    `average_performance`, the mean of the first and the third; 5 x 19 rows."""
    return pa.csv.read_csv(_HERE / "average_performance.csv")


@cache
def published_correlations() -> pa.Table:
    """Table 4: `base_model` and Spearman's rho of each metric (`TABLE4_COLUMNS`) with AP; 5 rows."""
    return pa.csv.read_csv(_HERE / "spearman.csv")


def base_models() -> list[str]:
    """The paper's five, as its tables call them."""
    names: list[str] = published_correlations()["base_model"].to_pylist()
    return names


def find_base_model(name: str) -> str | None:
    """The paper's name of a base model; None where it is none of the five.

    Case, punctuation, what stands before the last "/" and an ending "-Base" (with "Width" or "Depth") do not count.
    """
    own = re.sub(r"(width|depth)?base$", "", _letters(name))
    return next((known for known in base_models() if _letters(known) == own), None)


def is_gpt2(name: str) -> bool:
    """Whether a model is the smallest GPT-2, under any organisation."""
    return _letters(name) == "gpt2"


def base_model_named(name: str) -> str:
    """`find_base_model`, but raises UsageError with the five names for another."""
    found = find_base_model(name)
    if found is None:
        raise UsageError(f"{name!r} is no base model of the paper; it has {', '.join(base_models())}")
    return found


def published(base_model: str) -> dict[str, float]:
    """Table 4's rho of every column for one of `base_models()`."""
    table = published_correlations()
    (row,) = table.filter(pc.equal(table["base_model"], base_model)).to_pylist()
    return {column: row[column] for column in TABLE4_COLUMNS}


def table4_column(metric: str, base_model: str | None, reward_model: str | None, of: str) -> str | None:
    """The column of Table 4 that a figure of ours belongs beside, in the row of the paper's base model `of`.

    metric: a name of `metrics.METRICS`. base_model, reward_model: as a run calls them. Both IFDs belong beside the one
    that is published, CAR of every reward model beside the one CAR: it is not known which they are. None where the
    paper has no such figure.
    """
    if metric == "reward":
        name = _letters(reward_model or "")
        return next((column for begin, column in _REWARD_COLUMNS.items() if begin in name), None)
    itself = base_model is not None and find_base_model(base_model) == of
    if metric in _OF_A_BASE_MODEL:
        if base_model is not None and is_gpt2(base_model):
            return f"{_OF_A_BASE_MODEL[metric]}_gpt2"
        return f"{_OF_A_BASE_MODEL[metric]}_self" if itself else None
    return metric if itself and metric in ("response_length", "car") else None


def _letters(name: str) -> str:
    """Letters and digits of what follows the last "/"."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].casefold())
