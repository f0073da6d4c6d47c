"""A ranking from as few prompts as it takes, with the chance of a false claim kept over all looks together.

rule           figures of so many prompts, and former looks -> who is out, and whether it is over
known_rewards  rewards of the corpus's own, known of all prompts, carry most of the noise
race           of figures of one's own
run_race       of a run: which rows a look takes, what it leaves on disk, whom a unit leaves out
reading        what a race asks, how it stands and how it ended, in words
"""
