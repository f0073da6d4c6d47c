"""The run directory: what is to be scored, what has been, and how both survive a kill. A file that is there is whole.

durable       written whole or not at all, on a disk
places        a folder of files, on a disk (objects: in an object store)
beginnings    what is kept of a unit that is not finished
parts         one scorer's finished units
run           the corpus and all scorers, and what they have told so far, as one table
snapshot      what a run holds at one moment, in chunks of whole prompts
preparing     a corpus becomes a run
tasks         what a preparation consists of, on a disk that several workers share
preparers     its workers: this process, or children of it
claims        who is at work on which unit, or on which task
logs          what was done, when, by each process
exports       scores in the frames of other packages
races         races over a run, and what their looks found
verification  how far a run is, and whether every file is what it should be
"""

from fastcompat.store.beginnings import Packing
from fastcompat.store.claims import TRIES, Claims, forget, forget_dead
from fastcompat.store.durable import process_name
from fastcompat.store.parts import LeaveOut, ScorerStore, Unit, leave_nothing_out
from fastcompat.store.places import Place, is_remote, new_file, place_of
from fastcompat.store.preparing import CorpusSettings, prepare_run
from fastcompat.store.races import RaceStore, races_of, start_race
from fastcompat.store.run import UNIT, Run, open_run
from fastcompat.store.snapshot import Snapshot, n_prompts
from fastcompat.store.verification import pending_rows, unscored_generators

__all__ = [
    "TRIES",
    "UNIT",
    "Claims",
    "CorpusSettings",
    "LeaveOut",
    "Packing",
    "Place",
    "RaceStore",
    "Run",
    "ScorerStore",
    "Snapshot",
    "Unit",
    "forget",
    "forget_dead",
    "is_remote",
    "leave_nothing_out",
    "n_prompts",
    "new_file",
    "open_run",
    "pending_rows",
    "place_of",
    "prepare_run",
    "process_name",
    "races_of",
    "start_race",
    "unscored_generators",
]
