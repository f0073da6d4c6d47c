"""Which responses to train on.

settings       what may be asked for
generators     whose responses, and whether all of them are there
selection      the best response to every prompt, by a metric or a mixture
training_file  the chosen ones, as trainers read them
hub_target     a data set of the hub, as the place of such a file
dataset_card   what was chosen, and how
"""
