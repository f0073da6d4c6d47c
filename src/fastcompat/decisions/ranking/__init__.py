"""Which generator will teach the base model best, and how sure that is.

clustered_means  of responses to common prompts: sums, influences, bootstrap draws
intervals        how far a figure's interval reaches, who is best, who is clearly better than whom
estimates        reward, loss and CAR of every generator, and their differences
looks            when a run is looked at on its way, and how much further intervals reach then
unfinished       what may be said of a run that is not finished, or that a race stopped
counted          which responses count, from rows that come in chunks
ranking          the table: ranks, intervals, who is best under which beta
reading          what the table says, in words
"""
