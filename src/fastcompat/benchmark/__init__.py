"""This machine: what serves what (doctor), and how fast, beside the loops that everybody writes (bench).

What users run; what we measure for ourselves is in bench/.

    doctor.py        `fastcompat doctor`: what serves what on this machine, and why not something faster
    workloads.py     what is scored: seeded token ids, log-normal lengths
    subjects.py      on which models: real architectures with random weights, or a user's own model
    loops.py         by whom: plain loops and fastcompat, as functions from token sequences to mean losses
    rounds.py        in turn, in batches that fit into memory
    flops.py         what the work needs at least, and how fast this machine multiplies
    measurement.py   all of it: seconds, efficiency, and how far each one's losses are from float32
    machine.py       on what: processor, memory, versions
    table.py         as people read it

`bench/end_to_end.py` runs the same with more peers, `bench/rewards.py` that of reward models.
"""
