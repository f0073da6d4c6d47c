"""fastcompat inside of other packages, a file each, which imports its package. Nothing else here imports these.

packages         whether it is there, and not too old
scorers          one scorer a process
lm_eval          a model of lm-evaluation-harness: its tokenisation and templates, our forward pass
trl              a callback of TRL's trainers, and of transformers': each generator's loss under the model in training
data_juicer      filters of Data-Juicer (data_juicer_ops: the file that it loads by its path)
datatrove        steps of datatrove: documents with their figures, a run's rows as documents
reward_server    a reward model behind HTTP, for trainers that ask for one response at a time
"""
