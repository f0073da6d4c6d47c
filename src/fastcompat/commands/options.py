"""Options that several commands have, said once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Turns(StrEnum):
    last = "last"
    all = "all"


class Bos(StrEnum):
    auto = "auto"
    one = "one"
    none = "none"


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
Tokenizer = Annotated[
    TokenIds,
    typer.Option(
        "--tokenizer", help="Whose token ids: tokenizer.json's (file), or those of transformers' class for it."
    ),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as score -o made it.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens; longer rows are cut.", show_default="the model's context")]
TokenBudget = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a pack.", show_default="by free memory, at most 4096, on a GPU 65536"),
]
