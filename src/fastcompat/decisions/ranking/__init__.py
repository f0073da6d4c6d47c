"""Which generator will teach the base model best, and how sure that is.

intervals means of responses to common prompts: influences, intervals, bootstrap draws
estimates reward, loss and CAR of every generator, and their differences
looks      when a run is looked at on its way, and how much further intervals reach then
unfinished what may be said of a run that is not finished, or that a race stopped
ranking   the table: ranks, intervals, who is best under which beta
reading   what the table says, in words
"""
