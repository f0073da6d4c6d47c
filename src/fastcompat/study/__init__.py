"""Train on each candidate, measure what came of it, so that a ranking can be checked. In the order of the way:

settings     one TOML file, strictly read
rows         whose responses: the same prompts for every generator, some of them held out
plan         the grid of base models, generators and seeds, and what it will cost; DIR/plan.json
training     a base model and a generator's responses -> a tuned model, by TRL
answers      what a tuned model says to prompts, kept so that another judge can read it
constraints  instructions whose following a program can check
checkable    whether an answer is the one that a task has
evaluations  the table of evaluations by name, a function each
cells        a cell of the grid, trained and evaluated, each step once
work         cell after cell, beside other processes; outcomes.parquet
"""

from fastcompat.study.plan import Cost, Study, open_study, plan
from fastcompat.study.settings import Settings, read_settings
from fastcompat.study.work import run, write_outcomes

__all__ = ["Cost", "Settings", "Study", "open_study", "plan", "read_settings", "run", "write_outcomes"]
