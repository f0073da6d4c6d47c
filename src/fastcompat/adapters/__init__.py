"""fastcompat inside of other packages, a file each. Nothing else of fastcompat imports these, and they import their package.

lm_eval     a model of lm-evaluation-harness: its tokenisation and templates, our forward pass
trl         a callback of TRL's trainers, and of transformers': each generator's loss under the model in training
"""
