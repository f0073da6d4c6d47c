"""The run directory: what is to be scored, what has been, and how both survive a kill. A file that is there is whole.

durable       written whole or not at all
beginnings    what is kept of a unit that is not finished
parts         one scorer's finished units
run           the corpus and all scorers, and what they have told so far, as one table
snapshot      what a run holds at one moment, in chunks of whole prompts
preparing     a corpus becomes a run
claims        who is at work on which unit
races         races over a run, and what their looks found
verification  how far a run is, and whether every file is what it should be
"""

from fastcompat.store.beginnings import Packing
from fastcompat.store.claims import Claims
from fastcompat.store.durable import replacing
from fastcompat.store.parts import LeaveOut, ScorerStore, Unit, leave_nothing_out
from fastcompat.store.races import RaceStore, races_of, start_race
from fastcompat.store.run import UNIT, Run, open_run
from fastcompat.store.snapshot import Snapshot, n_prompts
from fastcompat.store.verification import pending_rows, unscored_generators

__all__ = [
    "UNIT",
    "Claims",
    "LeaveOut",
    "Packing",
    "RaceStore",
    "Run",
    "ScorerStore",
    "Snapshot",
    "Unit",
    "leave_nothing_out",
    "n_prompts",
    "open_run",
    "pending_rows",
    "races_of",
    "replacing",
    "start_race",
    "unscored_generators",
]
