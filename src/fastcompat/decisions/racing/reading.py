"""What a race asks, how it stands and how it ended, in words."""

from __future__ import annotations

from fastcompat.decisions.racing.rule import Look, RaceSettings
from fastcompat.decisions.racing.run_race import RunRace
from fastcompat.wording import printable

# Names that a line lists.
SHOWN = 4


def question(settings: RaceSettings) -> str:
    """What a race asks, in a few words."""
    figure = {"car": f"CAR, beta {settings.beta:g}", "loss": "loss", "reward": "reward"}[str(settings.figure)]
    if settings.precision is not None:
        return f"every generator's {figure} to within {share(settings.precision)} of it"
    goal = "the best" if settings.until == "winner" else "the whole ranking"
    close = f", {share(settings.margin)} counts as equal" if settings.margin else ""
    return f"{goal} by {figure}{close}"


def outcome(race: RunRace) -> str:
    """How a race ended, or stands, in a sentence."""
    if not race.history.looks:
        return "not looked at yet"
    last = race.history.looks[-1]
    when = f"after {last.n_prompts:,} of {race.n_prompts:,} prompts ({share(last.n_prompts / race.n_prompts)})"
    if not race.over:
        return f"{len(race.history.still_in)} of {len(race.history.names)} generators still in {when}"
    if race.over == "winner":
        return f"winner: {last.leader}, {when}"
    if race.over == "margin":
        others = listed([name for _, name in last.equal])
        return f"winner: {last.leader}, at most {share(race.settings.margin)} below {others}, {when}"
    if race.over in ("ranking", "precision"):
        return f"{'every pair is settled' if race.over == 'ranking' else 'every figure is known'} {when}"
    still_in = race.history.still_in
    if race.settings.until == "precision":
        return f"the corpus ended before {listed(still_in)} {'was' if len(still_in) == 1 else 'were'} known well enough"
    return f"the corpus ended before {listed(still_in)} were told apart"


def lead(look: Look) -> str:
    """By how much the leader leads: chatty leads full-documentation by 1.9% (-0.8% to 4.6%)."""
    known = [standing for standing in look.standings if standing.lead is not None]
    if len(known) < 2:
        return ""
    first, second = known[:2]
    if second.lead is None or second.lead_low is None or second.lead_high is None:
        return f"{printable(first.generator)} leads"
    ahead, low, high = (f"{-100 * value:z.1f}%" for value in (second.lead, second.lead_high, second.lead_low))
    return f"{printable(first.generator)} leads {printable(second.generator)} by {ahead} ({low} to {high})"


def listed(names: list[str]) -> str:
    """The first few of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more


def share(value: float) -> str:
    """0.0163 -> 1.6%; what is not the whole is not rounded to it."""
    return "100%" if value >= 1 else f"{min(100 * value, 99.9):.2g}%" if 100 * value < 99.5 else "99.9%"
