"""Options that several commands have, said once."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from fastcompat.errors import UsageError


class Turns(StrEnum):
    last = "last"
    all = "all"


class Bos(StrEnum):
    auto = "auto"
    one = "one"
    none = "none"


class MemoryUse(StrEnum):
    auto = "auto"
    resident = "resident"
    stream = "stream"


class Carried(StrEnum):
    keep = "keep"
    drop = "drop"


class Masks(StrEnum):
    honour = "honour"
    ignore = "ignore"


class TokenIds(StrEnum):
    file = "file"
    class_ = "class"


class ReadOutRule(StrEnum):
    auto = "auto"
    last = "last"
    non_pad = "non-pad"


class ReportFormat(StrEnum):
    table = "table"
    json = "json"


class Average(StrEnum):
    response = "response"
    token = "token"


class TableFormat(StrEnum):
    table = "table"
    md = "md"
    csv = "csv"
    json = "json"


class SortBy(StrEnum):
    auto = "auto"
    car = "car"
    loss = "loss"
    reward = "reward"


class LeaveOut(StrEnum):
    response = "response"
    prompt = "prompt"


By = Annotated[str, typer.Option(help="The column whose values are ranked.")]
Beta = Annotated[list[float] | None, typer.Option("--beta", help="Of CAR. Repeatable.", show_default="3")]
RewardShift = Annotated[float, typer.Option(help="Added to every mean reward, where rewards may be negative.")]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="NAME=COLUMN", help="Where a field is, e.g. response=answer. Repeatable."),
]
Template = Annotated[str, typer.Option(help="auto, chatml, alpaca, plain or a Jinja FILE.")]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template-option",
        metavar="NAME=VALUE",
        help="A variable of the template, e.g. enable_thinking=false. Repeatable.",
    ),
]
Reasoning = Annotated[Carried, typer.Option(help="What an assistant thought before it answered: scored, or left out.")]
Tools = Annotated[Carried, typer.Option(help="The tools that rows name: given to the template, or left out.")]
TurnMasks = Annotated[
    Masks, typer.Option(help="Turns that the corpus leaves out of the loss (weight 0, train false ...).")
]
Tokenizer = Annotated[
    TokenIds,
    typer.Option(
        "--tokenizer", help="Whose token ids: tokenizer.json's (file), or those of transformers' class for it."
    ),
]
RunDirectory = Annotated[
    str, typer.Argument(metavar="RUN", help="A run, as score -o made it: a directory, or s3://, gs://, az://.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="On a GPU: cuBLAS divides no product along its sum (no split-K), so last bits depend less on the pack.",
    ),
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens; longer rows are cut.", show_default="the model's context")]
TokenBudget = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a pack.", show_default="by free memory, at most 4096, on a GPU 65536"),
]


Memory = Annotated[
    MemoryUse,
    typer.Option(
        "--memory", help="Weights stay in memory, or each layer is read when it is needed; auto: where they do not fit."
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="What this process may take, on a GPU of its memory: 8GB, 7.5GiB.",
        show_default="what is free",
    ),
]


def parse_template_options(items: list[str]) -> dict[str, Any]:
    """["enable_thinking=false"] -> {"enable_thinking": False}: values as JSON, or else as text. Raises UsageError."""
    options: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(f"--template-option {item}: write NAME=VALUE, for example enable_thinking=false")
        if name in options:
            raise UsageError(f"--template-option sets {name} twice; keep one of them")
        try:
            options[name] = json.loads(value)
        except ValueError:
            # Python's spelling is a slip, and a text that is true would never be what was meant.
            options[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return options
