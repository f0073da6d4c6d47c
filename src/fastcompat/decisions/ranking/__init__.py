"""Which generator will teach the base model best, and how sure that is.

intervals means of responses to common prompts: influences, intervals, bootstrap draws
estimates reward, loss and CAR of every generator, and their differences
ranking   the table: ranks, intervals, who is best under which beta
reading   what the table says, in words
"""
