"""`fastcompat score --until`: the loop of a race, and what people see of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from fastcompat.cli.display import LiveDisplay, interrupted, say, show_pass
from fastcompat.errors import Interrupted, UsageError
from fastcompat.wording import counted_noun, duration, printable

if TYPE_CHECKING:
    from fastcompat.decisions.racing.rule import Look
    from fastcompat.decisions.racing.run_race import RunRace
    from fastcompat.scoring.asked_models import AskedModels
    from fastcompat.scoring.passes import Pass, Worker
    from fastcompat.store import LeaveOut, Run, Unit

# Generators that a refusal lists.
SHOWN_GENERATORS = 12
# A pair that needs two models of which only one is in memory at a time takes fewer turns.
RATIO_OF_TURNS = 1.5


def race_asked(until: str | None, *, only: Sequence[str] | None, **options: Any) -> dict[str, Any] | None:
    """What `RaceSettings` takes, but `figure` may be None; None where no race was asked for. Raises UsageError.

    options: those of `score` that only a race has, None where they were not given.
    """
    from fastcompat.decisions.racing.rule import RaceSettings

    given = {name: value for name, value in options.items() if value is not None}
    if until is None:
        if given:
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{listed}: here a race asks that (--until winner); without one, rank does")
        return None
    if only:
        raise UsageError("--only scores what a race has left out: give it without --until")
    figure = given.pop("sort", "auto")
    if "margin" in given and until.startswith("precision"):
        raise UsageError("--margin is about differences: leave it away with --until precision")
    if "margin" in given:
        given["margin"] = parse_share("--margin", given["margin"])
    asked = parse_until(until) | given
    RaceSettings(**asked)  # refuses now what is out of range
    return asked | {"figure": None if figure == "auto" else figure}


def everybody_but(run: Run, names: Sequence[str]) -> LeaveOut:
    """--only: every other generator is left out of every unit."""
    there = sorted({name for generation in run.generations for name in generation.generators})
    unknown = [name for name in names if name not in there]
    if unknown:
        listed = ", ".join(there[:SHOWN_GENERATORS]) + (" ..." if len(there) > SHOWN_GENERATORS else "")
        raise UsageError(f"--only {unknown[0]}: not a generator of this run; there are {listed}")
    others = {name: "not asked for: score --only" for name in there if names and name not in names}
    return lambda unit: others


def parse_until(text: str) -> dict[str, Any]:
    """--until winner, ranking or precision=0.5% -> what `RaceSettings` takes."""
    goal, equals, share = text.partition("=")
    if (goal == "precision") != bool(equals) or goal not in ("winner", "ranking", "precision"):
        raise UsageError(f"--until {text}: write winner, ranking or precision=X, for example precision=0.5%")
    return {"until": goal} | ({"precision": parse_share("--until precision", share)} if equals else {})


def parse_share(option: str, text: str) -> float:
    """0.5% or 0.005 -> 0.005."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    if match is None:
        raise UsageError(f"{option} {text}: write a share, 0.5% or 0.005")
    return float(match[1]) / (100 if match[2] else 1)


