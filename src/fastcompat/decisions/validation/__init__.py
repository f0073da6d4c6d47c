"""Which metric to trust: how well each predicts what training gave.

outcomes      what training gave: a file's, or the paper's
correlation   Spearman's rho, its permutation p and interval
validation    every metric against the outcomes
reproduction  the paper's own table, from its own corpus
paper/        the paper's figures
"""
