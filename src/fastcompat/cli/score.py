"""`fastcompat score`: a corpus and models in, a run directory out."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fastcompat.cli.display import say
from fastcompat.cli.options import (
    Average,
    Bos,
    Carried,
    Deterministic,
    Device,
    Dtype,
    Map,
    Masks,
    MaxLength,
    Memory,
    MemoryLimit,
    MemoryUse,
    ReadOutRule,
    Reasoning,
    SortBy,
    Template,
    TemplateOption,
    TokenBudget,
    TokenIds,
    Tokenizer,
    Tools,
    TurnMasks,
    Turns,
    parse_template_options,
)
from fastcompat.errors import Interrupted, UsageError

REWARDS = "Rewards"
RACE = "Until it is sure"
SHARED = "Several GPUs or machines"

if TYPE_CHECKING:
    from fastcompat.corpus import PreparationProgress


def score(
    context: typer.Context,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="RUN", help="The run, made or resumed: a directory, or s3://BUCKET/RUN."
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files, directories, globs; hf://, s3://, gs://, az://, https://. None: resume RUN.",
        ),
    ] = None,
    base_model: Annotated[
        list[str] | None, typer.Option("--base-model", metavar="ID_OR_DIR", help="Computes losses. Repeatable.")
    ] = None,
    reward_model: Annotated[
        list[str] | None, typer.Option("--reward-model", metavar="ID_OR_DIR", help="Computes rewards. Repeatable.")
    ] = None,
    mapping: Map = None,
    template: Template = "auto",
    turns: Annotated[Turns, typer.Option(help="The assistant turns that are scored.")] = Turns.last,
    score_eos: Annotated[bool, typer.Option(help="Score the end-of-turn token too.")] = True,
    bos: Annotated[Bos, typer.Option(help="auto: as the tokenizer does; one: exactly one; none.")] = Bos.auto,
    max_length: MaxLength = None,
    template_option: TemplateOption = None,
    reasoning: Reasoning = Carried.keep,
    tools: Tools = Carried.keep,
    turn_masks: TurnMasks = Masks.honour,
    token_ids: Tokenizer = TokenIds.file,
    device: Device = "auto",
    dtype: Dtype = "auto",
    token_budget: TokenBudget = None,
    deterministic: Deterministic = False,
    memory: Memory = MemoryUse.auto,
    memory_limit: MemoryLimit = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the models on the hub.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be read.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Add INPUTs that RUN does not have yet.")] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="METRIC,...",
            help="Compute what these need too: ifd, rsr, entropy ...",
            show_default="car",
        ),
    ] = None,
    keep_tokens: Annotated[
        bool, typer.Option("--keep-tokens", help="Keep every token's NLL, and what --for needs of tokens.")
    ] = False,
    reward_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=REWARDS,
            metavar="NAME",
            help="Which of the corpus's own rewards to keep, or none.",
            show_default="all",
        ),
    ] = None,
    reward_output: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=REWARDS, metavar="NAME|INDEX", help="Which output of a reward model with several."
        ),
    ] = None,
    reward_read_out: Annotated[
        ReadOutRule,
        typer.Option(
            rich_help_panel=REWARDS, help="The token at which a reward is read; auto: as the model's own class."
        ),
    ] = ReadOutRule.auto,
    reward_bos: Annotated[Bos, typer.Option(rich_help_panel=REWARDS, help="As --bos, of reward models.")] = Bos.auto,
    reward_reasoning: Annotated[
        Carried, typer.Option(rich_help_panel=REWARDS, help="As --reasoning, of reward models.")
    ] = Carried.keep,
    reward_tools: Annotated[
        Carried, typer.Option(rich_help_panel=REWARDS, help="As --tools, of reward models.")
    ] = Carried.keep,
    reward_max_length: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=REWARDS,
            help="Tokens; longer conversations have no reward.",
            show_default="the model's context",
        ),
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate", rich_help_panel=REWARDS, help="Judge a longer conversation by its beginning instead."
        ),
    ] = False,
    worker: Annotated[
        str,
        typer.Option(
            rich_help_panel=SHARED,
            metavar="I/N|auto",
            help="This process's share, when N processes work on one RUN; auto: any number, whatever is free.",
        ),
    ] = "1/1",
    gpus: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SHARED,
            metavar="all|0,1",
            help="A process for each of these GPUs.",
            show_default="all, if several",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SHARED,
            min=1,
            help="So many processes, on a CPU, and to prepare a large corpus.",
            show_default="1, to prepare one a core",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SHARED,
            metavar="auto|local|HOST:PORT",
            help="Have workers on Ray score: in the cluster at hand, on this machine alone, or in the cluster there.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=SHARED,
            min=1,
            help="Of --ray: so many, each with a GPU if there are any.",
            show_default="one for each GPU, or machine",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="GENERATOR", help="Score only its responses. Repeatable.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RACE,
            metavar="GOAL",
            help="Score prompts in random order only until this is sure: winner, ranking or precision=0.5%.",
        ),
    ] = None,
    margin: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RACE,
            metavar="SHARE",
            help="Figures this close count as equal; 0: go on until one is better.",
            show_default="1%",
        ),
    ] = None,
    beta: Annotated[float | None, typer.Option(rich_help_panel=RACE, help="Of CAR.", show_default="3")] = None,
    average: Annotated[
        Average | None,
        typer.Option(rich_help_panel=RACE, help="Loss: mean over responses or over tokens.", show_default="response"),
    ] = None,
    reward_shift: Annotated[
        float | None, typer.Option(rich_help_panel=RACE, help="As of rank.", show_default="0")
    ] = None,
    sort: Annotated[
        SortBy | None,
        typer.Option(
            rich_help_panel=RACE, help="What is compared; auto: CAR, without rewards the loss.", show_default="auto"
        ),
    ] = None,
) -> None:
    """Score a corpus: losses under base models, rewards of reward models, into a run directory.

    The same command resumes a run that was interrupted, and adds another model, template or setting beside what is
    finished. Rows that cannot be scored stay in the output with the reason. Rewards that the corpus has already come
    along by themselves.
    """
    from transformers.utils import logging as transformers_logging

    from fastcompat.cli.cluster import refuse_beside_ray, score_in_cluster
    from fastcompat.cli.display import LiveDisplay, show_corpus
    from fastcompat.cli.processes import arguments_of, environments, preparers, score_in_processes
    from fastcompat.cli.racing import everybody_but, hold_races, race_asked
    from fastcompat.cli.working import stopping, work_off
    from fastcompat.corpus.formats import parse_overrides
    from fastcompat.metrics.catalogue import extras_needed_by, metric_names
    from fastcompat.scoring.asked_models import AskedModels
    from fastcompat.scoring.on_ray import reach
    from fastcompat.scoring.passes import Worker, find_scorer, in_turn
    from fastcompat.store import is_remote, place_of
    from fastcompat.store.preparing import CorpusSettings, prepare_run

    of_rewards = {"--reward-output": reward_output, "--reward-max-length": reward_max_length, "--truncate": truncate}
    idle = [option for option, value in of_rewards.items() if value]
    if idle and not reward_model:
        raise UsageError(f"{', '.join(idle)} is about reward models: name one with --reward-model")
    transformers_logging.disable_progress_bar()
    share = Worker.of(worker)
    refuse_beside_ray(ray, workers, worker=worker, processes=processes, gpus=gpus)
    # `demo` is one process whatever there is.
    alone = context.info_name != "score" or ray is not None
    children = [] if alone else environments(processes, gpus, device, worker)
    race = race_asked(
        until,
        only=only,
        margin=margin,
        beta=beta,
        average=average and average.value,
        reward_shift=reward_shift,
        sort=sort and sort.value,
    )
    overrides = [*(mapping or []), *([] if reward_column is None else [f"reward={reward_column}"])]
    settings = CorpusSettings(overrides=parse_overrides(overrides), strict=strict)
    extras = extras_needed_by(metric_names(metrics) if metrics else (), keep_tokens=keep_tokens)
    models = AskedModels(
        base=base_model or [],
        reward=reward_model or [],
        device=device,
        dtype=dtype,
        token_budget=token_budget,
        deterministic=deterministic,
        memory=memory.value,
        memory_limit=memory_limit,
        base_settings={
            "template": template,
            "turns": turns.value,
            "score_eos": score_eos,
            "bos": bos.value,
            "max_length": max_length,
            "template_options": parse_template_options(template_option or []),
            "reasoning": reasoning.value,
            "tools": tools.value,
            "turn_masks": turn_masks.value,
            "revision": revision,
            "token_ids": token_ids.value,
            "extras": extras.columns,
        },
        reward_settings={
            "output": reward_output,
            "read_out": reward_read_out.value,
            "bos": reward_bos.value,
            "max_length": reward_max_length,
            "truncate": truncate,
            "reasoning": reward_reasoning.value,
            "tools": reward_tools.value,
            "revision": revision,
            "token_ids": token_ids.value,
        },
    )
    if is_remote(output):
        place_of(output).refuse_unwritable()
    # A missing model, an unsupported architecture or a wrong template shows here, not after hours of reading.
    passes = models.passes() if ray is None else []
    if ray is not None:
        models.elsewhere().scorers()
    with stopping() as stop:
        if extend or not place_of(output).has("manifest.json"):
            if ray is not None:
                reach(ray)
            else:
                _ = passes[0].scorers[0].model  # a checkpoint that lacks weights shows before hours of reading
        display = LiveDisplay("corpus")

        def preparing(progress: PreparationProgress) -> None:
            display.preparing(progress)
            if stop():
                raise Interrupted("interrupted while the corpus was prepared; give the same command again")

        with display.showing():
            run, summary = prepare_run(
                output,
                inputs or [],
                settings,
                extend=extend,
                processes=preparers(processes, worker),
                on_progress=preparing,
            )
        if summary is not None:
            show_corpus(summary, time.monotonic() - display.began)
        for scorer in [scorer for served in passes for scorer in served.scorers]:
            find_scorer(run, scorer)  # a dtype that was left open is that of the run's first worker
        leave_out = everybody_but(run, only or [])
        if children:
            passes[0].unload()
            score_in_processes(run, children, arguments_of(context), stop=stop)
        elif ray is not None:
            score_in_cluster(run, models, race, address=ray, workers=workers, leave_out=leave_out, stop=stop)
        elif race is not None:
            hold_races(run, passes, race, token_budget=token_budget, worker=share, stop=stop)
        else:
            work = partial(work_off, run, token_budget=token_budget, worker=share, stop=stop, leave_out=leave_out)
            in_turn(passes, work)
    say(f"\nNext: [bold]fastcompat rank {escape(output)}[/]")
    if race is not None:
        say("To score the rest, for the best response to every prompt: the same command without --until.")
