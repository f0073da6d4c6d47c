"""A run, or any frame of scores, -> a decision. Four alcoves; racing builds on ranking, else they do not
know each other. No torch.

ranking/     which generator, and how sure that is
racing/      the same from as few prompts as it takes
selection/   which responses to train on
validation/  which metric to trust
"""

from fastcompat.decisions.racing.race import Race
from fastcompat.decisions.ranking.ranking import MIN_PROMPTS, BetaRange, Figure, rank, sensitivity
from fastcompat.decisions.ranking.reading import FIGURE_NAMES, Row, beta_span, groups_of
from fastcompat.decisions.selection.selection import select
from fastcompat.decisions.selection.training_file import write_selection
from fastcompat.decisions.validation.correlation import average_ranks

__all__ = [
    "FIGURE_NAMES",
    "MIN_PROMPTS",
    "BetaRange",
    "Figure",
    "Race",
    "Row",
    "average_ranks",
    "beta_span",
    "groups_of",
    "rank",
    "select",
    "sensitivity",
    "write_selection",
]
