"""A file of settings, strictly read."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_studies import settings_text

from fastcompat.errors import UsageError
from fastcompat.study.settings import TAKES, differences, read_settings, settings_of

TEXT = settings_text(Path("d"))


def test_what_is_said_is_read_and_the_rest_is_as_ever():
    settings = settings_of(TEXT, "s.toml")
    assert settings.inputs == ("d/responses.jsonl",)
    assert settings.seeds == (0, 1)
    assert settings.generators is None
    assert settings.training.learning_rate == 1e-3
    assert (settings.training.epochs, settings.training.lora_rank) == (1, None)
    assert [one.label for one in settings.evaluations] == ["reward", "win_rate", "held_out_loss"]
    assert settings.evaluations[2].on == "all"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("examples", "exmaples"), "no setting exmaples.*did you mean examples"),
        (("learning_rate", "learn_rate"), r"\[training\]: no setting learn_rate.*did you mean learning_rate"),
        (('name = "reward"', 'name = "rewards"'), "evaluation 1: 'rewards' is none of.*did you mean reward"),
        (("reference =", "referense ="), "evaluation 2: win_rate has no setting referense.*did you mean reference"),
        (('reference = "alpha"\n', ""), "evaluation 2: win_rate needs reference"),
        (("examples = 6", "examples = 0"), "examples must be above 0"),
        (("examples = 6", 'examples = "6"'), "examples is '6', not a number"),
        (("examples = 6\n", ""), "examples is lacking"),
        (("seeds = [0, 1]", "seeds = [0, 0]"), "seeds needs one or more, each once"),
        (("seeds = [0, 1]", "seeds = 2"), "seeds is a list"),
        (("seeds = [0, 1]", 'seeds = ["a"]'), "seeds has 'a'"),
        (("inputs =", 'run = "r"\ninputs ='), "a run or of inputs"),
        (('name = "win_rate"', 'name = "win_rate"\nlabel = "reward"'), "two evaluations are called reward"),
        (("[training]", "[training"), "no TOML"),
        (("device =", "lora_rank = 0\ndevice ="), "lora_rank must be above 0"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is_nearest(changed, said):
    with pytest.raises(UsageError, match=said):
        settings_of(TEXT.replace(*changed), "s.toml")


def test_no_evaluation_and_no_file():
    with pytest.raises(UsageError, match="no evaluation"):
        settings_of(TEXT[: TEXT.index("[[evaluations]]")], "s.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_settings("nowhere.toml")


def test_what_differs_is_named():
    old, new = settings_of(TEXT, "s"), settings_of(TEXT.replace("held_out = 4", "held_out = 5"), "s")
    assert differences(old, old) == []
    assert differences(old, new) == ["held_out: 4, now 5"]


def test_every_evaluation_of_the_table_can_be_asked_for():
    from fastcompat.study.evaluations import EVALUATIONS

    assert set(EVALUATIONS) == set(TAKES)
