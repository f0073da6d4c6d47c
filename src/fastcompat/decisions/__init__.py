"""A run, or any frame of scores, -> a decision. Alcoves; only a race knows another one, what it is a ranking of.

ranking/     which generator, and how sure that is
racing/      the same from as few prompts as it takes
selection/   which responses to train on
validation/  which metric to trust
"""

from fastcompat.decisions.racing.race import Race
from fastcompat.decisions.racing.reading import outcome, question
from fastcompat.decisions.racing.rule import History, Look, RaceSettings
from fastcompat.decisions.racing.run_race import RunRace, races_that_count
from fastcompat.decisions.ranking.estimates import RankingSettings
from fastcompat.decisions.ranking.ranking import (
    MIN_PROMPTS,
    BetaRange,
    Figure,
    check_groups,
    rank,
    rank_paired,
    sensitivity,
)
from fastcompat.decisions.ranking.reading import FIGURE_NAMES, Row, beta_span, groups_of
from fastcompat.decisions.ranking.unfinished import Models, Unfinished, unfinished_pairs
from fastcompat.decisions.selection.selection import select
from fastcompat.decisions.selection.training_file import write_selection
from fastcompat.decisions.validation.correlation import average_ranks
from fastcompat.decisions.validation.study_outcomes import OUTCOMES, STUDY_SCHEMA

__all__ = [
    "FIGURE_NAMES",
    "MIN_PROMPTS",
    "OUTCOMES",
    "STUDY_SCHEMA",
    "BetaRange",
    "Figure",
    "History",
    "Look",
    "Models",
    "Race",
    "RaceSettings",
    "RankingSettings",
    "Row",
    "RunRace",
    "Unfinished",
    "average_ranks",
    "beta_span",
    "check_groups",
    "groups_of",
    "outcome",
    "question",
    "races_that_count",
    "rank",
    "rank_paired",
    "select",
    "sensitivity",
    "unfinished_pairs",
    "write_selection",
]
