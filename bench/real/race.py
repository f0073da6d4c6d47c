"""What races over a finished run would have claimed, and after how much of it, against what the whole run says.

    python bench/real/race.py RUN [--out bench/results/racing-alpacaeval.json]

RUN: scored to its end, with losses of a base model and a reward. Only looks are taken, in a directory of the run's own
(RUN/race): they are those of a race that stops (tests/cli/test_racing.py holds them equal, byte for byte).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.decisions import RaceSettings, RunRace, rank
from fastcompat.decisions.racing.run_race import COLUMN, Field
from fastcompat.store import Run, open_run

RESULT = Path(__file__).parents[1] / "results" / "racing-alpacaeval.json"
QUESTIONS: dict[str, dict[str, Any]] = {
    "winner": {"until": "winner"},
    "winner, no margin": {"until": "winner", "margin": 0.0},
    "ranking": {"until": "ranking"},
    "ranking, no margin": {"until": "ranking", "margin": 0.0},
    "winner by loss": {"until": "winner", "figure": "loss"},
    "winner by reward": {"until": "winner", "figure": "reward"},
}


def main() -> None:
    """Hold every race, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    run = open_run(options.run)
    found = {title: held(run, asked) for title, asked in QUESTIONS.items()}
    field = Field.of(run)
    result = {"prompts": field.n_prompts, "generators": len(field.generators), "responses": run.n_rows, "races": found}
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def held(run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """One race, and the whole run's answer to the same question."""
    settings = RaceSettings(**{"figure": "car", **asked})
    (base,) = [store.name for store in run.scorers() if store.kind == "base_model"]
    (column,) = run.reward_columns
    race = RunRace.start(
        run,
        settings,
        Field.of(run),
        base_model=None if settings.figure == "reward" else base,
        reward_model=None if settings.figure == "loss" else f"{COLUMN}{column}",
    )
    order, first = run.units_by_prompt(), run.first_prompts()
    rows = run.corpus(["prompt_id", "generator"])
    scored = pa.array([False] * rows.num_rows)
    while not race.over:
        # Whoever is left out of a unit is left out of its prompts: units begin at prompts.
        needed = pc.less(rows["prompt_id"], race.next_threshold)
        out = [name for name, why in race.history.out.items() if race.left_out(race.next_threshold).get(name)]
        needed = pc.and_(needed, pc.invert(pc.is_in(rows["generator"], value_set=pa.array(out, pa.string()))))
        scored = pc.or_(scored, needed)
        race.look([unit for unit in sorted(order) if first[unit] < race.next_threshold])
    figure = str(settings.figure)
    whole = {row["generator"]: row for row in rank(run, sort_by=settings.figure).to_pylist()}
    sign = -1 if figure == "loss" else 1
    best = max(whole, key=lambda name: sign * whole[name][figure])
    claims = [pair for look in race.history.looks for pair in look.claims]
    turned = [pair for pair in claims if sign * whole[pair[0]][figure] < sign * whole[pair[1]][figure]]
    return {
        "over": race.over,
        "prompts": race.history.looks[-1].n_prompts,
        "responses_share": round(pc.sum(scored).as_py() / run.n_rows, 4),
        "leader": race.history.looks[-1].leader,
        "best_of_the_whole_run": best,
        "claims": len(claims),
        "claims_that_the_whole_run_turns_around": turned,
    }


if __name__ == "__main__":
    main()
