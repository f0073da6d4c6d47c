"""`demo`: the whole job on the corpus and the models that come along."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastcompat.cli.decide import rank, report
from fastcompat.cli.display import say
from fastcompat.cli.score import score


def demo(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN", help="Keep the run here.", show_default="a temporary one"),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts; each is answered by every generator.")] = 500,
) -> None:
    """The whole job on the embedded corpus and models: offline, in about a minute."""
    from fastcompat.demo import model_directory, reward_model_directory
    from fastcompat.demo.corpus import write_corpus

    directory = output or Path(tempfile.mkdtemp(prefix="fastcompat-demo-")) / "run"
    corpus = directory.parent / f"{directory.name}-corpus"
    page = directory.parent / f"{directory.name}-report.html"
    if not (directory / "manifest.json").exists():
        write_corpus(corpus, n_prompts=prompts)
    base, judge = (
        os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
        for path in (model_directory(), reward_model_directory())
    )

    def command(text: str) -> None:
        say(f"\n[bold]$ fastcompat {escape(text)}[/]")

    say(
        "What Python's standard library says about itself, answered by several response generators;\n"
        "which of them would teach the small base model best?"
    )
    models = f"--base-model {base} --reward-model {judge} --keep-tokens -o {directory}"
    command(f"score {corpus} {models} --until winner")
    score(context, str(directory), [str(corpus)], [base], [judge], keep_tokens=True, until="winner")
    say(
        "\n500 prompts are few for a race: of 100,000 with generators like these, it needs about one response in a\n"
        "hundred. Now the rest, for the report and the best response to every prompt."
    )
    command(f"score {models}")
    score(context, str(directory), None, [base], [judge], keep_tokens=True)
    command(f"rank {directory}")
    rank(str(directory))
    say(
        "\nThe judge is as small as the base model and often wrong (its MODEL_CARD.md says how often): look where\n"
        "other-function stands, whose answers are all about something else."
    )
    command(f"report {directory} -o {page}")
    report(str(directory), str(page))
    say(
        "\nOn your own data: [bold]fastcompat score YOUR_FILES --base-model Qwen/Qwen2.5-0.5B "
        "--reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B -o RUN[/],\n"
        "then [bold]fastcompat rank RUN[/], [bold]fastcompat report RUN[/], "
        "[bold]fastcompat select RUN -o best.jsonl[/]."
    )