def hold_races(
    run: Run,
    passes: Sequence[Pass],
    asked: Mapping[str, Any],
    *,
    token_budget: int | None,
    worker: Worker,
    stop: Callable[[], bool],
) -> None:
    """Score prompts in the order of their hash until every race is over: one for each base model and reward model.

    asked: what `RaceSettings` takes, but `figure` may be None: CAR where there are losses and rewards.
    """
    from fastcompat.scoring.passes import fit_together

    for served in passes:
        show_pass(served)
    resident = fit_together(passes)
    races = _races(run, passes, asked, ratio=None if resident else RATIO_OF_TURNS)
    held = dict(zip(races, _names(races), strict=True))
    _show_start(races[0], len(races))
    for race in races:
        for name, why in race.history.before.items():
            say(f"  {escape(printable(name))}: {escape(printable(why))}")
    order, first = run.units_by_prompt(), run.first_prompts()
    of_pass = {served: [race for race in races if _served(run, served) & race.scorers] for served in passes}
    began, tokens = time.monotonic(), 0

    def score_to(served: Pass, below: str) -> int:
        """Score every unit that begins with a prompt below this, for one pass; the tokens that it took."""
        leave_out = partial(_left_out_by_all, of_pass[served], first)
        turn = partial(
            _score, run, served, leave_out=leave_out, token_budget=token_budget, claims=worker.claims, stop=stop
        )
        done = turn([unit for unit in order[worker.index :: worker.count] if first[unit] < below])
        if worker.count > 1:
            # Others may be slow, or gone: what they have not done yet, from the end, where they come last.
            done += turn([unit for unit in reversed(order) if first[unit] < below])
        if not resident:
            served.unload()
        return done

    for race in races:
        for look in race.history.looks:
            _show_look(run, race, look, held[race])
    for served, own in of_pass.items():
        # What earlier looks rest on is there, or was lost and is scored again.
        tokens += score_to(served, max(race.last_threshold for race in own))
    while open_races := [race for race in races if not race.over]:
        # Races that began in sessions with more or less memory may look at different times.
        below = min(race.next_threshold for race in open_races)
        for served, own in of_pass.items():
            if not all(race.over for race in own):
                tokens += score_to(served, below)
        for race in open_races:
            if race.next_threshold == below:
                units = [unit for unit in sorted(order) if first[unit] < below]
                _show_look(run, race, race.look(units), held[race])
    for race in races:
        _show_end(run, race, held[race])
    if tokens:
        say(f"{tokens:,} tokens in {duration(time.monotonic() - began)}")


def race_at(location: str, models: AskedModels, asked: Mapping[str, Any], stop: Callable[[], bool]) -> None:
    """What one of several workers of a race does, wherever it is; what it says of it, it says there."""
    from fastcompat.scoring.passes import Worker, find_scorer
    from fastcompat.store import open_run

    run, passes = open_run(location), models.passes()
    for scorer in [scorer for served in passes for scorer in served.scorers]:
        find_scorer(run, scorer)  # a dtype that was left open is that of the run's first worker
    hold_races(run, passes, asked, token_budget=models.token_budget, worker=Worker(claims=True), stop=stop)


def _score(
    run: Run,
    served: Pass,
    units: Sequence[Unit],
    *,
    leave_out: Callable[[Unit], Mapping[str, str]],
    token_budget: int | None,
    claims: bool,
    stop: Callable[[], bool],
) -> int:
    """Score units up to the next look; the tokens that were computed."""
    from fastcompat.scoring.engine import Progress
    from fastcompat.scoring.passes import Worker, refuse_set_aside, score_corpus

    display = LiveDisplay(served.name)
    progress = Progress(notify=display.scoring)
    try:
        with display.showing():
            score_corpus(
                run,
                served,
                token_budget=token_budget,
                worker=Worker(claims=claims),
                progress=progress,
                units=units,
                leave_out=leave_out,
                stop=stop,
            )
    except Interrupted:
        raise interrupted(run, " with the race") from None
    refuse_set_aside(run, progress)
    return progress.n_tokens


def _left_out_by_all(races: Sequence[RunRace], first: Mapping[Unit, str], unit: Unit) -> dict[str, str]:
    """Whom no race needs in a unit -> why, as the first race says."""
    of_each = [race.left_out(first[unit]) for race in races]
    return {name: why for name, why in of_each[0].items() if all(name in own for own in of_each)}


def _served(run: Run, served: Pass) -> set[str | None]:
    from fastcompat.scoring.passes import scorer_name

    return {scorer_name(run, scorer) for scorer in served.scorers}


