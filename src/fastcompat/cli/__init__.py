"""What users type and what they see. `--help` loads neither torch nor pyarrow; everything heavy is imported late.

application  the program: it registers the commands and ends with an exit code
options      options that several commands have
score        score
working      one process at it
processes    score on several GPUs, or in several processes
cluster      score --ray
racing       score --until: the loop of a race
decide       rank, report, select, reproduce
status       status, verify
study        study plan, run, show
inspect      inspect: one row, its tokens, and what of them counts
machine      doctor, bench
demo         demo
display      progress, and what was found
tables       rankings
inspection   a row
"""
