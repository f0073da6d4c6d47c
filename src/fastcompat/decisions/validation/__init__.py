"""Which metric to trust: how well each predicts what training gave.

outcomes             what training gave: a file's, a study's, or the paper's
correlation          Spearman's rho, its permutation p and interval
validation           every metric against the outcomes
study_outcomes       a study's outcomes: a row a trained model and evaluation
several_base_models  rho over several base models, differences of it, and how reliable an outcome is
study                every metric against every outcome of a study
study_reading        the same as people read it
reproduction         the paper's own table, from its own corpus
paper/               the paper's figures
"""