def _races(run: Run, passes: Sequence[Pass], asked: Mapping[str, Any], *, ratio: float | None) -> list[RunRace]:
    """One race for each base model with each reward model; without reward models, with each reward of the corpus's."""
    from fastcompat.decisions.racing.rule import RaceSettings
    from fastcompat.decisions.racing.run_race import COLUMN, Field, RunRace
    from fastcompat.decisions.ranking.looks import RATIO
    from fastcompat.scoring.passes import scorer_name

    bases: list[str | None] = [scorer_name(run, served.base) for served in passes if served.base is not None]
    judges: list[str | None] = [scorer_name(run, served.reward) for served in passes if served.reward is not None]
    rewards = judges or [f"{COLUMN}{name}" for name in run.reward_columns]
    figure = asked["figure"] or ("car" if bases and rewards else "loss" if bases else "reward")
    if figure != "reward" and not bases:
        raise UsageError(f"a race by {figure} needs losses: name a base model with --base-model")
    if figure != "loss" and not rewards:
        raise UsageError(f"a race by {figure} needs rewards: name a reward model with --reward-model")
    if figure == "loss":
        rewards = [None]
    elif figure == "reward":
        bases = [None]
    settings = RaceSettings(**{**asked, "figure": figure})
    fields = {reward: Field.of(run, reward) for reward in rewards}
    return [
        RunRace.start(run, settings, fields[reward], base_model=base, reward_model=reward, ratio=ratio or RATIO)
        for base in bases
        for reward in rewards
    ]


def _names(races: Sequence[RunRace]) -> list[str]:
    """What tells several races apart, for people: nothing, where there is one."""
    if len(races) == 1:
        return [""]
    return [" · ".join(name for name in (race.base_model, race.reward_model) if name) for race in races]


def _show_start(race: RunRace, n_races: int) -> None:
    from fastcompat.decisions.racing.reading import question

    planned = [f"{round(share * race.n_prompts):,}" for share in race.shares]
    looks = ", ".join(planned[:3]) + (" ..." if len(planned) > 3 else "")
    error = (
        "plain 95% intervals, since the rule asks only how wide they are"
        if race.settings.until == "precision"
        else "any false claim: 1% on the way, below 5% in all"
    )
    several = f"; {n_races} races, one for each pair of models" if n_races > 1 else ""
    field = f"{len(race.history.names)} generators, {race.n_prompts:,} prompts in random order"
    say(f"\n[bold]race[/] for {question(race.settings)}: {field}")
    say(f"{counted_noun(len(planned), 'look')}, at {looks} prompts; {error}{several}")


def _show_look(run: Run, race: RunRace, look: Look, name: str) -> None:
    from fastcompat.decisions.racing.reading import lead, listed, share

    scored = look.n_prompts / race.n_prompts
    parts = [f"{len(look.out)} out: {listed(list(look.out))}"] if look.out else []
    if not look.over:
        out = {name for own in race.history.looks[: look.number] for name in own.out} | set(race.history.before)
        still_in = [name for name in race.history.names if name not in out]
        counts = [generation.generators for generation in run.generations]
        left = sum(own.get(name, 0) for own in counts for name in still_in) * (1 - scored)
        parts += [f"{len(still_in)} still in", lead(look), f"at most {round(left):,} responses more"]
    prefix = f"{escape(printable(name))}: " if name else ""
    text = " · ".join(part for part in parts if part) or "over"
    say(f"  {prefix}{look.n_prompts:>9,} prompts {share(scored):>6}  {escape(text)}")


def _show_end(run: Run, race: RunRace, name: str) -> None:
    from fastcompat.decisions.racing.reading import outcome, share
    from fastcompat.store.verification import scorer_progress

    raced = [store for store in run.scorers() if store.name in (race.base_model, race.reward_model)]
    most = max(scorer_progress(run, store, most_parts=1).n_rows for store in raced)
    prefix = f"{escape(printable(name))}: " if name else ""
    scored = f"{most:,} of {run.n_rows:,} responses scored ({share(most / max(run.n_rows, 1))})"
    say(f"{prefix}[bold]{escape(printable(outcome(race)))}[/]; {scored}")


def tell_races(run: Run) -> None:
    """Every race of a run: what it asks, and how it ended or stands."""
    from fastcompat.decisions.racing.reading import outcome, question
    from fastcompat.decisions.racing.run_race import RunRace
    from fastcompat.store import races_of

    races = [RunRace(run, store) for store in races_of(run)]
    for race, name in zip(races, _names(races), strict=True):
        former = race.store.record["corpus"] != run.fingerprints
        if former and not race.over:
            continue  # what --extend added is raced over from the beginning
        prefix = f"{escape(printable(name))}: " if name else ""
        before = " over the corpus before --extend" if former else ""
        say(f"race{before} for {question(race.settings)}: {prefix}[bold]{escape(printable(outcome(race)))}[/]")
