"""fastcompat inside of other packages, a file each, which imports its package. Nothing of fastcompat imports these.

packages         whether it is there, and not too old
scorers          one scorer a process
data_juicer      filters of Data-Juicer (data_juicer_ops: the file that it loads by its path)
reward_server    a reward model behind HTTP, for trainers that ask for one response at a time
datatrove        steps of datatrove: documents with their figures, a run's rows as documents
"""
