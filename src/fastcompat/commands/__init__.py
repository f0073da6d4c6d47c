"""Commands that stand apart from `cli.py`, and the options that commands share."""
