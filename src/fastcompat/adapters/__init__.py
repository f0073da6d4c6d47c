"""fastcompat inside of other packages, a file each, which imports its package. Nothing else here imports these.

lm_eval     a model of lm-evaluation-harness: its tokenisation and templates, our forward pass
trl         a callback of TRL's trainers, and of transformers': each generator's loss under the model in training
"""
